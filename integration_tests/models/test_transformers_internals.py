"""One test per private touch of ``hf_paged/transformers_internals.py``: each fails where transformers has moved it."""

import ast
import copy
import functools
import inspect
import io
import logging
import threading
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from explicit_models import prompts, tiny_config, tiny_model, with_drawn_weights
from host import CACHE, cache_of, with_cache
from torch.nn.utils import prune
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BartForConditionalGeneration,
    DynamicCache,
    EncoderDecoderCache,
    GenerationConfig,
    GenerationMixin,
    Llama4TextConfig,
    PreTrainedModel,
    StaticCache,
    masking_utils,
    modeling_flash_attention_utils,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import hf_paged
from hf_paged import registration
from hf_paged import transformers_internals as internals
from hf_paged.attention import flash_functions
from hf_paged.attention.interface import paged_flash_attention
from hf_paged.attention.mask import paged_flash_mask

PACKAGE = Path(hf_paged.__file__).parent
WRAPPED = [
    (modeling_flash_attention_utils, "_lazy_imports"),
    (PreTrainedModel, "_check_and_adjust_attn_implementation"),
    (GenerationMixin, "_prepare_cache_for_generation"),
    (EncoderDecoderCache, "check_dynamic_cache"),
]


# touch


NEEDED = [(owner, name) for owner, names in internals.NEEDED.items() for name in names]


@pytest.mark.parametrize(("owner", "name"), NEEDED, ids=lambda x: x if isinstance(x, str) else x.__name__)
def test_a_missing_name_is_reported_at_import_with_the_version(owner, name, monkeypatch):
    get = inspect.getattr_static

    def without(asked: Any, wanted: str) -> Any:
        if asked is owner and wanted == name:
            raise AttributeError(name)
        return get(asked, wanted)

    monkeypatch.setattr(inspect, "getattr_static", without)
    monkeypatch.setattr(internals.transformers, "__version__", "9.9.9")
    with pytest.raises(ImportError, match=rf"{name}.*transformers 9\.9\.9 does not have.*5\.17 to 5\.24"):
        registration.register()


def test_every_private_name_that_is_read_is_looked_up_at_import():
    """Names with an underscore that the module reads from a module or class, or calls on the model."""
    tree = ast.parse(Path(internals.__file__).read_text(encoding="utf-8"))
    owners = {"GenerationMixin", "PreTrainedModel", "masking_utils", "modeling_flash_attention_utils", "model"}
    read = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and ast.unparse(node.value) in owners
    }
    assert "_get_logits_processor" in read
    assert read <= {name for _, name in NEEDED}


