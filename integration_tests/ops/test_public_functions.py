"""The public functions: refusals before any launch, fake implementations, autograd, settings."""

import hf_paged_kernels as kernels
import numpy as np
import pytest
import torch
from hf_paged_kernels import backend
from hf_paged_kernels.attention import ops
from hf_paged_kernels.settings import choose_flash_settings, choose_paged_settings, is_short_query


def ints(*values, dtype=torch.int32):
    return torch.tensor(values, dtype=dtype)


def dense(**changes):
    arguments = {"q": torch.randn(2, 3, 4, 16), "k": torch.randn(2, 5, 2, 16), "v": torch.randn(2, 5, 2, 16)}
    return arguments | changes


@pytest.mark.parametrize(
    ("changes", "kind", "says"),
    [
        ({"q": torch.randn(2, 3, 4, 16, dtype=torch.float64)}, TypeError, r"q must be float16 or bfloat16 or float32"),
        ({"q": [1.0]}, TypeError, "q must be a tensor"),
        ({"q": torch.randn(3, 4, 16)}, ValueError, r"q must have the shape \[B, Lq, Hq, D\]"),
        ({"k": torch.randn(2, 5, 2, 24)}, ValueError, "same head dim, got 16 and 24"),
        ({"q": torch.randn(2, 3, 5, 16)}, ValueError, "multiple of the key/value heads, got 5 and 2"),
        ({"v": torch.randn(2, 4, 2, 16)}, ValueError, "same tokens"),
        ({"k": torch.randn(2, 5, 2, 16, dtype=torch.float16)}, TypeError, "same dtype"),
        ({"k": torch.randn(1, 5, 2, 16), "v": torch.randn(1, 5, 2, 16)}, ValueError, "same batch size"),
        (
            {x: torch.randn(2, 5, 2, 513) for x in "qkv"},
            ValueError,
            "head dim of q and k must be 1 to 512, got 513",
        ),
        ({"window": 0}, ValueError, "window must be None, a number of tokens"),
        ({"window": "all"}, ValueError, "window must be None, a number of tokens"),
        ({"window": (2.7, 0)}, TypeError, r"window must be an integer, got 2.7 \(float\)"),
        ({"window": 2.0}, TypeError, r"window must be an integer, got 2.0"),
        ({"window": True}, TypeError, r"window must be an integer, got True"),
        ({"max_seqlen_q": 3.5}, TypeError, "max_seqlen_q must be an integer, got 3.5"),
        ({"max_seqlen_k": "5"}, TypeError, "max_seqlen_k must be an integer, got '5'"),
        ({"scale": "0.5"}, TypeError, "scale must be a number, got '0.5'"),
        ({"softcap": torch.ones((), requires_grad=True)}, TypeError, "softcap must be a number, got tensor"),
        ({"softcap": -1.0}, ValueError, "softcap must be None or a positive number, got -1.0"),
        ({"scale": float("nan")}, ValueError, "scale must be a finite number"),
        ({"sinks": torch.randn(3)}, ValueError, "each of the 4 query heads, got 3"),
        ({"cu_seqlens_k": ints(0, 5)}, ValueError, "cu_seqlens_k needs cu_seqlens_q"),
        ({"q": torch.randn(2, 3, 4, 16, device="meta")}, ValueError, "on one device, got q on meta, k on cpu"),
    ],
)
def test_flash_attention_refuses(changes, kind, says):
    arguments = dense(**changes)
    with pytest.raises(kind, match=says):
        kernels.flash_attention(arguments.pop("q"), arguments.pop("k"), arguments.pop("v"), **arguments)


@pytest.mark.parametrize(
    ("cu", "says"),
    [
        (ints(0, 3, 6, dtype=torch.int64), "cu_seqlens_q must be int32"),
        (ints(0, 3, 7), "must rise from 0 to the number of tokens"),
        (ints(1, 3, 6), "must rise from 0"),
        (ints(0, 4, 2, 6), "must rise from 0"),
    ],
)
def test_flash_attention_refuses_lengths(cu, says):
    q = torch.randn(6, 2, 16)
    with pytest.raises((ValueError, TypeError), match=says):
        kernels.flash_attention(q, q, q, cu_seqlens_q=cu)


