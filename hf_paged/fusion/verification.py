"""Fused against unfused, on the arguments that a module got in the recorded steps, in the model's own dtype.

A fused forward rounds in other places, so its results differ by roundings. A wrong formula must differ by more:
modules are also called with inputs :data:`SCALE_UP` times as large, where a limit on values would show, and recorded
steps have positions far from the start, where a factor that grows with the position would.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..hooks import in_this_thread
from ..transformers_internals import given_cache
from .forwards import FusedAttention, FusedLayer, FusedMlp, FusionContext, Unit
from .recording import Attended, Call, Recording, watch_attention

TOLERANCES = {torch.float32: 1e-4, torch.float64: 1e-4, torch.float16: 5e-3, torch.bfloat16: 4e-2}
"""Differences, relative to the size of the unfused result, that roundings explain: ten roundings in half precision."""
SCALE_UP = 32.0
"""A power of two: the inputs have the same bits."""
FEW_LOUD = 2
"""Steps of a module that are also run loudly."""


def relative(got: torch.Tensor, wanted: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """Difference relative to ``wanted``, a scalar on its device; inf where shapes or dtypes are others.

    0 where loud inputs were too much for the dtype, for the module itself.
    """
    if got.shape != wanted.shape or got.dtype != wanted.dtype:
        return torch.full((), float("inf"), device=wanted.device)
    difference = torch.linalg.vector_norm(got.double() - wanted.double())
    difference = difference / torch.linalg.vector_norm(wanted.double()).clamp(min=1e-30)
    return difference if scale == 1 else torch.where(torch.isfinite(wanted).all(), difference, 0.0)


@dataclass(slots=True)
class Verification:
    """What the units of a model are proven with.

    Attributes:
        recording: of the model.
        quick_steps: numbers of steps that suffice for a unit like one that all steps have proven.
        proven: what units were like that all steps have proven.
    """

    recording: Recording
    quick_steps: Sequence[int]
    verified: list[tuple[Any, ...]] = field(default_factory=list)


def verify_mlp(unit: FusedMlp, verification: Verification) -> str | None:
    """What speaks against a fused MLP; None: nothing does."""
    return _prove(unit, verification, lambda call, step, scale: _compare_calls(unit, call, scale), FEW_LOUD)


def verify_attention(unit: FusedAttention, verification: Verification, cache: Any) -> str | None:
    """The same for attention: queries, keys and values in the pages, and the output.

    Attention itself is the same call. The module's own forward goes on from what it gave the fused one: where scores
    are large, the last bit of a query decides which key it sees.
    """

    def compare(call: Call, step: int, scale: float) -> Iterable[torch.Tensor]:
        verification.recording.steps[step].enter()
        layer = cache.layers[unit.options.index]
        got, attended = _attend(unit.forward, layer, cache, call, scale)
        wanted, _ = _attend(_own_forward(unit.module), layer, cache, call, scale, attended)
        yield from (relative(a, b, scale) for a, b in zip(got, wanted))

    return _prove(unit, verification, compare, FEW_LOUD)


def verify_layer(unit: FusedLayer, verification: Verification, cache: Any) -> str | None:
    """The same for a decoder layer: what it adds to its input, and what the MLP gets.

    The layer's own forward goes on from what attention, and an MLP that is not fused, gave the fused one: the last bit
    of their inputs may decide which key a query sees, or which expert a token gets.
    """
    mlp = unit.parts.mlp if unit.parts.fused_mlp is None else None

    def compare(call: Call, step: int, scale: float) -> Iterable[torch.Tensor]:
        verification.recording.steps[step].enter()
        attended: list[Attended] = []
        with watch_attention(cache, attended.append), _watch(mlp) as transformed:
            got = unit.forward(*call.args, **call.kwargs)
        if got is NotImplemented or len(attended) != 1:
            raise ValueError("it is called in more than one way")
        instead = transformed[0].output if mlp is not None else None
        with watch_attention(cache, attended.append, attended[0].out), _watch(mlp, instead) as own:
            wanted = _own_forward(unit.module)(*call.args, **call.kwargs)
        yield from (relative(a.args[0], b.args[0]) for a, b in zip(transformed, own))
        x = call.x
        assert x is not None
        # Rounding the sum is a part of the difference, however little is added.
        size = torch.linalg.vector_norm((wanted - x).double())
        rounding = torch.finfo(x.dtype).eps * torch.linalg.vector_norm(wanted.double())
        yield torch.linalg.vector_norm((got - wanted).double()) / (size + rounding / TOLERANCES[x.dtype])

    return _prove(unit, verification, compare, 0)


@contextlib.contextmanager
def _watch(module: nn.Module | None, instead: Any = None) -> Iterator[list[Call]]:
    """The calls of a module in this thread, None: of none; ``instead`` is what they return then."""
    calls: list[Call] = []

    @in_this_thread
    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        calls.append(Call(args, {}, output))
        return instead

    handle = None if module is None else module.register_forward_hook(hook)
    try:
        yield calls
    finally:
        if handle is not None:
            handle.remove()


def verify_unit(unit: Unit, verification: Verification) -> str | None:
    """The same for a module of one tensor."""
    return _prove(unit, verification, lambda call, step, scale: _compare_calls(unit, call, scale), 1)


def _prove(
    unit: Unit,
    verification: Verification,
    compare: Callable[[Call, int, float], Iterable[torch.Tensor]],
    num_scaled: int,
) -> str | None:
    differences: list[torch.Tensor] = []
    tolerance = TOLERANCES[next(unit.module.parameters()).dtype]
    context: FusionContext = unit.context
    recording, structural_key = verification.recording, unit.structural_key()
    steps = recording.steps_of(unit.module) or []
    if structural_key in verification.verified:
        # Its weights are its own, the code is not.
        steps, num_scaled = [step for step in steps if step in verification.quick_steps] or steps, min(num_scaled, 1)
    try:
        for number, step in enumerate(steps):
            call = recording.call(unit.module, step)
            assert call is not None
            for scale in (1.0, SCALE_UP) if number < num_scaled else (1.0,):
                context.leave()
                context.enter(_cache_of(call))
                differences += compare(call, step, scale)
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:300]
    finally:
        context.leave()
    if not differences:
        return "it did not run"
    worst = float(torch.stack([x.float() for x in differences]).max())
    # NaN is no proof.
    if not worst <= tolerance:
        return f"results differ by {worst:.2g} of their size"
    if structural_key not in verification.verified:
        verification.verified.append(structural_key)
    return None


def _own_forward(module: nn.Module) -> Callable[..., Any]:
    return lambda *args, **kwargs: type(module).forward(module, *args, **kwargs)


def _cache_of(call: Call) -> Any:
    return given_cache(call.kwargs)[1]


def _louder(call: Call, factor: float) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments with the first tensor ``factor`` times as large."""
    x = call.x
    if x is None or factor == 1:
        return call.args, call.kwargs
    louder = x * factor
    args = tuple(louder if a is x else a for a in call.args)
    return args, {name: louder if a is x else a for name, a in call.kwargs.items()}