@pytest.mark.parametrize(
    ("version", "is_tested"), [("5.17.0", True), ("5.24.3", True), ("5.25.0", False), ("6.0.0.dev0", False)]
)
def test_a_version_newer_than_the_tested_ones_is_said(version, is_tested, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(internals.transformers, "__version__", version)
    monkeypatch.setattr(internals.logger, "warning_once", said.append)
    registration.register()
    assert len(said) == (0 if is_tested else 1)
    assert all("5.17 to 5.24" in line and version in line for line in said)


def test_a_missing_attribute_of_the_batching_cache_is_reported():
    with pytest.raises(ImportError, match=rf"key_cache, which transformers {transformers.__version__} does not have"):
        internals.require_attr(types.SimpleNamespace(), "key_cache")
    assert internals.require_attr(types.SimpleNamespace(key_cache=3), "key_cache") == 3


# The wraps


@pytest.mark.parametrize(("owner", "name"), WRAPPED, ids=lambda x: x if isinstance(x, str) else x.__name__)
def test_registering_again_wraps_nothing_twice(owner, name):
    before = getattr(owner, name)
    registration.register()
    assert getattr(owner, name) is before
    assert not hasattr(before.__wrapped__, "_hf_paged"), "what is wrapped is transformers' own function"
    assert before.__wrapped__.__module__.startswith("transformers.")


@pytest.mark.parametrize("name", ["paged_flash", "paged_flash_2", "paged|paged_flash", "paged|paged_flash_2"])
def test_our_names_find_our_functions(name):
    assert modeling_flash_attention_utils._lazy_imports(name) == flash_functions.all_functions()
    # transformers may wrap what it keeps, for example to leave it out of torch.compile.
    kept = modeling_flash_attention_utils.lazy_import_flash_attention(name)[0]
    assert tuple(inspect.unwrap(function) for function in kept) == flash_functions.all_functions()
    assert transformers.AttentionInterface()[name] is paged_flash_attention
    assert transformers.AttentionMaskInterface()[name] is paged_flash_mask


def test_other_flash_names_go_to_transformers():
    calls = []

    def original(*args: Any, **kwargs: Any) -> str:
        calls.append((args, kwargs))
        return "transformers' answer"

    wrap = functools.partial(internals._lazy_imports, flash_functions.all_functions, original)
    for name in ("flash_attention_2", "kernels-community/flash-attn3", None, "my_paged_flash"):
        assert wrap(name, 1, allow_all_kernels=True) == "transformers' answer"
        assert calls.pop() == ((name, 1), {"allow_all_kernels": True})
    assert wrap("paged_flash") == flash_functions.all_functions()
    assert not calls


COMPATIBLE_WITH_OTHERS = [
    name
    for name in ("gpt_oss", "granite_swa", "granitemoe_swa", "mimo_v2_flash", "flint", "openai_privacy_filter")
    if name in CONFIG_MAPPING
]


@pytest.mark.parametrize("family", COMPATIBLE_WITH_OTHERS)
def test_models_that_list_their_flash_kernels_take_ours(family):
    config = CONFIG_MAPPING[family]()
    auto = AutoModelForCausalLM
    if type(config) not in auto._model_mapping:
        auto = transformers.AutoModelForTokenClassification
    config.num_hidden_layers = 2
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:2]
    with torch.device("meta"):
        model = auto.from_config(config, attn_implementation="paged_flash")
    assert type(model)._compatible_flash_implementations, "the model is here because it has such a list"
    assert model.config._attn_implementation == "paged_flash"
    model.set_attn_implementation("eager")
    model.set_attn_implementation("paged_flash")
    assert model.config._attn_implementation == "paged_flash"


def test_from_pretrained_takes_our_name_and_nothing_else_changes(tmp_path):
    expected = tiny_model("gpt_oss", "eager")
    expected.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="paged_flash")
    assert model.config._attn_implementation == "paged_flash"
    ids = torch.tensor(prompts(19))
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, expected(ids).logits, rtol=1e-3, atol=1e-3)


OUTSIDE = ["bloom", "mpt"] + ([] if CACHE == "cache" else ["gptj", "codegen"])  # on the interface from 5.24 on


@pytest.mark.parametrize("family", OUTSIDE)
def test_models_outside_of_the_attention_interface_are_refused(family, tmp_path):
    config = CONFIG_MAPPING[family]()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        refusal = rf"{type(model).__name__} computes attention in its own code.*attn_implementation=\"eager\""
        with pytest.raises(hf_paged.UnsupportedModelError, match=refusal):
            AutoModelForCausalLM.from_config(config, attn_implementation="paged_flash")
    assert type(model)._can_set_attn_implementation() is False


def test_models_on_the_attention_interface_say_so():
    assert transformers.LlamaForCausalLM._can_set_attn_implementation() is True


# The default cache of generate()


def generate(model: PreTrainedModel, **kwargs: Any) -> Any:
    ids = torch.tensor(prompts(9, 9))
    return model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, return_dict_in_generate=True,
        **kwargs,
    )  # fmt: skip


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return tiny_model("llama", "paged_flash")


@pytest.fixture(scope="module")
def expected_tokens() -> torch.Tensor:
    return generate(tiny_model("llama", "eager")).sequences


def test_the_default_cache_follows_the_implementation(llama, expected_tokens):
    for name in ("paged_flash", "sdpa", "paged_flash_2"):
        llama.set_attn_implementation(name)
        out = generate(llama)
        assert type(cache_of(out)) is (DynamicCache if name == "sdpa" else hf_paged.PagedCache)
        assert torch.equal(out.sequences, expected_tokens)
    llama.set_attn_implementation("paged_flash")


@pytest.mark.parametrize("make", [DynamicCache, hf_paged.PagedCache], ids=lambda make: make.__name__)
def test_a_cache_from_the_caller_is_kept(llama, expected_tokens, make):
    cache = make(config=llama.config)
    out = generate(llama, **with_cache(cache))
    assert cache_of(out) is cache
    assert cache.get_seq_length() == 9 + 6 - 1
    assert torch.equal(out.sequences, expected_tokens)


