"""Requests run one at a time through a model's plain dense forward: the selection code without the engine around it."""

from typing import Any

import numpy as np
import torch
from hf_paged_kernels.sampling.reference import gumbel_noise
from transformers import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    GenerationConfig,
    LogitsProcessor,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from hf_paged.engine.sampling.beam_search import BeamSearch, BeamSequence
from hf_paged.engine.sampling.token_selector import INVALID_TOKEN, RequestParams, TokenSelector, invalid_scores_error


@torch.no_grad()
def all_logits(model: Any, tokens: list[list[int]] | np.ndarray) -> torch.Tensor:
    """``[B, L, vocab]`` float32, one row at a time, so that a row's logits do not depend on its neighbours."""
    rows = [model(torch.tensor(np.array([row]))).logits for row in tokens]
    return torch.cat(rows).float()


def run_rows(model: Any, prompt: list[int], rules: RequestParams, rows: list[int] | None = None) -> list[list[int]]:
    """New tokens of every row of a request with mode "rows"."""
    selector = TokenSelector(4, model.config.vocab_size, "cpu")
    return [run_row(model, prompt, rules, row, selector) for row in (rows or range(rules.num_sequences))]


def run_row(model: Any, prompt: list[int], rules: RequestParams, row: int, selector: TokenSelector) -> list[int]:
    slot = 2
    selector.admit(slot, rules, row, np.array(prompt))
    history, lengths = np.zeros((4, rules.max_length), np.int64), np.zeros(4, np.int64)
    history[slot, : len(prompt)], lengths[slot] = prompt, len(prompt)
    try:
        while True:
            length = int(lengths[slot])
            selection = selector.select(
                all_logits(model, [history[slot, :length]])[:, -1], np.array([slot]), history, lengths
            )
            if slot in selection.errors:
                raise selection.errors[slot]
            token = int(selection.token_ids[0])
            if token == INVALID_TOKEN:
                raise invalid_scores_error(slot)
            history[slot, length] = token
            lengths[slot] += 1
            stopped, errors = selector.stopped(np.array([slot]), history, lengths) if rules.has_criteria else ((), {})
            if errors:
                raise errors[slot]
            if slot in stopped or token in rules.eos_token_ids or lengths[slot] == rules.max_length:
                return history[slot, len(prompt) : lengths[slot]].tolist()
    finally:
        selector.release(slot)


def run_assisted(model: Any, prompt: list[int], rules: RequestParams) -> tuple[list[int], int]:
    """New tokens of a request with mode "assisted", and the forward passes it took."""
    selector, slot, steps = TokenSelector(1, model.config.vocab_size, "cpu"), 0, 0
    selector.admit(slot, rules, 0, np.array(prompt))
    history, length = np.zeros((1, rules.max_length), np.int64), len(prompt)
    history[slot, :length] = prompt
    while True:
        candidates = selector.propose(slot, history, length)
        logits = all_logits(model, [[*history[slot, :length], *candidates]])[0, length - 1 :]
        tokens = selector.verify(slot, candidates, logits, history, length)
        steps += 1
        history[slot, length : length + len(tokens)] = tokens
        length += len(tokens)
        stopped = selector.stopped([slot], history, np.array([length]))[0] if rules.has_criteria else ()
        if stopped or tokens[-1] in rules.eos_token_ids or length == rules.max_length:
            return history[slot, len(prompt) : length].tolist(), steps


def run_beams(model: Any, prompt: list[int], rules: RequestParams) -> list[BeamSequence]:
    """The result of a request with mode "beams"."""
    search = BeamSearch(rules, prompt)
    rows = [list(prompt)] * rules.num_sequences
    logits = all_logits(model, rows[:1])[:, -1]
    while True:
        step = search.step(logits)
        rows = [[*rows[parent], token] for parent, token in zip(step.parents, step.tokens)]
        if step.is_done:
            return search.finalize()
        logits = all_logits(model, rows)[:, -1]


class GumbelProcessor(LogitsProcessor):
    """Adds the noise of a request's first row to its scores: greedy generation then draws the engine's tokens."""

    def __init__(self, seed: int) -> None:
        self.seed = torch.tensor([seed - 2**64 if seed >= 2**63 else seed])

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        ids = torch.arange(scores.shape[-1], dtype=torch.int32)
        return scores + gumbel_noise(self.seed, torch.tensor([input_ids.shape[1]]), ids)


def warpers(config: GenerationConfig) -> list[LogitsProcessor]:
    """The warpers that transformers documents for a config that samples, in its order."""
    found: list[LogitsProcessor] = []
    if config.temperature not in (None, 1.0):
        found.append(TemperatureLogitsWarper(config.temperature))
    if config.top_k:
        found.append(TopKLogitsWarper(config.top_k))
    if config.top_p is not None and config.top_p < 1:
        found.append(TopPLogitsWarper(config.top_p))
    if config.min_p is not None:
        found.append(MinPLogitsWarper(config.min_p))
    if config.typical_p is not None and config.typical_p < 1:
        found.append(TypicalLogitsWarper(config.typical_p))
    if config.epsilon_cutoff is not None and 0 < config.epsilon_cutoff < 1:
        found.append(EpsilonLogitsWarper(config.epsilon_cutoff))
    if config.eta_cutoff is not None and 0 < config.eta_cutoff < 1:
        found.append(EtaLogitsWarper(config.eta_cutoff))
    return found


def reference_tokens(
    model: Any, prompt: list[int], options: dict[str, Any], seed: int | None = None, **kwargs: Any
) -> list[int]:
    """New tokens of ``generate()`` for one prompt; sampled ones by greedy generation over noisy scores."""
    config = GenerationConfig(**options)
    if config.do_sample:
        given = kwargs.pop("logits_processor", [])
        # The model's own defaults count as well: generate() fills them in.
        filled = GenerationConfig(**(model.generation_config.to_diff_dict() | options))
        filled.top_k = 50 if filled.top_k is None else filled.top_k
        kwargs["logits_processor"] = [*given, *warpers(filled), GumbelProcessor(seed)]
        config.do_sample = False
    out = model.generate(torch.tensor([prompt]), generation_config=config, **kwargs)
    return out[0, len(prompt) :].tolist()
