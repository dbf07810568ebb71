"""The report on one model: what is measured, the verdict, and the report as JSON and Markdown."""

import gc
import hashlib
import statistics
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import date
from importlib import metadata
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from eval.generation import beam_check, sampling_check
from eval.loading import device_name, load_pretrained, set_attention, versions
from eval.quality.distances import Reference, Settings
from eval.quality.kv_quantisation import RESIDUAL, kv_table
from eval.quality.scoring import KV_DTYPES, default_chunk
from eval.quality.windows import plan_windows
from eval.real.greedy import EAGER, EAGER32, LEAST_P, MAX_GAP, WAYS, Agreement, Texts, compare, sign_test, write_texts
from eval.real.passages import passage_grid, passage_prompt
from eval.real.prompts import Prompt, make_prompts
from eval.real.text_quality import half_interval, measure_text

PARTS = ("text", "greedy", "samples", "beams", "passages")
MORE_PARTS = ("caches",)
"""Measured where they are asked for: they ask about other caches, not about paged attention."""
PASSAGE_WAYS = ("sdpa", "paged_flash", "engine")

MAX_COST = {"float32": 1e-4, "other": 2e-3, "quantised": 5e-3}
"""Nats a token that a run may differ by from its baseline: 0.01%, 0.2% and 0.5% of perplexity."""
NOISE = 1.5
"""In other dtypes than float32 a run may differ by so many times what sdpa differs by, where that is more."""
MAX_TOKEN_DIFF = 2e-3
"""Nats that a token's log-probability may differ by from eager attention, in float32 on unquantised pages."""
MAX_LOST_CELLS = {"float32": 0.0, "other": 0.02}
"""Share of a passage's tokens that a way may lose in the mean of all cells."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is measured.

    Attributes:
        tokens, window, stride, chunk, batch_size: of the perplexity, all but the last in tokens.
        paths: of `eval.quality.scoring.PATHS`.
        prompts, longest, num_long, long_lengths: see `eval.real.prompts.make_prompts`.
        new_tokens: of a greedy text.
        batch_tokens: of a padded batch of `generate()`.
        draws: samples of each setting.
        beams, beam_prompts, beam_tokens: beams, prompts and new tokens of the beam search.
        lengths, depths, passages: of the prompts with a passage, and how many for each cell.
        parts: of `PARTS` and `MORE_PARTS`.
    """

    tokens: int
    window: int
    stride: int
    chunk: int
    batch_size: int
    paths: tuple[str, ...]
    prompts: int
    longest: int
    num_long: int
    long_lengths: tuple[int, int]
    new_tokens: int
    batch_tokens: int
    draws: int
    beams: int
    beam_prompts: int
    beam_tokens: int
    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    passages: int
    parts: tuple[str, ...] = PARTS

    def fit(self, positions: int | None) -> "Plan":
        """The same for a model of `positions`: nothing is longer."""
        positions = 2**62 if positions is None else positions
        window = min(self.window, positions)
        low, high = (min(length, positions - self.new_tokens - 8) for length in self.long_lengths)
        lengths = tuple(sorted({min(length, positions) for length in self.lengths}))
        longest = min(self.longest, positions - self.new_tokens - 64)
        return replace(
            self, window=window, stride=min(self.stride, window - 1), chunk=min(self.chunk, default_chunk(window)),
            long_lengths=(low, high), lengths=lengths, longest=longest,
        )  # fmt: skip


SIZES = {
    "small": Plan(
        tokens=769, window=256, stride=128, chunk=64, batch_size=1, paths=("prefill", "chunked_prefill", "engine"),
        prompts=12, longest=64, num_long=0, long_lengths=(0, 0), new_tokens=16, batch_tokens=1024, draws=600, beams=3,
        beam_prompts=2, beam_tokens=8, lengths=(192, 384), depths=(0.0, 0.5, 1.0), passages=1,
    ),
    "large": Plan(
        tokens=32_769, window=1024, stride=512, chunk=128, batch_size=16,
        paths=("prefill", "paged_prefill", "padded_prefill", "chunked_prefill", "engine"),
        prompts=200, longest=512, num_long=50, long_lengths=(1500, 6000), new_tokens=64, batch_tokens=49_152,
        draws=10_000, beams=4, beam_prompts=8, beam_tokens=32, lengths=(1024, 4096, 8192, 16_384, 32_768),
        depths=(0.0, 0.25, 0.5, 0.75, 1.0), passages=2,
    ),
}  # fmt: skip


