"""Stopping criteria beyond eos and the maximum length, asked one sequence at a time with its full history."""

import numpy as np
import torch

from .request_params import RequestParams
from .stop_strings import StopStrings


def history_tensor(rules: RequestParams, tokens: np.ndarray, device: torch.device) -> torch.Tensor:
    """What processors and criteria are called with: ``[1, L]`` int64, a copy, the sequence's padding first.

    Args:
        rules: of the sequence's request.
        tokens: ``[num_tokens]`` int64, prompt and generated tokens.
        device: where the logits are.
    """
    padded = np.concatenate([np.array(rules.padding_ids, dtype=np.int64), tokens])
    return torch.from_numpy(padded)[None].to(device)


def stop_reason(rules: RequestParams, tokens: np.ndarray) -> int | str | None:
    """What ended a sequence that has stopped: the eos token, or a stop string; None: a criterion of the request's own.

    Args:
        rules: of the sequence's request.
        tokens: ``[num_tokens]`` int64, prompt and generated tokens.
    """
    if int(tokens[-1]) in rules.eos_token_ids:
        return int(tokens[-1])
    found = (criterion.found(tokens) for criterion in rules.criteria if type(criterion) is StopStrings)
    return next((text for text in found if text is not None), None)


def is_stopped(rules: RequestParams, tokens: np.ndarray, device: torch.device) -> bool:
    """Whether any of the request's criteria ends this sequence after its last token.

    Every criterion is called at every token, as ``generate()`` does: some of them count.
    """
    in_text = [criterion.is_stopped(tokens) for criterion in rules.criteria if type(criterion) is StopStrings]
    others = [criterion for criterion in rules.criteria if type(criterion) is not StopStrings]
    # Stop strings need no device, and no padding.
    ids = history_tensor(rules, tokens, device) if others else None
    answers = [criterion(ids, None) for criterion in others]
    return any(in_text) or any(bool(torch.as_tensor(answer).all()) for answer in answers)
