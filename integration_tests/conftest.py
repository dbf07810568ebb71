"""Shared fixtures: Triton's interpreter without a GPU, NaN-poisoned allocations, a visible skip for GPU tests."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "support"))

HAS_GPU = torch.cuda.is_available()
if "PYTEST_XDIST_WORKER" in os.environ:
    # One process a core: several with all threads each wait for one another, many times slower.
    torch.set_num_threads(1)
if not HAS_GPU:
    # Must be set before any kernel file is imported: @triton.jit reads it when it decorates.
    os.environ["TRITON_INTERPRET"] = "1"


def _teach_the_interpreter_small_floats() -> None:
    """Triton's interpreter keeps bfloat16 as uint16 and multiplies those integers in a dot; its conversions to bfloat16
    and FP8 lose a rounding carry.

    The kernels are right on a GPU; this makes the interpreter agree, with PyTorch's conversions.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    convert, dot, cast = interpreter._convert_float, builder.create_dot, builder.cast_impl
    # Triton's dtype -> PyTorch's, and the integers that hold its bits in NumPy and in PyTorch.
    small = {
        tl.bfloat16: (torch.bfloat16, np.uint16, torch.int16),
        tl.float8e4nv: (torch.float8_e4m3fn, np.uint8, torch.uint8),
    }

    def to_float32(data, source):
        if source not in small:
            return torch.from_numpy(np.ascontiguousarray(data).astype(np.float32))
        dtype, bits, _ = small[source]
        data = np.ascontiguousarray(data).view(bits)
        return torch.from_numpy(data.view(np.int16) if bits is np.uint16 else data).view(dtype).float()

    def convert_float(data, source, target, rounding_mode):
        if source not in small and target not in small:
            return convert(data, source, target, rounding_mode)
        if source == tl.float32 or source == tl.float16:
            data = np.ascontiguousarray(data).view(np.float32 if source == tl.float32 else np.float16)
        values = to_float32(data, source)
        if target not in small:
            return values.numpy().astype(np.float32 if target == tl.float32 else np.float16)
        dtype, bits, torch_bits = small[target]
        return values.to(dtype).view(torch_bits).numpy().view(bits)

    def create_dot(self, a, b, *rest):
        a, b = (
            handle(to_float32(x.data, tl.bfloat16).numpy(), tl.float32) if x.dtype.scalar == tl.bfloat16 else x
            for x in (a, b)
        )
        return dot(self, a, b, *rest)

    def cast_impl(self, source, target):
        if target.scalar == tl.bfloat16 and source.dtype.scalar.is_int():
            source = cast(self, source, tl.float32)
        return cast(self, source, target)

    interpreter._convert_float = convert_float
    builder.create_dot, builder.cast_impl = create_dot, cast_impl


def _teach_the_interpreter_indices() -> None:
    """Triton 3.6's interpreter makes an int of an array of one element in a way that NumPy 2.4 refuses."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_lang_tensor


def _teach_the_interpreter_masks() -> None:
    """Triton's interpreter gives a comparison the dtype of what is compared: spread over a block and combined with a
    mask it is an int32, which Triton 3.9's loads and stores refuse. Compiled it is a mask.
    """
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder

    def with_bool(function, place):
        def call(self, *args, **kwargs):
            mask = args[place]
            if isinstance(mask, interpreter.TensorHandle) and mask.data.dtype != bool:
                mask = interpreter.TensorHandle(mask.data.astype(bool), interpreter.tl.int1)
            return function(self, *args[:place], mask, *args[place + 1 :], **kwargs)

        return call

    builder.create_masked_load = with_bool(builder.create_masked_load, 1)
    builder.create_masked_store = with_bool(builder.create_masked_store, 2)


if not HAS_GPU:
    _teach_the_interpreter_small_floats()
    _teach_the_interpreter_indices()
    _teach_the_interpreter_masks()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip tests marked ``gpu`` where there is none, with a reason in the summary."""
    if HAS_GPU:
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Fresh inputs in every test, reproducible by the test's order-independent seed."""
    torch.manual_seed(0)


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every uninitialised float allocation NaN, so that an element nobody wrote is seen."""

    def poisoned(allocate):
        def wrapper(*args, **kwargs):
            tensor = allocate(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return wrapper

    # torch.device as a context remembers the allocators of its first use: those must not be the ones made here.
    with torch.device("meta"):
        torch.empty(0)

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))

    from hf_paged.paging import LayerPages

    grow = LayerPages.grow

    def grow_poisoned(self, num_pages, shown=None):
        # Pages that are shown may have no memory yet.
        had = min(self.k.shape[0], self.num_poisoned) if hasattr(self, "k") else 0
        grow(self, num_pages, shown)
        self.arena.buffer[had * self.page_bytes : num_pages * self.page_bytes] = 0xFF  # NaN in every float format
        self.num_poisoned = num_pages

    monkeypatch.setattr(LayerPages, "grow", grow_poisoned)
