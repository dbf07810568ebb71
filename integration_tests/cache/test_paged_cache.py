"""PagedCache against DynamicCache: the same keys, the same tokens, and pages accounted for after every operation."""

import copy
import gc
import random
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from host import cache_of, with_cache
from transformers import (
    DynamicCache,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GptOssConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

import hf_paged
from hf_paged.attention.interface import paged_flash_attention
from hf_paged.cache.lazy_states import LazyStates
from hf_paged.cache.paged_layer import PagedLayer
from hf_paged.paging import GONE

SHAPE = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "eos_token_id": None, "pad_token_id": 0,
}  # fmt: skip


def model(attn="paged_flash", kind="llama"):
    torch.manual_seed(1)
    cls, config = {
        "llama": (LlamaForCausalLM, LlamaConfig(**SHAPE)),
        "mistral": (MistralForCausalLM, MistralConfig(**SHAPE, sliding_window=7)),
    }[kind]
    made = cls._from_config(config, attn_implementation=attn).eval()
    for parameter in made.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.3)
    return made


def padded_batch():
    ids = torch.randint(1, 97, (3, 21))
    mask = torch.ones_like(ids)
    mask[0, :5], mask[2, :19] = 0, 0
    return ids * mask, mask


@pytest.mark.parametrize("page_size", [8, 16, 64])
@pytest.mark.parametrize("kind", ["llama", "mistral"])
@pytest.mark.parametrize(
    "mode",
    [
        {"do_sample": False},
        {"do_sample": True, "top_k": 20},
        {"num_beams": 3, "do_sample": False},
        {"num_beams": 4, "num_return_sequences": 2, "do_sample": True},
        {"num_return_sequences": 3, "do_sample": True},
        {"prompt_lookup_num_tokens": 3, "do_sample": False},
        {"prefill_chunk_size": 6, "do_sample": False},
    ],
    ids=lambda mode: "-".join(k for k in mode if k != "do_sample") or ("sample" if mode["do_sample"] else "greedy"),
)
def test_every_mode_gives_eagers_tokens(poison, page_size, kind, mode):
    ids, mask = padded_batch()
    if "prompt_lookup_num_tokens" in mode or "prefill_chunk_size" in mode:
        ids, mask = ids[1:2], mask[1:2]
    tokens = {}
    for attn in ("eager", "paged_flash"):
        m = model(attn, kind)
        cache = hf_paged.PagedCache(m.config, page_size=page_size) if attn == "paged_flash" else None
        torch.manual_seed(3)
        out = m.generate(
            ids, attention_mask=mask, max_new_tokens=24, **with_cache(cache), return_dict_in_generate=True, **mode
        )
        tokens[attn] = out.sequences
        if cache is not None:
            assert cache_of(out) is cache
            cache.check()
    assert torch.equal(tokens["eager"], tokens["paged_flash"])
    assert len(tokens["eager"].unique()) > 10


def test_pages_by_the_token():
    """Pages are proportional to the tokens held: padding owns none, and everything is given back."""
    m = model()
    ids, mask = padded_batch()
    cache = hf_paged.PagedCache(m.config, page_size=8)
    with torch.no_grad():
        m(ids, attention_mask=mask, **with_cache(cache))
    lengths = mask.sum(1).tolist()
    assert cache.groups[None].table.lengths == lengths
    assert cache.pages_in_use == sum(-(-n // 8) for n in lengths)
    assert cache.get_seq_length() == 21
    cache.check()
    cache.reset()
    assert cache.pages_in_use == 0
    assert cache.get_seq_length() == 0
    cache.check()
    with torch.no_grad():
        m(ids[:1, 5:], **with_cache(cache))  # another batch size
    assert cache.num_seqs == 1


def test_gathered_states_equal_dynamic_cache(poison):
    """keys and values, with zeros where DynamicCache holds the padding's."""
    m = model()
    ids, mask = padded_batch()
    dense, paged = DynamicCache(config=m.config), hf_paged.PagedCache(m.config, page_size=8)
    with torch.no_grad():
        for cache in (dense, paged):
            m(ids[:, :15], attention_mask=mask[:, :15], **with_cache(cache))
            m(ids[:, 15:], attention_mask=mask, **with_cache(cache))
    held = mask.bool()[:, None, :, None]
    for a, b in zip(dense.layers, paged.layers):
        for x, y in ((a.keys, b.keys), (a.values, b.values)):
            assert x.shape == y.shape
            assert torch.allclose(x * held, y, atol=1e-5)


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_other_implementations_get_dense_states(poison, attn, kind):
    m = model(attn, kind)
    ids, mask = padded_batch()
    expected = m.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False)
    cache = hf_paged.PagedCache(m.config, page_size=8)
    assert torch.equal(
        m.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False, **with_cache(cache)), expected
    )
    cache.check()


