"""The fused forwards: what a module's own forward computes, in fewer kernels.

A decoder layer, with up to four norms (each may be missing)::

    h ── pre-attention norm ─ attention ─ post-attention norm ─(+h)─ t ── pre-MLP norm ─ MLP ─ post-MLP norm ─(+t)─> out

    few tokens:   norms before a matmul and sums after one are in its kernel
    more tokens:  a sum and the norm behind it are one kernel; the last one of a layer computes the norm of the next
                  where a matmul leaves its result in parts, that kernel adds them up

A forward that is called in another way than it was proven for calls the module's own.
"""

import dataclasses
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from hf_paged_kernels.backend import has_gluon
from hf_paged_kernels.layers.ops import gated_activation_op, rms_norm_op, rms_norm_parts_op
from hf_paged_kernels.linear.decode import (
    decode_gated_linear_op,
    decode_linear_op,
    decode_linear_settings,
    linear_parts_op,
    num_linear_parts,
)
from hf_paged_kernels.linear.skinny import skinny_gated_linear_op, skinny_linear_op
from hf_paged_kernels.linear.skinny_settings import choose_skinny_linear
from torch import nn

from ..transformers_internals import given_cache
from .stand_ins import has_own_forward
from .weights import PackedLinears

SCALARS = (bool, int, float, str, type(None))
UNWATCHED = frozenset({"training", "gradient_checkpointing"})
"""Attributes that change nothing outside of training, dropout apart."""


class FusionContext:
    """What the fused modules of one forward have in common: its cache, and what they hand to one another."""

    def __init__(self) -> None:
        self.cache: Any = None
        self._normed: tuple[FusedNorm, torch.Tensor, torch.Tensor] | None = None

    def enter(self, cache: Any) -> None:
        """A forward over ``cache`` begins."""
        self.cache, self._normed = cache, None

    def leave(self) -> None:
        """It has ended."""
        self.cache = self._normed = None

    def hand_over(self, norm: "FusedNorm", x: torch.Tensor, normed: torch.Tensor) -> None:
        """Keep ``normed``, the norm of x, for the module that will ask for it."""
        self._normed = norm, x, normed

    def take(self, norm: "FusedNorm", x: torch.Tensor) -> torch.Tensor | None:
        """The norm of this very tensor, if it was handed over."""
        if self._normed is None or self._normed[0] is not norm or self._normed[1] is not x:
            return None
        normed, self._normed = self._normed[2], None
        return normed


def fingerprint(module: nn.Module) -> tuple[Any, ...]:
    """Equal as long as a module computes the same: its class, a forward of its own, plain attributes."""
    # Another thread's engine may add a stand-in meanwhile.
    attributes = list(module.__dict__.items())
    plain = tuple((name, x) for name, x in attributes if isinstance(x, SCALARS) and name not in UNWATCHED)
    return type(module), has_own_forward(module), plain


