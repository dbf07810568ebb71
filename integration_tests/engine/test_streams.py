"""Events of new tokens, what ended a request, a bounded queue, and views of an engine that wait for nothing."""

import asyncio
from pathlib import Path

import numpy as np
import pytest
import torch
from random_requests import tiny_model
from small_engines import alone, config, make_engine, prompt
from tokenizers_of_tests import characters
from transformers import AutoTokenizer

import hf_paged
from hf_paged.engine.text import IncrementalText

SMALL_MODEL = Path(__file__).parent.parent / "assets" / "small_model"
ENGINES = {
    "cpu": lambda model, **options: hf_paged.Engine(model, hf_paged.EngineConfig(**options)),
    "ahead": make_engine,
}


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


@pytest.fixture(params=ENGINES)
def engine(request, model):
    with ENGINES[request.param](model, num_pages=200, page_size=8, max_num_seqs=8, self_check=False) as made:
        yield made


def by_sequence(events):
    found: dict[int, list] = {}
    for event in events:
        found.setdefault(event.index, []).append(event)
    return found


async def taken(events):
    return [event async for event in events]


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize("num", [1, 3])
def test_events_are_the_result_piece_by_piece(engine, num, is_async):
    options = config(11, do_sample=True, num_return_sequences=num, eos_token_id=list(range(3, 20)))
    others = [engine.submit(prompt(7, i), generation_config=config(20)) for i in range(2)]
    handle = engine.submit(prompt(13), generation_config=options, seed=5, logprobs=2)
    events = asyncio.run(taken(handle.events())) if is_async else list(handle.events())
    output = handle.result()
    found = by_sequence(events)
    assert sorted(found) == list(range(num))
    for index, sequence in enumerate(output.sequences):
        mine = found[index]
        assert [event.token_id for event in mine] == sequence.token_ids
        assert [event.finish_reason for event in mine] == [None] * (len(mine) - 1) + [sequence.finish_reason]
        expected = [(entry.logprob, entry.top_ids, entry.top_logprobs) for entry in sequence.logprobs]
        assert [(event.logprob, event.top_ids, event.top_logprobs) for event in mine] == expected
        assert all(len(event.top_ids) == 2 and event.text is None for event in mine)
    assert [h.result().token_ids for h in others] == [alone(engine.model, prompt(7, i), config(20)) for i in range(2)]


def test_events_come_before_the_end(model):
    with make_engine(model) as engine:
        handle = engine.submit(prompt(9), generation_config=config(12, num_return_sequences=2, do_sample=True), seed=1)
        seen, counts = [0, 0], []
        for event in handle.events():
            seen[event.index] += 1
            if not handle.is_done:
                counts.append(tuple(seen))
        assert len(counts) > 12, "nearly all events came when the request had ended"
        # Sequences of one request advance together.
        assert max(abs(a - b) for a, b in counts) <= 1


def test_text_of_events_is_the_text(model):
    tokenizer = characters(97)
    with make_engine(model) as engine:
        handle = engine.submit(prompt(9), generation_config=config(12))
        texts = [event.text for event in handle.events(tokenizer, skip_special_tokens=False)]
        assert "".join(texts) == tokenizer.decode(handle.result().token_ids)


@pytest.mark.parametrize("source", ["random tokens", "text"])
def test_incremental_text(source):
    tokenizer, random = AutoTokenizer.from_pretrained(SMALL_MODEL), np.random.default_rng(0)
    for _ in range(50):
        ids = random.integers(0, len(tokenizer), 40).tolist()
        if source == "text":
            ids = tokenizer("naïve 語 𝄞 = '€';" + "".join(chr(97 + i % 26) for i in ids[:9])).input_ids
        text = IncrementalText(tokenizer)
        pieces = [text.add(token, i + 1 == len(ids)) for i, token in enumerate(ids)]
        assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        if source == "text":
            assert not any("\ufffd" in piece for piece in pieces)


def test_cancelled_events_end_and_errors_are_raised(model):
    options = hf_paged.EngineConfig(num_pages=200, self_check=False)
    with hf_paged.Engine(model, options, background=False) as engine:
        handle = engine.submit(prompt(5), generation_config=config(90))
        events = handle.events()
        first = next(iter(events)).token_id
        handle.cancel()
        rest = [event.token_id for event in events]
        output = handle.result()
        assert output.finish_reason == "cancelled"
        assert len(output.token_ids) < 90
        assert [first, *rest] == output.token_ids

        def fails(ids, scores):
            raise KeyError("mine")

        with pytest.raises(KeyError, match="mine"):
            list(engine.submit(prompt(5), generation_config=config(3), logits_processor=[fails]).events())
        with pytest.raises(hf_paged.RequestError, match="runs beams"):
            engine.submit(prompt(5), generation_config=config(3, num_beams=2)).events()