def test_a_static_cache_is_respected(llama, expected_tokens):
    out = generate(llama, cache_implementation="static")
    assert type(cache_of(out)) is StaticCache
    assert torch.equal(out.sequences, expected_tokens)


def test_an_offloaded_cache_is_respected(llama):
    def original(model: Any, generation_config: Any, model_kwargs: dict[str, Any], *args: Any) -> None:
        model_kwargs[CACHE] = cache

    for offloading, kind in ((True, DynamicCache), (False, hf_paged.PagedCache)):
        cache = DynamicCache(config=llama.config)
        cache.offloading = offloading
        kwargs: dict[str, Any] = {}
        internals._prepare_cache(registration.default_cache, original, llama, llama.generation_config, kwargs, None)
        assert type(kwargs[CACHE]) is kind


def test_without_a_cache(llama, expected_tokens):
    out = generate(llama, use_cache=False)
    assert cache_of(out) is None
    assert torch.equal(out.sequences, expected_tokens)


def test_an_encoder_decoder_gets_pages_for_its_self_attention():
    config = BartConfig(
        vocab_size=97, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2, pad_token_id=0,
        decoder_attention_heads=2, encoder_ffn_dim=48, decoder_ffn_dim=48, bos_token_id=1, eos_token_id=None,
        decoder_start_token_id=1, forced_eos_token_id=None, dropout=0.0,
    )  # fmt: skip
    model = with_drawn_weights(BartForConditionalGeneration._from_config(config, attn_implementation="paged_flash"))
    out = generate(model)
    assert type(cache_of(out)) is EncoderDecoderCache
    assert type(cache_of(out).self_attention_cache) is hf_paged.PagedCache
    assert type(cache_of(out).cross_attention_cache) is DynamicCache
    model.set_attn_implementation("eager")
    assert torch.equal(generate(model).sequences, out.sequences)


def test_a_model_that_does_not_fit_into_pages_keeps_its_own_cache(monkeypatch, llama):
    def refuse(config: Any) -> None:
        raise hf_paged.UnsupportedModelError("no pages for this one")

    monkeypatch.setattr(registration, "PagedCache", refuse)
    assert type(cache_of(generate(llama))) is DynamicCache


# Masks: what transformers' own mask functions hand to ours


