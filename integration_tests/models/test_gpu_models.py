"""On a GPU: whole models on the compiled kernels give eager's tokens in float32."""

import pytest
import torch
from host import cache_of, with_cache
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


def test_float64_gives_eagers_tokens_in_plain_pytorch():
    """No kernel computes in float64: not in the flash forward, over pages, or in an engine."""
    torch.manual_seed(2)
    config = AutoConfig.for_model("llama", **BASE)
    eager, paged = (
        AutoModelForCausalLM.from_config(config, attn_implementation=name, dtype=torch.float64).cuda().eval()
        for name in ("eager", "paged_flash")
    )
    paged.load_state_dict(eager.state_dict())
    ids = torch.randint(1, 97, (3, 20), device="cuda")
    how = dict(attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
    expected = eager.generate(ids, **how)
    assert torch.equal(paged.generate(ids, **how), expected)
    hf_paged.patch_generate(paged)
    assert torch.equal(paged.generate(ids, **how), expected)


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
        out = model.generate(ids, attention_mask=mask, max_new_tokens=30, do_sample=False, return_dict_in_generate=True)
        again = model.generate(
            torch.cat([out.sequences, ids[:, :3]], 1), **with_cache(cache_of(out)), max_new_tokens=8,
            attention_mask=torch.cat([mask, mask.new_ones(3, 33)], 1), do_sample=False,
        )  # fmt: skip
        tokens[name] = again
    assert isinstance(cache_of(out), hf_paged.PagedCache)
    cache_of(out).check()
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


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")
@pytest.mark.parametrize("family", ["llama", "mistral", "falcon_h1"])
def test_layers_on_two_devices(family, tmp_path):
    """A model split by ``device_map``: each layer's pages are on its device, and tokens are those of one device."""
    pytest.importorskip("accelerate")
    torch.manual_seed(1)
    changes = {
        "mistral": dict(sliding_window=7),
        "falcon_h1": dict(mamba_d_ssm=128, mamba_n_heads=8, mamba_d_head=16, mamba_d_state=16, mamba_chunk_size=8),
    }
    config = AutoConfig.for_model(family, **(BASE | dict(num_hidden_layers=4) | changes.get(family, {})))
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(tmp_path)
    # What stands before the layers goes with the first ones, what comes after with the last ones.
    devices = {name: 1 for name, _ in model.model.named_children() if name != "layers"} | {"embed_tokens": 0}
    devices = {f"model.{name}": device for name, device in devices.items()} | {"lm_head": 1, "model.rotary_emb": 0}
    devices |= {f"model.layers.{i}": i // 2 for i in range(4)}
    ids = torch.randint(1, 97, (3, 40), device="cuda:0")
    mask = torch.ones_like(ids)
    mask[0, :11], mask[2, :38] = 0, 0
    for options in ({}, dict(num_beams=3)):
        tokens = []
        for device_map in ({"": 0}, devices):
            placed = AutoModelForCausalLM.from_pretrained(
                tmp_path, attn_implementation="paged_flash", dtype=torch.float32, device_map=device_map
            ).eval()
            out = placed.generate(
                ids, attention_mask=mask, max_new_tokens=30, do_sample=False, return_dict_in_generate=True, **options
            )
            tokens.append(out.sequences)
        assert torch.equal(*tokens)
        cache = cache_of(out)
        (group,) = cache.groups.values()
        assert [group.pages.layers[i].k.device.index for i in range(4)] == [0, 0, 1, 1]
        cache.check()
