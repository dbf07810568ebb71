"""Several processes on one evaluation: `accelerate launch --num_processes 2 -m eval.perplexity ...`.

Batches of windows are dealt to the processes in turn and put together again in order. A batch holds the same windows
whatever the number of processes, so its figures have the same bits. Not so on the path "engine": there windows that are
under way at the same time share a step, and agree with those of another number of processes up to rounding.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class Processes:
    """The processes of a run.

    Attributes:
        rank: the number of this one.
        count: how many there are.
        device: this process's device, None where the caller chooses.
    """

    rank: int = 0
    count: int = 1
    device: torch.device | None = None

    @classmethod
    def of_environment(cls, device: str | None = None) -> "Processes":
        """The processes that `accelerate launch` (or torchrun) started; one where nobody did.

        Args:
            device: "cpu" where the processes are to talk over the CPU even if there are GPUs.

        Raises:
            ImportError: the environment says there are several, and accelerate is not installed.
        """
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return cls()
        try:
            from accelerate import PartialState
        except ImportError as error:
            raise ImportError('several processes (WORLD_SIZE) need accelerate: pip install "hf-paged[eval]"') from error
        state = PartialState(cpu=device == "cpu")
        return cls(state.process_index, state.num_processes, state.device)

    @property
    def is_main(self) -> bool:
        """Whether this process writes and prints."""
        return self.rank == 0

    def end(self) -> None:
        """Part from the others: a process that ends while the threads of its connections run may be aborted."""
        if self.count > 1:
            from accelerate import PartialState

            PartialState().destroy_process_group()

    def gather(self, items: Sequence[Any]) -> list[Any]:
        """The items of all processes, in every process, those of process 0 first."""
        if self.count == 1:
            return list(items)
        from accelerate.utils import gather_object

        return gather_object(list(items))