def runs_of(paths: Sequence[str]) -> list[tuple[str, str, str]]:
    """(attn, path, kv_dtype) of every run; the first is the baseline."""
    runs = [("eager", "prefill", "auto"), ("sdpa", "prefill", "auto")]
    runs += [("paged_flash", path, "auto") for path in paths]
    quantised = [path for path in paths if path in ("chunked_prefill", "decode", "engine")]
    return runs + [("paged_flash", path, kv) for kv in KV_DTYPES if kv != "auto" for path in quantised]


def make_report(
    name: str,
    text: str,
    tokenizer: PreTrainedTokenizerBase,
    plan: Plan,
    *,
    dtype: str,
    device: torch.device,
    about: dict[str, str],
    save: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """Measure all parts of a plan.

    Args:
        name: folder or hub id of the model.
        text: to score, to go on from, and to hide passages in.
        tokenizer: of the model.
        plan: how much.
        dtype: of the weights under test; the reference is in float32.
        device: where to run.
        about: what the report says of model and text.
        save: called with the report after every part, so that a run that is cut short leaves what it has.

    Returns:
        The report, which `json` can write.
    """
    dtype = _resolved(dtype, name)
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    beginning = [] if tokenizer.bos_token_id is None or not tokenizer("").input_ids else [tokenizer.bos_token_id]
    report: dict[str, Any] = {
        "model": name, **about, "text_sha256": hashlib.sha256(text.encode()).hexdigest(), "dtype": dtype,
        "device": device_name(device), "date": date.today().isoformat(), "versions": versions(), "plan": asdict(plan),
        "parts_done": [], "errors": {},
    }  # fmt: skip

    def load(dtype: str) -> PreTrainedModel:
        return load_pretrained(AutoModelForCausalLM, name, dtype=dtype, attn_implementation="eager").to(device).eval()

    def measure(part: str, run: Callable[[], Any]) -> None:
        """Take a part's figures into the report. A part that fails fails the verdict, and the others are measured."""
        if part not in plan.parts:
            return
        try:
            report[part] = run()
        except Exception as error:
            report["errors"][part] = f"{type(error).__name__}: {' '.join(str(error).split())}"
            print(traceback.format_exc(), file=sys.stderr)
        report["parts_done"].append(part)
        report["verdict"] = verdict(report)
        save(report)

    # What the text is too short for is refused before anything runs.
    prompts = make_prompts(tokenizer, ids[plan.tokens :], plan.prompts, plan.longest, plan.num_long, plan.long_lengths)
    passage_prompt(ids, max(plan.lengths), 0.0, plan.passages - 1, beginning)
    scored = [*beginning, *ids[: plan.tokens - len(beginning)]]
    settings = Settings(plan.window, plan.stride, chunk=plan.chunk, batch_size=plan.batch_size)
    plan_windows(len(scored), settings.window, settings.stride, settings.convention)

    model = load("float32")
    reference = Reference(model, scored, settings) if "text" in plan.parts else None
    texts32 = None
    if dtype != "float32" and "greedy" in plan.parts:
        texts32 = write_texts(model, prompts, plan.new_tokens, EAGER32, batch_tokens=plan.batch_tokens)
    # In float32: elsewhere rounding decides about the last token that a top_p or min_p lets in.
    measure("samples", lambda: _samples(model, scored, plan))
    if dtype != "float32":
        del model
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        model = load(dtype)
    measure("text", lambda: _text(model, reference, scored, settings, plan))
    measure("greedy", lambda: _greedy(model, prompts, plan, texts32))
    measure("beams", lambda: _beams(model, prompts, plan))
    measure("passages", lambda: _passages(model, ids, plan, beginning))
    measure("caches", lambda: _caches(model, scored, settings))
    return report


def _samples(model: PreTrainedModel, scored: Sequence[int], plan: Plan) -> list[dict[str, Any]]:
    set_attention(model, "eager")
    results = sampling_check(model, scored[: min(64, len(scored))], plan.draws)
    return [{**asdict(result), "passed": result.passed} for result in results]


def _text(
    model: PreTrainedModel, reference: Reference | None, scored: Sequence[int], settings: Settings, plan: Plan
) -> dict[str, Any]:
    assert reference is not None
    rows = measure_text(model, reference, scored, settings, runs_of(plan.paths))
    return {
        "reference_ppl": reference.result.perplexity, "num_tokens": len(scored),
        "runs": [{"name": row.name, **asdict(row)} for row in rows],
    }  # fmt: skip


def _beams(model: PreTrainedModel, prompts: Sequence[Prompt], plan: Plan) -> dict[str, Any]:
    short = [list(prompt.ids) for prompt in prompts if prompt.kind != "long"][: plan.beam_prompts]
    beams = beam_check(model, short, plan.beams, plan.beam_tokens)
    return {**asdict(beams), "passed": beams.passed, "best": beams.words_of_best()}


def _passages(model: PreTrainedModel, ids: Sequence[int], plan: Plan, beginning: Sequence[int]) -> list[dict[str, Any]]:
    ways = [(way, "auto") for way in PASSAGE_WAYS]
    ways += [("engine", kv_dtype) for kv_dtype in KV_DTYPES if kv_dtype != "auto"]
    return [
        asdict(
            passage_grid(
                model, ids, plan.lengths, plan.depths, way=way, kv_dtype=kv_dtype, num_passages=plan.passages,
                beginning=beginning,
            )
        )
        for way, kv_dtype in ways
    ]  # fmt: skip


def _caches(model: PreTrainedModel, scored: Sequence[int], settings: Settings) -> dict[str, Any]:
    backends = {name: _version(name) for name in ("optimum-quanto", "hqq")}
    return {"backends": backends, "rows": [asdict(row) for row in kv_table(model, scored, settings)]}


def _version(package: str) -> str | None:
    """None where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _resolved(dtype: str, name: str) -> str:
    if dtype != "auto":
        return dtype
    found = getattr(load_pretrained(AutoConfig, name), "dtype", None)
    return str(found or torch.float32).removeprefix("torch.")


def _greedy(model: PreTrainedModel, prompts: Sequence[Prompt], plan: Plan, texts32: Texts | None) -> dict[str, Any]:
    """Texts of every way, and where each leaves eager attention's."""

    def write(way: str, kv_dtype: str = "auto") -> Texts:
        return write_texts(model, prompts, plan.new_tokens, way, kv_dtype=kv_dtype, batch_tokens=plan.batch_tokens)

    eager = write(EAGER)
    texts = [write(way) for way in WAYS]
    texts += [write("engine", kv_dtype) for kv_dtype in KV_DTYPES if kv_dtype != "auto"]
    agreements = [compare(found, eager, plan.new_tokens) for found in texts]
    rows = [_agreement_row(agreement) for agreement in agreements]
    rows32: list[dict[str, Any]] = []
    if texts32 is not None:
        control = compare(eager, texts32, plan.new_tokens)
        rows32.append(_agreement_row(control))
        for found in texts:
            agreement = compare(found, texts32, plan.new_tokens)
            longer, shorter, chance = sign_test(agreement, control)
            rows32.append({**_agreement_row(agreement), "longer": longer, "shorter": shorter, "chance": chance})
    kinds = {kind: sum(prompt.kind == kind for prompt in prompts) for kind in ("plain", "chat", "long")}
    lengths = [len(prompt.ids) for prompt in prompts]
    seconds = {found.way: found.seconds for found in (*([texts32] if texts32 else []), eager, *texts)}
    return {
        "kinds": kinds, "prompt_tokens": [min(lengths), max(lengths)], "new_tokens": plan.new_tokens,
        "beside_eager": rows, "beside_float32": rows32, "seconds": seconds,
    }  # fmt: skip


def _agreement_row(agreement: Agreement) -> dict[str, Any]:
    gaps = sorted(agreement.gaps)
    return {
        "way": agreement.way, "reference": agreement.reference, "num_prompts": len(agreement.first),
        "num_equal": agreement.num_equal, "median_first": agreement.median_first, "first": list(agreement.first),
        "gap_median": statistics.median(gaps) if gaps else None, "gap_max": gaps[-1] if gaps else None,
        "still_equal": agreement.still_equal(),
    }  # fmt: skip


def verdict(report: dict[str, Any]) -> dict[str, Any]:
    """`passed`, and `lines`: [{"passed", "text"}], what was found of each question, in words."""
    is_float32 = report["dtype"] == "float32"
    kind = "float32" if is_float32 else "other"
    lines: list[dict[str, Any]] = []

    def say(passed: bool, text: str) -> None:
        lines.append({"passed": passed, "text": text})

    for part, error in report["errors"].items():
        say(False, f"The part {part!r} could not be measured: {error}")
    if "text" in report:
        runs = report["text"]["runs"]
        plain = [r for r in runs if r["attn"].startswith("paged_flash") and r["kv_dtype"] == "auto"]
        worst = max(plain, key=lambda r: abs(r["cost"]))
        token = max(r["max_abs_diff"] for r in plain)
        # In bfloat16 another order of additions is another figure: what sdpa differs by is the dtype's own.
        sdpa = next((abs(r["cost"]) for r in runs if r["attn"] == "sdpa"), 0.0)
        limit = MAX_COST[kind] if is_float32 else max(MAX_COST[kind], NOISE * sdpa)
        say(
            all(_is_within(r, limit) for r in plain) and (not is_float32 or token <= MAX_TOKEN_DIFF),
            f"Perplexity of {runs[0]['num_scored']:,} tokens: paged attention differs from eager attention in the same "
            f"dtype by {round(worst['cost'], 5) + 0.0:+.3%} at most ({worst['name']}), sdpa by {sdpa:.3%}; limit "
            f"{limit:.2%}.",
        )
        quantised = [r for r in runs if r["kv_dtype"] != "auto"]
        if quantised:
            by_kind = {}
            for r in quantised:
                by_kind[r["kv_dtype"]] = max(by_kind.get(r["kv_dtype"], r), r, key=lambda row: row["cost"])
            limit = MAX_COST["quantised"]
            found = ", ".join(
                f"{kv} {r['cost']:+.2%} ± {r['cost_half']:.2%}"
                + (
                    " (too few tokens to tell)"
                    if abs(r["cost"]) + r["cost_half"] > limit and _is_within(r, limit)
                    else ""
                )
                for kv, r in by_kind.items()
            )
            say(
                all(_is_within(r, limit) for r in quantised),
                f"Quantised pages cost, in perplexity: {found}; limit {limit:.1%}.",
            )
    if "greedy" in report:
        rows = [r for r in report["greedy"]["beside_eager"] if r["way"] in WAYS]
        gaps = [r["gap_max"] for r in rows if r["gap_max"] is not None]
        limit = MAX_GAP[kind]
        found = ", ".join(f"{r['way']} {r['num_equal']} of {r['num_prompts']}" for r in rows)
        # A text that differs without a gap ended at another place, and nothing says why.
        passed = all(gap <= limit for gap in gaps)
        say(
            passed,
            f"Greedy texts equal to eager attention's: {found}. "
            + (
                f"Where a text leaves, eager's two best tokens are {max(gaps):.2g} nats apart at most, limit {limit:g}."
                if gaps
                else "None leaves."
            ),
        )
        rows32 = report["greedy"]["beside_float32"]
        if rows32:
            ways = [r for r in rows32[1:] if r["way"] in WAYS]
            found = ", ".join(f"{r['way']} {r['num_equal']}" for r in (rows32[0], *ways))
            say(
                all(r["chance"] >= LEAST_P for r in ways),
                f"Against eager attention in float32, texts that stay equal, of {rows32[0]['num_prompts']}: {found} "
                f"(eager is {report['dtype']}'s own rounding).",
            )
    if "samples" in report:
        results = report["samples"]
        say(
            all(r["passed"] for r in results),
            f"Samples follow the model's distribution under {sum(r['passed'] for r in results)} of {len(results)} "
            f"settings ({results[0]['num_draws']:,} draws each).",
        )
    if "beams" in report:
        beams = report["beams"]
        say(
            beams["passed"],
            f"Beam search: {beams['num_same']} of {beams['num_prompts'] * beams['num_beams']} sequences are those of "
            f"generate(), their scores differ by {beams['max_score_diff']:.1e} nats a token at most, limit "
            f"{beams['limit']:g}. {beams['best']}",
        )
    if "passages" in report:
        grids = report["passages"]
        means = {grid["name"]: _mean(grid["scores"]) for grid in grids}
        first = grids[0]["name"]
        plain_ways = [grid["name"] for grid in grids if "pages" not in grid["name"]]
        lost = max(means[first] - means[way] for way in plain_ways)
        say(
            lost <= MAX_LOST_CELLS[kind] + 1e-9,
            f"A passage up to {max(grids[0]['lengths']):,} tokens back is gone on with: "
            + "; ".join(f"{way} {mean:.3f}" for way, mean in means.items())
            + ".",
        )
    if "caches" in report:
        measured = {r["cache"]: r for r in report["caches"]["rows"] if r["ppl"] is not None}
        limit = MAX_COST["quantised"]
        limits = {"PagedCache auto": MAX_COST[kind], "PagedCache fp8": limit, "PagedCache int8": limit}
        first = report["caches"]["rows"][0]["cache"]
        found = "; ".join(
            f"{name} {round(r['mean_diff'], 5) + 0.0:+.2%} ± {_half(r):.2%}"
            for name, r in measured.items()
            if name != first
        )
        say(
            limits.keys() <= measured.keys()
            and all(abs(measured[name]["mean_diff"]) - _half(measured[name]) <= limits[name] for name in limits),
            f"Perplexity above that of a {first}: {found}; limit of quantised pages {limit:.1%}.",
        )
    missing = [part for part in report["plan"]["parts"] if part not in report["parts_done"]]
    return {"passed": all(line["passed"] for line in lines) and not missing, "lines": lines, "missing": missing}


def _half(row: dict[str, Any]) -> float:
    """Half of the 95% interval of a cache's `mean_diff`."""
    return half_interval(row["standard_error"], row["num_windows"])


def _is_within(run: dict[str, Any], limit: float) -> bool:
    """Whether a cost is at most the limit, or not surely above it."""
    return abs(run["cost"]) - run["cost_half"] <= limit


def _mean(scores: Sequence[Sequence[float]]) -> float:
    return sum(map(sum, scores)) / sum(map(len, scores))


def markdown(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    lines = [f"# {title(report)}\n", f"**{headline(report)}**\n"]
    lines += [f"- {'✓' if line['passed'] else '✗'} {line['text']}" for line in report["verdict"]["lines"]]
    lines += ["", *about_lines(report), ""]
    for heading, note, columns, rows in tables(report):
        lines += [f"## {heading}\n", note + "\n"]
        lines += ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
        lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
        lines.append("")
    return "\n".join(lines)


def title(report: dict[str, Any]) -> str:
    """Of the report."""
    return f"{report.get('title') or report['model']}, {report['dtype']}: does paged attention change the output?"


def headline(report: dict[str, Any]) -> str:
    """The verdict in one line."""
    found = report["verdict"]
    if found["missing"]:
        return f"UNFINISHED: {', '.join(found['missing'])} not measured"
    if found["passed"]:
        return f"PASS: {len(found['lines'])} of {len(found['lines'])} questions"
    return f"FAIL: {sum(not line['passed'] for line in found['lines'])} of {len(found['lines'])} questions"


def about_lines(report: dict[str, Any]) -> list[str]:
    """What was measured on what, in sentences."""
    said = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    lines = [f"{report['dtype']} on {report['device']}, {report['date']}; {said}."]
    if report.get("licence"):
        lines.append(f"Weights: {report['source']}; {report['note']}; licence: {report['licence']}.")
    lines.append(f"Text: {report['data']}" + (f" ({report['data_source']})" if report.get("data_source") else "") + ".")
    lines.append(f"Made by `{report['command']}`.")
    return lines


Table = tuple[str, str, list[str], list[list[str]]]
"""Heading, a note that explains the columns, titles, cells."""


def tables(report: dict[str, Any]) -> list[Table]:
    """All tables of the report."""
    found: list[Table] = []
    if "text" in report:
        plan, runs = report["plan"], report["text"]["runs"]
        # The reference's log-probabilities are kept as far as memory is given to them.
        kl_tokens = max(r["kl_tokens"] for r in runs)
        kl = f", KL over the first {kl_tokens:,} scored tokens" if kl_tokens < runs[0]["num_scored"] else ""
        found.append(
            (
                "Perplexity",
                f"{report['text']['num_tokens']:,} tokens, windows of {plan['window']}, stride {plan['stride']}. Eager "
                f"attention in float32: {report['text']['reference_ppl']:.4f}. Difference: mean of the tokens' "
                "negative log-likelihood less that of the baseline, in nats (0.01 is 1% of perplexity), with the 95% "
                "interval of the paired difference over windows; for quantised pages the baseline is the same run on "
                "unquantised pages, for others eager attention in the same dtype. Top-1 and KL are against eager "
                f"attention in float32{kl}.",
                ["attention", "path", "pages", "perplexity", "difference", "95% interval", "baseline",
                 "largest of a token", "top-1", "KL mean", "KL max"],
                [
                    [r["attn"], r["path"], r["kv_dtype"], f"{r['ppl']:.4f}", f"{r['cost']:+.5f}",
                     "-" if r["cost_error"] is None else f"± {r['cost_half']:.5f}", r["baseline"] or "-",
                     f"{r['max_abs_diff']:.1e}", f"{r['top1_agreement']:.4f}", _number(r["kl_mean"]),
                     _number(r["kl_max"])]
                    for r in runs
                ],
            )
        )  # fmt: skip
    if "greedy" in report:
        found += _greedy_tables(report["greedy"])
    if "samples" in report:
        found.append(
            (
                "Samples",
                "First tokens drawn by the engine in float32, and Pearson's chi-square test against the softmax that "
                "transformers' own logits processors make of eager attention's logits.",
                ["setting", "draws", "bins", "chi-square", "p", "impossible tokens"],
                [
                    [r["setting"], f"{r['num_draws']:,}", str(r["num_bins"]), f"{r['chi_square']:.1f}",
                     f"{r['p_value']:.3f}", str(r["num_impossible"])]
                    for r in report["samples"]
                ],
            )
        )  # fmt: skip
    if "beams" in report:
        b = report["beams"]
        best, control = (
            ", ".join(f"{difference:+.3f}" for difference in b.get(name) or ()) or "-"
            for name in ("best_diffs", "control_best_diffs")
        )
        if "best_diffs" not in b:  # a report from before there was a control
            best = f"{b['max_best_diff']:.3f} at most"
        found.append(
            (
                "Beams",
                "The engine's beam search beside generate() with eager attention; differences of scores in nats a "
                "token. Of a prompt's best: score of the engine's less that of generate(); control: sdpa's less that.",
                ["prompts", "beams", "sequences found by both", "of the same sequence", "of the best, by prompt",
                 "control, by prompt"],
                [[str(b["num_prompts"]), str(b["num_beams"]), str(b["num_same"]), f"{b['max_score_diff']:.1e}",
                  best, control]],
            )
        )  # fmt: skip
    if "passages" in report:
        rows = []
        for grid in report["passages"]:
            for depth, scores in zip(grid["depths"], grid["scores"]):
                rows.append([grid["name"], f"{depth:g}", *(f"{score:.3f}" for score in scores)])
        found.append(
            (
                "Retrieval of a passage",
                "A passage of 64 tokens stands at a depth (0: the beginning) of other text, and its first 16 tokens "
                "again at the end: share of the other 48 that are predicted, by tokens of the prompt.",
                ["attention", "depth", *(f"{length:,} tokens" for length in report["passages"][0]["lengths"])],
                rows,
            )
        )
    if "caches" in report:
        found.append(_caches_table(report))
    return found


def _caches_table(report: dict[str, Any]) -> Table:
    caches, plan = report["caches"], report["plan"]
    backends = ", ".join(f"{name} {version or 'not installed'}" for name, version in caches["backends"].items())
    notes = "".join(f" {r['cache']}: not measured, {r['note']}." for r in caches["rows"] if r["ppl"] is None)
    return (
        "Quantised caches",
        f"{plan['tokens']:,} tokens through each cache, windows of {plan['window']}, stride {plan['stride']}, in "
        f"chunks of {plan['chunk']}. Bits of memory for each number of keys and values, scales and unfilled pages "
        "included. Difference: mean of the tokens' negative log-likelihood less that of the first cache, in nats, "
        "with the 95% interval of the paired difference over windows. Every QuantizedCache of quanto or hqq attends "
        f"to the newest chunk as it is; it keeps up to {RESIDUAL} tokens unquantised, and quantises all that it holds "
        f"anew when they are more. {backends}.{notes}",
        ["cache", "bits", "perplexity", "difference", "95% interval", "largest of a token", "top-1"],
        [
            [r["cache"], f"{r['bits']:.1f}", f"{r['ppl']:.4f}", f"{r['mean_diff']:+.5f}",
             "-" if r["standard_error"] is None else f"± {_half(r):.5f}", f"{r['max_abs_diff']:.1e}",
             f"{r['top1_agreement']:.4f}"]
            for r in caches["rows"] if r["ppl"] is not None
        ],
    )  # fmt: skip


def _greedy_tables(greedy: dict[str, Any]) -> list[Table]:
    kinds = ", ".join(f"{count} {kind}" for kind, count in greedy["kinds"].items() if count)
    low, high = greedy["prompt_tokens"]
    columns = ["way", "equal texts", "median first difference", "gap there, median", "gap, largest", "seconds"]

    def cells(row: dict[str, Any]) -> list[str]:
        return [
            row["way"], f"{row['num_equal']} of {row['num_prompts']}",
            "-" if row["median_first"] is None else f"{row['median_first']:.0f}", _number(row["gap_median"]),
            _number(row["gap_max"]), f"{greedy['seconds'][row['way']]:.1f}",
        ]  # fmt: skip

    found: list[Table] = [
        (
            "Greedy texts beside eager attention",
            f"{kinds} prompts of {low:,} to {high:,} tokens, {greedy['new_tokens']} new tokens each. First difference: "
            "index of the first new token that is another, of the texts that differ. Gap: nats between eager's two "
            "best tokens there; at a gap of rounding size either token is right. Seconds include the start of an "
            "engine and the compilation of kernels.",
            columns,
            [cells(row) for row in greedy["beside_eager"]],
        )
    ]
    if greedy["beside_float32"]:
        found.append(
            (
                "Greedy texts beside eager attention in float32",
                "The first row is what the dtype alone does. Longer and shorter: prompts on which a way stays equal "
                "to the float32 text longer, or shorter, than the first row does; chance: of so many shorter ones "
                "where both are alike (sign test).",
                [*columns, "longer", "shorter", "chance"],
                [
                    [*cells(row), str(row.get("longer", "-")), str(row.get("shorter", "-")),
                     f"{row['chance']:.3f}" if "chance" in row else "-"]
                    for row in greedy["beside_float32"]
                ],
            )
        )  # fmt: skip
    return found


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1e}"
