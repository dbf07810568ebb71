"""The report as one page of HTML that needs no other file: verdict, three pictures, tables."""

from html import escape
from typing import Any

from eval.real import charts
from eval.real.report import MAX_COST, about_lines, headline, tables, title

STYLE = """
:root{color-scheme:light}*{box-sizing:border-box}
body{margin:0 auto;max-width:66rem;padding:1.5rem 1rem 4rem;font:16px/1.5 system-ui,sans-serif;color:#1d2733;
background:#fff}
h1{font-size:1.5rem;line-height:1.25;margin:0 0 .8rem}h2{font-size:1.15rem;margin:2.2rem 0 .4rem}
.verdict{border-left:6px solid var(--c);background:#f5f8fa;padding:.7rem 1rem;margin:0 0 1rem}
.verdict strong{color:var(--c);font-size:1.15rem}ul{margin:.6rem 0 0;padding:0;list-style:none}
li{padding:.15rem 0 .15rem 1.6rem;text-indent:-1.6rem}li b{display:inline-block;width:1.6rem;text-indent:0}
.ok{color:#2d7a43}.no{color:#b3361f}.small{color:#5c6b7a;font-size:.88rem;overflow-wrap:anywhere}
figure{margin:1.4rem 0}.plot svg{width:100%;height:auto;display:block}
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,24rem),1fr));gap:0 2rem}
figcaption{font-size:.92rem;color:#3c4956;margin-bottom:.5rem}
.maps{display:flex;flex-wrap:wrap;gap:1rem}.maps svg{min-width:0;flex:0 1 auto;width:min(100%,27rem)}
.table{overflow-x:auto}table{border-collapse:collapse;font-size:.8rem;font-variant-numeric:tabular-nums}
th,td{padding:.25rem .45rem;border-bottom:1px solid #dfe5ea;text-align:right;white-space:nowrap}
th{vertical-align:bottom;white-space:normal}td:first-child,th:first-child{text-align:left}
"""


def html(report: dict[str, Any]) -> str:
    """The whole page."""
    found = report["verdict"]
    colour = "#2d7a43" if found["passed"] else "#b3361f"
    items = "".join(
        f"<li><b class='{mark}'>{'✓' if mark == 'ok' else '✗'}</b>{escape(line['text'])}</li>"
        for line in found["lines"]
        for mark in ["ok" if line["passed"] else "no"]
    )
    parts = [
        f"<h1>{escape(title(report))}</h1>",
        f"<div class='verdict' style='--c:{colour}'><strong>{escape(headline(report))}</strong><ul>{items}</ul></div>",
        "<p class='small'>" + "<br>".join(escape(line.replace("`", "")) for line in about_lines(report)) + "</p>",
    ]
    figures = [
        f"<figure><figcaption>{escape(caption)}</figcaption><div class='{kind}'>{picture}</div></figure>"
        for caption, picture in pictures(report)
        for kind in ["maps" if picture.count("<svg") > 1 else "plot"]
    ]
    # The first two stand side by side where there is room.
    parts += ["<div class='pair'>" + "".join(figures[:2]) + "</div>", *figures[2:]]
    for heading, note, columns, rows in tables(report):
        head = "".join(f"<th>{escape(column)}</th>" for column in columns)
        body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
        parts.append(
            f"<h2>{escape(heading)}</h2><p class='small'>{escape(note)}</p>"
            f"<div class='table'><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
        )
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width,initial-scale=1'>"
        f"<title>{escape(title(report))}</title><style>{STYLE}</style></head><body>{''.join(parts)}</body></html>\n"
    )


def pictures(report: dict[str, Any]) -> list[tuple[str, str]]:
    """(caption, SVG) of the pictures that carry the verdict, of the parts that were measured."""
    found = []
    if "text" in report:
        limit = MAX_COST["quantised"]
        colours = {"auto": 0, "fp8": 1, "int8": 2}
        rows = [
            (r["name"], 100 * r["cost"], 100 * r["cost_half"], colours.get(r["kv_dtype"], 3))
            for r in report["text"]["runs"]
            if r["baseline"]
        ]
        found.append(
            (
                "1. What each attention, path and page dtype changes in perplexity: dots with 95% intervals of the "
                "paired difference. Zero: nothing. Right of it: worse. Shaded: within the limit of quantised pages.",
                charts.interval_chart(
                    rows,
                    "difference of perplexity from the baseline, %",
                    "attention, path, dtype of pages",
                    (-100 * limit, 100 * limit),
                ),
            )
        )
    if "greedy" in report:
        greedy = report["greedy"]
        rows32 = greedy["beside_float32"]
        reference = "eager attention in float32" if rows32 else "eager attention"
        rows = rows32 or greedy["beside_eager"]
        found.append(
            (
                f"2. Greedy texts that are still equal to those of {reference}. A text that differs in one token "
                "differs behind it, so curves only fall"
                + (
                    f"; the first is eager attention in {report['dtype']}: what rounding alone does." if rows32 else "."
                ),
                charts.curve_chart(
                    [(row["way"], row["still_equal"]) for row in rows],
                    "new tokens",
                    "equal texts",
                ),
            )
        )
    if "passages" in report:
        grids = report["passages"]
        found.append(
            (
                "3. A passage far back is found again: share of its tokens that are predicted, by where it stands and "
                "how long the prompt is. What counts is that the maps are alike.",
                "".join(
                    charts.heat_map(
                        grid["name"],
                        grid["scores"],
                        [_short(length) for length in grid["lengths"]],
                        [f"{depth:g}" for depth in grid["depths"]],
                        ("tokens of the prompt", "depth"),
                    )
                    for grid in grids
                ),
            )
        )
    return found


def _short(length: int) -> str:
    return f"{length // 1024}k" if length >= 1024 and length % 1024 == 0 else str(length)
