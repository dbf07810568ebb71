"""Names of Gluon that differ between the versions of Triton that are served."""

from triton._C.libtriton import ir
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.hopper import tma

# Names of Triton 3.6 (right) and of 3.7 and 3.9 (left).
load_async = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
HAS_REINTERPRET = gl.constexpr(hasattr(gl.shared_memory_descriptor, "reinterpret"))


@gluon.jit
def view(smem, DTYPE: gl.constexpr, SHAPE: gl.constexpr, LAYOUT: gl.constexpr):
    """The same shared memory under another shape and layout; the method was made public in Triton 3.9."""
    if HAS_REINTERPRET:
        seen = smem.reinterpret(DTYPE, SHAPE, LAYOUT)
    else:
        seen = smem._reinterpret(DTYPE, SHAPE, LAYOUT)
    return seen


store_async = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global


@builtin
def add_async(tensor_desc, coord, src, _semantic=None):
    """Add a tile of shared memory to global memory by TMA."""
    coord = _semantic._convert_to_ir_values(coord, require_i64=False)
    _semantic.builder.create_async_tma_reduce(ir.DESCRIPTOR_REDUCE_KIND.ADD, tensor_desc.handle, coord, src.handle)


@gluon.jit
def bulk_writes_done(value):
    """``value``, once what this thread has asked TMA to write is in global memory."""
    return gl.inline_asm_elementwise(
        "cp.async.bulk.wait_group 0; mov.b32 $0, $1;", "=r,r,~{memory}", [value], dtype=gl.int32, is_pure=False, pack=1
    )
