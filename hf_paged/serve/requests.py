"""What a request of the protocol becomes: the arguments of ``Engine.submit``, or a reason why not."""

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import GenerationConfig

from .limits import Limits

SMALLEST_TEMPERATURE = 1e-5
"""Below it, the most likely token is taken, as in vLLM."""
PENALTY_RANGE = 2.0
"""The largest presence and frequency penalty, and the negative of the smallest, as in the OpenAI API."""
NO_EOS = (-1,)
"""For ``GenerationConfig``: no token ends a request. None would mean the model's own."""


def _is_meant(record: logging.LogRecord) -> bool:
    """Whether a line of the log is to be printed: not transformers' warning of :data:`NO_EOS`, for every request."""
    return not ("eos_token_id" in record.getMessage() and "tensor([-1]" in record.getMessage())


logging.getLogger("transformers.generation.utils").addFilter(_is_meant)


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What requests need to know of a model.

    Attributes:
        eos_token_ids: that end a sequence.
        pad_token_id: any token.
        max_model_len: tokens of a request at most.
    """

    eos_token_ids: tuple[int, ...]
    pad_token_id: int
    max_model_len: int


def constraint_of(params: Any) -> tuple[str, str] | None:
    """Kind and text of the grammar that a message asks for, for :meth:`Grammars.prepared`.

    Args:
        params: ``SamplingParams`` of the protocol.

    Raises:
        ValueError: it is of a kind that is not served.
    """
    kind = params.WhichOneof("constraint")
    if kind is None:
        return None
    if kind == "structural_tag":
        raise ValueError("structural_tag is not served: use json_schema, regex, grammar or choice.")
    if kind == "json_object":
        return ("json_object", "") if params.json_object else None
    if kind == "choice":
        return "choice", json.dumps(list(params.choice.choices))
    return kind, getattr(params, kind)


def submit_arguments(
    params: Any, num_prompt_tokens: int, facts: ModelFacts, limits: Limits, tokenizer: Any
) -> dict[str, Any]:
    """Arguments of ``Engine.submit`` but the prompt, the request's id and its grammar.

    Args:
        params: ``SamplingParams`` of vLLM's gRPC protocol; fields of numbers that are 0 were not given.
        num_prompt_tokens: of the prompt.
        facts: of the model.
        limits: of the server.
        tokenizer: finds stop strings.

    Raises:
        ValueError: a field has a value that is not served; the message names it and what is accepted.
    """
    _check(params, limits)
    eos = (() if params.ignore_eos else facts.eos_token_ids) + tuple(params.stop_token_ids)
    room = facts.max_model_len - num_prompt_tokens
    if room < 1:
        raise ValueError(
            f"the prompt has {num_prompt_tokens} tokens, the model serves {facts.max_model_len} with at least one new."
        )
    temperature = params.temperature if params.HasField("temperature") else 1.0
    do_sample = temperature >= SMALLEST_TEMPERATURE
    if params.n > 1 and not do_sample:
        raise ValueError(f"n must be 1 with temperature 0, got {params.n}: all of them would be the same.")
    options: dict[str, Any] = {
        "do_sample": do_sample,
        "num_beams": 1,
        "num_return_sequences": params.n or 1,
        "max_new_tokens": params.max_tokens if params.HasField("max_tokens") else room,
        "min_new_tokens": params.min_tokens if eos else None,
        "eos_token_id": sorted(set(eos)) or list(NO_EOS),
        "pad_token_id": facts.pad_token_id,
        "repetition_penalty": params.repetition_penalty or 1.0,
        # What was not given is none of the model's defaults: the gateway has filled these in.
        "temperature": temperature if do_sample else 1.0,
        "top_p": (params.top_p or 1.0) if do_sample else 1.0,
        "top_k": params.top_k if do_sample else 50,  # transformers warns of another number where it does nothing
        "min_p": params.min_p if do_sample else None,
    }
    if params.stop:
        options["stop_strings"] = list(params.stop)
    return {
        "generation_config": GenerationConfig(**options),
        "seed": params.seed % 2**64 if params.HasField("seed") else None,
        "tokenizer": tokenizer if params.stop else None,
        "logprobs": params.logprobs if params.HasField("logprobs") else None,
        "prompt_logprobs": params.prompt_logprobs if params.HasField("prompt_logprobs") else None,
        "presence_penalty": params.presence_penalty,
        "frequency_penalty": params.frequency_penalty,
        "logit_bias": dict(params.logit_bias) or None,
        "deadline_s": limits.request_seconds,
    }


def _check(params: Any, limits: Limits) -> None:
    """Raises ValueError: see :func:`submit_arguments`."""

    def need(name: str, is_accepted: Callable[[Any], bool], accepted: str) -> None:
        value = getattr(params, name)
        if not is_accepted(value):
            raise ValueError(f"{name} must be {accepted}, got {value!r}.")

    need("temperature", lambda x: 0 <= x < float("inf"), "a finite number of at least 0")
    need("top_p", lambda x: 0 <= x <= 1, "above 0 and at most 1")
    need("min_p", lambda x: 0 <= x <= 1, "0 to 1")
    need("repetition_penalty", lambda x: 0 <= x < float("inf"), "a finite number above 0")
    for name in ("presence_penalty", "frequency_penalty"):
        need(name, lambda x: -PENALTY_RANGE <= x <= PENALTY_RANGE, f"-{PENALTY_RANGE} to {PENALTY_RANGE}")
    need("n", lambda x: x <= limits.n, f"at most {limits.n}")
    for name in ("logprobs", "prompt_logprobs"):
        need(name, lambda x: 0 <= x <= limits.logprobs, f"0 to {limits.logprobs}")
    if params.HasField("max_tokens"):
        need("max_tokens", lambda x: x >= 1, "at least 1")
    if params.HasField("truncate_prompt_tokens"):
        raise ValueError("truncate_prompt_tokens is not served: send a shorter prompt.")
    if len(params.stop) > limits.stops or any(len(stop) > limits.stop_length or not stop for stop in params.stop):
        raise ValueError(f"stop must have at most {limits.stops} texts of 1 to {limits.stop_length} characters.")
    if params.stop and params.min_tokens:
        raise ValueError("min_tokens with stop strings is not served: leave one out, or use stop_token_ids.")
    if len(params.logit_bias) > limits.biases:
        raise ValueError(f"logit_bias must name at most {limits.biases} tokens, got {len(params.logit_bias)}.")
