"""What every module of a model gets and gives in a few steps of the engine, and how it attends."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn

from ..hooks import in_this_thread


class Step(Protocol):
    """A forward of the engine over a few tokens, which can be run again."""

    def run(self) -> Any:
        """Run the model."""

    def enter(self) -> None:
        """Make the cache ready for modules of this step to be called one at a time."""


@dataclass(slots=True)
class Call:
    """A call of a module; tensors are the very ones."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any = None

    @property
    def x(self) -> torch.Tensor | None:
        """The hidden states that it was given: the argument of that name, or the first tensor."""
        given = (*self.args, self.kwargs.get("hidden_states"), *self.kwargs.values())
        return next((x for x in given if isinstance(x, torch.Tensor)), None)

    @property
    def y(self) -> torch.Tensor | None:
        """The tensor that it returned, or the first of several."""
        out = self.output[0] if isinstance(self.output, tuple) and self.output else self.output
        return out if isinstance(out, torch.Tensor) else None


@dataclass(slots=True)
class Attended:
    """A call of attention over pages: the arguments of a cache layer's ``attend``, and what it returned."""

    index: int
    query: torch.Tensor
    left: int | None
    right: int | None
    softcap: float | None
    sinks: torch.Tensor | None
    scale: float
    out: torch.Tensor


@dataclass(slots=True)
class Recording:
    """All of it.

    Attributes:
        steps: in the order in which they ran.
        calls: by module and number of the step, every call.
        attended: likewise, of the innermost module around it.
    """

    steps: Sequence[Step]
    calls: dict[nn.Module, dict[int, list[Call]]] = field(default_factory=dict)
    attended: dict[nn.Module, dict[int, list[Attended]]] = field(default_factory=dict)

    def call(self, module: nn.Module, step: int = 0) -> Call | None:
        """The only call of a module in a step; None: there were none, or several."""
        calls = self.calls.get(module, {}).get(step, [])
        return calls[0] if len(calls) == 1 else None

    def steps_of(self, module: nn.Module) -> list[int] | None:
        """Steps in which a module ran; None: more than once in one of them."""
        by_step = self.calls.get(module, {})
        return sorted(by_step) if by_step and all(len(calls) == 1 for calls in by_step.values()) else None


def record(model: nn.Module, cache: Any, steps: Sequence[Step]) -> Recording:
    """Run the steps, and keep what the modules got and gave."""
    recording = Recording(steps)
    stack: list[tuple[nn.Module, Call]] = []
    number = 0

    # ``number`` is that of the step which the loop below runs.
    @in_this_thread
    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = Call(args, dict(kwargs))
        recording.calls.setdefault(module, {}).setdefault(number, []).append(call)
        stack.append((module, call))

    @in_this_thread
    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        stack.pop()[1].output = output

    def attends(attended: Attended) -> None:
        recording.attended.setdefault(stack[-1][0], {}).setdefault(number, []).append(attended)

    handles = [module.register_forward_pre_hook(before, with_kwargs=True) for module in model.modules()]
    handles += [module.register_forward_hook(after) for module in model.modules()]
    try:
        with watch_attention(cache, attends):
            for number, step in enumerate(steps):  # noqa: B007
                stack.clear()
                step.run()
    finally:
        for handle in handles:
            handle.remove()
    return recording


@contextlib.contextmanager
def watch_attention(
    cache: Any, see: Callable[[Attended], object], instead: torch.Tensor | None = None
) -> Iterator[None]:
    """Hand every call of a cache layer's ``attend`` to ``see``; with ``instead``, that is what the calls return."""
    watched = [layer for layer in cache.layers if hasattr(layer, "attend")]

    def watch(layer: Any) -> Any:
        attend = layer.attend

        def attend_and_tell(query: torch.Tensor, left: Any, right: Any, softcap: Any, sinks: Any, scale: Any) -> Any:
            out = attend(query, left, right, softcap, sinks, scale) if instead is None else instead.clone()
            see(Attended(layer.index, query, left, right, softcap, sinks, scale, out))
            return out

        return attend_and_tell

    for layer in watched:
        layer.attend = watch(layer)
    try:
        yield
    finally:
        for layer in watched:
            del layer.attend
