"""A patched generate() against the unpatched one: same arguments, same results."""

import dataclasses

import numpy as np
import pytest
import torch
from dense_engine import reference_tokens
from explicit_models import prompts, tiny_model
from patched import CONFIG, EOS, assert_same, batch, both
from transformers import GenerationConfig

import hf_paged
from hf_paged import EngineConfig
from hf_paged.engine.sampling.request_params import derived_seed

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


@pytest.mark.quick
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


@pytest.mark.quick
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