def test_a_sequence_longer_than_the_maximum_given():
    q = torch.randn(6, 2, 16)
    with pytest.raises(ValueError, match=r"a sequence of 4 tokens, more than the maximum given \(3\)"):
        kernels.flash_attention(q, q, q, cu_seqlens_q=ints(0, 4, 6), max_seqlen_q=3)


def paged(**changes):
    arguments = {
        "q": torch.randn(2, 4, 16), "k_pages": torch.randn(6, 2, 8, 16), "v_pages": torch.randn(6, 2, 8, 16),
        "page_table": ints(0, 1, 2, 3).view(2, 2), "seq_lens": ints(9, 3), "cu_seqlens_q": ints(0, 1, 2),
        "max_query_len": 1,
    }  # fmt: skip
    return arguments | changes


@pytest.mark.parametrize(
    ("changes", "kind", "says"),
    [
        ({"page_table": ints(0, 6, 2, 3).view(2, 2)}, ValueError, r"page_table\[0, 1\] is 6, outside of the pool of 6"),
        ({"page_table": ints(0, 1, -1, 3).view(2, 2)}, ValueError, r"page_table\[1, 0\] is -1, outside"),
        ({"page_table": ints(0, 1, 2, 3)}, ValueError, "page_table must have the shape"),
        ({"page_table": torch.zeros(2, 2)}, TypeError, "page_table must be int32"),
        ({"seq_lens": ints(17, 3)}, ValueError, r"seq_lens\[0\] is 17: it must be at least .* at most the 16 tokens"),
        ({"seq_lens": ints(9, 0)}, ValueError, r"seq_lens\[1\] is 0"),
        ({"seq_lens": ints(9)}, ValueError, "same sequences"),
        ({"cu_seqlens_q": ints(0, 2, 2)}, ValueError, "a sequence of 2 tokens, more than the maximum given"),
        ({"max_query_len": 0}, ValueError, "max_query_len must be a positive int, got 0"),
        ({"max_query_len": 1.5}, TypeError, "max_query_len must be an integer, got 1.5"),
        ({"k_pages": torch.randn(6, 2, 7, 16), "v_pages": torch.randn(6, 2, 7, 16)}, ValueError, "page_size must be"),
        ({"v_pages": torch.randn(6, 2, 16, 16)}, ValueError, "must agree in pages, heads and page size"),
        ({"k_pages": torch.randn(6, 2, 16, 8).mT}, ValueError, "last dimension of k_pages must be contiguous"),
        ({"q": torch.randn(2, 4, 16, dtype=torch.bfloat16)}, TypeError, "same dtype"),
    ],
)
def test_paged_attention_refuses(changes, kind, says):
    with pytest.raises(kind, match=says):
        kernels.paged_attention(**paged(**changes))


def test_page_table_entries_that_are_not_read_may_hold_anything():
    arguments = paged(page_table=ints(0, 1, 2, 2**30).view(2, 2))
    assert kernels.paged_attention(**arguments).isfinite().all()


def test_numbers_of_numpy():
    arguments = paged()
    expected = kernels.paged_attention(**arguments, window=4, scale=0.5, softcap=3.0)
    numbers = {"window": np.int64(4), "scale": np.float32(0.5), "softcap": np.float64(3.0)}
    assert torch.equal(kernels.paged_attention(**arguments | numbers | {"max_query_len": np.int32(1)}), expected)
    inputs = dense()
    expected = kernels.flash_attention(**inputs, window=(2, 0))
    assert torch.equal(kernels.flash_attention(**inputs, window=(np.int64(2), np.int8(0))), expected)
    lengths = (arguments["seq_lens"], arguments["cu_seqlens_q"], arguments["page_table"])
    assert torch.equal(kernels.make_split_plan(*lengths, np.int64(8)), kernels.make_split_plan(*lengths, 8))


def test_page_tables_of_any_strides():
    arguments = paged()
    expected = kernels.paged_attention(**arguments)
    arguments["page_table"] = arguments["page_table"].T.contiguous().T
    assert torch.equal(kernels.paged_attention(**arguments), expected)