@pytest.fixture
def mask_functions(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The mask functions that a mask interface named "paged_flash" is asked for."""
    seen: list[Any] = []

    def record(*args: Any, mask_function: Any, **kwargs: Any) -> None:
        seen.append(mask_function)

    transformers.AttentionMaskInterface.register("paged_flash", record)
    yield seen
    registration.register()


def ask(create: Any, config: Any, length: int = 6, **kwargs: Any) -> None:
    config._attn_implementation = "paged_flash"
    kwargs = with_cache(None) | kwargs
    create(config=config, inputs_embeds=torch.zeros(1, length, 8), attention_mask=None, **kwargs)


PACKED_POSITIONS = torch.tensor([[0, 1, 2, 0, 1, 0]])


def hide_even(batch_idx, head_idx, q_idx, kv_idx):
    return kv_idx % 2 == 1


def test_causal_and_windowed_masks_are_plain(mask_functions):
    ask(masking_utils.create_causal_mask, tiny_config("llama"))
    ask(masking_utils.create_sliding_window_causal_mask, tiny_config("mistral"))
    assert [internals.is_plain_mask(f) for f in mask_functions] == [True, True]
    assert [internals.packed_segments(f) for f in mask_functions] == [None, None]


def test_bidirectional_masks_are_plain(mask_functions):
    ask(masking_utils.create_bidirectional_mask, tiny_config("llama"))
    ask(masking_utils.create_bidirectional_sliding_window_mask, tiny_config("mistral"))
    assert [internals.is_plain_mask(f) for f in mask_functions] == [True, True]


def test_one_chunk_is_plain_and_more_are_refused_by_transformers(mask_functions):
    config = Llama4TextConfig(attention_chunk_size=8)
    ask(masking_utils.create_chunked_causal_mask, config, length=8)
    assert [internals.is_plain_mask(f) for f in mask_functions] == [True]
    with pytest.raises(ValueError, match="Flash attention cannot handle chunked attention"):
        ask(masking_utils.create_chunked_causal_mask, config, length=9)


@pytest.mark.parametrize("which", ["or_mask_function", "and_mask_function"])
@pytest.mark.parametrize("extra", [hide_even, functools.partial(hide_even)], ids=["function", "partial"])
def test_a_mask_function_of_the_model_is_not_plain(mask_functions, which, extra):
    ask(masking_utils.create_causal_mask, tiny_config("llama"), **{which: extra})
    ask(masking_utils.create_sliding_window_causal_mask, tiny_config("mistral"), **{which: extra})
    ask(masking_utils.create_causal_mask, tiny_config("llama"), position_ids=PACKED_POSITIONS, **{which: extra})
    assert [internals.is_plain_mask(f) for f in mask_functions] == [False] * 3
    assert [internals.packed_segments(f) for f in mask_functions] == [None] * 3


def test_packed_sequences_are_found(mask_functions):
    ask(masking_utils.create_causal_mask, tiny_config("llama"), position_ids=PACKED_POSITIONS)
    ask(masking_utils.create_sliding_window_causal_mask, tiny_config("mistral"), position_ids=PACKED_POSITIONS)
    assert [internals.is_plain_mask(f) for f in mask_functions] == [False, False]
    for function in mask_functions:
        assert internals.packed_segments(function).tolist() == [[0, 0, 0, 1, 1, 2]]


@pytest.mark.parametrize(
    "function",
    [
        hide_even,
        functools.partial(hide_even),
        masking_utils.or_masks(masking_utils.causal_mask_function, hide_even),
        masking_utils.and_masks(masking_utils.causal_mask_function, functools.partial(hide_even)),
    ],
    ids=["function", "partial", "or", "and"],
)
def test_a_foreign_mask_function_is_not_plain(function):
    assert not internals.is_plain_mask(function)
    assert internals.packed_segments(function) is None


# Hooks


def test_hooks_are_seen_when_they_come():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    hooks = internals.hooks_of(model)
    assert not any(hooks)
    added = [model[0].register_forward_hook(lambda *_: None), model.register_forward_pre_hook(lambda *_: None)]
    assert sum(map(len, hooks)) == 2
    for handle in added:
        handle.remove()
    assert not any(hooks)


def test_hooks_of_all_modules_at_once_are_seen():
    hooks = internals.hooks_of(torch.nn.Linear(2, 2))
    for register in ("register_module_forward_hook", "register_module_forward_pre_hook"):
        handle = getattr(torch.nn.modules.module, register)(lambda *_: None)
        try:
            assert internals.any_hooks(hooks)
        finally:
            handle.remove()
        assert not internals.any_hooks(hooks)


def found_hooks(model: torch.nn.Module) -> list[Any]:
    return [hook for some in internals.hooks_of(model) for hook in some.values()]


def test_hooks_of_libraries_that_do_nothing_to_rows_are_known():
    model = tiny_model("llama", "eager")
    model(torch.tensor([[5, 6]]), output_hidden_states=True)
    model.enable_input_require_grads()
    prune.l1_unstructured(model.lm_head, "weight", amount=0.1)
    torch.nn.utils.spectral_norm(model.model.layers[0].mlp.up_proj)
    assert len(found_hooks(model)) >= 4
    assert all(map(internals.is_harmless_hook, found_hooks(model)))


def test_the_hook_of_peft_that_makes_embeddings_require_gradients_is_known():
    peft = pytest.importorskip("peft")

    class WithoutTheMethod(torch.nn.Embedding):
        """PEFT has a hook of its own for models that cannot make their inputs require gradients."""

        is_loaded_in_8bit = True

        def get_input_embeddings(self):
            return self

        def gradient_checkpointing_enable(self):
            pass

    (hook,) = found_hooks(peft.prepare_model_for_kbit_training(WithoutTheMethod(2, 2)))
    assert internals.origin_of(hook).startswith("peft.")
    assert internals.is_harmless_hook(hook)


@pytest.mark.parametrize("copies_names", [False, True])
def test_other_hooks_are_not_known_by_a_copied_name(copies_names):
    def hook(module, args, output):
        return output[:, -1:]

    if copies_names:
        functools.update_wrapper(hook, torch.nn.Module.forward)
    for one in (hook, functools.partial(hook), types.MethodType(hook, object())):
        assert not internals.is_harmless_hook(one)
        assert internals.origin_of(one).startswith(f"{__name__}.")


# What generate() calls at each step


def test_step_methods_are_methods_of_the_mixin():
    """Helpers of the loops differ from version to version; these are in all."""
    assert internals.overridden_step_method(tiny_model("llama", "eager")) is None
    for name in (*internals.STEP_METHODS[:3], "_prefill", "_sample", "_beam_search", "_assisted_decoding"):
        assert name in internals.STEP_METHODS
        internals.require_attr(GenerationMixin, name)


def step_inputs(model: Any, prepare: Any, is_first: bool) -> dict[str, Any]:
    """What the model is given in a step over text, without what says how many logits."""
    ids, mask = torch.tensor([[5, 6, 7], [8, 9, 10]]), torch.tensor([[0, 1, 1], [1, 1, 1]])
    cache = DynamicCache()
    if not is_first:
        cache.update(torch.zeros(2, 1, 2, 4), torch.zeros(2, 1, 2, 4), 0)
    given = prepare(
        model, ids, **with_cache(cache), attention_mask=mask, use_cache=True, is_first_iteration=is_first,
        position_ids=(mask.cumsum(-1) - 1).clamp(min=0), next_sequence_length=None if is_first else 1,
    )  # fmt: skip
    return {
        name: value.tolist() if isinstance(value, torch.Tensor) else value
        for name, value in given.items()
        if value is not None and name not in ("logits_to_keep", "past_key_values", "cache")
    }


@pytest.mark.parametrize("name", sorted(internals.HARMLESS_PREPARATION))
def test_harmless_preparation_gives_what_the_mixin_gives_for_text(name):
    kind = getattr(transformers, name, None)
    if kind is None:
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    model = kind.__new__(kind)
    torch.nn.Module.__init__(model)
    model.config, model.weight = kind.config_class(), torch.nn.Parameter(torch.zeros(1))
    for is_first in (True, False):
        expected = step_inputs(model, GenerationMixin.prepare_inputs_for_generation, is_first)
        assert step_inputs(model, kind.prepare_inputs_for_generation, is_first) == expected
    assert expected["input_ids"] == [[7], [10]]


def test_a_module_that_accelerate_moves_is_seen():
    accelerate = pytest.importorskip("accelerate")
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    assert not internals.is_moved_by_accelerate(model)
    accelerate.cpu_offload(model, torch.device("cpu"))
    assert internals.is_moved_by_accelerate(model)


# Lines in the log


def test_the_verbosity_of_transformers_holds_for_the_package():
    names = [name for name in logging.root.manager.loggerDict if name.split(".")[0] == "hf_paged"]
    assert len(names) > 8
    loggers = [logging.getLogger(name) for name in names]
    written = io.StringIO()
    handler, before = logging.StreamHandler(written), transformers.utils.logging.get_verbosity()
    transformers.utils.logging.add_handler(handler)
    try:
        transformers.utils.logging.set_verbosity_error()
        for logger in loggers:
            logger.warning("hidden")
        assert written.getvalue() == ""
        transformers.utils.logging.set_verbosity_info()
        for logger in loggers:
            logger.info("shown")
        assert written.getvalue().split() == ["shown"] * len(loggers)
    finally:
        transformers.utils.logging.set_verbosity(before)
        transformers.utils.logging.remove_handler(handler)


# The wall


def private_touches(tree: ast.Module) -> list[str]:
    """Names with a leading underscore that are taken from other objects, and imports of transformers' inner modules."""
    found = []
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Attribute):
            root = node.value
            while isinstance(root, ast.Attribute):
                root = root.value
            own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            if not own and not (isinstance(root, ast.Name) and root.id == "torch"):
                names = [node.attr]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id.endswith("attr"):
            names = [a.value for a in node.args[1:2] if isinstance(a, ast.Constant)]
        elif isinstance(node, ast.ImportFrom):
            names = [alias.name for alias in node.names]
            inner = ("modeling_flash_attention_utils", "continuous_batching")
            # attention/continuous_batching.py is our own.
            found += [name for name in inner if not node.level and name in f"{node.module} {names}"]
            names = names if (node.module or "").startswith("transformers") else []
        elif isinstance(node, ast.Import):
            found += [a.name for a in node.names if a.name.startswith("transformers.")]
        found += [name for name in names if name.startswith("_") and not name.endswith("__")]
    return found


