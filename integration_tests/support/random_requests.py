"""Random requests with random valid generation configs, and what generate() makes of each alone."""

import dataclasses
from typing import Any

import numpy as np
import torch
from dense_engine import reference_tokens
from tiny_models import VOCAB_SIZE, build, randomise, tiny_config
from transformers import GenerationConfig, LogitsProcessor, PreTrainedModel, StoppingCriteria

FAMILIES = ("llama", "qwen3", "gemma3_text", "gpt_oss", "mistral", "mixtral", "qwen3_next", "gpt2")
"""Full attention; per-head norms; windows of every second layer; sinks; windows everywhere; experts; recurrent states;
learned positions."""


def tiny_model(family: str) -> PreTrainedModel:
    """Uneven random weights, float32, a generation config that says nothing."""
    config = tiny_config(family)
    rope = getattr(config, "rope_parameters", None)
    if family == "gpt_oss" and rope:
        config.rope_parameters = {"rope_type": "default", "rope_theta": 10000.0}
    model = build(config, "eager" if family == "gpt_oss" else "sdpa")
    randomise(model, 1)
    model.generation_config = GenerationConfig(pad_token_id=0, bos_token_id=1)
    return model


class AddToToken(LogitsProcessor):
    """A processor of the user's own: looks at the whole history."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.clone()
        scores[:, int(input_ids.sum()) % scores.shape[1]] += 3.0
        return scores


class StopAtSum(StoppingCriteria):
    """A criterion of the user's own."""

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return (input_ids[:, -3:].sum(1) % 11) == 0


@dataclasses.dataclass
class RandomRequest:
    """A prompt, its options, and the tokens that generate() gives it alone: one list for each sequence."""

    prompt: list[int]
    options: dict[str, Any]
    seed: int | None
    extras: dict[str, Any]
    expected: list[list[int]] | None = None

    @property
    def config(self) -> GenerationConfig:
        return GenerationConfig(**self.options)


def draw(generator: np.random.Generator, is_recurrent: bool) -> RandomRequest:
    """One request; its config is valid for generate()."""
    chance = lambda p: bool(generator.random() < p)  # noqa: E731
    length = int(generator.integers(1, 40))
    if chance(0.3):
        # Beginnings in common, and repetitions for lookup and n-gram rules.
        shared = np.random.default_rng(int(generator.integers(3))).integers(3, VOCAB_SIZE, 24).tolist()
        prompt = [*shared, *generator.integers(3, VOCAB_SIZE, length // 3 + 1).tolist()]
    else:
        prompt = generator.integers(3, VOCAB_SIZE, length).tolist()
    options: dict[str, Any] = dict(max_new_tokens=int(generator.integers(1, 24)), pad_token_id=0, do_sample=False)
    extras: dict[str, Any] = {}
    if chance(0.5):
        options["eos_token_id"] = generator.integers(3, VOCAB_SIZE, int(generator.integers(1, 4))).tolist()
    kind = generator.choice(["greedy", "sample", "beams", "lookup", "many"], p=[0.4, 0.35, 0.1, 0.1, 0.05])
    if kind == "beams":
        options["num_beams"] = int(generator.integers(2, 4))
        options["num_return_sequences"] = int(generator.integers(1, options["num_beams"] + 1))
        options["length_penalty"] = float(generator.choice([0.5, 1.0, 2.0]))
        options["early_stopping"] = bool(generator.integers(2))
    elif kind == "lookup" and not is_recurrent:
        options["prompt_lookup_num_tokens"] = int(generator.integers(1, 6))
    elif kind in ("sample", "many"):
        options["do_sample"] = True
        options["temperature"] = float(generator.choice([0.7, 1.0, 1.6]))
        if chance(0.5):
            options["top_k"] = int(generator.integers(1, 30))
        if chance(0.5):
            options["top_p"] = float(generator.uniform(0.3, 1.0))
        if chance(0.3):
            options["min_p"] = float(generator.uniform(0.01, 0.2))
        if chance(0.2):
            options["typical_p"] = 0.8
    if kind != "lookup":
        if chance(0.2):
            options["repetition_penalty"] = float(generator.uniform(1.05, 1.5))
        if chance(0.15):
            options["no_repeat_ngram_size"] = int(generator.integers(2, 4))
        if chance(0.15):
            options["min_new_tokens"] = int(generator.integers(1, options["max_new_tokens"] + 1))
        if chance(0.1):
            options["bad_words_ids"] = [[int(t)] for t in generator.integers(3, VOCAB_SIZE, 3)]
        if chance(0.1):
            options["suppress_tokens"] = generator.integers(3, VOCAB_SIZE, 4).tolist()
        if chance(0.1):
            options["sequence_bias"] = [[[int(generator.integers(3, VOCAB_SIZE))], 2.5]]
        if chance(0.1):
            options["forced_eos_token_id"] = int(generator.integers(3, VOCAB_SIZE))
        if chance(0.1) and kind != "beams":
            extras["logits_processor"] = [AddToToken()]
        if chance(0.1) and kind != "beams":
            extras["stopping_criteria"] = [StopAtSum()]
    seed = int(generator.integers(1 << 40)) if options["do_sample"] else None
    return RandomRequest(prompt, options, seed, extras)


def expected_tokens(model: PreTrainedModel, request: RandomRequest) -> list[list[int]]:
    """What generate() gives for the prompt alone; beams that end early are padded with 0 or eos."""
    options, prompt = request.options, request.prompt
    if options.get("num_beams", 1) == 1:
        return [reference_tokens(model, prompt, options, request.seed, **request.extras)]
    out = model.generate(torch.tensor([prompt]), generation_config=request.config, **request.extras)
    return out[:, len(prompt) :].tolist()


def draw_requests(model: PreTrainedModel, count: int, seed: int, is_recurrent: bool = False) -> list[RandomRequest]:
    """Requests whose expected tokens are filled in."""
    generator = np.random.default_rng(seed)
    requests = [draw(generator, is_recurrent) for _ in range(count)]
    with torch.no_grad():
        for request in requests:
            request.expected = expected_tokens(model, request)
    return requests
