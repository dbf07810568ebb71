"""The public functions and their ops under torch.compile, torch.export, fake tensors and functional transforms."""

import hf_paged_kernels as kernels
import pytest
import torch
from hf_paged_kernels.attention import ops
from hf_paged_kernels.layers import ops as layer_ops
from hf_paged_kernels.linear import decode, skinny
from hf_paged_kernels.sampling import ops as sampling_ops
from hf_paged_kernels.sampling.reference import MARKS
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.library import opcheck

D = 16
FakeTensorMode = torch._subclasses.FakeTensorMode


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


def int64(*values):
    return torch.tensor(values)


def apart(x):
    """The same numbers, their dimensions stored in the opposite order, every other element of twice as many."""
    if not isinstance(x, torch.Tensor):
        return x
    wide = torch.zeros([2 * n for n in reversed(x.shape)], dtype=x.dtype)
    view = wide[(slice(None, None, 2),) * x.ndim].permute(*reversed(range(x.ndim)))
    view.copy_(x)
    return view


def paged_step():
    pages = torch.randn(6, 2, 8, D), torch.randn(6, 2, 8, 24)
    return (torch.randn(3, 4, D), *pages, int32(0, 1, 2, 3).view(2, 2), int32(9, 12), int32(0, 1, 3))


@pytest.mark.parametrize("option", ["max_query_len", "scale", "softcap", "window"])
def test_options_that_change_do_not_break_the_graph(option):
    q, *rest = paged_step()
    if option == "max_query_len":
        values = [2, 4, 3]
        call = lambda q, x: kernels.paged_attention(q, *rest, max_query_len=x)  # noqa: E731
    else:
        values = [2, 3, 5] if option == "window" else [0.3, 0.4, 0.5]
        call = lambda q, x: kernels.paged_attention(q, *rest, max_query_len=2, **{option: x})  # noqa: E731
    compiled = torch.compile(call, fullgraph=True, backend="eager")
    for value in values:
        assert torch.equal(compiled(q, value), call(q, value))


@pytest.mark.parametrize("option", ["scale", "softcap"])
def test_flash_attention_with_options_that_change(option):
    q = torch.randn(1, 5, 4, D)
    call = lambda q, x: kernels.flash_attention(q, q, q, causal=True, **{option: x})  # noqa: E731
    compiled = torch.compile(call, fullgraph=True, backend="eager")
    for value in (0.3, 0.4, 0.5):
        assert torch.equal(compiled(q, value), call(q, value))


def listed(results):
    return list(results) if isinstance(results, tuple | list) else [results]


def public_calls():
    """Each public function on tensors of its own: ``(tensors, call)``."""
    q, k_pages, v_pages, table, lens, cu = paged_step()
    new, out, lse = torch.randn(3, 2, D), torch.randn(3, 4, D), torch.randn(4, 3)
    codes, scales = torch.zeros(6, 2, 8, D, dtype=torch.int8), torch.ones(6, 2, 8)
    k = torch.randn(3, 2, D)
    flash, paged = kernels.flash_attention, kernels.paged_attention
    return {
        "flash": ((torch.randn(1, 5, 4, D), torch.randn(1, 7, 2, D)), lambda q, k: flash(q, k, k, causal=True)),
        "varlen": ((q, k, cu), lambda q, k, cu: flash(q, k, k, cu_seqlens_q=cu, max_seqlen_q=2, return_lse=True)),
        "paged": ((q, k_pages, v_pages, table, lens, cu), lambda *x: paged(*x, max_query_len=2)),
        "quantised": (
            (q, codes, codes.clone(), table, lens, cu, scales, scales.clone()),
            lambda *x: paged(*x[:6], max_query_len=2, k_scale=x[6], v_scale=x[7]),
        ),
        "plan": ((lens, cu, table), lambda lens, cu, table: kernels.make_split_plan(lens, cu, table, 8, window=4)),
        "write": (
            (new, new.clone(), torch.zeros(6, 2, 8, D), torch.zeros(6, 2, 8, D), int64(3, -1, 17)),
            lambda *x: (kernels.write_pages(*x), x[2] + 0)[1],
        ),
        "copy": (
            (k_pages, v_pages, int32(0, 1), int32(3, 4)),
            lambda *x: (kernels.copy_pages(*x), x[0] + 0)[1],
        ),
        "merge": ((out, lse, out.clone(), lse.clone()), kernels.merge_attention_states),
        "shared": ((q, k_pages, v_pages, int32(0, 1, 0, 3).view(2, 2), lens, cu), shared_prefix),
    }


