"""Every kernel beside the peers that are installed, on one GPU, in one run.

    python -m eval.bench_kernels --output eval/results

Prints a table for each kernel family with the fraction of the card's own copy and matmul rates, and writes them as JSON
(after every row, so a run that is cut leaves what it has), Markdown and plots named after the device. SDPA's flash and
cuDNN back ends always take part; FlashAttention, FlashInfer and FlexAttention where they can be imported.
"""

import argparse
import gc
import json
import os
import platform
import re
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from eval import command_line

from .kernel_bench import timing
from .kernel_bench.calls import columns_of, find_peers, our_columns
from .kernel_bench.rows import FLOPS_TABLES, TITLES, Row, all_rows, draw, markdown, rate, table

COMPILE_LIMIT_S = 60.0
QUICK_COMPILE_LIMIT_S = 25.0


def parse_tables(text: str) -> list[str]:
    """Names separated by commas, in the tables' own order."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in TITLES:
            raise argparse.ArgumentTypeError(f"unknown table {name!r}; accepted: {', '.join(TITLES)}")
    if not names:
        raise argparse.ArgumentTypeError(f"no table named; accepted: {', '.join(TITLES)}")
    return [name for name in TITLES if name in names]


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = command_line.make_parser("bench_kernels", __doc__)
    parser.add_argument(
        "--tables", type=parse_tables, default=list(TITLES), metavar="NAME,...",
        help=f"what to measure; default all: {','.join(TITLES)}",
    )  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="a few rows of every table")
    parser.add_argument(
        "--output", type=command_line.output_folder, metavar="DIR",
        help="where bench_kernels_<device>.json, .md and .png files go; default: only print",
    )  # fmt: skip
    parser.add_argument(
        "--variant", choices=("auto", "triton"), default="auto",
        help="auto: what a call chooses on this device, and portable Triton beside it where that is another kernel; "
        "triton: portable Triton only",
    )  # fmt: skip
    parser.add_argument(
        "--draw", type=command_line.input_file, metavar="JSON",
        help="measure nothing: Markdown and plots of an earlier run, beside its JSON; needs no GPU",
    )  # fmt: skip
    return parser


def describe(options: argparse.Namespace) -> str:
    """The command that was run, without the folder."""
    words = ["python -m eval.bench_kernels"]
    if options.tables != list(TITLES):
        words.append(f"--tables {','.join(options.tables)}")
    if options.quick:
        words.append("--quick")
    if options.variant != "auto":
        words.append(f"--variant {options.variant}")
    return " ".join(words)


def file_stem(device: str, quick: bool) -> str:
    """``NVIDIA H200`` -> ``bench_kernels_h200``."""
    name = re.sub(r"[^a-z0-9]+", "_", device.lower().replace("nvidia", "")).strip("_")
    return f"bench_kernels_{name}" + ("_quick" if quick else "")


def versions() -> dict[str, str]:
    """What a figure depends on, besides the device."""
    import triton

    found = {"torch": torch.__version__, "triton": triton.__version__, "python": platform.python_version()}
    return found | ({"cuda": torch.version.cuda} if torch.version.cuda else {})


def write_json(report: dict[str, Any], path: Path) -> None:
    """Replace the file in one step: whoever reads it never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".json.tmp")
    unfinished.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    os.replace(unfinished, path)


