"""The attention and mask functions that transformers calls for ``attn_implementation="paged_flash"``."""

import ast
import functools
import inspect
import textwrap
from collections.abc import Callable
from typing import Any

import torch
from hf_paged_kernels import flash_attention
from hf_paged_kernels.attention.ops import flash_attention_op, paged_attention_op, write_pages_op
from hf_paged_kernels.attention.reference import attend_rows, flash_attention_reference
from hf_paged_kernels.checks import check_pages, check_softcap, resolve_scale, resolve_window
from torch._subclasses.fake_tensor import FakeTensor
from transformers.masking_utils import causal_mask_function, sdpa_mask
from transformers.utils import logging

from ..cache.layer_group import check_window
from ..cache.paged_states import LayerUpdate, PagedStates
from ..cache.step_plan import StepPlan, padding_behind, prefix_sums
from ..cache.step_states import StepStates
from ..errors import UnsupportedModelError
from ..mixed_precision import in_one_dtype, without_autocast
from ..transformers_internals import (
    batching_update,
    collects_attentions,
    is_batching_cache,
    is_causal_mask,
    is_plain_mask,
    packed_segments,
)
from .continuous_batching import decode_rows

logger = logging.get_logger(__name__)

NO_EFFECT = frozenset({"position_ids", "deterministic"})
"""Keyword arguments that attention layers write into their call and that do not change attention.

``deterministic`` among them: gradients have the same bits every time anyway."""

UNSUPPORTED = frozenset({"position_bias", "indices", "block_indices", "sinks"})
"""Those that do change it, in ways that the kernels do not know: biases, sparse attention, other kinds of sinks.

``test_keywords.py`` reads the sources of transformers and fails when a layer writes one that is in no list here."""

BATCHING = frozenset(
    {"read_index", "write_index", "block_table", "k_cache", "v_cache", "max_seqlen_q", "max_seqlen_k"}
)
"""Keyword arguments of transformers' own continuous batching."""

UNSAID: Any = object()
"""The default of ``sliding_window``: the model says nothing, which is not the same as None, no window."""

VARLEN = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


def _take_back_on_error(attention: Callable) -> Callable:
    """A step that attention refuses must not be placed in the cache by the next one.

    A compiled model runs what belongs to a cache as it is written: who owns which page is plain Python.
    """
    uncompiled = torch.compiler.disable(attention)

    @functools.wraps(attention)
    def wrapped(module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(key, PagedStates):
            return attention(module, query, key, *args, **kwargs)
        try:
            return uncompiled(module, query, key, *args, **kwargs)
        except Exception:
            key.update.layer.cache.forget_pending()
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
    sliding_window: int | None = UNSAID,
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
    _refuse_unsupported(module, dropout, kwargs)
    query, key, value = in_one_dtype(query, key, value)
    if not query.dtype == key.dtype == value.dtype:
        raise TypeError(f"q, k and v must have the same dtype, got {query.dtype}, {key.dtype} and {value.dtype}.")
    if sliding_window is UNSAID:
        if attention_mask is None or attention_mask.ndim != 4:
            _refuse_hidden_window(module, key.layer.longest if isinstance(key, StepStates) else key.shape[2])
        sliding_window = None
    causal = getattr(module, "is_causal", True) if is_causal is None else bool(is_causal)
    sinks = None if s_aux is None else s_aux.reshape(-1)
    scale, softcap = resolve_scale(scaling, query.shape[-1]), check_softcap(softcap)
    options = _Options(scale, sliding_window, softcap, causal, sinks)
    with without_autocast(query.device):
        return _attend(module, query, key, value, attention_mask, options, cache, kwargs), None


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    options: "_Options",
    cache: Any,
    kwargs: dict[str, Any],
) -> torch.Tensor:
    """Attention by the path for what was given: ``[B, L, Hq, Dv]``."""
    if isinstance(key, StepStates):
        return _over_step(query, key, value, attention_mask, options)
    if is_batching_cache(cache) or kwargs.get("write_index") is not None:
        return _batched(module, query, key, value, cache, options, kwargs)
    if attention_mask is not None and attention_mask.ndim == 4:
        return _with_dense_mask(query, key, value, attention_mask, options)
    if attention_mask is not None and attention_mask.ndim != 2:
        raise ValueError(f"attention_mask must be 2D or 4D, got the shape {list(attention_mask.shape)}.")
    _refuse_two_packings(query, key, attention_mask, module, kwargs)
    # A model that changes one of them after the cache (latent attention, repeated heads) has gathered it: all is dense.
    if isinstance(key, PagedStates) and isinstance(value, PagedStates):
        if kwargs.get("cu_seq_lens_q") is not None:
            raise ValueError("packed sequences (cu_seq_lens_q) cannot be added to a cache: pass use_cache=False.")
        return _over_pages(query, key, value, attention_mask, options)
    if kwargs.get("cu_seq_lens_q") is not None:
        missing = [name for name in VARLEN if kwargs.get(name) is None]
        if missing:
            raise ValueError(f"packed sequences need {', '.join(VARLEN)}; {', '.join(missing)} is missing.")
        return _packed(query, key, value, kwargs["cu_seq_lens_q"], kwargs["cu_seq_lens_k"], options)
    if attention_mask is not None:
        return _with_padding(query, key, value, attention_mask, options)
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    return options.flash(q, k, v)