def test_operations_follow_dynamic_cache(poison):
    """crop, reorder_cache, batch_select_indices and batch_repeat_interleave, then a step on the result."""
    m = model()
    ids, mask = padded_batch()
    operations = [
        ("crop", -4), ("reorder_cache", torch.tensor([2, 0, 0])), ("batch_repeat_interleave", 2),
        ("batch_select_indices", torch.tensor([5, 1, 0])), ("crop", 0), ("reorder_cache", torch.tensor([1, 2, 1])),
    ]  # fmt: skip
    dense, paged = DynamicCache(config=m.config), hf_paged.PagedCache(m.config, page_size=8)
    masks = mask
    with torch.no_grad():
        for cache in (dense, paged):
            m(ids, attention_mask=mask, **with_cache(cache))
        for name, argument in operations:
            getattr(dense, name)(argument)
            getattr(paged, name)(argument)
            paged.check()
            if name == "crop":
                masks = masks[:, : masks.shape[1] + argument] if argument else masks
            elif name == "batch_repeat_interleave":
                masks = masks.repeat_interleave(argument, 0)
            else:
                masks = masks[argument]
            assert paged.get_seq_length() == dense.get_seq_length()
            new = torch.randint(1, 97, (masks.shape[0], 2))
            masks = torch.cat([masks, torch.ones_like(new)], 1)
            positions = (masks.cumsum(1) - 1)[:, -2:]
            logits = [
                m(new, attention_mask=masks, position_ids=positions, **with_cache(c)).logits for c in (dense, paged)
            ]
            assert torch.allclose(*logits, atol=1e-4)
            paged.check()


def test_forks_share_pages_until_they_write():
    m = model()
    cache = hf_paged.PagedCache(m.config, page_size=8)
    with torch.no_grad():
        m(torch.randint(1, 97, (1, 20)), **with_cache(cache))
    assert cache.pages_in_use == 3
    cache.batch_repeat_interleave(5)
    assert cache.pages_in_use == 3
    with torch.no_grad():
        m(torch.randint(1, 97, (5, 1)), **with_cache(cache))
    assert cache.pages_in_use == 2 + 5
    cache.check()


def test_padding_inside_a_conversation(poison):
    """A second call whose new columns are padded too: [pad a b | pad c d]."""
    m = model()
    first, second = torch.randint(1, 97, (2, 5)), torch.randint(1, 97, (2, 4))
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, :2], mask[0, 5:7] = 0, 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache = hf_paged.PagedCache(m.config, page_size=8)
    with torch.no_grad():
        m(first, attention_mask=mask[:, :5], position_ids=positions[:, :5], **with_cache(cache))
        logits = m(second, attention_mask=mask, position_ids=positions[:, 5:], **with_cache(cache)).logits
        cache.check()
        assert cache.groups[None].table.lengths == [5, 9]
        for row in range(2):
            held = mask[row].bool()
            alone = m(torch.cat([first, second], 1)[row][held][None], use_cache=False).logits[0]
            count = int(held[5:].sum())
            assert torch.allclose(logits[row][held[5:]], alone[-count:], atol=1e-4)


def test_out_of_pages_leaves_the_cache_usable():
    m = model()
    cache = hf_paged.PagedCache(m.config, page_size=8, num_pages=4)
    ids = torch.randint(1, 97, (1, 30))
    with torch.no_grad():
        expected = m(ids, use_cache=False).logits
        m(ids[:, :20], **with_cache(cache))
        with pytest.raises(hf_paged.OutOfPagesError, match=r"needs 2 more pages, 1 of 4 are free") as caught:
            m(torch.randint(1, 97, (1, 20)), **with_cache(cache))
        assert (caught.value.needed, caught.value.free, caught.value.total) == (2, 1, 4)
        cache.check()
        assert cache.get_seq_length() == 20
        logits = m(ids[:, 20:], **with_cache(cache)).logits
    assert torch.allclose(logits, expected[:, 20:], atol=1e-4)
    cache.check()


def test_deep_copy_is_independent():
    m = model()
    ids = torch.randint(1, 97, (1, 20))
    cache = hf_paged.PagedCache(m.config)
    with torch.no_grad():
        m(ids, **with_cache(cache))
        twin = copy.deepcopy(cache)
        tail = torch.randint(1, 97, (1, 3))
        a = m(tail, **with_cache(cache)).logits
        b = m(tail, **with_cache(twin)).logits
    assert torch.equal(a, b)
    for c in (cache, twin):
        c.check()
        assert c.get_seq_length() == 23