class _Seen:
    """A module as it was looked at."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._known = fingerprint(module)
        self._values = tuple(module.__dict__.values())

    def is_same(self) -> bool:
        """Whether it still computes what it did; usually a comparison of addresses, for every forward asks."""
        values = tuple(self._module.__dict__.values())
        is_alike = len(values) == len(self._values) and type(self._module) is self._known[0]
        if is_alike and all(map(operator.is_, values, self._values)):
            return True
        if fingerprint(self._module) != self._known:
            return False
        self._values = values
        return True


class Unit:
    """A module with a fused forward.

    Args:
        context: shared by all units of a model.
        module: whose forward this is.
        inside: modules that the fused forward does not call, though their own forwards count.

    Attributes:
        packs: weights that the fused forward reads.
    """

    kind = ""

    def __init__(self, context: FusionContext, module: nn.Module, inside: Sequence[nn.Module] = ()) -> None:
        self.context, self.module = context, module
        self.packs: list[PackedLinears] = []
        wanted = {id(x) for x in inside}
        self._children = [
            (owner, name, child)
            for owner in module.modules()
            for name, child in owner.named_children()
            if id(child) in wanted
        ]
        self._seen = [_Seen(x) for x in (module, *inside)]
        self._drops_out = any(_has_dropout(x) for x in module.modules())

    def is_intact(self) -> bool:
        """Whether modules and their attributes are those that the fused forward was proven with."""
        if self._drops_out and self.module.training:
            return False
        is_there = all(getattr(owner, name, None) is child for owner, name, child in self._children)
        return is_there and all(seen.is_same() for seen in self._seen)

    def structural_key(self) -> tuple[Any, ...]:
        """Equal for units whose modules have the same code, shapes and plain attributes, whatever their layer."""
        seen = [fingerprint(x) for x in self.module.modules()]
        looks = [(kind, own, [x for x in plain if x[0] != "layer_idx"]) for kind, own, plain in seen]
        tensors = (*self.module.parameters(), *self.module.buffers())
        return type(self), looks, [(x.shape, x.dtype, x.device) for x in tensors]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Stands for ``module.forward``."""
        out = self.forward(*args, **kwargs)
        return type(self.module).forward(self.module, *args, **kwargs) if out is NotImplemented else out

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The fused forward; NotImplemented: not for these arguments, nothing was done."""
        raise NotImplementedError


def _has_dropout(module: nn.Module) -> bool:
    if isinstance(module, nn.Dropout):
        return module.p > 0
    return any("drop" in name and isinstance(x, float) and x > 0 for name, x in module.__dict__.items())


def is_small(num_tokens: int, weight: torch.Tensor, is_gated: bool = False) -> bool:
    """Whether the kernel of few tokens multiplies so many by ``weight`` ``[N, K]``."""
    if not has_gluon(weight.device) or weight.dtype == torch.float64:
        return False
    out_features, in_features = weight.shape
    return choose_skinny_linear(num_tokens, out_features, in_features, is_gated, weight.element_size()) is not None


def linear(
    x: torch.Tensor, packed: PackedLinears, norm: "FusedNorm | None" = None, residual: torch.Tensor | None = None
) -> torch.Tensor:
    """``norm(x) W^T + bias + residual``, ``[T, N]``; ``residual`` for few tokens only, see :func:`is_small`."""
    if is_small(len(x), packed.weight):
        if norm is not None and not norm.is_plain:
            x, norm = norm.normalize(x), None
        weight, eps = (None, 0.0) if norm is None else (norm.weight, norm.eps)
        return skinny_linear_op(x, packed.weight, packed.bias, residual, weight, eps)
    assert residual is None
    x = x if norm is None else norm.normalize(x)
    if decode_linear_settings(x, packed.weight) is not None:
        return decode_linear_op(x, packed.weight, packed.bias)
    return F.linear(x, packed.weight, packed.bias)


def linear_parts(x: torch.Tensor, packed: PackedLinears) -> torch.Tensor:
    """Parts of ``x W^T + bias``, float32 ``[P, T, N]``; where ``num_linear_parts`` is not 0."""
    return linear_parts_op(x, packed.weight, packed.bias, num_linear_parts(len(x), packed.weight))


class FusedNorm(Unit):
    """An RMSNorm: one kernel, with a sum before it where there is one.

    Args:
        eps, weight_offset, round_first: as of ``rms_norm_op``.
    """

    kind = "norm"

    def __init__(
        self, context: FusionContext, module: nn.Module, eps: float, weight_offset: float, round_first: bool
    ) -> None:
        super().__init__(context, module)
        self.eps, self.weight_offset, self.round_first = eps, weight_offset, round_first

    @property
    def weight(self) -> torch.Tensor:
        """``[N]``, as it is now."""
        return self.module.weight  # type: ignore[return-value]

    @property
    def is_plain(self) -> bool:
        """Whether the kernel of few tokens can do it."""
        return self.weight_offset == 0

    def normalize(self, x: torch.Tensor) -> torch.Tensor:
        """The norm of x, ``[..., N]``."""
        known = self.context.take(self, x)
        if known is not None:
            return known
        return rms_norm_op(x, self.weight, self.eps, self.weight_offset, self.round_first, None)[0]

    def add(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """``(norm(x + residual), x + residual)``."""
        return rms_norm_op(x, self.weight, self.eps, self.weight_offset, self.round_first, residual)

    def add_parts(self, parts: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The same of x in parts, ``[P, T, N]``; shaped like the residual ``[..., N]``."""
        rows = residual.reshape(-1, residual.shape[-1])
        normed, total = rms_norm_parts_op(parts, self.weight, self.eps, self.weight_offset, self.round_first, rows)
        return normed.view(residual.shape), total.view(residual.shape)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """See :meth:`Unit.forward`."""
        if len(args) != 1 or kwargs or args[0].dtype != self.weight.dtype or args[0].stride(-1) != 1:
            return NotImplemented
        known = self.context.take(self, args[0])
        if known is not None:
            return known
        x = args[0] if args[0].is_contiguous() else args[0].contiguous()
        return self.normalize(x)