class _Options:
    """What every call of a kernel needs beside tensors."""

    __slots__ = ("causal", "left", "right", "scale", "sinks", "softcap", "window")

    def __init__(
        self, scale: float, window: int | None, softcap: float | None, causal: bool, sinks: torch.Tensor | None
    ) -> None:
        self.scale, self.window, self.softcap, self.causal, self.sinks = scale, window, softcap, causal, sinks
        self.left, self.right = resolve_window(window, causal)

    def looking_back(self) -> "_Options":
        """The same for queries behind all keys, which see every one of them."""
        return _Options(self.scale, None, self.softcap, False, self.sinks)

    def flash(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **lengths: Any) -> torch.Tensor:
        """Dense ``[B, L, H, D]`` or packed ``[T, H, D]``."""
        if q.dtype == torch.float64:
            # No kernel computes in it: plain PyTorch, with PyTorch's backward pass.
            return flash_attention_reference(
                q, k, v, lengths.get("cu_seqlens_q"), lengths.get("cu_seqlens_k"), q.shape[1], self.left, self.right,
                self.softcap, self.sinks, self.scale,
            )[0]  # fmt: skip
        out = flash_attention(
            q, k, v, causal=self.causal, window=self.window, softcap=self.softcap, sinks=self.sinks, scale=self.scale,
            **lengths,
        )  # fmt: skip
        assert isinstance(out, torch.Tensor)
        return out


def _refuse_unsupported(module: torch.nn.Module, dropout: float, kwargs: dict[str, Any]) -> None:
    if dropout:
        raise ValueError(
            f"dropout must be 0 in paged_flash, got {dropout}: call model.eval(), or set the config's dropout of "
            f"attention (attention_dropout, attn_pdrop, ...) to 0; for training with attention dropout use "
            f'attn_implementation="sdpa".'
        )
    if kwargs.get("output_attentions") or collects_attentions():
        raise ValueError(
            "output_attentions=True is not supported: paged_flash has no attention matrix. "
            'Use attn_implementation="eager".'
        )
    for name, argument in kwargs.items():
        if argument is None or argument is False or name in NO_EFFECT or name in BATCHING or name in VARLEN:
            continue
        if name in UNSUPPORTED or is_written_by(type(module), name):
            raise ValueError(
                f"{type(module).__name__} passes {name} to attention, which paged_flash does not support: load the "
                f'model with attn_implementation="eager" or "sdpa".'
            )