def test_a_mask_that_hides_stored_tokens_is_refused():
    m = model()
    cache = hf_paged.PagedCache(m.config)
    mask = torch.ones(1, 7, dtype=torch.long)
    with torch.no_grad():
        m(torch.randint(1, 97, (1, 6)), **with_cache(cache))
        mask[0, 1] = 0
        with pytest.raises(
            ValueError, match=r"hides column 1 of row 0, which the cache holds as a token.*every pad_token_id"
        ):
            m(torch.randint(1, 97, (1, 1)), attention_mask=mask, **with_cache(cache))
        with pytest.raises(ValueError, match=r"must cover the 6 columns in the cache and the 1 new ones, \[1, 7\]"):
            m(torch.randint(1, 97, (1, 1)), attention_mask=torch.tensor([[0, 1, 1]]), **with_cache(cache))


def test_another_batch_size_is_refused():
    m = model()
    cache = hf_paged.PagedCache(m.config)
    with torch.no_grad():
        m(torch.randint(1, 97, (2, 6)), **with_cache(cache))
        with pytest.raises(ValueError, match=r"holds 2 sequences, the step brings 3: call reset\(\)"):
            m(torch.randint(1, 97, (3, 1)), **with_cache(cache))


@pytest.mark.parametrize(
    ("arguments", "kind", "says"),
    [
        ({"page_size": 12}, ValueError, r"page_size must be one of \(8, 16"),
        ({"kv_dtype": "fp4"}, ValueError, "kv_dtype must be one of"),
        ({"num_pages": 0}, ValueError, "num_pages must be None or a positive int, got 0"),
        ({"pages": 3}, TypeError, "unexpected keyword argument 'pages'"),
    ],
)
def test_bad_arguments(arguments, kind, says):
    with pytest.raises(kind, match=says):
        hf_paged.PagedCache(LlamaConfig(**SHAPE), **arguments)


def test_config_is_required():
    with pytest.raises(TypeError, match=r"config must be a transformers config \(model.config\), got dict"):
        hf_paged.PagedCache({})


def test_crop_refuses_positive_numbers():
    cache = hf_paged.PagedCache(LlamaConfig(**SHAPE))
    with pytest.raises(ValueError, match="must be 0 or negative"):
        cache.crop(3)


def test_gradients_are_refused_not_lost():
    m = model("eager")
    with pytest.raises(ValueError, match="without their gradients"):
        m(torch.randint(1, 97, (1, 6)), **with_cache(hf_paged.PagedCache(m.config)))


def test_states_look_dense_to_other_code(poison):
    """The stand-in has the dense shape, and any operation gathers."""
    cache = hf_paged.PagedCache(model().config, page_size=8)
    states = []
    for length in (11, 1):
        key, value = torch.randn(2, 2, length, 16), torch.randn(2, 2, length, 16)
        states.append((key, value))
        config = cache.config
        config._attn_implementation = "paged_flash"
        returned = cache.update(key, value, 0)
    assert all(isinstance(x, LazyStates) for x in returned)
    assert returned[0].shape == (2, 2, 12, 16)
    for got, expected in zip(returned, zip(*states)):
        assert torch.equal(got + 0, torch.cat(expected, 2))
        assert torch.equal(torch.nn.functional.pad(got, [0, 3])[..., :16], torch.cat(expected, 2))
    assert "LazyStates(keys" in repr(returned[0])
    assert torch.equal(torch.empty(2, 2, 12, 16).copy_(returned[0]), torch.cat([key for key, _ in states], 2))
    # What is gathered is a copy: a change of it would be lost.
    for change in (lambda x: x.add_(1), lambda x: x.contiguous().clamp_(0, 1), lambda x: x.__imul__(2)):
        with pytest.raises(hf_paged.UnsupportedModelError, match=r"aten\.\w+_\..* changes keys or values in place"):
            change(returned[1])


