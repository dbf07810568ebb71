"""Custom ops whose eager calls do not go through torch's dispatcher, which costs more than a small kernel runs."""

import functools
from collections.abc import Callable
from types import NoneType
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.nn import Parameter

from .backend import keeping_no_memory, on_references, recorder

PLAIN = (int, float, bool, str, NoneType)


class EagerOp:
    """A custom op that is called as its function wherever nothing but the function can be meant.

    Whatever traces, records, wraps or transforms calls sees the op: torch.compile and export, fake and meta tensors,
    dispatch and function modes, subclasses, functorch, forward-mode derivatives. So does autograd, but for ops with a
    ``gradient``.

    Attributes:
        op: the custom op, for ``torch.library`` functions.
        function: its implementation, by position and keyword as the op.
        gradient: an autograd function of the same arguments that eager calls take where one needs a gradient.
        mutated: positions of the arguments that the op writes.
    """

    def __init__(self, name: str, function: Callable, mutates_args: tuple[str, ...]) -> None:
        self.op = torch.library.custom_op(name, _with_memory_of_its_own(function), mutates_args=mutates_args)
        self.function = function
        self.gradient: Any = None
        names = function.__code__.co_varnames
        self.mutated = tuple(names.index(x) for x in mutates_args)
        self.register_fake = self.op.register_fake
        self.register_autograd = self.op.register_autograd
        self.__doc__ = function.__doc__

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        """As the op."""
        if torch.compiler.is_compiling():
            return self.op(*arguments, **keywords)
        if recorder() is not None:
            self.function(*arguments, **keywords)  # Its launches are recorded.
            with on_references():
                return self.function(*arguments, **keywords)
        if not is_plain(arguments):
            return self.op(*arguments, **keywords)
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments):
            if self.gradient is None or keywords or _is_below_autograd():
                return self.op(*arguments, **keywords)
            return self.gradient.apply(*arguments)
        if self.mutated:
            torch.autograd.graph.increment_version([x for i in self.mutated if (x := arguments[i]) is not None])
        return self.function(*arguments, **keywords)


def _with_memory_of_its_own(function: Callable) -> Callable:
    """``function`` as compiled code calls it: memory that is made meanwhile may be the compiler's to use again, as that
    of torch.compile's CUDA graphs is, so nothing is kept for later calls."""

    @functools.wraps(function)
    def inner(*arguments: Any, **keywords: Any) -> Any:
        with keeping_no_memory():
            return function(*arguments, **keywords)

    return inner


def eager_op(name: str, mutates_args: tuple[str, ...] = ()) -> Callable[[Callable], EagerOp]:
    """Decorator like ``torch.library.custom_op``. Arguments that are tensors must be passed by position."""
    return lambda function: EagerOp(name, function, mutates_args)


def is_plain(arguments: tuple) -> bool:
    """Whether a call on these arguments can mean nothing but to compute on their memory."""
    c = torch._C
    if (
        c._len_torch_dispatch_stack()
        or c._len_torch_function_stack()
        or c._functorch.peek_interpreter_stack() is not None
        or c._get_tracing_state() is not None
        or getattr(forward_ad, "_current_level", 0) >= 0
    ):
        return False
    for x in arguments:
        kind = type(x)
        if kind is torch.Tensor or kind is Parameter:
            # A tensor may stand for the negative of its memory: the imaginary part of a conjugate.
            if x.is_neg():
                return False
        elif kind is list:
            if not (x and isinstance(x[0], torch.Tensor) and is_plain(tuple(x))):
                return False
        elif kind not in PLAIN:
            return False
    return not arguments[0].is_meta


def computes_now(tensors: tuple) -> bool:
    """Whether launches on these tensors, without an op around them, are all that a call can mean."""
    return (
        not torch.compiler.is_compiling()
        and recorder() is None
        and is_plain(tensors)
        and not (torch.is_grad_enabled() and torch._C._any_requires_grad(*tensors))
    )


def _is_below_autograd() -> bool:
    """Inside of another op's implementation, where autograd has been dealt with."""
    return torch._C._dispatch_tls_is_dispatch_key_excluded(torch._C.DispatchKey.AutogradCPU)
