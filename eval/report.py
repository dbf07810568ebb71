"""Was anything lost? One report on one model: Markdown, JSON and PNG, and a verdict that is also the exit status.

    python -m eval.report --model integration_tests/assets/small_model --data integration_tests/assets/heldout.txt \\
        --window 256 --stride 128 --max-tokens 4096 --dtype float32 --output eval/results/report

- Perplexity of every attention implementation, path and cache dtype, token by token beside eager attention in float32
  (`eval/quality/distances.py`), with bootstrap intervals over windows.
- Retrieval from far context: the hand-built induction model on every path, which must score 1.000, and for a model that
  can answer, a passkey in filler text (`--passkey-lengths`) beside another attention (`eval/quality/retrieval.py`).
- Perplexity against bits of the cache, beside transformers' QuantizedCache (`eval/quality/kv_quantisation.py`).
- The verdict (`eval/quality/verdict.py`): limits by the dtype of weights and pages; `--max-delta-ppl 0.001` sets one
  for the perplexity of all runs, relative. Exit status 0: passed, 1: failed, 2: bad arguments, 130: interrupted.

It says how long it will take, on the standard error. What is measured so far is in report.partial.md and .json of the
folder; Ctrl-C prints it.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

import hf_paged
from eval import command_line, report_figure
from eval.cache_memory import held_bytes
from eval.loading import (
    DTYPES,
    check_attention,
    check_window,
    checked_device,
    device_name,
    load_pretrained,
    max_positions,
    set_attention,
    versions,
    with_cache,
)
from eval.perplexity import check_path, plan_runs
from eval.quality.distances import Reference, Settings, measure
from eval.quality.forecast import in_words, prompts_seconds, run_seconds
from eval.quality.induction_model import copy_prompt, induction_model
from eval.quality.kv_quantisation import CacheRow, kv_table
from eval.quality.retrieval import (
    INDUCTION_PATHS,
    MAX_ANSWER,
    NUM_KEYS,
    STRING_LEN,
    Grid,
    induction_grid,
    passkey_grid,
    passkey_prompt,
)
from eval.quality.scoring import KV_DTYPES, PATHS, QUANTISED_PATHS, default_chunk
from eval.quality.text_data import ACCEPTED_SPECS, load_text
from eval.quality.verdict import Verdict, judge, limits_of
from eval.quality.windows import BY_DOCUMENT, CONVENTIONS, plan_windows


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        The exit status: 0 where the verdict is passed, 130 where it was interrupted, else 1.

    Raises:
        ValueError, FileNotFoundError, ImportError: the arguments name something unknown, missing or unfit.
    """
    args = _parser().parse_args(argv)
    for path in args.path:
        check_path(path)
    for name in args.attn:
        check_attention(name)
    for depth in args.depths:
        if not 0 <= depth <= 1:
            raise ValueError(f"depth={depth} (--depths) must be from 0, the beginning of a prompt, to 1, its end")
    runs = _runs(args)
    logging.set_verbosity_error()
    device = checked_device(args.device)
    text = load_text(args.data, args.text_column)
    tokenizer = load_pretrained(AutoTokenizer, args.model)
    ids = tokenizer(text, verbose=False)["input_ids"][: args.max_tokens]
    float32 = load_pretrained(AutoModelForCausalLM, args.model, dtype="float32", attn_implementation="eager").to(device)
    settings = _settings(args, float32)
    try:
        plan_windows(len(ids), settings.window, settings.stride, settings.convention)  # refuses a bad length early
    except ValueError as error:
        raise ValueError(f"spec (--data) {args.data!r}: {error}") from error
    check_window(float32.config, settings.window)

    seconds = run_seconds(float32, ids, settings, ("eager", "prefill", "auto"))
    _say(f"eager attention in float32: about {in_words(seconds)}; then the forecast for all else")
    reference = Reference(float32, ids, settings)
    model = float32
    if args.dtype != "float32":
        del float32
        model = load_pretrained(AutoModelForCausalLM, args.model, dtype=args.dtype).to(device)
    subject = {
        "model": args.model,
        "data": args.data,
        "text_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "num_tokens": len(ids),
        **asdict(settings),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": device_name(device),
        "date": date.today().isoformat(),
        "versions": versions(),
        "reference": {"ppl": reference.result.perplexity, "mean_nll": reference.result.mean_nll},
    }
    parts = [
        *_quality_parts(model, reference, ids, settings, runs),
        *_induction_parts(args, device),
        *_passkey_parts(args, model, tokenizer),
        Part("memory", "memory", 0.0, lambda: _memory(model, ids[: settings.window], settings)),
        *_cache_parts(args, model, ids, settings),
    ]
    progress = Progress(subject, parts, args.max_delta_ppl, args.output)
    _say(progress.forecast())
    try:
        progress.run()
    except KeyboardInterrupt:
        print(progress.markdown())
        return command_line.INTERRUPTED
    finally:
        if not progress.is_complete and args.output is not None:
            _say(f"not complete: what was measured is in {args.output / PARTIAL}.md and .json")
    print(progress.markdown())
    return 0 if progress.verdict().passed else 1


