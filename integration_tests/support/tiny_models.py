"""Tiny random models of the causal-LM families in transformers, built from their configs alone.

Sizes are the least that keeps what attention can see: several layers of every kind that a config mixes, grouped heads,
windows shorter than the prompts, values of another width than the keys where a family has them.
"""

import copy
import dataclasses
import math
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCAB_SIZE = 99
WINDOW = 7
MAX_PARAMETERS = 12_000_000

GENERIC: dict[str, Any] = dict(
    vocab_size=VOCAB_SIZE, hidden_size=64, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, num_kv_heads=2, head_dim=16, max_position_embeddings=128, sliding_window=WINDOW,
    n_embd=64, n_layer=3, n_head=4, n_positions=128, n_ctx=128, n_inner=64, rotary_dim=8,
    d_model=64, d_ff=64, dff=64, d_inner=64, num_layers=3, num_heads=4, n_layers=3, n_heads=4, max_seq_len=128,
    embed_dim=64, embedding_size=64, word_embed_proj_dim=64, ffn_dim=64, ffn_hidden_size=64,
    decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=64,
    encoder_layers=2, encoder_attention_heads=4, encoder_ffn_dim=64,
    attention_window_size=WINDOW,
    # Experts
    num_experts=4, num_local_experts=4, n_routed_experts=4, moe_num_experts=4, num_experts_per_tok=2, moe_topk=2,
    moe_k=2, moe_intermediate_size=32, shared_expert_intermediate_size=32, n_shared_experts=1, n_group=1, topk_group=1,
    first_k_dense_replace=1,
    # Multi-head latent attention
    kv_lora_rank=16, q_lora_rank=32, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=12,
    # Linear attention and state space layers
    linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=16, linear_value_head_dim=16,
    mamba_n_heads=8, mamba_d_head=16, mamba_d_state=16, mamba_num_heads=8, mamba_head_dim=16, ssm_state_size=16,
    state_size=16, n_groups=1, mamba_n_groups=1, chunk_size=8, mamba_chunk_size=8, use_mamba_kernels=False,
    pad_token_id=0, bos_token_id=1, eos_token_id=None, is_decoder=True, tie_word_embeddings=False, use_cache=True,
    attention_dropout=0.0, hidden_dropout=0.0,
)  # fmt: skip
"""Set wherever a config class has the field."""

MIXED = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
CONVOLUTION = ["conv", "full_attention", "conv"]
SHARED_KV: dict[str, Any] = dict(
    num_hidden_layers=4, layer_types=MIXED, num_kv_shared_layers=2, vocab_size_per_layer_input=VOCAB_SIZE,
    hidden_size_per_layer_input=8, global_head_dim=32,
)  # fmt: skip
INDEXER: dict[str, Any] = dict(
    indexer_n_heads=2, indexer_kv_heads=1, indexer_head_dim=16, indexer_budget=8, indexer_compress_ratio=4,
    hc_lowrank=8, layer_types=["linear_attention", "indexed_attention", "linear_attention"],
)  # fmt: skip
SECOND_INKLING: dict[str, Any] = dict(
    unpadded_vocab_size=VOCAB_SIZE, swa_num_attention_heads=4, swa_num_key_value_heads=2, swa_head_dim=16,
    sliding_window_size=WINDOW,
)  # fmt: skip
IMAGES: dict[str, Any] = dict(
    model_type="siglip_vision_model", hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
    image_size=32, patch_size=16,
)  # fmt: skip

FAMILIES: dict[str, dict[str, Any]] = {
    "bamba": dict(attn_layer_indices=[1]),
    "blt": dict(encoder_hash_byte_group_vocab=50, encoder_hash_byte_group_size=[2, 3]),
    "cohere_compass_text": dict(
        layer_types=MIXED[:3],
        rope_parameters={
            "sliding_attention": dict(rope_type="default", rope_theta=10000.0, mrope_section=[4, 2, 2]),
            "full_attention": None,
        },
    ),
    "cpmant": dict(dim_head=16, dim_ff=64),
    "dbrx": dict(
        attn_config=dict(kv_n_heads=2, clip_qkv=8.0, rope_theta=10000.0),
        ffn_config=dict(ffn_hidden_size=64, moe_num_experts=4, moe_top_k=2),
    ),
    "dory": dict(num_hidden_layers=4, layer_types=MIXED, n_input_layers=1, n_output_layers=1, n_recurrent_layers=2),
    "dots3_note_text": dict(head_dim=16, per_layer_config={}),
    "dots3_note": dict(text_config=dict(head_dim=16, per_layer_config={}), audio_config=dict(adapter_input_size=64)),
    "falcon_h1": dict(mamba_d_ssm=128),
    "fuyu": dict(text_config=dict(model_type="persimmon"), patch_size=4),
    "gemma3": dict(vision_config=IMAGES, mm_tokens_per_image=4),
    "gemma3n_text": SHARED_KV,
    "gemma4_text": SHARED_KV,
    "gemma4": dict(text_config=SHARED_KV),
    "gemma4_unified_text": SHARED_KV,
    "gemma4_unified": dict(text_config=SHARED_KV, vision_config=dict(mm_embed_dim=64, mm_posemb_size=16)),
    "got_ocr2": dict(text_config=dict(model_type="qwen2")),
    "gpt_neo": dict(attention_types=[[["global", "local"], 2]], num_layers=4, window_size=WINDOW),
    "granitemoehybrid": dict(layer_types=["mamba", "attention", "mamba"]),
    "hrm_text": dict(prefix_lm=False),
    "inkling2_text": SECOND_INKLING,
    "inkling2_loop_text": dict(
        SECOND_INKLING, n_layers_per_attn_res_block=1, loop_layer_index_start=1, loop_layer_index_end=2,
        loop_gate_rank=8,
    ),
    "jamba": dict(attn_layer_period=2, attn_layer_offset=1),
    "kimi_linear": dict(linear_head_dim=16, linear_num_heads=4),
    "lfm2": dict(layer_types=CONVOLUTION),
    "lfm2_moe": dict(layer_types=CONVOLUTION, num_dense_layers=1),
    "longcat_flash": dict(expert_ffn_hidden_size=32, zero_expert_num=2),
    "mamba2": dict(num_heads=8, head_dim=16),
    "moshi": dict(audio_vocab_size=32),
    "moss_transcribe_diarize": dict(text_config=dict(model_type="qwen3")),
    "prophetnet": dict(num_decoder_layers=2, num_encoder_layers=2, num_decoder_attention_heads=4),
    "qwen4_exp": dict(text_config=INDEXER),
    "qwen4_exp_text": INDEXER,
    "reformer": dict(axial_pos_embds_dim=(32, 32), axial_pos_shape=(8, 16), attention_head_size=16),
    "roc_bert": dict(
        pronunciation_vocab_size=VOCAB_SIZE, shape_vocab_size=VOCAB_SIZE, pronunciation_embed_dim=16, shape_embed_dim=16
    ),
    "xlm": dict(emb_dim=64),
    "xmod": dict(default_language="en_XX"),
    "zamba2": dict(layers_block_type=["mamba", "hybrid", "mamba", "hybrid"], num_hidden_layers=4, n_mamba_heads=8),
    "zaya": dict(num_experts_per_tok=1),
}
"""What a family needs beyond or instead of :data:`GENERIC`; a dict under a sub-config's name is for that one."""