@torch.compiler.assume_constant_result
def is_written_by(layer: type, name: str) -> bool:
    """Whether an attention layer itself names a keyword in a call that hands its ``**kwargs`` on.

    What it does not name came through ``**kwargs`` from the caller of the model (``labels``, an option of a loss), and
    is nothing to attention: eager, sdpa and flash attention ignore it too.
    """
    known = _written_keywords(layer)
    return known is None or name in known


@functools.cache
def _written_keywords(layer: type) -> frozenset[str] | None:
    """What :func:`is_written_by` asks for; None: the layer has no source to read."""
    names: set[str] = set()
    for base in layer.__mro__:
        if base.__module__.split(".")[0] in ("torch", "builtins"):
            continue
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
        except (OSError, TypeError, SyntaxError):
            return None
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and any(keyword.arg is None for keyword in node.keywords):
                names.update(keyword.arg for keyword in node.keywords if keyword.arg is not None)
            elif isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
                names.add(str(node.slice.value))
    return frozenset(names)


def _refuse_hidden_window(module: torch.nn.Module, num_keys: int) -> None:
    """Refuse a sliding window that the model puts in its masks only: our masks leave windows to ``sliding_window``.

    Told from the config, as transformers' caches do. Up to the window's length every token is seen anyway.
    """
    config = getattr(module, "config", None)
    window = getattr(config, "sliding_window", None)
    layer_types = getattr(config, "layer_types", None)
    layer = getattr(module, "layer_idx", None)
    if layer_types is not None and layer is not None and layer_types[layer] != "sliding_attention":
        return
    if isinstance(window, int) and num_keys > window:
        raise UnsupportedModelError(
            f"{type(module).__name__} does not pass the config's sliding_window ({window}) on to attention, so "
            f"paged_flash cannot apply it to {num_keys} tokens: load the model with "
            f'attn_implementation="eager" or "sdpa", or keep to {window} tokens.'
        )


def _refuse_two_packings(
    query: torch.Tensor,
    key: torch.Tensor,
    mask: torch.Tensor | None,
    module: torch.nn.Module,
    kwargs: dict[str, Any],
) -> None:
    """Refuse a padding mask beside packed lengths, and packed positions of which no mask or length tells.

    transformers tells packed sequences from ``position_ids`` only for models that hand them to their mask (gpt_oss and
    encoders do not), and never beside a cache. Looked at in the first layer: the others get the same.
    """
    if kwargs.get("cu_seq_lens_q") is not None:
        # An int32 mask has the same sequences, told from position_ids.
        if mask is not None and mask.dtype != torch.int32:
            raise ValueError(
                f"a padding mask {list(mask.shape)} was given together with cu_seq_lens_q, and only one of them can "
                f"say which keys belong together: leave attention_mask out for packed sequences."
            )
        return
    positions, length = kwargs.get("position_ids"), query.shape[2]
    if mask is not None or positions is None or getattr(module, "layer_idx", None) not in (0, None):
        return
    if positions.ndim != 2 or positions.shape[1] != length or key.shape[2] != length or length == 1:
        return
    if torch.compiler.is_compiling() or isinstance(positions, FakeTensor):
        return
    if positions.is_cuda and torch.cuda.is_current_stream_capturing():
        return  # Their values cannot be looked at.
    if bool((positions.diff() <= 0).any()):
        raise ValueError(
            f"position_ids restart, as for packed sequences, but {type(module).__name__} gets no mask that separates "
            f"them: pass {', '.join(VARLEN)} and use_cache=False, or one sequence a row with its attention_mask. If "
            f'they are one sequence, load the model with attn_implementation="sdpa".'
        )


