"""Beam search and beam sampling of one request, with the sequences and scores of transformers' own.

Beams live in a fixed number of rows. A step takes the logits of every row and says which row each new beam continues
(``parents``) and with which token; the keys and values of a parent are shared by its children, never copied here. ::

    rows      0    1    2          scores [num_beams * vocab] = log-probabilities + score of the row
              |\\   |                best (1 + num_eos) * num_beams of them, at least 2 * num_beams: candidates
              | \\  |                candidates that end and are among the first num_beams: finished list
    parents  [0,  0,  1]           the best num_beams candidates that do not end: the rows of the next step

Candidates are drawn without replacement when the config samples: by the largest scores plus Gumbel noise (Kool, van
Hoof, Welling 2019), which has the distribution of transformers' ``torch.multinomial`` without replacement.
"""

import dataclasses
from collections.abc import Sequence

import torch
from hf_paged_kernels.sampling.reference import gumbel_noise

from ...errors import InvalidScoresError
from ...transformers_internals import sorts_drawn_beams
from .request_params import RequestParams

NEVER = -1.0e9
"""Score of what must not be chosen; transformers' own value, since it is added to scores that are then compared."""


@dataclasses.dataclass(frozen=True, slots=True)
class BeamStep:
    """What a step makes of the rows.

    Attributes:
        parents: for each row of the next step, the row of this step that it continues.
        tokens: its new token.
        is_done: no further step can change the result; parents and tokens need not be carried out.
    """

    parents: list[int]
    tokens: list[int]
    is_done: bool


@dataclasses.dataclass(frozen=True, slots=True)
class BeamSequence:
    """A finished sequence.

    Attributes:
        token_ids: new tokens, eos included, without padding.
        score: its log-probability divided by ``length ** length_penalty``.
        beam_indices: the row of each new token, as ``generate()`` reports them.
    """

    token_ids: list[int]
    score: float
    beam_indices: list[int]


