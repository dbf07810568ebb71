"""The kernels as ``torch.library`` custom ops (namespace ``hf_paged``), with fake implementations.

Arguments are taken as checked, by the package's public functions or by the code that builds a step plan.
Each op picks its implementation by device: Triton on an accelerator, the PyTorch reference on CPU. No op that
mutates has a default: torch 2.11 does not fill them in there.
"""

from typing import Any

import torch

from ..backend import uses_gluon, uses_gluon_backward, uses_quantized_gluon, uses_triton
from ..eager import computes_now, eager_op
from . import reference


@eager_op("hf_paged::flash_attention")
def flash_attention_op(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None,
    cu_seqlens_k: torch.Tensor | None,
    max_seqlen_q: int,
    window_left: int | None,
    window_right: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``flash_attention_launch`` for the arguments."""
    arguments = (q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, window_left, window_right, softcap, sinks, scale)
    if not uses_triton(q):
        return reference.flash_attention_reference(*arguments)
    if uses_gluon(q, k, v, scale):
        from .hopper_gluon import hopper_flash_launch

        return hopper_flash_launch(*arguments)
    from .flash_forward_triton import flash_attention_launch

    return flash_attention_launch(*arguments)


@flash_attention_op.register_fake
def _(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens_q: torch.Tensor | None, *_: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    out = q.new_empty(*q.shape[:-1], v.shape[-1])
    lse_shape = (q.shape[1], q.shape[0]) if cu_seqlens_q is not None else (q.shape[0], q.shape[2], q.shape[1])
    return out, q.new_empty(lse_shape, dtype=torch.float32)


@eager_op("hf_paged::flash_attention_backward")
def flash_attention_backward_op(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    cu_seqlens_q: torch.Tensor | None,
    cu_seqlens_k: torch.Tensor | None,
    window_left: int | None,
    window_right: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """See ``flash_attention_backward_launch`` for the arguments; ``dsinks`` is empty without sinks."""
    dq, dk, dv, dsinks = _compute_gradients(
        q, k, v, out, lse, dout, dlse, cu_seqlens_q, cu_seqlens_k, window_left, window_right, softcap, sinks, scale,
    )  # fmt: skip
    return dq, dk, dv, q.new_empty(0, dtype=torch.float32) if dsinks is None else dsinks


def _compute_gradients(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    cu_seqlens_q: torch.Tensor | None,
    cu_seqlens_k: torch.Tensor | None,
    window_left: int | None,
    window_right: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """See ``flash_attention_backward_launch``."""
    arguments = (
        q, k, v, out, lse, dout, dlse, cu_seqlens_q, cu_seqlens_k, window_left, window_right, softcap, sinks, scale,
    )  # fmt: skip
    if not uses_triton(q):
        return reference.flash_attention_backward_reference(*arguments)
    if uses_gluon_backward(q, k, v, softcap, sinks, scale, cu_seqlens_q):
        from .hopper_backward_gluon import hopper_backward_launch

        return hopper_backward_launch(*arguments[:11], scale)
    from .flash_backward_triton import flash_attention_backward_launch

    return flash_attention_backward_launch(*arguments)


@flash_attention_backward_op.register_fake
def _(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *others: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    *_, sinks, _scale = others
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    return dq, dk, dv, q.new_empty(q.shape[-2] if sinks is not None else 0, dtype=torch.float32)


@eager_op("hf_paged::paged_attention")
def paged_attention_op(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    max_query_len: int,
    window_left: int | None,
    window_right: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
    scale: float,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
    plan: torch.Tensor | None = None,
    can_prefetch_kv: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``paged_attention_launch`` for the arguments, and ``split_plan_op`` for ``plan``.

    Args:
        can_prefetch_kv: a call before this one has waited for ``plan`` and the page table, and wherever a sequence has
            one query, its keys and values but the last are of launches before that call. The kernel may read all these
            before the one ahead of it has ended.
    """
    arguments = (
        q, k_pages, v_pages, page_table, seq_lens, cu_seqlens_q, max_query_len,
        window_left, window_right, softcap, sinks, scale, k_scale, v_scale,
    )  # fmt: skip
    if not uses_triton(q):
        return reference.paged_attention_reference(*arguments)
    if k_scale is None and uses_gluon(q, k_pages, v_pages, scale):
        from .hopper_gluon import hopper_paged_launch

        return hopper_paged_launch(*arguments[:12], plan, can_prefetch_kv=can_prefetch_kv)
    if k_scale is not None and v_scale is not None and q.dtype != torch.float32:
        if uses_quantized_gluon(q, k_pages, v_pages, k_scale, v_scale, max_query_len):
            from .paged_quantized_gluon import quantized_splits_launch

            return quantized_splits_launch(*arguments[:12], k_scale, v_scale, plan)
        from .paged_quantized_triton import quantized_paged_attention_launch

        return quantized_paged_attention_launch(*arguments[:12], k_scale, v_scale, plan)
    from .paged_triton import paged_attention_launch

    return paged_attention_launch(*arguments)


@paged_attention_op.register_fake
def _(q: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    out = q.new_empty(*q.shape[:2], v_pages.shape[-1])
    return out, q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)


@eager_op("hf_paged::split_plan")
def split_plan_op(
    seq_lens: torch.Tensor, cu_seqlens_q: torch.Tensor, max_tokens: int, window_left: int | None
) -> torch.Tensor:
    """The work list of a step of short queries: see ``make_split_plan_launch``. The Gluon kernels and
    those of quantised pages read it.

    Made once per step and window and passed to :func:`paged_attention_op` by every layer; without it each call makes
    its own.
    """
    if not uses_triton(seq_lens):
        return reference.split_plan_reference(seq_lens, cu_seqlens_q, max_tokens, window_left)
    from .split_plan_triton import make_split_plan_launch

    return make_split_plan_launch(seq_lens, cu_seqlens_q, max_tokens, window_left)


@split_plan_op.register_fake
def _(seq_lens: torch.Tensor, cu_seqlens_q: torch.Tensor, max_tokens: int, *_: Any) -> torch.Tensor:
    from ..settings import split_plan_size

    return seq_lens.new_empty(split_plan_size(seq_lens.shape[0], max_tokens))


@eager_op("hf_paged::write_pages", mutates_args=("k_pages", "v_pages", "k_scale", "v_scale"))
def write_pages_op(
    k: torch.Tensor,
    v: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    slot_mapping: torch.Tensor,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
) -> None:
    """See ``write_pages_launch`` for the arguments."""
    if uses_triton(k):
        from .pages_triton import write_pages_launch

        write_pages_launch(k, v, k_pages, v_pages, slot_mapping, k_scale, v_scale)
    else:
        reference.write_pages_reference(k, v, k_pages, v_pages, slot_mapping, k_scale, v_scale)


@eager_op("hf_paged::copy_pages", mutates_args=("k_pages", "v_pages"))
def copy_pages_op(k_pages: torch.Tensor, v_pages: torch.Tensor, source: torch.Tensor, target: torch.Tensor) -> None:
    """See ``copy_pages_launch`` for the arguments."""
    if uses_triton(k_pages):
        from .pages_triton import copy_pages_launch

        copy_pages_launch(k_pages, v_pages, source, target)
    else:
        reference.copy_pages_reference(k_pages, v_pages, source, target)


@eager_op("hf_paged::merge_attention_states")
def merge_attention_states_op(
    out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``merge_attention_states_launch`` for the arguments."""
    if not uses_triton(out_a):
        return reference.merge_attention_states_reference(out_a, lse_a, out_b, lse_b)
    from .merge_states_triton import merge_attention_states_launch

    return merge_attention_states_launch(out_a, lse_a, out_b, lse_b)


@merge_attention_states_op.register_fake
def _(out_a: torch.Tensor, lse_a: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return out_a.new_empty(out_a.shape), lse_a.new_empty(lse_a.shape)


def _no_second_backward(ctx: object, *grads: torch.Tensor) -> None:
    raise RuntimeError(
        "flash_attention has a first derivative only: for derivatives of gradients (create_graph=True) load the model "
        'with attn_implementation="eager".'
    )


def _no_backward(ctx: object, *grads: torch.Tensor) -> None:
    raise RuntimeError(
        "attention over pages has no backward pass: wrap inference in torch.no_grad(); to train, call the model with "
        "use_cache=False, whose attention (flash_attention) has one."
    )


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    q, k, v, cu_seqlens_q, cu_seqlens_k, _, window_left, window_right, softcap, sinks, scale = inputs
    ctx.save_for_backward(q, k, v, *output, cu_seqlens_q, cu_seqlens_k, sinks)
    ctx.options = window_left, window_right, softcap, scale
    # A result that nothing used has no gradient, rather than one of zeros to read.
    ctx.set_materialize_grads(False)


def _flash_attention_backward(
    ctx: Any, dout: torch.Tensor | None, dlse: torch.Tensor | None
) -> tuple[torch.Tensor | None, ...]:
    q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, sinks = ctx.saved_tensors
    window_left, window_right, softcap, scale = ctx.options
    if dout is None:
        dout = torch.zeros_like(out)
    arguments = (
        q, k, v, out, lse, dout, dlse, cu_seqlens_q, cu_seqlens_k, window_left, window_right, softcap, sinks, scale,
    )  # fmt: skip
    compute = _compute_gradients if computes_now(arguments) else flash_attention_backward_op
    dq, dk, dv, dsinks = compute(*arguments)
    if sinks is not None and dsinks is not None:
        dsinks = dsinks.to(sinks.dtype)
    # In the order of the op's arguments.
    return dq, dk, dv, None, None, None, None, None, None, None if sinks is None else dsinks, None


class _FlashAttention(torch.autograd.function._SingleLevelFunction):
    """What autograd does with the op, for eager calls: without a look for functorch, which ``EagerOp`` has taken."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        output = flash_attention_op.function(*inputs)
        _save_for_backward(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        return _flash_attention_backward(ctx, *grads)


flash_attention_op.gradient = _FlashAttention
flash_attention_op.register_autograd(_flash_attention_backward, setup_context=_save_for_backward)
# Without this, autograd would silently treat the outputs as constants in some dispatch modes.
for _op in (paged_attention_op, merge_attention_states_op):
    _op.register_autograd(_no_backward)
flash_attention_backward_op.register_autograd(_no_second_backward)
