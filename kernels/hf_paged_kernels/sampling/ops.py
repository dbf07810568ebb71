"""The choice of tokens as a ``torch.library`` custom op (namespace ``hf_paged``), with its fake implementation."""

from typing import Any

import torch

from ..backend import uses_triton
from ..eager import eager_op
from .reference import sample_tokens_reference


@eager_op("hf_paged::sample_tokens", mutates_args=("rules", "last_token"))
def sample_tokens_op(
    logits: torch.Tensor,
    slots: torch.Tensor,
    positions: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    seeds: torch.Tensor,
    wants_lse: torch.Tensor,
    rules: torch.Tensor,
    last_token: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The next token of each row, greedy or drawn, by parameters in tables by slot.

    On an accelerator nothing is read back to the host: it can be captured in a graph that serves rows of any
    parameters. Tokens are those of :func:`~.reference.sample_tokens_reference`, the path of CPU tensors, but
    for borders: tokens and tiles are judged by sums of probabilities, of which both round a little. So where the noise
    favours a token whose cumulated probability (from the least likely token, itself included) is within 1e-5 of
    ``1 - top_p``, or whose probability is within 1e-5, relatively, of ``min_p`` times the largest, it may be kept by
    one and removed by the other; and of two tiles that are within 1e-5 of each other, noise included, either may be
    drawn. Ties at the border of top-p are removed by rising id, as a stable sort has them.

    Args:
        logits: ``[num_rows, vocab]`` any float dtype, rows contiguous; not written.
        slots: ``[num_rows]`` int64: where a row's parameters are.
        positions: ``[num_rows]`` int64: index of the new token in its sequence; ``[num_slots]`` with ``last_token``.
        temperature: ``[num_slots]`` float64; 0: the token with the largest logit, the first of equal ones.
        top_k: ``[num_slots]`` int64; 0: all. Ties with the k-th logit are kept.
        top_p: ``[num_slots]`` float64; 1: all.
        min_p: ``[num_slots]`` float64; 0: all. Temperature and min_p are rounded to float32, as scores are.
        seeds: ``[num_slots]`` int64.
        wants_lse: ``[num_slots]`` int64, not 0 where the second result is asked for.
        rules: ``[num_slots, ...]`` int64, rows of :func:`~.reference.slot_rules` with room for the vocabulary: biases,
            penalties, masks and suppressed tokens. Tokens that are chosen are marked and counted there.
        last_token: ``[num_slots]`` int64: where the token of each slot is noted, 0 for :data:`INVALID_TOKEN`; or None.

    Returns:
        Tokens ``[num_rows]`` int64; ``INVALID_TOKEN`` for a row with a NaN logit, and for a drawn row without any
        finite score or with an infinite one. And float64 ``[num_rows]``, the log-sum-exp of the logits as they are
        without rules: a token's logit less that is its log-probability; NaN where it was not asked for.
    """
    arguments = (logits, slots, positions, temperature, top_k, top_p, min_p, seeds, wants_lse, rules, last_token)
    if not uses_triton(logits):
        return sample_tokens_reference(*arguments)
    from .choose_triton import sample_tokens_launch

    return sample_tokens_launch(*arguments)


@sample_tokens_op.register_fake
def _(logits: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    num_rows = logits.shape[0]
    return logits.new_empty(num_rows, dtype=torch.int64), logits.new_empty(num_rows, dtype=torch.float64)