def _compare_calls(unit: Unit, call: Call, scale: float) -> Iterable[torch.Tensor]:
    args, kwargs = _louder(call, scale)
    wanted, got = _own_forward(unit.module)(*args, **kwargs), unit.forward(*args, **kwargs)
    if got is NotImplemented:
        return
    yield relative(got, wanted, scale)


def _attend(
    forward: Callable[..., Any], layer: Any, cache: Any, call: Call, scale: float, instead: torch.Tensor | None = None
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Output, queries, and the keys and values that are in the pages afterwards, where nothing was before.

    And what attention returned: ``instead``, if it is given.
    """
    seen: list[Attended] = []
    pages, mapping = layer.group.layers[layer.index], cache.step.groups[layer.number].slot_mapping
    page_size = pages.k.shape[2]
    page, offset = mapping // page_size, mapping % page_size
    for stored in (pages.k, pages.v):
        stored[page, :, offset] = 0
    args, kwargs = _louder(call, scale)
    with watch_attention(cache, seen.append, instead):
        result = forward(*args, **kwargs)
    if result is NotImplemented or len(seen) != 1 or not isinstance(result, tuple) or result[1:] != (None,):
        raise ValueError("it is called in more than one way, or returns more than its output")
    return [result[0], seen[0].query, pages.k[page, :, offset], pages.v[page, :, offset]], seen[0].out
