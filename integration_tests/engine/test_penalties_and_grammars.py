"""Presence and frequency penalties, biases by token and grammars: beside a loop of plain PyTorch, and generate()."""

import math

import numpy as np
import pytest
import torch
from random_requests import tiny_model
from small_engines import config, make_engine, prompt
from transformers import GenerationConfig

import hf_paged

ENGINES = {
    "cpu": lambda model, **options: hf_paged.Engine(
        model, hf_paged.EngineConfig(self_check=False, **options), background=False
    ),
    "ahead": make_engine,
}
VOCAB = 99


@pytest.fixture(scope="module")
def model():
    made = tiny_model("llama")
    assert made.config.vocab_size == VOCAB
    return made


@pytest.fixture(params=ENGINES)
def engine(request, model):
    with ENGINES[request.param](model, num_pages=200, page_size=8, max_num_seqs=8, max_batch_tokens=64) as made:
        yield made


def loop(model, ids, count, presence=0.0, frequency=0.0, bias=None, repetition=1.0):
    """Greedy tokens by vLLM's definition, token by token: bias, repetition over all tokens, then counts of new ones."""
    tokens, new = list(ids), []
    for _ in range(count):
        with torch.no_grad():
            x = model(torch.tensor([tokens])).logits[0, -1].float().tolist()
        for token, value in (bias or {}).items():
            x[token] += value
        for token in set(tokens):
            x[token] = x[token] * repetition if x[token] < 0 else x[token] / repetition
        for token in set(new):
            x[token] -= frequency * new.count(token) + presence
        best = sorted(x)[-2:]
        assert best[1] - best[0] > 1e-5, "a tie says nothing"
        new.append(x.index(max(x)))
        tokens.append(new[-1])
    return new


CASES = [
    dict(presence=2.9),
    dict(frequency=1.35),
    dict(presence=-0.4, frequency=2.6),
    dict(frequency=-1.8),
    dict(bias={5: 1.5, 60: -2.0, 7: 0.75}),
    dict(presence=0.5, frequency=0.2, bias={9: 0.8, 11: 100.0}, repetition=1.3),
]


def test_as_a_plain_loop(engine):
    """Rows of all kinds in one batch, beside rows without."""
    handles = []
    for i, case in enumerate(CASES):
        options = config(20, repetition_penalty=case.get("repetition", 1.0))
        handles.append(
            engine.submit(
                prompt(5 + i, i), generation_config=options, presence_penalty=case.get("presence", 0.0),
                frequency_penalty=case.get("frequency", 0.0), logit_bias=case.get("bias"),
            )
        )  # fmt: skip
        handles.append(engine.submit(prompt(5 + i, i), generation_config=config(20)))
    plain = 0
    for i, case in enumerate(CASES):
        with_case, without = handles[2 * i].result(), handles[2 * i + 1].result()
        assert with_case.error is None
        assert with_case.token_ids == loop(engine.model, prompt(5 + i, i), 20, **case)
        assert without.token_ids == loop(engine.model, prompt(5 + i, i), 20)
        plain += with_case.token_ids == without.token_ids
    assert plain <= 1, "the penalties hardly change anything here"
    engine.check()


def unchanged(ids, scores):
    return scores


@pytest.mark.parametrize("num", [1, 3])
def test_samples_are_those_of_processors(engine, num):
    """A processor of the request's own makes it choose by itself, from CountPenalties and transformers' processors."""
    options = config(24, do_sample=True, temperature=0.9, top_k=30, top_p=0.95, num_return_sequences=num)
    extra = dict(presence_penalty=0.7, frequency_penalty=-0.3, logit_bias={3: 2.0, 8: -1.0}, seed=3)
    mine = engine.submit(prompt(7), generation_config=options, **extra)
    theirs = engine.submit(prompt(7), generation_config=options, logits_processor=[unchanged], **extra)
    got, expected = mine.result().sequences, theirs.result().sequences
    assert [sequence.token_ids for sequence in got] == [sequence.token_ids for sequence in expected]
    assert mine._request.rules.is_plain
    assert not theirs._request.rules.is_plain


