"""Argument checks: every error names the argument, what it holds, and what is accepted."""

import math
import operator
import os
from collections.abc import Callable
from itertools import pairwise
from types import NoneType
from typing import Any

import torch
from torch.autograd import forward_ad

from .backend import MAX_GRID, TRITON_DEVICES, scale_strides
from .settings import LARGEST

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_HEAD_DIM = 512
PAGE_SIZES = (8, 16, 32, 64, 128, 256)


def integer(name: str, value: object) -> int:
    """``value`` as an int: an int, or what Python takes for an index, such as NumPy's integers."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r} ({type(value).__name__}).") from None


def number(name: str, value: object) -> float:
    """``value`` as a finite float: a number of Python or NumPy, or a tensor of one without a gradient."""
    if not isinstance(value, float):
        has_gradient = isinstance(value, torch.Tensor) and (value.numel() != 1 or value.requires_grad)
        if isinstance(value, str | bool) or has_gradient or not hasattr(value, "__float__"):
            raise TypeError(f"{name} must be a number, got {value!r} ({type(value).__name__}).")
        value = float(value)
    # Not math.isfinite: while a program is traced, numbers are symbols.
    if not -math.inf < value < math.inf:
        raise ValueError(f"{name} must be a finite number, got {value!r}.")
    return value


def count(name: str, value: object, least: int = 1) -> int:
    """``value`` as an int that is at least ``least``."""
    value = integer(name, value)
    if value < least:
        accepted = "a positive int" if least == 1 else f"an int, {least} or more"
        raise ValueError(f"{name} must be {accepted}, got {value!r}.")
    return value


def require(condition: bool, message: str, error: type[Exception] = ValueError) -> None:
    """Raise ``error(message)`` unless ``condition``."""
    if not condition:
        raise error(message)


def check_tensor(name: str, tensor: object, dims: str, dtypes: tuple[torch.dtype, ...] = DTYPES) -> torch.Tensor:
    """Check type, number of dimensions (``dims`` reads like "[T, H, D]") and dtype of one argument."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} must be a tensor {dims}, got {type(tensor).__name__}.")
    require(
        tensor.ndim == dims.count(",") + 1,
        f"{name} must have the shape {dims}, got {list(tensor.shape)}.",
    )
    require(
        tensor.dtype in dtypes,
        f"{name} must be {' or '.join(str(d).removeprefix('torch.') for d in dtypes)}, got {tensor.dtype}.",
        TypeError,
    )
    return tensor


def check_same_device(**tensors: torch.Tensor | None) -> None:
    """All tensors must live on one device, and it must be one the kernels run on."""
    devices = {name: tensor.device for name, tensor in tensors.items() if tensor is not None}
    require(
        len(set(devices.values())) == 1,
        "all tensors must be on one device, got " + ", ".join(f"{n} on {d}" for n, d in devices.items()) + ".",
    )
    device = next(iter(devices.values()))
    require(
        device.type in ("cpu", "meta", *TRITON_DEVICES),
        f"device {device} is not supported; use one of cpu, {', '.join(TRITON_DEVICES)}.",
    )


def check_scales(k_pages: torch.Tensor, k_scale: torch.Tensor | None, v_scale: torch.Tensor | None) -> None:
    """Quantised pages come with one float32 scale per slot and head; other pages without."""
    quantized = k_pages.dtype in LARGEST
    require(
        (k_scale is not None) == (v_scale is not None) == quantized,
        f"k_scale and v_scale are for float8_e4m3fn and int8 pages, and needed there; the pages are {k_pages.dtype}.",
    )
    for name, scales in (("k_scale", k_scale), ("v_scale", v_scale)):
        if scales is None:
            continue
        check_tensor(name, scales, "[num_pages, num_kv_heads, page_size]", (torch.float32,))
        require(
            scales.shape == k_pages.shape[:3],
            f"{name} must be {list(k_pages.shape[:3])}, one scale per slot and head, got {list(scales.shape)}.",
        )
    scale_strides(k_scale, v_scale)
    if k_pages.dtype == torch.float8_e4m3fn and k_pages.device.type == "cuda" and torch.version.hip is None:
        capability = torch.cuda.get_device_capability(k_pages.device)
        require(
            capability >= (8, 9),
            f"float8_e4m3fn pages need compute capability 8.9 or newer, this GPU has {capability}: use int8 pages.",
        )


