"""Every method of PEFT on a patched model, and on "paged_flash": the tokens that the model on sdpa gives with it."""

import inspect

import pytest
import torch
from explicit_models import prompts, tiny_model
from host import CACHE

import hf_paged

peft = pytest.importorskip("peft")

SOFT_PROMPT_STEP = peft.PeftModelForCausalLM.prepare_inputs_for_generation
CONFIG = hf_paged.EngineConfig(page_size=8, max_num_seqs=8, max_batch_tokens=64)
METHODS = {kind.value: config for kind, config in peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING.items()}
OPTIONS = {
    "ADALORA": dict(init_r=4, target_r=2, total_step=10),
    "ADAPTION_PROMPT": dict(adapter_len=4, adapter_layers=2, target_modules="self_attn"),
    "C3A": dict(block_size=16),
    "CPT": dict(cpt_token_ids=[3, 4, 5], cpt_mask=[1] * 3, cpt_tokens_type_mask=[1, 2, 3]),
    "IA3": dict(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "LN_TUNING": dict(target_modules=["input_layernorm", "norm"]),
    "MULTITASK_PROMPT_TUNING": dict(num_tasks=2),
    "P_TUNING": dict(encoder_hidden_size=32),
    "POLY": dict(n_tasks=2, n_skills=2, n_splits=2),
    "ROAD": dict(group_size=16),
    "SHIRA": dict(r=4),
    "TRAINABLE_TOKENS": dict(target_modules=["embed_tokens"], token_indices=list(range(2, 40))),
    "VBLORA": dict(num_vectors=16, vector_length=8, topk=2),
    "WAVEFT": dict(n_frequency=64),
}
VARIANTS = {
    "DoRA": ("LORA", dict(use_dora=True)),
    "aLoRA": ("LORA", dict(alora_invocation_tokens=[40, 41])),
    "LoRA of everything": ("LORA", dict(target_modules="all-linear", modules_to_save=["lm_head"], use_rslora=True)),
    "LoRA of embeddings": ("LORA", dict(target_modules=["embed_tokens", "q_proj"])),
    "LoRA with tokens": ("LORA", dict(trainable_token_indices=list(range(2, 40)))),
}
ENGINE_RUNS_NOT = {
    "aLoRA": "forward hook",
    "CARTRIDGE": "prepare_inputs_for_generation",
    "CPT": "prepare_inputs_for_generation",
    "LILY": "mixes the rows",
    "MULTITASK_PROMPT_TUNING": "task_ids is given",
    "P_TUNING": "prepare_inputs_for_generation",
    "POLY": "forward hook",
    "PREFIX_TUNING": "prepare_inputs_for_generation",
    "PROMPT_TUNING": "prepare_inputs_for_generation",
    "SHADOW": "forward hook",
    "XLORA": "forward hook",
}
"""Methods that depend on the rows of a batch or add inputs of their own: transformers runs these calls."""
BROKEN = {"SHADOW": (AttributeError, FutureWarning), "XLORA": KeyError}
"""What PEFT 0.21.2 raises with transformers 5.17 to 5.24 by itself."""
SOFT_PROMPTS = ("CARTRIDGE", "CPT", "MULTITASK_PROMPT_TUNING", "PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING")


@pytest.fixture(autouse=True)
def _no_compiler(monkeypatch):
    """Each layer of BOFT would try to build PEFT's CUDA kernel, and go on without."""
    monkeypatch.setattr("peft.tuners.boft.layer.get_fbd_cuda", lambda: None)


@pytest.fixture
def reasons(monkeypatch):
    """Reasons for which calls went to transformers' own loop."""
    found = []
    for module in ("loop", "patch"):
        monkeypatch.setattr(f"hf_paged.generation.{module}.log_original", found.append)
    return found


def config_of(name, folder):
    method, more = VARIANTS.get(name, (name, {}))
    known = inspect.signature(METHODS[method]).parameters
    options = dict(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], num_virtual_tokens=6)
    if method == "XLORA":
        lora = peft.get_peft_model(tiny_model("llama", "sdpa", num_hidden_layers=2), config_of("LORA", folder))
        lora.save_pretrained(folder)
        options |= dict(hidden_size=64, adapters={"one": str(folder), "two": str(folder)}, xlora_depth=1)
    options |= OPTIONS.get(method, {}) | more
    return METHODS[method](**{key: value for key, value in options.items() if key in known})