def test_counts_are_there_after_a_preemption(model):
    with make_engine(model, num_pages=200) as engine:
        handle = engine.submit(prompt(6), generation_config=config(20), frequency_penalty=0.5, presence_penalty=0.3)
        for _ in range(9):
            engine.step()
        engine.refresh_weights()
        assert handle.result().timing.preemptions == 1
        assert handle.result().token_ids == loop(model, prompt(6), 20, frequency=0.5, presence=0.3)


def test_counts_do_not_stay_in_a_slot(model):
    with make_engine(model, max_num_seqs=1) as engine:
        for ids in (prompt(6), prompt(6), prompt(9, 1)):
            output = engine.submit(ids, generation_config=config(15), frequency_penalty=0.5).result()
            assert output.token_ids == loop(model, ids, 15, frequency=0.5)
        assert engine.submit(prompt(6), generation_config=config(15)).result().token_ids == loop(model, prompt(6), 15)


# Grammars


class Automaton:
    """Tokens of class ``state % 3`` in turn; eos may come at multiples of 4, and must at ``most``."""

    EOS = 1

    def __init__(self, most: int = 1000, fails_at: int = -1) -> None:
        self.most, self.fails_at, self.count, self.is_ended = most, fails_at, 0, False

    def allowed(self) -> list[int]:
        if self.is_ended:
            return list(range(VOCAB))
        tokens = [] if self.count == self.most else [t for t in range(2, VOCAB) if t % 3 == self.count % 3]
        return tokens + [self.EOS] * (self.count % 4 == 3 or self.count == self.most)

    def fill_bitmask(self, bitmask: np.ndarray) -> None:
        if self.count == self.fails_at:
            raise LookupError("no such state")
        assert bitmask.dtype == np.int32
        assert bitmask.shape == (-(-VOCAB // 32),)
        for token in self.allowed():
            bitmask.view(np.uint32)[token // 32] |= np.uint32(1 << token % 32)

    def accept(self, token_id: int) -> bool:
        is_allowed = token_id in self.allowed()
        self.count += 1
        self.is_ended |= token_id == self.EOS
        return is_allowed


def allowed_tokens(prompt_length):
    """The same for transformers' own prefix_allowed_tokens_fn."""

    def allowed(_, ids):
        automaton = Automaton()
        for token in ids[prompt_length:].tolist():
            assert automaton.accept(token)
        return automaton.allowed()

    return allowed


def test_grammars_as_generate_with_allowed_tokens(engine):
    options = GenerationConfig(max_new_tokens=14, do_sample=False, eos_token_id=1, pad_token_id=0)
    prompts = [prompt(4 + 5 * i, i) for i in range(5)]
    guided = [engine.submit(ids, generation_config=options, grammar=Automaton, logprobs=1) for ids in prompts]
    plain = [engine.submit(ids, generation_config=options) for ids in prompts]
    for ids, handle, other in zip(prompts, guided, plain):
        output = handle.result()
        assert output.error is None
        inputs = torch.tensor([ids])
        expected = engine.model.generate(
            inputs, generation_config=options, prefix_allowed_tokens_fn=allowed_tokens(len(ids))
        )
        assert output.token_ids == expected[0, len(ids) :].tolist()
        free = engine.model.generate(inputs, generation_config=options)[0, len(ids) :].tolist()
        assert other.result().token_ids == free
        assert output.token_ids != free
        # Of the model's own distribution, before the mask.
        logits = engine.model(torch.tensor([ids + output.token_ids])).logits[0, len(ids) - 1 : -1].log_softmax(-1)
        got = [entry.logprob for entry in output.logprobs]
        assert got == pytest.approx([float(logits[i, t]) for i, t in enumerate(output.token_ids)], abs=1e-4)
    engine.check()


def test_steps_run_ahead_with_grammars(model):
    """The next step is launched while the tokens of guided rows are on their way, and their penalties count once."""
    with make_engine(model, max_num_seqs=4) as engine:
        options = config(16)
        kept = dict(frequency_penalty=0.4, grammar=Automaton)
        handles = [engine.submit(prompt(5, i), generation_config=options, **kept) for i in range(2)]
        handles.append(engine.submit(prompt(5, 7), generation_config=options))
        ahead = 0
        while not all(handle.is_done for handle in handles):
            engine.step()
            ahead += engine.loop.pending is not None
        assert ahead > 10
        for i in range(2):
            alone = engine.submit(prompt(5, i), generation_config=options, logits_processor=[unchanged], **kept)
            assert alone.result().token_ids == handles[i].result().token_ids
        assert handles[2].result().token_ids == loop(model, prompt(5, 7), 16)


def test_samples_follow_a_matcher_each(engine):
    options = config(17, do_sample=True, num_return_sequences=4, eos_token_id=1, temperature=1.5)
    output = engine.submit(prompt(6), generation_config=options, grammar=lambda: Automaton(most=11), seed=2).result()
    assert len({tuple(sequence.token_ids) for sequence in output.sequences}) > 1
    for sequence in output.sequences:
        automaton = Automaton(most=11)
        assert all(automaton.accept(token) for token in sequence.token_ids)
        assert (sequence.finish_reason, sequence.stop_reason) == ("stop", 1)


def test_a_guided_request_goes_on_after_a_preemption(model):
    with make_engine(model, num_pages=200) as engine:
        handle = engine.submit(prompt(6), generation_config=config(20), grammar=Automaton)
        for _ in range(9):
            engine.step()
        engine.refresh_weights()
        assert handle.result().timing.preemptions == 1
        again = engine.submit(prompt(6), generation_config=config(20), grammar=Automaton).result()
        assert handle.result().token_ids == again.token_ids


def test_a_grammar_that_fails_ends_its_request_alone(engine):
    """With others in its slot by the time its error arrives."""
    options = config(12)
    fails = dict(generation_config=options, grammar=lambda: Automaton(fails_at=5))
    bad = [engine.submit(prompt(5, i), **fails) for i in range(6)]
    good = [engine.submit(prompt(5, i), generation_config=options) for i in range(9)]
    for handle in bad:
        output = handle.result()
        assert isinstance(output.error, LookupError)
        assert len(output.token_ids) == 5
    for i, handle in enumerate(good):
        assert handle.result().token_ids == loop(engine.model, prompt(5, i), 12)
    engine.check()


def test_a_dead_end_is_an_error(model):
    class Empty(Automaton):
        def fill_bitmask(self, bitmask):
            """No token."""

    with make_engine(model) as engine:
        output = engine.submit(prompt(5), generation_config=config(4), grammar=Empty).result()
        assert "the grammar accepts no token behind 0 tokens" in str(output.error)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(presence_penalty=math.nan), "presence_penalty is nan: a finite number is accepted"),
        (dict(frequency_penalty="1"), "frequency_penalty is '1': a finite number is accepted"),
        (dict(logit_bias={VOCAB: 1.0}), "logit_bias has token 99: ids from 0 to 98 are accepted"),
        (dict(logit_bias={"5": 1.0}), "logit_bias has token '5'"),
        (dict(logit_bias={5: math.inf}), "logit_bias has inf for token 5: a finite number is accepted"),
        (dict(logit_bias=[5]), "logit_bias is .*: a dict of token ids and numbers is accepted"),
        (dict(grammar=Automaton, generation_config=config(3, num_beams=2)), "grammar: greedy and sampled requests"),
        (dict(grammar=Automaton()), "a callable that makes a matcher for each sequence is accepted"),
        (dict(grammar="a*"), "a callable that makes a matcher for each sequence is accepted"),
    ],
)  # fmt: skip
def test_what_is_not_accepted(model, arguments, message):
    with make_engine(model) as engine, pytest.raises((ValueError, TypeError), match=message):
        engine.submit(prompt(5), **(dict(generation_config=config(3)) | arguments))


def test_many_biases(model):
    """As many as the device takes, and more."""
    biases = {token: 0.01 * token for token in range(2, VOCAB)}
    with make_engine(model) as engine:
        output = engine.submit(prompt(5), generation_config=config(6), logit_bias=biases).result()
        assert output.token_ids == loop(model, prompt(5), 6, bias=biases)
