"""The picture of a report: differences of every run against their limits, and the retrieval heat maps."""

from pathlib import Path
from typing import Any

WITHIN, OVER = "#2a6f97", "#c8553d"


def draw(report: dict[str, Any], path: Path) -> None:
    """Write the PNG of a report of `eval.report`.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('the report draws with matplotlib: pip install "hf-paged[eval]"') from error
    runs, grids = report["runs"], [*report["induction"], *report["passkey"]]
    height = max(3.2, 0.32 * len(runs) + 1.4)
    num_grids = max(len(grids), 1)
    figure = Figure(figsize=(13, height + 3.4), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    parts: Any = figure.subfigures(2, 1, height_ratios=[height, 3.4])
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

    for axes, grid in zip(bottom.subplots(1, num_grids, squeeze=False)[0], grids):
        image = axes.imshow(grid["scores"], vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        axes.set_xticks(range(len(grid["lengths"])), [f"{length:,}" for length in grid["lengths"]], fontsize=8)
        axes.set_yticks(range(len(grid["depths"])), [f"{depth:.0%}" for depth in grid["depths"]], fontsize=8)
        axes.set_xlabel("tokens", fontsize=9)
        axes.set_ylabel("depth", fontsize=9)
        axes.set_title(grid["name"], fontsize=9)
        for y, row in enumerate(grid["scores"]):
            for x, score in enumerate(row):
                axes.text(x, y, f"{score:.2f}", ha="center", va="center", fontsize=7)
        bottom.colorbar(image, ax=axes, fraction=0.04)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
