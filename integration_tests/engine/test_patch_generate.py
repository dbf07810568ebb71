"""A patched generate() against the unpatched one: same arguments, same results, or transformers' own loop, and why."""

import contextlib
import copy
import dataclasses
import functools
import gc
import inspect
import io
import pickle
import threading
import types
import weakref

import numpy as np
import pytest
import torch
from dense_engine import reference_tokens
from explicit_models import prompts, tiny_model
from host import CACHE, cache_of, with_cache
from tokenizers_of_tests import characters
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BartForConditionalGeneration,
    DynamicCache,
    GenerationConfig,
    LlamaForCausalLM,
    StoppingCriteria,
)
from transformers.generation.streamers import BaseStreamer

import hf_paged
from hf_paged import EngineConfig, UnsupportedModelError
from hf_paged.engine.sampling.request_params import derived_seed
from hf_paged.generation import loop
from hf_paged.generation.patch import PatchedGenerate
from hf_paged.hooks import is_marked

EOS = [3, 7, 19, 40, 55, 56]
CONFIG = EngineConfig(page_size=8, max_num_seqs=8, max_batch_tokens=32)


@pytest.fixture(scope="module")
def model():
    model = tiny_model("llama", "sdpa", num_hidden_layers=2)
    model.generation_config.pad_token_id = 0
    return model


@pytest.fixture(autouse=True)
def restored(model):
    yield
    hf_paged.unpatch_generate(model)
    assert "generate" not in model.__dict__
    assert model.config._attn_implementation == "sdpa"


@pytest.fixture
def reasons(monkeypatch):
    """Reasons for which calls went to transformers' own loop."""
    found = []
    for module in ("loop", "patch"):
        monkeypatch.setattr(f"hf_paged.generation.{module}.log_original", found.append)
    return found


def batch(*lengths, side="left", pad=0):
    rows = prompts(*lengths)
    longest = max(lengths)
    filled = [[pad] * (longest - len(row)) for row in rows]
    ids = [p + row if side == "left" else row + p for row, p in zip(rows, filled)]
    mask = [
        [0] * len(p) + [1] * len(row) if side == "left" else [1] * len(row) + [0] * len(p)
        for row, p in zip(rows, filled)
    ]
    return dict(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask))


def both(model, *args, config=CONFIG, **kwargs):
    """Results without and with the patch; criteria and processors are copied, as some remember what they saw."""
    expected = model.generate(*args, **copy.deepcopy(kwargs))
    hf_paged.patch_generate(model, config)
    got = model.generate(*args, **copy.deepcopy(kwargs))
    hf_paged.unpatch_generate(model)
    return got, expected


def assert_same(got, expected):
    assert type(got) is type(expected)
    if isinstance(got, torch.Tensor):
        assert got.dtype == expected.dtype
        assert got.device == expected.device
        assert got.tolist() == expected.tolist()
        return
    missing = {CACHE} if cache_of(got) is None else set()
    assert set(got) | missing == set(expected)
    for name in got:
        if isinstance(got[name], torch.Tensor):
            assert_same(got[name], expected[name])


