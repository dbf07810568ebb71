"""The README's figure, from committed results alone: nothing is measured here.

    python -m eval.figures --output eval/results/figures.png

Left: tokens a second of the engine beside `generate_batch` and the roofline (`bench_engine_h200.json`). Middle: bytes
that each cache holds (`cache_memory.json`). Right: memory of one prefill over its length (`prefill_memory_h200.json`).
Pages over time have a picture of their own: `eval/page_picture.py`.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eval import command_line

RESULTS = Path(__file__).parent / "results"
INPUTS = ("prefill_memory_h200.json", "cache_memory.json", "bench_engine_h200.json")
COLORS = {"paged_flash": "#2a6f97", "sdpa": "#c8553d", "eager": "#8d8d8d"}
CACHES = {"PagedCache": "#2a6f97", "PagedCache int8": "#7fb0cc", "DynamicCache": "#c8553d"}
CASES = {"a": "32 ragged\nprompts", "b": "8 beams,\n2k prompt", "c": "16 samples,\n4k prompt"}
THROUGHPUT = {"Engine.generate": "#2a6f97", "generate_batch, same kernels": "#c8553d", "roofline": "#d9d9d9"}


def load(folder: Path) -> dict[str, Any]:
    """The committed results by file name.

    Raises:
        FileNotFoundError: one of `INPUTS` is not in `folder`; the message names it and the command that makes it.
    """
    found = {}
    for name in INPUTS:
        path = folder / name
        if not path.is_file():
            raise FileNotFoundError(
                f"results (--results) {str(folder)!r} has no {name}; make it with python -m "
                f"eval.{name.removesuffix('.json').removesuffix('_h200')}"
            )
        found[name] = json.loads(path.read_text(encoding="utf-8"))
    return found


def draw(results: dict[str, Any], path: Path) -> None:
    """Write the PNG.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('eval.figures draws with matplotlib: pip install "hf-paged[eval]"') from error
    figure = Figure(figsize=(13, 4.2), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    engine, caches, prefill = figure.subplots(1, 3)
    _prefill(prefill, results["prefill_memory_h200.json"])
    _caches(caches, results["cache_memory.json"])
    _engine(engine, results["bench_engine_h200.json"])
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _prefill(axes: Any, report: dict[str, Any]) -> None:
    for attn, color in COLORS.items():
        rows = [row for row in report["rows"] if row["attn_implementation"] == attn and row["peak_bytes"]]
        axes.plot([row["tokens"] for row in rows], [row["peak_bytes"] / 2**30 for row in rows], "o-", color=color,
                  label=attn)  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("tokens of a prompt")
    axes.set_ylabel("GiB above the weights")
    axes.set_title(f"One prefill, {report['layers']} layers, {report['device']}", fontsize=10)
    axes.legend(frameon=False)


def _caches(axes: Any, report: dict[str, Any]) -> None:
    held = {(row["case"], row["cache"]): row["held_bytes"] for row in report["rows"]}
    width = 0.8 / len(CACHES)
    for index, (cache, color) in enumerate(CACHES.items()):
        values = [(held.get((case, cache)) or 0) / 2**20 for case in CASES]
        places = [case + (index - 1) * width for case in range(len(CASES))]
        bars = axes.bar(places, values, width, color=color, label=cache)
        axes.bar_label(bars, [f"{value:.0f}" if value else "" for value in values], fontsize=8)
    axes.set_xticks(range(len(CASES)), list(CASES.values()), fontsize=8)
    axes.set_ylabel("MiB held")
    axes.set_title(f"Memory of the cache, {report['sizes']['num_layers']} layers", fontsize=10)
    axes.legend(frameon=False, fontsize=8)


def _engine(axes: Any, report: dict[str, Any]) -> None:
    speeds = {}
    for name, model in report["models"].items():
        peers = [peer.get("tokens_per_s") for peer in model.get("peers", {}).values()]
        ours = model.get("graphs", {}).get("throughput", {}).get("tokens_per_s")
        if ours is not None:
            speeds[name] = (ours, max(filter(None, peers), default=None), model["roofline"]["tokens_per_s"])
    width = 0.8 / len(THROUGHPUT)
    for index, (label, color) in enumerate(THROUGHPUT.items()):
        values = [found[index] or 0 for found in speeds.values()]
        places = [place + (index - 1) * width for place in range(len(speeds))]
        bars = axes.bar(places, values, width, color=color, label=label)
        axes.bar_label(bars, [f"{value / 1000:.1f}k" if value else "" for value in values], fontsize=7)
    axes.set_xticks(range(len(speeds)), list(speeds), fontsize=8)
    axes.set_ylabel("new tokens a second")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value / 1000:.0f}k")
    requests = report["sizes"]["num_requests"]
    axes.set_title(f"{requests} requests at once, {report['device']}", fontsize=10)
    axes.legend(frameon=False, fontsize=8)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = command_line.make_parser("figures", __doc__)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder with the committed JSON")
    parser.add_argument("--output", type=command_line.output_file, required=True, help="PNG file")
    args = parser.parse_args(argv)
    draw(load(args.results), args.output)


if __name__ == "__main__":
    command_line.run(main)