PARTIAL = "report.partial"
"""The files of a report that is not complete, less their endings."""


def _say(line: str) -> None:
    """To the standard error: the standard output is the report."""
    print(line, file=sys.stderr, flush=True)


@dataclass(frozen=True, slots=True)
class Part:
    """A piece of the report.

    Attributes:
        group: what the forecast names it with.
        key: the list of the report that its items go to.
        seconds: that it will take, about.
        work: gives its items, one by one where each takes long.
    """

    group: str
    key: str
    seconds: float
    work: Callable[[], Iterable[Any]]


class Progress:
    """The parts of a report, what they have given so far, and the files that hold it.

    Args:
        subject: what is measured; the first entries of the report.
        parts: run in order.
        max_delta_ppl: see `eval.quality.verdict.judge`.
        output: folder; `PARTIAL` is written there after each item, and the report's own files when all is measured.
    """

    def __init__(
        self, subject: dict[str, Any], parts: Sequence[Part], max_delta_ppl: float | None, output: Path | None
    ) -> None:
        self._subject, self._parts, self._max_delta_ppl, self._output = subject, parts, max_delta_ppl, output
        self._items: dict[str, list[Any]] = {key: [] for key in ("runs", "memory", "caches", "induction", "passkey")}
        self._num_done = 0

    @property
    def is_complete(self) -> bool:
        """Whether every part has run."""
        return self._num_done == len(self._parts)

    def forecast(self) -> str:
        """How long all parts will take, in words."""
        groups = {part.group: 0.0 for part in self._parts}
        for part in self._parts:
            groups[part.group] += part.seconds
        shares = ", ".join(f"{name} {in_words(seconds)}" for name, seconds in groups.items() if seconds)
        return f"this will take about {in_words(sum(groups.values()))}: {shares}"

    def run(self) -> None:
        """Run the parts; what they have given is on disk after each item."""
        self._write(PARTIAL)
        total = sum(part.seconds for part in self._parts)
        shown = "{desc}: {percentage:.0f}%|{bar}| {elapsed}, about {remaining} to go"
        with tqdm(total=total, desc="report", bar_format=shown) as bar:
            for part in self._parts:
                for item in part.work():
                    self._items[part.key].append(item)
                    self._write(PARTIAL)
                self._num_done += 1
                self._write(PARTIAL)
                bar.update(min(part.seconds, total - bar.n))  # rounding may not go beyond the total
        self._write("report")
        if self._output is not None:
            for ending in (".json", ".md"):
                (self._output / f"{PARTIAL}{ending}").unlink(missing_ok=True)
            try:
                report_figure.draw(self.report(), self._output / "report.png")
            except ImportError as error:
                _say(f"report.png is not drawn: {error}; then python -m eval.report_figure {self._output}")

    def verdict(self) -> Verdict:
        """Of what is measured."""
        items = self._items
        return judge(items["runs"], items["induction"], items["passkey"], self._max_delta_ppl)

    def report(self) -> dict[str, Any]:
        """What report.json holds; "complete" says whether all parts are in it, without which nothing has passed."""
        verdict, rows = self.verdict(), self._items["runs"]
        return {
            **self._subject,
            "complete": self.is_complete,
            "runs": [
                {"name": row.name, **asdict(row), "limits": asdict(limits_of(row, rows, self._max_delta_ppl))}
                for row in rows
            ],
            "memory": self._items["memory"],
            **{key: [asdict(item) for item in self._items[key]] for key in ("caches", "induction", "passkey")},
            "verdict": {
                "passed": self.is_complete and verdict.passed,
                "num_checks": verdict.num_checks,
                "failures": verdict.failures,
            },
        }

    def markdown(self) -> str:
        """The report as Markdown."""
        verdict = self.verdict()
        line = verdict.line
        if not self.is_complete:
            line = (
                f"PARTIAL: {self._num_done} of {len(self._parts)} parts are measured; of {verdict.num_checks} checks "
                f"so far {len(verdict.failures)} fail{': ' * bool(verdict.failures)}{'; '.join(verdict.failures)}"
            )
        return markdown(self.report(), line)

    def _write(self, name: str) -> None:
        if self._output is None:
            return
        self._output.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.report(), indent=2, allow_nan=False) + "\n"
        for ending, content in ((".json", text), (".md", self.markdown())):
            # A process that is killed while it writes leaves the file before.
            fresh = self._output / f"{name}{ending}.new"
            fresh.write_text(content, encoding="utf-8")
            fresh.replace(self._output / f"{name}{ending}")


