"""Hooks, modules and forwards that packed rows may not pass through, or not unseen."""

import threading
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from .transformers_internals import is_harmless_hook, origin_of

Hook = TypeVar("Hook", bound=Callable)


def row_wise(hook: Hook) -> Hook:
    """Mark a forward hook, pre-hook or logits processor that may be called with rows of its own choosing by the engine.

    The engine runs the model over packed rows: ``[1, T, ...]``, the tokens of several prompts behind one another, with
    chunks of prompts and single new tokens in one step. A hook is row-wise if what it does to a token depends on the
    vector of that token alone: not on the number of rows or tokens, not on where the token stands, not on the first or
    last one. Other hooks would silently act on wrong tokens, so a patched ``generate()`` leaves calls on a model that
    has one to transformers, and an :class:`Engine` refuses them. A logits processor is row-wise if it may be called
    with one row ``[1, L]`` of a batch.

    May be used as a decorator. Of a bound method, the function is marked, for all objects of the class. ::

        layer.register_forward_hook(hf_paged.row_wise(lambda module, args, output: output + vector))

    Args:
        hook: a function, method, ``functools.partial`` or callable object.

    Returns:
        The same object.

    Raises:
        TypeError: it is not callable, or takes no attributes (a builtin function): wrap it into a function.
    """
    if not callable(hook):
        raise TypeError(f"hook is {hook!r}: a callable is accepted.")
    try:
        setattr(getattr(hook, "__func__", hook), "row_wise", True)  # noqa: B010
    except (AttributeError, TypeError):
        raise TypeError(f"hook is {hook!r}, which takes no attributes: wrap it into a function.") from None
    return hook


def in_this_thread(hook: Callable[..., Any]) -> Callable[..., Any]:
    """A hook of ours for modules that other threads may run meanwhile: it is called in the thread that made it only.

    Every hook that the package registers is one: what it saw, or returned, would be another forward's.
    """
    thread = threading.get_ident()

    def here(module: torch.nn.Module, args: tuple[Any, ...], *others: Any) -> Any:
        # A pre-hook that another thread meets while it is being registered is called without the keyword arguments.
        return hook(module, args, *others) if threading.get_ident() == thread else None

    return here


def is_marked(hook: Callable) -> bool:
    """Whether :func:`row_wise` has marked a hook, or the function inside a ``functools.partial``."""
    return any(getattr(part, "row_wise", False) is True for part in (hook, getattr(hook, "func", None)))


def reason_in_hooks(hooks: list[dict[int, Any]]) -> str | None:
    """Why packed rows must not be computed at present; None: nothing is against it.

    Args:
        hooks: from :func:`~hf_paged.transformers_internals.hooks_of`.
    """
    if not any(hooks):
        return None
    for some in hooks:
        for hook in some.values():
            if not is_marked(hook) and not is_harmless_hook(hook):
                return (
                    f"the forward hook {origin_of(hook)} may depend on the rows and columns of a batch; mark it with "
                    f"hf_paged.row_wise(hook) if it treats every token by itself"
                )
    return None


def active_hooks(hooks: list[dict[int, Any]]) -> list[int]:
    """torch's numbers of a model's hooks, which it gives once only, without those that change nothing."""
    if not any(hooks):
        return []
    return [number for some in hooks for number, hook in some.items() if not is_harmless_hook(hook)]


MIXES_ROWS = ("peft.tuners.lily.",)
"""Modules that average over all tokens of a forward, whatever row they are of."""


def reason_in_modules(model: torch.nn.Module) -> str | None:
    """Why packed rows must not be computed: a module that mixes them. An adapter that is new changes nothing yet, so
    the check that an engine starts with may pass."""
    for name, module in model.named_modules():
        if f"{type(module).__module__}.".startswith(MIXES_ROWS):
            return f"{name}, a {type(module).__name__} of {type(module).__module__}, mixes the rows of a batch"
    return None


MIXING_ADAPTERS = ("POLY", "SHADOW", "XLORA")


def reason_in_adapter(model: torch.nn.Module) -> str | None:
    """Why the model inside a PEFT model does not compute what that does; None: it does, or none is inside."""
    config: Any = getattr(model, "active_peft_config", None)
    if config is None:
        return None
    name = config.peft_type.value
    if config.is_prompt_learning:
        return f"its adapter ({name}) is a soft prompt, which PEFT puts before each input"
    if name in MIXING_ADAPTERS or getattr(config, "alora_invocation_tokens", None):
        return f"its adapter ({name}) depends on the inputs of each call"
    return None


KNOWN_CODE = ("torch.", "transformers.", "peft.", "accelerate.", "hf_paged.")


def foreign_forwards(model: torch.nn.Module) -> frozenset[tuple[int, Any]]:
    """The forwards of a model that are not code of the libraries, with the ids of their modules.

    An engine compares its packed forward with the model's own when it starts; what is put into the model later has not
    been compared.
    """
    found = set()
    for module in model.modules():
        function = getattr(module.forward, "__func__", module.forward)
        if not origin_of(function).startswith(KNOWN_CODE):
            found.add((id(module), function))
    return frozenset(found)
