"""Kernel launches that cost the host a few microseconds.

``kernel[grid](...)`` binds its arguments anew in every launch: it inspects each one, builds a key as text, looks up the
compiled kernel, and checks and encodes tensor descriptors in Python. ``launch`` keeps the compiled kernel under a key
that is at least as fine as what Triton specialises on, and hands pointers and numbers to Triton's C launcher::

    first call of a key     kernel[grid](...)    compiles the kernel, or finds it
    later calls             C launcher

Whatever it does not know goes through ``kernel[grid](...)`` every time: the interpreter, other backends than CUDA,
kernels that need scratch memory, hooks on launches, debug and instrumentation switches.

All private names of Triton are in this file.
"""

import ast
import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
import triton
from packaging.version import Version
from torch.nn import Parameter
from triton import knobs
from triton.runtime import driver
from triton.runtime.jit import JITCallable, JITFunction

from .backend import keeps_no_memory, recorder

MAX_KEYS = 10_000
"""Keys that are kept. There are few for each compilation: a key says more of the strides only."""
MAX_DESCRIPTORS = 1024
"""Descriptors that a launch keeps for an argument, 128 bytes each: an allocator's memory is at few addresses."""


class Tile(NamedTuple):
    """A tensor that a kernel reads through a descriptor (TMA), by tiles.

    Attributes:
        base: the tensor; its memory and its strides are multiples of 16 bytes.
        shape: of the whole, in elements.
        strides: in elements, the last one 1.
        block: of a tile.
        layout: of a tile in shared memory, for Gluon kernels: one object for all launches. None for Triton kernels.
    """

    base: torch.Tensor
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    block: tuple[int, ...]
    layout: Any = None

    def descriptor(self) -> Any:
        """As an object of Triton's own class, which checks it."""
        arguments = (self.base, list(self.shape), list(self.strides), list(self.block))
        if self.layout is None:
            from triton.tools.tensor_descriptor import TensorDescriptor

            return TensorDescriptor(*arguments)
        from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonTensorDescriptor

        return GluonTensorDescriptor(*arguments, self.layout)


@dataclass(frozen=True, slots=True)
class Bound:
    """A compiled kernel, ready for the C launcher.

    Attributes:
        start: the C launcher.
        options: its arguments after the stream and before the kernel's.
        rest: the kernel's arguments after those of a call: constants, which the launcher skips.
        in_tuple: the kernel's arguments are passed as one (Triton 3.7 and newer).
        encode: makes a descriptor of a pointer and an :meth:`encoding`.
        kinds: the driver's numbers of element types by the compiler's.
        metas: what the compiler says of each tile.
        kept: what the key holds the addresses of.
    """

    start: Callable
    options: tuple
    rest: tuple
    in_tuple: bool
    encode: Callable
    kinds: dict[int, int]
    metas: tuple
    kept: tuple

    def encoding(self, tile: Tile, meta: dict[str, Any]) -> tuple:
        """Arguments of ``encode`` after the pointer; what is read outside of a tensor is 0."""
        kind = self.kinds[meta["elem_type"]]
        return meta["swizzle"], meta["elem_size"], kind, meta["block_size"], tile.shape, tile.strides, 0


class Descriptors(dict):
    """Descriptors by the pointer: they say where memory is and how it is read, not what it holds."""

    def __init__(self, encode: Callable, encoding: tuple) -> None:
        self.encode, self.encoding = encode, encoding

    def __missing__(self, pointer: int) -> Any:
        """Made the first time."""
        if len(self) >= MAX_DESCRIPTORS:
            self.clear()
        made = self[pointer] = self.encode(pointer, *self.encoding)
        return made