def check_heads(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, num_kv_heads: int, num_v_heads: int) -> None:
    """Head counts, head dims and dtypes of q, k and v must fit each other; quantised k and v have their own dtype."""
    num_q_heads, head_dim, v_dim = q.shape[-2], q.shape[-1], v.shape[-1]
    require(
        num_kv_heads == num_v_heads,
        f"k and v must have the same number of heads, got {num_kv_heads} and {num_v_heads}.",
    )
    require(
        num_kv_heads > 0 and num_q_heads % num_kv_heads == 0,
        f"the number of query heads must be a multiple of the key/value heads, got {num_q_heads} and {num_kv_heads}.",
    )
    require(
        num_q_heads <= MAX_GRID, f"the number of query heads must be at most {MAX_GRID}, got {num_q_heads}."
    )
    require(k.shape[-1] == head_dim, f"q and k must have the same head dim, got {head_dim} and {k.shape[-1]}.")
    for name, dim in (("q and k", head_dim), ("v", v_dim)):
        require(1 <= dim <= MAX_HEAD_DIM, f"the head dim of {name} must be 1 to {MAX_HEAD_DIM}, got {dim}.")
    require(
        k.dtype == v.dtype and (q.dtype == k.dtype or k.dtype in LARGEST),
        f"q, k and v must have the same dtype, got {q.dtype}, {k.dtype} and {v.dtype}.",
        TypeError,
    )


def check_sinks(sinks: torch.Tensor | None, num_q_heads: int) -> None:
    """``sinks`` is one logit per query head."""
    if sinks is None:
        return
    check_tensor("sinks", sinks, "[num_q_heads]")
    require(
        sinks.shape[0] == num_q_heads,
        f"sinks must hold one logit for each of the {num_q_heads} query heads, got {sinks.shape[0]}.",
    )


def check_cu_seqlens(name: str, cu_seqlens: torch.Tensor) -> torch.Tensor:
    """Prefix sums of lengths: int32 ``[num_seqs + 1]``."""
    check_tensor(name, cu_seqlens, "[num_seqs + 1]", (torch.int32,))
    require(cu_seqlens.shape[0] >= 1, f"{name} must hold at least one element, [0] for no sequences.")
    return cu_seqlens


def check_cu_seqlens_values(name: str, cu_seqlens: torch.Tensor, num_tokens: int, max_seqlen: int | None) -> None:
    """Prefix sums rise from 0 to ``num_tokens`` in steps of at most ``max_seqlen``. Reads the device."""
    values = cu_seqlens.tolist()
    steps = [b - a for a, b in pairwise(values)]
    require(
        values[0] == 0 and values[-1] == num_tokens and all(s >= 0 for s in steps),
        f"{name} must rise from 0 to the number of tokens ({num_tokens}), got {_short(values)}.",
    )
    if max_seqlen is not None and steps:
        require(
            max(steps) <= max_seqlen,
            f"{name} has a sequence of {max(steps)} tokens, more than the maximum given ({max_seqlen}).",
        )


def resolve_window(window: object, causal: bool) -> tuple[int | None, int | None]:
    """Translate ``window`` and ``causal`` to keys seen to the left and to the right; None is no bound."""
    left: int | None
    right: int | None
    if window is None:
        left = right = None
    elif isinstance(window, tuple | list) and len(window) == 2:
        left, right = (_neighbours(x) for x in window)
    else:
        tokens = -1 if isinstance(window, tuple | list | str) else integer("window", window)
        if tokens < 1:
            raise ValueError(
                f"window must be None, a number of tokens (1 or more, the query itself counted) or a pair "
                f"(left, right) of neighbours seen, got {window!r}."
            )
        left = right = _neighbours(tokens - 1)
    if causal:
        right = 0
    return left, right


