"""Tiny models with every option written out, and weights large enough that each of them changes the result."""

from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

BASE: dict[str, Any] = dict(
    vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, max_position_embeddings=256, pad_token_id=0, bos_token_id=1,
    eos_token_id=None, attention_dropout=0.0, tie_word_embeddings=False,
)  # fmt: skip
ALTERNATING = ["sliding_attention", "full_attention"] * 2


def tiny_config(family: str, **changes: Any) -> PreTrainedConfig:
    """llama; mistral (window 7 in every layer); gemma2 (windows alternate, softcap); gpt_oss (sinks, experts)."""
    if family == "llama":
        return LlamaConfig(**(BASE | changes))
    if family == "mistral":
        return MistralConfig(**(BASE | dict(sliding_window=7) | changes))
    if family == "gemma2":
        options = dict(sliding_window=7, attn_logit_softcapping=4.0, layer_types=ALTERNATING)
        return Gemma2Config(**(BASE | options | changes))
    if family == "gpt_oss":
        rope = dict(rope_type="default", rope_theta=10000.0)
        options = dict(
            sliding_window=7, layer_types=ALTERNATING, num_local_experts=4, num_experts_per_tok=2, rope_parameters=rope
        )
        return GptOssConfig(**(BASE | options | changes))
    raise ValueError(f"no tiny model for {family}")


def tiny_model(family: str, attn_implementation: str, **changes: Any) -> PreTrainedModel:
    """The same weights for every ``attn_implementation``, float32, in eval mode."""
    config = tiny_config(family, **changes)
    return with_drawn_weights(AutoModelForCausalLM.from_config(config, attn_implementation=attn_implementation))


def with_drawn_weights(model: PreTrainedModel) -> PreTrainedModel:
    """Redraw all but the norms in place: the initial matrices are so small that attention is nearly uniform."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1 or name.endswith(("bias", "sinks")):
                std = 1.0 if name.endswith("sinks") else 0.3
                weight.copy_(torch.randn(weight.shape, generator=generator) * std)
    return model.float().eval()


def prompts(*lengths: int) -> list[list[int]]:
    """Random prompts of these lengths, without the special tokens."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(2, BASE["vocab_size"], (length,), generator=generator).tolist() for length in lengths]
