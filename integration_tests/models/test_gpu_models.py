"""On a GPU: whole models on the compiled kernels give eager's tokens in float32."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import hf_paged

pytestmark = pytest.mark.gpu

BASE = dict(
    vocab_size=97, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, eos_token_id=None, pad_token_id=0, max_position_embeddings=256,
)  # fmt: skip
MODELS = {
    "llama": {},
    "qwen3": {},
    "mistral": dict(sliding_window=7),
    "gemma2": dict(sliding_window=7, attn_logit_softcapping=4.0),
    "gpt_oss": dict(sliding_window=7, num_local_experts=4, num_experts_per_tok=2),
    "gpt2": dict(n_embd=64, n_head=4, n_layer=2),
    "deepseek_v3": dict(
        head_dim=8, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=16, v_head_dim=16, n_group=1,
        topk_group=1, n_routed_experts=4, num_experts_per_tok=2, num_key_value_heads=4, moe_intermediate_size=32,
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", MODELS)
def test_tokens_equal_eagers(family):
    torch.manual_seed(1)
    config = AutoConfig.for_model(family, **(BASE | MODELS[family]))
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").cuda().eval()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.2)
    ids = torch.randint(1, 97, (3, 40), device="cuda")
    mask = torch.ones_like(ids)
    mask[0, :11], mask[2, :38] = 0, 0
    tokens = {}
    for name in ("eager", "paged_flash"):
        model.set_attn_implementation(name)
        out = model.generate(
            ids, attention_mask=mask, max_new_tokens=30, do_sample=False, return_dict_in_generate=True
        )
        again = model.generate(
            torch.cat([out.sequences, ids[:, :3]], 1), past_key_values=out.past_key_values, max_new_tokens=8,
            attention_mask=torch.cat([mask, mask.new_ones(3, 33)], 1), do_sample=False,
        )  # fmt: skip
        tokens[name] = again
    assert isinstance(out.past_key_values, hf_paged.PagedCache)
    out.past_key_values.check()
    assert torch.equal(tokens["eager"], tokens["paged_flash"])


@pytest.mark.parametrize("mode", [dict(num_beams=3), dict(prompt_lookup_num_tokens=3), dict(prefill_chunk_size=7)])
def test_modes_on_the_gpu(mode):
    torch.manual_seed(1)
    config = AutoConfig.for_model("llama", **BASE)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").cuda().eval()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.2)
    ids = torch.randint(1, 97, (1, 40), device="cuda")
    tokens = []
    for name in ("eager", "paged_flash"):
        model.set_attn_implementation(name)
        tokens.append(model.generate(ids, max_new_tokens=40, do_sample=False, **mode))
    assert torch.equal(*tokens)
