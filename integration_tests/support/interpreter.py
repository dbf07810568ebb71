"""Repairs of Triton's interpreter, which runs kernels where there is no GPU.

``test_interpreter.py`` fails when one of them is no longer needed.
"""

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter


def repair() -> None:
    """Make the interpreter compute what a GPU does; before any kernel is imported."""
    repair_small_floats()
    repair_indices()
    repair_masks()


def repair_small_floats() -> None:
    """Triton's interpreter keeps bfloat16 as uint16 and multiplies those integers in a dot; its conversions to bfloat16
    and FP8 lose a rounding carry.

    The kernels are right on a GPU; this makes the interpreter agree, with PyTorch's conversions.
    """
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


def repair_indices() -> None:
    """Triton 3.6's interpreter makes an int of an array of one element in a way that NumPy 2.4 refuses."""
    patch = interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_lang_tensor


def repair_masks() -> None:
    """Triton's interpreter gives a comparison the dtype of what is compared: spread over a block and combined with a
    mask it is an int32, which Triton 3.9's loads and stores refuse. Compiled it is a mask.
    """
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
