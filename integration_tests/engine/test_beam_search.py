"""Beam search without the engine: sequences, scores and beam indices of generate() on the same model."""

import dataclasses

import pytest
import torch
from dense_engine import all_logits, run_beams
from explicit_models import prompts, tiny_model
from hf_paged_kernels.sampling.reference import gumbel_noise
from transformers import GenerationConfig

from hf_paged.engine.sampling.beam_search import BeamSearch
from hf_paged.engine.sampling.token_selector import RequestParams

EOS = [3, 7, 19, 40, 55, 56]


@pytest.fixture(scope="module")
def model():
    model = tiny_model("llama", "eager", num_hidden_layers=2)
    model.generation_config.pad_token_id = 0
    return model


def fill_value(rules):
    """What generate() pads shorter sequences with: a pad token of 0 does not count in its expression."""
    eos = rules.eos_token_ids
    return (rules.pad_token_id or eos[0]) if eos else -1


def check(model, prompt, options, seed=None, **kwargs):
    config = GenerationConfig(**options)
    rules = RequestParams.make(model, config, prompt_ids=prompt, seed=seed, **kwargs)
    assert rules.mode == "beams"
    found = run_beams(model, prompt, rules)
    out = model.generate(
        torch.tensor([prompt]), generation_config=config, return_dict_in_generate=True, output_scores=True, **kwargs
    )
    assert len(found) == rules.num_return_sequences == len(out.sequences)
    for i, sequence in enumerate(found):
        length = len(sequence.token_ids)
        new = out.sequences[i, len(prompt) :].tolist()
        assert sequence.token_ids == new[:length]
        assert set(new[length:]) <= {fill_value(rules)}
        assert sequence.beam_indices == out.beam_indices[i, :length].tolist()
        assert set(out.beam_indices[i, length:].tolist()) <= {-1}
        assert sequence.score == pytest.approx(out.sequences_scores[i].item(), rel=1e-5)
    assert max(len(sequence.token_ids) for sequence in found) == out.sequences.shape[1] - len(prompt)
    return found


@pytest.mark.parametrize("num_beams", [2, 3, 5])
@pytest.mark.parametrize("early_stopping", [True, False, "never"])
@pytest.mark.parametrize("length_penalty", [-0.7, 0.0, 1.0, 2.5])
def test_sequences_and_scores_of_generate(model, num_beams, early_stopping, length_penalty):
    for prompt, eos in zip(prompts(1, 4, 9), (EOS, EOS[:1], None)):
        options = dict(
            num_beams=num_beams, early_stopping=early_stopping, length_penalty=length_penalty, max_new_tokens=14,
            num_return_sequences=num_beams - 1 or 1, do_sample=False, eos_token_id=eos,
        )  # fmt: skip
        check(model, prompt, options)


PROCESSED = {
    "repetition_penalty": dict(repetition_penalty=1.4),
    "no_repeat_ngram": dict(no_repeat_ngram_size=2),
    "min_new_tokens": dict(min_new_tokens=6),
    "bad_words": dict(bad_words_ids=[[5], [17, 22], [60]]),
    "forced_eos": dict(forced_eos_token_id=3),
    "renormalize": dict(renormalize_logits=True, suppress_tokens=[4, 5, 6]),
    "pad and eos": dict(pad_token_id=9),
    "max_length": dict(max_length=13, max_new_tokens=None),
}


@pytest.mark.parametrize("name", PROCESSED)
def test_processors_work_on_beams(model, name):
    for prompt in prompts(2, 8):
        options = dict(num_beams=3, num_return_sequences=2, max_new_tokens=12, do_sample=False, eos_token_id=EOS)
        check(model, prompt, options | PROCESSED[name])


def test_objects_see_every_beam(model):
    def allowed(batch_id, ids):
        assert batch_id == 0
        return [int(ids[-1] + k) % 97 for k in (1, 2, 5)]

    def even_sum(input_ids, scores):
        return input_ids[:, -3:].sum(-1) % 5 == 0

    options = dict(num_beams=3, max_new_tokens=12, do_sample=False)
    check(model, prompts(5)[0], options, prefix_allowed_tokens_fn=allowed)
    check(model, prompts(5)[0], options, stopping_criteria=[even_sum])