def _quality_parts(
    model: PreTrainedModel,
    reference: Reference,
    ids: Sequence[int],
    settings: Settings,
    runs: Sequence[tuple[str, str, str]],
) -> list[Part]:
    return [
        Part(
            "perplexity",
            "runs",
            run_seconds(model, ids, settings, run),
            lambda run=run: [measure(model, reference, ids, settings, run)],
        )
        for run in runs
    ]


def _runs(args: argparse.Namespace) -> list[tuple[str, str, str]]:
    """Every attention on every path that it has; quantised pages where they are read in place."""
    runs, _ = plan_runs(args.attn, args.path, ["auto"])
    quantised = [kv_dtype for kv_dtype in args.kv_dtype if kv_dtype != "auto"]
    paged = [name for name in args.attn if name.startswith("paged_flash")]
    paths = [path for path in args.path if path in QUANTISED_PATHS]
    if quantised and paged and paths:
        runs += plan_runs(paged, paths, quantised)[0]
    return runs


def _settings(args: argparse.Namespace, model: PreTrainedModel) -> Settings:
    window = min(2048, max_positions(model.config) or 2048) if args.window is None else args.window
    stride = args.stride
    if stride is None:
        stride = min(512, window // 2) if args.convention == "hf" else window
    chunk = default_chunk(window) if args.chunk is None else args.chunk
    return Settings(window, stride, args.convention, args.page_size, chunk, args.batch_size)


def _induction_parts(args: argparse.Namespace, device: torch.device) -> list[Part]:
    lengths = args.induction_lengths
    if lengths is None:
        lengths = [4096, 16384, 65536, 131072] if device.type == "cuda" else [256, 512, 1024, 2048]
    if not lengths:
        return []
    model = induction_model(dtype=torch.float32 if device.type == "cpu" else torch.bfloat16).to(device)
    longest = copy_prompt(model.config.vocab_size, max(lengths), 0, string_len=STRING_LEN, depth=0.5)
    parts = []
    for kv_dtype in args.kv_dtype:
        seconds = {
            is_decode: prompts_seconds(
                model, longest, lengths, STRING_LEN - 1, "decode" if is_decode else "chunked_prefill",
                kv_dtype=kv_dtype, page_size=args.page_size,
            )
            for is_decode in (False, True)
        }  # fmt: skip
        for path in INDUCTION_PATHS if kv_dtype == "auto" else QUANTISED_PATHS:
            grid = partial(
                induction_grid, model, lengths, args.depths, path=path, kv_dtype=kv_dtype, page_size=args.page_size
            )
            total = len(args.depths) * seconds[path == "decode"]
            parts.append(Part("induction model", "induction", total, lambda grid=grid: [grid()]))
    return parts


def _passkey_parts(args: argparse.Namespace, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[Part]:
    if not args.passkey_lengths:
        return []
    prompt = torch.tensor([passkey_prompt(tokenizer, max(args.passkey_lengths), 0.5, 12345)])
    seconds = prompts_seconds(model, prompt, args.passkey_lengths, MAX_ANSWER, "decode", page_size=args.page_size)

    def grid(attn: str) -> Iterator[Grid]:
        set_attention(model, attn)
        yield passkey_grid(model, tokenizer, args.passkey_lengths, args.depths)

    return [
        Part("passkey", "passkey", seconds * NUM_KEYS * len(args.depths), partial(grid, attn))
        for attn in ("sdpa", "paged_flash")
    ]


def _cache_parts(
    args: argparse.Namespace, model: PreTrainedModel, ids: Sequence[int], settings: Settings
) -> list[Part]:
    if not args.cache_tokens:
        return []
    few = ids[: args.cache_tokens]
    kinds = [("sdpa", "auto"), *(("paged_flash", kv_dtype) for kv_dtype in KV_DTYPES)]
    # Packages of other quantised caches may not be installed: they are not in the forecast.
    seconds = sum(run_seconds(model, few, settings, (attn, "chunked_prefill", kv_dtype)) for attn, kv_dtype in kinds)
    return [Part("caches", "caches", seconds, lambda: kv_table(model, few, settings))]


@torch.no_grad()
def _memory(model: PreTrainedModel, ids: Sequence[int], settings: Settings) -> list[dict[str, Any]]:
    """Bytes that each cache holds for one window."""
    found = []
    for name in ("DynamicCache", *(f"PagedCache {kv_dtype}" for kv_dtype in KV_DTYPES)):
        kind = name.split()[-1]
        set_attention(model, "sdpa" if name == "DynamicCache" else "paged_flash")
        cache = (
            DynamicCache(config=model.config)
            if name == "DynamicCache"
            else hf_paged.PagedCache(model.config, page_size=settings.page_size, kv_dtype=kind)
        )
        row = torch.tensor([list(ids)], device=model.device)
        model(row, **with_cache(model, cache), use_cache=True, logits_to_keep=1)
        num_bytes = held_bytes(cache)
        found.append({"cache": name, "tokens": len(ids), "bytes": num_bytes, "bytes_per_token": num_bytes / len(ids)})
    return found


def markdown(report: dict[str, Any], verdict_line: str) -> str:
    """The report as Markdown."""
    reference = report["reference"]
    lines = [
        f"# Was anything lost? {report['model']}\n",
        f"**{verdict_line}**\n",
        f"{report['data']}: {report['num_tokens']:,} tokens, convention {report['convention']}, window "
        f"{report['window']}, stride {report['stride']}, pages of {report['page_size']}. {report['dtype']} on "
        f"{report['device']}, {report['date']}; "
        f"{', '.join(f'{name} {version}' for name, version in report['versions'].items())}. Written by "
        "`python -m eval.report`.\n",
        *(["![differences and retrieval](report.png)\n"] if report["complete"] else []),
        "## Perplexity\n",
        f"Eager attention in float32: {reference['ppl']:.6f}. Differences are against it, token by token, in nats; "
        "intervals are 95%, by bootstrap over windows, and say how much the text decides; top-1 is the share of tokens "
        "with the same most likely token; KL from eager float32"
        + ("." if report["dtype"] == "float32" else f". Eager attention in {report['dtype']} is the dtype's own noise.")
        + "\n",
        "| attention | path | pages | perplexity | interval | relative | mean \\|diff\\| | max \\|diff\\| | top-1 | KL "
        "mean | KL max | tokens/s |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for run in report["runs"]:
        lines.append(
            f"| {run['attn']} | {run['path']} | {run['kv_dtype']} | {run['ppl']:.5f} | {run['ppl_low']:.2f} to "
            f"{run['ppl_high']:.2f} | {run['delta_ppl']:+.1e} | {run['mean_abs_diff']:.1e} | "
            f"{run['max_abs_diff']:.1e} | {run['top1_agreement']:.4f} | {_or_dash(run['kl_mean'])} | "
            f"{_or_dash(run['kl_max'])} | {run['num_scored'] / run['seconds']:,.0f} |"
        )
    if report["induction"] or report["passkey"]:
        lines += [
            "\n## Retrieval\n",
            "Seconds are of the longest prompt, the fastest of its depths; bytes are what the cache holds after it.\n",
            "| what | tokens | depths | worst cell | mean | seconds | cache MiB |",
            "|---|---|---|---|---|---|---|",
        ]
        for grid in [*report["induction"], *report["passkey"]]:
            scores = [score for row in grid["scores"] for score in row]
            seconds = "-" if grid["seconds"] is None else f"{grid['seconds'][-1]:.2f}"
            held = "-" if grid["cache_bytes"] is None else f"{grid['cache_bytes'][-1] / 2**20:.1f}"
            lines.append(
                f"| {grid['name']} | {', '.join(f'{length:,}' for length in grid['lengths'])} | "
                f"{', '.join(f'{depth:g}' for depth in grid['depths'])} | {min(scores):.3f} | "
                f"{sum(scores) / len(scores):.3f} | {seconds} | {held} |"
            )
    lines += ["\n## Memory of one window\n", "| cache | tokens | bytes | bytes per token |", "|---|---|---|---|"]
    for row in report["memory"]:
        lines.append(f"| {row['cache']} | {row['tokens']} | {row['bytes']:,} | {row['bytes_per_token']:,.0f} |")
    if report["caches"]:
        lines += ["\n## Perplexity against bits\n", *kv_lines([CacheRow(**row) for row in report["caches"]])]
    return "\n".join(lines) + "\n"


def kv_lines(rows: Sequence[CacheRow]) -> list[str]:
    """The table of `eval.quality.kv_quantisation` as Markdown."""
    lines = [
        "All windows through the cache in chunks; bits of memory for each number, scales and unfilled pages included; "
        "differences against the first row.\n",
        "| cache | bits | perplexity | relative | max \\|diff\\| |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        if row.ppl is None:
            lines.append(f"| {row.cache} | - | - | - | not measured: {row.note} |")
        else:
            lines.append(
                f"| {row.cache} | {row.bits:.1f} | {row.ppl:.4f} | {row.delta_ppl:+.1e} | {row.max_abs_diff:.1e} |"
            )
    return lines


def _or_dash(value: float | None) -> str:
    return "-" if value is None else f"{value:.1e}"


def _parser() -> argparse.ArgumentParser:
    parser = command_line.make_parser("report", __doc__)
    parser.add_argument("--model", required=True, help="model folder or hub id")
    parser.add_argument("--data", required=True, help=ACCEPTED_SPECS)
    parser.add_argument("--text-column", default="text", help="column with the text")
    parser.add_argument("--attn", nargs="+", default=["eager", "sdpa", "paged_flash"], help="attention implementations")
    parser.add_argument("--path", nargs="+", default=list(PATHS), help=f"from {PATHS}")
    parser.add_argument("--kv-dtype", nargs="+", choices=KV_DTYPES, default=list(KV_DTYPES), help="of the pages")
    conventions = [c for c in CONVENTIONS if c not in BY_DOCUMENT]
    parser.add_argument("--convention", choices=conventions, default="hf", help="windows, see eval/quality/windows.py")
    parser.add_argument("--window", type=int, help="tokens in a window (default: 2048, or the model's positions)")
    parser.add_argument("--stride", type=int, help="tokens from window to window")
    parser.add_argument("--max-tokens", type=int, help="use the first so many tokens of the text (default: all)")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="of the weights; the reference is in float32")
    parser.add_argument("--device", help="torch device (default: cuda if there is one, else cpu)")
    parser.add_argument("--batch-size", type=command_line.positive_int, default=1, help="windows in a forward")
    parser.add_argument("--page-size", type=command_line.positive_int, default=16, help="tokens in a page")
    parser.add_argument(
        "--chunk", type=command_line.positive_int,
        help="tokens in a forward of chunked_prefill (default: 64, or a quarter of the window)",
    )  # fmt: skip
    parser.add_argument("--depths", type=float, nargs="+", default=[0.0, 0.25, 0.5, 0.75, 1.0], help="0 to 1")
    parser.add_argument(
        "--induction-lengths", type=int, nargs="*",
        help="tokens (default: 4,096 to 131,072 on a GPU, 256 to 2,048 elsewhere); none: leave it out",
    )  # fmt: skip
    parser.add_argument("--passkey-lengths", type=int, nargs="*", default=[], help="tokens")
    parser.add_argument("--cache-tokens", type=int, default=2048, help="tokens for the table of caches; 0: none")
    parser.add_argument("--max-delta-ppl", type=float, help="limit on |perplexity / reference - 1| of every run")
    parser.add_argument("--output", type=command_line.output_folder, help="folder for report.md, .json and .png")
    return parser


if __name__ == "__main__":
    command_line.run(main)