def _over_pages(
    query: torch.Tensor, key: PagedStates, value: PagedStates, mask: torch.Tensor | None, options: _Options
) -> torch.Tensor:
    """A step on a PagedCache: place the new tokens, then attend."""
    update = key.update
    if value.update is not update:
        raise UnsupportedModelError(
            "the model pairs the keys of one cache update with the values of another, which paged_flash cannot read "
            'from pages: load it with attn_implementation="eager" or "sdpa".'
        )
    if mask is not None and mask.dtype == torch.int32:
        raise ValueError("packed sequences (restarting position_ids) cannot be added to a cache: pass use_cache=False.")
    check_window(update, options.window, update.start + update.key.shape[2])
    plan = update.layer.write(update, mask)
    packed_query = plan.pack(query)
    if not packed_query.shape[0] and plan.padding_index is None:
        return query.new_zeros(*query.shape[:1], query.shape[2], query.shape[1], value.shape[-1])
    sinks, left, right = options.sinks, options.left, options.right
    if plan.is_first:
        # Nothing is cached yet: the new keys are all there is, contiguous and exact.
        out, _ = flash_attention_op(
            packed_query, plan.pack(update.key), plan.pack(update.value), plan.cu_seqlens_q, plan.cu_seqlens_q,
            plan.max_query_len, left, right, options.softcap, sinks, options.scale,
        )  # fmt: skip
    else:
        pages = update.layer.pages()
        out, _ = paged_attention_op(
            packed_query, pages.k, pages.v, plan.page_table, plan.seq_lens, plan.cu_seqlens_q, plan.max_query_len,
            left, right, options.softcap, sinks, options.scale, pages.k_scale, pages.v_scale,
            plan.split_plan(pages.k.shape[2], left),
        )  # fmt: skip
    return plan.unpack(out, _of_padding(query, update, plan, options) if plan.padding_index is not None else None)


def _of_padding(query: torch.Tensor, update: LayerUpdate, plan: StepPlan, options: "_Options") -> torch.Tensor:
    """What padding behind a row's last token gets, ``[num_padding, Hq, Dv]``: it sees all of the row's tokens.

    ``generate()`` takes the next token from the last column, whatever stands there, and so do sdpa and eager attention.
    """
    q = query.transpose(1, 2).flatten(0, 1)[plan.padding_index]
    if plan.is_first:
        return flash_attention_op(
            q, plan.pack(update.key), plan.pack(update.value), plan.cu_seqlens_padding, plan.cu_seqlens_q, plan.num_new,
            None, None, options.softcap, options.sinks, options.scale,
        )[0]  # fmt: skip
    pages = update.layer.pages()
    return paged_attention_op(
        q, pages.k, pages.v, plan.page_table, plan.seq_lens, plan.cu_seqlens_padding, plan.num_new, None, None,
        options.softcap, options.sinks, options.scale, pages.k_scale, pages.v_scale, None,
    )[0]  # fmt: skip


def _over_step(
    query: torch.Tensor, key: StepStates, value: torch.Tensor, mask: torch.Tensor | None, options: _Options
) -> torch.Tensor:
    """A step of the engine: its new tokens are in the pages already, packed over ``[B, L]``."""
    layer = key.layer
    if not isinstance(value, StepStates) or value.layer is not layer or mask is not None:
        raise UnsupportedModelError(
            f"layer {layer.index} attends with a mask, or with values of its own making, which the engine cannot "
            f"serve: use the model's generate()."
        )
    is_wider = layer.window is not None and (options.window is None or options.window > layer.window)
    if is_wider and layer.longest > layer.window:  # type: ignore[operator]
        raise UnsupportedModelError(
            f"layer {layer.index} attends over {options.window or 'all'} tokens, the config says {layer.window}: the "
            f"engine cannot serve this model, use its generate()."
        )
    out = layer.attend(
        query.transpose(1, 2).flatten(0, 1), options.left, options.right, options.softcap, options.sinks, options.scale
    )
    return out.view(query.shape[0], query.shape[2], *out.shape[1:])


def _packed(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    options: _Options,
    max_seqlen_q: int | None = None,
) -> torch.Tensor:
    """Sequences packed by the caller into one row (or rows whose lengths the prefix sums cover in order)."""
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    lengths = {"cu_seqlens_q": cu_seqlens_q.to(torch.int32), "cu_seqlens_k": cu_seqlens_k.to(torch.int32)}
    out = options.flash(q, k, v, max_seqlen_q=max_seqlen_q, **lengths)
    return out.view(query.shape[0], query.shape[2], *out.shape[1:])


