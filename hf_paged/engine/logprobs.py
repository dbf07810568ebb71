"""Log-probabilities that a request asked for: of the model's own distribution, before any processor."""

import dataclasses

import torch


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


def token_logprobs(logits: torch.Tensor, token_ids: torch.Tensor, num_top: int) -> list[TokenLogprobs]:
    """Log-probabilities of one token a row, from the float32 log-softmax of the logits.

    Args:
        logits: ``[num_rows, vocab]``, any float dtype.
        token_ids: ``[num_rows]`` int64; a negative id has log-probability NaN.
        num_top: how many of the best to report, at most the vocabulary.
    """
    logprobs = logits.float().log_softmax(dim=-1)
    chosen = logprobs.gather(1, token_ids.clamp(min=0)[:, None])[:, 0].masked_fill(token_ids < 0, torch.nan)
    top = logprobs.topk(min(num_top, logprobs.shape[-1]), dim=-1)
    return [
        TokenLogprobs(token, logprob, tuple(ids), tuple(values))
        for token, logprob, ids, values in zip(
            token_ids.tolist(), chosen.tolist(), top.indices.tolist(), top.values.tolist()
        )
    ]


def prompt_logprobs(logits: torch.Tensor, next_ids: torch.Tensor, num_top: int) -> list[TokenLogprobs]:
    """Log-probabilities of a chunk of the prompt.

    Args:
        logits: ``[L, vocab]`` at positions whose next token is known.
        next_ids: ``[L]`` int64, that next token. The prompt's first token has no log-probability.
        num_top: as in :func:`token_logprobs`.
    """
    return token_logprobs(logits, next_ids, num_top)
