"""Presence and frequency penalties, as a logits processor: what the device does for rows that it serves alone."""

import torch
from transformers import LogitsProcessor


class CountPenalties(LogitsProcessor):
    """Lowers the logits of generated tokens: by ``frequency`` times how often they came, and once by ``presence``.

    OpenAI's and vLLM's definition: tokens of the prompt do not count.

    Args:
        presence, frequency: penalties; negative ones make tokens likelier.
        prompt_length: tokens of the prompt.
    """

    def __init__(self, presence: float, frequency: float, prompt_length: int) -> None:
        self.presence, self.frequency, self.prompt_length = presence, frequency, prompt_length

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """``scores`` ``[n, vocab]`` of histories ``[n, L]``."""
        generated = input_ids[:, self.prompt_length :]
        counts = torch.zeros_like(scores).scatter_add_(1, generated, torch.ones_like(generated, dtype=scores.dtype))
        return torch.where(counts > 0, scores - self.frequency * counts - self.presence, scores)