def _neighbours(tokens: object) -> int | None:
    tokens = None if tokens is None else integer("window", tokens)
    # No sequence is that long; positions plus the window stay within the int32 of kernels.
    return None if tokens is None or not 0 <= tokens < 2**30 else tokens


def check_softcap(softcap: float | None) -> float | None:
    """A softcap is a positive number, or None."""
    if softcap is None:
        return None
    value = number("softcap", softcap)
    if value <= 0:
        raise ValueError(f"softcap must be None or a positive number, got {softcap!r}.")
    return value


def resolve_scale(scale: float | None, head_dim: int) -> float:
    """The factor on q @ k: ``head_dim ** -0.5`` unless given."""
    return head_dim**-0.5 if scale is None else number("scale", scale)


def check_pages(k_pages: torch.Tensor, v_pages: torch.Tensor) -> None:
    """Shapes, strides and page size of a pair of page tensors."""
    for name, pages in (("k_pages", k_pages), ("v_pages", v_pages)):
        check_tensor(name, pages, "[num_pages, num_kv_heads, page_size, head_dim]", DTYPES + tuple(LARGEST))
        require(
            pages.stride(-1) == 1,
            f"the last dimension of {name} must be contiguous (stride 1), got strides {pages.stride()}.",
        )
    require(
        k_pages.shape[:3] == v_pages.shape[:3],
        f"k_pages and v_pages must agree in pages, heads and page size, got {list(k_pages.shape)} and "
        f"{list(v_pages.shape)}.",
    )
    num_heads = k_pages.shape[1]
    require(num_heads <= MAX_GRID, f"the number of key/value heads must be at most {MAX_GRID}, got {num_heads}.")
    check_page_size(k_pages.shape[2])


def check_page_size(page_size: object) -> int:
    """Page sizes are a few powers of two."""
    page_size = integer("page_size", page_size)
    if page_size not in PAGE_SIZES:
        raise ValueError(f"page_size must be one of {PAGE_SIZES}, got {page_size!r}.")
    return page_size


def check_page_table_values(
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    num_pages: int,
    page_size: int,
    window_left: int | None,
) -> None:
    """Every page that a query may read must lie inside the pool, every query inside its sequence. Reads the device."""
    lengths = seq_lens.to(page_table.device, torch.int64)
    query_lens = cu_seqlens_q.diff().to(torch.int64)
    capacity = page_table.shape[1] * page_size
    too_long = (lengths > capacity) | (lengths < query_lens)
    if bool(too_long.any()):
        i = int(too_long.nonzero()[0])
        raise ValueError(
            f"seq_lens[{i}] is {int(lengths[i])}: it must be at least the sequence's {int(query_lens[i])} new tokens "
            f"and at most the {capacity} tokens that page_table has room for."
        )
    first = torch.zeros_like(lengths)
    if window_left is not None:
        first = (lengths - query_lens - window_left).clamp(min=0) // page_size
    column = torch.arange(page_table.shape[1], device=page_table.device)
    needed = (column >= first[:, None]) & (column * page_size < lengths[:, None]) & (query_lens > 0)[:, None]
    outside = needed & ((page_table < 0) | (page_table >= num_pages))
    if bool(outside.any()):
        row, col = outside.nonzero()[0].tolist()
        raise ValueError(
            f"page_table[{row}, {col}] is {int(page_table[row, col])}, outside of the pool of {num_pages} pages "
            f"(accepted: 0 to {num_pages - 1})."
        )