_bound: dict[tuple, Bound | None] = {}
_UNKNOWN: Any = object()


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> Bound | None:
    """``kernel[grid](*arguments, **constants)`` on the current device and stream.

    Args:
        kernel: of ``triton.jit`` or ``gluon.jit``.
        grid: one to three numbers of programs.
        arguments: tensors, :class:`Tile`, None, numbers and tuples of ints: the kernel's parameters before its
            constexpr ones, in order.
        constants: the constexpr ones, and options such as ``num_warps``.

    Returns:
        What such launches need, None where they go through Triton.
    """
    if not isinstance(kernel, JITFunction) or is_watched(kernel):
        _launch_by_triton(kernel, grid, arguments, constants)
        return None
    # id(): the hash of a kernel takes a lock. ``Bound.kept`` keeps the address from being used again.
    key: list = [id(kernel), driver.active.get_current_device()]
    for argument, parameter in zip(arguments, kernel.params):
        kind = type(argument)
        if kind is int:
            key.append(int_key(argument, parameter.do_not_specialize))
        elif argument is None or kind is float:
            key.append(kind)
        elif kind is torch.Tensor or kind is Parameter:
            key += (argument.dtype, argument.data_ptr() & 15)
        elif kind is Tile:
            base = argument.base
            key += (base.dtype, base.data_ptr() & 15, len(argument.shape), argument.block, id(argument.layout))
        elif kind is tuple:
            key += (*argument, *map(type, argument))
        else:
            _launch_by_triton(kernel, grid, arguments, constants)
            return None
    found = (*key, *constants, *constants.values())
    bound = _bound.get(found, _UNKNOWN)
    if bound is None or bound is _UNKNOWN:
        compiled = _launch_by_triton(kernel, grid, arguments, constants, found)
        if compiled is None:
            return None
        if bound is _UNKNOWN:
            if len(_bound) >= MAX_KEYS:
                _bound.clear()
            bound = _bound[found] = _bind(kernel, compiled, arguments, constants)
        return bound
    passed: list = []
    metas = iter(bound.metas)
    for argument in arguments:
        kind = type(argument)
        if kind is torch.Tensor or kind is Parameter:
            passed.append(argument.data_ptr())
        elif kind is Tile:
            passed.append(bound.encode(argument.base.data_ptr(), *bound.encoding(argument, next(metas))))
            passed += (*argument.shape, *argument.strides)
        else:
            passed.append(argument)
    _start(bound, grid, driver.active.get_current_stream(key[1]), [*passed, *bound.rest])
    return bound


def _start(bound: Bound, grid: tuple[int, ...], stream: int, passed: list) -> None:
    if recorder() is not None:
        return
    x, y, z = grid if len(grid) == 3 else (*grid, 1, 1)[:3]
    if bound.in_tuple:
        bound.start(x, y, z, stream, *bound.options, passed)
    else:
        bound.start(x, y, z, stream, *bound.options, *passed)


class Part(NamedTuple):
    """The memory of a contiguous tensor from one element on, as an argument of a :class:`Launch`."""

    base: torch.Tensor
    first: int