def test_a_change_in_place_is_seen():
    tensor = torch.zeros(3)
    before = internals.tensor_version(tensor)
    assert internals.tensor_version(tensor) == before
    tensor.add_(1)
    assert internals.tensor_version(tensor) != before


def test_one_module_touches_private_names():
    paths = sorted(PACKAGE.rglob("*.py"))
    touches = {p.relative_to(PACKAGE).as_posix(): private_touches(ast.parse(p.read_text("utf-8"))) for p in paths}
    assert len(touches.pop("transformers_internals.py")) > 3, "the check sees what it looks for"
    assert {path: names for path, names in touches.items() if names} == {}
    inner = "generation.continuous_batching"
    assert all(inner not in path.read_text("utf-8") for path in paths), "not even the one module"


def test_nothing_is_recorded_without_autograd():
    weight = torch.ones(3, requires_grad=True)
    with internals.without_autograd():
        assert not (weight * 2).requires_grad
    assert (weight * 2).requires_grad


# What generate() prepares


PROMPT = torch.tensor([[5, 6, 7, 5]])


def prepared_by_generate(model, prompt, config, **kwargs):
    """What ``generate()`` hands to a decoding loop that is given as ``custom_generate``."""
    found = {}

    def loop(model, input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs):
        found.update(config=generation_config, processors=logits_processor, criteria=stopping_criteria)
        return input_ids

    model.generate(prompt, generation_config=config, custom_generate=loop, **kwargs)
    return found