def _with_padding(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, options: _Options
) -> torch.Tensor:
    """Dense inputs and a 2D mask: the tokens are packed, padding takes no part."""
    num_seqs, _, num_queries, _ = query.shape
    if mask.shape[1] > key.shape[2]:
        raise ValueError(f"attention_mask has {mask.shape[1]} columns, the keys {key.shape[2]}: it must not have more.")
    if mask.shape[1] < key.shape[2] and not options.causal:
        raise ValueError(
            f"attention_mask has {mask.shape[1]} columns for {key.shape[2]} keys that are all seen (cross-attention): "
            f"it must cover them; prefill_chunk_size cuts the encoder's mask."
        )
    # A static cache hands over keys that are not filled yet: the mask says how many count.
    key, value = key[:, :, : mask.shape[1]], value[:, :, : mask.shape[1]]
    if mask.dtype == torch.int32:
        ends = torch.ones_like(mask, dtype=torch.bool)
        ends[:, :-1] = mask[:, 1:] != mask[:, :-1]
        bounds = torch.cat([mask.new_zeros(1), ends.flatten().nonzero().squeeze(1).int() + 1])
        return _packed(query, key, value, bounds, bounds, options)
    keys_held = mask.bool()
    if options.left is None and options.right is None:
        # Every query sees every token: cross-attention's queries are of another sequence than this mask.
        queries_held = torch.ones_like(keys_held[:, :1]).expand(-1, num_queries)
    else:
        queries_held = keys_held[:, -num_queries:]
    q_index, k_index = (held.flatten().nonzero().squeeze(1) for held in (queries_held, keys_held))
    flat = [x.transpose(1, 2).flatten(0, 1) for x in (query, key, value)]
    out = options.flash(
        flat[0][q_index], flat[1][k_index], flat[2][k_index],
        cu_seqlens_q=prefix_sums(queries_held), cu_seqlens_k=prefix_sums(keys_held), max_seqlen_q=num_queries,
    )  # fmt: skip
    padded = out.new_zeros(num_seqs * num_queries, *out.shape[1:])
    padded[q_index] = out
    if options.causal and not torch.is_grad_enabled():
        behind = padding_behind(keys_held, keys_held.any(1))[:, -num_queries:]
        index = behind.flatten().nonzero().squeeze(1)
        if torch.compiler.is_compiling() or len(index):  # A graph does not ask how many there are.
            padded[index] = options.looking_back().flash(
                flat[0][index], flat[1][k_index], flat[2][k_index],
                cu_seqlens_q=prefix_sums(behind), cu_seqlens_k=prefix_sums(keys_held), max_seqlen_q=num_queries,
            )  # fmt: skip
    return padded.view(num_seqs, num_queries, *out.shape[1:])


def _with_dense_mask(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, options: _Options
) -> torch.Tensor:
    """A 4D mask or bias: the reference computation, with an attention matrix."""
    _log_dense_mask()
    num_queries, num_keys = query.shape[2], key.shape[2]
    if mask.shape[-1] < num_keys or mask.shape[-2] not in (1, num_queries):
        raise ValueError(
            f"a 4D attention_mask must be [batch, heads, {num_queries}, {num_keys}], got {list(mask.shape)}."
        )
    mask = mask[..., :num_keys].expand(query.shape[0], -1, num_queries, num_keys)
    if isinstance(key, PagedStates):
        layer, update = key.update.layer, key.update
        is_hidden = ~mask if mask.dtype == torch.bool else mask <= torch.finfo(mask.dtype).min / 2
        layer.write(update, layer.cache.tokens_of_dense_mask(update, ~is_hidden.flatten(1, 2).all(1)))
        key = key.dense()
        value = value.dense() if isinstance(value, PagedStates) else value
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=torch.float32, device=mask.device).masked_fill(~mask, float("-inf"))
    # A query without keys (padding) gives zeros; the gradient of its softmax would be NaN.
    is_empty = mask.isneginf().all(-1, keepdim=True)
    mask = mask.masked_fill(is_empty, 0.0)
    rows = [
        attend_rows(q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1), None, options.softcap, options.sinks,
                    options.scale, bias=b)[0]
        for q, k, v, b in zip(query, key, value, mask)
    ]  # fmt: skip
    return torch.stack(rows).masked_fill(is_empty.transpose(1, 2), 0.0)


