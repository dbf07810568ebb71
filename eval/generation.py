"""Does the engine generate what the model generates? Greedy tokens, the distribution of samples, beam scores.

    python -m eval.generation --model integration_tests/assets/small_model --data integration_tests/assets/heldout.txt

- Greedy: prompts from a text, in left-padded batches, by `generate()` as transformers has it and patched
  (`hf_paged.patch_generate`): rate of exact matches, and where the first token differs.
- Samples: first tokens drawn by the engine, and a chi-square test (Pearson) against the softmax that transformers' own
  logits processors make, one setting at a time.
- Beams: sequences and scores of the engine beside those of `generate()`.

Exit status 0: all as it should be, 1: not, 2: bad arguments.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LogitsProcessorList,
    MinPLogitsWarper,
    PreTrainedModel,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.utils import logging

import hf_paged
from eval import command_line
from eval.loading import DTYPES, checked_device, device_name, load_pretrained, set_attention, versions
from eval.quality.text_data import ACCEPTED_SPECS, load_text

SAMPLING: dict[str, dict[str, float]] = {
    "plain": {},
    "temperature 0.7": {"temperature": 0.7},
    "top_k 20": {"top_k": 20},
    "top_p 0.9": {"top_p": 0.9},
    "min_p 0.05": {"min_p": 0.05},
    "temperature 1.3, top_k 50, top_p 0.8": {"temperature": 1.3, "top_k": 50, "top_p": 0.8},
}
WARPERS = {
    "temperature": TemperatureLogitsWarper, "top_k": TopKLogitsWarper, "top_p": TopPLogitsWarper,
    "min_p": MinPLogitsWarper,
}  # fmt: skip
LEAST_EXPECTED = 5.0
"""Draws that a bin of the chi-square test is expected to hold at least; rarer tokens share one."""
LEAST_P = 1e-4
"""A p-value below is a failure: one in ten thousand sound runs has it."""
SAMPLES_A_REQUEST = 200


@dataclass(frozen=True, slots=True)
class GreedyResult:
    """Patched beside unpatched greedy generation.

    Attributes:
        num_prompts, new_tokens: sizes.
        num_exact: prompts with the same tokens.
        first_differences: index of the first new token that differs, of each other prompt.
        ties: of those, where the unpatched model's best two tokens are closer than the dtype tells apart.
    """

    num_prompts: int
    new_tokens: int
    num_exact: int
    first_differences: tuple[int, ...]
    ties: int

    @property
    def passed(self) -> bool:
        """Every difference is a tie."""
        return self.num_prompts - self.num_exact == self.ties


@dataclass(frozen=True, slots=True)
class SamplingResult:
    """One setting's chi-square test.

    Attributes:
        setting: in words.
        num_draws, num_bins: of the test.
        chi_square: sum over bins of (drawn - expected)^2 / expected.
        p_value: chance of as much or more where all is well.
        num_impossible: draws of tokens that the setting gives no probability.
    """

    setting: str
    num_draws: int
    num_bins: int
    chi_square: float
    p_value: float
    num_impossible: int

    @property
    def passed(self) -> bool:
        """Nothing impossible was drawn, and the counts are likely enough."""
        return self.num_impossible == 0 and self.p_value >= LEAST_P


@dataclass(frozen=True, slots=True)
class BeamResult:
    """The engine's beams beside those of `generate()`.

    Attributes:
        num_prompts, num_beams: sizes.
        num_same: sequences that both found, of `num_prompts * num_beams`.
        max_score_diff: largest difference of the score of a sequence that both found.
        best_diffs: difference of the best score of each prompt, the engine's less that of `generate()`.
        max_place_diff: largest difference of the scores at the same place, by rank.
        limit: what each of them may be, in nats a token.
        control_best_diffs: `best_diffs` of `generate()` on another plain attention; None in float32. In other dtypes
            candidates that the dtype does not tell apart are kept or dropped by chance, and so are all beams that
            would have come of them. The control tells how far that leads.
    """

    num_prompts: int
    num_beams: int
    num_same: int
    max_score_diff: float
    best_diffs: tuple[float, ...]
    max_place_diff: float
    limit: float
    control_best_diffs: tuple[float, ...] | None = None

    @property
    def best_limit(self) -> float:
        """What `best_diffs` may be, as a mean of absolute values: `limit`, or 1.5 times the control's."""
        return max(self.limit, 1.5 * mean_size(self.control_best_diffs or ()))

    def words_of_best(self) -> str:
        """What is said of the best beams."""
        if self.control_best_diffs is None:
            return f"Best scores differ by {max(map(abs, self.best_diffs)):.1e} at most, limit {self.limit:g}."
        return (
            f"Best scores differ by {mean_size(self.best_diffs):.1e} on average ({_mean(self.best_diffs):+.1e} with "
            f"sign), those of two plain attentions by {mean_size(self.control_best_diffs):.1e}, limit "
            f"{self.best_limit:.2g}."
        )

    @property
    def passed(self) -> bool:
        """Scores agree; in float32 so do the tokens, but for beams whose scores do not tell them apart."""
        if self.num_same == 0 or self.max_score_diff > self.limit:
            return False
        if self.control_best_diffs is not None:
            return mean_size(self.best_diffs) <= self.best_limit
        return max(self.max_place_diff, *map(abs, self.best_diffs)) <= self.limit