def record(row: Row) -> dict[str, Any]:
    """A row as JSON, without its cells."""
    return {
        "label": row.label, "query_lens": list(row.query_lens), "seq_lens": list(row.seq_lens),
        "head_dim": row.head_dim, "q_heads": row.q_heads, "kv_heads": row.kv_heads, "group": row.group,
        "causal": row.causal, "page_size": row.page_size, "kv_dtype": row.kv_dtype, "flops": row.flops,
        "bytes": row.bytes, "cells": {},
    }  # fmt: skip


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure; prints each table as it is ready."""
    started = time.monotonic()
    peers, skipped = find_peers(options.quick)
    for name, why in skipped.items():
        print(f"{name}: {why}, left out")
    rows, ours = all_rows(options.tables, options.quick), our_columns(options.variant)
    device = torch.cuda.get_device_name()
    report: dict[str, Any] = {
        "what": "medians in microseconds of one call, BF16 random data", "device": device, "versions": versions(),
        "date": date.today().isoformat(), "command": describe(options), "seconds": 0.0, "finished": False,
        "skipped": skipped, "ceilings": {}, "tables": {},
    }  # fmt: skip
    path = None if options.output is None else options.output / f"{file_stem(device, options.quick)}.json"

    def save() -> None:
        report["seconds"] = round(time.monotonic() - started, 1)
        if path is not None:
            write_json(report, path)

    save()
    limit_s = QUICK_COMPILE_LIMIT_S if options.quick else COMPILE_LIMIT_S
    with tqdm(total=None, desc="compile", leave=False) as progress:

        def done(count: int, total: int) -> None:
            progress.total = total
            progress.update(count - progress.n)

        not_ready = timing.compile_all(rows, peers, ours, limit_s, done)
    report["compile_seconds"] = round(time.monotonic() - started, 1)
    measure_ceilings(report)
    save()
    with tqdm(rows, desc="rows") as progress:
        for i, row in enumerate(progress):
            progress.set_description(f"{row.table}: {row.label}")
            entry = record(row)
            report["tables"].setdefault(row.table, []).append(entry)
            fill(entry, row, peers, ours, not_ready, options.quick)
            gc.collect()
            torch.cuda.empty_cache()
            save()
            if i + 1 == len(rows) or rows[i + 1].table != row.table:
                progress.write("\n" + table(report, row.table), file=sys.stdout)
    report["finished"] = True
    save()
    return report


def measure_ceilings(report: dict[str, Any]) -> None:
    """The card's own rates; one that fails is recorded as such."""
    for name, function in timing.CEILINGS.items():
        try:
            report["ceilings"][name] = round(function(), 4)
        except Exception as error:
            report["ceilings"][name] = {"failed": timing.reason(error)}
    torch.cuda.empty_cache()


def fill(
    entry: dict[str, Any], row: Row, peers: set[str], ours: tuple[str, ...], not_ready: dict[Any, str], quick: bool
) -> None:
    """Measure a row's columns into its cells; one that fails says why, and the others go on."""
    cells = entry["cells"]
    try:
        columns = columns_of(row, peers, ours)
    except Exception as error:
        cells[ours[0]] = {"failed": f"inputs: {timing.reason(error)}"}
        return
    for name, make in columns.items():
        why = not_ready.get(timing.compile_key(row, name))
        if why is not None:
            cells[name] = {"failed": why}
            continue
        try:
            us = timing.measure(row, make, quick)
        except Exception as error:
            cells[name] = {"failed": timing.reason(error)}
        else:
            unit = "tflops" if row.table in FLOPS_TABLES else "tb_per_s"
            cells[name] = {"us": round(us, 3), unit: round(rate(row.table, entry, us), 4)}


def write_words_and_plots(report: dict[str, Any], stem: Path) -> None:
    """Markdown and plots beside the JSON; without matplotlib no plots, and a line that says how to draw them later."""
    written = [stem.with_suffix(".md")]
    written[0].write_text(markdown(report), encoding="utf-8")
    try:
        written += draw(report, stem)
    except ImportError as error:
        print(f"No plots: {error} Then: python -m eval.bench_kernels --draw {stem.with_suffix('.json').name}")
    print("Written: " + ", ".join(str(file) for file in written))


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = make_parser()
    options = parser.parse_args(arguments)
    if options.draw is not None:
        report = command_line.read_report(options.draw, "tables", "eval.bench_kernels")
        write_words_and_plots(report, options.draw.with_suffix(""))
        return
    if not torch.cuda.is_available():
        parser.exit(
            2, "eval.bench_kernels times kernels on a GPU: it needs one, and torch.cuda.is_available() is False.\n"
        )
    report = run(options)
    print(markdown(report).split("\n## ")[0])
    print(f"{report['seconds']:.0f} s, {report['compile_seconds']:.0f} of them compiling.")
    if options.output is not None:
        write_words_and_plots(report, options.output / file_stem(report["device"], options.quick))


if __name__ == "__main__":
    command_line.run(main)
