"""Cosines and sines of positions, looked up instead of computed: two gathers for a dozen small kernels a step.

The tables hold what the module's own forward gives for every position that a request can have, so results are the same
bit for bit.
"""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..transformers_internals import tensor_version
from .forwards import FusionContext, Unit
from .patterns import PatternMismatch
from .recording import Call, Recording
from .stand_ins import has_own_forward

CHUNK = 8192
"""Positions that are computed at once."""
MOST_BYTES = 128 * 2**20
"""Of both tables together."""


class FusedRotary(Unit):
    """A module that gives ``(cos, sin)``, each ``[B, T, dim]``, for hidden states and positions ``[B, T]``.

    Args:
        context, module: as of :class:`Unit`.
        cos, sin: ``[positions, dim]``.
    """

    kind = "rotary"

    def __init__(self, context: FusionContext, module: nn.Module, cos: torch.Tensor, sin: torch.Tensor) -> None:
        super().__init__(context, module)
        self.cos, self.sin = cos, sin
        self._buffers = state_of(module)
        self._values = [buffer.clone() for buffer in module.buffers()]
        self._is_exact = True

    def is_intact(self) -> bool:
        """As of :class:`Unit`; its buffers count too."""
        return self._is_exact and super().is_intact() and state_of(self.module) == self._buffers

    def compare(self) -> None:
        """See whether its buffers have the values that the tables were made with: some changes leave no trace."""
        now = list(self.module.buffers())
        self._is_exact = len(now) == len(self._values) and all(
            a.shape == b.shape and a.device == b.device and torch.equal(a, b) for a, b in zip(now, self._values)
        )

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As of :class:`Unit`."""
        given = arguments_of(args, kwargs)
        if given is None or given[0].dtype != self.cos.dtype or given[1].device != self.cos.device:
            return NotImplemented
        # Slots without tokens have a position before the first one.
        positions = given[1].clamp(0, len(self.cos) - 1)
        return F.embedding(positions, self.cos), F.embedding(positions, self.sin)


def arguments_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Hidden states and positions ``[B, T]``; None: there are others."""
    given = (*args, *kwargs.values())
    is_kind = len(given) == 2 and not set(kwargs) - {"x", "position_ids"} and all(torch.is_tensor(x) for x in given)
    if not is_kind or given[1].ndim != 2 or given[1].dtype != torch.int64 or not given[0].is_floating_point():
        return None
    return given


def state_of(module: nn.Module) -> list[tuple[int, int]]:
    """Equal as long as buffers are the same: addresses and versions."""
    return [(id(buffer), tensor_version(buffer)) for buffer in module.buffers()]


def rotary_unit(context: FusionContext, module: nn.Module, recording: Recording, num_positions: int) -> FusedRotary:
    """The unit of a module, with tables of ``num_positions``.

    Raises:
        PatternMismatch: it gives something else, or what it gives depends on more than the position.
    """
    steps = recording.steps_of(module) or []
    calls = [call for step in steps if (call := recording.call(module, step)) is not None]
    given = [pair for call in calls if (pair := arguments_of(call.args, call.kwargs)) and _gives_tables(call, pair[1])]
    if not calls or len(given) < len(calls):
        raise PatternMismatch("it does not give cosines and sines of positions")
    if any(True for _ in module.parameters()) or has_own_forward(module):
        raise PatternMismatch("it has parameters, or a forward of its own")
    x, positions = given[0]
    first = calls[0].output[0]
    if num_positions < 1 or 2 * num_positions * first.shape[-1] * first.element_size() > MOST_BYTES:
        raise PatternMismatch("its tables would be too large")
    # Some kinds change with the longest position that they have seen: the module itself shall see none of these.
    twin = copy.deepcopy(module)

    def compute(start: int) -> tuple[torch.Tensor, torch.Tensor]:
        ids = torch.arange(start, min(start + CHUNK, num_positions), device=positions.device)[None]
        return type(twin).forward(twin, x, ids)

    chunks = [compute(start) for start in range(0, num_positions, CHUNK)]
    unit = FusedRotary(context, module, *(torch.cat([chunk[i][0] for chunk in chunks]) for i in range(2)))
    is_same = all(torch.equal(a, b) for a, b in zip(compute(0), chunks[0]))
    for call in calls:
        got = unit.forward(*call.args, **call.kwargs)
        is_same &= got is not NotImplemented and all(torch.equal(a, b) for a, b in zip(got, call.output))
    if not is_same:
        raise PatternMismatch("what it gives depends on more than the position")
    return unit


def _gives_tables(call: Call, positions: torch.Tensor) -> bool:
    out = call.output
    if not isinstance(out, tuple) or len(out) != 2 or not all(torch.is_tensor(x) for x in out):
        return False
    return all(x.ndim == 3 and x.shape[:2] == positions.shape and x.shape == out[0].shape for x in out)