OPTIONS = {
    "greedy": dict(),
    "eos": dict(eos_token_id=EOS, max_new_tokens=30),
    "eos without pad": dict(eos_token_id=EOS, pad_token_id=9, max_new_tokens=30),
    "max_length": dict(max_length=17, max_new_tokens=None),
    "default length": dict(max_new_tokens=None),
    "min_length": dict(min_length=16, eos_token_id=EOS),
    "min_new_tokens": dict(min_new_tokens=5, eos_token_id=EOS),
    "repetition_penalty": dict(repetition_penalty=1.6),
    "no_repeat_ngram": dict(no_repeat_ngram_size=2, encoder_no_repeat_ngram_size=2),
    "processors": dict(bad_words_ids=[[5], [17, 22]], sequence_bias=[[[10], 4.0]], suppress_tokens=[1, 2, 3]),
    "forced_eos": dict(forced_eos_token_id=11, eos_token_id=11),
    "exponential_decay": dict(exponential_decay_length_penalty=[3, 1.5], eos_token_id=EOS),
    "beams": dict(num_beams=3),
    "beams eos": dict(num_beams=3, num_return_sequences=2, eos_token_id=EOS, max_new_tokens=20),
    "beams pad": dict(num_beams=2, num_return_sequences=2, eos_token_id=EOS, pad_token_id=8, length_penalty=-1.0),
    "beams early": dict(num_beams=3, early_stopping=True, eos_token_id=EOS, repetition_penalty=1.3),
    "beams never": dict(num_beams=3, early_stopping="never", length_penalty=2.0, eos_token_id=EOS[:2]),
    "return_dict": dict(return_dict_in_generate=True, eos_token_id=EOS),
    "return_dict beams": dict(return_dict_in_generate=True, num_beams=3, num_return_sequences=3, eos_token_id=EOS),
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("lengths", [(6,), (4, 9, 1, 5)], ids=["one", "padded"])
def test_same_result(model, reasons, name, lengths):
    got, expected = both(model, **batch(*lengths), **({"max_new_tokens": 11, "do_sample": False} | OPTIONS[name]))
    assert_same(got, expected)
    assert reasons == []


@pytest.mark.parametrize("name", ["greedy", "eos", "repetition_penalty", "beams eos"])
def test_right_padding_gives_the_tokens_of_each_prompt_alone(model, reasons, name):
    """transformers' own loop continues from the padding there, and warns; the layout is its."""
    options = {"max_new_tokens": 11, "do_sample": False} | OPTIONS[name]
    given = batch(4, 9, 1, 5, side="right")
    hf_paged.patch_generate(model, CONFIG)
    got = model.generate(**given, **options)
    left = model.generate(**batch(4, 9, 1, 5), **options)
    repeats = options.get("num_return_sequences", 1)
    assert torch.equal(got[:, :9], given["input_ids"].repeat_interleave(repeats, 0))
    assert torch.equal(got[:, 9:], left[:, 9:])
    assert reasons == []


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_padding_between_tokens(reasons, family):
    """Sliding windows count its columns in transformers, and the engine's rows have none."""
    model = tiny_model(family, "sdpa", num_hidden_layers=2)
    given = batch(14, 9, 12)
    given["attention_mask"][0, 6:8] = 0
    given["attention_mask"][2, 7] = 0
    got, expected = both(model, **given, max_new_tokens=6, do_sample=False)
    assert_same(got, expected)
    assert [reason.split(",")[0] for reason in reasons] == ["attention_mask has padding between tokens"] * (
        family == "mistral"
    )


def test_arguments_in_every_form(model, reasons):
    ids = batch(5)["input_ids"]
    config = GenerationConfig(max_new_tokens=7, num_beams=2)
    for args, kwargs in (
        ((ids, config), {}),
        ((), dict(inputs=ids, generation_config=config)),
        ((ids,), dict(max_new_tokens=7, use_cache=True)),
        ((), dict(bos_token_id=4, max_new_tokens=5)),
    ):
        got, expected = both(model, *args, **kwargs)
        assert_same(got, expected)
    assert reasons == []


def test_errors_are_those_of_generate(model):
    hf_paged.patch_generate(model, CONFIG)
    ids = batch(5)["input_ids"]
    with pytest.raises(ValueError, match="max_length"):
        model.generate(ids, max_length=4)
    with pytest.raises(ValueError, match="no_such_argument"):
        model.generate(ids, no_such_argument=1)
    with pytest.raises(ValueError, match="tokenizer"):
        model.generate(ids, stop_strings="x", max_new_tokens=3)
    with pytest.raises(ValueError, match="temperature"):
        model.generate(ids, do_sample=True, temperature=-1.0)

    def fail(input_ids, scores):
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        model.generate(ids, logits_processor=[fail], max_new_tokens=3)
    with pytest.raises(RuntimeError, match="broken"):
        model.generate(**batch(3, 5), stopping_criteria=[fail], max_new_tokens=3)
    assert model.generate(ids, max_new_tokens=3).shape == (1, 8)
    model.generate.engine.check()


# Numbers


def test_numbers_of_numpy(model, reasons):
    for options in (
        dict(max_new_tokens=np.int64(7)),
        dict(max_length=np.int32(17)),
        dict(max_new_tokens=7, num_beams=np.int64(3), num_return_sequences=np.int16(2)),
        dict(max_new_tokens=9, min_new_tokens=4, eos_token_id=np.array(EOS), pad_token_id=np.int64(0)),
        dict(max_new_tokens=7, repetition_penalty=np.float64(1.3)),
    ):
        got, expected = both(model, **batch(4, 9), do_sample=False, **options)
        assert_same(got, expected)
    config = EngineConfig(page_size=np.int64(8), max_num_seqs=np.int32(8), max_batch_tokens=np.int64(32))
    assert [type(value) for value in (config.page_size, config.max_num_seqs, config.max_batch_tokens)] == [int] * 3
    hf_paged.patch_generate(model, config)
    sampled = [model.generate(**batch(4, 9), do_sample=True, max_new_tokens=5, seed=seed) for seed in (5, np.int64(5))]
    assert torch.equal(*sampled)
    hf_paged.unpatch_generate(model)
    with hf_paged.Engine(model, config) as engine:
        for given in (dict(seed=3, logprobs=2), dict(seed=np.int64(3), logprobs=np.int64(2))):
            settings = GenerationConfig(do_sample=True, max_new_tokens=5)
            sampled.append(engine.submit([5, 6, 7], generation_config=settings, **given).result())
    assert sampled[2].token_ids == sampled[3].token_ids
    assert len(sampled[3].logprobs[0].top_ids) == 2
    assert reasons == []


@pytest.mark.parametrize("how", ["patched", "custom_generate"])
@pytest.mark.parametrize("seed", [-1, 2**64, True, 1.0, "x"])
def test_a_seed_that_is_none_is_refused(model, reasons, seed, how):
    options = dict(do_sample=True, max_new_tokens=3, seed=seed)
    if how == "patched":
        hf_paged.patch_generate(model, CONFIG)
    else:
        options["custom_generate"] = hf_paged.generate
    with pytest.raises(ValueError, match=r"seed is .* an integer from 0"):
        model.generate(**batch(4), **options)
    assert reasons == []


def test_a_seed_is_not_ignored_where_the_engine_refuses_later(model, reasons):
    hf_paged.patch_generate(model, dataclasses.replace(CONFIG, max_model_len=16))
    with pytest.raises(ValueError, match=r"seed=3 is for calls that the engine runs.*the engine serves 16"):
        model.generate(**batch(4), do_sample=True, max_new_tokens=30, seed=3)
    assert reasons == []


def test_beams_with_another_default_dtype(reasons):
    model = tiny_model("llama", "sdpa", num_hidden_layers=2).half()
    torch.set_default_dtype(torch.float16)
    try:
        got, expected = both(model, **batch(5), num_beams=3, max_new_tokens=9, eos_token_id=EOS)
    finally:
        torch.set_default_dtype(torch.float32)
    assert_same(got, expected)
    assert reasons == []


# Sampling


def test_samples_are_repeatable_by_seed_and_by_torch(model, reasons):
    options = dict(do_sample=True, max_new_tokens=10, num_return_sequences=2)
    hf_paged.patch_generate(model, CONFIG)
    first = model.generate(**batch(4, 9), **options, seed=5)
    assert first.shape == (4, 19)
    assert len({tuple(row) for row in first[:, 9:].tolist()}) == 4
    assert torch.equal(model.generate(**batch(4, 9), **options, seed=5), first)
    assert not torch.equal(model.generate(**batch(4, 9), **options, seed=6), first)
    torch.manual_seed(3)
    drawn = [model.generate(**batch(4, 9), **options) for _ in range(2)]
    assert not torch.equal(*drawn)
    torch.manual_seed(3)
    assert torch.equal(model.generate(**batch(4, 9), **options), drawn[0])
    assert reasons == []


def test_a_sample_does_not_depend_on_the_other_prompts(model):
    options = dict(do_sample=True, max_new_tokens=10, seed=5, eos_token_id=None)
    hf_paged.patch_generate(model, CONFIG)
    alone = model.generate(**batch(4), **options)
    # The first prompt of a call has the call's seed; padding does not count.
    together = model.generate(**batch(4, 9, 2), **options)
    assert together[0, 9:].tolist() == alone[0, 4:].tolist()


@pytest.mark.parametrize(
    "options", [dict(), dict(top_k=7, temperature=1.4, repetition_penalty=1.3), dict(typical_p=0.7, top_k=0)], ids=str
)
def test_samples_are_those_of_each_prompt_with_noise_of_its_own(model, reasons, options):
    """By greedy generation of each prompt alone, with the warpers and the noise as logits processors."""
    options = dict(max_new_tokens=10, do_sample=True, eos_token_id=EOS) | options
    expected = [
        reference_tokens(model, prompt, options, derived_seed(17, index))
        for index, prompt in enumerate(prompts(4, 9, 1, 5))
    ]
    hf_paged.patch_generate(model, CONFIG)
    got = model.generate(**batch(4, 9, 1, 5), **options, seed=17)[:, 9:].tolist()
    longest = max(map(len, expected))
    assert got == [tokens + [0] * (longest - len(tokens)) for tokens in expected]
    assert reasons == []


def random_options(generator):
    """A config that both serve alike: greedy or beams, with any of the processors, ends and lengths."""

    def maybe(value, chance=0.3):
        return value if torch.rand((), generator=generator) < chance else None

    num_beams = maybe(2 + int(torch.randint(0, 3, (), generator=generator)))
    choices = dict(
        num_beams=num_beams,
        num_return_sequences=num_beams and maybe(num_beams - 1),
        length_penalty=num_beams and maybe(-1.5, 0.5),
        early_stopping=num_beams and maybe(True, 0.5),
        eos_token_id=maybe(EOS, 0.7),
        pad_token_id=maybe(5),
        repetition_penalty=maybe(1.4),
        no_repeat_ngram_size=maybe(2),
        bad_words_ids=maybe([[5], [17, 22], [60]]),
        sequence_bias=maybe([[[10], 4.0], [[3], -2.0]]),
        suppress_tokens=maybe([1, 2, 4, 50]),
        begin_suppress_tokens=maybe([7, 8, 9]),
        min_new_tokens=maybe(4),
        forced_eos_token_id=maybe(3),
        renormalize_logits=maybe(True),
        return_dict_in_generate=maybe(True),
    )
    return {name: value for name, value in choices.items() if value is not None}


@pytest.mark.parametrize("seed", range(25))
def test_random_configs(model, reasons, seed):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 12, (int(torch.randint(1, 6, (), generator=generator)),), generator=generator).tolist()
    options = random_options(generator)
    num_new = int(torch.randint(1, 20, (), generator=generator))
    page_size = 8 if seed % 2 else 16
    got, expected = both(
        model, **batch(*lengths), **options, do_sample=False, max_new_tokens=num_new,
        config=EngineConfig(page_size=page_size, max_num_seqs=6, max_batch_tokens=16, num_pages=2 * 6 * 4),
    )  # fmt: skip
    assert_same(got, expected)
    assert reasons == []