class FusedMlp(Unit):
    """``down(act(gate(x)) * up(x))``: gate and up in one matmul.

    Args:
        gate_up, down: weights.
        activation, order: as of ``gated_activation_op``.
        inside: the linear layers and the activation.
    """

    kind = "mlp"

    def __init__(
        self,
        context: FusionContext,
        module: nn.Module,
        gate_up: PackedLinears,
        down: PackedLinears,
        activation: str,
        order: str,
        inside: Sequence[nn.Module],
    ) -> None:
        super().__init__(context, module, inside)
        self.gate_up, self.down, self.activation, self.order = gate_up, down, activation, order
        self.packs = [gate_up, down]

    def takes_residual(self, x: torch.Tensor) -> bool:
        """Whether :meth:`run` of x ``[T, K]`` can add a residual."""
        return is_small(len(x), self.down.weight)

    def gives_parts(self, x: torch.Tensor) -> bool:
        """Whether :meth:`run_in_parts` of x ``[T, K]`` is the better way."""
        return x.dtype == self.down.weight.dtype and num_linear_parts(len(x), self.down.weight) > 0

    def run(self, x: torch.Tensor, norm: FusedNorm | None = None, residual: torch.Tensor | None = None) -> torch.Tensor:
        """``[T, K]`` to ``[T, N]``: of ``norm(x)``, and ``residual`` added."""
        return linear(self._activate(x, norm), self.down, residual=residual)

    def run_in_parts(self, x: torch.Tensor) -> torch.Tensor:
        """The same of x in parts that are to be added up, float32 ``[P, T, N]``."""
        return linear_parts(self._activate(x, None), self.down)

    def _activate(self, x: torch.Tensor, norm: FusedNorm | None) -> torch.Tensor:
        """What the last matmul gets."""
        is_usual = self.activation == "silu" and self.order == "gate_up"
        if is_usual and is_small(len(x), self.gate_up.weight, is_gated=True):
            if norm is not None and not norm.is_plain:
                x, norm = norm.normalize(x), None
            weight, eps = (None, 0.0) if norm is None else (norm.weight, norm.eps)
            return skinny_gated_linear_op(x, self.gate_up.weight, self.gate_up.bias, weight, eps)
        if is_usual and decode_linear_settings(x, self.gate_up.weight, gated=True) is not None:
            x = x if norm is None else norm.normalize(x)
            return decode_gated_linear_op(x, self.gate_up.weight, self.gate_up.bias)
        return gated_activation_op(linear(x, self.gate_up, norm), self.activation, self.order)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """See :meth:`Unit.forward`."""
        if len(args) != 1 or kwargs or args[0].dtype != self.down.weight.dtype:
            return NotImplemented
        x = args[0]
        return self.run(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], -1)