def test_unknown_arguments_are_refused():
    with pytest.raises(TypeError, match="unexpected keyword argument 'alibi_slopes'"):
        kernels.paged_attention(**paged(), alibi_slopes=None)


@pytest.mark.parametrize(
    ("slots", "says"),
    [(ints(0, 48, dtype=torch.int64), "slot_mapping holds 48, outside"), (ints(0, -2, dtype=torch.int64), "holds -2")],
)
def test_write_pages_refuses_slots(slots, says):
    k_pages, v_pages = torch.zeros(6, 2, 8, 16), torch.zeros(6, 2, 8, 16)
    k = torch.randn(2, 2, 16)
    with pytest.raises(ValueError, match=says):
        kernels.write_pages(k, k, k_pages, v_pages, slots)
    assert not k_pages.any()


@pytest.mark.parametrize(
    ("source", "target", "says"),
    [
        (ints(0, 1), ints(2, 2), "target holds a page twice"),
        (ints(0, 1), ints(1, 2), "page 1 is in source and in target"),
        (ints(0), ints(6), "target holds page 6, outside of the pool"),
        (ints(0, 1), ints(2), "must pair up"),
    ],
)
def test_copy_pages_refuses(source, target, says):
    pages = torch.zeros(6, 2, 8, 16)
    with pytest.raises(ValueError, match=says):
        kernels.copy_pages(pages, pages.clone(), source, target)


def test_merge_refuses_another_layout():
    out, lse = torch.randn(3, 2, 16), torch.randn(3, 2)
    with pytest.raises(ValueError, match=r"lse_a must be \[H, T\] = \[2, 3\]"):
        kernels.merge_attention_states(out, lse, out, lse)


def test_custom_ops_pass_opcheck():
    """Schema, fake implementation and mutation annotations agree with what the ops do."""
    q, k = torch.randn(2, 3, 4, 16), torch.randn(2, 5, 2, 16)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(
        ops.flash_attention_op.op, (q, k, k, None, None, 3, None, 0, None, None, 0.25), test_utils=tests
    )
    packed = torch.randn(6, 4, 16)
    cu = ints(0, 2, 6)
    torch.library.opcheck(
        ops.flash_attention_op.op,
        (packed, packed, packed, cu, cu, 4, 2, 0, 5.0, torch.randn(4), 0.25),
        test_utils=tests,
    )
    p = paged()
    torch.library.opcheck(
        ops.paged_attention_op.op,
        (p["q"], p["k_pages"], p["v_pages"], p["page_table"], p["seq_lens"], p["cu_seqlens_q"], 1, None, 0, None, None,
         0.25, None, None), test_utils=tests,
    )  # fmt: skip
    new = torch.randn(2, 2, 16)
    torch.library.opcheck(
        ops.write_pages_op.op,
        (new, new, p["k_pages"], p["v_pages"], ints(0, -1, dtype=torch.int64), None, None),
        test_utils=tests,
    )
    torch.library.opcheck(ops.copy_pages_op.op, (p["k_pages"], p["v_pages"], ints(0), ints(1)), test_utils=tests)
    torch.library.opcheck(
        ops.merge_attention_states_op.op, (new, torch.randn(2, 2), new, torch.randn(2, 2)), test_utils=tests
    )


def test_torch_compile_traces_through_without_a_break():
    """With a fake implementation each, the ops stay in one graph."""

    def step(q, k, v, k_pages, v_pages, slots, table, seq_lens, cu):
        ops.write_pages_op(k, v, k_pages, v_pages, slots, None, None)
        rest = (1, None, 0, None, None, 0.25, None, None)
        out, _ = ops.paged_attention_op(q, k_pages, v_pages, table, seq_lens, cu, *rest)
        return out * 2

    p = paged()
    new = torch.randn(2, 2, 16)
    arguments = (
        p["q"], new, new, p["k_pages"], p["v_pages"], ints(8, 18, dtype=torch.int64), p["page_table"], p["seq_lens"],
        p["cu_seqlens_q"],
    )  # fmt: skip
    compiled = torch.compile(step, fullgraph=True, backend="eager")
    other = [x.clone() for x in arguments]
    assert torch.equal(compiled(*arguments), step(*other))
    assert torch.equal(arguments[3], other[3])


