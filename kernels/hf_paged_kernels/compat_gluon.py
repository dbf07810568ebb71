"""Names of Gluon that differ between the versions of Triton that are served."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
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
