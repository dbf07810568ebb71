"""Memory of one layer's pages that grows in place: addresses are reserved once, memory is committed as pages come.

    buffer      |################################|................................................|
                0                        committed                                         max_bytes
                  may be read and written           addresses only: touching them is an error on a GPU

Nothing is copied to grow and no address ever changes, so a kernel, a captured CUDA graph and a view made long ago all
see one ordinary tensor. Three ways to get there, chosen by :func:`make_arena`:

* CPU: an anonymous mapping; the system commits a page of it when it is first touched.
* CUDA: the driver's virtual memory management (``cuMemAddressReserve``, ``cuMemCreate``, ``cuMemMap``).
* elsewhere (ROCm, XPU, MPS), and where the system refuses the reservation: a tensor that is copied into one twice as
  large. There ``buffer`` is another tensor after it grew or shrank, as long as what is committed.

``buffer`` keeps the whole reservation's storage, so whatever copies a *storage* copies ``max_bytes``: ``copy.deepcopy``
and ``torch.save`` of a view. Deep-copy the arena, which copies what is committed, and make the views again.
"""

import ctypes
import functools
import mmap
import os
import platform
import sys
import weakref
from abc import ABC, abstractmethod
from typing import Any

import torch

COPYING_GRANULARITY = 64 * 1024
"""Bytes that a copying arena rounds up to."""

UNKNOWN_MEMORY_BYTES = 1 << 40
"""Bytes to reserve per layer where the system does not say how much memory it has."""


