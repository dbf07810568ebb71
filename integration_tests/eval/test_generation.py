"""Generation quality: agreement, samples and beams of a sound engine, and what a fault looks like."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_paged
from eval import generation
from eval.generation import BeamResult, beam_check, chi_square, greedy_agreement, main, make_prompts, sampling_check

ASSETS = Path(__file__).resolve().parents[1] / "assets"


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(
        ASSETS / "small_model", attn_implementation="sdpa", dtype=torch.float32
    ).eval()


@pytest.fixture(scope="module")
def prompts():
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "small_model")
    ids = tokenizer((ASSETS / "heldout.txt").read_text(encoding="utf-8")[:2000], verbose=False)["input_ids"]
    return make_prompts(ids, 5, 40)


def test_prompts_are_pieces_of_the_text_from_one_token_on():
    assert make_prompts(range(100), 3, 5) == [[0], [1, 2, 3], [4, 5, 6, 7, 8]]
    with pytest.raises(ValueError, match=r"data \(--data\) has 3 tokens, and 3 prompts of up to 5 need 9"):
        make_prompts(range(3), 3, 5)


def test_patched_greedy_generation_agrees(model, prompts):
    result = greedy_agreement(model, prompts, 9, batch_size=3)
    assert (result.num_exact, result.first_differences) == (5, ())
    assert result.passed
    assert "generate" not in vars(model)


def test_a_faulty_kernel_is_seen_in_the_tokens(model, prompts, monkeypatch):
    write = hf_paged.Engine.submit
    monkeypatch.setattr(
        hf_paged.Engine, "submit", lambda self, prompt, **rest: write(self, [9, *list(prompt)[1:]], **rest)
    )  # fmt: skip
    result = greedy_agreement(model, prompts[:1], 9, batch_size=3)
    # The prompt's only token is another one.
    assert result.num_exact == 0
    assert not result.passed


def test_samples_follow_the_softmax(model, prompts):
    settings = {name: generation.SAMPLING[name] for name in ("plain", "top_p 0.9")}
    for result in sampling_check(model, prompts[0], 2000, settings):
        assert result.num_draws == 2000
        assert result.num_bins > 5
        assert result.passed


def test_chi_square_by_hand_and_against_scipy():
    probabilities = torch.tensor([0.5, 0.3, 0.198, 0.001, 0.001, 0.0], dtype=torch.float64)
    drawn = torch.tensor([0] * 520 + [1] * 290 + [2] * 188 + [3] * 2)
    result = chi_square("x", drawn, probabilities)
    # The two rare tokens together are expected twice: too seldom for a bin.
    assert result.num_bins == 3
    assert result.chi_square == pytest.approx(20**2 / 500 + 10**2 / 300 + 10**2 / 198)
    stats = pytest.importorskip("scipy.stats")
    assert result.p_value == pytest.approx(stats.chi2.sf(result.chi_square, 2))
    assert result.passed
    assert not chi_square("x", torch.tensor([0] * 999 + [5]), probabilities).passed, "an impossible token"
    assert not chi_square("x", torch.tensor([0] * 600 + [1] * 400), probabilities).passed


def test_beams_have_the_scores_of_generate(model, prompts):
    result = beam_check(model, prompts[:3], num_beams=3, new_tokens=6)
    assert result.num_same == 9
    assert max(result.max_score_diff, *map(abs, result.best_diffs), result.max_place_diff) < 1e-5
    assert len(result.best_diffs) == 3
    assert result.control_best_diffs is None, "float32 needs no control"
    assert result.passed


@pytest.mark.parametrize(
    ("changes", "passed"),
    [
        ({}, True),
        ({"max_place_diff": 0.2}, False),
        ({"max_place_diff": 0.2, "control_best_diffs": (0.0, 0.0)}, True),
        ({"best_diffs": (0.0, -0.15)}, False),
        ({"best_diffs": (0.0, -0.15), "control_best_diffs": (0.0, 0.0)}, True),
        ({"best_diffs": (0.1, -0.15), "control_best_diffs": (0.0, 0.0)}, False),
        ({"best_diffs": (0.1, -0.15), "control_best_diffs": (-0.1, 0.1)}, True),
        ({"best_diffs": (0.2, -0.2), "control_best_diffs": (-0.1, 0.1)}, False),
        ({"max_score_diff": 0.2, "control_best_diffs": (0.5, 0.5)}, False),
        ({"num_same": 0}, False),
    ],
)
def test_beams_pass_by_their_scores(changes, passed):
    result = BeamResult(2, 4, 8, 0.0, (0.0, 0.0), 0.0, 0.1)
    assert dataclasses.replace(result, **changes).passed == passed


def test_beams_in_bfloat16_have_a_control(prompts):
    model = AutoModelForCausalLM.from_pretrained(ASSETS / "small_model", dtype=torch.bfloat16).eval()
    result = beam_check(model, prompts[:3], num_beams=3, new_tokens=6)
    assert len(result.control_best_diffs) == 3
    assert result.passed
    assert "two plain attentions" in result.words_of_best()


def test_scores_of_beams_that_are_wrong_are_seen(model, prompts, monkeypatch):
    generate = hf_paged.Engine.generate

    def wrong(self, *args, **options):
        outputs = generate(self, *args, **options)
        for output in outputs:
            for beam in output.sequences:
                object.__setattr__(beam, "score", beam.score + 0.01)
        return outputs

    monkeypatch.setattr(hf_paged.Engine, "generate", wrong)
    assert not beam_check(model, prompts[:2], num_beams=2, new_tokens=4).passed


def test_the_command_writes_its_report(tmp_path, capsys):
    output = tmp_path / "new" / "generation.json"
    status = main(
        ["--model", str(ASSETS / "small_model"), "--data", str(ASSETS / "heldout.txt"), "--dtype", "float32",
         "--device", "cpu", "--prompts", "2", "--prompt-length", "9", "--new-tokens", "4", "--draws", "400",
         "--beam-prompts", "1", "--output", str(output)]
    )  # fmt: skip
    report = json.loads(output.read_text(encoding="utf-8"))
    assert (status, report["passed"]) == (0, True)
    assert report["greedy"]["num_exact"] == 2
    assert len(report["sampling"]) == len(generation.SAMPLING)
    assert output.with_suffix(".md").read_text(encoding="utf-8").strip() == capsys.readouterr().out.strip()


def test_bad_counts_are_refused():
    with pytest.raises(ValueError, match=r"draws=0 \(--draws\) must be at least 1"):
        main(["--model", "x", "--data", "y", "--draws", "0"])