@torch.compiler.assume_constant_result
def _log_dense_mask() -> None:
    """One line. A model that is compiled logs it while it is traced: a graph cannot."""
    logger.warning_once(
        "paged_flash got a 4D attention mask, which its kernels cannot express: attention takes the reference path, "
        "with a full attention matrix in memory."
    )


def _batched(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cache: Any,
    options: _Options,
    kwargs: dict[str, Any],
) -> torch.Tensor:
    """A step of transformers' continuous batching: one row ``[1, H, T, D]`` of packed sequences."""
    dtype, new_key, new_value = query.dtype, key, value
    if is_batching_cache(cache) and kwargs.get("block_table") is None:
        # It has the dtype of the weights, whatever autocast says.
        query, key, value = (x.to(cache.dtype) for x in (query, key, value))
    key, value = batching_update(cache if is_batching_cache(cache) else None, module, key, value, kwargs)
    if kwargs.get("block_table") is None:
        # Prefill and mixed steps: transformers has gathered the keys through its read_index. It is not read in place:
        # it names single tokens, not pages, the tensors it indexes are private in every version, and the slots of a
        # window layer may be overwritten by this step's own tokens.
        lengths = kwargs["cu_seq_lens_q"], kwargs["cu_seq_lens_k"]
        return _packed(query, key, value, *lengths, options, kwargs.get("max_length_q")).to(dtype)
    # Decode: one new token a sequence, written and read in place through the block table.
    k_pages, v_pages = (kwargs[name].transpose(1, 2) for name in ("k_cache", "v_cache"))
    check_pages(k_pages, v_pages)
    q, k, v = (x.squeeze(0).transpose(0, 1).to(k_pages.dtype) for x in (query, new_key, new_value))
    table, page_size = kwargs["block_table"], k_pages.shape[2]
    rows = decode_rows(
        kwargs["cu_seq_lens_q"], module.layer_idx, table, kwargs["cu_seq_lens_k"], page_size, options.left
    )
    write_pages_op(k, v, k_pages, v_pages, rows.slots, None, None)
    out, _ = paged_attention_op(
        q, k_pages, v_pages, table, rows.seq_lens, rows.cu_seqlens_q, 1, options.left, options.right,
        options.softcap, options.sinks, options.scale, None, None, rows.plan,
    )  # fmt: skip
    return out.unsqueeze(0).to(dtype)


