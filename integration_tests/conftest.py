"""Shared fixtures: Triton's interpreter without a GPU, NaN-poisoned allocations, a visible skip for GPU tests."""

import os

import numpy as np
import pytest
import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    # Must be set before any kernel file is imported: @triton.jit reads it when it decorates.
    os.environ["TRITON_INTERPRET"] = "1"


def _teach_the_interpreter_bfloat16() -> None:
    """Triton's interpreter keeps bfloat16 as uint16, multiplies those integers in ``tl.dot`` and drops a rounding carry.

    The kernels are right on a GPU; this makes the interpreter agree, so that bfloat16 is tested on CPU as well.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    def to_float32(bits: np.ndarray) -> np.ndarray:
        return (bits.view(np.uint16).astype(np.uint32) << 16).view(np.float32)

    def to_bfloat16(values: np.ndarray) -> np.ndarray:
        tensor = torch.from_numpy(np.ascontiguousarray(values).view(np.float32).reshape(values.shape))
        return tensor.to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)

    convert, dot = interpreter._convert_float, interpreter.InterpreterBuilder.create_dot

    def convert_float(data, source, target, rounding_mode):
        if source == tl.float32 and target == tl.bfloat16:
            return to_bfloat16(data)
        if source == tl.bfloat16 and target == tl.float32:
            return to_float32(np.ascontiguousarray(data))
        return convert(data, source, target, rounding_mode)

    def create_dot(self, a, b, *rest):
        a, b = (
            interpreter.TensorHandle(to_float32(np.ascontiguousarray(x.data)), tl.float32)
            if x.dtype.scalar == tl.bfloat16
            else x
            for x in (a, b)
        )
        return dot(self, a, b, *rest)

    interpreter._convert_float = convert_float
    interpreter.InterpreterBuilder.create_dot = create_dot


def _teach_the_interpreter_indices() -> None:
    """Triton 3.6's interpreter makes an int of an array of one element in a way that NumPy 2.4 refuses; 3.7 does not."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_lang_tensor


if not HAS_GPU:
    _teach_the_interpreter_bfloat16()
    _teach_the_interpreter_indices()


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

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))