def test_dropped_events_cancel_the_request(model):
    options = hf_paged.EngineConfig(num_pages=200, self_check=False)
    with hf_paged.Engine(model, options, background=False) as engine:
        handle = engine.submit(prompt(5), generation_config=config(90))
        request = handle._request
        for _ in handle.events():
            break
        del handle
        engine.step()
        assert request.output.finish_reason == "cancelled"


def test_stop_reason(engine):
    model, tokenizer = engine.model, characters(97)
    ids = prompt(9)
    tokens = alone(model, ids, config(12))
    text = tokenizer.decode(tokens[3:6])
    by_text = engine.submit(ids, generation_config=config(12, stop_strings=["nothing", text]), tokenizer=tokenizer)
    by_eos = engine.submit(ids, generation_config=config(12, eos_token_id=[1, tokens[4]]))
    by_length = engine.submit(ids, generation_config=config(12))
    by_criterion = engine.submit(
        ids, generation_config=config(12), stopping_criteria=[lambda ids, _: torch.tensor([ids.shape[1] >= 11])]
    )
    seen = [handle.result() for handle in (by_text, by_eos, by_length, by_criterion)]
    assert [output.stop_reason for output in seen] == [text, tokens[4], None, None]
    assert [output.sequences[0].stop_reason for output in seen] == [text, tokens[4], None, None]
    assert [output.finish_reason for output in seen] == ["stop", "stop", "length", "stop"]
    beams = engine.generate([ids], generation_config=config(6, num_beams=2, eos_token_id=tokens[0]))[0]
    assert beams.stop_reason == (tokens[0] if beams.finish_reason == "stop" else None)


def test_a_bounded_queue(model):
    options = hf_paged.EngineConfig(num_pages=200, page_size=8, max_num_seqs=3, max_waiting=2, self_check=False)
    with hf_paged.Engine(model, options, background=False) as engine:
        handles = [engine.submit(prompt(5, i), generation_config=config(6)) for i in range(5)]
        with pytest.raises(hf_paged.QueueFullError, match=r"2 requests wait for a slot.*EngineConfig\(max_waiting=\)"):
            engine.submit(prompt(5), generation_config=config(6))
        engine.step()
        with pytest.raises(hf_paged.QueueFullError) as raised:
            engine.submit(prompt(5), generation_config=config(6))
        assert (raised.value.waiting, raised.value.max_waiting) == (2, 2)
        # Prompts of one call are handed over together.
        outputs = engine.generate([prompt(5, i) for i in range(9)], generation_config=config(6))
        assert all(output.finish_reason == "length" for output in outputs)
        assert [handle.result().finish_reason for handle in handles] == ["length"] * 5
        # Slots are free again.
        [engine.submit(prompt(5, i), generation_config=config(2)).result() for i in range(4)]
        engine.submit(prompt(5), generation_config=config(2, num_return_sequences=3, do_sample=True))
    for wrong in (0, -1, 2.5, True):
        with pytest.raises((TypeError, ValueError), match="max_waiting must be None or an int of at least 1"):
            hf_paged.EngineConfig(max_waiting=wrong)


def test_snapshot_and_health(model):
    options = hf_paged.EngineConfig(num_pages=200, page_size=8, max_num_seqs=2, self_check=False)
    engine = hf_paged.Engine(model, options, background=False)
    names = ["a", "b", "c"]
    handles = [engine.submit(prompt(5), generation_config=config(6), request_id=name, priority=1) for name in names]
    for _ in range(3):
        engine.step()
    seen = engine.snapshot()
    assert seen.health == engine.health()
    assert (seen.health.state, seen.health.step_s, seen.health.unfinished) == ("open", None, 3)
    assert seen.health.is_serving
    assert (seen.stats.running, seen.stats.waiting, seen.stats.waiting_tokens) == (2, 1, 5)
    assert [request.request_id for request in seen.requests] == names
    assert [request.state for request in seen.requests] == ["running", "running", "waiting"]
    assert [request.new_tokens for request in seen.requests] == [3, 3, 0]
    assert [request.prompt_tokens for request in seen.requests] == [5] * 3
    assert [request.first_token_s is None for request in seen.requests] == [False, False, True]
    assert all(request.age_s > 0 and request.priority == 1 for request in seen.requests)
    engine.pause()
    assert (engine.health().state, engine.health().is_serving) == ("paused", False)
    engine.resume()
    assert [handle.result().finish_reason for handle in handles] == ["length"] * 3
    assert engine.snapshot().requests == ()
    engine.close()
    assert engine.health().state == "closed"


def test_health_of_a_broken_engine(model, monkeypatch):
    engine = hf_paged.Engine(model, hf_paged.EngineConfig(num_pages=50, self_check=False), background=False)
    cause = RuntimeError("the books")
    monkeypatch.setattr(engine.core, "plan", lambda is_ahead=False: (_ for _ in ()).throw(cause))
    handle = engine.submit(prompt(5), generation_config=config(6))
    assert handle.result().error is cause
    assert (engine.health().state, engine.health().error) == ("broken", cause)
    assert not engine.health().is_serving
