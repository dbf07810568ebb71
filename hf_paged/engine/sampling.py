"""The vectorised path: greedy and plainly sampled rows of a batch, chosen together, whatever their parameters are."""

from typing import Any

import numpy as np
import torch
from hf_paged_kernels.sampling_reference import choose_tokens, gumbel_noise, warp_logits

from .token_rules import Sampling, TokenRules
from .transfers import send

FIELDS: dict[str, tuple[Any, float]] = {
    "do_sample": (np.bool_, False),
    "temperature": (np.float32, 1.0),
    "top_k": (np.int64, 0),
    "top_p": (np.float64, 1.0),  # float64: 1 - top_p must round as it does in transformers
    "min_p": (np.float32, 0.0),
    "seed": (np.int64, 0),
}
"""Parameters of a slot: dtype and the value that changes nothing."""


class SlotSampling:
    """Sampling parameters of every slot, as one array each, and the choice of tokens from them.

    A row's token depends on its logits, its parameters, its seed and its position only.
    """

    def __init__(self, num_slots: int, device: torch.device) -> None:
        self.device = device
        self.values: dict[str, np.ndarray] = {
            name: np.full(num_slots, neutral, dtype) for name, (dtype, neutral) in FIELDS.items()
        }
        self._token_ids = torch.empty(0, dtype=torch.int32, device=device)

    def grow(self, num_slots: int) -> None:
        """Make room for more slots."""
        for name, (dtype, neutral) in FIELDS.items():
            old = self.values[name]
            self.values[name] = np.concatenate([old, np.full(num_slots - len(old), neutral, dtype)])

    def set(self, slot: int, rules: TokenRules, row: int) -> None:
        """Take over the parameters of a row; a row with processors of its own has only a seed here."""
        sampling = rules.plain or Sampling(do_sample=rules.do_sample)
        for name in FIELDS:
            if name != "seed":
                self.values[name][slot] = getattr(sampling, name)
        seed = rules.seed_of_row(row)
        self.values["seed"][slot] = seed - 2**64 if seed >= 2**63 else seed

    def choose(self, logits: torch.Tensor, slots: np.ndarray, positions: np.ndarray) -> torch.Tensor:
        """The next token of each row.

        Args:
            logits: ``[num_rows, vocab]``, any float dtype, not written.
            slots: ``[num_rows]`` int; a slot may occur more than once, at different positions.
            positions: ``[num_rows]`` int64, index of the new token in its sequence.

        Returns:
            ``[num_rows]`` int64; ``INVALID_TOKEN`` where no token can be chosen.
        """
        is_sampled = self.values["do_sample"][slots]
        if not is_sampled.any():
            return choose_tokens(logits)  # widening to float32 changes neither the order nor the ties
        if is_sampled.all():
            return self._draw(logits.float(), slots, positions)
        token_ids = torch.empty(len(slots), dtype=torch.int64, device=logits.device)
        for rows, drawn in ((np.flatnonzero(is_sampled), True), (np.flatnonzero(~is_sampled), False)):
            index = send(rows, logits.device)
            chosen = (
                self._draw(logits[index].float(), slots[rows], positions[rows])
                if drawn
                else choose_tokens(logits[index])
            )
            token_ids[index] = chosen
        return token_ids

    def noise(self, slots: np.ndarray, positions: np.ndarray, vocab_size: int) -> torch.Tensor:
        """Gumbel noise ``[num_rows, vocab]`` of rows at their positions."""
        return gumbel_noise(self._column("seed", slots), self._to_device(positions), self.token_ids(vocab_size))

    def token_ids(self, vocab_size: int) -> torch.Tensor:
        """0 to ``vocab_size - 1`` as int32 on the device."""
        if len(self._token_ids) < vocab_size:
            self._token_ids = torch.arange(vocab_size, dtype=torch.int32, device=self.device)
        return self._token_ids[:vocab_size]

    def _draw(self, logits: torch.Tensor, slots: np.ndarray, positions: np.ndarray) -> torch.Tensor:
        # A parameter that no row of the batch uses is left out; left out or neutral, a row's scores are the same.
        top_k = self.values["top_k"][slots]
        scores = warp_logits(
            logits,
            temperature=self._used("temperature", slots),
            top_k=self._used("top_k", slots),
            max_top_k=int(top_k.max()),
            top_p=self._used("top_p", slots),
            min_p=self._used("min_p", slots),
        )
        return choose_tokens(scores, self.noise(slots, positions, logits.shape[-1]))

    def _used(self, name: str, slots: np.ndarray) -> torch.Tensor | None:
        return self._column(name, slots) if (self.values[name][slots] != FIELDS[name][1]).any() else None

    def _column(self, name: str, slots: np.ndarray) -> torch.Tensor:
        return self._to_device(self.values[name][slots])

    def _to_device(self, values: np.ndarray) -> torch.Tensor:
        return send(values, self.device)
