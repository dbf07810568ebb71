"""The attention function that transformers calls for ``attn_implementation="paged_flash"``."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from hf_paged_kernels.attention.ops import flash_attention_op, paged_attention_op
from hf_paged_kernels.backend import contiguous_rows
from hf_paged_kernels.checks import check_softcap, resolve_scale

from ..cache.lazy_states import LazyStates, StepLayer
from ..cache.step_plan import PagedStepPlan
from ..cache.step_planner import LayerUpdate
from ..errors import UnsupportedModelError
from ..mixed_precision import UNCHANGED, autocast_dtype, in_one_dtype, without_autocast
from ..transformers_internals import is_batching_cache
from .continuous_batching import attend_batched
from .dense import packed, with_dense_mask, with_padding
from .options import UNSET, VARLEN, AttentionOptions, refuse_hidden_window, refuse_two_packings, refuse_unsupported


def _take_back_on_error(attention: Callable) -> Callable:
    """A step that attention refuses must not be placed in the cache by the next one.

    A compiled model runs what belongs to a cache as it is written: who owns which page is plain Python.
    """
    uncompiled = torch.compiler.disable(attention)

    @functools.wraps(attention)
    def wrapped(module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(key, LazyStates):
            return attention(module, query, key, *args, **kwargs)
        try:
            return uncompiled(module, query, key, *args, **kwargs)
        except Exception:
            if isinstance(key.source, LayerUpdate):
                key.source.planner.forget_step()
            raise

    return wrapped


@_take_back_on_error
def paged_flash_attention(  # noqa: PLR0913
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = UNSET,
    softcap: float | None = None,
    is_causal: bool | None = None,
    s_aux: torch.Tensor | None = None,
    cache: Any = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention for transformers' interface, through this package's kernels.

    Args:
        module: the attention layer; ``module.is_causal`` counts where ``is_causal`` is not given.
        query: ``[B, Hq, L, D]``.
        key: ``[B, Hk, Lk, D]``; from a :class:`PagedCache`, a stand-in whose pages are read in place.
        value: ``[B, Hk, Lk, Dv]``.
        attention_mask: None; 2D ``[B, Lk]``, True (1) where a column is a token; 2D int32 with 0 for padding and the
            number of its packed sequence for each token; or 4D, boolean or added to the scores.
        dropout: must be 0.
        scaling: factor on the scores; default ``D ** -0.5``.
        sliding_window: tokens that a query sees, itself counted.
        softcap: logit softcap.
        is_causal: hide later keys.
        s_aux: ``[Hq]`` attention sinks.
        cache: the cache of transformers' own continuous batching before 5.24; a ``Cache`` has no effect.
        kwargs: packed lengths (``cu_seq_lens_q`` ...), and arguments without an effect on attention.

    Returns:
        ``(out [B, L, Hq, Dv], None)``.

    Raises:
        ValueError: an argument that the kernels cannot express; it is never ignored.
    """
    refuse_unsupported(module, dropout, kwargs)
    is_autocast = autocast_dtype(query.device) is not None
    if is_autocast or not query.dtype == key.dtype == value.dtype:
        query, key, value = in_one_dtype(query, key, value)
        if not query.dtype == key.dtype == value.dtype:
            raise TypeError(f"q, k and v must have the same dtype, got {query.dtype}, {key.dtype} and {value.dtype}.")
    if sliding_window is UNSET:
        _, layer = _source_of(key)
        if attention_mask is None or attention_mask.ndim != 4:
            refuse_hidden_window(module, key.shape[2] if layer is None else layer.longest)
        sliding_window = None
    causal = getattr(module, "is_causal", True) if is_causal is None else bool(is_causal)
    sinks = None if s_aux is None else s_aux.reshape(-1)
    scale, softcap = resolve_scale(scaling, query.shape[-1]), check_softcap(softcap)
    options = AttentionOptions(scale, sliding_window, softcap, causal, sinks)
    with without_autocast(query.device) if is_autocast else UNCHANGED:
        return _attend(module, query, key, value, attention_mask, options, cache, kwargs), None


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    options: AttentionOptions,
    cache: Any,
    kwargs: dict[str, Any],
) -> torch.Tensor:
    """Attention by the path for what was given: ``[B, L, Hq, Dv]``."""
    update, layer = _source_of(key)
    if layer is not None:
        key.refuse_changes()  # type: ignore[attr-defined]
        return _over_step(query, layer, value, attention_mask, options)
    if is_batching_cache(cache) or kwargs.get("write_index") is not None:
        return attend_batched(module, query, key, value, cache, options, kwargs)
    if attention_mask is not None and attention_mask.ndim == 4:
        return with_dense_mask(query, key, value, attention_mask, options)
    if attention_mask is not None and attention_mask.ndim != 2:
        raise ValueError(f"attention_mask must be 2D or 4D, got the shape {list(attention_mask.shape)}.")
    refuse_two_packings(query, key, attention_mask, module, kwargs)
    # A model that changes one of them after the cache (latent attention, repeated heads) has gathered it: all is dense.
    if update is not None and isinstance(value, LazyStates):
        if kwargs.get("cu_seq_lens_q") is not None:
            raise ValueError("packed sequences (cu_seq_lens_q) cannot be added to a cache: pass use_cache=False.")
        key.refuse_changes()  # type: ignore[attr-defined]
        value.refuse_changes()
        return _over_pages(query, update, value, attention_mask, options)
    if kwargs.get("cu_seq_lens_q") is not None:
        missing = [name for name in VARLEN if kwargs.get(name) is None]
        if missing:
            raise ValueError(f"packed sequences need {', '.join(VARLEN)}; {', '.join(missing)} is missing.")
        return packed(query, key, value, kwargs["cu_seq_lens_q"], kwargs["cu_seq_lens_k"], options)
    if attention_mask is not None:
        return with_padding(query, key, value, attention_mask, options)
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    return options.flash(q, k, v)