def test_samples_of_one_prompt_have_the_models_distribution(model):
    ids, num = batch(3)["input_ids"], 4000
    options = dict(do_sample=True, max_new_tokens=1, num_return_sequences=num, top_k=5, temperature=2.0)
    hf_paged.patch_generate(model, EngineConfig(max_num_seqs=num, max_batch_tokens=num))
    tokens = model.generate(ids, **options, seed=1)[:, 3]
    logits = model(ids).logits[0, -1].float() / 2
    best = logits.topk(5)
    expected = best.values.softmax(0) * num
    counts = torch.stack([(tokens == token).sum() for token in best.indices])
    assert counts.sum() == num
    assert ((counts - expected) ** 2 / expected).sum() < 25  # 4 degrees of freedom


def test_prompt_lookup(model, reasons):
    prompt = torch.tensor([prompts(4)[0] * 4])
    got, expected = both(model, prompt, prompt_lookup_num_tokens=3, max_new_tokens=15, do_sample=False)
    assert_same(got, expected)
    assert reasons == []


# Objects of the caller


class Recorder(BaseStreamer):
    def __init__(self):
        self.got = []

    def put(self, value):
        self.got.append(value.tolist())

    def end(self):
        self.got.append("end")


@pytest.mark.parametrize("lengths", [(6,), (4, 9)], ids=["one", "padded"])
@pytest.mark.parametrize("eos", [None, EOS])
def test_streamer_gets_the_same(model, reasons, lengths, eos):
    options = dict(max_new_tokens=12, eos_token_id=eos, do_sample=False)
    streamers = [Recorder(), Recorder()]
    expected = model.generate(**batch(*lengths), **options, streamer=streamers[0])
    hf_paged.patch_generate(model, CONFIG)
    got = model.generate(**batch(*lengths), **options, streamer=streamers[1])
    assert_same(got, expected)
    assert streamers[1].got == streamers[0].got
    assert reasons == []


class BatchCriterion(StoppingCriteria):
    """Tied to the batch it was made for, as lm-eval's: True once every row has had a token divisible by five."""

    def __init__(self, num_rows):
        self.done, self.shapes = [False] * num_rows, []

    def __call__(self, input_ids, scores, **kwargs):
        self.shapes.append(tuple(input_ids.shape))
        for i in range(len(self.done)):
            self.done[i] |= int(input_ids[i, -1]) % 5 == 0
        return all(self.done)


