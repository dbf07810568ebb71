"""Log-probabilities that a request asked for: of the model's own distribution, before any processor."""

import dataclasses

import torch
from hf_paged_kernels.sampling.reference import log_sum_exp

from ..async_copy import HostCopy


@dataclasses.dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probability of a token at one position, and of the most likely tokens there.

    Attributes:
        token_id: the token that stands there.
        logprob: its log-probability given everything before it.
        top_ids: the most likely tokens, best first.
        top_logprobs: their log-probabilities.
    """

    token_id: int
    logprob: float
    top_ids: tuple[int, ...] = ()
    top_logprobs: tuple[float, ...] = ()


class PendingLogprobs:
    """Log-probabilities of one token a row that are on their way to the host.

    Args:
        logits: ``[num_rows, vocab]``, any float dtype, not read later.
        token_ids: ``[num_rows]`` int64; a negative id has log-probability NaN.
        counts: for each row, how many of the best to report, at most the vocabulary.
        lse: ``[num_rows]`` float64, log-sum-exp of the logits; None: not known.
    """

    def __init__(
        self, logits: torch.Tensor, token_ids: torch.Tensor, counts: list[int], lse: torch.Tensor | None = None
    ) -> None:
        if lse is None:
            lse = log_sum_exp(logits)
        chosen = (logits.gather(1, token_ids.clamp(min=0)[:, None])[:, 0].double() - lse).float()
        top_values, top_ids = _best(logits, min(max(counts, default=0), logits.shape[-1]))
        self._counts = counts
        self._chosen = HostCopy(chosen.masked_fill(token_ids < 0, torch.nan))
        self._tokens, self._top_ids = HostCopy(token_ids), HostCopy(top_ids)
        self._top = HostCopy((top_values.double() - lse[:, None]).float())

    def wait(self) -> list[TokenLogprobs]:
        """Those of each row; blocks until they have been computed, and no longer."""
        columns = (self._tokens.wait(), self._chosen.wait(), self._top_ids.wait(), self._top.wait())
        return [
            TokenLogprobs(token, logprob, tuple(ids[:count]), tuple(values[:count]))
            for count, token, logprob, ids, values in zip(self._counts, *(column.tolist() for column in columns))
        ]


def _best(logits: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """``(values, ids)``, both ``[num_rows, count]``: the largest logits, best first, equal ones by id.

    So the first is what greedy decoding takes. ``topk`` alone gives equal logits in any order, and of those that are
    equal to the last any.
    """
    if count == 0:
        return logits.topk(0, dim=-1)
    values, ids = logits.topk(count, dim=-1)
    by_id = ids.argsort(dim=-1)
    values, ids = values.gather(1, by_id), ids.gather(1, by_id)
    order = values.argsort(dim=-1, descending=True, stable=True)
    values, ids = values.gather(1, order), ids.gather(1, order)
    ids[:, 0] = logits.argmax(dim=-1)  # all of the best may be equal, and the first not among them
    return values, ids


def token_logprobs(logits: torch.Tensor, token_ids: torch.Tensor, num_top: int) -> list[TokenLogprobs]:
    """:class:`PendingLogprobs` with ``num_top`` of the best in every row, at once."""
    return PendingLogprobs(logits, token_ids, [num_top] * len(token_ids)).wait()


def prompt_logprobs(logits: torch.Tensor, next_ids: torch.Tensor, num_top: int) -> list[TokenLogprobs]:
    """Log-probabilities of a chunk of the prompt.

    Args:
        logits: ``[L, vocab]`` at positions whose next token is known.
        next_ids: ``[L]`` int64, that next token. The prompt's first token has no log-probability.
        num_top: as in :func:`token_logprobs`.
    """
    return token_logprobs(logits, next_ids, num_top)
