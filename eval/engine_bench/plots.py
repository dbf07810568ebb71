"""The plots of the engine's GPU benchmark, from its JSON alone: throughput beside peers, and the arrival sweep."""

import importlib.util
from pathlib import Path
from typing import Any

from eval.engine_bench.report import VARIANTS

COLORS = {"engine": "#2a6f97", "off": "#7fb0cc", "peer": "#c8553d"}
LINES = ("#2a6f97", "#c8553d", "#588157", "#7b5ea7", "#f2c14e")


def can_draw() -> bool:
    """Whether matplotlib is there."""
    return importlib.util.find_spec("matplotlib") is not None


def draw(report: dict[str, Any], path: Path) -> None:
    """Write a PNG.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('plots need matplotlib: pip install "hf-paged[eval]"') from error
    models = report["models"]
    bars = {name: bars_of(entry) for name, entry in models.items()}
    bars = {name: found for name, found in bars.items() if found}
    sweeps = {name: entry["graphs"]["arrivals"]["rates"] for name, entry in models.items() if _has_sweep(entry)}
    num_rows = len(bars) + (1 if sweeps else 0)
    if not num_rows:
        return
    heights = [1 + 0.28 * len(found) for found in bars.values()] + [2.8] * bool(sweeps)
    figure = Figure(figsize=(11, sum(heights) + 0.6), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(num_rows, 2, height_ratios=heights)
    for row, (name, found) in enumerate(bars.items()):
        _throughput(figure.add_subplot(grid[row, :]), name, found, models[name]["roofline"]["tokens_per_s"])
    if sweeps:
        drawing = _sweep if any(len(rates) > 1 for rates in sweeps.values()) else _one_load
        drawing(figure.add_subplot(grid[-1, 0]), sweeps, "first_token_ms", "time to first token, ms")
        drawing(figure.add_subplot(grid[-1, 1]), sweeps, "between_tokens_ms", "time between tokens, ms")
    sizes = report["sizes"]
    low, high = sizes["lengths"]
    figure.suptitle(
        f"{report['device']}, random weights, {sizes['num_requests']} requests, prompts and outputs of {low} to "
        f"{high:,} tokens",
        fontsize=10,
    )
    figure.savefig(path)


def bars_of(entry: dict[str, Any]) -> list[tuple[str, float, str]]:
    """Label, new tokens a second and color of whoever finished, or was cut, with a figure."""
    found = []
    for kind, label in VARIANTS.items():
        part = entry.get(kind, {}).get("throughput", {})
        if "tokens_per_s" in part:
            color = COLORS["engine" if kind == "graphs" else "off"]
            found.append((f"hf_paged, {label}" + (" (cut)" if part["cut"] else ""), part["tokens_per_s"], color))
    for peer, result in entry.get("peers", {}).items():
        if result.get("tokens_per_s") is not None:
            said = f" (over {result['limit_s']:.0f} s)" if result["cut"] else ""
            found.append((peer + said, result["tokens_per_s"], COLORS["peer"]))
    return found


def _has_sweep(entry: dict[str, Any]) -> bool:
    rates = entry.get("graphs", {}).get("arrivals", {}).get("rates", [])
    return any(rate["between_tokens_ms"] for rate in rates)


def _throughput(axes: Any, name: str, found: list[tuple[str, float, str]], roofline: float) -> None:
    places = range(len(found))[::-1]
    drawn = axes.barh(places, [speed for _, speed, _ in found], color=[color for _, _, color in found])
    axes.bar_label(drawn, [f"{speed:,.0f}" for _, speed, _ in found], fontsize=8, padding=3)
    axes.set_yticks(places, [label for label, _, _ in found], fontsize=8)
    axes.axvline(roofline, color="#8d8d8d", linestyle="--", linewidth=1)
    axes.set_ylim(-0.6, len(found) - 0.4)
    axes.annotate("roofline", (roofline, places[0]), fontsize=8, color="#8d8d8d", ha="right")
    axes.set_xlabel("new tokens a second")
    axes.set_title(name, fontsize=9)


def _one_load(axes: Any, sweeps: dict[str, Any], key: str, title: str) -> None:
    """Percentiles of each model as bars, where one arrival rate was measured."""
    percentiles = ("p50", "p90", "p99")
    width = 0.8 / len(sweeps)
    for index, ((name, [rate]), color) in enumerate(zip(sweeps.items(), LINES)):
        places = [place + (index - (len(sweeps) - 1) / 2) * width for place in range(len(percentiles))]
        values = [rate[key][percentile] for percentile in percentiles]
        label = f"{name}, {rate['fraction']:.0%} of saturation"
        drawn = axes.bar(places, values, width, color=color, label=label)
        axes.bar_label(drawn, [f"{value:,.1f}" for value in values], fontsize=7)
    axes.set_xticks(range(len(percentiles)), percentiles, fontsize=8)
    axes.margins(y=0.3)
    axes.set_title(title, fontsize=9)
    axes.legend(frameon=False, fontsize=7)


def _sweep(axes: Any, sweeps: dict[str, Any], key: str, title: str) -> None:
    for (name, rates), color in zip(sweeps.items(), LINES):
        there = [rate for rate in rates if rate[key]]
        for percentile, style in (("p50", "o-"), ("p99", "o--")):
            places = [rate["fraction"] * 100 for rate in there]
            axes.plot(places, [rate[key][percentile] for rate in there], style, color=color, markersize=3,
                      label=f"{name}, {percentile}")  # fmt: skip
    axes.axvline(80, color="#8d8d8d", linestyle=":", linewidth=1)
    axes.set_yscale("log")
    axes.set_xlabel("arrivals, % of saturation")
    axes.set_title(title, fontsize=9)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.tick_params(axis="y", which="both", labelsize=7)
    axes.legend(frameon=False, fontsize=7, handlelength=3)