def check_groups(groups: object, num_seqs: int, max_pages: int) -> list[tuple[int, int, int]]:
    """Groups of neighbours: ``(first_sequence, num_sequences, prefix_pages)`` of ints, disjoint, inside the step."""
    what = "groups must be a list of (first_sequence, num_sequences, prefix_pages)"
    if not isinstance(groups, list | tuple):
        raise TypeError(f"{what}, got {type(groups).__name__}.")
    checked = []
    for one in groups:
        require(isinstance(one, list | tuple) and len(one) == 3, f"{what}, all ints; it holds {one!r}.")
        first, members, pages = (integer(f"every number of groups (it holds {one!r})", x) for x in one)
        require(
            first >= 0 and members >= 1 and first + members <= num_seqs,
            f"groups holds {one!r}: sequences {first} to {first + members - 1} of a step that has 0 to {num_seqs - 1}.",
        )
        require(
            0 <= pages < max_pages,
            f"groups holds {one!r}: prefix_pages must be 0 to {max_pages - 1}, one less than page_table has columns, "
            f"since new tokens lie in private pages.",
        )
        checked.append((first, members, pages))
    for before, after in pairwise(sorted(checked)):
        require(before[0] + before[1] <= after[0], f"groups must be disjoint, got {before!r} and {after!r}.")
    return checked


def refuse_tangents(**tensors: torch.Tensor | None) -> None:
    """Refuse tensors with forward-mode derivatives, which no kernel carries on: results would silently have none."""
    # The level, -1 outside of forward mode, saves the look at each tensor.
    if torch.compiler.is_compiling() or getattr(forward_ad, "_current_level", 0) < 0:
        return
    for name, tensor in tensors.items():
        if tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None:
            raise NotImplementedError(
                f"{name} has a forward-mode derivative (torch.func.jvp, torch.autograd.forward_ad), and the attention "
                f"kernels compute none: use reverse mode (backward()), or load the model with "
                f'attn_implementation="eager".'
            )


VALUES_ON_DEVICE = os.environ.get("HF_PAGED_CHECK_VALUES") == "1"
"""Check values on an accelerator too, where each look at them waits for all that runs: to find a fault."""


def may_read_values(*tensors: torch.Tensor) -> bool:
    """Whether a check may look at values: those in host memory.

    Not while a program is traced: a tensor is then a fake, or another wrapper.
    """
    if torch.compiler.is_compiling():
        return False
    device = tensors[0].device.type
    if device == "meta" or not (device == "cpu" or VALUES_ON_DEVICE):
        return False
    if any(type(x) not in (torch.Tensor, torch.nn.Parameter) for x in tensors):
        return False
    return device != "cuda" or not torch.cuda.is_current_stream_capturing()


MAX_CHECKED = 1024
OPTIONS = (NoneType, bool, int, float)
_checked: dict[tuple, Any] = {}


def once(check: Callable[..., Any], tensors: tuple, *options: Any) -> Any:
    """``check(*tensors, *options)``, which asks nothing of values: known where all else is as in an earlier call.

    While a program is traced, and for arguments that may be more than they seem, every call is checked.
    """
    if torch.compiler.is_compiling():
        return check(*tensors, *options)
    key: list = [check]
    for x in tensors:
        kind = type(x)
        if kind is torch.Tensor or kind is torch.nn.Parameter:
            key += (x.shape, x.stride(), x.dtype, x.device)
        elif x is None:
            key.append(None)
        else:
            return check(*tensors, *options)
    for x in options:
        # 1, 1.0 and True are equal, and not all accepted.
        kind = type(x)
        if kind is tuple and all(type(one) in OPTIONS for one in x):
            key += map(type, x)
        elif kind not in OPTIONS:
            return check(*tensors, *options)
        key += (kind, x)
    found = tuple(key)
    try:
        return _checked[found]
    except KeyError:
        result = check(*tensors, *options)
        if len(_checked) >= MAX_CHECKED:
            _checked.clear()
        _checked[found] = result
        return result


def _short(values: list[int]) -> str:
    return str(values) if len(values) <= 8 else f"[{', '.join(map(str, values[:4]))}, ..., {values[-1]}]"