def shared_prefix(q, k_pages, v_pages, *step):
    prefix = kernels.make_shared_prefix(*step, [(0, 2, 1)], 8, num_q_heads=4, num_kv_heads=2, max_query_len=2)
    return kernels.shared_prefix_attention(q, k_pages, v_pages, *step, prefix=prefix, max_query_len=2)


@pytest.mark.parametrize("name", public_calls())
def test_fake_tensors(name):
    """Shapes, dtypes and strides of results, without a look at values that are not there."""
    tensors, call = public_calls()[name]
    for prepare in (lambda x: x, apart):
        # Not pages, which come by the rows of a head.
        prepared = [x if x.ndim == 4 and name != "flash" else prepare(x) for x in tensors]
        expected = call(*[x.clone() if x.is_contiguous() else x for x in prepared])
        mode = FakeTensorMode()
        fakes = [mode.from_tensor(x) for x in prepared]
        with mode:
            got = call(*fakes)
        for fake, real in zip(listed(got), listed(expected), strict=True):
            assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())
        make_fx(call, tracing_mode="fake")(*prepared)


@pytest.mark.parametrize("name", public_calls())
@pytest.mark.parametrize("strict", [False, True])
def test_export(name, strict):
    tensors, call = public_calls()[name]

    class Module(torch.nn.Module):
        def forward(self, *tensors):
            return call(*tensors)

    exported = torch.export.export(Module(), tuple(tensors), strict=strict)
    copies = [[x.clone() for x in tensors] for _ in range(2)]
    got, expected = exported.module()(*copies[0]), call(*copies[1])
    for x, y in zip(listed(got), listed(expected), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("strict", [False, True])
def test_export_of_as_many_sequences_as_the_data_say(strict):
    class Module(torch.nn.Module):
        def forward(self, q, is_last):
            ends = is_last.nonzero().squeeze(1).int() + 1
            cu = torch.cat([ends.new_zeros(1), ends])
            return kernels.flash_attention(q, q, q, cu_seqlens_q=cu, max_seqlen_q=6, causal=True)

    q = torch.randn(6, 2, D)
    exported = torch.export.export(Module(), (q, torch.tensor([0, 1, 0, 0, 0, 1])), strict=strict).module()
    is_last = torch.tensor([1, 0, 1, 0, 0, 1])
    assert torch.equal(exported(q, is_last), Module()(q, is_last))


def op_calls():
    """Each op with arguments that it takes, and those of them that may have any strides."""
    q, k_pages, v_pages, table, lens, cu = paged_step()
    k, rest = torch.randn(3, 2, D), (None, 0, None, None, 0.25)
    scales = torch.ones(6, 2, 8)
    codes = torch.zeros(6, 2, 8, D, dtype=torch.int8)
    slots, doubles, ids = int64(3, -1, 17), torch.ones(3, dtype=torch.float64), int64(0, 2, 1)
    x, weight = torch.randn(3, 32), torch.randn(24, 32)
    norm = (torch.randn(32), 1e-6, 0.0, True)
    lse = torch.randn(4, 3)
    rotary = (q, k, k.clone(), torch.randn(3, 8), torch.randn(3, 8), False, None, torch.randn(D), 1e-6, 0.0, True)
    flash = (q, k, k.clone(), cu, cu.clone(), 2, None, 0, None, torch.randn(4), 0.25)
    return {
        "flash_attention": (ops.flash_attention_op, flash),
        "flash_attention_backward": (
            ops.flash_attention_backward_op,
            (q, k, k.clone(), q.clone(), lse, q.clone(), lse.clone(), cu, cu.clone(), *rest[:3], torch.randn(4), 0.25),
        ),
        "paged_attention": (ops.paged_attention_op, (q, k_pages, v_pages, table, lens, cu, 2, *rest, None, None)),
        "quantised": (
            ops.paged_attention_op, (q, codes, codes.clone(), table, lens, cu, 2, *rest, scales, scales.clone()),
        ),
        "split_plan": (ops.split_plan_op, (lens, cu, 16, 4)),
        "write_pages": (
            ops.write_pages_op, (k, k.clone(), codes, codes.clone(), slots, scales, scales.clone()),
        ),
        "copy_pages": (ops.copy_pages_op, (k_pages, v_pages, int32(0, 1), int32(3, 4))),
        "merge": (ops.merge_attention_states_op, (q, lse, q.clone(), lse.clone())),
        "rms_norm": (layer_ops.rms_norm_op, (x, *norm, x.clone())),
        "rms_norm_alone": (layer_ops.rms_norm_op, (x, *norm, None)),
        "rms_norm_parts": (layer_ops.rms_norm_parts_op, (torch.randn(2, 3, 32), *norm, x)),
        "gated_activation": (layer_ops.gated_activation_op, (x, "silu", "gate_up")),
        "rotary_write": (
            layer_ops.rotary_write_op,
            (*rotary, torch.zeros(6, 2, 8, D), torch.zeros(6, 2, 8, D), None, None, slots),
        ),
        "decode_inputs": (layer_ops.decode_inputs_op, (ids, int64(4, -1, 9), int64(7, 8, 9))),
        "decode_rows": (layer_ops.decode_rows_op, (int64(1, 0), lens, table, 8)),
        "sample_tokens": (
            sampling_ops.sample_tokens_op,
            (torch.randn(3, 50), ids, int64(5, 6, 7), doubles * 0.7, ids.clone(), doubles, doubles * 0, ids.clone(),
             ids.clone(), torch.zeros(3, MARKS + 2, dtype=torch.int64), int64(1, 1, 1)),
        ),
        "skinny_linear": (skinny.skinny_linear_op, (x, weight, torch.randn(24), torch.randn(3, 24), norm[0], 1e-6)),
        "skinny_gated_linear": (skinny.skinny_gated_linear_op, (x, weight, torch.randn(24), norm[0], 1e-6)),
        "decode_linear": (decode.decode_linear_op, (x, weight, torch.randn(24))),
        "decode_gated_linear": (decode.decode_gated_linear_op, (x, weight, torch.randn(24))),
        "linear_parts": (decode.linear_parts_op, (x, weight, torch.randn(24), 2)),
    }  # fmt: skip


@pytest.mark.parametrize("strided", [False, True], ids=["contiguous", "strided"])
@pytest.mark.parametrize("name", op_calls())
def test_opcheck(name, strided):
    op, arguments = op_calls()[name]
    if strided:
        # Not pages, which come by the rows of a head.
        arguments = [x if isinstance(x, torch.Tensor) and x.ndim == 4 else apart(x) for x in arguments]
    opcheck(op.op, tuple(arguments), test_utils=("test_schema", "test_faketensor"))


def test_forward_mode_derivatives_are_refused():
    """No kernel has them: without a word they would be zeros."""
    q, k, tangent = torch.randn(1, 5, 4, D), torch.randn(1, 5, 2, D), torch.randn(1, 5, 4, D)
    says = r"q has a forward-mode derivative .* use reverse mode"
    with pytest.raises(NotImplementedError, match=says):
        torch.func.jvp(lambda q: kernels.flash_attention(q, k, k), (q,), (tangent,))
    packed, *rest = paged_step()
    with forward_ad.dual_level():
        with pytest.raises(NotImplementedError, match=says):
            kernels.flash_attention(forward_ad.make_dual(q, tangent), k, k)
        with pytest.raises(NotImplementedError, match=says):
            kernels.paged_attention(forward_ad.make_dual(packed, packed), *rest, max_query_len=2)
        assert kernels.flash_attention(q, k, k).isfinite().all()


def test_second_derivatives_are_refused():
    q = torch.randn(1, 5, 2, D, requires_grad=True)
    grad, = torch.autograd.grad(kernels.flash_attention(q, q, q).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="flash_attention has a first derivative only"):
        grad.sum().backward()
