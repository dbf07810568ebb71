"""Arenas: growing keeps contents and addresses, memory follows what is committed, and everything is given back."""

import contextlib
import copy
import ctypes
import gc
import mmap
import threading
import weakref
from pathlib import Path

import pytest
import torch

from hf_paged.paging import arena as arena_module
from hf_paged.paging.arena import CopyingArena, CpuArena, make_arena, reservable_bytes

CPU = torch.device("cpu")
MIB, GIB, TIB = 1 << 20, 1 << 30, 1 << 40


def process_memory() -> tuple[int, int]:
    """Address space and resident memory of this process, in bytes."""
    statm = Path("/proc/self/statm")
    if not statm.exists():
        pytest.skip("the system has no /proc/self/statm")
    size, resident = statm.read_text().split()[:2]
    return int(size) * mmap.PAGESIZE, int(resident) * mmap.PAGESIZE


def make_cpu_arena(max_bytes: int) -> CpuArena:
    arena = make_arena(CPU, max_bytes)
    if not isinstance(arena, CpuArena):
        pytest.skip("the system does not reserve addresses without memory")
    return arena


@pytest.fixture(params=["cpu", "copying", pytest.param("cuda", marks=pytest.mark.gpu)])
def make(request):
    """Makes an arena of ``max_bytes``, of each kind."""
    kinds = {
        "cpu": make_cpu_arena,
        "copying": lambda max_bytes: CopyingArena(CPU, max_bytes),
        "cuda": lambda max_bytes: make_cuda_arena(max_bytes),
    }
    return kinds[request.param]