def mean_size(values: Sequence[float]) -> float:
    """Mean of the absolute values; 0 of none."""
    return _mean([abs(value) for value in values])


def _mean(values: Sequence[float]) -> float:
    return sum(values) / max(1, len(values))


def make_prompts(ids: Sequence[int], num_prompts: int, longest: int) -> list[list[int]]:
    """Pieces of a text, of lengths from 1 to `longest` tokens.

    Raises:
        ValueError: the text is too short.
    """
    lengths = [1 + (longest - 1) * i // max(1, num_prompts - 1) for i in range(num_prompts)]
    if sum(lengths) > len(ids):
        raise ValueError(
            f"data (--data) has {len(ids)} tokens, and {num_prompts} prompts of up to {longest} need {sum(lengths)}; "
            "pass a longer text, fewer --prompts or a smaller --prompt-length"
        )
    prompts, begin = [], 0
    for length in lengths:
        prompts.append(list(ids[begin : begin + length]))
        begin += length
    return prompts


@torch.no_grad()
def greedy_agreement(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], new_tokens: int, batch_size: int
) -> GreedyResult:
    """Generate with and without `hf_paged.patch_generate`; the model is left unpatched, its attention as it was."""
    config = _greedy_config(new_tokens)
    plain = _generate(model, prompts, config, batch_size, "unpatched")
    hf_paged.patch_generate(model)
    try:
        patched = _generate(model, prompts, config, batch_size, "patched")
    finally:
        hf_paged.unpatch_generate(model)
    differences = []
    ties = 0
    for prompt, a, b in zip(prompts, plain, patched):
        if a == b:
            continue
        first = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
        differences.append(first)
        logits = model(torch.tensor([[*prompt, *a[:first]]], device=model.device)).logits[0, -1].float()
        best = logits.topk(2).values
        ties += bool(best[0] - best[1] <= 8 * torch.finfo(model.dtype).eps * best[0].abs().clamp(min=1))
    return GreedyResult(len(prompts), new_tokens, len(prompts) - len(differences), tuple(differences), ties)


def _greedy_config(new_tokens: int) -> GenerationConfig:
    return GenerationConfig(max_new_tokens=new_tokens, do_sample=False, num_beams=1, pad_token_id=0)


def _generate(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], config: GenerationConfig, batch_size: int, name: str
) -> list[list[int]]:
    """New tokens of every prompt, from left-padded batches, cut behind an end of text."""
    ends = model.generation_config.eos_token_id
    ends = set([] if ends is None else ends if isinstance(ends, list) else [ends])
    found: list[list[int]] = []
    for begin in tqdm(range(0, len(prompts), batch_size), desc=name):
        batch = prompts[begin : begin + batch_size]
        width = max(map(len, batch))
        ids = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in batch], device=model.device)
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in batch], device=model.device)
        for row in model.generate(ids, attention_mask=mask, generation_config=config)[:, width:].tolist():
            end = next((i for i, token in enumerate(row) if token in ends), len(row))
            found.append(row[: end + 1])
    return found