class BeamSearch:
    """The beams of one request.

    Args:
        rules: of a request with ``mode`` "beams".
        prompt_ids: ``[L]`` its prompt, without padding.
    """

    def __init__(self, rules: RequestParams, prompt_ids: Sequence[int]) -> None:
        self.rules = rules
        config = rules.config
        self.num_beams: int = config.num_beams
        self.early_stopping: bool | str = config.early_stopping
        self.length_penalty: float = config.length_penalty
        self.prompt_length = len(rules.padding_ids) + len(prompt_ids)
        self.max_length = self.prompt_length - len(prompt_ids) + rules.max_length
        self.num_candidates = max(2, 1 + len(rules.eos_token_ids)) * self.num_beams
        # Histories as processors and criteria see them, padding first: [num_beams, length]
        self.histories = torch.tensor([[*rules.padding_ids, *prompt_ids]] * self.num_beams, dtype=torch.int64)
        self.beam_indices = torch.empty(self.num_beams, 0, dtype=torch.int64)
        # Only the first beam counts at the first step, where all rows are equal.
        self.scores = torch.tensor([0.0] + [NEVER] * (self.num_beams - 1), dtype=torch.float32)
        # The finished list, best first, filled up with entries that any finished sequence replaces.
        self.finished_scores = torch.full((self.num_beams,), NEVER, dtype=torch.float32)
        self.is_finished = torch.zeros(self.num_beams, dtype=torch.bool)
        self.finished: list[BeamSequence] = [BeamSequence([], NEVER, [])] * self.num_beams
        self.can_improve = True

    @property
    def length(self) -> int:
        """Tokens of each row, padding included."""
        return self.histories.shape[1]

    def step(self, logits: torch.Tensor) -> BeamStep:
        """Extend the beams by one token.

        Args:
            logits: ``[num_beams, vocab]`` of the rows in order, any float dtype; ``[1, vocab]`` at the first step.

        Raises:
            InvalidScoresError: the scores have NaN.
            Exception: what a processor or criterion raised.
        """
        scores, tokens, parents = self._candidates(logits.expand(self.num_beams, -1))
        histories = torch.cat([self.histories[parents], tokens[:, None]], dim=1)  # [num_candidates, length + 1]
        beam_indices = torch.cat([self.beam_indices[parents], parents[:, None]], dim=1)
        ends = self._ends(histories.to(logits.device)).cpu()

        # Sequences that end must not run on.
        running_scores = scores + ends.float() * NEVER
        chosen = running_scores.topk(self.num_beams).indices
        self._finish(scores, ends, histories, beam_indices)
        self.histories, self.beam_indices = histories[chosen], beam_indices[chosen]
        self.scores = running_scores[chosen]
        self.can_improve = self.can_improve and self._improvement_is_possible()
        is_full = bool(self.is_finished.all()) and self.early_stopping is True
        is_done = not self.can_improve or is_full or bool(ends.all())
        return BeamStep(parents[chosen].tolist(), tokens[chosen].tolist(), is_done)

    def finalize(self) -> list[BeamSequence]:
        """The ``num_return_sequences`` best sequences, best first."""
        return self.finished[: self.rules.num_return_sequences]

    def _candidates(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Scores, tokens and parent rows of the candidates, ``[num_candidates]`` each, on the host."""
        log_probs = logits.float().log_softmax(dim=-1)
        log_probs = self.rules.processed(0, self.histories.to(logits.device), log_probs)
        vocab_size = log_probs.shape[-1]
        log_probs = (log_probs + self.scores.to(log_probs.device)[:, None]).flatten()  # [num_beams * vocab]
        if self.rules.do_sample:
            scores, flat = self._drawn(log_probs)
        else:
            scores, flat = log_probs.topk(min(self.num_candidates, len(log_probs)))
        scores, flat = scores.cpu(), flat.cpu()
        if scores.isnan().any():
            raise InvalidScoresError("no beam can be continued: the model's logits, or a logits processor, gave NaN.")
        return scores, flat % vocab_size, flat // vocab_size

    def _drawn(self, log_probs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        # The distribution that is drawn from is the softmax of the scores, which keeps their differences.
        seed = self.rules.seed - 2**64 if self.rules.seed >= 2**63 else self.rules.seed
        position = self.length - len(self.rules.padding_ids)
        device = log_probs.device
        noise = gumbel_noise(
            torch.tensor([seed], device=device),
            torch.tensor([position], device=device),
            torch.arange(len(log_probs), dtype=torch.int32, device=device),
        )[0]
        flat = (log_probs + noise).topk(self.num_candidates).indices
        if sorts_drawn_beams():
            flat = flat[log_probs[flat].argsort(descending=True, stable=True)]
        return log_probs[flat], flat

    def _ends(self, histories: torch.Tensor) -> torch.Tensor:
        """Which candidates ``[num_candidates, length]`` a criterion ends; eos and maximum length are criteria too."""
        ends = torch.zeros(len(histories), dtype=torch.bool, device=histories.device)
        for criterion in self.rules.all_criteria:
            ends = ends | torch.as_tensor(criterion(histories, None), device=histories.device)
        return ends

    def _finish(
        self, scores: torch.Tensor, ends: torch.Tensor, histories: torch.Tensor, beam_indices: torch.Tensor
    ) -> None:
        """Merge the candidates that end into the finished list, if they are among the ``num_beams`` best."""
        ends = ends & (torch.arange(len(ends)) < self.num_beams)
        scores = scores / (histories.shape[1] - self.prompt_length) ** self.length_penalty
        is_full = bool(self.is_finished.all()) and self.early_stopping is True
        # One addition after the other, as transformers does: the sums are compared with each other.
        scores = scores + float(is_full) * NEVER
        scores = scores + float(not self.can_improve) * NEVER
        scores = scores + (~ends).float() * NEVER

        merged = torch.cat([self.finished_scores, scores])
        kept = merged.topk(self.num_beams).indices
        self.finished_scores = merged[kept]
        self.is_finished = torch.cat([self.is_finished, ends])[kept]
        before, self.finished = self.finished, []
        for index, score in zip(kept.tolist(), self.finished_scores.tolist()):
            if index < self.num_beams:
                self.finished.append(before[index])
                continue
            candidate = index - self.num_beams
            new_tokens = histories[candidate, self.prompt_length :].tolist()
            self.finished.append(BeamSequence(new_tokens, score, beam_indices[candidate].tolist()))

    def _improvement_is_possible(self) -> bool:
        """Whether a running beam may still beat the worst finished one.

        With ``early_stopping`` "never" and a positive length penalty the best length is the longest; else transformers
        takes the present one.
        """
        best_length = self.length - self.prompt_length
        if self.early_stopping == "never" and self.length_penalty > 0.0:
            best_length = self.max_length - self.prompt_length
        best = self.scores[0] / best_length**self.length_penalty
        worst = torch.where(self.is_finished, self.finished_scores.min(), torch.tensor(NEVER, dtype=torch.float32))
        return bool((best > worst).any())