WRITES = {
    "slice": lambda x: x.__setitem__((slice(None), slice(None), 0), 0),
    "index": lambda x: x[0].__setitem__(torch.tensor([1]), 0.0),
    "transpose": lambda x: x.transpose(1, 2).mul_(2),
    "flatten": lambda x: x.flatten().zero_(),
    "reshape": lambda x: x.reshape(2, 2, -1).zero_(),
    "unbind": lambda x: x.unbind(0)[1].add_(1),
    "copy": lambda x: x.narrow(2, 0, 1).copy_(torch.full((2, 2, 1, 16), float("nan"))),
    "detach": lambda x: x.detach()[0].mul_(2),
    "masked": lambda x: x[0].masked_fill_(torch.ones(16, dtype=torch.bool), 1),
    "out": lambda x: torch.add(x[0], 1, out=x[1]),
    "foreach": lambda x: torch._foreach_add_([x[0]], 1),
}


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("write", WRITES)
def test_a_write_through_a_view_of_keys_or_values_is_refused(write, mode):
    """It would be lost: attention reads pages. In a first step what is shown is what the model brought."""
    config = model().config
    config._attn_implementation = "paged_flash"
    module = SimpleNamespace(is_causal=True, config=config)
    new = lambda: torch.randn(2, 2, 3, 16)  # noqa: E731
    for which, kind in enumerate(("keys", "values")):
        for steps_before in (0, 1):
            cache = hf_paged.PagedCache(config, page_size=8)
            with mode():
                for _ in range(steps_before):
                    attend(module, new(), *cache.update(new(), new(), 0))
                states = cache.update(new(), new(), 0)
                WRITES[write](states[which])
                for read in (lambda: attend(module, new(), *states), lambda: states[which] + 1):  # noqa: B023
                    with pytest.raises(hf_paged.UnsupportedModelError, match=f"a view of the {kind} was written, beh"):
                        read()


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_a_view_of_keys_that_is_only_read_is_no_change(mode):
    config = model().config
    config._attn_implementation = "paged_flash"
    module = SimpleNamespace(is_causal=True, config=config)
    cache = hf_paged.PagedCache(config, page_size=8)
    with mode():
        for length in (3, 1):
            key, value = cache.update(torch.randn(2, 2, length, 16), torch.full((2, 2, length, 16), float("nan")), 0)
            views = key.transpose(1, 2), value[:, :, 0], key.flatten()
            assert all(bool(x.sum().isnan()) == (i == 1) for i, x in enumerate(views))
            (key * 2).add_(1)
            assert attend(module, torch.randn(2, 2, length, 16), key, value).shape == (2, length, 2, 16)


def attend(module, query, key, value):
    return paged_flash_attention(module, query, key, value, None, scaling=0.25, position_ids=None)[0]


def test_generation_in_inference_mode_then_outside():
    m = model()
    ids = torch.randint(1, 97, (1, 9))
    cache = hf_paged.PagedCache(m.config)
    with torch.inference_mode():
        m(ids, **with_cache(cache))
    with torch.no_grad():
        logits = m(ids[:, :2], **with_cache(cache)).logits
        expected = m(torch.cat([ids, ids[:, :2]], 1), use_cache=False).logits[:, -2:]
    assert torch.allclose(logits, expected, atol=1e-4)


def test_layers_follow_the_config():
    cache = hf_paged.PagedCache(GptOssConfig(**SHAPE, sliding_window=7, num_local_experts=4))
    assert [type(layer) for layer in cache.layers] == [PagedLayer, PagedLayer]
    assert cache.is_sliding == [True, False]
    assert "0 pages of 16 tokens" in repr(cache)


