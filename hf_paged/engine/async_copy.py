"""Small arrays between host and device without waiting: through pinned memory, in the order of the current stream."""

import numpy as np
import torch


def send(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """A tensor on ``device``; nothing waits for it. On a CPU it may share the array's memory."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


class HostCopy:
    """A tensor on its way to the host."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        self._host = tensor
        if tensor.device.type == "cuda":
            self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._host.copy_(tensor, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(tensor.device))

    @property
    def is_here(self) -> bool:
        """Whether :meth:`wait` would not block."""
        return self._event is None or self._event.query()

    def wait(self) -> np.ndarray:
        """Its values; blocks until the work queued before it is done, and no longer."""
        if self._event is not None:
            self._event.synchronize()
        return self._host.cpu().numpy()
