"""``EngineConfig.compile``: torch.compile for the modules of a model that see neither the cache nor attention.

Norms, MLPs, experts and rotary embeddings are compiled; attention modules and whatever contains one run as they are,
and so do plain linear layers and embeddings, which are one kernel already. Modules of one class share compiled code.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from ...fusion import runs_another_forward, standing_in
from ...hooks import in_this_thread
from ...transformers_internals import any_hooks, has_compiled, hooks_of

ONE_KERNEL = (torch.nn.Linear, torch.nn.Embedding, torch.nn.Dropout, torch.nn.Identity)


class _ForceEager:
    """What callers have compiled runs as it is written while at least one thread is inside. PyTorch has one switch for
    the process, so it is thrown by the first thread that comes and by the last one that leaves."""

    def __init__(self) -> None:
        self._lock, self._depth, self._stance = threading.Lock(), 0, contextlib.ExitStack()

    def __enter__(self) -> None:
        with self._lock:
            if not self._depth:
                self._stance.enter_context(torch.compiler.set_stance("force_eager"))
            self._depth += 1

    def __exit__(self, *error: Any) -> None:
        with self._lock:
            self._depth -= 1
            if not self._depth:
                self._stance.close()


_force_eager = _ForceEager()


def as_written(model: torch.nn.Module) -> contextlib.AbstractContextManager:
    """A context in which a model that its owner has compiled (``model.compile()``, compiled layers or forwards) runs
    without ``torch.compile``: it would trace the engine's bookkeeping at every new size of a step. See
    ``EngineConfig(compile=)`` for what the engine compiles."""
    return _force_eager if has_compiled(model) else contextlib.nullcontext()


class CompiledModules:
    """The compiled forwards of a model's modules, in place only while :meth:`active`.

    Args:
        model: not changed otherwise.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = model
        self._hooks = hooks_of(model)
        self._forwards: dict[torch.nn.Module, Callable[..., Any]] | None = None

    def __len__(self) -> int:
        return len(self._forwards or ())

    def forget(self) -> None:
        """Modules are others than before: the next forward shows again which of them see the cache."""
        self._hooks, self._forwards = hooks_of(self._model), None

    @contextlib.contextmanager
    def active(self, cache: object) -> Iterator[None]:
        """One forward of the model on ``cache``; the first one runs uncompiled and is watched."""
        if any_hooks(self._hooks) or is_in_torch_dispatch_mode():
            # Compiled code would not call hooks of modules inside; under a mode torch gives compilation up for good.
            yield
        elif self._forwards is None:
            see_cache: set[torch.nn.Module] = set()

            @in_this_thread
            def note(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                if any(x is cache for x in (*args, *kwargs.values())):
                    see_cache.add(module)

            handles = [m.register_forward_pre_hook(note, with_kwargs=True) for m in self._model.modules()]
            try:
                yield
            finally:
                for handle in handles:
                    handle.remove()
            self._forwards = {
                module: torch.compile(type(module).forward.__get__(module), dynamic=True)
                for module in _apart(self._model, see_cache)
            }
        else:
            with standing_in(self._forwards):
                yield


def _apart(module: torch.nn.Module, see_cache: set[torch.nn.Module]) -> Iterator[torch.nn.Module]:
    """The largest modules inside ``module`` that do not contain one of ``see_cache``, and are worth compiling."""
    for child in module.children():
        inside = list(child.modules())
        is_whole = not any(inner in see_cache or runs_another_forward(inner) for inner in inside)
        if not is_whole or isinstance(child, (torch.nn.ModuleList, torch.nn.ModuleDict)):
            yield from _apart(child, see_cache)
        elif not isinstance(child, ONE_KERNEL):
            yield child