class Launch:
    """A launch of which only the memory differs from call to call: about as fast as Python can start a kernel.

    Args:
        As of :func:`launch`. Tensors and tiles stand for those of later calls, of the same shapes, strides, dtypes and
        device; None stays None.
    """

    __slots__ = ("arguments", "constants", "device", "grid", "is_compiled", "kernel", "ready")

    def __init__(self, kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        self.kernel, self.grid, self.constants = kernel, (*grid, 1, 1)[:3], constants
        self.arguments = [_without_memory(x) for x in arguments]
        self.is_compiled = isinstance(kernel, JITFunction)
        self.device: int | None = None
        self.ready: dict[Any, tuple[Bound, list, list]] = {}

    def __call__(self, *tensors: torch.Tensor | None) -> None:
        """Launch on ``tensors``, those of the arguments in their order; None among them is passed over."""
        if not self.is_compiled:
            self._bind(None, tensors)
            return
        pointers = [x.data_ptr() for x in tensors if x is not None]
        low = 0
        for pointer in pointers:
            low |= pointer
        key = tuple([pointer & 15 for pointer in pointers]) if low & 15 else None
        found = self.ready.get(key)
        if found is None or is_watched(self.kernel):
            self._bind(key, tensors)
            return
        bound, template, slots = found
        passed = template.copy()
        for pointer, (place, offset, descriptors) in zip(pointers, slots):
            passed[place] = pointer + offset if descriptors is None else descriptors[pointer]
        _start(bound, self.grid, driver.active.get_current_stream(self.device), passed)

    def with_memory(self, *tensors: Any) -> "OpenLaunch | None":
        """The launch on ``tensors``, as of a call, where :data:`OPEN` stands for memory that each launch brings.

        None where that is not known to be the compiled kernel of an earlier call: call the launch itself.
        """
        found = self.ready.get(None)
        if found is None or is_watched(self.kernel):
            return None
        bound, template, slots = found
        filled, places = template.copy(), []
        for x, (place, offset, descriptors) in zip([x for x in tensors if x is not None], slots):
            if x is OPEN:
                places.append((place, offset, descriptors))
                continue
            pointer = x.data_ptr()
            if pointer & 15:
                return None
            filled[place] = pointer + offset if descriptors is None else descriptors[pointer]
        return OpenLaunch(bound, self.grid, filled, places)

    def _bind(self, key: Any, tensors: tuple[torch.Tensor | None, ...]) -> None:
        given = iter([x for x in tensors if x is not None])
        arguments = [_with_memory(x, given) for x in self.arguments]
        bound = launch(self.kernel, self.grid, *arguments, **self.constants)
        if bound is None:
            return
        template: list = []
        slots: list = []
        metas = iter(bound.metas)
        for known, x in zip(self.arguments, arguments):
            if isinstance(x, Tile):
                slots.append((len(template), 0, Descriptors(bound.encode, bound.encoding(x, next(metas)))))
                template += (None, *x.shape, *x.strides)
                continue
            if isinstance(x, torch.Tensor):
                offset = known.first * x.element_size() if isinstance(known, Part) else 0
                slots.append((len(template), offset, None))
                x = None
            template.append(x)
        template += bound.rest
        self.device = driver.active.get_current_device()
        self.ready[key] = bound, template, slots


OPEN: Any = object()
"""In place of a tensor: its address comes with each launch, see :meth:`Launch.with_memory`."""


class OpenLaunch(NamedTuple):
    """A launch of which most memory is known: see :meth:`Launch.with_memory`."""

    bound: Bound
    grid: tuple[int, ...]
    template: list
    places: list

    def start(self, stream: int, *pointers: int) -> None:
        """Launch with the memory left open, multiples of 16, on a stream of the current device."""
        passed = self.template.copy()
        for pointer, (place, offset, descriptors) in zip(pointers, self.places):
            passed[place] = pointer + offset if descriptors is None else descriptors[pointer]
        _start(self.bound, self.grid, stream, passed)


def current_stream() -> int:
    """That of the current device, for :meth:`OpenLaunch.start`."""
    return driver.active.get_current_stream(driver.active.get_current_device())


class Places:
    """Where the memory of a :class:`Series` stands, by names.

    Args:
        given: names of the tensors of a call, without those that are None.
        made: names of what a call adds, with spaces between.
    """

    def __init__(self, given: list[str], made: str) -> None:
        self.places = {name: i for i, name in enumerate([*given, *made.split()])}

    def __call__(self, names: str) -> tuple[int, ...]:
        """Places of ``names``, with spaces between; those that are None are left out."""
        return tuple(self.places[name] for name in names.split() if name in self.places)


class Series:
    """Launches one after the other, of which only the memory differs from call to call: each address is read once.

    Args:
        launches: each with the places of its tensors, by the order of its arguments, in the memory of a call.
    """

    __slots__ = ("launches", "opened")

    def __init__(self, *launches: tuple[Launch, tuple[int, ...]]) -> None:
        self.launches = launches
        self.opened: list[tuple[OpenLaunch, tuple[int, ...]]] | None = None

    def start(self, pointers: list[int]) -> bool:
        """Launch on memory at these addresses.

        False, and nothing is done, where that takes tensors: see :meth:`start_on`.
        """
        low = 0
        for pointer in pointers:
            low |= pointer
        if self.opened is None or low & 15 or any(is_watched(x.kernel) for x, _ in self.launches):
            return False
        stream = driver.active.get_current_stream(self.launches[0][0].device)
        for opened, places in self.opened:
            opened.start(stream, *[pointers[i] for i in places])
        return True

    def start_on(self, tensors: Sequence[torch.Tensor]) -> None:
        """Launch on these tensors, and know their launches by address from now on."""
        for launch, places in self.launches:
            launch(*[tensors[i] for i in places])
        opened = [(launch.with_memory(*[OPEN for _ in places]), places) for launch, places in self.launches]
        known = [(launch, places) for launch, places in opened if launch is not None]
        if len(known) == len(opened):
            self.opened = known


_MEMORY: Any = object()


def _without_memory(argument: Any) -> Any:
    if isinstance(argument, Tile | Part):
        return argument._replace(base=_MEMORY)
    return _MEMORY if isinstance(argument, torch.Tensor) else argument


def _with_memory(argument: Any, tensors: Iterator[torch.Tensor]) -> Any:
    if isinstance(argument, Tile):
        return argument._replace(base=next(tensors))
    if isinstance(argument, Part):
        return next(tensors)[argument.first :]
    return next(tensors) if argument is _MEMORY else argument


class Launches(dict):
    """Launches by all that decides them; bounded, since lengths may differ in every call."""

    def keep(self, key: tuple, value: Any) -> Any:
        """Note ``value`` under ``key``, and give it back."""
        if len(self) >= 1024:
            self.clear()
        self[key] = value
        return value


COUNTERS = 256
_counters: dict[tuple, list[torch.Tensor]] = {}


def new_counter(device: torch.device) -> torch.Tensor:
    """A zero for the kernel that is launched next, int32 with 16 bytes of its own.

    Filled for many launches of a stream at a time; in a graph, which runs many times, by the graph itself; alone where
    no memory may be kept.
    """
    if keeps_no_memory() or (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
        return torch.zeros(4, dtype=torch.int32, device=device)
    index = device.index or 0
    key = index, driver.active.get_current_stream(index)
    try:
        return _counters[key].pop()
    except (KeyError, IndexError):
        if len(_counters) >= 64:
            _counters.clear()
        _counters[key] = list(torch.zeros(COUNTERS, 4, dtype=torch.int32, device=device).unbind())
        return _counters[key].pop()


def int_key(value: int, do_not_specialize: bool) -> int:
    """Equal for ints that Triton compiles alike: it asks whether one is 1, a multiple of 16, and how wide it is."""
    if do_not_specialize:
        return -0x80000000 <= value < 0x80000000
    if value < 16:
        return value
    width = 1 if value < 0x80000000 else 2 if value < 0x8000000000000000 else 3
    return (width << 4) + (value & 15)


def is_watched(kernel: Any) -> bool:
    """Whether someone wants to see launches, or has switched on what changes a compilation."""
    runtime, compilation = knobs.runtime, knobs.compilation
    return bool(
        getattr(runtime.launch_enter_hook, "calls", runtime.launch_enter_hook)
        or getattr(runtime.launch_exit_hook, "calls", runtime.launch_exit_hook)
        or kernel.pre_run_hooks
        or runtime.add_stages_inspection_hook
        or runtime.debug
        or compilation.instrumentation_mode
        or getattr(compilation, "fpsan_homomorphic_casts", None)
    )


def _launch_by_triton(
    kernel: Any, grid: tuple[int, ...], arguments: tuple, constants: dict[str, Any], key: tuple | None = None
) -> Any:
    record = recorder()
    if record is not None:
        record(key, kernel, arguments, constants)
        return None
    hash_callees_first(kernel)
    return kernel[grid](*_for_triton(arguments), **constants)


def _for_triton(arguments: tuple) -> list:
    return [x.descriptor() if type(x) is Tile else x for x in arguments]


def compile_only(kernel: Any, arguments: tuple, constants: dict[str, Any]) -> None:
    """Compile what :func:`launch` would start, and load it; nothing runs."""
    hash_callees_first(kernel)
    kernel.warmup(*_for_triton(arguments), grid=(1, 1, 1), **constants)._init_handles()


KEYS_ARE_THE_SAME = Version(triton.__version__) >= Version("3.9")
"""Triton's keys do not depend on the order in which a process hashes functions."""


def hash_callees_first(function: Any) -> None:
    """Make the key of ``function`` in Triton's cache the same in every process.

    Before 3.9 Triton hashes the global values of a callee with those of the caller only if the callee has been hashed
    before: the key depends on which kernels a process has launched by then, and what another process has compiled is
    not found.
    """
    if KEYS_ARE_THE_SAME or not isinstance(function, JITCallable) or function.hash is not None:
        return
    for node in ast.walk(function.parse()):
        if isinstance(node, ast.Name | ast.Attribute):
            value = _named(node, function.__globals__)
            for callee in value.hash_attrs if getattr(value, "__triton_aggregate__", False) else (value,):
                if callee is not function:
                    hash_callees_first(callee)
    function.cache_key  # noqa: B018


def _named(node: ast.expr, names: dict[str, Any]) -> Any:
    """What a name, or an attribute of a module, stands for in a kernel; None for all else."""
    if isinstance(node, ast.Name):
        return names.get(node.id)
    if isinstance(node, ast.Attribute):
        owner = _named(node.value, names)
        return getattr(owner, node.attr, None) if isinstance(owner, ModuleType) else None
    return None


class Compilation(NamedTuple):
    """What Triton compiles for a launch: another process makes the same entry of the cache from it.

    Attributes:
        module, name: where the kernel is.
        signature, constants, attributes, options: as Triton has taken them from a launch's arguments.
        target: backend, architecture and warp size.
    """

    module: str
    name: str
    signature: dict[str, Any]
    constants: dict[Any, Any]
    attributes: dict[Any, Any]
    options: dict[str, Any]
    target: tuple[str, Any, int]


def compilation_of(kernel: Any, arguments: tuple, constants: dict[str, Any]) -> Compilation:
    """What :func:`launch` would have to compile."""
    _, _, target, backend, binder = kernel.device_caches[driver.active.get_current_device()]
    given = constants | {
        "debug": kernel.debug or knobs.runtime.debug, "instrumentation_mode": knobs.compilation.instrumentation_mode
    }  # fmt: skip
    bound, specialization, options = binder(*_for_triton(arguments), **given)
    options, signature, values, attributes = kernel._pack_args(backend, given, bound, specialization, options)
    place = target.backend, target.arch, target.warp_size
    return Compilation(
        kernel.fn.__module__, kernel.fn.__qualname__, signature, values, attributes, options.__dict__, place
    )


def compile_into_cache(what: Compilation) -> None:
    """Compile for a GPU that this process need not have."""
    import importlib

    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    kernel = getattr(importlib.import_module(what.module), what.name)
    hash_callees_first(kernel)
    kind: Any = ASTSource
    if kernel.is_gluon():
        from triton.experimental.gluon._runtime import GluonASTSource

        kind = GluonASTSource
    compiled = compile(
        kind(kernel, what.signature, what.constants, what.attributes),
        target=GPUTarget(*what.target),
        options=what.options,
    )
    # Before 3.7 Triton has a C compiler build a launcher for each signature; it is in the cache then. Where that cannot
    # be done here, the first launch does it.
    with contextlib.suppress(Exception):
        from triton.backends.nvidia.driver import CudaLauncher

        CudaLauncher(compiled.src, compiled.metadata)


def cache_folder() -> Path:
    """Where Triton keeps what it has compiled."""
    return Path(knobs.cache.dir)


def _bind(kernel: Any, compiled: Any, arguments: tuple, constants: dict[str, Any]) -> Bound | None:
    """What later launches of ``compiled`` need; None where they must go through Triton."""
    nvidia = sys.modules.get("triton.backends.nvidia.driver")
    launcher: Any = getattr(compiled, "_run", None)
    if nvidia is None or type(launcher) is not nvidia.CudaLauncher:
        return None
    if launcher.global_scratch_size or launcher.profile_scratch_size or getattr(launcher, "gsan_enabled", False):
        return None
    rest = kernel.params[len(arguments) :]
    layouts = [x.layout for x in arguments if type(x) is Tile]
    metas = getattr(compiled.metadata, "tensordesc_meta", None) or ()
    if any(m.get("fp4_padded") or m.get("is_im2col") for m in metas) or len(metas) != len(layouts):
        return None
    if any(p.is_constexpr != (p.num >= len(arguments)) for p in kernel.params):
        return None
    start = launcher.launch
    if layouts:
        # Triton wraps its launcher by one that encodes descriptors.
        start = dict(zip(start.__code__.co_freevars, start.__closure__))["launcher"].cell_contents
    in_tuple = hasattr(launcher, "arg_annotations")
    utils = driver.active.utils
    encode = getattr(utils, "fill_tma_descriptor_tiled", None) or utils.fill_tma_descriptor
    switches = (compiled.function, launcher.launch_cooperative_grid, launcher.launch_pdl)
    packed, no_hooks, no_scratch = (compiled.packed_metadata,), (None, None, None), (None, None)
    options: tuple
    if in_tuple:
        options = (*switches, *packed, *no_hooks, *no_scratch, launcher.arg_annotations, launcher.kernel_signature)
    else:
        options = (*switches, *no_scratch, *packed, *no_hooks)
    return Bound(
        start=start,
        options=options,
        rest=tuple(constants.get(p.name, p.default) for p in rest),
        in_tuple=in_tuple,
        encode=encode,
        kinds=nvidia.TMA_DTYPE_DEVICE_TO_HOST,
        metas=tuple(metas),
        kept=(kernel, compiled, *layouts),
    )