class Arena(ABC):
    """``max_bytes`` of addresses on one device, of which the first ``committed`` bytes have memory behind them.

    Contents of newly committed bytes are undefined. Not safe for use by two threads at once. The memory lives until
    the arena and every view of ``buffer`` are gone.

    Attributes:
        device: where the memory is.
        max_bytes: length of the reservation, in bytes.
        granularity: what ``commit`` and ``decommit`` round up to, in bytes.
        committed: bytes that may be touched.
    """

    def __init__(self, device: torch.device, max_bytes: int, granularity: int) -> None:
        self.device, self.max_bytes, self.granularity = device, max_bytes, granularity
        self.committed = 0

    @property
    @abstractmethod
    def buffer(self) -> torch.Tensor:
        """uint8 ``[max_bytes]``; only the first ``committed`` bytes may be touched."""

    grows_in_place = True
    """Whether ``buffer`` is always the same tensor, and as long as the reservation."""

    def commit(self, num_bytes: int, exactly: bool = False) -> None:
        """Have at least ``num_bytes`` committed; keeps contents. On CUDA it may commit an eighth more than asked.

        Args:
            num_bytes: bytes from the start of the buffer, rounded up to ``granularity``, at most ``max_bytes``.
            exactly: commit no more than that.

        Raises:
            torch.OutOfMemoryError: the device has less; the arena is as before.
            ValueError: more than was reserved.
        """
        if not 0 <= num_bytes <= self.max_bytes:
            raise ValueError(f"num_bytes must be 0 to {self.max_bytes}, the bytes reserved, got {num_bytes}.")
        wanted = min(_round_up(num_bytes, self.granularity), self.max_bytes)
        if wanted > self.committed:
            self.committed = self._grow(wanted, exactly)

    def decommit(self, num_bytes: int) -> None:
        """Give back the memory above ``num_bytes``, rounded up; contents below are kept.

        On CUDA this waits for the device, and memory goes back in the steps in which it was taken: up to an eighth
        more than asked stays.

        Raises:
            ValueError: ``num_bytes`` is negative.
            RuntimeError: a CUDA graph is being captured, which would not survive the wait.
        """
        if num_bytes < 0:
            raise ValueError(f"num_bytes must not be negative, got {num_bytes}.")
        kept = _round_up(num_bytes, self.granularity)
        if kept < self.committed:
            self.committed = self._shrink(kept)

    @abstractmethod
    def _grow(self, num_bytes: int, exactly: bool = False) -> int:
        """Commit up to ``num_bytes``, a multiple of the granularity or ``max_bytes``; returns what is committed."""

    @abstractmethod
    def _shrink(self, num_bytes: int) -> int:
        """Give back what lies above ``num_bytes``, a multiple of the granularity; returns what is committed."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "Arena":
        twin = make_arena(self.device, self.max_bytes)
        memo[id(self)] = twin
        twin.commit(self.committed)
        twin.buffer[: self.committed].copy_(self.buffer[: self.committed])
        return twin

    def _out_of_memory(self, num_bytes: int, have: str) -> torch.OutOfMemoryError:
        return torch.OutOfMemoryError(
            f"cannot commit {num_bytes} bytes on {self.device}: {self.committed} of {self.max_bytes} reserved bytes "
            f"are committed; {have}. Free memory of the device, or hold fewer tokens."
        )


def make_arena(device: torch.device, max_bytes: int) -> Arena:
    """Reserve ``max_bytes`` of addresses on a device, nothing committed.

    The arena copies to grow where addresses cannot be reserved: devices other than CPU and NVIDIA GPUs, Windows, a
    limit on the process's address space, strict overcommit, a driver without virtual memory management.

    Raises:
        ValueError: ``max_bytes`` is not positive.
        torch.OutOfMemoryError: a CUDA device with no room for a single step (2 MiB).
    """
    if max_bytes < 1:
        raise ValueError(f"max_bytes must be positive, got {max_bytes}.")
    # A buffer made under inference_mode could not be written outside of it, where a cache may live on.
    with torch.inference_mode(False):
        if device.type == "cpu":
            mapping = _map_anonymous(max_bytes)
            if mapping is not None:
                return CpuArena(mapping, max_bytes)
        if device.type == "cuda" and torch.version.hip is None:
            device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
            memory = _reserve_on_device(device, max_bytes)
            if memory is not None:
                return CudaArena(device, memory, max_bytes)
        return CopyingArena(device, max_bytes)


def reservable_bytes(device: torch.device) -> int:
    """Bytes that it makes sense to reserve per layer: all the memory that the device, or the machine, has."""
    if device.type in ("cuda", "xpu"):
        return torch.get_device_module(device).get_device_properties(device).total_memory
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return UNKNOWN_MEMORY_BYTES


def _round_up(num_bytes: int, granularity: int) -> int:
    return -(-num_bytes // granularity) * granularity


class CpuArena(Arena):
    """An anonymous mapping. The system commits a page when it is touched, so ``committed`` is bookkeeping."""

    def __init__(self, mapping: mmap.mmap, max_bytes: int) -> None:
        super().__init__(torch.device("cpu"), max_bytes, mmap.PAGESIZE)
        self._mapping = mapping
        # The tensor holds a reference to the mapping, which unmaps itself when the last view is gone.
        self._buffer = torch.frombuffer(mapping, dtype=torch.uint8, count=max_bytes)

    @property
    def buffer(self) -> torch.Tensor:
        """uint8 ``[max_bytes]``, always the same tensor."""
        return self._buffer

    def _grow(self, num_bytes: int, exactly: bool = False) -> int:
        return num_bytes

    def _shrink(self, num_bytes: int) -> int:
        if hasattr(mmap, "MADV_DONTNEED"):
            self._mapping.madvise(mmap.MADV_DONTNEED, num_bytes, len(self._mapping) - num_bytes)
        return num_bytes


def _map_anonymous(max_bytes: int) -> mmap.mmap | None:
    """Private anonymous memory that counts against nothing until it is touched; None where there is no such thing."""
    if not hasattr(mmap, "MAP_PRIVATE"):  # Windows commits a mapping as a whole.
        return None
    # Older versions of Python do not name the flag. Its value is that of most Linux ports.
    generic = sys.platform == "linux" and platform.machine() in ("x86_64", "aarch64", "riscv64")
    no_reserve = getattr(mmap, "MAP_NORESERVE", 0x4000 if generic else 0)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
    try:
        return mmap.mmap(-1, _round_up(max_bytes, mmap.PAGESIZE), flags=flags)
    except (OSError, OverflowError):
        return None


class CopyingArena(Arena):
    """A tensor that is copied into another to grow: at least doubled, so a byte is copied twice on average.

    ``buffer`` is ``[committed]``, and another tensor after each change: views of the old one see old contents.
    """

    grows_in_place = False

    def __init__(self, device: torch.device, max_bytes: int) -> None:
        super().__init__(device, max_bytes, COPYING_GRANULARITY)
        self._buffer = torch.empty(0, dtype=torch.uint8, device=device)

    @property
    def buffer(self) -> torch.Tensor:
        """uint8 ``[committed]``, another tensor after each change."""
        return self._buffer

    def _grow(self, num_bytes: int, exactly: bool = False) -> int:
        doubled = num_bytes if exactly else min(max(num_bytes, 2 * self.committed), self.max_bytes)
        try:
            return self._move(doubled)
        except RuntimeError as error:  # Allocators of other devices have errors of their own.
            if doubled == num_bytes:
                raise self._out_of_memory(num_bytes, str(error)) from error
        try:
            return self._move(num_bytes)
        except RuntimeError as error:
            raise self._out_of_memory(num_bytes, str(error)) from error

    def _shrink(self, num_bytes: int) -> int:
        return self._move(num_bytes)

    def _move(self, num_bytes: int) -> int:
        with torch.inference_mode(False):
            moved = torch.empty(num_bytes, dtype=torch.uint8, device=self.device)
            kept = min(num_bytes, self.committed)
            moved[:kept].copy_(self._buffer[:kept])
        self._buffer = moved
        return num_bytes


class CudaArena(Arena):
    """Addresses of the CUDA driver, with physical memory mapped behind the first of them.

    The memory belongs to the driver, not to PyTorch's caching allocator: ``torch.cuda.memory_allocated`` does not count
    it, ``torch.cuda.mem_get_info`` does. Only this device may access it: copy a view to another device through a clone.
    """

    def __init__(self, device: torch.device, memory: "_DeviceMemory", max_bytes: int) -> None:
        super().__init__(device, max_bytes, memory.granularity)
        self._memory = memory
        exporter = _Exporter(memory.address, max_bytes)
        # Not at exit: the process gives everything back, and PyTorch may be half gone.
        weakref.finalize(exporter, _release, memory).atexit = False
        # Some versions of PyTorch ask the driver whose address it is, and it knows only of mapped ones.
        self._grow(memory.granularity)
        # PyTorch keeps the exporter alive as long as any view.
        self._buffer = torch.as_tensor(exporter, device=device)
        memory.truncate(0)

    @property
    def buffer(self) -> torch.Tensor:
        """uint8 ``[max_bytes]``, always the same tensor."""
        return self._buffer

    def _grow(self, num_bytes: int, exactly: bool = False) -> int:
        _release_waiting()
        before = self._memory.mapped
        try:
            self._extend(num_bytes, exactly)
        except RuntimeError as error:
            # No kernel knows of the new steps yet: nothing to wait for.
            self._memory.truncate(before)
            if not isinstance(error, torch.OutOfMemoryError):
                raise
            free, total = torch.cuda.mem_get_info(self.device)
            raise self._out_of_memory(num_bytes, f"{free} of the device's {total} bytes are free") from error
        return min(self._memory.mapped, self.max_bytes)

    def _extend(self, num_bytes: int, exactly: bool) -> None:
        with torch.cuda.device(self.device):
            try:
                self._memory.extend(num_bytes, exactly)
            except torch.OutOfMemoryError:
                # PyTorch's caching allocator may sit on free memory; and the last step need not be a whole one.
                torch.cuda.memory.empty_cache()
                self._memory.extend(num_bytes, exactly=True)

    def _shrink(self, num_bytes: int) -> int:
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(f"cannot decommit to {num_bytes} bytes while a CUDA graph is captured: do it before.")
        _release_waiting()
        self._memory.synchronize()
        self._memory.truncate(num_bytes)
        return min(self._memory.mapped, self.max_bytes)


class _Exporter:
    """What ``torch.as_tensor`` makes a tensor of; alive as long as the arena's buffer or a view of it."""

    def __init__(self, address: int, num_bytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (num_bytes,),
            "typestr": "|u1",
            "data": (address, False),  # not read-only
            "strides": None,
            "version": 3,
        }