def skip_unknown_cache(name):
    """PEFT 0.21 looks for ``past_key_values``, which transformers calls ``cache`` from 5.24 on: it puts a soft prompt
    before each new token then, and its tokens on sdpa are not those that it gives without a cache."""
    if name in SOFT_PROMPTS and CACHE == "cache" and "past_key_values" in inspect.getsource(SOFT_PROMPT_STEP):
        pytest.skip("PEFT's soft prompts do not know the cache of this transformers")


def wrapped(name, attention, folder):
    """A tiny Llama with an adapter whose weights are large enough to change the tokens."""
    base = tiny_model("llama", attention, num_hidden_layers=2)
    base.config.use_cache = name != "XLORA"
    torch.manual_seed(0)
    try:
        model = peft.get_peft_model(base, config_of(name, folder)).eval()
    except ImportError as error:
        pytest.skip(str(error))
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad and weight.is_floating_point():
                weight += 0.5 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(weight.numel()))
    return model


@pytest.mark.parametrize("name", sorted([*METHODS, *VARIANTS]))
def test_a_method_of_peft(name, reasons, tmp_path):
    skip_unknown_cache(name)
    longest = prompts(9, 6)[0]
    ids = torch.tensor([longest, [0] * 3 + prompts(9, 6)[1]])
    ids[:, 5:7] = torch.tensor([40, 41])
    options = dict(
        input_ids=ids, attention_mask=(ids != 0).long(), max_new_tokens=8, do_sample=False, pad_token_id=0,
        use_cache=True,
    )  # fmt: skip
    if name in ("MULTITASK_PROMPT_TUNING", "POLY"):
        options["task_ids"] = torch.tensor([0, 1])
    plain = tiny_model("llama", "sdpa", num_hidden_layers=2)
    unchanged = plain.generate(**{key: value for key, value in options.items() if key != "task_ids"})
    try:
        expected = wrapped(name, "sdpa", tmp_path).generate(**options)
    except BROKEN.get(name, ()) as error:
        pytest.skip(f"PEFT does not run it on sdpa either: {error!r}")
    assert not torch.equal(expected, unchanged), "an adapter that changes nothing proves nothing"
    assert torch.equal(wrapped(name, "paged_flash", tmp_path).generate(**options), expected)
    model = wrapped(name, "sdpa", tmp_path)
    hf_paged.patch_generate(model, CONFIG)
    for _ in range(2):
        assert torch.equal(model.generate(**options), expected)
    if name in ENGINE_RUNS_NOT:
        assert len(reasons) == 2
        assert all(ENGINE_RUNS_NOT[name] in reason for reason in reasons)
    else:
        assert reasons == []
    assert model.get_base_model().config._attn_implementation == "sdpa"


def test_adapters_of_each_row(reasons, tmp_path):
    ids = torch.tensor(prompts(6, 6, 6))
    options = dict(input_ids=ids, max_new_tokens=8, do_sample=False, pad_token_id=0)

    def two():
        model = wrapped("LORA", "sdpa", tmp_path)
        model.add_adapter("other", peft.LoraConfig(target_modules=["k_proj"], init_lora_weights=False, lora_alpha=64))
        return model.eval()

    expected, model = two(), two()
    hf_paged.patch_generate(model, CONFIG)
    names = ["default", "other", "__base__"]
    mixed = expected.generate(**options, adapter_names=names)
    assert len({tuple(row) for row in (mixed == expected.generate(**options)).tolist()}) > 1
    for _ in range(2):
        assert torch.equal(model.generate(**options, adapter_names=names), mixed)
        assert "_adapter_names_pre_forward_hook may depend on the rows" in reasons.pop()
        assert torch.equal(model.generate(**options), expected.generate(**options))
        assert reasons == []


def test_a_soft_prompt_that_is_disabled(reasons, tmp_path):
    skip_unknown_cache("PROMPT_TUNING")
    options = dict(input_ids=torch.tensor(prompts(6, 6)), max_new_tokens=8, do_sample=False, pad_token_id=0)
    expected, model = (wrapped("PROMPT_TUNING", "sdpa", tmp_path) for _ in range(2))
    hf_paged.patch_generate(model, CONFIG)
    with expected.disable_adapter(), model.disable_adapter():
        assert torch.equal(model.generate(**options), expected.generate(**options))
        assert reasons == []
    assert torch.equal(model.generate(**options), expected.generate(**options))
    assert "prepare_inputs_for_generation" in reasons.pop()
    # PEFT leaves a method of the model itself behind, which is what it had.
    base = model.get_base_model()
    assert torch.equal(base.generate(**options), expected.get_base_model().generate(**options))
    assert reasons == []
