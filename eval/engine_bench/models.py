"""The models of the engine's GPU benchmark, the requests that they serve, and what the card's limits allow.

The roofline counts, at 4.3 TB/s and 700 TFLOP/s:

* decode: the bytes of the weights that a step reads (of a mixture of experts: of the experts that its tokens choose, if
  they choose evenly) and of the keys and values, windows counted;
* prompts: the arithmetic of the matrices and of causal attention, without the LM head.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

BYTES_PER_S = 4.3e12
FLOPS_PER_S = 700e12
NUM_REQUESTS = 256
LENGTHS = (100, 1024)
TOKENS = 10_000

MODELS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "qwen3-0.6b": (
        Qwen3ForCausalLM,
        Qwen3Config,
        dict(
            vocab_size=151_936, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16,
            num_key_value_heads=8, head_dim=128, max_position_embeddings=40_960, rope_theta=1e6,
            tie_word_embeddings=True, rms_norm_eps=1e-6,
        ),
    ),
    "llama3-8b": (
        LlamaForCausalLM,
        LlamaConfig,
        dict(
            vocab_size=128_256, hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32,
            num_attention_heads=32, num_key_value_heads=8, head_dim=128, max_position_embeddings=8192,
            rope_theta=500_000.0, tie_word_embeddings=False, rms_norm_eps=1e-5,
        ),
    ),
    "mistral-7b": (
        MistralForCausalLM,
        MistralConfig,
        dict(
            vocab_size=32_000, hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32,
            num_attention_heads=32, num_key_value_heads=8, head_dim=128, max_position_embeddings=32_768,
            rope_theta=10_000.0, sliding_window=4096, tie_word_embeddings=False, rms_norm_eps=1e-5,
        ),
    ),
    "olmoe-1b-7b": (
        OlmoeForCausalLM,
        OlmoeConfig,
        dict(
            vocab_size=50_304, hidden_size=2048, intermediate_size=1024, num_hidden_layers=16, num_attention_heads=16,
            num_key_value_heads=16, max_position_embeddings=4096, rope_theta=10_000.0, num_experts=64,
            num_experts_per_tok=8, tie_word_embeddings=False, rms_norm_eps=1e-5,
        ),
    ),
    "qwen3-30b-a3b": (
        Qwen3MoeForCausalLM,
        Qwen3MoeConfig,
        dict(
            vocab_size=151_936, hidden_size=2048, intermediate_size=6144, num_hidden_layers=48, num_attention_heads=32,
            num_key_value_heads=4, head_dim=128, max_position_embeddings=40_960, rope_theta=1e6, num_experts=128,
            num_experts_per_tok=8, moe_intermediate_size=768, norm_topk_prob=True, tie_word_embeddings=False,
            rms_norm_eps=1e-6,
        ),
    ),
}  # fmt: skip
"""Class, config class and published shape of each model."""

TINY = dict(
    vocab_size=512, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, sliding_window=32, num_experts=8, num_experts_per_tok=2,
    moe_intermediate_size=32,
)  # fmt: skip
"""A model of the same family for a CPU."""

SMALL = dict(
    vocab_size=4096, hidden_size=512, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, head_dim=128, sliding_window=48, num_experts=8, num_experts_per_tok=2,
    moe_intermediate_size=256,
)  # fmt: skip
"""A model of the same family for the part `equality`: heads of 128, a window shorter than the requests."""


def build(
    name: str,
    changes: dict[str, Any] | None = None,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cuda",
) -> Any:
    """A model with random weights and no eos.

    Args:
        name: of :data:`MODELS`.
        changes: :data:`TINY` or :data:`SMALL`; only what the family's config has is taken.
        dtype: of the weights.
        device: where they are made.

    Raises:
        ValueError: no such model.
    """
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}: one of {', '.join(MODELS)}.")
    kind, config_class, shape = MODELS[name]
    shape = shape | {key: value for key, value in (changes or {}).items() if key in shape}
    config = config_class(**shape, eos_token_id=None, bos_token_id=None, pad_token_id=None)
    torch.manual_seed(0)
    with torch.device(device):
        model = kind._from_config(config, attn_implementation="sdpa", dtype=dtype).eval()
    model.generation_config = GenerationConfig(do_sample=False)
    return model


def draw_requests(
    count: int = NUM_REQUESTS, lengths: tuple[int, int] = LENGTHS, tokens: int = TOKENS, seed: int = 0
) -> tuple[list[list[int]], list[int]]:
    """Prompts and numbers of new tokens; the defaults are the run that other engines were measured with.

    Args:
        count: of requests.
        lengths: least and most tokens, of prompts and of outputs.
        tokens: the largest token id of a prompt.
        seed: of Python's ``random``.
    """
    draw = random.Random(seed)
    prompts = [[draw.randint(0, tokens) for _ in range(draw.randint(*lengths))] for _ in range(count)]
    return prompts, [draw.randint(*lengths) for _ in range(count)]


@dataclass(frozen=True, slots=True)
class Costs:
    """What a model's forward reads and computes.

    Attributes:
        dense_bytes: of the weights that every step reads.
        expert_bytes: of all experts.
        chosen: the part of the experts that a token chooses.
        matmul: parameters that a prompt's token is multiplied with, without the LM head.
        kv_bytes: of one token's keys and values, all layers.
        attention_flops: of one (query, key) pair, all layers.
        window: tokens that a query sees, None: all.
    """

    dense_bytes: float
    expert_bytes: float
    chosen: float
    matmul: float
    kv_bytes: int
    attention_flops: int
    window: int | None

    @classmethod
    def of(cls, model: Any) -> "Costs":
        """Told from the config and the parameters; stacked (3D) parameters are those of experts."""
        config, size = model.config, model.dtype.itemsize
        experts = sum(p.numel() for p in model.parameters() if p.ndim == 3)
        embeddings = 0 if config.tie_word_embeddings else model.get_input_embeddings().weight.numel()
        dense = model.num_parameters() - experts - embeddings
        chosen = config.num_experts_per_tok / config.num_experts if experts else 1.0
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return cls(
            dense_bytes=dense * size,
            expert_bytes=experts * size,
            chosen=chosen,
            matmul=dense - config.vocab_size * config.hidden_size + experts * chosen,
            kv_bytes=config.num_hidden_layers * config.num_key_value_heads * head_dim * 2 * size,
            attention_flops=4 * config.num_attention_heads * head_dim * config.num_hidden_layers,
            window=getattr(config, "sliding_window", None) or None,
        )

    def weight_bytes(self, batch: int) -> float:
        """Bytes of the weights that a step of ``batch`` tokens reads."""
        return self.dense_bytes + self.expert_bytes * (1 - (1 - self.chosen) ** batch)

    def decode_s(self, contexts: Sequence[int] | np.ndarray) -> float:
        """Seconds of a decode step of sequences with these many tokens in the cache."""
        seen = np.asarray(contexts)
        seen = seen if self.window is None else np.minimum(seen, self.window)
        return float(self.weight_bytes(len(seen)) + self.kv_bytes * seen.sum()) / BYTES_PER_S

    def prompt_s(self, lengths: Sequence[int], num_cached: int = 0) -> float:
        """Seconds of prompts of these lengths, of which the first ``num_cached`` tokens are in the cache already."""
        flops = 0.0
        for length in lengths:
            new = np.arange(num_cached + 1, length + 1)
            pairs = int((new if self.window is None else np.minimum(new, self.window)).sum())
            flops += 2 * self.matmul * len(new) + self.attention_flops * pairs
        return flops / FLOPS_PER_S

    def run_s(self, prompts: Sequence[int], outputs: Sequence[int]) -> float:
        """Seconds of requests of these lengths, all started together; a prompt gives the first new token."""
        lengths, new = np.asarray(prompts), np.asarray(outputs)
        seconds = self.prompt_s(prompts)
        return seconds + sum(self.decode_s(lengths[new > done] + done) for done in range(1, int(new.max())))