def pattern(num_bytes: int, device: torch.device = CPU) -> torch.Tensor:
    period = torch.arange(251, dtype=torch.uint8, device=device)
    return period.repeat(num_bytes // 251 + 1)[:num_bytes]


# Every kind of arena


def test_memory_is_unmapped_once_no_step_can_be_using_it(monkeypatch):
    calls: list[str] = []

    class Memory:
        granularity, mapped = MIB, 8 * MIB

        def synchronize(self) -> None:
            calls.append("wait")

        def truncate(self, num_bytes: int) -> None:
            calls.append("unmap")
            self.mapped = num_bytes

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    arena = object.__new__(arena_module.CudaArena)
    arena._memory, arena.committed, arena.granularity, arena.max_bytes = Memory(), 8 * MIB, MIB, 64 * MIB
    arena.decommit(3 * MIB)
    assert (calls, arena.committed) == (["wait", "unmap"], 3 * MIB)


def test_growth_keeps_contents(make):
    arena = make(64 * MIB)
    assert arena.committed == 0
    written = 0
    for num_bytes in (1, 3, 4097, 5 * MIB, 5 * MIB, 63 * MIB + 1):
        arena.commit(num_bytes)
        assert num_bytes <= arena.committed <= arena.max_bytes
        assert arena.committed % arena.granularity == 0 or arena.committed == arena.max_bytes
        arena.buffer[written:num_bytes] = pattern(num_bytes, arena.device)[written:]
        written = num_bytes
    assert torch.equal(arena.buffer[:written], pattern(written, arena.device))


def test_committing_less_changes_nothing(make):
    arena = make(16 * MIB)
    arena.commit(9 * MIB)
    committed, address = arena.committed, arena.buffer.data_ptr()
    arena.commit(0)
    arena.commit(MIB)
    arena.decommit(committed + 1)
    assert (arena.committed, arena.buffer.data_ptr()) == (committed, address)


def test_decommitting_keeps_what_lies_below(make):
    arena = make(64 * MIB)
    arena.commit(64 * MIB)
    arena.buffer[: 64 * MIB] = pattern(64 * MIB, arena.device)
    arena.decommit(3 * MIB + 1)
    # An eighth more may stay, and what the rounding adds.
    assert 3 * MIB < arena.committed <= 3 * MIB * 9 // 8 + 2 * MIB
    arena.commit(32 * MIB)
    assert torch.equal(arena.buffer[: 3 * MIB + 1], pattern(3 * MIB + 1, arena.device))
    arena.buffer[3 * MIB : 32 * MIB] = 7
    arena.decommit(0)
    assert arena.committed == 0


def test_all_of_an_odd_reservation_can_be_committed(make):
    arena = make(3 * MIB + 1)
    arena.commit(3 * MIB + 1)
    assert arena.committed == arena.max_bytes == 3 * MIB + 1
    arena.buffer[-1] = 5
    assert arena.buffer.shape == (3 * MIB + 1,)
    assert int(arena.buffer[-1]) == 5
    arena.decommit(MIB)
    assert arena.committed < arena.max_bytes


def test_a_deep_copy_is_independent(make):
    arena = make(64 * MIB)
    arena.commit(MIB)
    arena.buffer[:MIB] = 1
    twins = copy.deepcopy({"first": arena, "again": arena})
    twin = twins["first"]
    assert twins["again"] is twin
    assert (twin.committed, twin.max_bytes) == (arena.committed, arena.max_bytes)
    twin.buffer[: MIB // 2] = 2
    arena.buffer[MIB // 2 : MIB] = 3
    assert arena.buffer[:MIB].unique().tolist() == [1, 3]
    assert twin.buffer[:MIB].unique().tolist() == [1, 2]
    arena.decommit(0)
    twin.commit(32 * MIB)
    assert twin.buffer[:MIB].unique().tolist() == [1, 2]


def test_bytes_beyond_the_reservation_are_refused(make):
    arena = make(4 * MIB)
    arena.commit(MIB)
    committed = arena.committed
    for num_bytes in (-1, 4 * MIB + 1):
        with pytest.raises(ValueError, match=f"num_bytes must be 0 to {4 * MIB}, .* got {num_bytes}"):
            arena.commit(num_bytes)
    with pytest.raises(ValueError, match="num_bytes must not be negative, got -3"):
        arena.decommit(-3)
    assert arena.committed == committed


def test_an_arena_of_inference_mode_can_be_written_outside(make):
    with torch.inference_mode():
        arena = make(4 * MIB)
        arena.commit(MIB)
    arena.commit(3 * MIB)
    arena.buffer[:5].fill_(9)
    assert arena.buffer[:5].tolist() == [9] * 5


@pytest.mark.parametrize("max_bytes", [0, -1])
def test_an_empty_reservation_is_refused(max_bytes):
    with pytest.raises(ValueError, match=f"max_bytes must be positive, got {max_bytes}"):
        make_arena(CPU, max_bytes)


# CPU


def test_addresses_and_views_stay():
    arena = make_cpu_arena(64 * MIB)
    arena.commit(4 * MIB)
    buffer, address = arena.buffer, arena.buffer.data_ptr()
    assert address % mmap.PAGESIZE == 0
    pages = buffer.view(torch.bfloat16)[: 2 * MIB].view(64, 4, 16, -1)
    pages[63] = 1.5
    arena.commit(64 * MIB)
    assert arena.buffer is buffer
    assert arena.buffer.data_ptr() == address
    assert arena.buffer[3 * MIB + 1023 * 1024 : 4 * MIB].view(torch.bfloat16).unique().tolist() == [1.5]


def test_a_reservation_larger_than_memory_costs_nothing():
    _, before = process_memory()
    arena = make_cpu_arena(16 * reservable_bytes(CPU))
    arena.commit(arena.max_bytes)
    for offset in (0, arena.max_bytes // 3, arena.max_bytes - 1):
        arena.buffer[offset] = 1
    assert int(arena.buffer[arena.max_bytes // 3]) == 1
    assert process_memory()[1] - before < 64 * MIB


def test_decommitting_gives_memory_back():
    if not hasattr(mmap, "MADV_DONTNEED"):
        pytest.skip("the system cannot be told")
    arena = make_cpu_arena(GIB)
    arena.commit(256 * MIB)
    _, before = process_memory()
    arena.buffer[: 256 * MIB] = 1
    assert process_memory()[1] - before > 192 * MIB
    arena.decommit(MIB)
    assert process_memory()[1] - before < 64 * MIB
    arena.commit(2 * MIB)
    assert arena.buffer[:MIB].unique().tolist() == [1]
    assert arena.buffer[MIB : 2 * MIB].unique().tolist() == [0]


def test_a_view_outlives_its_arena_and_the_last_one_releases_it():
    arena = make_cpu_arena(GIB)
    arena.commit(MIB)
    mapping = weakref.ref(arena._mapping)
    view = arena.buffer[100:200].view(torch.int32)
    view[:] = 12345
    del arena
    gc.collect()
    assert mapping() is not None
    other = view[5:]
    del view
    assert other.tolist() == [12345] * 20
    del other
    assert mapping() is None


def test_dropped_reservations_leave_the_address_space():
    """200 TiB in turn, more than the 128 TiB that a process can have at once."""
    size_before, _ = process_memory()
    for _ in range(200):
        arena = make_cpu_arena(TIB)
        arena.commit(1)
        arena.buffer[0] = 1
    del arena
    assert process_memory()[0] - size_before < GIB


def test_addresses_that_are_refused_give_a_copying_arena(monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(mmap, "mmap", refuse)
    arena = make_arena(CPU, GIB)
    assert isinstance(arena, CopyingArena)
    assert arena.buffer.shape == (0,)
    arena.commit(MIB)
    assert arena.buffer.shape == (arena.committed,) == (MIB,)


def test_a_copying_arena_doubles_or_takes_what_it_gets(monkeypatch):
    arena = CopyingArena(CPU, 100 * MIB)
    arena.commit(10 * MIB)
    arena.commit(10 * MIB + 1)
    assert arena.committed == 20 * MIB
    arena.buffer[:] = 3
    empty = torch.empty

    def limited(size, **kwargs):
        if size > 30 * MIB:
            raise RuntimeError("not that much")
        return empty(size, **kwargs)

    monkeypatch.setattr(torch, "empty", limited)
    with pytest.raises(torch.OutOfMemoryError, match=f"cannot commit {32 * MIB} bytes .* {20 * MIB} of {100 * MIB}"):
        arena.commit(32 * MIB)
    assert arena.committed == arena.buffer.numel() == 20 * MIB
    arena.commit(25 * MIB)
    assert arena.committed == arena.buffer.numel() == 25 * MIB
    assert arena.buffer[: 20 * MIB].unique().tolist() == [3]


def test_reservable_bytes_is_the_memory_of_the_machine():
    assert GIB // 2 < reservable_bytes(CPU) < 100 * TIB


# The CUDA driver's calls, against a model of the driver


def test_structures_have_the_layout_of_the_driver():
    properties, access = arena_module._AllocationProperties, arena_module._AccessDescription
    assert ctypes.sizeof(arena_module._Location) == 8
    assert ctypes.sizeof(properties) == 32
    offsets = {"type": 0, "requested_handle_types": 4, "location": 8, "win32_handle_meta_data": 16}
    assert {name: getattr(properties, name).offset for name in offsets} == offsets
    assert properties.allocation_flags.offset == 24
    flags = arena_module._AllocationFlags
    assert (flags.gpu_direct_rdma_capable.offset, flags.usage.offset, flags.reserved.offset) == (1, 2, 4)
    assert (ctypes.sizeof(access), access.flags.offset) == (12, 8)


class FakeLibrary:
    """libcuda as far as arenas call it: addresses, handles and mappings in dictionaries, ``free`` bytes of memory."""

    BASE, GRANULARITY = 1 << 44, 2 * MIB

    def __init__(self, free: int) -> None:
        self.free, self.reserved = free, 0
        self.handles: dict[int, int] = {}
        self.mappings: dict[int, tuple[int, bool]] = {}
        self.failing: str | None = None
        self.num_handles = 0
        for name in arena_module._SIGNATURES:
            setattr(self, name, self.function(name))

    def function(self, name):
        # Not a method: the driver class puts argtypes on it.
        return lambda *arguments: 1 if name == self.failing else getattr(self, "call_" + name)(*arguments)

    def call_cuGetErrorName(self, result, text):
        text._obj.value = {1: b"CUDA_ERROR_INVALID_VALUE", 2: b"CUDA_ERROR_OUT_OF_MEMORY"}[result]
        return 0

    def call_cuGetErrorString(self, result, text):
        text._obj.value = {1: b"invalid argument", 2: b"out of memory"}[result]
        return 0

    def call_cuMemGetAllocationGranularity(self, granularity, properties, option):
        assert (properties._obj.type, properties._obj.location.type, option) == (1, 1, 0)
        granularity._obj.value = self.GRANULARITY
        return 0

    def call_cuMemAddressReserve(self, address, size, alignment, hint, flags):
        assert (size % self.GRANULARITY, alignment, hint, flags) == (0, 0, 0, 0)
        address._obj.value, self.reserved = self.BASE, size
        return 0

    def call_cuMemAddressFree(self, address, size):
        assert (address, size, self.mappings) == (self.BASE, self.reserved, {})
        self.reserved = 0
        return 0

    def call_cuMemCreate(self, handle, size, properties, flags):
        assert size > 0
        assert size % self.GRANULARITY == 0
        assert (properties._obj.location.id, flags) == (3, 0)
        if size > self.free:
            return 2
        self.free -= size
        self.num_handles += 1
        handle._obj.value = self.num_handles
        self.handles[self.num_handles] = size
        return 0

    def call_cuMemRelease(self, handle):
        size = self.handles.pop(handle.value)
        if not any(kept == handle.value for kept, *_ in self.mappings.values()):
            self.free += size
        return 0

    def call_cuMemMap(self, address, size, offset, handle, flags):
        assert self.handles[handle.value] == size
        assert self.BASE <= address <= self.BASE + self.reserved - size
        assert (offset, flags) == (0, 0)
        assert all(address >= start + length or start >= address + size for start, (_, length, _) in self.all())
        self.mappings[address] = (handle.value, size, False)
        return 0

    def call_cuMemSetAccess(self, address, size, access, count):
        handle, length, _ = self.mappings[address]
        assert (length, count, access._obj.flags, access._obj.location.id) == (size, 1, 3, 3)
        self.mappings[address] = (handle, length, True)
        return 0

    def call_cuMemUnmap(self, address, size):
        _, length, _ = self.mappings.pop(address)
        assert length == size, "a mapping can only be unmapped as a whole"
        self.free += size
        return 0

    def all(self):
        return sorted(self.mappings.items())

    def check(self, mapped: int, free: int) -> None:
        """The first ``mapped`` bytes are mapped without a gap, with access; nothing else is held."""
        end = self.BASE
        for start, (_, length, has_access) in self.all():
            assert (start, has_access) == (end, True)
            end += length
        assert (end - self.BASE, self.free, self.handles) == (mapped, free, {})


def make_device_memory(free: int, max_bytes: int) -> tuple[FakeLibrary, "arena_module._DeviceMemory"]:
    library = FakeLibrary(free)
    return library, arena_module._DeviceMemory(arena_module._Driver(library), 3, max_bytes)


def test_steps_are_an_eighth_of_what_is_mapped():
    library, memory = make_device_memory(free=200 * GIB, max_bytes=141 * GIB + 1)
    memory.extend(1)
    library.check(mapped=2 * MIB, free=200 * GIB - 2 * MIB)
    memory.extend(100 * GIB)
    assert 100 * GIB <= memory.mapped <= 100 * GIB * 9 // 8
    assert len(memory.steps) < 100
    memory.extend(141 * GIB + 1)
    assert memory.mapped == memory.num_bytes == 141 * GIB + 2 * MIB
    library.check(mapped=memory.mapped, free=200 * GIB - memory.mapped)
    for num_bytes in (70 * GIB + 1, GIB, 5 * MIB, 1, 0):
        memory.truncate(num_bytes)
        assert num_bytes <= memory.mapped <= num_bytes * 9 // 8 + 2 * MIB
        library.check(mapped=memory.mapped, free=200 * GIB - memory.mapped)
    memory.free()
    assert library.reserved == 0


@pytest.mark.parametrize("exactly", [False, True])
def test_growing_that_fails_gives_back_what_it_took(exactly, monkeypatch):
    library, memory = make_device_memory(free=40 * MIB, max_bytes=64 * MIB)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (library.free, 64 * MIB))
    monkeypatch.setattr(torch.cuda.memory, "empty_cache", lambda: None)
    monkeypatch.setattr(arena_module, "_release_waiting", lambda: None)
    arena = object.__new__(arena_module.CudaArena)
    arena._memory, arena.committed, arena.device = memory, 0, CPU
    arena.granularity, arena.max_bytes = memory.granularity, 64 * MIB
    arena.commit(30 * MIB, exactly)
    assert arena.committed == 30 * MIB
    mapped = memory.mapped
    with pytest.raises(torch.OutOfMemoryError, match=r"of the device's .* bytes are free"):
        arena.commit(50 * MIB, exactly)
    library.check(mapped=mapped, free=40 * MIB - mapped)
    arena.commit(40 * MIB, exactly)
    library.check(mapped=40 * MIB, free=0)


def test_exact_steps_stop_at_what_is_needed():
    library, memory = make_device_memory(free=100 * MIB, max_bytes=GIB)
    memory.extend(64 * MIB)
    with pytest.raises(torch.OutOfMemoryError, match=r"cuMemCreate: CUDA_ERROR_OUT_OF_MEMORY \(2\): out of memory"):
        memory.extend(99 * MIB)
    memory.extend(99 * MIB, exactly=True)
    library.check(mapped=100 * MIB, free=0)


@pytest.mark.parametrize("failing", ["cuMemCreate", "cuMemMap", "cuMemSetAccess"])
def test_a_call_that_fails_holds_nothing(failing):
    library, memory = make_device_memory(free=100 * MIB, max_bytes=GIB)
    memory.extend(6 * MIB)
    library.failing = failing
    with pytest.raises(RuntimeError, match=rf"{failing}: CUDA_ERROR_INVALID_VALUE \(1\): invalid argument"):
        memory.extend(8 * MIB)
    library.check(mapped=6 * MIB, free=94 * MIB)
    library.failing = None
    memory.extend(8 * MIB)
    library.check(mapped=8 * MIB, free=92 * MIB)


# CUDA


def make_cuda_arena(max_bytes: int, index: int = 0) -> "arena_module.CudaArena":
    arena = make_arena(torch.device("cuda", index), max_bytes)
    assert isinstance(arena, arena_module.CudaArena)
    return arena


def free_bytes(index: int = 0) -> int:
    torch.cuda.synchronize(index)
    return torch.cuda.mem_get_info(index)[0]


@pytest.mark.gpu
def test_cuda_addresses_and_views_stay():
    arena = make_cuda_arena(reservable_bytes(torch.device("cuda")))
    buffer, address = arena.buffer, arena.buffer.data_ptr()
    assert address == arena._memory.address
    assert buffer.device == torch.device("cuda", 0)
    assert buffer.numel() == arena.max_bytes
    arena.commit(4 * MIB)
    pages = buffer.view(torch.bfloat16)[: 2 * MIB].view(64, 4, 16, -1)
    pages.normal_()
    expected = pages.clone()
    for num_bytes in (5 * MIB, 100 * MIB, GIB):
        arena.commit(num_bytes)
        assert arena.buffer is buffer
        assert buffer.data_ptr() == address
    assert torch.equal(pages, expected)
    # One operation over many steps of memory.
    numbers = buffer[:GIB].view(torch.int32)
    numbers.copy_(torch.arange(GIB // 4, dtype=torch.int32, device="cuda"))
    assert int(numbers.sum()) == (GIB // 4) * (GIB // 4 - 1) // 2
    assert torch.equal(numbers[-1000:].cpu(), torch.arange(GIB // 4 - 1000, GIB // 4, dtype=torch.int32))


@pytest.mark.gpu
@pytest.mark.whole_card
def test_cuda_memory_follows_what_is_committed():
    make_cuda_arena(MIB).commit(MIB)  # The context's own memory, once.
    torch.cuda.empty_cache()
    before = free_bytes()
    arena = make_cuda_arena(reservable_bytes(torch.device("cuda")))
    slack = 32 * MIB
    assert before - free_bytes() < slack
    for num_bytes in (512 * MIB, 2 * GIB):
        arena.commit(num_bytes)
        assert num_bytes <= arena.committed <= num_bytes * 9 // 8 + 2 * MIB
        assert abs(before - free_bytes() - arena.committed) < slack
    arena.buffer[: 2 * GIB].fill_(1)
    arena.decommit(GIB)
    assert GIB <= arena.committed <= GIB * 9 // 8
    assert abs(before - free_bytes() - arena.committed) < slack
    view = arena.buffer[:10]
    committed = arena.committed
    del arena
    gc.collect()
    assert abs(before - free_bytes() - committed) < slack
    assert view.tolist() == [1] * 10
    del view
    assert before - free_bytes() < slack


@pytest.mark.gpu
def test_cuda_memory_is_not_released_under_a_kernel():
    source = torch.arange(1 << 20, device="cuda", dtype=torch.int64)
    for _ in range(20):
        arena = make_cuda_arena(GIB)
        arena.commit(256 * MIB)
        numbers = arena.buffer[: 256 * MIB].view(torch.int64).view(-1, 1 << 20)
        numbers.copy_(source)
        total = numbers.sum()  # Still running when the memory goes.
        del arena, numbers
        assert int(total) == 32 * (1 << 20) * ((1 << 20) - 1) // 2


@pytest.mark.gpu
@pytest.mark.whole_card
def test_cuda_many_reservations_come_and_go():
    """More addresses in turn than the device has at once."""
    size = reservable_bytes(torch.device("cuda"))
    before = free_bytes()
    for _ in range(2000):
        make_cuda_arena(size).commit(MIB)
    assert before - free_bytes() < 64 * MIB


@pytest.mark.gpu
def test_cuda_graph_sees_memory_committed_after_its_capture():
    arena = make_cuda_arena(GIB)
    arena.commit(4 * MIB)
    slots = torch.zeros(1000, dtype=torch.int64, device="cuda")
    values = torch.zeros(1000, dtype=torch.float32, device="cuda")
    pages = arena.buffer.view(torch.float32)
    pages[:1000] = 0
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        pages.index_copy_(0, slots, values)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        pages.index_copy_(0, slots, values)
    arena.commit(512 * MIB)
    slots.copy_(torch.randperm(128 * MIB, device="cuda")[:1000])
    values.normal_()
    graph.replay()
    assert torch.equal(pages[slots], values)


@pytest.mark.gpu
@pytest.mark.whole_card
def test_cuda_memory_dropped_during_a_capture_is_released_later():
    free_bytes()
    kept, dropped = make_cuda_arena(GIB), make_cuda_arena(GIB)
    kept.commit(4 * MIB)
    dropped.commit(512 * MIB)
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        kept.buffer[:10].fill_(3)  # What the first capture of a process loads stays.
    before = free_bytes()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept.buffer[:10].fill_(4)
        del dropped
        with pytest.raises(RuntimeError, match="while a CUDA graph is captured"):
            kept.decommit(0)
    graph.replay()
    assert kept.buffer[:10].tolist() == [4] * 10
    kept.commit(16 * MIB)
    assert free_bytes() - before > 400 * MIB


@pytest.mark.gpu
@pytest.mark.whole_card
def test_cuda_out_of_memory_leaves_the_arena_usable():
    total = reservable_bytes(torch.device("cuda"))
    arena = make_cuda_arena(2 * total)
    arena.commit(64 * MIB)
    arena.buffer[: 64 * MIB] = 6
    before, committed = free_bytes(), arena.committed
    with pytest.raises(torch.OutOfMemoryError, match=f"cannot commit .* on cuda:0: {committed} of {2 * total}"):
        arena.commit(2 * total)
    assert arena.committed == committed
    assert before - free_bytes() < 64 * MIB
    arena.commit(128 * MIB)
    arena.buffer[64 * MIB : 128 * MIB] = 7
    assert arena.buffer[: 128 * MIB].unique().tolist() == [6, 7]


@pytest.mark.gpu
@pytest.mark.whole_card
def test_cuda_takes_what_the_caching_allocator_keeps_unused():
    free = free_bytes()
    hoard = torch.empty(free * 3 // 4, dtype=torch.uint8, device="cuda")
    del hoard  # Free for PyTorch, taken for the driver.
    arena = make_cuda_arena(free)
    arena.commit(free // 2)
    arena.buffer[free // 2 - 1] = 1
    assert int(arena.buffer[free // 2 - 1]) == 1


@pytest.mark.gpu
def test_cuda_from_another_thread():
    """Commits, decommits and drops where no CUDA call was made before."""
    held = [make_cuda_arena(GIB)]
    errors = []

    def work():
        try:
            arena = held.pop()
            arena.commit(64 * MIB)
            arena.buffer[: 64 * MIB] = 1
            arena.decommit(MIB)
            assert int(arena.buffer[:MIB].sum()) == MIB
            del arena
            make_cuda_arena(GIB).commit(MIB)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert errors == []


@pytest.mark.gpu
def test_cuda_triton_takes_a_view():
    """A launcher of Triton asks the driver for each pointer that it gets."""
    from hf_paged_kernels.attention.ops import write_pages_op

    arena = make_cuda_arena(GIB)
    arena.commit(8 * MIB)
    pages = arena.buffer.view(torch.bfloat16)[: 4 * MIB].view(2, -1, 4, 16, 64)
    key, value = torch.randn(2, 33, 4, 64, device="cuda", dtype=torch.bfloat16).unbind()
    slots = torch.randperm(pages.shape[1] * 16, device="cuda")[:33]
    write_pages_op(key, value, pages[0], pages[1], slots, None, None)
    assert torch.equal(pages[0][slots // 16, :, slots % 16], key)
    assert torch.equal(pages[1][slots // 16, :, slots % 16], value)


@pytest.mark.gpu
@pytest.mark.whole_card
def test_cuda_every_device():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    before = [free_bytes(index) for index in range(2)]
    arenas = [make_cuda_arena(GIB, index) for index in range(2)]
    for index, arena in enumerate(arenas):
        arena.commit(256 * MIB)
        arena.buffer[: 256 * MIB] = index + 1
        assert arena.buffer.device.index == index
    assert torch.cuda.current_device() == 0
    for index, arena in enumerate(arenas):
        assert arena.buffer[: 256 * MIB].unique().tolist() == [index + 1]
        assert before[index] - free_bytes(index) > 200 * MIB
    assert int(arenas[1].buffer[:10].clone().to("cuda:0").sum()) == 20
    copies = copy.deepcopy(arenas)
    assert [twin.buffer.device.index for twin in copies] == [0, 1]
    with torch.cuda.device(1):
        assert make_arena(torch.device("cuda"), MIB).device == torch.device("cuda", 1)