@dataclass(frozen=True, slots=True)
class Rotation:
    """How positions enter queries and keys.

    Attributes:
        is_interleaved: as of ``rotary_write_op``.
        columns: which columns of ``cos [..., R]`` to take: "all", "first" half, "even".
    """

    is_interleaved: bool
    columns: str

    def of(self, table: torch.Tensor) -> torch.Tensor:
        """``[T, half]`` of a table ``[T, R]``."""
        if self.columns == "all":
            return table
        return table[:, : table.shape[1] // 2] if self.columns == "first" else table[:, ::2]


ROTATIONS = (
    Rotation(False, "first"), Rotation(False, "all"), Rotation(True, "first"), Rotation(True, "even"),
    Rotation(True, "all"), None,
)  # fmt: skip
"""Those that models have, the most frequent first; None: none."""


@dataclass(frozen=True, slots=True)
class AttentionOptions:
    """What an attention module hands to attention, as it was seen.

    Attributes:
        index: of its layer in the cache.
        num_q_heads, num_kv_heads, head_dim, v_dim: shapes.
        left, right, softcap, scale: as of ``paged_attention_op``.
        sinks: the parameter with the sinks, or None.
    """

    index: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    v_dim: int
    left: int | None
    right: int | None
    softcap: float | None
    scale: float
    sinks: nn.Parameter | None


class FusedAttention(Unit):
    """One matmul for queries, keys and values; norms, rotation and the write to pages in one kernel; attention; out.

    Args:
        qkv, out: weights.
        rotation: None: positions do not enter.
        norms: of queries and keys, or none: over each head, or over all of them at once, before the rotation.
        names: of the arguments that the module's forward takes, and that may be given.
        inside: the linear layers and norms.
    """

    kind = "attention"

    def __init__(
        self,
        context: FusionContext,
        module: nn.Module,
        qkv: PackedLinears,
        out: PackedLinears,
        options: AttentionOptions,
        rotation: Rotation | None,
        norms: Sequence[FusedNorm],
        names: Sequence[str],
        allowed: frozenset[str],
        inside: Sequence[nn.Module],
    ) -> None:
        super().__init__(context, module, inside)
        self.qkv, self.out, self.options, self.rotation = qkv, out, options, rotation
        pair: Sequence[FusedNorm | None] = norms or (None, None)
        self.q_norm, self.k_norm = pair
        self.names, self.allowed = tuple(names), allowed
        self.packs = [qkv, out]

    def structural_key(self) -> tuple[Any, ...]:
        """See :meth:`Unit.structural_key`."""
        seen = dataclasses.replace(self.options, index=0, sinks=None)
        return *super().structural_key(), seen, self.options.sinks is None, self.rotation

    def takes_residual(self, x: torch.Tensor) -> bool:
        """Whether :meth:`run` of x ``[T, K]`` can add a residual."""
        return is_small(len(x), self.out.weight)

    def gives_parts(self, x: torch.Tensor) -> bool:
        """Whether :meth:`run_in_parts` of x ``[T, K]`` is the better way."""
        return x.dtype == self.out.weight.dtype and num_linear_parts(len(x), self.out.weight) > 0

    def can_run(self, hidden_states: torch.Tensor, kwargs: dict[str, Any]) -> bool:
        """Whether these arguments are of the kind that was proven."""
        if given_cache(kwargs)[1] is not self.context.cache or kwargs.get("attention_mask") is not None:
            return False
        if hidden_states.dtype != self.qkv.weight.dtype or not kwargs.keys() <= self.allowed:
            return False
        if self.rotation is None:
            return True
        cos, sin = kwargs["position_embeddings"]
        return cos.shape == sin.shape and cos.shape[:2] == hidden_states.shape[:2] and cos.ndim == 3

    def run(
        self,
        x: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None,
        norm: FusedNorm | None = None,
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """``[T, K]`` to ``[T, N]``: of ``norm(x)``, and ``residual`` added."""
        return linear(self._attend(x, position_embeddings, norm), self.out, residual=residual)

    def run_in_parts(
        self, x: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor] | None
    ) -> torch.Tensor:
        """The same of x in parts that are to be added up, float32 ``[P, T, N]``."""
        return linear_parts(self._attend(x, position_embeddings, None), self.out)

    def _attend(
        self,
        x: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None,
        norm: FusedNorm | None,
    ) -> torch.Tensor:
        """What the last matmul gets."""
        options, q_norm, k_norm = self.options, self.q_norm, self.k_norm
        widths = (
            options.num_q_heads * options.head_dim, options.num_kv_heads * options.head_dim,
            options.num_kv_heads * options.v_dim,
        )  # fmt: skip
        q, k, v = linear(x, self.qkv, norm).split(widths, -1)
        if q_norm is not None and k_norm is not None and len(q_norm.weight) != options.head_dim:
            q, k = q_norm.normalize(q), k_norm.normalize(k)
            q_norm = k_norm = None
        q = q.view(-1, options.num_q_heads, options.head_dim)
        k = k.view(-1, options.num_kv_heads, options.head_dim)
        v = v.view(-1, options.num_kv_heads, options.v_dim)
        layer = self.context.cache.layers[options.index]
        tables = None
        if self.rotation is not None:
            assert position_embeddings is not None
            cos, sin = (self.rotation.of(table.flatten(0, 1)) for table in position_embeddings)
            tables = cos, sin
        elif q_norm is not None and k_norm is not None:
            q, k = q_norm.normalize(q.contiguous()), k_norm.normalize(k.contiguous())
        q = layer.rotate_and_write(
            q, k, v, tables, self.rotation is not None and self.rotation.is_interleaved,
            None if q_norm is None else q_norm.weight, None if k_norm is None else k_norm.weight,
            0.0 if q_norm is None else q_norm.eps, 0.0 if q_norm is None else q_norm.weight_offset,
            q_norm is not None and q_norm.round_first,
        )  # fmt: skip
        sinks = None if options.sinks is None else options.sinks.reshape(-1)
        return layer.attend(q, options.left, options.right, options.softcap, sinks, options.scale).flatten(1)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """See :meth:`Unit.forward`."""
        kwargs = dict(zip(self.names, args)) | kwargs
        hidden_states = kwargs.pop("hidden_states")
        if not self.can_run(hidden_states, kwargs):
            return NotImplemented
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        out = self.run(x, kwargs.get("position_embeddings"))
        return out.view(*hidden_states.shape[:-1], -1), None


@dataclass(slots=True)
class LayerParts:
    """The parts of a decoder layer.

    Attributes:
        attention, mlp: modules, with their fused forwards where they have some.
        pre_attention, post_attention, pre_mlp, post_mlp: norms; None: there is none.
        handed_on: arguments of the layer that attention gets.
        defaults: of the layer's arguments.
        following: the norm of the next layer, or the model's last one; None: not known.
    """

    attention: nn.Module
    mlp: nn.Module
    pre_attention: FusedNorm | None
    post_attention: FusedNorm | None
    pre_mlp: FusedNorm | None
    post_mlp: FusedNorm | None
    handed_on: tuple[str, ...]
    defaults: dict[str, Any]
    fused_attention: FusedAttention | None = None
    fused_mlp: FusedMlp | None = None
    following: FusedNorm | None = None
    modules: list[nn.Module] = field(default_factory=list)


class FusedLayer(Unit):
    """A decoder layer; see the drawing above.

    Args:
        parts: of it.
        names: of the arguments that the module's forward takes.
        allowed: of those that it was given when it was proven.
        is_in_use: whether the fused forward of one of the parts may be used now.
    """

    kind = "layer"

    def __init__(
        self,
        context: FusionContext,
        module: nn.Module,
        parts: LayerParts,
        names: Sequence[str],
        allowed: frozenset[str],
        is_in_use: Callable[[Unit], bool],
    ) -> None:
        super().__init__(context, module, parts.modules)
        self.parts, self.names, self.allowed, self.is_in_use = parts, tuple(names), allowed, is_in_use

    def structural_key(self) -> tuple[Any, ...]:
        """See :meth:`Unit.structural_key`."""
        parts = (self.parts.fused_attention, self.parts.fused_mlp)
        return *super().structural_key(), [None if part is None else part.structural_key() for part in parts]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """See :meth:`Unit.forward`."""
        parts = self.parts
        kwargs = dict(zip(self.names, args)) | kwargs
        hidden_states = kwargs.pop("hidden_states")
        norms = [parts.pre_attention, parts.post_attention, parts.pre_mlp, parts.post_mlp]
        if not kwargs.keys() <= self.allowed or not all(norm is None or self.is_in_use(norm) for norm in norms):
            return NotImplemented
        arguments = parts.defaults | kwargs
        given = {name: arguments[name] for name in parts.handed_on if name in arguments}
        normed, total = self._attend(hidden_states, given)
        return self._transform(normed, total)

    def _attend(self, h: torch.Tensor, given: dict[str, Any]) -> tuple[torch.Tensor | None, torch.Tensor]:
        """``(pre_mlp norm of t, t)``; None in place of the first: not computed yet."""
        parts, attention = self.parts, self.parts.fused_attention
        rows = h.reshape(-1, h.shape[-1])
        may_run = attention is not None and self.is_in_use(attention) and attention.can_run(h, given)
        if attention is not None and may_run and attention.takes_residual(rows):
            residual = rows if parts.post_attention is None else None
            known = None if parts.pre_attention is None else self.context.take(parts.pre_attention, h)
            x, norm = (rows, parts.pre_attention) if known is None else (known.view_as(rows), None)
            out = attention.run(x, given.get("position_embeddings"), norm, residual).view(h.shape)
            if residual is not None:
                return None, out
        elif attention is not None and may_run and _adds_parts(attention, rows, parts.post_attention, parts.pre_mlp):
            assert parts.pre_mlp is not None
            x = h if parts.pre_attention is None else parts.pre_attention.normalize(h)
            in_parts = attention.run_in_parts(x.reshape(rows.shape), given.get("position_embeddings"))
            return parts.pre_mlp.add_parts(in_parts, h)
        else:
            x = h if parts.pre_attention is None else parts.pre_attention.normalize(h)
            out = parts.attention(hidden_states=x, **given)[0]
        return self._add(out, h, parts.post_attention, parts.pre_mlp)

    def _add(
        self, x: torch.Tensor, residual: torch.Tensor, before: FusedNorm | None, after: FusedNorm | None
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        """``total = before(x) + residual`` and ``after(total)``: ``(after(total), total)``."""
        if before is not None:
            x = before.normalize(x)
        return (None, residual + x) if after is None else after.add(x, residual)

    def _transform(self, normed: torch.Tensor | None, t: torch.Tensor) -> torch.Tensor:
        """The layer's output from t and, if it is known, its norm."""
        parts, mlp = self.parts, self.parts.fused_mlp
        rows = t.reshape(-1, t.shape[-1])
        may_run = mlp is not None and self.is_in_use(mlp)
        following = parts.following
        if following is not None and not self.is_in_use(following):
            following = None
        if normed is None and mlp is not None and may_run and mlp.takes_residual(rows):
            residual = rows if parts.post_mlp is None else None
            out = mlp.run(rows, parts.pre_mlp, residual).view(t.shape)
            if residual is not None:
                return out
            normed, total = self._add(out, t, parts.post_mlp, following)
        else:
            x = normed
            if x is None:
                x = t if parts.pre_mlp is None else parts.pre_mlp.normalize(t)
            if mlp is not None and may_run and _adds_parts(mlp, rows, parts.post_mlp, following):
                assert following is not None
                normed, total = following.add_parts(mlp.run_in_parts(x.reshape(rows.shape)), t)
            else:
                out = parts.mlp(x)
                out = out[0] if isinstance(out, tuple) else out
                normed, total = self._add(out, t, parts.post_mlp, following)
        if following is not None and normed is not None:
            self.context.hand_over(following, total, normed)
        return total


def _adds_parts(
    unit: FusedAttention | FusedMlp, rows: torch.Tensor, before: FusedNorm | None, after: FusedNorm | None
) -> bool:
    """Whether the norm ``after`` should get what ``unit`` makes of ``rows`` in parts, and add them."""
    return before is None and after is not None and unit.gives_parts(rows)


class FusedHead(Unit):
    """The matmul of the logits, for few tokens."""

    kind = "head"

    def __init__(self, context: FusionContext, module: nn.Linear) -> None:
        super().__init__(context, module)
        self.packed = PackedLinears([module])
        self.packs = [self.packed]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """See :meth:`Unit.forward`."""
        if len(args) != 1 or kwargs:
            return NotImplemented
        x = args[0].reshape(-1, args[0].shape[-1])
        if not is_small(len(x), self.packed.weight):
            return NotImplemented
        return linear(x, self.packed).view(*args[0].shape[:-1], -1)
