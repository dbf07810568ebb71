"""The functions of ``hf_paged.attention.flash_functions``, by the arguments that transformers has for them."""

import pytest
import torch

from hf_paged.attention import flash_functions

D = 16


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize("window", [(-1, -1), (3, 0)])
def test_a_paged_cache_gives_what_dense_keys_give(window):
    """New tokens of two sequences behind 5 and 9 cached ones, lengths and tables as columns of others."""
    lengths, new, page_size = [5, 9], 2, 8
    q, k, v = torch.randn(2, new, 4, D), torch.randn(2, 11, 2, D), torch.randn(2, 11, 2, D)
    caches = [torch.full((5, page_size, 2, D), float("nan")) for _ in "kv"]
    table = torch.tensor([[3, 9, 0, 9], [1, 9, 4, 9]])[:, ::2]
    for cache, x in zip(caches, (k, v)):
        for row, length in enumerate(lengths):
            for token in range(length):
                cache[table[row, token // page_size], token % page_size] = x[row, token]
    fresh = [torch.stack([x[row, n : n + new] for row, n in enumerate(lengths)]) for x in (k, v)]
    out = flash_functions.flash_attn_with_kvcache(
        q, *caches, *fresh, cache_seqlens=torch.tensor([lengths, [0, 0]]).T[:, 0], block_table=table, causal=True,
        window_size=window,
    )  # fmt: skip
    for row, length in enumerate(lengths):
        keys = [x[row : row + 1, : length + new] for x in (k, v)]
        expected = flash_functions.flash_attn_func(q[row : row + 1], *keys, causal=True, window_size=window)
        assert torch.allclose(out[row], expected[0], atol=1e-6)


def test_arguments_that_make_no_sense():
    q, cache = torch.randn(1, 2, 4, D), torch.zeros(2, 8, 2, D)
    paged = dict(cache_seqlens=int32(3), block_table=int32(0)[None])
    with pytest.raises(ValueError, match="needs both k and v"):
        flash_functions.flash_attn_with_kvcache(q, cache, cache, q[:, :, :2], **paged)
    with pytest.raises(ValueError, match="needs block_table and cache_seqlens"):
        flash_functions.flash_attn_with_kvcache(q, cache, cache)
    with pytest.raises(TypeError, match=r"window must be an integer, got 2\.7"):
        flash_functions.flash_attn_func(q, q, q, window_size=(2.7, 0))
    lengths = (q[0], q[0], q[0], int32(0, 2), int32(0, 2))
    with pytest.raises(TypeError, match=r"max_seqlen_q must be an integer, got 2\.5"):
        flash_functions.flash_attn_varlen_func(*lengths, 2.5, 2)
    expected = flash_functions.flash_attn_varlen_func(*lengths, 2, 2)
    assert torch.equal(flash_functions.flash_attn_varlen_func(*lengths, torch.tensor(2), int32(2)[0]), expected)