WINDOW_OFF = {"moshi": 128, "phimoe": 128}
"""Families that keep their window to themselves: run with one longer than the sequences, as their checkpoints have it.
That an active one is refused is a test of its own."""


def families() -> list[str]:
    """Model types of every causal LM that this transformers version has."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def overrides(config_class: type[PreTrainedConfig], extra: dict[str, Any]) -> dict[str, Any]:
    """Arguments that make a tiny config of a class; ``extra`` wins over :data:`GENERIC`."""
    names = {field.name for field in dataclasses.fields(config_class)}
    chosen = {name: value for name, value in GENERIC.items() if name in names}
    if "qk_rope_head_dim" in names:
        # Latent attention expands keys and values to all heads, and head_dim is that of their rotated part.
        chosen |= {"head_dim": chosen["qk_rope_head_dim"], "num_key_value_heads": chosen["num_attention_heads"]}
    for name, sub_class in config_class.sub_configs.items():
        given = extra.get(name, {})
        sub_class = CONFIG_MAPPING[given["model_type"]] if "model_type" in given else sub_class
        if issubclass(sub_class, PreTrainedConfig):
            chosen[name] = overrides(sub_class, given)
    if "layer_types" in names and "layer_types" not in extra:
        kinds = list(dict.fromkeys(getattr(config_class(), "layer_types", None) or []))
        if kinds:
            num_layers = max(chosen["num_hidden_layers"], len(kinds))
            chosen |= {"num_hidden_layers": num_layers, "layer_types": [*kinds * num_layers][:num_layers]}
    return chosen | {name: value for name, value in extra.items() if name not in config_class.sub_configs}


def tiny_config(family: str, **extra: Any) -> PreTrainedConfig:
    """A small config of a family; keyword arguments win over the tables."""
    given = FAMILIES.get(family, {}) | extra
    if family in WINDOW_OFF and "sliding_window" not in extra:
        given = given | {"sliding_window": WINDOW_OFF[family]}
    config_class = CONFIG_MAPPING[family]
    return config_class(**overrides(config_class, given))


def build(config: PreTrainedConfig, attn_implementation: str) -> PreTrainedModel:
    """A float32 model in eval mode.

    Raises:
        ValueError: it would have more than :data:`MAX_PARAMETERS`.
    """
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation="eager")
    if empty.num_parameters() > MAX_PARAMETERS:
        raise ValueError(f"the table of tiny_models.py leaves it with {empty.num_parameters():,} parameters")
    torch.manual_seed(0)
    config = copy.deepcopy(config)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attn_implementation, dtype=torch.float32).eval()


def randomise(model: PreTrainedModel, seed: int) -> None:
    """Weights that make attention and logits uneven: the stock initialisation gives nearly equal logits everywhere."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            kind = name.rsplit(".", 1)[-1]
            if kind in ("A_log", "D", "dt_bias"):
                continue  # State space layers are only stable near their own initialisation.
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim >= 2:
                is_embedding = "embed" in name or "wte" in name or "wpe" in name
                parameter.copy_(noise if is_embedding else noise * 1.5 / math.sqrt(parameter.shape[-1]))
            elif "bias" in kind or "sink" in kind:
                parameter.copy_(noise * 0.3)


def copy_weights(source: PreTrainedModel, target: PreTrainedModel) -> None:
    """Make two models of one config equal, buffers that are not saved with them included."""
    target.load_state_dict(source.state_dict())
    buffers = dict(target.named_buffers())
    for name, buffer in source.named_buffers():
        buffers[name].copy_(buffer)
