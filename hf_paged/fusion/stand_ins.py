"""Other forwards for a model's modules, in one thread while it runs the model: other threads run the modules' own.

::

    module.__dict__["forward"] = StandIn(module)      there while any thread has a forward for the module
    StandIn(...)  ->  this thread's forward for the module, or that of the module's class
"""

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

Forwards = Mapping[nn.Module, Callable[..., Any]]


class _Here(threading.local):
    """The forwards of this thread."""

    forwards: Forwards = {}  # noqa: RUF012 (never changed in place)


_HERE = _Here()
_LOCK = threading.Lock()


class StandIn:
    """Stands for ``module.forward``; copies and pickles of the module have the forward of its class.

    Attributes:
        holders: how many threads have a forward for the module; under the lock.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module, self.holders = module, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """This thread's forward."""
        module = self._module
        # Compiled code is shared by all threads.
        forward = None if torch.compiler.is_dynamo_compiling() else _HERE.forwards.get(module)
        return type(module).forward(module, *args, **kwargs) if forward is None else forward(*args, **kwargs)

    def __reduce__(self) -> Any:
        # Unpickled before the module has its state: what is found then is the method of its class.
        return getattr, (self._module, "forward")

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copied = memo.get(id(self._module))
        return self if copied is None else type(copied).forward.__get__(copied)


def has_own_forward(module: nn.Module) -> bool:
    """Whether a module has a forward other than its class's, given to it by other code."""
    forward = module.__dict__.get("forward")
    if forward is None or isinstance(forward, StandIn):
        return False
    # A copy that was made meanwhile has its class's, bound.
    is_its_class = getattr(forward, "__func__", None) is type(module).forward
    return not (is_its_class and forward.__self__ is module)


def runs_another_forward(module: nn.Module) -> bool:
    """Whether a module runs another forward than its class's in this thread."""
    return module in _HERE.forwards or has_own_forward(module)


@contextlib.contextmanager
def standing_in(forwards: Forwards) -> Iterator[None]:
    """Let modules run these forwards in this thread; one that has a forward of its own keeps it."""
    taken: list[tuple[nn.Module, StandIn]] = []
    with _LOCK:
        for module in forwards:
            if not has_own_forward(module) and not isinstance(module.__dict__.get("forward"), StandIn):
                module.__dict__["forward"] = StandIn(module)
            stand_in = module.__dict__["forward"]
            if isinstance(stand_in, StandIn):
                stand_in.holders += 1
                taken.append((module, stand_in))
    before = _HERE.forwards
    _HERE.forwards = {**forwards, **before}
    try:
        yield
    finally:
        _HERE.forwards = before
        with _LOCK:
            for module, stand_in in taken:
                stand_in.holders -= 1
                if not stand_in.holders and module.__dict__.get("forward") is stand_in:
                    del module.__dict__["forward"]