@torch.no_grad()
def sampling_check(
    model: PreTrainedModel,
    prompt: Sequence[int],
    num_draws: int,
    settings: dict[str, dict[str, float]] = SAMPLING,
    seed: int = 0,
) -> list[SamplingResult]:
    """Chi-square of the engine's first sampled tokens, a result for each setting."""
    ids = torch.tensor([list(prompt)], device=model.device)
    logits = model(ids).logits[:, -1].float()  # [1, vocab_size]
    options = hf_paged.EngineConfig(
        # One sequence more than the samples of a request: the page that they share counts as well.
        max_num_seqs=SAMPLES_A_REQUEST + 1, max_batch_tokens=2048, max_model_len=len(prompt) + 1, seed=seed,
    )  # fmt: skip
    results = []
    with hf_paged.Engine(model, options, background=False) as engine:
        for name, parameters in tqdm(settings.items(), desc="samples"):
            warpers = LogitsProcessorList(WARPERS[key](value) for key, value in parameters.items())
            expected = warpers(ids, logits.clone()).softmax(dim=-1)[0].double().cpu()  # [vocab_size]
            # What is not set must be said to be off: the defaults of generate() have a top_k.
            config = GenerationConfig(
                max_new_tokens=1, do_sample=True, num_return_sequences=SAMPLES_A_REQUEST,
                **{"top_k": 0, "top_p": 1.0, "temperature": 1.0, **parameters},
            )  # fmt: skip
            num_requests = -(-num_draws // SAMPLES_A_REQUEST)
            outputs = engine.generate([list(prompt)] * num_requests, generation_config=config)
            drawn = [sequence.token_ids[0] for output in outputs for sequence in output.sequences]
            results.append(chi_square(name, torch.tensor(drawn), expected))
    return results


def chi_square(setting: str, drawn: torch.Tensor, probabilities: torch.Tensor) -> SamplingResult:
    """Pearson's test of drawn tokens [num_draws] against probabilities [vocab_size]; rare tokens share a bin."""
    counts = torch.bincount(drawn, minlength=len(probabilities)).double()
    expected = probabilities.double() * len(drawn)
    impossible = int(counts[expected == 0].sum())
    common = expected >= LEAST_EXPECTED
    observed_bins, expected_bins = counts[common], expected[common]
    rare = expected[~common].sum()
    if rare >= LEAST_EXPECTED:
        observed_bins = torch.cat([observed_bins, counts[~common].sum()[None]])
        expected_bins = torch.cat([expected_bins, rare[None]])
    statistic = ((observed_bins - expected_bins).square() / expected_bins).sum()
    freedom = max(1, len(expected_bins) - 1)
    p_value = torch.special.gammaincc(torch.tensor(freedom / 2, dtype=torch.float64), statistic / 2).item()
    return SamplingResult(setting, len(drawn), len(expected_bins), statistic.item(), p_value, impossible)


@torch.no_grad()
def beam_check(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], num_beams: int, new_tokens: int, attn: str = "eager"
) -> BeamResult:
    """All beams of every prompt, by `generate()` and by the engine.

    The model is left on attention `attn`. In other dtypes than float32 `generate()` runs on a second one too.
    """
    set_attention(model, attn)
    config = GenerationConfig(
        max_new_tokens=new_tokens, do_sample=False, num_beams=num_beams, num_return_sequences=num_beams, pad_token_id=0
    )
    expected = _beams_of_generate(model, prompts, config)
    with hf_paged.Engine(model, background=False) as engine:
        outputs = engine.generate([list(prompt) for prompt in prompts], generation_config=config)
    control = None
    if model.dtype != torch.float32:
        set_attention(model, "eager" if attn == "sdpa" else "sdpa")
        others = _beams_of_generate(model, prompts, config)
        set_attention(model, attn)
        control = tuple(max(other) - max(scores) for (_, scores), (_, other) in zip(expected, others))
    of_same, of_best, of_place = [], [], []
    for (sequences, scores), output in zip(expected, outputs):
        if output.error is not None:
            raise output.error
        beams = [(beam.token_ids, float(beam.score or 0.0)) for beam in output.sequences]
        of_best.append(max(score for _, score in beams) - max(scores))
        of_place += [abs(score - other) for score, (_, other) in zip(scores, beams)]
        for tokens, score in beams:
            # generate() pads beams that ended early.
            found = [other for row, other in zip(sequences, scores) if row[: len(tokens)] == tokens]
            of_same += [abs(score - found[0])] if found else []
    return BeamResult(
        len(prompts), num_beams, len(of_same), max(of_same, default=0.0), tuple(of_best), max(of_place),
        1e-4 if model.dtype == torch.float32 else 5e-2, control,
    )  # fmt: skip


