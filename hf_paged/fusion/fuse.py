"""A model whose modules run fused while an engine runs its forward, and are themselves at any other time.

What stays as it is: module objects, their classes and attributes, Parameter objects, the state dict, hooks. Fused
forwards stand in for the modules' own in one thread for as long as :meth:`FusedModel.active` lasts, see
:mod:`stand_ins`; nothing else is patched.
What changes: the weights of matmuls that became one lie in one memory, see :mod:`weights`; :meth:`FusedModel.restore`
gives each one of its own again. Where it is not called, they stay there and work as before.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from hf_paged_kernels.backend import has_gluon
from torch import nn
from transformers.utils import logging
from transformers.utils.logging import tqdm

from ..mixed_precision import enables_autocast
from ..transformers_internals import any_hooks, hooks_of, without_autograd
from .forwards import (
    ROTATIONS,
    FusedAttention,
    FusedHead,
    FusedLayer,
    FusedMlp,
    FusedNorm,
    FusionContext,
    Rotation,
    Unit,
    fingerprint,
)
from .patterns import (
    EPS_NAMES,
    AttentionParts,
    PatternMismatch,
    arguments,
    attention_parts,
    layer_parts,
    mlp_parts,
    norm_formula,
)
from .recording import Step, record
from .rotary import FusedRotary, rotary_unit
from .stand_ins import has_own_forward, standing_in
from .verification import Verification, verify_attention, verify_layer, verify_mlp, verify_unit
from .weights import HELD, PackedLinears

logger = logging.get_logger(__name__)


class FusedModel:
    """The fused forwards of a model.

    Args:
        model: whose modules these are.
        context: that all units share.
        units: by their modules, each proven.
        refusals: why modules that look like one are not fused, by their names.
    """

    def __init__(
        self, model: nn.Module, context: FusionContext, units: dict[nn.Module, Unit], refusals: dict[str, str]
    ) -> None:
        self._model, self._context, self._units = model, context, units
        self.refusals = refusals
        self._hooks = hooks_of(model)
        self._in_use: set[Unit] = set()
        for unit in units.values():
            if isinstance(unit, FusedLayer):
                unit.is_in_use = self._in_use.__contains__

    def __len__(self) -> int:
        return len(self._units)

    @property
    def counts(self) -> dict[str, int]:
        """Fused modules by kind: "layer", "attention", "mlp", "norm", "rotary", "head"."""
        counts: dict[str, int] = {}
        for unit in self._units.values():
            counts[unit.kind] = counts.get(unit.kind, 0) + 1
        return counts

    def __repr__(self) -> str:
        found = ", ".join(f"{count} {kind}" for kind, count in self.counts.items()) or "nothing"
        reasons: dict[str, int] = {}
        for reason in self.refusals.values():
            reasons[reason] = reasons.get(reason, 0) + 1
        left = "".join(f"; {count} not: {reason}" for reason, count in reasons.items())
        return f"FusedModel({found}{left})"

    @contextlib.contextmanager
    def active(self, cache: Any) -> Iterator[None]:
        """One forward of the model over ``cache``, in this thread.

        It runs unfused while modules have hooks, which fused forwards would not call, and under autocast. A module that
        has been exchanged or changed runs unfused until it is the one it was.
        """
        device = next(iter(self._model.parameters())).device.type
        has_autocast = torch.is_autocast_enabled(device) or enables_autocast(self._model)
        if any_hooks(self._hooks) or has_autocast or torch.is_grad_enabled():
            yield
            return
        self.refresh()
        self._context.enter(cache)
        try:
            with standing_in({module: unit for module, unit in self._units.items() if unit in self._in_use}):
                yield
        finally:
            self._context.leave()

    def refresh(self) -> None:
        """See which units can be used now; weights that were moved are packed again."""
        self._in_use.clear()
        for unit in self._units.values():
            if unit.is_intact() and all(self._is_packed(packed) for packed in unit.packs):
                self._in_use.add(unit)
        if len(self._in_use) < len(self._units):
            # Modules that have come since may have hooks as well.
            self._hooks = hooks_of(self._model)
            missing = len(self._units) - len(self._in_use)
            logger.info_once(f"{missing} of {len(self._units)} fused modules have changed, and run unfused.")

    def has_stale_tables(self) -> bool:
        """Whether tables are in use that a module would not give any more."""
        return any(isinstance(unit, FusedRotary) and not unit.is_intact() for unit in self._in_use)

    def compare_tables(self) -> None:
        """See by the values of buffers whether modules would still give the tables that are looked up instead."""
        for unit in self._units.values():
            if isinstance(unit, FusedRotary):
                unit.compare()

    def _is_packed(self, packed: PackedLinears) -> bool:
        if packed.is_current():
            return True
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return False
        reason = packed.pack_blocker()
        if reason is not None:
            logger.warning_once(f"modules run unfused since their weights were exchanged: {reason}.")
            return False
        packed.pack()
        return True

    def restore(self) -> None:
        """Give every weight a storage of its own again; nothing is fused any more."""
        for unit in self._units.values():
            for packed in unit.packs:
                packed.unpack()
        self._units.clear()
        self._in_use.clear()


@torch.no_grad()
def fuse_model(
    model: nn.Module, cache: Any, steps: Sequence[Step], quick_steps: Sequence[int], num_positions: int = 0
) -> FusedModel:
    """Find what can be fused, pack its weights, and prove each fused forward against the module's own.

    Args:
        model: as it runs in the engine.
        cache: an engine's cache, in whose pages the steps write.
        steps: a few short ones: prompts, decodes, positions far from the start.
        quick_steps: numbers of those that layers like another one, whose fused forwards all steps have verified, are
            verified with.
        num_positions: that a token can have; 0: not known.
    """
    with without_autograd():
        return _Builder(model, cache, Verification(record(model, cache, steps), quick_steps), num_positions).build()


class _Builder:
    """Goes from the parts to the whole: norms, MLPs and attention, layers."""

    def __init__(self, model: nn.Module, cache: Any, verification: Verification, num_positions: int) -> None:
        self.model, self.cache, self.verification, self.num_positions = model, cache, verification, num_positions
        self.recording = verification.recording
        self.context = FusionContext()
        self.units: dict[nn.Module, Unit] = {}
        self.refusals: dict[str, str] = {}
        self.names = {module: name for name, module in model.named_modules()}
        self.taken: set[int] = set()
        self.rotations: list[Rotation | None] = list(ROTATIONS)
        self.formulas: dict[Any, tuple[float, float, bool]] = {}

    def build(self) -> FusedModel:
        """All of it."""
        modules = [module for module in self.names if self.recording.steps_of(module) is not None]
        attention = set(self.recording.attended)
        norms = [x for x in modules if any(n in x.__dict__ for n in EPS_NAMES) and not any(True for _ in x.children())]
        linears = {module: sum(type(x) is nn.Linear for x in module.children()) for module in modules}
        # One kind after the other: the memory that a layer's weights leave is that of the next layer's matrix.
        found: list[tuple[nn.Module, Callable[[nn.Module], Unit]]] = [(x, self._norm) for x in norms]
        calls = [call for x in attention if (call := self.recording.call(x)) is not None]
        tables = {id(call.kwargs.get("position_embeddings")) for call in calls} - {id(None)}
        found += [(x, self._rotary) for x in modules if id(self._output(x)) in tables]
        found += [(x, self._mlp) for x in modules if x not in attention and linears[x] in (2, 3)]
        found += [(x, self._attention) for x in modules if x in attention]
        # Seconds, unless kernels are compiled for the first time.
        for module, make in tqdm(found, desc="fusing modules", delay=2.0, leave=False):
            self._try(module, make)
        self._head()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        for module in modules:
            if any(child in attention for child in module.children()):
                self._try(module, self._layer)
        self._connect()
        return FusedModel(self.model, self.context, self.units, self.refusals)

    def _try(self, module: nn.Module, make: Callable[[nn.Module], Unit]) -> None:
        try:
            self.units[module] = make(module)
        except PatternMismatch as reason:
            self.refusals[self.names[module]] = str(reason)
        except Exception as error:
            # Modules of any kind come by here: one that surprises runs as it is.
            self.refusals[self.names[module]] = f"{type(error).__name__}: {error}"[:300]

    def _norm(self, module: nn.Module) -> Unit:
        # A model has a hundred, of two or three kinds: the forward is that of the class.
        weight = dict(module.named_parameters()).get("weight")
        kind = fingerprint(module), None if weight is None else (weight.dtype, weight.shape, weight.device)
        if kind not in self.formulas:
            self.formulas[kind] = norm_formula(module)
        unit = FusedNorm(self.context, module, *self.formulas[kind])
        _refuse_if(verify_unit(unit, self.verification))
        return unit

    def _output(self, module: nn.Module) -> Any:
        call = self.recording.call(module)
        return None if call is None else call.output

    def _rotary(self, module: nn.Module) -> Unit:
        return rotary_unit(self.context, module, self.recording, self.num_positions)

    def _mlp(self, module: nn.Module) -> Unit:
        parts = mlp_parts(module, self.recording)
        with self._packed(parts.gate_up, [parts.down]) as (gate_up, down):
            unit = FusedMlp(self.context, module, gate_up, down, parts.activation, parts.order, parts.inside)
            _refuse_if(verify_mlp(unit, self.verification))
            return unit

    def _attention(self, module: nn.Module) -> Unit:
        parts = attention_parts(module, self.recording, self.cache)
        with self._packed(parts.qkv, [parts.out]) as (qkv, out):
            reasons = []
            for rotation in list(self.rotations):
                unit = self._attend(module, parts, qkv, out, rotation)
                reason = None if unit is None else verify_attention(unit, self.verification, self.cache)
                if unit is not None and reason is None:
                    # Tried first for the next layer.
                    self.rotations.remove(rotation)
                    self.rotations.insert(0, rotation)
                    return unit
                reasons += [] if reason is None else [reason]
            raise PatternMismatch(f"positions enter in no known way: {reasons[0] if reasons else 'no table fits'}")

    def _attend(
        self,
        module: nn.Module,
        parts: AttentionParts,
        qkv: PackedLinears,
        out: PackedLinears,
        rotation: Rotation | None,
    ) -> FusedAttention | None:
        """With this rotation; None: the tables do not fit it."""
        norms = [unit for unit in map(self.units.get, parts.norms) if isinstance(unit, FusedNorm)]
        if len(norms) != len(parts.norms):
            raise PatternMismatch("its norms are of no known kind")
        if norms:
            kinds = [(norm.eps, norm.weight_offset, norm.round_first) for norm in norms]
            options = parts.options
            widths = [len(norm.weight) for norm in norms]
            whole = [heads * options.head_dim for heads in (options.num_q_heads, options.num_kv_heads)]
            if kinds[0] != kinds[1] or widths not in ([options.head_dim] * 2, whole):
                raise PatternMismatch("the norms of queries and keys are not alike")
        if rotation is not None and not self._fits(rotation, module, parts):
            return None
        return FusedAttention(
            self.context, module, qkv, out, parts.options, rotation, norms, parts.names, parts.allowed,
            parts.inside,
        )  # fmt: skip

    def _fits(self, rotation: Rotation, module: nn.Module, parts: AttentionParts) -> bool:
        call = self.recording.call(module)
        assert call is not None
        tables = (dict(zip(parts.names, call.args)) | call.kwargs).get("position_embeddings")
        if not isinstance(tables, tuple) or len(tables) != 2 or tables[0].ndim != 3:
            return False
        return 0 < 2 * rotation.of(tables[0][0]).shape[1] <= parts.options.head_dim

    def _layer(self, module: nn.Module) -> Unit:
        norms = {module: unit for module, unit in self.units.items() if isinstance(unit, FusedNorm)}
        parts = layer_parts(module, self.recording, norms)
        attention, mlp = self.units.get(parts.attention), self.units.get(parts.mlp)
        parts.fused_attention = attention if isinstance(attention, FusedAttention) else None
        parts.fused_mlp = mlp if isinstance(mlp, FusedMlp) else None
        unit = FusedLayer(self.context, module, parts, *arguments(module, self.recording), lambda unit: True)
        _refuse_if(verify_layer(unit, self.verification, self.cache))
        return unit

    def _connect(self) -> None:
        """Let each layer compute the norm that its output gets next."""
        norms = {}
        for unit in self.units.values():
            call = self.recording.call(unit.module)
            if isinstance(unit, FusedNorm) and call is not None:
                norms[id(call.x)] = unit
        for unit in self.units.values():
            call = self.recording.call(unit.module)
            if isinstance(unit, FusedLayer) and call is not None:
                unit.parts.following = norms.get(id(call.y))

    def _head(self) -> None:
        """The logits' matmul has a kernel for few tokens on some GPUs only."""
        head = self.model.get_output_embeddings() if hasattr(self.model, "get_output_embeddings") else None
        if not isinstance(head, nn.Linear) or type(head) is not nn.Linear or has_own_forward(head):
            return
        if self.recording.steps_of(head) is None:
            return
        if has_gluon(head.weight.device) and PackedLinears([head]).pack_blocker() is None:
            unit = FusedHead(self.context, head)
            unit.packed.pack()
            reason = verify_unit(unit, self.verification)
            if reason is None:
                self.units[head] = unit
            else:
                self.refusals[self.names[head]] = reason

    @contextlib.contextmanager
    def _packed(self, *groups: list[nn.Linear]) -> Iterator[list[PackedLinears]]:
        """Pack each group; whatever is raised takes it back.

        Raises:
            PatternMismatch: they cannot be packed, or belong to another unit already.
        """
        packs = [PackedLinears(group) for group in groups]
        parameters = {id(p) for group in groups for layer in group for p in layer.parameters()}
        if parameters & self.taken:
            raise PatternMismatch("its weights belong to another fused module too")
        for packed in packs:
            reason = packed.pack_blocker()
            if reason == HELD:
                logger.warning_once(f"modules run unfused: {reason}.")
            _refuse_if(reason)
        try:
            for packed in packs:
                packed.pack()
            yield packs
        except BaseException:
            for packed in packs:
                packed.unpack()
            raise
        self.taken |= parameters


def _refuse_if(reason: str | None) -> None:
    if reason is not None:
        raise PatternMismatch(reason)
