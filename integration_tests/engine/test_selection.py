"""Token selection without the engine: transformers' processors on the same logits, and generate() on the same model."""

import math

import numpy as np
import pytest
import torch
from dense_engine import reference_tokens, run_assisted, run_rows
from explicit_models import prompts, tiny_model
from hf_paged_kernels.sampling import reference
from hf_paged_kernels.sampling.reference import INVALID_TOKEN, gumbel_noise, warp_logits
from tokenizers_of_tests import characters
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    MinPLogitsWarper,
    StoppingCriteria,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from hf_paged.engine.sampling.logprobs import PendingLogprobs, prompt_logprobs
from hf_paged.engine.sampling.request_params import derived_seed, unserved_reason
from hf_paged.engine.sampling.token_selector import RequestParams, TokenSelector
from hf_paged.transformers_internals import prepare_generation

VOCAB = 97


@pytest.fixture(scope="module")
def model():
    model = tiny_model("llama", "eager", num_hidden_layers=2)
    model.generation_config.pad_token_id = 0
    return model


# The noise


def test_splitmix64_is_the_published_sequence():
    """The first outputs for seed 1234567 in the generator's reference implementation."""
    state, outputs = torch.tensor([1234567]), []
    for _ in range(3):
        outputs.append(int(reference.splitmix64(state)[0]) % 2**64)
        state += reference.GOLDEN
    assert outputs == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_noise_is_that_of_exact_integer_arithmetic():
    """An independent formulation with Python's integers."""

    def splitmix(x):
        x = (x + 0x9E3779B97F4A7C15) % 2**64
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
        return x ^ (x >> 31)

    def mix(x):
        x ^= x >> 16
        x = x * 0x7FEB352D % 2**32
        x ^= x >> 15
        x = x * 0x846CA68B % 2**32
        return x ^ (x >> 16)

    seeds, positions = [0, 1, 2**63 - 1, -1, -(2**63)], [0, 1, 7, 10**6, 2**40]
    where = torch.tensor(seeds), torch.tensor(positions), torch.arange(1000, dtype=torch.int32)
    uniform, noise = reference.uniform_noise(*where), gumbel_noise(*where)
    for row, (seed, position) in enumerate(zip(seeds, positions)):
        key = splitmix(splitmix(seed % 2**64) ^ position)
        for token in (0, 1, 2, 500, 999):
            bits = mix((mix(token ^ (key % 2**32)) + (key >> 32)) % 2**32)
            assert uniform[row, token].item() * 2**33 == 2 * bits + 1
            assert noise[row, token].item() == np.float32(-math.log(-math.log((bits + 0.5) / 2**32)))


def test_noise_is_standard_gumbel_and_independent():
    noise = gumbel_noise(torch.arange(300), torch.arange(300) % 7, torch.arange(3000, dtype=torch.int32)).double()
    assert torch.isfinite(noise).all()
    assert abs(noise.mean() - 0.5772156649) < 0.005
    assert abs(noise.var() - math.pi**2 / 6) < 0.01
    uniform = (-(-noise).exp()).exp().flatten()
    counts = torch.histc(uniform, bins=100, min=0, max=1)
    assert ((counts - 9000) ** 2 / 9000).sum() < 160  # 99 degrees of freedom
    centred = noise - noise.mean()
    for other in (centred.roll(1, 0), centred.roll(1, 1), centred.roll((1, 1), (0, 1))):
        assert abs((centred * other).mean() / noise.var()) < 0.005


def test_noise_does_not_depend_on_rows_or_tiles():
    seeds, positions = torch.randint(-(2**63), 2**63 - 1, (9,)), torch.randint(0, 5000, (9,))
    whole = gumbel_noise(seeds, positions, torch.arange(1001, dtype=torch.int32))
    tile = gumbel_noise(seeds[3:5], positions[3:5], torch.arange(300, 411, dtype=torch.int32))
    assert torch.equal(whole[3:5, 300:411], tile)


def test_seeds_of_rows_differ():
    seeds = {derived_seed(seed, row) for seed in (0, 1, 2**64 - 1) for row in range(1000)}
    assert len(seeds) == 3000
    assert derived_seed(5, 0) == 5
    assert all(0 <= seed < 2**64 for seed in seeds)


# The warpers


