"""The rows of ``eval.bench_kernels``: shapes, what each counts for, and the tables and plots made of the figures.

Plain Python: nothing here needs a GPU. FLOPs are 4·Hq·D per (query, key) pair that the mask keeps, 2.5 times that for a
backward pass. Bytes are the keys and values that a step must read once, or that ``write_pages`` reads and writes.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

OURS = "ours"
PORTABLE = "ours, portable Triton"
PLAN_INSIDE = "ours, plan in the call"
DENSE = "ours, dense"
NOT_SHARED = "ours, without sharing"
SDPA_FLASH = "FA2 (SDPA flash)"
CUDNN = "cuDNN (SDPA)"
FA2 = "FA2 (flash_attn)"
FA3 = "FA3"
FA4 = "FA4 (CuTe DSL)"
FLASHINFER = "FlashInfer"
FLEX = "FlexAttention"
INDEX_PUT = "index_put"
PEERS = (SDPA_FLASH, CUDNN, FA2, FA3, FA4, FLASHINFER, FLEX, INDEX_PUT)
"""Every column that is not ours."""

TITLES = {
    "prefill": "Prefill, dense: TFLOP/s (16k tokens in all and 2048/D heads, or GQA 32/8 with batch 1)",
    "paged": "Prefill over pages (GQA 32/8, D 128, causal, batch 1): TFLOP/s",
    "decode": "Decode (one new token a sequence, GQA 32/8, D 128, pages of 16), in a CUDA graph: us, TB/s of K/V read",
    "verify": "Several new tokens a sequence (GQA 32/8, D 128, pages of 16), in a CUDA graph: us, TB/s of K/V read",
    "write_pages": "write_pages (8 heads, D 128, pages of 16), in a CUDA graph: us, TB/s read and written",
    "backward": "Backward, causal (16k tokens in all, 2048/D heads; 2.5 times the forward FLOPs): TFLOP/s",
    "shared_prefix": "Shared prefix (GQA 32/8, D 128, pages of 16), in a CUDA graph: us",
}
"""The tables by name, in the order in which they are measured."""
FOOTNOTES = {
    "paged": "FA2 (SDPA flash) and cuDNN read contiguous keys and values; they have no row over cached tokens.",
    "decode": "FA2 (SDPA flash) and cuDNN read contiguous keys and values of one length. The plan is made once for all "
    "layers, outside of the graph, but for the column that says otherwise. Buffers are rotated, so nothing is in L2.",
    "verify": "FA2 (SDPA flash) and cuDNN read contiguous keys and values, and attend without a mask.",
    "write_pages": "index_put is `pages[page, :, slot] = new`.",
}
FLOPS_TABLES = ("prefill", "paged", "backward")
BYTES_PER_ELEMENT = {"bfloat16": 2, "fp8": 1, "int8": 1}


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a table.

    Attributes:
        table: its table.
        label: its first column.
        query_lens: new tokens of each sequence.
        seq_lens: keys of each sequence, those of the new tokens counted.
        page_size: tokens of a page; None: dense.
        kv_dtype: of the pages: bfloat16, fp8 or int8.
        prefix: tokens at the beginning of every sequence that all of them share.
        quick: part of a quick run.
    """

    table: str
    label: str
    query_lens: tuple[int, ...]
    seq_lens: tuple[int, ...]
    q_heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    causal: bool = True
    page_size: int | None = None
    kv_dtype: str = "bfloat16"
    prefix: int = 0
    quick: bool = False

    @property
    def group(self) -> int:
        """Query heads per key/value head."""
        return self.q_heads // self.kv_heads

    @property
    def flops(self) -> float:
        """Floating-point operations of one call."""
        pairs = sum(count_pairs(q, k, self.causal) for q, k in zip(self.query_lens, self.seq_lens))
        return 4.0 * self.q_heads * self.head_dim * pairs * (2.5 if self.table == "backward" else 1.0)

    @property
    def bytes(self) -> int:
        """Bytes of keys and values that one call must move: read once, for write_pages also written."""
        stored = 2 * self.kv_heads * (self.head_dim * BYTES_PER_ELEMENT[self.kv_dtype])
        if self.kv_dtype != "bfloat16":
            stored += 2 * self.kv_heads * 4  # A float32 scale per token and head.
        if self.table == "write_pages":
            return sum(self.query_lens) * (stored + 2 * self.kv_heads * self.head_dim * 2)
        shared = self.prefix * (len(self.seq_lens) - 1)
        return (sum(self.seq_lens) - shared) * stored


