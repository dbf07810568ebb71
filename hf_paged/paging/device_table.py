"""A page table on a device, kept in place: a step sends only the entries that changed."""

import torch


class DeviceTable:
    """Mirror of a page table: int32 ``[num_seqs, max_pages]`` on CPU, its counterpart on ``device``.

    The device's tensor has room for twice the pages it was made for, and is made anew only when that is full or the
    batch changes. Entries are overwritten on the current stream, behind the kernels that still read them.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.num_sent = 0
        self._sent = torch.zeros(0, 0, dtype=torch.int32)
        self._tensor = self._sent

    def update(self, table: torch.Tensor) -> torch.Tensor:
        """Bring the device's table up to ``table``; returns it, ``[num_seqs, max_pages]`` with rows further apart."""
        if self.device.type == "cpu":
            return table
        num_seqs, width = table.shape
        if num_seqs != self._sent.shape[0] or width > self._sent.shape[1]:
            capacity = max(16, 2 * width)
            # A tensor born in inference mode could not be written outside of it.
            with torch.inference_mode(False):
                self._tensor = torch.zeros(num_seqs, capacity, dtype=torch.int32, device=self.device)
            self._sent = torch.zeros(num_seqs, capacity, dtype=torch.int32)
        rows, columns = (self._sent[:, :width] != table).nonzero(as_tuple=True)
        if len(rows):
            # One transfer; the pinned memory, new each time, is used again only when the copy is done.
            changes = torch.stack([rows, columns, table[rows, columns].long()])
            changes = changes.pin_memory() if self.device.type == "cuda" else changes
            *place, values = changes.to(self.device, non_blocking=True).unbind()
            self._tensor.index_put_(tuple(place), values.int())
            self._sent[:, :width] = table
            self.num_sent += len(rows)
        return self._tensor[:, :width]