_WAITING: list["_DeviceMemory"] = []
"""Memory whose last view went away while a CUDA graph was captured, to be given back by the next arena that changes."""


def _release(memory: "_DeviceMemory") -> None:
    """Give memory and addresses back once no kernel can be using them."""
    try:
        if torch.cuda.is_current_stream_capturing():
            _WAITING.append(memory)  # To wait for the device would end the capture with an error.
            return
        memory.synchronize()
    except RuntimeError:
        # The context is lost to an earlier error, or this is a forked child: the memory is not ours to give back.
        return
    memory.free()


def _release_waiting() -> None:
    if _WAITING and not torch.cuda.is_current_stream_capturing():
        while _WAITING:
            _release(_WAITING.pop())


# The CUDA driver, through ctypes. Names and layouts are those of cuda.h, unchanged since CUDA 10.2.

CUDA_ERROR_OUT_OF_MEMORY = 2
VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED = 102  # CU_DEVICE_ATTRIBUTE_*
ALLOCATION_TYPE_PINNED = 1  # CU_MEM_ALLOCATION_TYPE_*
LOCATION_TYPE_DEVICE = 1  # CU_MEM_LOCATION_TYPE_*
ACCESS_READ_WRITE = 3  # CU_MEM_ACCESS_FLAGS_PROT_*
GRANULARITY_MINIMUM = 0  # CU_MEM_ALLOC_GRANULARITY_*