def count_pairs(query_len: int, seq_len: int, causal: bool) -> int:
    """Pairs of a query and a key that the mask keeps; the last query is aligned with the last key."""
    return query_len * seq_len - (query_len * (query_len - 1) // 2 if causal else 0)


def short(length: int) -> str:
    """1024 -> 1k."""
    return f"{length // 1024}k" if length % 1024 == 0 else str(length)


def _prefill() -> Iterable[Row]:
    for head_dim in (64, 128, 256):
        for causal in (False, True):
            for length in (1024, 4096, 16384):
                lens, heads = (length,) * (16384 // length), 2048 // head_dim
                label = f"D {head_dim}, {'causal' if causal else 'not causal'}, {short(length)}"
                yield Row("prefill", label, lens, lens, heads, heads, head_dim, causal, quick=causal and length == 4096)
    for length in (8192, 32768):
        yield Row("prefill", f"GQA 32/8, D 128, causal, {short(length)}", (length,), (length,))


def _paged() -> Iterable[Row]:
    for page_size in (16, 64, 256):
        for label, new, cached in (("8k new", 8192, 0), ("32k new", 32768, 0), ("2k new on 30k cached", 2048, 30720)):
            quick = page_size == 16 and new != 32768
            yield Row("paged", f"{label}, page {page_size}", (new,), (new + cached,), page_size=page_size, quick=quick)


DECODE_LENGTHS: dict[str, tuple[int, ...]] = {
    **{
        f"{batch} x {short(context)}": (context,) * batch
        for batch, contexts in ((1, (1024, 8192, 32768)), (8, (1024, 8192)), (32, (1024, 8192)), (128, (1024, 8192)))
        for context in contexts
    },
    "63 x 512 and 1 x 65,536": (512,) * 63 + (65536,),
    "64 sequences of 200 to 2,531": tuple(200 + 37 * i for i in range(64)),
    "7 x 64 and 1 x 32,768": (64,) * 7 + (32768,),
}
"""Context lengths of the decode rows by label."""
QUICK_DECODE = ("1 x 8k", "8 x 8k", "32 x 8k", "63 x 512 and 1 x 65,536")


def _decode() -> Iterable[Row]:
    for label, lens in DECODE_LENGTHS.items():
        yield Row("decode", label, (1,) * len(lens), lens, page_size=16, quick=label in QUICK_DECODE)
    for kv_dtype in ("fp8", "int8"):
        for batch in (8, 32):
            lens, label = (8192,) * batch, f"{batch} x 8k, {kv_dtype.upper()} pages"
            quick = batch == 32 and kv_dtype == "fp8"
            yield Row("decode", label, (1,) * batch, lens, page_size=16, kv_dtype=kv_dtype, quick=quick)


def _verify() -> Iterable[Row]:
    for new in (4, 16):
        for batch, context in ((1, 8192), (8, 8192), (32, 1024), (32, 8192)):
            label = f"{new} new tokens, {batch} x {short(context)}"
            quick = new == 4 and batch == 32 and context == 8192
            yield Row("verify", label, (new,) * batch, (context,) * batch, page_size=16, quick=quick)


def _write_pages() -> Iterable[Row]:
    for kv_dtype in ("bfloat16", "fp8", "int8"):
        for tokens in (1, 32, 256, 8192):
            dtype = "BF16" if kv_dtype == "bfloat16" else kv_dtype.upper()
            label = f"{tokens:,} token{'s' * (tokens > 1)}, {dtype} pages"
            quick = tokens == 256 and kv_dtype == "bfloat16"
            lens = (tokens,)
            yield Row("write_pages", label, lens, lens, page_size=16, kv_dtype=kv_dtype, quick=quick)


def _backward() -> Iterable[Row]:
    for head_dim in (64, 128):
        for length in (1024, 4096, 16384):
            lens, heads = (length,) * (16384 // length), 2048 // head_dim
            label = f"D {head_dim}, {short(length)}"
            yield Row("backward", label, lens, lens, heads, heads, head_dim, quick=length == 4096)


def _shared_prefix() -> Iterable[Row]:
    lens, label = (8192 + 256,) * 64, "64 sequences, 8k common prefix, 256 private tokens"
    yield Row("shared_prefix", label, (1,) * 64, lens, page_size=16, prefix=8192, quick=True)


def all_rows(tables: Iterable[str] = TITLES, quick: bool = False) -> list[Row]:
    """The rows of some tables, in order; of a quick run only."""
    makers = (_prefill, _paged, _decode, _verify, _write_pages, _backward, _shared_prefix)
    rows = [row for maker in makers for row in maker()]
    return [row for row in rows if row.table in set(tables) and (row.quick or not quick)]


def rate(table: str, row: dict[str, Any], us: float) -> float:
    """TFLOP/s or TB/s of a call of ``us`` microseconds."""
    return row["flops" if table in FLOPS_TABLES else "bytes"] / us / 1e6


def markdown(report: dict[str, Any]) -> str:
    """The whole report: where it was measured, the card's ceilings and every table."""
    lines = ["# Kernels beside their peers", ""]
    lines += [
        f"{report['device']}, {', '.join(f'{k} {v}' for k, v in report['versions'].items())}, {report['date']}; "
        f"BF16 random data, medians. `{report['command']}`, {report['seconds']:.0f} s"
        + ("." if report.get("finished") else ", cut short: some tables are missing."),
        "",
    ]
    if report["ceilings"]:
        lines += ["The card in the same run: " + "; ".join(_ceilings(report["ceilings"])) + ".", ""]
    if report["skipped"]:
        lines += ["Peers left out: " + "; ".join(f"{k}: {v}" for k, v in report["skipped"].items()) + ".", ""]
    for name in report["tables"]:
        lines += [table(report, name), ""]
    return "\n".join(lines)


CEILINGS = {
    "copy": ("copy", "TB/s, read and written"),
    "read": ("read", "TB/s"),
    "matmul": ("8192³ BF16 matmul", "TFLOP/s"),
}


def _ceilings(ceilings: dict[str, Any]) -> Iterable[str]:
    for name, (words, unit) in CEILINGS.items():
        value = ceilings.get(name)
        if isinstance(value, dict):
            yield f"{words} failed: {value['failed']}"
        elif value is not None:
            yield f"{words} {value:.2f} {unit}" if value < 100 else f"{words} {value:.0f} {unit}"


def table(report: dict[str, Any], name: str) -> str:
    """One table as Markdown: its columns, ours over the best peer, and the fraction of the card's own rate."""
    rows = report["tables"][name]
    columns = list(dict.fromkeys(column for row in rows for column in row["cells"]))
    lead = next((c for c in (OURS, PORTABLE) if c in columns), None)
    ceiling = report["ceilings"].get("matmul" if name in FLOPS_TABLES else "copy")
    extra = [] if name == "shared_prefix" else ["over the best peer", f"of the {_rate_name(name)} rate"]
    if name == "paged":
        extra.append("of our dense rate")
    if name == "decode":
        extra.append("times faster than BF16 pages")
    if name == "shared_prefix":
        extra.append("times faster than without sharing")
    lines = [f"## {TITLES[name]}", "", "| | " + " | ".join([*columns, *extra]) + " |"]
    lines.append("|---" * (len(columns) + len(extra) + 1) + "|")
    bf16 = {tuple(row["seq_lens"]): _us(row, lead) for row in rows if row["kv_dtype"] == "bfloat16"}
    for row in rows:
        cells = [format_cell(name, row, row["cells"].get(column)) for column in columns]
        ours = _us(row, lead)
        if name == "shared_prefix":
            cells.append(_ratio(_us(row, NOT_SHARED), ours))
        else:
            peers = [us for c in PEERS if (us := _us(row, c)) is not None]
            cells.append(_ratio(min(peers, default=None), ours))
            known = ours is not None and isinstance(ceiling, float)
            cells.append(f"{rate(name, row, ours) / ceiling:.0%}" if known else "")
        if name == "paged":
            dense = _us(row, DENSE)
            cells.append(f"{dense / ours:.0%}" if dense and ours else "")
        if name == "decode":
            quantised = row["kv_dtype"] != "bfloat16"
            cells.append(_ratio(bf16.get(tuple(row["seq_lens"])), ours) if quantised else "")
        lines.append(f"| {row['label']} | " + " | ".join(cells) + " |")
    if name in FOOTNOTES:
        lines += ["", FOOTNOTES[name]]
    return "\n".join(lines)


def _rate_name(table_name: str) -> str:
    return "matmul" if table_name in FLOPS_TABLES else "copy"


def _us(row: dict[str, Any], column: str | None) -> float | None:
    """The column's microseconds, None where it has none."""
    return row["cells"].get(column, {}).get("us") if column else None


def _ratio(us: float | None, ours: float | None) -> str:
    return f"{us / ours:.2f}" if us and ours else ""


def format_cell(table_name: str, row: dict[str, Any], cell: dict[str, Any] | None) -> str:
    """A cell's text: TFLOP/s, or microseconds and TB/s; why it failed; nothing where nothing was measured."""
    if cell is None:
        return ""
    if "failed" in cell:
        return f"failed: {cell['failed']}".replace("|", "/").replace("\n", " ")
    us = cell["us"]
    if table_name in FLOPS_TABLES:
        return f"{rate(table_name, row, us):.0f}"
    shown = f"{us:.1f} us" if us < 100 else f"{us:.0f} us"
    return shown if table_name == "shared_prefix" else f"{shown}, {rate(table_name, row, us):.2f}"


def draw(report: dict[str, Any], stem: Path) -> list[Path]:
    """Plots as ``<stem>_prefill.png`` (TFLOP/s over length) and ``<stem>_decode.png`` (TB/s over batch x context).

    Returns:
        The files written: those whose table the report has.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('eval.bench_kernels draws with matplotlib: pip install "hf-paged[eval]".') from error
    written = []
    for name, fill in (("prefill", _draw_prefill), ("decode", _draw_decode)):
        rows = [row for row in report["tables"].get(name, []) if row["cells"] and row["kv_dtype"] == "bfloat16"]
        if not rows:
            continue
        figure = Figure(figsize=(12, 7 if name == "prefill" else 5.5), dpi=100, layout="constrained")
        FigureCanvasAgg(figure)
        fill(figure, rows, report["ceilings"])
        versions = ", ".join(f"{k} {v}" for k, v in report["versions"].items())
        figure.suptitle(f"{report['device']}: {versions}, {report['date']}", fontsize=10)
        path = stem.with_name(f"{stem.name}_{name}.png")
        figure.savefig(path)
        written.append(path)
    return written


COLORS = {
    OURS: "#c0392b", PORTABLE: "#e59866", PLAN_INSIDE: "#f1948a", SDPA_FLASH: "#7f8c8d", CUDNN: "#27ae60",
    FA2: "#5d6d7e", FA3: "#2980b9", FA4: "#1b4f72", FLASHINFER: "#8e44ad", FLEX: "#b7950b",
}  # fmt: skip


DOTTED = {"matmul": "an 8192\u00b3 BF16 matmul", "copy": "a copy, read and written"}
"""What the dotted lines are: figures of one PyTorch call, which a kernel can exceed, and no bounds."""


def _draw_prefill(figure: Any, rows: list[dict[str, Any]], ceilings: dict[str, Any]) -> None:
    """A panel per head dim and mask, a line per column."""
    panels: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if row["group"] == 1:
            panels.setdefault(f"D {row['head_dim']}, {'causal' if row['causal'] else 'not causal'}", []).append(row)
    if not panels:
        panels = {"GQA 32/8, D 128, causal": rows}
    columns = min(3, len(panels))
    grid = figure.subplots(-(-len(panels) // columns), columns, sharey=True, squeeze=False)
    # The masks below one another.
    order = sorted(panels, key=lambda title: "not causal" in title)
    for axes, title in zip(grid.flat, order):
        _lines(axes, "prefill", panels[title], [short(row["seq_lens"][0]) for row in panels[title]], ceilings)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("tokens a sequence")
    for row in grid:
        row[0].set_ylabel("TFLOP/s")
    # Panels share the axis: the largest of all must fit.
    highest = max(max(y for y in line.get_ydata() if y == y) for axes in grid.flat for line in axes.lines)
    grid[0][0].set_ylim(0, 1.05 * highest)
    lines = {line.get_label(): line for axes in grid.flat for line in axes.lines}
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=len(lines), fontsize=8)


def _draw_decode(figure: Any, rows: list[dict[str, Any]], ceilings: dict[str, Any]) -> None:
    axes = figure.subplots()
    _lines(axes, "decode", rows, [row["label"] for row in rows], ceilings)
    axes.set_ylabel("TB/s of keys and values read")
    axes.set_title("Decode: batch x context", fontsize=10)
    axes.set_xticks(axes.get_xticks(), [label.get_text() for label in axes.get_xticklabels()], rotation=25, ha="right")
    axes.legend(fontsize=8)


def _lines(axes: Any, name: str, rows: list[dict[str, Any]], labels: list[str], ceilings: dict[str, Any]) -> None:
    """Every column over the rows; what was not measured is a gap."""
    for column in dict.fromkeys(column for row in rows for column in row["cells"]):
        times = [_us(row, column) for row in rows]
        rates = [float("nan") if us is None else rate(name, row, us) for row, us in zip(rows, times)]
        if any(us is not None for us in times):
            axes.plot(range(len(rows)), rates, marker="o", label=column, color=COLORS.get(column))
    ceiling = ceilings.get(_rate_name(name))
    if isinstance(ceiling, float):
        label = f"measured beside: {DOTTED[_rate_name(name)]}"
        axes.axhline(ceiling, color="black", linewidth=0.8, linestyle=":", label=label)
    axes.set_xticks(range(len(rows)), labels, fontsize=8)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