def paged_flash_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int | torch.Tensor = 0,
    mask_function: Callable = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> torch.Tensor | None:
    """The mask that :func:`paged_flash_attention` gets for what a model asks for.

    Causal, sliding-window and bidirectional masks are the kernels' own: only padding is left to say.

    Returns:
        None: no padding. 2D bool ``[B, kv_length]``: True where a column is a token. 2D int32: 1, 2, ... by packed
        sequence. 4D bool ``[B, 1, q_length, kv_length]``: any other mask function, and a window that reaches over
        padding between tokens.
    """
    is_plain, segments = is_plain_mask(mask_function), packed_segments(mask_function)
    told = segments if attention_mask is None else attention_mask
    if isinstance(told, FakeTensor) and not torch.compiler.is_compiling() and (is_plain or segments is not None):
        return None  # Shapes alone are asked for, and no mask changes them.
    # An exported program has no number of tokens that depends on values: it gets masks as sdpa does.
    is_exporting = _is_exporting()
    is_causal = is_plain and is_causal_mask(mask_function)
    if is_plain and not (is_exporting and attention_mask is not None):
        if attention_mask is None:
            num_filled = int(q_offset) + q_length - int(kv_offset) if is_causal else kv_length
            if num_filled >= kv_length:
                return None
            # A static cache hands over keys that are not filled yet.
            return torch.ones(batch_size, num_filled, dtype=torch.bool, device=device)
        # Windowed dense caches hold only the last columns; for all others this keeps everything.
        shown, window = attention_mask[:, -kv_length:], kwargs.get("local_size")
        if torch.compiler.is_compiling():
            # A graph has one kind of mask, whatever the values: what needs the other one is refused when it runs.
            return shown if window is None else without_gaps_op(shown, attention_mask, q_length, window, is_causal)
        if shown.shape[1] == kv_length and bool(shown.all()):
            return None
        if window is None or not _has_gaps(attention_mask[:, : int(q_offset) + q_length], q_length, window, is_causal):
            return shown
    if segments is not None and attention_mask is None and q_length == kv_length and not is_exporting:
        return (segments + 1).to(torch.int32).expand(batch_size, -1)
    if q_length == 1 and attention_mask is None and not kwargs.get("use_vmap"):
        return None
    kwargs.update(allow_is_causal_skip=False, allow_is_bidirectional_skip=False)
    return sdpa_mask(
        batch_size=batch_size, q_length=q_length, kv_length=kv_length, q_offset=q_offset, kv_offset=kv_offset,
        mask_function=mask_function, attention_mask=attention_mask, device=device, **kwargs,
    )  # fmt: skip


@torch.compiler.assume_constant_result
def _is_exporting() -> bool:
    """``torch.compiler.is_exporting()``, which torch 2.11 traces as True in every compiled model."""
    return torch.compiler.is_exporting()


@torch.library.custom_op("hf_paged::without_gaps", mutates_args=())
def without_gaps_op(
    shown: torch.Tensor, mask: torch.Tensor, num_queries: int, window: int, is_causal: bool
) -> torch.Tensor:
    """The columns of ``mask`` that a layer sees, as they are; looked at where a compiled model runs.

    Args:
        shown: 2D ``[B, columns]``.
        mask, num_queries, window, is_causal: as of :func:`_has_gaps`.

    Raises:
        ValueError: padding between tokens within the window.
    """
    is_captured = mask.is_cuda and torch.cuda.is_current_stream_capturing()
    if not is_captured and _has_gaps(mask, num_queries, window, is_causal):
        raise ValueError(
            f"attention_mask hides columns between tokens, within a sliding window of {window} columns: a compiled "
            f"model cannot serve that on paged_flash. Pad each row at one end, or call the model without torch.compile."
        )
    return shown.clone()  # An op must not return its argument.


@without_gaps_op.register_fake
def _(shown: torch.Tensor, mask: torch.Tensor, num_queries: int, window: int, is_causal: bool) -> torch.Tensor:
    return torch.empty_like(shown)


def _has_gaps(mask: torch.Tensor, num_queries: int, window: int, is_causal: bool) -> bool:
    """Whether padding between tokens lies within a sliding window that hides tokens before it.

    A mask's windows count columns, the kernels' count tokens: a query would see tokens too far back.

    Args:
        mask: 2D ``[B, L]``; the last ``num_queries`` columns are the queries.
        window: columns that a causal query sees, itself counted; without ``is_causal``, on each side.
    """
    held = mask.bool()
    if not is_causal:
        # Causal windows to either side.
        return any(_has_gaps(side, side.shape[1], window + 1, True) for side in (held, held.flip(1)))
    num_before = torch.nn.functional.pad(held.cumsum(1), (window, 0))
    num_tokens = num_before[:, window:]
    num_in_window = num_tokens - num_before[:, : num_tokens.shape[1]]
    has_gap = held & (num_in_window < num_tokens.clamp(max=window))
    return bool(has_gap[:, -num_queries:].any())
