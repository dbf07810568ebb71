"""Which implementation a tensor takes, and the device a launch runs under."""

from contextlib import AbstractContextManager, nullcontext

import torch

TRITON_DEVICES = ("cuda", "xpu")


def uses_triton(tensor: torch.Tensor) -> bool:
    """Whether ``tensor`` takes the Triton kernels: accelerators do, CPU tensors take the PyTorch reference."""
    return tensor.device.type != "cpu"


def device_guard(tensor: torch.Tensor) -> AbstractContextManager:
    """Make ``tensor``'s device current: Triton launches on the current device, wherever its arguments live."""
    if tensor.device.type == "cpu":
        return nullcontext()
    return torch.get_device_module(tensor.device).device(tensor.device)