@pytest.mark.parametrize(
    "options",
    [
        dict(max_new_tokens=4),
        dict(max_length=12, min_length=6, eos_token_id=[3, 4], pad_token_id=0),
        dict(),
        dict(max_new_tokens=4, min_new_tokens=2, eos_token_id=3, do_sample=True, temperature=0.5, min_p=0.1),
        dict(num_beams=3, num_return_sequences=2, repetition_penalty=1.5, do_sample=True, eos_token_id=3, max_time=9.0),
    ],
    ids=str,
)
def test_prepared_as_generate_prepares_it(options):
    model = tiny_model("llama", "eager", num_hidden_layers=1)

    def mine(input_ids, scores):
        return scores

    expected = prepared_by_generate(
        model, PROMPT, GenerationConfig(**options), logits_processor=[mine], stopping_criteria=[mine]
    )
    got = internals.prepare_generation(
        model, GenerationConfig(**options), PROMPT, logits_processor=[mine], stopping_criteria=[mine]
    )
    for name in ("max_length", "min_length", "num_beams", "do_sample", "temperature", "top_k", "num_return_sequences"):
        assert getattr(got.config, name) == getattr(expected["config"], name), name
    assert internals.special_tokens(got.config) == internals.special_tokens(expected["config"])
    assert [type(item) for item in got.processors] == [type(item) for item in expected["processors"]]
    assert [type(item) for item in got.criteria] == [type(item) for item in expected["criteria"]]
    assert got.criteria.max_length == expected["criteria"].max_length
    scores, ids = torch.randn(1, 97), PROMPT.repeat(3, 1)[: options.get("num_beams", 1)]
    scores = scores.repeat(len(ids), 1)
    expected_scores = expected["processors"](ids, scores.clone())
    assert torch.equal(got.processors(ids, scores.clone()), expected_scores)


def resolved_by_transformers(model, config) -> dict:
    return vars(model._prepare_generation_config(config)[0])


@pytest.mark.parametrize(
    "options",
    [
        dict(do_sample=True, temperature=1.0, top_k=5),
        dict(temperature=1, eos_token_id=[3, 4]),
        dict(bad_words_ids=[[1, 2]], suppress_tokens=[5]),
        dict(custom_entry=3),
        dict(eos_token_id=torch.tensor([3, 4])),
    ],
    ids=str,
)
def test_a_remembered_config_is_resolved_as_a_new_one(options):
    model = tiny_model("llama", "eager", num_hidden_layers=1)
    model.generation_config.top_p = 0.7
    configs = [GenerationConfig(max_new_tokens=n, **options) for n in (4, 9, 4, 1)]
    for config in configs:
        given = str(vars(config))
        got = internals.resolve_generation_config(model, config)[0]
        assert str(vars(got)) == str(resolved_by_transformers(model, config))
        # Nobody else gets what a request does to its own.
        got.top_k, got.eos_token_id = 77, 78
        if isinstance(got.suppress_tokens, list):
            got.suppress_tokens.append(9)
        assert str(vars(config)) == given
    # Values in place, of the request or of the model, count as they are now.
    changed = configs[0]
    changed.suppress_tokens = [6]
    for _ in range(2):
        got = internals.resolve_generation_config(model, changed)[0]
        assert str(vars(got)) == str(resolved_by_transformers(model, changed))
        changed.suppress_tokens.append(8)
        model.generation_config.top_p = 0.6