@pytest.mark.parametrize("options", [{}, dict(top_k=5), dict(temperature=2.0, top_p=0.9, top_k=0)], ids=str)
def test_beam_sampling_draws_what_noise_and_generate_draw(model, monkeypatch, options):
    """generate() with its multinomial replaced by the largest noisy scores: sampling without replacement."""
    for seed, prompt in enumerate(prompts(3, 7)):

        def multinomial(probabilities, num_samples, seed=seed, position=iter(range(len(prompt), 99))):  # noqa: B008
            ids = torch.arange(probabilities.shape[-1], dtype=torch.int32)
            noise = gumbel_noise(torch.tensor([seed]), torch.tensor([next(position)]), ids)
            return (probabilities.log() + noise).topk(num_samples).indices

        monkeypatch.setattr(torch, "multinomial", multinomial)
        base = dict(num_beams=3, num_return_sequences=3, max_new_tokens=10, do_sample=True, eos_token_id=EOS)
        check(model, prompt, base | options, seed=seed)


def test_candidates_are_drawn_without_replacement_from_the_scores(model):
    config = GenerationConfig(num_beams=2, do_sample=True, top_k=0, max_new_tokens=4)
    logits, counts, num = torch.randn(1, 6, generator=torch.Generator().manual_seed(0)), torch.zeros(6, 6), 4000
    params = RequestParams.make(model, config, prompt_ids=[5], seed=0)
    for seed in range(num):
        search = BeamSearch(dataclasses.replace(params, seed=seed), [5])
        step = search.step(logits)
        # Rows of the next step are ordered by score.
        counts[step.tokens[0], step.tokens[1]] += 1
        assert step.parents == [0, 0]
        assert logits[0, step.tokens[0]] >= logits[0, step.tokens[1]]
    p = logits[0].softmax(0)
    # Four of the six are drawn; the two best of them are kept.
    expected = torch.zeros(6, 6)
    order = torch.cartesian_prod(*[torch.arange(6)] * 4)
    for drawn in order.tolist():
        if len(set(drawn)) == 4:
            chance, left = 1.0, 1.0
            for token in drawn:
                chance, left = chance * p[token].item() / left, left - p[token].item()
            best = sorted(drawn, key=lambda token: -p[token].item())[:2]
            expected[best[0], best[1]] += chance * num
    kept = expected > 5
    assert counts[expected == 0].sum() == 0
    chi_square = ((counts[kept] - expected[kept]) ** 2 / expected[kept]).sum()
    assert chi_square < int(kept.sum()) + 5 * (2 * int(kept.sum())) ** 0.5


def test_padding_counts_for_processors_and_criteria(model):
    """A row of a left-padded batch: same sequences as without padding, since all lengths move with it."""
    prompt = prompts(5)[0]
    config = GenerationConfig(num_beams=3, max_new_tokens=8, do_sample=False, eos_token_id=EOS)
    rules = RequestParams.make(model, config, prompt_ids=prompt)
    seen = []
    padded = RequestParams.make(model, config, prompt_ids=[0, 0, *prompt], stopping_criteria=[seen_lengths(seen)])
    padded = padded.__class__.from_prepared(
        prepared=type(
            "Prepared", (), dict(config=padded.config, processors=padded.processors, criteria=padded.all_criteria)
        ),
        padding_ids=[0, 0],
    )
    assert padded.max_length == rules.max_length
    assert run_beams(model, prompt, padded) == run_beams(model, prompt, rules)
    assert seen[0] == 8


def seen_lengths(seen):
    def criterion(input_ids, scores):
        seen.append(input_ids.shape[1])
        return torch.zeros(len(input_ids), dtype=torch.bool)

    return criterion


def test_a_failing_processor_raises_from_its_step(model):
    def fail(input_ids, scores):
        raise RuntimeError("broken")

    config = GenerationConfig(num_beams=2, max_new_tokens=4)
    search = BeamSearch(RequestParams.make(model, config, prompt_ids=[5], logits_processor=[fail]), [5])
    with pytest.raises(RuntimeError, match="broken"):
        search.step(all_logits(model, [[5]])[:, -1])
    search = BeamSearch(RequestParams.make(model, config, prompt_ids=[5]), [5])
    with pytest.raises(ValueError, match="NaN"):
        search.step(torch.full((1, 97), torch.nan))
