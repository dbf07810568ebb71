"""The picture of a report: differences of every run against their limits, and the retrieval heat maps.

    python -m eval.report_figure eval/results/report

draws `report.png` again from the folder's `report.json`, which may come from a machine without matplotlib.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eval import command_line

WITHIN, OVER = "#2a6f97", "#c8553d"
GRIDS_A_ROW = 4


def draw(report: dict[str, Any], path: Path) -> None:
    """Write the PNG of a report of `eval.report`.

    Raises:
        ImportError: matplotlib is not installed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    figure_of(report).savefig(path)


def figure_of(report: dict[str, Any]) -> Any:
    """The picture as a matplotlib Figure; errors as `draw`."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('the report draws with matplotlib: pip install "hf-paged[eval]"') from error
    runs, grids = report["runs"], [*report["induction"], *report["passkey"]]
    height = max(3.2, 0.32 * len(runs) + 1.4)
    num_rows = max(1, -(-len(grids) // GRIDS_A_ROW))
    bottom_height = 2.6 * num_rows + 0.4
    figure = Figure(figsize=(13, height + bottom_height), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    parts: Any = figure.subfigures(2, 1, height_ratios=[height, bottom_height])
    top, bottom = parts
    figure.suptitle(f"{report['model']}: {'passed' if report['verdict']['passed'] else 'FAILED'}", fontsize=14)
    left, right = top.subplots(1, 2, sharey=True)
    names = [run["name"] for run in runs]
    places = list(range(len(runs)))[::-1]

    left.errorbar(
        [run["ppl"] for run in runs], places,
        xerr=[[run["ppl"] - run["ppl_low"] for run in runs], [run["ppl_high"] - run["ppl"] for run in runs]],
        fmt="o", color=WITHIN, ecolor="#9db8c7", capsize=2, markersize=4,
    )  # fmt: skip
    left.axvline(report["reference"]["ppl"], color="black", linewidth=0.8, linestyle=":")
    left.set_yticks(places, names, fontsize=8)
    left.set_xlabel("perplexity, 95% bootstrap over windows (dotted: eager float32)", fontsize=9)

    # A difference of exactly zero has no place on a log scale.
    values = [max(run["max_abs_diff"], 1e-8) for run in runs]
    over = [run["max_abs_diff"] > run["limits"]["max_abs_diff"] for run in runs]
    right.barh(places, values, color=[OVER if bad else WITHIN for bad in over], height=0.6)
    for place, run in zip(places, runs):
        limit = run["limits"]["max_abs_diff"]
        right.plot([limit, limit], [place - 0.4, place + 0.4], color="black", linewidth=1)
    right.set_xscale("log")
    right.set_xlim(left=5e-9)
    right.set_xlabel("largest difference of a token's log-probability, nats (line: limit)", fontsize=9)

    fields = bottom.subplots(num_rows, min(GRIDS_A_ROW, max(1, len(grids))), squeeze=False).ravel()
    for axes in fields:
        axes.set_axis_off()
    for axes, grid in zip(fields, grids):
        axes.set_axis_on()
        axes.imshow(grid["scores"], vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        axes.set_xticks(range(len(grid["lengths"])), [f"{length:,}" for length in grid["lengths"]], fontsize=8)
        axes.set_yticks(range(len(grid["depths"])), [f"{depth:.0%}" for depth in grid["depths"]], fontsize=8)
        axes.set_xlabel("tokens", fontsize=9)
        axes.set_ylabel("depth", fontsize=9)
        axes.set_title(grid["name"], fontsize=8)
        for y, row in enumerate(grid["scores"]):
            for x, score in enumerate(row):
                color = "white" if abs(score - 0.5) > 0.35 else "black"  # on the dark ends of the map
                axes.text(x, y, f"{score:.3f}", ha="center", va="center", fontsize=7, color=color)
    return figure


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command.

    Raises:
        ValueError: the folder has no report.json.
        ImportError: matplotlib is not installed.
    """
    parser = command_line.make_parser("report_figure", __doc__)
    parser.add_argument("folder", type=Path, help="with the report.json of eval.report")
    folder = parser.parse_args(argv).folder
    source = folder / "report.json"
    if not source.is_file():
        raise ValueError(f"folder {str(folder)!r} has no report.json; make it with python -m eval.report --output")
    draw(json.loads(source.read_text(encoding="utf-8")), folder / "report.png")


if __name__ == "__main__":
    command_line.run(main)