def test_a_remembered_config_is_checked():
    model = tiny_model("llama", "eager", num_hidden_layers=1)
    internals.resolve_generation_config(model, GenerationConfig(max_new_tokens=4, top_k=3))
    config = GenerationConfig(max_new_tokens=4, top_k=3)
    config.max_new_tokens = 0
    with pytest.raises(ValueError, match="max_new_tokens"):
        internals.resolve_generation_config(model, config)


def test_a_model_that_resolves_configs_itself_does_so_each_time(monkeypatch):
    model = tiny_model("llama", "eager", num_hidden_layers=1)
    internals.resolve_generation_config(model, GenerationConfig(max_new_tokens=4))

    def own(self, generation_config, **kwargs):
        return GenerationConfig(max_new_tokens=2), {}

    monkeypatch.setattr(type(model), "_prepare_generation_config", own)
    got = internals.resolve_generation_config(model, GenerationConfig(max_new_tokens=4))[0]
    assert got.max_new_tokens == 2


@pytest.mark.parametrize("num_beams", [1, 2])
def test_processors_of_a_batch_serve_its_rows(num_beams):
    """Each row alone gets the scores that it gets in its batch; the processors of the batch stay as they are."""
    model = tiny_model("llama", "eager", num_hidden_layers=1)
    batch = torch.tensor([[0, 0, 5, 6, 7], [9, 8, 9, 8, 9], [0, 11, 12, 11, 13]])
    mask = (batch != 0).long()
    config = GenerationConfig(
        repetition_penalty=1.5, encoder_repetition_penalty=1.2 if num_beams == 1 else None, max_new_tokens=4,
        encoder_no_repeat_ngram_size=2, no_repeat_ngram_size=2, num_beams=num_beams, bad_words_ids=[[5, 6], [30]],
    )  # fmt: skip
    calls = []

    def allowed(batch_id, ids):
        calls.append((batch_id, ids.tolist()))
        return list(range(batch_id, 90))

    prepared = prepared_by_generate(model, batch, config, attention_mask=mask, prefix_allowed_tokens_fn=allowed)
    history = torch.cat([batch, torch.tensor([[6], [9], [11]])], dim=1).repeat_interleave(num_beams, 0)
    scores = torch.randn(3 * num_beams, 97)
    expected = prepared["processors"](history, scores.clone())
    in_batch = list(calls)
    calls.clear()
    for row in range(3):
        processors = [
            internals.processor_of_row(p, row, 3, int((batch[row] == 0).sum()), row * num_beams)
            for p in prepared["processors"]
        ]
        part = slice(row * num_beams, (row + 1) * num_beams)
        got = scores[part].clone()
        for processor in processors:
            got = processor(history[part], got)
        assert torch.equal(got, expected[part])
    assert calls == in_batch
    assert torch.equal(prepared["processors"](history, scores.clone()), expected)


def test_a_processor_that_remembers_is_copied_for_each_row():
    config = transformers.SynthIDTextWatermarkingConfig(ngram_len=3, keys=[4, 5])
    processor = config.construct_processor(97, "cpu")
    rows = [internals.processor_of_row(processor, 0, 1, 0, row) for row in range(2)]
    assert processor is not rows[0] is not rows[1]
    other = object()
    assert internals.processor_of_row(other, 0, 2, 0, 0) is other


@pytest.mark.parametrize(
    ("options", "name"),
    [
        (dict(), "_sample"),
        (dict(do_sample=True), "_sample"),
        (dict(num_beams=2), "_beam_search"),
        (dict(num_beams=2, do_sample=True), "_beam_search"),
        (dict(prompt_lookup_num_tokens=3), "_assisted_decoding"),
    ],
    ids=str,
)
def test_the_loop_that_generate_would_run(options, name):
    """What ``generate()`` gives with its own loop handed to it is what it gives without."""
    model = tiny_model("llama", "eager", num_hidden_layers=1)
    config = GenerationConfig(max_new_tokens=5, **options)
    loop = internals.own_decoding_loop(model, internals.resolve_generation_config(model, config)[0])
    assert loop is getattr(GenerationMixin, name)
    torch.manual_seed(0)
    expected = model.generate(PROMPT, config)
    torch.manual_seed(0)
    assert torch.equal(model.generate(PROMPT, config, custom_generate=loop), expected)