class _Location(ctypes.Structure):
    """``CUmemLocation``."""

    _fields_ = (("type", ctypes.c_int), ("id", ctypes.c_int))


class _AllocationFlags(ctypes.Structure):
    """``CUmemAllocationProp.allocFlags``."""

    _fields_ = (
        ("compression_type", ctypes.c_ubyte),
        ("gpu_direct_rdma_capable", ctypes.c_ubyte),
        ("usage", ctypes.c_ushort),
        ("reserved", ctypes.c_ubyte * 4),
    )


class _AllocationProperties(ctypes.Structure):
    """``CUmemAllocationProp``, 32 bytes."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("requested_handle_types", ctypes.c_int),
        ("location", _Location),
        ("win32_handle_meta_data", ctypes.c_void_p),
        ("allocation_flags", _AllocationFlags),
    )


class _AccessDescription(ctypes.Structure):
    """``CUmemAccessDesc``, 12 bytes."""

    _fields_ = (("location", _Location), ("flags", ctypes.c_int))


_ADDRESS = _HANDLE = _FLAGS = ctypes.c_ulonglong  # CUdeviceptr, CUmemGenericAllocationHandle, unsigned long long
_SIZE = ctypes.c_size_t
_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "cuGetErrorName": (ctypes.c_int, ctypes.POINTER(ctypes.c_char_p)),
    "cuGetErrorString": (ctypes.c_int, ctypes.POINTER(ctypes.c_char_p)),
    "cuDeviceGetAttribute": (ctypes.POINTER(ctypes.c_int), ctypes.c_int, ctypes.c_int),
    "cuMemGetAllocationGranularity": (ctypes.POINTER(_SIZE), ctypes.POINTER(_AllocationProperties), ctypes.c_int),
    "cuMemAddressReserve": (ctypes.POINTER(_ADDRESS), _SIZE, _SIZE, _ADDRESS, _FLAGS),
    "cuMemAddressFree": (_ADDRESS, _SIZE),
    "cuMemCreate": (ctypes.POINTER(_HANDLE), _SIZE, ctypes.POINTER(_AllocationProperties), _FLAGS),
    "cuMemRelease": (_HANDLE,),
    "cuMemMap": (_ADDRESS, _SIZE, _SIZE, _HANDLE, _FLAGS),
    "cuMemUnmap": (_ADDRESS, _SIZE),
    "cuMemSetAccess": (_ADDRESS, _SIZE, ctypes.POINTER(_AccessDescription), _SIZE),
}


class _DriverError(RuntimeError):
    """A call of the CUDA driver failed for another reason than memory."""


class _Driver:
    """The driver's functions by their C names; a result that is not success raises."""

    def __init__(self, library: Any) -> None:
        self._library = library
        for name, arguments in _SIGNATURES.items():
            function = getattr(library, name)
            function.argtypes, function.restype = arguments, ctypes.c_int

    def __call__(self, name: str, *arguments: Any) -> None:
        result = getattr(self._library, name)(*arguments)
        if result:
            message = f"{name}: {self._describe(result)}"
            raise torch.OutOfMemoryError(message) if result == CUDA_ERROR_OUT_OF_MEMORY else _DriverError(message)

    def _describe(self, result: int) -> str:
        texts = []
        for function in (self._library.cuGetErrorName, self._library.cuGetErrorString):
            text = ctypes.c_char_p()
            function(result, ctypes.byref(text))
            texts.append((text.value or b"unknown error").decode())
        return f"{texts[0]} ({result}): {texts[1]}"


