"""Stands for a Hopper GPU on a machine without one: kernels are compiled for it, launched, and never run.

Launch functions take the path that they take on a GPU, down to Triton's C launcher, in whose place ``Launches`` counts
the calls and keeps the last ones. Tensors stay in host memory. For host times and tests of launches; a process that
called ``pretend_hopper`` computes nothing.
"""

from collections import deque
from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia


class Launches:
    """The C side of Triton's driver: what it is asked to do, is noted in ``calls``."""

    def __init__(self) -> None:
        self.calls: deque[tuple] = deque(maxlen=16)
        self.num_calls = 0

    def launch(self, *arguments: Any) -> None:
        """Triton 3.7 and newer pass the arguments of the kernel as the last one."""
        self.num_calls += 1
        self.calls.append((*arguments[:-1], tuple(arguments[-1])) if isinstance(arguments[-1], list) else arguments)

    def fill_tma_descriptor_tiled(self, *arguments: Any) -> tuple:
        """A descriptor is what it was made of."""
        pointer, swizzle, size, kind, block, shape, strides, padding = arguments
        return ("descriptor", pointer, swizzle, size, kind, tuple(block), tuple(shape), tuple(strides), padding)

    fill_tma_descriptor = fill_tma_descriptor_tiled

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple:
        """A module, a function, registers, spills, the most threads."""
        return object(), 1, 0, 0, 1024

    def build_signature_metadata(self, signature: list[str]) -> bytes:
        """How the C launcher reads its arguments."""
        return "|".join(signature).encode()

    def get_device_properties(self, device: int) -> dict[str, int]:
        """Those that Triton asks for."""
        return {"max_shared_mem": 227 * 1024}

    def unload_module(self, module: object) -> None:
        """There is nothing to unload."""


class Driver:
    """Triton's driver of a GPU of capability 9.0."""

    launcher_cls = nvidia.CudaLauncher

    def __init__(self) -> None:
        self.utils = Launches()

    def get_current_device(self) -> int:
        """The only one."""
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        """Its address."""
        return 7

    def get_current_target(self) -> GPUTarget:
        """What kernels are compiled for."""
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self) -> torch.device:
        """Where the tensors are."""
        return torch.device("cpu")


def pretend_hopper() -> Launches:
    """Make Triton and the package see such a GPU, for the rest of the process."""
    driver = Driver()
    triton.runtime.driver.set_active(driver)
    # Triton 3.6 compiles a C launcher for each signature, newer ones describe signatures by these.
    nvidia.library_dirs = list
    nvidia.compile_module_from_src = lambda *_, **__: SimpleNamespace(launch=driver.utils.launch)
    nvidia.PyKernelArg = lambda nested_tuple, type: (nested_tuple, type)
    nvidia.ARG_CONSTEXPR, nvidia.ARG_KERNEL, nvidia.ARG_TUPLE = range(3)

    from hf_paged_kernels import backend, checks, dependent_launch_triton, settings
    from hf_paged_kernels.attention import ops

    yes = lambda *_: True  # noqa: E731
    settings.multiprocessors = lambda device: 132
    settings.shared_memory_limit = lambda device: 227 * 1024
    settings.flash_backward_settings = lambda device, dim, v_dim, size: settings.choose_flash_backward_settings(
        max(dim, v_dim), size, 227 * 1024, True
    )
    dependent_launch_triton.has_dependent_launch = yes
    backend.on_nvidia = backend.has_gluon = ops.uses_triton = yes
    checks.may_read_values = lambda *_: False
    return driver.utils