def random_parameters(num_rows, generator):
    def pick(values):
        return [values[i] for i in torch.randint(0, len(values), (num_rows,), generator=generator)]

    return dict(
        temperature=pick([1.0, 0.1, 0.7, 1.3, 5.0]),
        top_k=pick([0, 1, 3, 50, 500, 5000]),
        top_p=pick([1.0, 0.0, 0.05, 0.5, 0.9, 0.95, 0.999]),
        min_p=pick([0.0, 0.01, 0.1, 0.5, 1.0]),
    )


def transformers_warpers(temperature, top_k, top_p, min_p):
    return LogitsProcessorList(
        ([TemperatureLogitsWarper(temperature)] if temperature != 1 else [])
        + ([TopKLogitsWarper(top_k)] if top_k else [])
        + ([TopPLogitsWarper(top_p)] if top_p < 1 else [])
        + ([MinPLogitsWarper(min_p)] if min_p else [])
    )


def warp(logits, parameters):
    columns = {
        "temperature": torch.tensor(parameters["temperature"]),
        "top_k": torch.tensor(parameters["top_k"]),
        "top_p": torch.tensor(parameters["top_p"], dtype=torch.float64),
        "min_p": torch.tensor(parameters["min_p"]),
    }
    return warp_logits(logits, **columns, max_top_k=max(parameters["top_k"]))


@pytest.mark.parametrize("kind", ["random", "peaked", "ties", "masked"])
def test_warpers_keep_what_those_of_transformers_keep(kind):
    generator = torch.Generator().manual_seed(hash(kind) % 1000)
    logits = torch.randn(64, 1000, generator=generator) * (8 if kind == "peaked" else 2)
    if kind == "ties":
        logits = (logits * 2).round() / 2
    if kind == "masked":
        logits[torch.rand(logits.shape, generator=generator) < 0.9] = -torch.inf
    parameters = random_parameters(64, generator)
    before = logits.clone()
    warped = warp(logits, parameters)
    assert torch.equal(logits, before), "the logits were written"
    for row in range(64):
        one = {name: values[row] for name, values in parameters.items()}
        expected = transformers_warpers(**one)(torch.tensor([[1]]), logits[row : row + 1].clone())[0]
        assert torch.equal(warped[row], expected), one


def test_a_warper_that_no_row_uses_can_be_left_out():
    logits = torch.randn(5, 100)
    neutral = dict(temperature=[1.0] * 5, top_k=[0] * 5, top_p=[1.0] * 5, min_p=[0.0] * 5)
    assert torch.equal(warp(logits, neutral), warp_logits(logits))


@pytest.mark.parametrize(
    "options",
    [
        dict(temperature=0.7, top_k=0),
        dict(temperature=1.5, top_k=5, top_p=0.9),
        dict(min_p=0.05, top_k=0),
        dict(typical_p=0.8, top_k=0),
    ],
    ids=str,
)
def test_samples_have_the_distribution_of_the_warped_scores(model, options):
    rules = RequestParams.make(
        model, GenerationConfig(do_sample=True, max_new_tokens=5, **options), prompt_ids=[5], seed=0
    )
    logits, num = torch.randn(1, 12, generator=torch.Generator().manual_seed(3)) * 2, 20_000
    expected = rules.processors(torch.tensor([[5]]), logits.clone()).softmax(-1)[0]
    selector = TokenSelector(num, 12, "cpu")
    for slot in range(num):
        selector.admit(slot, rules, slot, np.array([5]))
    history, lengths = np.full((num, 4), 5), np.ones(num, np.int64)
    if rules.plain is None:
        num = 3000
    drawn = selector.select(logits.expand(num, -1), np.arange(num), history, lengths).token_ids
    counts = torch.bincount(drawn, minlength=12)
    kept = expected > 0
    assert counts[~kept].sum() == 0
    chi_square = ((counts[kept] - num * expected[kept]) ** 2 / (num * expected[kept])).sum()
    freedom = int(kept.sum()) - 1
    assert chi_square < freedom + 5 * math.sqrt(2 * freedom) + 5


# Whole configs against generate()

