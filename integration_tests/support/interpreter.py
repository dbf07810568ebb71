"""Repairs of Triton's interpreter, which runs kernels where there is no GPU, and what makes it quicker.

``test_interpreter.py`` fails when a repair is no longer needed.
"""

import dataclasses
import inspect
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter


def repair() -> None:
    """Make the interpreter compute what a GPU does; before any kernel is imported."""
    repair_small_floats()
    repair_indices()
    repair_masks()
    quicken()


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


def quicken() -> None:
    """Leave out what the interpreter does again and again to the same end: half of its time. Results are the same."""
    skip_overflow_checks()
    remember_numpy_dtypes()
    patch_the_language_once()
    share_types()


def skip_overflow_checks() -> None:
    """Triton's interpreter computes of each integer operation whether it overflows, for an assertion that is made when
    debugging only."""
    builder = interpreter.interpreter_builder
    assert not builder.options.debug
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)


def remember_numpy_dtypes() -> None:
    """Triton's interpreter makes the table of NumPy's dtypes again for each operation."""
    own, known = interpreter._get_np_dtype, {}

    def get_np_dtype(dtype: tl.dtype) -> np.dtype:
        name = dtype.scalar.name
        if name not in known:
            known[name] = own(dtype)
        return known[name]

    interpreter._get_np_dtype = get_np_dtype


def patch_the_language_once() -> None:
    """Triton's interpreter looks through all of triton.language, and replaces its functions by those that interpret:
    for a launch, and again for each function that a kernel calls."""
    own, is_builtin = interpreter._patch_lang, tl.core.is_builtin
    owners = (tl, tl.core, tl.math, tl.tensor, tl.core.tensor_descriptor_base)
    done = interpreter._LangPatchScope()

    def interpreted(function: Any) -> Any:
        inner = getattr(function, "__wrapped__", function)  # without the check that there is a _semantic

        def call(*args: Any, **kwargs: Any) -> Any:
            kwargs["_semantic"] = interpreter.interpreter_semantic
            return inner(*args, **kwargs)

        return call

    replacements = {
        owner: {name: interpreted(member) for name, member in inspect.getmembers(owner) if is_builtin(member)}
        for owner in owners
    }

    def patch_builtin(owner: Any, builder: Any, scope: Any) -> None:
        for name, replacement in replacements[owner].items():
            if is_builtin(getattr(owner, name)):
                scope.set_attr(owner, name, replacement)

    def patch_lang(fn: Any) -> Any:
        seen = [module for module in (tl, tl.core) if any(value is module for value in fn.__globals__.values())]
        if seen and all(module.range.__module__ == interpreter.__name__ for module in seen):
            return done
        return own(fn)

    interpreter._patch_builtin, interpreter._patch_lang = patch_builtin, patch_lang


def share_types() -> None:
    """Triton's interpreter makes a type of a block for each operation, and from it the shape of a tensor: each is made
    once, and nobody writes into them."""
    block_type, tensor = tl.core.block_type, tl.core.tensor
    make_type, make_tensor, known = block_type.__init__, tensor.__init__, {}

    def new_type(cls: type, *arguments: Any) -> Any:
        if cls is not block_type:  # layouts of Gluon
            return object.__new__(cls)
        element, shape = arguments
        key = id(element), *(x.value if isinstance(x, tl.constexpr) else x for x in shape)
        if key not in known:
            known[key] = object.__new__(cls)
            known[key].element_ty = element  # lives as long as its number is in the key
        return known[key]

    def init_type(self: Any, element_ty: Any, shape: Any) -> None:
        if "numel" not in vars(self):
            make_type(self, element_ty, shape)

    def init_tensor(self: Any, handle: Any, type: Any) -> None:
        made = vars(type).get("of_tensor")
        if made is None:
            make_tensor(self, handle, type)
            type.of_tensor = self.shape, self.numel, self.dtype
        else:
            self.handle, self.type = handle, type
            self.shape, self.numel, self.dtype = made

    block_type.__new__, block_type.__init__, tensor.__init__ = new_type, init_type, init_tensor
