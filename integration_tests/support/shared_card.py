"""One GPU for several test processes: who holds the card, and how much of it an engine may count on.

A test holds the card together with others, or alone where it fills the card or counts its free bytes (marker
``whole_card``). Locks are of files: they end with their process, and hold between separate runs too.
"""

import fcntl
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch


class Card:
    """A card that tests hold together or alone.

    Args:
        folder: of the two lock files.
        name: of the card; processes with the same name share it.
    """

    def __init__(self, folder: Path, name: str) -> None:
        # "gate": who wants the card alone closes it and waits; without it those who share would follow one another.
        self._gate, self._card = (folder / f"{name}-{part}.lock" for part in ("gate", "card"))

    @contextmanager
    def held(self, *, alone: bool) -> Iterator[None]:
        """Wait for the card, and hold it."""
        kind = fcntl.LOCK_EX if alone else fcntl.LOCK_SH
        with self._gate.open("a") as gate, self._card.open("a") as card:
            fcntl.flock(gate, kind)
            fcntl.flock(card, kind)
            fcntl.flock(gate, fcntl.LOCK_UN)
            yield


def this_card() -> Card:
    """The cards that this process sees, as one."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "all").replace(",", "+").replace("/", "_")
    return Card(Path(tempfile.gettempdir()), f"hf_paged-tests-{os.getuid()}-{visible}")


def equal_share(free_bytes: Callable[[torch.device], int], num_processes: int) -> Callable[[torch.device], int]:
    """``free_bytes`` of a device, at most an equal share of a GPU's memory for each process."""

    def share(device: torch.device) -> int:
        free = free_bytes(device)
        if device.type != "cuda":
            return free
        return min(free, torch.cuda.mem_get_info(device)[1] // num_processes)

    return share