EOS = [[11], [3, 7, 19, 40, 55, 56], []]
CONFIGS = {
    "greedy": dict(),
    "max_length": dict(max_length=15),
    "default length": dict(max_new_tokens=None),
    "eos": dict(eos_token_id=EOS[1], max_new_tokens=40),
    "repetition_penalty": dict(repetition_penalty=1.7),
    "encoder_repetition_penalty": dict(encoder_repetition_penalty=1.5),
    "no_repeat_ngram": dict(no_repeat_ngram_size=2),
    "encoder_no_repeat_ngram": dict(encoder_no_repeat_ngram_size=2),
    "bad_words": dict(bad_words_ids=[[5], [17, 22], [60], [61], [9, 9]]),
    "sequence_bias": dict(sequence_bias=[[[10], 5.0], [[13, 14], 3.0]]),
    "token_bias": dict(sequence_bias=[[[10], 5.0], [[13], -3.0], [[40], -math.inf]]),
    "bad_tokens": dict(bad_words_ids=[[5], [60], [61]], eos_token_id=[3]),
    "many biases": dict(sequence_bias=[[[token], 0.1 * token] for token in range(1, 41)]),
    "forced_bos": dict(forced_bos_token_id=6),
    "forced_eos": dict(forced_eos_token_id=11, eos_token_id=11),
    "suppress": dict(suppress_tokens=list(range(0, 90, 2)), begin_suppress_tokens=list(range(1, 60, 2))),
    "min_length": dict(min_length=14, eos_token_id=EOS[1]),
    "min_new_tokens": dict(min_new_tokens=6, eos_token_id=EOS[1], max_new_tokens=30),
    "exponential_decay": dict(exponential_decay_length_penalty=[3, 1.5], eos_token_id=EOS[1]),
    "renormalize": dict(renormalize_logits=True, remove_invalid_values=True),
    "watermark": dict(watermarking_config=dict(bias=2.5)),
    "sample": dict(do_sample=True),
    "top_k": dict(do_sample=True, top_k=7, temperature=1.4),
    "top_p": dict(do_sample=True, top_k=0, top_p=0.8, temperature=0.6),
    "min_p": dict(do_sample=True, top_k=0, min_p=0.1),
    "typical": dict(do_sample=True, top_k=0, typical_p=0.7),
    "epsilon": dict(do_sample=True, top_k=0, epsilon_cutoff=0.01),
    "eta": dict(do_sample=True, top_k=0, eta_cutoff=0.01),
    "changes": dict(
        do_sample=True, temperature=0.9, top_k=40, top_p=0.9, min_p=0.01, repetition_penalty=1.4, min_new_tokens=4,
        eos_token_id=EOS[1], sequence_bias=[[[9], 2.0], [[12], -1.0]], bad_words_ids=[[44]], suppress_tokens=[7, 8],
        begin_suppress_tokens=[20, 30], min_length=9,
    ),
    "penalty and top_p": dict(do_sample=True, top_k=0, top_p=0.8, repetition_penalty=0.7),
    "everything": dict(
        do_sample=True, temperature=0.9, top_k=40, top_p=0.95, min_p=0.01, repetition_penalty=1.2,
        no_repeat_ngram_size=3, min_new_tokens=4, eos_token_id=EOS[1], bad_words_ids=[[4, 5]],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_tokens_of_generate(model, name):
    options = {"max_new_tokens": 12, "do_sample": False} | CONFIGS[name]
    if "max_length" in options:
        del options["max_new_tokens"]
    for seed, prompt in enumerate(prompts(1, 4, 9)):
        config = GenerationConfig(**options)
        rules = RequestParams.make(model, config, prompt_ids=prompt, seed=seed)
        assert config.to_dict() == GenerationConfig(**options).to_dict(), "the caller's config was written"
        assert run_rows(model, prompt, rules) == [reference_tokens(model, prompt, options, seed)]


PLAIN = ["greedy", "eos", "max_length", "sample", "top_k", "top_p", "min_p"]
CHANGED = [
    "repetition_penalty", "token_bias", "bad_tokens", "suppress", "min_length", "min_new_tokens", "changes",
    "penalty and top_p", "many biases",
]  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_plain_configs_take_the_vectorised_path(model, name):
    rules = RequestParams.make(model, GenerationConfig(**CONFIGS[name]), prompt_ids=[5, 6])
    assert rules.is_plain == (name in [*PLAIN, *CHANGED, "default length"])
    assert (rules.changes is not None) == (name in CHANGED)


@pytest.mark.parametrize("name", CHANGED)
def test_changes_are_those_of_the_processors(model, name):
    """Row by row against the processors themselves, with padding, and with what was chosen before."""
    generator = np.random.default_rng(3)
    for padding in (0, 3):
        prompt = generator.integers(2, VOCAB, 5).tolist()
        ids = torch.tensor([[0] * padding + prompt])
        config = GenerationConfig(**{"max_new_tokens": 20} | CONFIGS[name])
        prepared = prepare_generation(model, config, ids)
        rules = RequestParams.from_prepared(prepared, seed=5, padding_ids=[0] * padding)
        assert rules.changes is not None
        selector = TokenSelector(3, VOCAB, "cpu")
        history, lengths = np.zeros((3, 40), np.int64), np.zeros(3, np.int64)
        history[1, :5], lengths[1] = prompt, 5
        selector.admit(1, rules, 0, history[1, :5])
        for step in range(9):
            if step == 6:
                selector.release(1)  # preempted: what was generated counts as seen
                selector.admit(1, rules, 0, history[1, : lengths[1]])
            logits = (torch.randn(1, VOCAB) * 3).bfloat16()
            seen = torch.cat([ids[0, :padding], torch.from_numpy(history[1, : lengths[1]])])[None]
            scores = rules.processors(seen, logits.float())
            if rules.do_sample:
                noise = gumbel_noise(torch.tensor([5]), torch.tensor([lengths[1]]), torch.arange(VOCAB).int())
                scores = scores + noise
            chosen = selector.select(logits, np.array([1]), history, lengths).token_ids
            assert chosen.tolist() == [int(scores.argmax())], step
            history[1, lengths[1]] = chosen[0]
            lengths[1] += 1


def test_a_bias_for_a_token_that_does_not_exist_says_so(model):
    selector = TokenSelector(1, VOCAB, "cpu")
    config = GenerationConfig(max_new_tokens=5, sequence_bias=[[[VOCAB + 3], 1.0]])
    selector.admit(0, RequestParams.make(model, config, prompt_ids=[5]), 0, np.array([5]))
    selection = selector.select(torch.randn(1, VOCAB), np.array([0]), np.array([[5]]), np.array([1]))
    assert "vocabulary size" in str(selection.errors[0])


def test_changes_leave_with_their_request(model):
    """And log-probabilities are those of the logits as they were."""
    selector, logits = TokenSelector(2, VOCAB, "cpu"), torch.randn(1, VOCAB)
    best = int(logits.argmax())
    history, lengths = np.full((2, 9), 5), np.array([3, 3])

    def choose(**options):
        config = GenerationConfig(max_new_tokens=5, **options)
        rules = RequestParams.make(model, config, prompt_ids=[5, 5, 5], logprobs=1)
        selector.admit(0, rules, 0, history[0, :3])
        selection = selector.select(logits, np.array([0]), history, lengths)
        selector.release(0)
        return int(selection.token_ids), selection.logprobs[0]

    token, logprobs = choose(suppress_tokens=[best])
    assert token == int(logits[0].topk(2).indices[1])
    assert logprobs.logprob == pytest.approx(float(logits.log_softmax(-1)[0, token]))
    assert logprobs.top_ids == (best,)
    assert choose()[0] == best


def test_defaults_of_the_model_count(model, monkeypatch):
    defaults = GenerationConfig(
        do_sample=True, top_k=4, repetition_penalty=1.3, eos_token_id=7, max_new_tokens=9, pad_token_id=0
    )
    monkeypatch.setattr(model, "generation_config", defaults)
    prompt = prompts(6)[0]
    for given in (None, GenerationConfig(), GenerationConfig(temperature=0.5)):
        rules = RequestParams.make(model, given, prompt_ids=torch.tensor(prompt), seed=3)
        assert rules.do_sample
        assert rules.eos_token_ids == (7,)
        assert rules.max_length == 15
        options = {} if given is None else given.to_diff_dict()
        options = {name: value for name, value in options.items() if name != "transformers_version"}
        expected = reference_tokens(model, prompt, options | {"do_sample": True}, 3)
        assert run_rows(model, prompt, rules) == [expected]


def test_objects_see_the_full_history_of_their_row(model):
    seen: list[tuple[list[int], tuple[int, ...], torch.dtype]] = []

    def bias(input_ids, scores):
        seen.append((input_ids.tolist(), tuple(scores.shape), scores.dtype))
        scores[:, input_ids[0, -1]] += 3  # in place, as some processors do
        return scores

    class Even(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return input_ids[:, -1] % 2 == 0

    prompt = prompts(5)[0]
    options = dict(max_new_tokens=30, do_sample=False)
    expected = reference_tokens(model, prompt, options, logits_processor=[bias], stopping_criteria=[Even()])
    want, seen[:] = list(seen), []
    rules = RequestParams.make(
        model, GenerationConfig(**options), prompt_ids=prompt, logits_processor=[bias], stopping_criteria=[Even()]
    )
    assert run_rows(model, prompt, rules) == [expected]
    assert seen == want


def test_prefix_allowed_tokens_fn(model):
    calls = []

    def allowed(batch_id, ids):
        calls.append((batch_id, len(ids)))
        return [int(ids[-1] + 1) % VOCAB, int(ids[-1] + 2) % VOCAB]

    prompt = prompts(3)[0]
    options = dict(max_new_tokens=8, do_sample=False)
    rules = RequestParams.make(model, GenerationConfig(**options), prompt_ids=prompt, prefix_allowed_tokens_fn=allowed)
    assert run_rows(model, prompt, rules) == [
        reference_tokens(model, prompt, options, prefix_allowed_tokens_fn=allowed)
    ]
    calls.clear()
    config = GenerationConfig(max_new_tokens=2, do_sample=True, num_return_sequences=2)
    run_rows(model, prompt, RequestParams.make(model, config, prompt_ids=prompt, prefix_allowed_tokens_fn=allowed))
    engines = sorted(calls)
    calls.clear()
    model.generate(torch.tensor([prompt]), config, prefix_allowed_tokens_fn=allowed)
    assert engines == sorted(calls), "before 5.24 generate() numbers repeated rows as well"


def test_rows_of_a_request_draw_independently_and_repeatably(model):
    config = GenerationConfig(max_new_tokens=12, do_sample=True, num_return_sequences=3)
    rules = RequestParams.make(model, config, prompt_ids=[5, 6, 7], seed=4)
    rows = run_rows(model, [5, 6, 7], rules)
    assert rules.num_sequences == len({tuple(row) for row in rows}) == 3
    again = RequestParams.make(model, config, prompt_ids=[5, 6, 7], seed=4)
    assert run_rows(model, [5, 6, 7], again) == rows


@pytest.mark.parametrize(
    ("options", "needs_objects"),
    [
        ({}, False),
        ({"do_sample": True, "top_p": 0.9}, False),
        ({"repetition_penalty": 1.3, "suppress_tokens": [4], "min_new_tokens": 3, "eos_token_id": 7}, False),
        ({"no_repeat_ngram_size": 2, "do_sample": True}, True),
        ({"num_beams": 2}, True),
        ({"max_time": 5.0}, True),
    ],
    ids=str,
)
def test_plain_requests_are_prepared_without_the_device(model, monkeypatch, options, needs_objects):
    """Where the model is on another device, only what runs objects of its own is prepared there, with the same seed."""
    devices = []

    def prepare(model, config, prompt, **kwargs):
        devices.append(prompt.device.type)
        return prepare_generation(model, config, torch.zeros(prompt.shape, dtype=torch.int64), **kwargs)

    monkeypatch.setattr("hf_paged.engine.sampling.request_params.prepare_generation", prepare)
    monkeypatch.setattr(type(model), "device", torch.device("meta"))
    make = lambda: RequestParams.make(model, GenerationConfig(pad_token_id=0, **options), prompt_ids=[1, 2])  # noqa: E731
    torch.manual_seed(3)
    rules = make()
    assert devices == ["cpu", "meta"][: 1 + needs_objects]
    expected = int(torch.manual_seed(3) and torch.randint(0, 2**63 - 1, ())) if rules.do_sample else 0
    assert rules.seed == expected


def test_seed_none_follows_torchs_global_generator(model):
    def draw():
        config = GenerationConfig(max_new_tokens=12, do_sample=True)
        return [RequestParams.make(model, config, prompt_ids=[5]).seed for _ in range(3)]

    torch.manual_seed(1)
    first = draw()
    torch.manual_seed(1)
    assert draw() == first
    assert len(set(first)) == 3
    state = torch.get_rng_state()
    RequestParams.make(model, GenerationConfig(max_new_tokens=1), prompt_ids=[5])
    assert torch.equal(torch.get_rng_state(), state), "a greedy request leaves the generator alone"


def test_stop_strings(model):
    tokenizer, prompt = characters(VOCAB), prompts(4)[0]
    options = dict(max_new_tokens=40, do_sample=True, temperature=3.0)
    text = tokenizer.decode(reference_tokens(model, prompt, options, 5))
    for stop in (text[7:10], text[20:21], [text[12:16], "never"]):
        stopping = options | dict(stop_strings=stop)
        rules = RequestParams.make(model, GenerationConfig(**stopping), prompt_ids=prompt, seed=5, tokenizer=tokenizer)
        assert rules.has_criteria
        expected = reference_tokens(model, prompt, stopping, 5, tokenizer=tokenizer)
        assert len(expected) < 40
        assert run_rows(model, prompt, rules) == [expected]


def test_max_time_ends_a_row(model):
    config = GenerationConfig(max_new_tokens=40, max_time=1e-6)
    assert len(run_rows(model, [5], RequestParams.make(model, config, prompt_ids=[5]))[0]) == 1


# Batches

BATCH = [
    "greedy", "sample", "top_k", "top_p", "min_p", "everything", "repetition_penalty", "typical", "watermark",
    "changes", "suppress",
]  # fmt: skip


def batch_of_slots(model, names):
    selector = TokenSelector(64, VOCAB, "cpu")
    history, lengths = np.random.default_rng(0).integers(2, VOCAB, (64, 40)), np.zeros(64, np.int64)
    slots = np.random.default_rng(1).permutation(64)[: len(names)]
    for i, (slot, name) in enumerate(zip(slots.tolist(), names)):
        lengths[slot] = 3 + i % 30
        config = GenerationConfig(max_new_tokens=40, **CONFIGS[name])
        prompt = history[slot, :3].tolist()
        rules = RequestParams.make(model, config, prompt_ids=prompt, seed=i * 7919)
        selector.admit(slot, rules, 0, history[slot, : lengths[slot]])
    return selector, slots, history, lengths


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_does_not_depend_on_the_batch(model, dtype):
    names = [BATCH[i % len(BATCH)] for i in range(50)]
    selector, slots, history, lengths = batch_of_slots(model, names)
    logits = (torch.randn(50, 1000) * 3).to(dtype)
    whole = selector.select(logits, slots, history, lengths)
    assert whole.errors == {}
    for i in range(50):
        # As at first: a token that was chosen counts as seen.
        selector, *_ = batch_of_slots(model, names)
        alone = selector.select(logits[i : i + 1], slots[i : i + 1], history, lengths)
        assert alone.token_ids.tolist() == whole.token_ids[i : i + 1].tolist(), names[i]
    order = np.random.default_rng(2).permutation(50)[:37]
    selector, *_ = batch_of_slots(model, names)
    some = selector.select(logits[order], slots[order], history, lengths)
    assert torch.equal(some.token_ids, whole.token_ids[order])


def test_a_slot_is_as_new_after_another_request(model):
    selector, slots, history, lengths = batch_of_slots(model, ["sample"] * 3)
    logits = torch.randn(3, VOCAB)
    before = selector.select(logits, slots, history, lengths).token_ids
    rules = RequestParams.make(model, GenerationConfig(max_new_tokens=40, do_sample=True), prompt_ids=[5], seed=7919)
    slot = int(slots[1])
    selector.release(slot)
    selector.admit(
        slot, RequestParams.make(model, GenerationConfig(no_repeat_ngram_size=2), prompt_ids=[5]), 0, np.array([5])
    )
    selector.release(slot)
    selector.admit(slot, rules, 0, np.array([5]))
    assert torch.equal(selector.select(logits, slots, history, lengths).token_ids, before)


def test_errors_end_their_own_row(model):
    def fail(input_ids, scores):
        raise RuntimeError("broken processor")

    selector, slots, history, lengths = batch_of_slots(model, ["sample", "greedy", "everything", "greedy"])
    logits = torch.randn(4, VOCAB)
    good = selector.select(logits, slots, history, lengths)
    bad = int(slots[1])
    selector.release(bad)
    config = GenerationConfig(max_new_tokens=30)
    selector.admit(bad, RequestParams.make(model, config, prompt_ids=[5], logits_processor=[fail]), 0, np.array([5]))
    selection = selector.select(logits, slots, history, lengths)
    assert str(selection.errors.pop(bad)) == "broken processor"
    assert selection.errors == {}
    assert selection.token_ids[1] == INVALID_TOKEN
    assert selection.token_ids[[0, 2, 3]].tolist() == good.token_ids[[0, 2, 3]].tolist()

    class Fails(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            raise RuntimeError("broken criterion")

    selector.release(bad)
    selector.admit(
        bad, RequestParams.make(model, config, prompt_ids=[5], stopping_criteria=[Fails()]), 0, np.array([5])
    )
    other = int(slots[3])
    selector.release(other)
    always = [lambda input_ids, scores: True]
    selector.admit(other, RequestParams.make(model, config, prompt_ids=[5], stopping_criteria=always), 0, np.array([5]))
    stopped, errors = selector.stopped(slots[[1, 3]], history, lengths)
    assert stopped == {other}
    assert list(errors) == [bad]


@pytest.mark.parametrize("name", ["greedy", "sample", "repetition_penalty", "everything"])
def test_scores_without_a_token_are_reported(model, name):
    selector, slots, history, lengths = batch_of_slots(model, [name] * 3)
    logits = torch.randn(3, VOCAB)
    good = selector.select(logits, slots, history, lengths).token_ids
    logits[1, 5] = torch.nan
    selector, slots, history, lengths = batch_of_slots(model, [name] * 3)
    chosen = selector.select(logits, slots, history, lengths).token_ids
    assert chosen.tolist() == [good[0], INVALID_TOKEN, good[2]]


def test_logprobs(model):
    logits = torch.randn(3, VOCAB).bfloat16()
    selector = TokenSelector(3, VOCAB, "cpu")
    for slot, count in enumerate((None, 1, 4)):
        config = GenerationConfig(max_new_tokens=4, do_sample=slot == 2, temperature=0.3)
        selector.admit(
            slot, RequestParams.make(model, config, prompt_ids=[5], logprobs=count, seed=1), 0, np.array([5])
        )
    selection = selector.select(logits, np.arange(3), np.zeros((3, 4), np.int64), np.ones(3, np.int64))
    assert list(selection.logprobs) == [1, 2]
    expected = logits.float().log_softmax(-1)
    for slot, count in ((1, 1), (2, 4)):
        got = selection.logprobs[slot]
        assert got.token_id == selection.token_ids[slot]
        assert got.logprob == pytest.approx(float(expected[slot, got.token_id]))
        assert list(got.top_ids) == expected[slot].topk(count).indices.tolist()
        assert list(got.top_logprobs) == pytest.approx(expected[slot].topk(count).values.tolist())
    of_prompt = prompt_logprobs(logits, torch.tensor([4, 5, 6]), 2)
    assert [item.token_id for item in of_prompt] == [4, 5, 6]
    assert of_prompt[1].logprob == pytest.approx(float(expected[1, 5]))


@pytest.mark.parametrize("size", [1e4, 1e8])
def test_logprobs_of_large_logits(size):
    """Eight logits of any size: their probabilities sum to 1, be the log-sum-exp known or not."""
    logits = torch.full((1, VOCAB), -torch.inf)
    logits[0, :8] = size
    slot = torch.zeros(1, dtype=torch.int64)
    neutral = (torch.zeros(1), slot, torch.ones(1), torch.zeros(1), slot, slot + 1)
    rules = torch.zeros(1, reference.MARKS + 4, dtype=torch.int64)
    _, known = reference.sample_tokens_reference(logits, slot, slot, *neutral, rules)
    for lse in (None, known):
        (got,) = PendingLogprobs(logits, torch.tensor([3]), [8], lse).wait()
        assert got.logprob == pytest.approx(-math.log(8), abs=1e-6)
        assert got.top_logprobs == pytest.approx([-math.log(8)] * 8, abs=1e-6)


# Prompt lookup


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(do_sample=True, temperature=0.4, top_k=5),
        dict(repetition_penalty=1.1),
        dict(eos_token_id=EOS[1]),
        dict(do_sample=True, temperature=0.4, top_k=5, no_repeat_ngram_size=4),
    ],
    ids=str,
)
def test_prompt_lookup_gives_the_tokens_of_no_lookup(model, options):
    for seed in range(6):
        start = prompts(4, 7)[seed % 2]
        prompt = (start * 6)[: 11 + seed]
        base = dict(max_new_tokens=30, do_sample=False) | options
        rules = RequestParams.make(
            model, GenerationConfig(**base, prompt_lookup_num_tokens=4), prompt_ids=prompt, seed=seed
        )
        assert rules.mode == "assisted"
        tokens, steps = run_assisted(model, prompt, rules)
        assert tokens == reference_tokens(model, prompt, base, seed)
        assert steps <= len(tokens)


def test_prompt_lookup_saves_steps_and_asks_criteria_after_each_token(model):
    prompt = prompts(5)[0] * 4
    calls = []

    def repeat(input_ids, scores):
        scores[:, input_ids[0, -5]] += 100
        return scores

    def count(input_ids, scores):
        calls.append(input_ids.shape[1])
        return len(calls) == 13

    config = GenerationConfig(max_new_tokens=40, prompt_lookup_num_tokens=4)
    rules = RequestParams.make(model, config, prompt_ids=prompt, logits_processor=[repeat], stopping_criteria=[count])
    tokens, steps = run_assisted(model, prompt, rules)
    assert tokens == (prompt[:5] * 3)[:13]
    assert calls == list(range(21, 34))
    assert steps == 3


# What is refused


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (dict(prompt_ids=[]), "prompt_ids is empty"),
        (dict(prompt_ids=[[1, 2]]), "prompt_ids is one sequence"),
        (dict(prompt_ids=[5, VOCAB]), "prompt_ids has 97: ids from 0 to 96"),
        (dict(prompt_ids=[-1]), "prompt_ids has -1"),
        (dict(prompt_ids=list(range(2, 9)), config=dict(max_length=5)), "`max_length` is set to 5"),
        (dict(seed=-1), "seed is -1"),
        (dict(seed=2**64), "seed is 18446744073709551616"),
        (dict(seed=True), "seed is True"),
        (dict(logprobs=-1), "logprobs is -1"),
        (dict(logprobs=1, config=dict(num_beams=2)), "logprobs=1 is reported for greedy and sampled requests only"),
        (dict(config=dict(prompt_lookup_num_tokens=2, do_sample=True, num_return_sequences=2)), "num_return_sequences"),
        (dict(prompt_logprobs=0.5), "prompt_logprobs is 0.5"),
        (dict(config=dict(temperature=-1.0, do_sample=True)), "temperature"),
        (dict(config=dict(top_p=-0.5, do_sample=True)), "top_p"),
        (dict(config=dict(stop_strings=["x"])), "tokenizer"),
        (dict(config=dict(guidance_scale=2.0)), "guidance_scale=2.0"),
        (dict(config=dict(token_healing=True)), "token_healing"),
        (dict(config=dict(penalty_alpha=0.5, top_k=4)), "contrastive search"),
        (dict(config=dict(num_beams=4, num_beam_groups=2, diversity_penalty=0.5)), "group beam search"),
        (dict(config=dict(force_words_ids=[[5]], num_beams=2)), "constrained beam search"),
        (dict(config=dict(cache_implementation="quantized")), "cache_implementation"),
    ],
    ids=str,
)
def test_bad_arguments_name_themselves(model, arguments, match):
    config = GenerationConfig(max_new_tokens=None, **arguments.pop("config", {}))
    with pytest.raises(ValueError, match=match):
        RequestParams.make(model, config, **({"prompt_ids": [5]} | arguments))


@pytest.mark.parametrize(
    ("name", "value"),
    [("logits_processor", max), ("logits_processor", [3]), ("stopping_criteria", [None]), ("generation_config", {})],
)
def test_bad_types_name_themselves(model, name, value):
    arguments = {"generation_config": None, "prompt_ids": [5]} | {name: value}
    with pytest.raises(TypeError, match=name):
        RequestParams.make(model, **arguments)


def test_what_is_not_served_is_known_before():
    assert unserved_reason(GenerationConfig(num_beams=1, prompt_lookup_num_tokens=None)) is None
    assert "contrastive" in unserved_reason(GenerationConfig(penalty_alpha=0.6, top_k=4))