def _source_of(key: torch.Tensor) -> tuple[LayerUpdate | None, StepLayer | None]:
    """What stands behind a layer's keys: an update of a PagedCache, or a layer of an engine's step."""
    source = key.source if isinstance(key, LazyStates) else None
    return (source, None) if isinstance(source, LayerUpdate) else (None, source)


def _over_pages(
    query: torch.Tensor, update: LayerUpdate, value: LazyStates, mask: torch.Tensor | None, options: AttentionOptions
) -> torch.Tensor:
    """A step on a PagedCache: place the new tokens, then attend."""
    if value.source is not update:
        raise UnsupportedModelError(
            "the model pairs the keys of one cache update with the values of another, which paged_flash cannot read "
            'from pages: load it with attn_implementation="eager" or "sdpa".'
        )
    if mask is not None and mask.dtype == torch.int32:
        raise ValueError("packed sequences (restarting position_ids) cannot be added to a cache: pass use_cache=False.")
    update.check_window(options.window)
    query = contiguous_rows(query)
    plan = update.place(mask)
    out = update.decode(query, plan, *options.bounds)
    if out is not None:
        return out
    update.write_to(plan)
    packed_query = plan.pack(query)
    if not packed_query.shape[0] and plan.padding_index is None:
        return query.new_zeros(*query.shape[:1], query.shape[2], query.shape[1], value.shape[-1])
    out = _attend_planned(packed_query, update, plan, plan.cu_seqlens_q, plan.max_query_len, options)
    if plan.padding_index is None:
        return plan.unpack(out)
    # Padding behind a row's last token sees all of the row's tokens: generate() takes the next token from the last
    # column, whatever stands there, and so do sdpa and eager attention.
    padding = query.transpose(1, 2).flatten(0, 1)[plan.padding_index]
    last = plan.cu_seqlens_padding, plan.num_new, options.looking_back()
    return plan.unpack(out, _attend_planned(padding, update, plan, *last))


def _attend_planned(
    q: torch.Tensor,
    update: LayerUpdate,
    plan: PagedStepPlan,
    cu_seqlens_q: torch.Tensor | None,
    max_query_len: int,
    options: AttentionOptions,
) -> torch.Tensor:
    """Attention of packed queries ``[T, Hq, D]`` over what their sequences hold with the step: ``[T, Hq, Dv]``."""
    if plan.is_first:
        # Nothing is cached yet: the new keys are all there is, contiguous and exact.
        k, v = plan.pack(update.key), plan.pack(update.value)
        return flash_attention_op(q, k, v, cu_seqlens_q, plan.cu_seqlens_q, max_query_len, *options.bounds)[0]
    pages = update.pages
    # The split plan is that of the step's tokens.
    split_plan = plan.split_plan(pages.k.shape[2], options.left) if cu_seqlens_q is plan.cu_seqlens_q else None
    return paged_attention_op(
        q, pages.k, pages.v, plan.page_table, plan.seq_lens, cu_seqlens_q, max_query_len, *options.bounds,
        pages.k_scale, pages.v_scale, split_plan,
    )[0]  # fmt: skip


def _over_step(
    query: torch.Tensor, layer: StepLayer, value: torch.Tensor, mask: torch.Tensor | None, options: AttentionOptions
) -> torch.Tensor:
    """A step of the engine: its new tokens are in the pages already, packed over ``[B, L]``."""
    if not isinstance(value, LazyStates) or value.source is not layer or mask is not None:
        raise UnsupportedModelError(
            f"layer {layer.index} attends with a mask, or with values of its own making, which the engine cannot "
            f"serve: use the model's generate()."
        )
    value.refuse_changes()
    is_wider = layer.window is not None and (options.window is None or options.window > layer.window)
    if is_wider and layer.longest > layer.window:  # type: ignore[operator]
        raise UnsupportedModelError(
            f"layer {layer.index} attends over {options.window or 'all'} tokens, the config says {layer.window}: the "
            f"engine cannot serve this model, use its generate()."
        )
    out = layer.attend(contiguous_rows(query.transpose(1, 2).flatten(0, 1)), *options.bounds)
    return out.view(query.shape[0], query.shape[2], *out.shape[1:])