def _beams_of_generate(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], config: GenerationConfig
) -> list[tuple[list[list[int]], list[float]]]:
    """New tokens and score of each beam, by prompt."""
    found = []
    for prompt in tqdm(prompts, desc="beams"):
        ids = torch.tensor([list(prompt)], device=model.device)
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), generation_config=config, return_dict_in_generate=True,
            output_scores=True,
        )  # fmt: skip
        found.append((out.sequences[:, len(prompt) :].tolist(), out.sequences_scores.tolist()))
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status.

    Raises:
        ValueError, FileNotFoundError, ImportError: the arguments name something unknown, missing or unfit.
        UnsupportedModelError: the engine cannot serve the model.
    """
    args = _parser().parse_args(argv)
    for name in ("prompts", "prompt_length", "new_tokens", "draws", "batch_size", "beams"):
        if getattr(args, name) < 1:
            raise ValueError(f"{name}={getattr(args, name)} (--{name.replace('_', '-')}) must be at least 1")
    logging.set_verbosity_error()
    text = load_text(args.data, args.text_column)
    tokenizer = load_pretrained(AutoTokenizer, args.model)
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    prompts = make_prompts(ids, args.prompts, args.prompt_length)
    model = load_pretrained(AutoModelForCausalLM, args.model, dtype=args.dtype, attn_implementation=args.attn)
    model = model.to(checked_device(args.device)).eval()
    greedy = greedy_agreement(model, prompts, args.new_tokens, args.batch_size)
    samples = sampling_check(model, prompts[-1], args.draws)
    beams = beam_check(model, prompts[-args.beam_prompts :], args.beams, args.new_tokens, args.attn)
    passed = greedy.passed and beams.passed and all(sample.passed for sample in samples)
    report: dict[str, Any] = {
        "model": args.model, "data": args.data, "attn": args.attn, "dtype": str(model.dtype).removeprefix("torch."),
        "device": device_name(model.device), "versions": versions(), "greedy": asdict(greedy),
        "sampling": [asdict(sample) for sample in samples], "beams": asdict(beams), "passed": passed,
    }  # fmt: skip
    text = markdown(report, greedy, samples, beams)
    print(text)
    if args.output is not None:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        args.output.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
    return 0 if passed else 1


def markdown(report: dict[str, Any], greedy: GreedyResult, samples: Sequence[SamplingResult], beams: BeamResult) -> str:
    """The report as Markdown."""
    found = ", ".join(map(str, greedy.first_differences)) or "none"
    lines = [
        f"# Generation: {report['model']}\n",
        f"**VERDICT: {'PASS' if report['passed'] else 'FAIL'}**\n",
        f"{report['data']}; unpatched: {report['attn']}; {report['dtype']} on {report['device']}; "
        f"{', '.join(f'{name} {version}' for name, version in report['versions'].items())}. Written by "
        "`python -m eval.generation`.\n",
        f"Greedy: {greedy.num_exact} of {greedy.num_prompts} prompts give the same {greedy.new_tokens} tokens patched "
        f"and unpatched; first differences at new token: {found} ({greedy.ties} of them ties of the dtype).\n",
        f"Beams: {beams.num_same} of {beams.num_prompts * beams.num_beams} sequences are found by both, their scores "
        f"differ by {beams.max_score_diff:.1e} at most (limit {beams.limit:g}), those of one rank by "
        f"{beams.max_place_diff:.1e}. {beams.words_of_best()}\n",
        "Samples, chi-square of first tokens against the softmax:\n",
        "| setting | draws | bins | chi-square | p | impossible tokens |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {sample.setting} | {sample.num_draws:,} | {sample.num_bins} | {sample.chi_square:.1f} | "
        f"{sample.p_value:.3f} | {sample.num_impossible} |"
        for sample in samples
    ]
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = command_line.make_parser("generation", __doc__)
    parser.add_argument("--model", required=True, help="model folder or hub id")
    parser.add_argument("--data", required=True, help=ACCEPTED_SPECS)
    parser.add_argument("--text-column", default="text", help="column with the text")
    parser.add_argument("--attn", default="sdpa", help="attention of the unpatched generate()")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="of the weights (auto: the checkpoint's)")
    parser.add_argument("--device", help="torch device (default: cuda if there is one, else cpu)")
    parser.add_argument("--prompts", type=int, default=32, help="prompts")
    parser.add_argument("--prompt-length", type=int, default=96, help="tokens of the longest prompt")
    parser.add_argument("--new-tokens", type=int, default=32, help="new tokens of each prompt")
    parser.add_argument("--batch-size", type=int, default=8, help="prompts in a padded batch")
    parser.add_argument("--draws", type=int, default=10_000, help="samples of each setting")
    parser.add_argument("--beams", type=int, default=4, help="beams")
    parser.add_argument("--beam-prompts", type=int, default=8, help="prompts for beams")
    parser.add_argument("--output", type=command_line.output_file, help="JSON file; a .md goes beside it")
    return parser


if __name__ == "__main__":
    command_line.run(main)
