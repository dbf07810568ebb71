"""What an attention layer asks for: the options that kernels know, and arguments that they must not get unseen."""

import ast
import functools
import inspect
import textwrap
from typing import Any

import torch
from hf_paged_kernels import flash_attention
from hf_paged_kernels.attention.reference import flash_attention_reference
from hf_paged_kernels.checks import resolve_window
from torch._subclasses.fake_tensor import FakeTensor

from ..errors import UnsupportedModelError
from ..transformers_internals import collects_attentions

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

UNSET: Any = object()
"""The default of ``sliding_window``: the model says nothing, which is not the same as None, no window."""

VARLEN = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


class AttentionOptions:
    """What every call of a kernel needs beside queries, keys and values."""

    __slots__ = ("causal", "left", "right", "scale", "sinks", "softcap", "window")

    def __init__(
        self, scale: float, window: int | None, softcap: float | None, causal: bool, sinks: torch.Tensor | None
    ) -> None:
        self.scale, self.window, self.softcap, self.causal, self.sinks = scale, window, softcap, causal, sinks
        self.left, self.right = resolve_window(window, causal)

    @property
    def bounds(self) -> tuple[int | None, int | None, float | None, torch.Tensor | None, float]:
        """Window to the left and to the right, softcap, sinks, scale: what the kernels' ops take."""
        return self.left, self.right, self.softcap, self.sinks, self.scale

    def looking_back(self) -> "AttentionOptions":
        """The same for queries behind all keys, which see every one of them."""
        return AttentionOptions(self.scale, None, self.softcap, False, self.sinks)

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


def refuse_unsupported(module: torch.nn.Module, dropout: float, kwargs: dict[str, Any]) -> None:
    """Refuse what changes attention in ways that the kernels do not know (ValueError); nothing is ignored."""
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


def refuse_hidden_window(module: torch.nn.Module, num_keys: int) -> None:
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


def refuse_two_packings(
    query: torch.Tensor,
    key: torch.Tensor,
    mask: torch.Tensor | None,
    module: torch.nn.Module,
    kwargs: dict[str, Any],
) -> None:
    """Refuse a padding mask beside packed lengths, and packed positions that neither a mask nor lengths describe.

    transformers finds packed sequences in ``position_ids`` only for models that hand them to their mask (gpt_oss and
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