@functools.cache
def _load_driver() -> _Driver | None:
    """The CUDA driver, or None where it has another name (Windows) or no virtual memory management."""
    try:
        return _Driver(ctypes.CDLL("libcuda.so.1"))
    except (OSError, AttributeError):
        return None


class _DeviceMemory:
    """A range of device addresses and the physical memory mapped behind its first ``mapped`` bytes.

    Memory is mapped in steps of an eighth of what is there: few steps for a large range, and little more than needed
    held by a small one. A step can only be unmapped as a whole.

    Raises:
        torch.OutOfMemoryError, _DriverError: the addresses cannot be reserved.
    """

    def __init__(self, driver: _Driver, device_index: int, max_bytes: int) -> None:
        self.driver, self.device_index = driver, device_index
        location = _Location(LOCATION_TYPE_DEVICE, device_index)
        self.properties = _AllocationProperties(type=ALLOCATION_TYPE_PINNED, location=location)
        self.access = _AccessDescription(location, ACCESS_READ_WRITE)
        granularity, address = _SIZE(), _ADDRESS()
        driver(
            "cuMemGetAllocationGranularity",
            ctypes.byref(granularity),
            ctypes.byref(self.properties),
            GRANULARITY_MINIMUM,
        )
        self.granularity = granularity.value
        self.num_bytes = _round_up(max_bytes, self.granularity)
        driver("cuMemAddressReserve", ctypes.byref(address), self.num_bytes, 0, 0, 0)
        self.address = address.value
        self.mapped = 0
        self.steps: list[int] = []

    def extend(self, num_bytes: int, exactly: bool = False) -> None:
        """Map up to ``num_bytes``, by default whole steps. An error leaves the steps mapped that came before it."""
        num_bytes = _round_up(num_bytes, self.granularity)
        while self.mapped < num_bytes:
            step = max(self.granularity, self.mapped // 8 // self.granularity * self.granularity)
            self._map(min(step, (num_bytes if exactly else self.num_bytes) - self.mapped))

    def _map(self, num_bytes: int) -> None:
        address, handle = self.address + self.mapped, _HANDLE()
        self.driver("cuMemCreate", ctypes.byref(handle), num_bytes, ctypes.byref(self.properties), 0)
        try:
            self.driver("cuMemMap", address, num_bytes, 0, handle, 0)
        finally:
            # A mapping keeps its memory; without the handle, unmapping is all that it takes to free it.
            self.driver("cuMemRelease", handle)
        try:
            self.driver("cuMemSetAccess", address, num_bytes, ctypes.byref(self.access), 1)
        except RuntimeError:
            self.driver("cuMemUnmap", address, num_bytes)
            raise
        self.steps.append(num_bytes)
        self.mapped += num_bytes

    def truncate(self, num_bytes: int) -> None:
        """Unmap the steps that lie above ``num_bytes`` as a whole. No kernel may be using them."""
        while self.steps and self.mapped - self.steps[-1] >= num_bytes:
            self.driver("cuMemUnmap", self.address + self.mapped - self.steps[-1], self.steps[-1])
            self.mapped -= self.steps.pop()

    def synchronize(self) -> None:
        """Wait for all work of the device: unlike ``cudaFree``, unmapping does not."""
        torch.cuda.synchronize(self.device_index)

    def free(self) -> None:
        """Give back memory and addresses."""
        self.truncate(0)
        self.driver("cuMemAddressFree", self.address, self.num_bytes)


def _reserve_on_device(device: torch.device, max_bytes: int) -> _DeviceMemory | None:
    """Addresses on a CUDA device, or None where the driver has no such thing or refuses them."""
    driver = _load_driver()
    if driver is None:
        return None
    _release_waiting()
    torch.empty(1, device=device)  # Makes PyTorch start the driver and the device's primary context.
    supported = ctypes.c_int()
    driver("cuDeviceGetAttribute", ctypes.byref(supported), VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED, device.index)
    if not supported.value:
        return None
    try:
        return _DeviceMemory(driver, device.index, max_bytes)
    except (torch.OutOfMemoryError, _DriverError):
        return None