def test_backward_over_pages_says_that_there_is_none():
    p = paged()
    out = kernels.paged_attention(**p | {"q": p["q"].requires_grad_()})
    with pytest.raises(RuntimeError, match="attention over pages has no backward pass"):
        out.sum().backward()


def test_strides_of_any_kind_give_the_same():
    arguments = dense()
    expected = kernels.flash_attention(**arguments)
    for name in "qkv":
        strided = {k: (v.mT.contiguous().mT if k == name else v) for k, v in arguments.items()}
        assert torch.allclose(kernels.flash_attention(**strided), expected, atol=1e-6)


def test_short_sequences_take_the_portable_backward_pass(monkeypatch):
    """In the Gluon one each has a whole block of dq in float32: 64 rows at head dim 128, 128 at 64."""
    monkeypatch.setattr(backend, "has_gluon", lambda device: True)

    def is_gluon(lengths, dim, packed):
        q = torch.empty(sum(lengths), 2, dim, dtype=torch.bfloat16)
        if packed:
            cu = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
            return backend.uses_gluon_backward(q, q, q, None, None, 1.0, cu)
        q = q.view(len(lengths), -1, 2, dim)
        return backend.uses_gluon_backward(q, q, q, None, None, 1.0)

    assert is_gluon([32] * 5, 128, False)
    assert not is_gluon([31] * 5, 128, False)
    assert is_gluon([64] * 5, 64, False)
    assert not is_gluon([16] * 1000, 64, False)
    assert is_gluon([64] * 5, 128, True)
    assert is_gluon([700, 1, 3, 129], 64, True)
    assert not is_gluon([16] * 1000, 64, True)
    assert not is_gluon([600] + [4] * 100, 128, True)


@pytest.mark.parametrize("is_triton", [False, True], ids=["reference", "triton"])
def test_a_window_of_all_an_int_can_say_is_none(monkeypatch, is_triton):
    """Positions are added to it: with 2**31 - 1 that was negative, and keys had no gradients."""
    monkeypatch.setattr("hf_paged_kernels.attention.ops.uses_triton", lambda _: is_triton)
    q, k, v = (x.requires_grad_() for x in dense().values())
    for most in (2**30, 2**31 - 1, 2**31, 2**40):
        for causal, window in ((True, most), (True, (most, 0)), (False, most), (False, (most, most))):
            got, expected = (
                torch.autograd.grad(kernels.flash_attention(q, k, v, causal=causal, window=w).square().sum(), (q, k, v))
                for w in (window, None)
            )
            assert all(x.any() and torch.equal(x, y) for x, y in zip(got, expected))


def test_settings_are_powers_of_two_and_shrink_with_the_card():
    for head_dim in (16, 64, 80, 128, 192, 256, 512):
        for element_size in (2, 4):
            large, small = (choose_flash_settings(head_dim, element_size, kib * 1024) for kib in (227, 99))
            for s in (large, small):
                assert s.block_m & (s.block_m - 1) == 0
                assert s.block_n & (s.block_n - 1) == 0
                assert min(s.block_m, s.block_n) >= 16
            assert small.block_m * small.block_n * small.num_stages <= large.block_m * large.block_n * large.num_stages


def test_short_queries_take_the_split_path():
    assert is_short_query(4, 1)
    assert is_short_query(4, 16)
    assert not is_short_query(4, 17)
    settings, tokens = choose_paged_settings(128, 2, 227 * 1024, 7, True)
    assert settings.block_m == 16
    assert tokens == 2
    settings, tokens = choose_paged_settings(128, 2, 227 * 1024, 71, False)
    assert settings.block_m >= 71
    assert tokens == 1


def test_float64_takes_the_reference_on_every_device():
    cases = (("meta", torch.float32, True), ("meta", torch.float64, False), ("cpu", torch.float32, False))
    for device, dtype, is_triton in cases:
        assert backend.uses_triton(torch.empty(1, dtype=dtype, device=device)) == is_triton