class RowCriterion(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        return input_ids[:, -1] % 5 == 0


@pytest.mark.parametrize("lengths", [(6,), (4, 9, 2)], ids=["one", "padded"])
@pytest.mark.parametrize("eos", [None, EOS])
@pytest.mark.parametrize("kind", [BatchCriterion, RowCriterion])
def test_criteria_see_the_whole_batch(model, reasons, lengths, eos, kind):
    options = dict(max_new_tokens=25, eos_token_id=eos, do_sample=False)
    found = []
    for patched in (False, True):
        if patched:
            hf_paged.patch_generate(model, CONFIG)
        criterion = kind(len(lengths)) if kind is BatchCriterion else kind()
        found.append(
            (model.generate(**batch(*lengths), **options, stopping_criteria=[criterion]).tolist(), vars(criterion))
        )
    assert found[1] == found[0]
    assert reasons == []


@pytest.mark.parametrize("eos", [None, EOS])
@pytest.mark.parametrize("where", ["argument", "config", "model"])
def test_stop_strings(model, reasons, eos, where, monkeypatch):
    tokenizer = characters(97)
    plain = model.generate(**batch(4, 9, 2), max_new_tokens=20, eos_token_id=eos)
    stops = [tokenizer.decode(plain[0, 12:14]), tokenizer.decode(plain[1, 15])]
    options = dict(max_new_tokens=20, eos_token_id=eos, do_sample=False)
    given = dict(options, stop_strings=stops)
    if where == "config":
        given = dict(generation_config=GenerationConfig(**given))
    if where == "model":
        monkeypatch.setattr(model.generation_config, "stop_strings", stops)
        given = dict(generation_config=GenerationConfig(**options))
    expected = model.generate(**batch(4, 9, 2), **given, tokenizer=tokenizer)
    hf_paged.patch_generate(model, CONFIG)
    got = model.generate(**batch(4, 9, 2), **given, tokenizer=tokenizer)
    assert_same(got, expected)
    assert reasons == []
    if where == "config":
        assert given["generation_config"].stop_strings == stops


@pytest.mark.parametrize("num_beams", [1, 2])
def test_prefix_allowed_tokens_fn_knows_its_prompt(model, reasons, num_beams):
    def allowed(batch_id, ids):
        return list(range(10 * batch_id + 5, 10 * batch_id + 15))

    options = dict(max_new_tokens=6, do_sample=False, num_beams=num_beams, prefix_allowed_tokens_fn=allowed)
    got, expected = both(model, **batch(4, 9, 2), **options)
    assert_same(got, expected)
    assert reasons == []


def test_processors_of_one_row(model, reasons):
    seen = []

    def bias(input_ids, scores):
        seen.append(input_ids.tolist())
        scores[:, input_ids[0, -1]] += 2
        return scores

    for options in (dict(), dict(num_beams=3)):
        found = []
        for patched in (False, True):
            if patched:
                hf_paged.patch_generate(model, CONFIG)
            out = model.generate(**batch(6), max_new_tokens=8, logits_processor=[bias], **options)
            found.append((out.tolist(), list(seen)))
            seen.clear()
        hf_paged.unpatch_generate(model)
        assert found[1] == found[0]
    assert reasons == []


def test_processors_of_several_rows_must_say_that_they_work_on_one(model, reasons):
    class Bias:
        def __call__(self, input_ids, scores):
            return scores.scatter_add(1, input_ids[:, -1:], torch.full((len(scores), 1), 2.0))

    options = dict(max_new_tokens=8, do_sample=False)
    got, expected = both(model, **batch(4, 9), **options, logits_processor=[Bias()])
    assert_same(got, expected)
    assert len(reasons) == 1
    assert "row_wise = True" in reasons.pop()
    Bias.row_wise = True
    got, expected = both(model, **batch(4, 9), **options, logits_processor=[Bias()])
    assert_same(got, expected)
    assert reasons == []


# What transformers runs itself

ORIGINAL = {
    "contrastive_less": (dict(penalty_alpha=0.5, top_k=4, trust_remote_code=False), "contrastive search"),
    "output_scores": (dict(return_dict_in_generate=True, output_scores=True), "output_scores"),
    "output_logits": (dict(return_dict_in_generate=True, output_logits=True), "output_logits"),
    "output_hidden_states": (dict(return_dict_in_generate=True, output_hidden_states=True), "output_hidden_states"),
    "guidance": (dict(guidance_scale=1.5), "guidance_scale"),
    "static": (dict(cache_implementation="static"), "cache_implementation"),
    "synced": (dict(synced_gpus=False, negative_prompt_ids=torch.tensor([[5]]), guidance_scale=2.0), "negative_prompt"),
    "too long": (dict(max_new_tokens=30), "max_model_len"),
    "beams and streamer": (dict(num_beams=2, streamer=Recorder()), "a streamer takes one sequence"),
    "position_ids": (dict(position_ids=torch.tensor([[0, 1, 2, 4, 5]])), "position_ids"),
}


@pytest.mark.parametrize("name", ORIGINAL)
def test_the_rest_goes_to_transformers(model, reasons, name):
    options, reason = ORIGINAL[name]
    options = dict(input_ids=batch(5)["input_ids"], max_new_tokens=4, do_sample=False) | options
    hf_paged.patch_generate(model, dataclasses.replace(CONFIG, max_model_len=32))
    try:
        got = model.generate(**options)
    except ValueError as error:
        hf_paged.unpatch_generate(model)
        with pytest.raises(ValueError, match=f"^{str(error)[:20]}"):
            model.generate(**options)
    else:
        hf_paged.unpatch_generate(model)
        assert_same(got, model.generate(**options))
    assert len(reasons) == 1
    assert reason in reasons[0]


def test_inputs_of_other_kinds_go_to_transformers(model, reasons):
    ids = batch(5)["input_ids"]
    embeddings = model.get_input_embeddings()(ids).detach()
    got, expected = both(model, inputs_embeds=embeddings, max_new_tokens=4)
    assert_same(got, expected)
    assert "inputs_embeds is given" in reasons[0]
    hf_paged.patch_generate(model, CONFIG)
    cache = DynamicCache(config=model.config)
    model.generate(ids, **with_cache(cache), max_new_tokens=4)
    assert cache.get_seq_length() == 8
    assert f"{CACHE} is given" in reasons[1]
    model.generate(ids, custom_generate=lambda model, input_ids, **kwargs: input_ids)
    assert "custom_generate is given" in reasons[2]
    with pytest.raises(ValueError, match="seed=3 is for calls that the engine runs"):
        model.generate(inputs_embeds=embeddings, max_new_tokens=4, seed=3)


def test_training_with_dropout_goes_to_transformers(model, reasons):
    dropped = tiny_model("llama", "sdpa", num_hidden_layers=1, attention_dropout=0.1)
    hf_paged.patch_generate(dropped, CONFIG)
    ids = batch(5)["input_ids"]
    dropped.train().generate(ids, max_new_tokens=2)
    assert "attention_dropout=0.1" in reasons.pop()
    dropped.eval().generate(ids, max_new_tokens=2)
    assert reasons == []
    checkpointed = tiny_model("llama", "sdpa", num_hidden_layers=1).train()
    hf_paged.patch_generate(checkpointed, CONFIG)
    checkpointed.generate(ids, max_new_tokens=2)
    assert reasons == []
    checkpointed.model.gradient_checkpointing = True
    checkpointed.generate(ids, max_new_tokens=2)
    assert "gradient checkpointing" in reasons.pop()


def test_models_that_the_engine_cannot_serve(reasons):
    config = BartConfig(
        vocab_size=97, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, pad_token_id=0,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, max_position_embeddings=64, bos_token_id=1,
        eos_token_id=None, forced_eos_token_id=None, decoder_start_token_id=2,
    )  # fmt: skip
    bart = BartForConditionalGeneration(config).eval()
    got, expected = both(bart, batch(5)["input_ids"], max_new_tokens=4)
    assert_same(got, expected)
    assert len(reasons) == 1
    assert "encoder-decoder" in reasons[0]


def test_the_reason_is_logged_once(model, caplog, monkeypatch):
    monkeypatch.setattr(loop.logger, "propagate", True)
    lines = []
    monkeypatch.setattr(loop.logger, "warning", lambda message, *args: lines.append(message))
    loop.logger.warning_once.cache_clear()
    hf_paged.patch_generate(model, CONFIG)
    for _ in range(3):
        model.generate(batch(5)["input_ids"], max_new_tokens=2, cache_implementation="static")
    assert len([line for line in lines if "cache_implementation='static' is asked for" in line]) == 1


# What a model does at each step


def doubled_positions(self, input_ids, **kwargs):
    inputs = LlamaForCausalLM.prepare_inputs_for_generation(self, input_ids, **kwargs)
    return inputs | {"position_ids": inputs["position_ids"] * 2}


def raised_logits(self, outputs, model_kwargs, **kwargs):
    outputs.logits[..., 7] += 30
    return LlamaForCausalLM._update_model_kwargs_for_generation(self, outputs, model_kwargs, **kwargs)


def cut_loop(name):
    def loop(self, *args, **kwargs):
        return getattr(LlamaForCausalLM, name)(self, *args, **kwargs)[:, :-2]

    return loop


STEP_METHODS = {
    "prepare_inputs_for_generation": (doubled_positions, {}),
    "_update_model_kwargs_for_generation": (raised_logits, {}),
    "_sample": (cut_loop("_sample"), {}),
    "_beam_search": (cut_loop("_beam_search"), dict(num_beams=2)),
    "_assisted_decoding": (cut_loop("_assisted_decoding"), dict(prompt_lookup_num_tokens=2)),
}


@pytest.mark.parametrize("where", ["class", "instance"])
@pytest.mark.parametrize("name", STEP_METHODS)
def test_a_step_of_the_models_own_is_not_skipped(model, reasons, name, where):
    method, options = STEP_METHODS[name]
    options = dict(input_ids=batch(6)["input_ids"], max_new_tokens=8, do_sample=False) | options
    usual = model.generate(**options)
    own = type("OwnStep", (LlamaForCausalLM,), {name: method} if where == "class" else {})
    changed = own(model.config).eval()
    changed.load_state_dict(model.state_dict())
    changed.generation_config = model.generation_config
    if where == "instance":
        setattr(changed, name, types.MethodType(method, changed))
    expected = changed.generate(**options)
    # transformers takes its loops from the class.
    is_loop = name in ("_sample", "_beam_search", "_assisted_decoding")
    assert torch.equal(expected, usual) == (where == "instance" and is_loop)
    hf_paged.patch_generate(changed, CONFIG)
    assert_same(changed.generate(**options), expected)
    assert f"{name}() is" in reasons.pop()
    assert_same(changed.generate(**options, custom_generate=hf_paged.generate), expected)
    assert f"{name}() is" in reasons.pop()
    hf_paged.unpatch_generate(changed)
    assert_same(changed.generate(**options, custom_generate=hf_paged.generate), expected)
    assert f"{name}() is" in reasons.pop()
    with pytest.raises(UnsupportedModelError, match=name):
        hf_paged.Engine(changed, CONFIG)
    if where == "instance":
        delattr(changed, name)
        got, expected = both(changed, **options)
        assert_same(got, expected)
        assert reasons == []


# Hooks

STEERING = 3 * torch.randn(64, generator=torch.Generator().manual_seed(3))


def on_last(module, args, output):
    return torch.cat([output[:, :-1], output[:, -1:] + STEERING[: output.shape[-1]]], 1)


def on_prompt(module, args, output):
    return on_last(module, args, output) if output.shape[1] > 1 else output


def on_answer(module, args, output):
    return output + STEERING[: output.shape[-1]] if output.shape[1] == 1 else output


def on_second_row(module, args, output):
    return torch.cat([output[:1], output[1:] + STEERING[: output.shape[-1]]])


def on_all(module, args, output):
    return output + STEERING[: output.shape[-1]]


def before_all(module, args, kwargs):
    states = args[0] if args else kwargs["hidden_states"]
    changed = states + STEERING[: states.shape[-1]]
    return ((changed, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": changed})


def everywhere(module, args, output):
    return on_last(module, args, output) if type(module).__name__ == "LlamaMLP" else None


@contextlib.contextmanager
def hooked(model, hook):
    layer = model.model.layers[0]
    if hook is everywhere:
        handle = torch.nn.modules.module.register_module_forward_hook(hook)
    elif "kwargs" in inspect.signature(hook).parameters:
        handle = layer.register_forward_pre_hook(hook, with_kwargs=True)
    else:
        handle = layer.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize("when", ["before the first call", "after it"])
@pytest.mark.parametrize("hook", [on_last, on_prompt, on_answer, on_second_row, on_all, before_all, everywhere])
def test_hooks_never_see_packed_rows_unasked(model, reasons, hook, when):
    options = batch(4, 9, 5) | dict(max_new_tokens=8, do_sample=False)
    usual = model.generate(**options)
    with hooked(model, hook):
        expected = model.generate(**options)
    assert not torch.equal(usual, expected)
    hf_paged.patch_generate(model, CONFIG)
    if when == "after it":
        assert_same(model.generate(**options), usual)
    with hooked(model, hook):
        assert_same(model.generate(**options), expected)
        assert f"{hook.__name__} may depend on the rows and columns" in reasons.pop()
        assert "hf_paged.row_wise(hook)" in hf_paged.is_supported(model)[0]
    assert_same(model.generate(**options), usual)
    assert reasons == []
    assert model.generate.engine is not None


@pytest.mark.parametrize("hook", [on_all, before_all])
@pytest.mark.parametrize("keep_awake", [False, True])
def test_row_wise_hooks_run_in_the_engine(model, reasons, hook, keep_awake):
    options = batch(4, 20, 5) | dict(max_new_tokens=8, do_sample=False)
    usual = model.generate(**options)
    # The same code as another function: marks stay.
    marked = hf_paged.row_wise(types.FunctionType(hook.__code__, globals(), hook.__name__))
    with hooked(model, marked):
        expected = model.generate(**options)
        hf_paged.patch_generate(model, CONFIG, keep_awake=keep_awake)
        assert_same(model.generate(**options), expected)
    assert_same(model.generate(**options), usual)
    with hooked(model, marked):
        assert_same(model.generate(**options), expected)
    assert not torch.equal(expected, usual)
    assert reasons == []


def test_an_engine_refuses_hooks_and_goes_on_without_them(model):
    (prompt,) = prompts(20)
    config = GenerationConfig(max_new_tokens=6, do_sample=False)
    usual = model.generate(torch.tensor([prompt]), generation_config=config)[0, 20:].tolist()
    with hooked(model, on_all):
        steered = model.generate(torch.tensor([prompt]), generation_config=config)[0, 20:].tolist()
        with pytest.raises(UnsupportedModelError, match=r"on_all may .*hf_paged.row_wise"):
            hf_paged.Engine(model, CONFIG)
    assert steered != usual
    with hf_paged.Engine(model, CONFIG, background=False) as engine:
        assert engine.submit(prompt, generation_config=config).result().token_ids == usual
        with hooked(model, on_last):
            failed = engine.submit(prompt, generation_config=config).result()
            assert failed.finish_reason == "error"
            assert "hf_paged.row_wise" in str(failed.error)
        # A hook that comes between two steps.
        handle = engine.submit(prompt, generation_config=config)
        engine.step()
        with hooked(model, everywhere):
            assert "hf_paged.row_wise" in str(handle.result().error)
        # Its prompt is in the prefix cache, without the hook's part.
        for hook, expected in ((on_all, steered), (None, usual)):
            marked = hook and hf_paged.row_wise(types.FunctionType(hook.__code__, globals(), hook.__name__))
            with hooked(model, marked) if marked else contextlib.nullcontext():
                assert engine.submit(prompt, generation_config=config).result().token_ids == expected
        engine.check()


def test_a_forward_that_is_exchanged_later_is_compared_first(model, reasons):
    """A replaced forward is no hook, and may do the same to packed rows or not: the engine's check tells."""
    options = batch(4, 9, 5) | dict(max_new_tokens=8, do_sample=False)
    mlp = model.model.layers[0].mlp
    own = type(mlp).forward

    def doubled(states):
        return 2 * own(mlp, states)

    def last_doubled(states):
        found = own(mlp, states)
        return torch.cat([found[:, :-1], 9 * found[:, -1:]], 1)

    usual = model.generate(**options)
    hf_paged.patch_generate(model, CONFIG)
    assert_same(model.generate(**options), usual)
    for forward, is_served in ((last_doubled, False), (doubled, True), (last_doubled, False)):
        mlp.forward = forward
        try:
            expected = type(model).generate(model, **options)
            assert_same(model.generate(**options), expected)
            assert_same(model.generate(**options), expected)
        finally:
            del mlp.forward
        assert not torch.equal(expected, usual)
        assert [("something else in the engine" in reason) for reason in reasons] == [True, True][: 2 * (not is_served)]
        reasons.clear()
    assert_same(model.generate(**options), usual)
    assert reasons == []


@pytest.mark.parametrize("bad", [None, "hook", print])
def test_what_cannot_be_row_wise(bad):
    with pytest.raises(TypeError, match="hook is"):
        hf_paged.row_wise(bad)


def test_row_wise_marks_every_kind_of_callable():
    class Steer:
        def __call__(self, module, args, output):
            return output

        def add(self, module, args, output):
            return output

    for hook in (Steer(), Steer().add, functools.partial(on_all), lambda module, args, output: output):
        assert not is_marked(hook)
        assert hf_paged.row_wise(hook) is hook
        assert is_marked(hook)
    assert is_marked(Steer().add)
    assert is_marked(functools.partial(Steer().add))
    assert not is_marked(Steer())


# The patch itself


def test_the_signature_is_kept(model):
    before = inspect.signature(model.generate)
    doc = model.generate.__doc__
    hf_paged.patch_generate(model)
    assert inspect.signature(model.generate) == before
    assert model.generate.__doc__ == doc


def test_the_model_is_as_it_was_between_calls(model):
    hf_paged.patch_generate(model, CONFIG)
    ids = batch(5)["input_ids"]
    first = model.generate(ids, max_new_tokens=4)
    assert model.config._attn_implementation == "sdpa"
    logits = model(ids).logits
    logits.sum().backward()
    model.zero_grad()
    with torch.no_grad():
        model.lm_head.weight.data.neg_()  # through .data, which leaves no trace
    try:
        got, expected = both(model, ids, max_new_tokens=4)
        assert_same(got, expected)
        assert not torch.equal(got, first)
    finally:
        model.lm_head.weight.data.neg_()


@pytest.mark.parametrize("keep_awake", [False, True])
def test_an_engine_keeps_the_addresses_of_its_pages_and_no_prefix(model, reasons, keep_awake):
    inputs = batch(20, 17)
    expected = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    hf_paged.patch_generate(model, CONFIG, keep_awake=keep_awake)
    assert torch.equal(model.generate(**inputs, max_new_tokens=6, do_sample=False), expected)
    engine = model.generate.engine
    pages = [page for group in engine._core.pool.groups.values() for page in group.layers.values()]
    assert pages
    assert all((page.arena.committed > 0) == keep_awake for page in pages)
    assert model.config._attn_implementation == "sdpa"
    assert engine.stats().pages_used == 0
    weight = model.model.layers[0].mlp.down_proj.weight
    before = weight.detach().clone()
    try:
        with torch.no_grad():
            weight.mul_(-2)
        hf_paged.unpatch_generate(model)
        changed = model.generate(**inputs, max_new_tokens=6, do_sample=False)
        hf_paged.patch_generate(model, CONFIG, keep_awake=True)
        for expected_now in (changed, changed):
            assert torch.equal(model.generate(**inputs, max_new_tokens=6, do_sample=False), expected_now)
        with torch.no_grad():
            weight.copy_(before)
        assert torch.equal(model.generate(**inputs, max_new_tokens=6, do_sample=False), expected)
    finally:
        with torch.no_grad():
            weight.copy_(before)
    assert not torch.equal(changed, expected), "weights that change nothing prove nothing"
    assert not reasons


def test_keep_awake_is_a_bool(model):
    with pytest.raises(TypeError, match="keep_awake is 1"):
        hf_paged.patch_generate(model, keep_awake=1)


@pytest.mark.parametrize("keep_awake", [False, True])
def test_a_model_in_another_dtype_gets_other_pages(model, reasons, keep_awake):
    changed = copy.deepcopy(model)
    options = batch(4, 9) | dict(max_new_tokens=4, do_sample=False)
    hf_paged.patch_generate(changed, CONFIG, keep_awake=keep_awake)
    expected = changed.generate(**options)
    for dtype in (torch.bfloat16, torch.float64, torch.float32):
        got = changed.to(dtype).generate(**options)
        pages = changed.generate.engine._core.pool.groups.values()
        assert {page.k.dtype for group in pages for page in group.layers.values()} <= {dtype}
        if dtype != torch.bfloat16:
            # float32 that was bfloat16 once is not what it was.
            hf_paged.unpatch_generate(changed)
            assert_same(got, changed.generate(**options))
            hf_paged.patch_generate(changed, CONFIG, keep_awake=keep_awake)
    assert got.shape == expected.shape
    assert reasons == []


@pytest.mark.parametrize("run_before", [False, True])
def test_generate_outlives_the_name_of_its_model(run_before, reasons):
    ids = batch(5)["input_ids"]
    model = tiny_model("llama", "sdpa", num_hidden_layers=1)
    expected = model.generate(ids, max_new_tokens=4, do_sample=False)
    hf_paged.patch_generate(model, CONFIG)
    if run_before:
        model.generate(ids, max_new_tokens=2)
    generate, gone = model.generate, weakref.ref(model)
    del model
    assert torch.equal(generate(ids, max_new_tokens=4, do_sample=False), expected)
    assert reasons == []
    del generate
    gc.collect()
    assert gone() is None, "a patched model that nobody has is freed"


def test_unpatching_waits_for_calls_of_other_threads(model, reasons):
    options = batch(4, 9) | dict(max_new_tokens=30, do_sample=False)
    expected = model.generate(**options)
    hf_paged.patch_generate(model, CONFIG)
    has_begun, may_go_on, results = threading.Event(), threading.Event(), []

    class Waits(Recorder):
        def put(self, value):
            super().put(value)
            if len(self.got) == 2:  # the prompts come first, before the engine
                has_begun.set()
                assert may_go_on.wait(30)

    def run():
        results.append(model.generate(**options, streamer=Waits()))

    caller = threading.Thread(target=run)
    caller.start()
    assert has_begun.wait(30)
    generate = model.generate
    unpatcher = threading.Thread(target=hf_paged.unpatch_generate, args=(model,))
    unpatcher.start()
    unpatcher.join(0.2)
    assert unpatcher.is_alive()
    assert "generate" not in model.__dict__
    # A call that comes meanwhile is transformers'.
    assert torch.equal(generate(**options), expected)
    assert "not patched any more" in reasons.pop()
    may_go_on.set()
    caller.join(30)
    unpatcher.join(30)
    assert torch.equal(results[0], expected)
    assert generate.engine is None
    assert reasons == []


@pytest.mark.parametrize("again", [False, True])
def test_unpatching_from_inside_a_call(model, reasons, again):
    options = batch(4, 9) | dict(max_new_tokens=12, do_sample=False)
    expected = model.generate(**options)
    hf_paged.patch_generate(model, CONFIG)
    patched = model.generate

    class Unpatches(Recorder):
        def put(self, value):
            super().put(value)
            if len(self.got) == 2:
                hf_paged.unpatch_generate(model)
            if len(self.got) == 2 and again:
                hf_paged.patch_generate(model, CONFIG)

    assert torch.equal(model.generate(**options, streamer=Unpatches()), expected)
    assert patched.engine is None
    assert torch.equal(model.generate(**options), expected)
    assert reasons == []


def test_patching_again_takes_the_new_options(model):
    hf_paged.patch_generate(model, CONFIG)
    model.generate(batch(5)["input_ids"], max_new_tokens=4)
    first = model.generate
    hf_paged.patch_generate(model, EngineConfig(page_size=16))
    assert model.generate is not first
    assert first.engine is None
    assert model.generate.config.page_size == 16
    model.generate(batch(5)["input_ids"], max_new_tokens=4)
    assert model.generate.engine.config.page_size == 16
    hf_paged.unpatch_generate(model)
    hf_paged.unpatch_generate(model)


def test_copies_and_files_are_not_patched(tmp_path):
    model = tiny_model("llama", "sdpa", num_hidden_layers=2)  # others may hold hooks of transformers, without a pickle
    hf_paged.patch_generate(model, CONFIG)
    ids = batch(5)["input_ids"]
    expected = model.generate(ids, max_new_tokens=4)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.deepcopy([model, model.generate])[0]]
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copies.append(torch.load(file, weights_only=False))
    model.save_pretrained(tmp_path)
    copies.append(AutoModelForCausalLM.from_pretrained(tmp_path))
    for other in copies:
        assert not isinstance(other.__dict__.get("generate"), PatchedGenerate)
        assert other.generate.__self__ is other
        assert torch.equal(other.generate(ids, max_new_tokens=4), expected)
        hf_paged.patch_generate(other, CONFIG)
        assert torch.equal(other.generate(ids, max_new_tokens=4), expected)
    assert set(model.state_dict()) == set(copies[0].state_dict())


def test_a_call_of_its_own_without_a_patch(model, reasons):
    options = dict(max_new_tokens=9, eos_token_id=EOS, do_sample=False)
    for more in (dict(), dict(num_beams=3, num_return_sequences=2), dict(repetition_penalty=1.4)):
        expected = model.generate(**batch(4, 9, 2), **options, **more)
        got = model.generate(**batch(4, 9, 2), **options, **more, custom_generate=hf_paged.generate)
        assert_same(got, expected)
    assert reasons == []
    sampled = [
        model.generate(**batch(4, 9), do_sample=True, max_new_tokens=5, seed=seed, custom_generate=hf_paged.generate)
        for seed in (1, 1, 2)
    ]
    assert torch.equal(sampled[0], sampled[1])
    assert not torch.equal(sampled[0], sampled[2])
    hf_paged.patch_generate(model, CONFIG)
    options = dict(do_sample=True, max_new_tokens=5, seed=2)
    assert torch.equal(model.generate(**batch(4, 9), **options, custom_generate=hf_paged.generate), sampled[2])
    assert model.generate.engine is not None
    hf_paged.unpatch_generate(model)
    assert reasons == []
    got = model.generate(
        **batch(4, 9), max_new_tokens=5, return_dict_in_generate=True, output_scores=True,
        custom_generate=hf_paged.generate,
    )  # fmt: skip
    assert len(got.scores) == 5
    assert "output_scores" in reasons[0]


def test_threads_share_the_engine(model, reasons):
    expected = [model.generate(**batch(length), max_new_tokens=12) for length in (3, 5, 7, 9)]
    hf_paged.patch_generate(model, CONFIG)
    got = [None] * 4

    def run(index, length):
        for _ in range(3):
            got[index] = model.generate(**batch(length), max_new_tokens=12)

    threads = [threading.Thread(target=run, args=(i, n)) for i, n in enumerate((3, 5, 7, 9))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for mine, theirs in zip(got, expected):
        assert_same(mine, theirs)
    assert reasons == []
    model.generate.engine.check()


def test_an_error_of_one_thread_is_that_threads_alone(model, reasons):
    options = batch(4, 9) | dict(max_new_tokens=12, do_sample=False)
    expected = model.generate(**options)
    hf_paged.patch_generate(model, CONFIG)
    together, outcomes = threading.Barrier(3), []

    def fail(input_ids, scores):
        if input_ids.shape[1] > 12:
            raise ZeroDivisionError("of this call")
        return scores

    fail.row_wise = True

    def run(processors):
        together.wait(30)
        try:
            outcomes.append(model.generate(**options, logits_processor=processors).tolist())
        except ZeroDivisionError as error:
            outcomes.append(str(error))

    threads = [threading.Thread(target=run, args=(processors,)) for processors in ([], [fail], [])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(map(str, outcomes)) == sorted(map(str, [expected.tolist()] * 2 + ["of this call"]))
    assert torch.equal(model.generate(**options), expected)
    assert reasons == []
    model.generate.engine.check()


def test_offloaded_weights_go_to_transformers(reasons):
    accelerate = pytest.importorskip("accelerate")
    model = tiny_model("llama", "sdpa", num_hidden_layers=2)
    options = batch(4, 9) | dict(max_new_tokens=6, do_sample=False)
    expected = model.generate(**options)
    hf_paged.patch_generate(model, CONFIG)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert torch.equal(model.generate(**options), expected)
    assert "is on the meta device" in reasons.pop()
    with pytest.raises(UnsupportedModelError, match="is on the meta device"):
        hf_paged.Engine(model, CONFIG)


@pytest.mark.parametrize("family", ["gpt_oss", "gemma2", "mistral"])
def test_other_families(family, reasons):
    model = tiny_model(family, "eager")
    for options in (dict(eos_token_id=EOS), dict(num_beams=2, num_return_sequences=2)):
        got, expected = both(model, **batch(4, 19, 2), max_new_tokens=12, do_sample=False, **options)
        assert_same(got, expected)
    assert reasons == []


@pytest.mark.parametrize("bad", ["text", torch.nn.Linear(2, 2), None])
def test_what_cannot_be_patched(bad):
    with pytest.raises(TypeError, match="transformers model with generate"):
        hf_paged.patch_generate(bad)


def test_a_generate_of_somebody_else_is_not_replaced(model):
    model.generate = print
    with pytest.raises(ValueError, match="has been replaced by <built-in function print>"):
        hf_paged.patch_generate(model)
    hf_paged.unpatch_generate(model)
    assert model.generate is print
    del model.generate


def test_a_config_of_another_kind(model):
    with pytest.raises(TypeError, match=r"config is \{\}: an EngineConfig"):
        hf_paged.patch_generate(model, {})