def test_a_mode_without_a_loop_is_refused():
    model = tiny_model("llama", "eager", num_hidden_layers=1)
    config = internals.resolve_generation_config(model, GenerationConfig(penalty_alpha=0.5, top_k=4))[0]
    with pytest.raises(ValueError, match="contrastive search"):
        internals.own_decoding_loop(model, config)


# The engine


@pytest.mark.parametrize(("family", "expected"), [("llama", True), ("gpt_oss", True), ("bloom", False)])
def test_the_attention_interface_is_known_by_the_class(family, expected):
    with torch.device("meta"):
        config = CONFIG_MAPPING[family]()
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    assert internals.uses_attention_interface(model) is expected


def test_what_is_exchanged_shows_up_in_a_modules_tables():
    module = torch.nn.BatchNorm1d(2)
    module.child = torch.nn.Linear(1, 1)
    children, parameters, buffers = internals.tables_of(module)
    assert [*children, *parameters, *buffers][:3] == ["child", "weight", "bias"]
    module.child, module.weight = torch.nn.Linear(1, 1), torch.nn.Parameter(torch.ones(2))
    module.running_mean = torch.ones(2)
    assert children["child"] is module.child
    assert parameters["weight"] is module.weight
    assert buffers["running_mean"] is module.running_mean


def test_a_thread_chooses_an_implementation_for_itself():
    model = tiny_model("llama", "sdpa")
    other = tiny_model("llama", "eager")
    choice = internals.AttentionChoice(model, "paged_flash")
    assert model.config._attn_implementation == "sdpa"
    read = []
    with choice.here(), internals.AttentionChoice(other, "sdpa").here(), choice.here():
        assert model.config._attn_implementation == "paged_flash"
        assert copy.deepcopy(model).config._attn_implementation == "sdpa"
        thread = threading.Thread(target=lambda: read.append(model.config._attn_implementation))
        thread.start()
        thread.join()
        model.set_attn_implementation("eager")
    assert read == ["sdpa"]
    assert (model.config._attn_implementation, other.config._attn_implementation) == ("eager", "eager")


def test_the_choice_counts_for_the_configs_of_all_parts():
    small = dict(hidden_size=24, num_attention_heads=2, num_hidden_layers=1)
    outer = transformers.LlavaConfig(
        text_config=dict(model_type="llama", **small), vision_config=dict(model_type="clip_vision_model", **small)
    )
    with torch.device("meta"):
        model = transformers.LlavaForConditionalGeneration(outer)
    parts = (model.config, model.config.text_config, model.config.vision_config)
    before = [part._attn_implementation for part in parts]
    with internals.AttentionChoice(model, "paged_flash").here():
        assert [part._attn_implementation for part in parts] == ["paged_flash"] * 3
    assert [part._attn_implementation for part in parts] == before


def test_a_config_class_with_a_property_of_its_own_is_reached():
    class Own(transformers.LlamaConfig):
        @property
        def _attn_implementation(self):
            return self._attn_implementation_internal

        @_attn_implementation.setter
        def _attn_implementation(self, value):
            self._attn_implementation_internal = value

    model = tiny_model("llama", "sdpa")
    model.config.__class__ = Own
    with internals.AttentionChoice(model, "paged_flash").here():
        assert model.config._attn_implementation == "paged_flash"
    assert model.config._attn_implementation == "sdpa"


def test_compiled_code_has_the_choice_of_the_thread_that_runs_it():
    model = tiny_model("llama", "sdpa")
    compiled = torch.compile(lambda x: x + len(model.config._attn_implementation), backend="eager", fullgraph=True)
    choice = internals.AttentionChoice(model, "paged_flash")

    def run() -> int:
        return int(compiled(torch.zeros(1)))

    got = []
    for _ in range(2):
        assert run() == len("sdpa")
        with choice.here():
            assert run() == len("paged_flash")
            thread = threading.Thread(target=lambda: got.append(run()))
            thread.start()
            thread.join()
    assert got == [len("sdpa")] * 2
    model.set_attn_implementation("eager")
    assert run() == len("eager")
