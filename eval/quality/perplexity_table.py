"""Perplexity runs as JSON and as a plain-text table."""

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from eval.quality.perplexity_result import PerplexityResult
from eval.quality.text_data import Documents

FEW_SCORED = 100
"""Tokens below which a report says that its figure says little."""


def document_figures(nll_sum: float, documents: Documents) -> dict[str, float | None]:
    """Word and byte level figures of the convention "lm-eval", from the sum of the nll over all documents in nats.

    The perplexity of words is None where it overflows: a script without spaces has whole texts for words.
    """
    per_word = nll_sum / documents.num_words
    return {
        "word_perplexity": math.exp(per_word) if per_word < MAX_EXPONENT else None,
        "byte_perplexity": math.exp(nll_sum / documents.num_bytes),
        "bits_per_byte": nll_sum / documents.num_bytes / math.log(2),
    }


MAX_EXPONENT = 709.0
"""exp of more overflows a float64."""


def last_word_figures(result: PerplexityResult, token_ids: Sequence[int]) -> dict[str, float]:
    """Perplexity of words and share of words that greedy decoding writes, of the convention "last-word"."""
    counts = [window.num_scored for window in result.windows]
    nll = [part.sum().item() for part in result.nll.split(counts)]
    assert result.top1 is not None
    is_hit = result.top1 == torch.as_tensor(token_ids)[result.positions]
    hits = [bool(part.all()) for part in is_hit.split(counts)]
    return {"last_word_perplexity": math.exp(sum(nll) / len(nll)), "last_word_accuracy": sum(hits) / len(hits)}


def report_row(
    result: PerplexityResult, reference: PerplexityResult, documents: Documents, token_ids: Sequence[int]
) -> dict[str, Any]:
    """One run as JSON: its figures, and its difference from the first run."""
    levels: dict[str, float | None] = {}
    if result.convention == "last-word":
        levels = last_word_figures(result, token_ids)
    if result.convention == "lm-eval":
        levels = document_figures(result.nll.sum().item(), documents)
    return {
        **levels,
        "attn": result.attn,
        "path": result.path,
        "kv_dtype": result.kv_dtype,
        "num_windows": len(result.windows),
        "num_scored": result.num_scored,
        "num_from_pages": result.num_from_pages,
        "mean_nll": result.mean_nll,
        # JSON has no infinity.
        "ppl": result.perplexity if math.isfinite(result.perplexity) else None,
        "seconds": result.seconds,
        "top1_agreement": result.top1_agreement(reference),
        "difference": asdict(result.paired_difference(reference)),
    }


def format_report(report: dict[str, Any]) -> str:
    """The plain-text table of what `main` returns."""
    first = report["reference"]
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    header = (
        f"{report['model']} on {report['data']}: {report['num_tokens']} tokens, convention {report['convention']}, "
        f"window {report['window']}, stride {report['stride']}\n"
        f"{report['dtype']} on {report['device']}, processes: {report['processes']}; "
        f"{versions}\n"
        f"differences in nats per token against {first['attn']} {first['path']}, standard error over windows\n"
    )
    titles = (
        "attn",
        "path",
        "cache",
        "windows",
        "scored",
        "ppl",
        "mean nll",
        "difference",
        "std error",
        "max |diff|",
        "seconds",
    )
    rows = [titles]
    for row in report["results"]:
        difference = row["difference"]
        error = difference["standard_error"]
        rows.append(
            (
                row["attn"],
                row["path"],
                row["kv_dtype"],
                str(row["num_windows"]),
                str(row["num_scored"]),
                "overflow" if row["ppl"] is None else f"{row['ppl']:.4f}",
                f"{row['mean_nll']:.6f}",
                f"{difference['mean']:+.2e}",
                "-" if error is None else f"{error:.1e}",
                f"{difference['max_abs']:.1e}",
                f"{row['seconds']:.1f}",
            )
        )
    widths = [max(len(cell) for cell in column) for column in zip(*rows)]
    lines = [
        # Names to the left, figures to the right.
        "  ".join(cell.ljust(width) if i < 3 else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths)))
        for row in rows
    ]
    for row in report["results"]:
        if "word_perplexity" in row:
            word = row["word_perplexity"]
            said = "left out (hardly any white space in the text)" if word is None else f"{word:.4f}"
            lines.append(
                f"{row['attn']} {row['path']} {row['kv_dtype']}: word perplexity {said}, byte "
                f"perplexity {row['byte_perplexity']:.4f}, bits per byte {row['bits_per_byte']:.4f}"
            )
        if "last_word_perplexity" in row:
            lines.append(
                f"{row['attn']} {row['path']} {row['kv_dtype']}: last word perplexity "
                f"{row['last_word_perplexity']:.4f}, accuracy {row['last_word_accuracy']:.4f}"
            )
    for row in report["results"]:
        if row["kv_dtype"] != "auto" and row["num_from_pages"] < row["num_scored"]:
            lines.append(
                f"{row['attn']} {row['path']} {row['kv_dtype']}: {row['num_from_pages']} of {row['num_scored']} scored "
                "tokens read quantised pages, the others stand in a window's first forward"
            )
    fewest = min(row["num_scored"] for row in report["results"])
    if fewest < FEW_SCORED:
        lines.append(f"only {fewest} tokens were scored: a perplexity of so few says little; pass a longer text")
    lines += [f"left out: {reason}" for reason in report["left_out"]]
    return header + "\n".join(line.rstrip() for line in lines)