def test_a_sliding_window_gives_pages_back():
    """A windowed layer holds its window and two pages at most, after any number of tokens; full layers hold all."""
    torch.manual_seed(1)
    config = Gemma3TextConfig(
        **SHAPE, sliding_window=20, layer_types=["sliding_attention", "full_attention"], max_position_embeddings=512
    )
    m = Gemma3ForCausalLM._from_config(config, attn_implementation="paged_flash").eval()
    cache = hf_paged.PagedCache(config, page_size=8)
    assert set(cache.groups) == {None, 20}
    ids, mask = padded_batch()
    with torch.no_grad():
        for step in range(60):
            m(ids if step == 0 else ids[:, :1], attention_mask=mask, **with_cache(cache))
            mask = torch.cat([mask, mask.new_ones(3, 1)], 1)
            for window, group in cache.groups.items():
                for pages, length in zip(group.table.pages, group.table.lengths):
                    held = sum(page != GONE for page in pages)
                    assert held == -(-length // 8) if window is None else held <= 20 // 8 + 2
            cache.check()
        mask = torch.cat([mask, mask.new_ones(3, 99)], 1)
        m(torch.randint(1, 97, (3, 100)), attention_mask=mask, **with_cache(cache))
    cache.check()
    assert all(sum(page != GONE for page in pages) <= 20 // 8 + 2 for pages in cache.groups[20].table.pages)


@pytest.mark.parametrize("attn", ["paged_flash", "sdpa"])
def test_windowed_layers_look_like_dynamic_cache(poison, attn):
    """Step by step: lengths, mask sizes, the states returned, and what is kept."""
    m = model(attn, "mistral")
    dense, paged = DynamicCache(config=m.config), hf_paged.PagedCache(m.config, page_size=8)
    torch.manual_seed(0)
    for length in (3, 1, 1, 9, 1, 2, 30, 1):
        key, value = torch.randn(2, 2, length, 16), torch.randn(2, 2, length, 16)
        assert paged.get_mask_sizes(length, 0) == dense.get_mask_sizes(length, 0)
        with torch.no_grad():
            expected, got = (cache.update(key, value, 0) for cache in (dense, paged))
        for a, b in zip(expected, got):
            assert a.shape == b.shape
            assert torch.equal(a, b + 0)
        assert paged.get_seq_length() == dense.get_seq_length()
        assert torch.equal(paged.layers[0].keys, dense.layers[0].keys)
        paged.check()


def test_rolling_back_over_a_window_needs_recording():
    m = model("paged_flash", "mistral")
    ids = torch.randint(1, 97, (1, 60))
    with torch.no_grad():
        cache = hf_paged.PagedCache(m.config, page_size=8)
        for start in (0, 40):
            m(ids[:, start : start + 40], **with_cache(cache))
        with pytest.raises(RuntimeError, match=r"given back token \d+, .* call activate_past_recording"):
            cache.crop(-20)
        cache.check()
        cache = hf_paged.PagedCache(m.config, page_size=8)
        m(ids[:, :40], **with_cache(cache))
        cache.activate_past_recording()
        m(torch.randint(1, 97, (1, 20)), **with_cache(cache))
        cache.crop(-20)
        logits = m(ids[:, 40:], **with_cache(cache)).logits
        assert torch.allclose(logits, m(ids, use_cache=False).logits[:, 40:], atol=1e-4)
        cache.check()


@pytest.mark.parametrize("kv_dtype", ["fp8", "int8"])
def test_quantised_pages(poison, kv_dtype):
    """A first step is exact; later ones read what was stored, in the kernel as by gathering; half the bytes."""
    m = model()
    ids, mask = padded_batch()
    new = torch.randint(1, 97, (3, 1))
    longer = torch.cat([mask, mask.new_ones(3, 1)], 1)
    steps = []
    with torch.no_grad():
        exact = m(ids, attention_mask=mask, use_cache=False).logits
        for attn in ("paged_flash", "sdpa"):
            m.set_attn_implementation(attn)
            cache = hf_paged.PagedCache(m.config, page_size=8, kv_dtype=kv_dtype)
            first = m(ids, attention_mask=mask, **with_cache(cache)).logits
            assert torch.allclose(first * mask[..., None], exact * mask[..., None], atol=1e-4)
            assert cache.pool.page_bytes == 2 * 2 * 2 * 8 * (16 + 4)  # layers, k and v, heads, slots, dim and scale
            steps.append(m(new, attention_mask=longer, **with_cache(cache)).logits[:, 0])
            cache.batch_repeat_interleave(2)
            steps.append(
                m(
                    torch.cat([new, new], 0),
                    attention_mask=torch.cat([longer, longer[:, -1:]], 1).repeat_interleave(2, 0),
                    **with_cache(cache),
                ).logits[:, 0]
            )
            cache.check()
        full = m(torch.cat([ids, new], 1), attention_mask=longer, use_cache=False).logits[:, -1]
    for paged, gathered in zip(steps[:2], steps[2:]):
        assert torch.allclose(paged, gathered, atol=1e-3)
    assert (steps[0] - full).norm() > 1e-5 * full.norm()


def test_outlier_channels_of_keys_cost_int8_pages_little(poison):
    """Keys of which two channels are 100 times larger, taken back by the queries, in the kernel as by gathering."""
    torch.manual_seed(1)
    config = LlamaConfig(**{**SHAPE, "head_dim": 64})
    m = LlamaForCausalLM._from_config(config, attn_implementation="paged_flash").eval()
    with torch.no_grad():
        for layer in m.model.layers:
            attention = layer.self_attn
            for projection, factor in ((attention.k_proj, 100.0), (attention.q_proj, 0.01)):
                # Channels 5 and 37 turn together in the rotary embedding.
                projection.weight.mul_(8).view(-1, 64, 64)[:, [5, 37]] *= factor
        ids = torch.randint(1, 97, (2, 60))
        expected = m(ids, use_cache=False).logits[:, 40:]
        for attn in ("paged_flash", "sdpa"):
            m.set_attn_implementation(attn)
            cache = hf_paged.PagedCache(m.config, page_size=8, kv_dtype="int8")
            m(ids[:, :40], **with_cache(cache))
            logits = torch.cat([m(ids[:, t : t + 1], **with_cache(cache)).logits for t in range(40, 60)], 1)
            # Without the rotation it is 0.28.
            assert (logits - expected).norm() <= 0.1 * expected.norm()


def test_caches_share_a_pool():
    m = model()
    pool = hf_paged.PagePool(8, 12)
    one, two = hf_paged.PagedCache(m.config, pool=pool), hf_paged.PagedCache(m.config, pool=pool)
    ids = torch.randint(1, 97, (1, 30))
    with torch.no_grad():
        expected = m(ids, use_cache=False).logits[:, -1]
        for cache in (one, two):
            m(ids[:, :29], **with_cache(cache))
        for cache in (one, two):
            assert torch.allclose(m(ids[:, 29:], **with_cache(cache)).logits[:, -1], expected, atol=1e-4)
        assert pool.pages_in_use == 8
        assert "1 sequences, 30 columns, 4 pages" in repr(one)  # Its own, not the other's.
        assert (one.pages_in_use, one.bytes_in_use) == (4, pool.bytes_in_use // 2)
        pool.check()
        with pytest.raises(hf_paged.OutOfPagesError):
            m(torch.randint(1, 97, (1, 60)), **with_cache(two))
        del one, cache
        gc.collect()
        assert pool.pages_in_use == 4
        pool.check()
        m(torch.randint(1, 97, (1, 60)), **with_cache(two))
    with pytest.raises(ValueError, match="those of the pool"):
        hf_paged.PagedCache(m.config, pool=pool, page_size=8)
    with pytest.raises(ValueError, match="a pool of its own"):
        hf_paged.PagedCache(model(kind="mistral").config, pool=pool)


@pytest.mark.parametrize("kind", ["llama", "mistral"])
@pytest.mark.parametrize("page_size", [8, 16])
def test_a_chat_computes_only_the_new_turn(poison, kind, page_size):
    """Six turns, each a fresh cache on a shared pool: the history is found again, and tokens equal eager's."""
    m, eager = model(kind=kind), model("eager", kind)
    pool = hf_paged.PagePool(page_size)
    history, before = torch.randint(1, 97, (1, 21)), 0
    for turn in range(6):
        cache = hf_paged.PagedCache(m.config, pool=pool)
        reused = cache.match_prefix(history)
        # The last sampled token of a turn was never computed.
        assert reused == (0 if turn == 0 else (before - 1) // page_size * page_size), turn
        options = {"attention_mask": torch.ones_like(history), "max_new_tokens": 9, "do_sample": False}
        out = m.generate(history, **with_cache(cache), **options)
        assert torch.equal(out, eager.generate(history, **options)), turn
        cache.store_prefix(out)
        pool.check()
        before = out.shape[1]
        history = torch.cat([out, torch.randint(1, 97, (1, 5))], 1)
        del cache
        gc.collect()
    assert pool.prefixes.stats.hits == 5
    other = hf_paged.PagedCache(m.config, pool=pool)
    assert other.match_prefix(history, salt="another tenant") == 0
    assert other.match_prefix(history) > 0
    with pytest.raises(ValueError, match="needs an empty cache"):
        other.match_prefix(history)
    other.reset()
    pool.check()


def test_prefixes_of_a_padded_batch(poison):
    m = model()
    pool = hf_paged.PagePool(8)
    ids, mask = padded_batch()
    cache = hf_paged.PagedCache(m.config, pool=pool)
    out = m.generate(ids, attention_mask=mask, max_new_tokens=20, do_sample=False, **with_cache(cache))
    cache.store_prefix(out, mask)
    longer = torch.cat([mask, mask.new_ones(3, 20)], 1)
    again = hf_paged.PagedCache(m.config, pool=pool)
    reused = again.match_prefix(out, longer)
    # Row 2 has 2 + 19 computed tokens, 16 of them in full pages behind 19 columns of padding; row 1 ends at 32 of 40.
    assert again.columns == min(5 + 32, 0 + 40, 19 + 16)
    assert reused == sum(again.columns - pad for pad in (5, 0, 19))
    pool.check()
    expected = m.generate(out, attention_mask=longer, max_new_tokens=12, do_sample=False)
    got = m.generate(out, attention_mask=longer, max_new_tokens=12, do_sample=False, **with_cache(again))
    assert torch.equal(got, expected)
    pool.check()


def test_stored_prefixes_make_room_for_new_tokens():
    m = model()
    pool = hf_paged.PagePool(8, 6)
    cache = hf_paged.PagedCache(m.config, pool=pool)
    ids = torch.randint(1, 97, (1, 33))
    with torch.no_grad():
        m(ids, **with_cache(cache))
        assert cache.store_prefix(ids) == 4
        cache.reset()
        assert [group.cached for group in cache.memory()] == [4]
        m(torch.randint(1, 97, (1, 40)), **with_cache(cache))
    pool.check()
    assert pool.prefixes.stats.evictions >= 3
    memory = cache.memory()[0]
    assert (memory.held, memory.cached + memory.free) == (5, 1)
    assert memory.held_bytes == 5 * memory.page_bytes
    assert memory.committed_bytes >= 6 * memory.page_bytes


def test_memory_counts_shared_pages_once():
    m = model(kind="mistral")
    cache = hf_paged.PagedCache(m.config, page_size=8)
    with torch.no_grad():
        m(torch.randint(1, 97, (1, 20)), **with_cache(cache))
    cache.batch_repeat_interleave(4)
    (memory,) = cache.memory()
    assert (memory.window, memory.num_layers) == (7, 2)
    assert (memory.held, memory.shared) == (2, 2)  # tokens 14 to 19
    assert memory.page_bytes == 2 * 2 * 2 * 8 * 16 * 4


@pytest.mark.parametrize("kind", ["llama", "mistral"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_swapping_a_sequence_out_and_in(poison, kind, device):
    m = model(kind=kind).to(device)
    ids, mask = (x.to(device) for x in padded_batch())
    new, longer = ids[:, -1:], torch.cat([mask, mask[:, -1:]], 1)
    with torch.no_grad():
        expected = hf_paged.PagedCache(m.config, page_size=8)
        m(ids, attention_mask=mask, **with_cache(expected))
        logits = m(new, attention_mask=longer, **with_cache(expected)).logits
        cache = hf_paged.PagedCache(m.config, page_size=8, num_pages=7)
        m(ids, attention_mask=mask, **with_cache(cache))
        used = cache.pages_in_use
        out = [cache.swap_out(1), cache.swap_out(0)]
        cache.check()
        assert cache.pages_in_use < used
        assert out[0].length == 21
        held = {window: pages.held.count(True) for window, pages in out[0].groups.items()}
        assert out[0].num_bytes == sum(held[window] * group.pages.page_bytes for window, group in cache.groups.items())
        for group in cache.groups.values():
            free = sorted(set(range(group.table.allocator.num_pages)) - set(group.table.held()))
            for layer in group.pages.layers.values():  # what was given back may be overwritten
                layer.raw()[free] = 0xFF
        with pytest.raises(ValueError, match=r"rows \[0, 1\] are swapped out: swap_in"):
            m(new, attention_mask=longer, **with_cache(cache))
        with pytest.raises(ValueError, match="not swapped out yet, got 1"):
            cache.swap_out(1)
        for sequence in out:
            cache.swap_in(sequence)
        cache.check()
        assert torch.equal(m(new, attention_mask=longer, **with_cache(cache)).logits, logits)
        with pytest.raises(ValueError, match="not swapped out as this sequence"):
            cache.swap_in(out[0])


def test_swapping_in_without_room():
    m = model()
    pool = hf_paged.PagePool(8, 4)
    one, two = (hf_paged.PagedCache(m.config, pool=pool) for _ in range(2))
    with torch.no_grad():
        m(torch.randint(1, 97, (1, 20)), **with_cache(one))
        sequence = one.swap_out(0)
        m(torch.randint(1, 97, (1, 20)), **with_cache(two))
        with pytest.raises(hf_paged.OutOfPagesError):
            one.swap_in(sequence)
        pool.check()
        two.reset()
        one.swap_in(sequence)
        m(torch.randint(1, 97, (1, 1)), **with_cache(one))
    pool.check()


def test_ten_thousand_operations_on_a_cache(poison):
    """Random steps, forks, crops, swaps and stored prefixes against plain tensors; the books are right after each."""
    rng = random.Random(0)
    config = LlamaConfig(**(SHAPE | {"num_hidden_layers": 1, "num_key_value_heads": 1, "head_dim": 4}))
    config._attn_implementation = "sdpa"
    pool = hf_paged.PagePool(8, 40)
    cache = hf_paged.PagedCache(config, pool=pool)
    # The model: the token ids of each row; a token's key is made from its whole history, as in a real model.
    rows: list[list[int]] = []
    stored: list[int] = []

    def states(row, first):
        keys, history = [], 0
        for token in row:
            history = (history * 31 + token + 1) % 10_007
            keys.append(history / 7)
        return torch.tensor(keys[first:])[:, None].expand(-1, 4)

    def step(count):
        first = len(rows[0])
        for row in rows:
            row.extend(rng.randrange(3) for _ in range(count))
        new = torch.stack([states(row, first) for row in rows])[:, None]
        try:
            keys, values = cache.update(new, -new, 0)
        except hf_paged.OutOfPagesError:
            for row in rows:
                del row[first:]
            return
        expected = torch.stack([states(row, 0) for row in rows])[:, None]
        assert torch.equal(keys, expected)
        assert torch.equal(values, -expected)

    counts = Counter()
    for _ in range(10_000):
        action = rng.choice(["step"] * 6 + ["reorder", "repeat", "crop", "swap", "store", "restart", "restart"])
        if not rows or action == "restart" or len(rows[0]) > 60:
            action = "restart"
            cache.reset()
            prompt = [rng.randrange(3) for _ in range(rng.choice([1, 9, 30]))]
            if rng.random() < 0.7:
                prompt = stored + prompt
            found = cache.match_prefix(prompt)
            counts["found"] += found > 0
            rows = [prompt[:found]]
            if found:
                assert torch.equal(cache.layers[0].keys[0, 0], states(rows[0], 0))
            step(1)
        elif action == "step":
            step(rng.choice([1, 1, 2, 11]))
        elif action == "reorder":
            order = [rng.randrange(len(rows)) for _ in rows]
            cache.reorder_cache(torch.tensor(order))
            rows = [list(rows[i]) for i in order]
        elif action == "repeat" and len(rows) < 4:
            cache.batch_repeat_interleave(2)
            rows = [list(row) for row in rows for _ in range(2)]
        elif action == "crop":
            remove = rng.randint(0, len(rows[0]) - 1)
            cache.crop(-remove)
            rows = [row[: len(row) - remove] for row in rows]
        elif action == "swap":
            sequence = cache.swap_out(rng.randrange(len(rows)))
            pool.check()
            cache.swap_in(sequence)
        elif action == "store":
            stored = list(rows[0])
            cache.store_prefix(torch.tensor(rows))
        counts[action] += 1
        if not rows[0]:
            rows = []
        pool.check()
    assert min(counts[x] for x in ("step", "reorder", "repeat", "crop", "swap", "store", "restart", "found")) > 100
    cache.reset()
    pool.prefixes.clear()
    assert pool.pages_in_use == 0
    pool.check()


@pytest.mark.parametrize("kind", ["llama", "mistral"])
@pytest.mark.parametrize(
    "mode", [{"num_beams": 4}, {"num_return_sequences": 4, "do_sample": True}], ids=["beams", "samples"]
)
def test_beams_and_samples_share_the_prompt(poison, kind, mode):
    """One generate(): the prompt's pages are taken once, and tokens equal eager's."""
    ids, mask = padded_batch()
    tokens = []
    for attn in ("eager", "paged_flash"):
        m = model(attn, kind)
        torch.manual_seed(5)
        out = m.generate(ids, attention_mask=mask, max_new_tokens=2, return_dict_in_generate=True, **mode)
        tokens.append(out.sequences)
    assert torch.equal(*tokens)
    cache = cache_of(out)
    cache.check()
    if kind == "llama":
        # Prompts of 16, 21 and 2 tokens, and one new token in each of the 12 rows: only the last pages are their own.
        assert cache.pages_in_use <= (1 + 1 + 0) + 12
        assert cache.num_seqs == 12


def test_rows_that_differ_are_not_shared(poison):
    m = model()
    cache = hf_paged.PagedCache(m.config, page_size=8)
    cache.expect_repeats(2)
    ids = torch.randint(1, 97, (4, 17))
    ids[1] = ids[0]
    with torch.no_grad():
        m(ids, **with_cache(cache))
        assert cache.pages_in_use == 4 * 3
        cache.reset()
        cache.expect_repeats(2)
        ids[3] = ids[2]
        mask = torch.ones_like(ids)
        mask[1, :9] = 0  # the same keys at layer 0, another number of tokens
        m(ids, attention_mask=mask, position_ids=torch.arange(17).expand(4, -1), **with_cache(cache))
        assert cache.pages_in_use == 3 + 1 + 2 * 3
        cache.crop(-17)
        cache.reset()
        cache.expect_repeats(2)
        m(ids, **with_cache(cache))
        assert cache.pages_in_use == 2 * 3
        new = torch.arange(1, 5)[:, None]
        logits = m(new, **with_cache(cache)).logits
        expected = m(torch.cat([ids, new], 1), use_cache=False).logits[:, -1:]
    assert cache.pages_in_use == 2 * 2 + 4
    assert torch.allclose(logits, expected, atol=1e-4)
    cache.check()
