"""Streamers, criteria, processors and stop strings of a caller see in a patched generate() what they see without."""

import pytest
import torch
from patched import CONFIG, EOS, Recorder, assert_same, batch, both
from tokenizers_of_tests import characters
from transformers import GenerationConfig, StoppingCriteria

import hf_paged


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
