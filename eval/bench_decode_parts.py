"""What a decode step does beside attention, each part in a CUDA graph: its linear layers, and the choice of tokens.

    python -m eval.bench_decode_parts --output eval/results/decode_parts_h200.json

* linear: every matmul of a step in the order of the model, head included, with norms, gated activation and residuals:
  as fused modules run them, beside ``F.linear`` with our kernels between, ``F.linear`` with PyTorch's kernels between,
  and ``F.linear`` with nothing between. Weights fill more memory than the L2 cache holds and are used in turn.
* sampling: ``sample_tokens_op`` beside ``torch.max`` (greedy) and the eager warpers of ``sampling_reference``.

Microseconds, medians of graph replays. Bandwidth counts the weights, or the logits read once.
"""

import json
import platform
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
import triton
from hf_paged_kernels.layers.ops import gated_activation_op, rms_norm_op, rms_norm_parts_op
from hf_paged_kernels.linear.decode import (
    decode_gated_linear_op,
    decode_linear_op,
    decode_linear_settings,
    linear_parts_op,
    num_linear_parts,
)
from hf_paged_kernels.linear.skinny import skinny_gated_linear_op, skinny_linear_op
from hf_paged_kernels.linear.skinny_settings import MAX_TOKENS
from hf_paged_kernels.sampling.ops import sample_tokens_op
from hf_paged_kernels.sampling.reference import MARKS, sample_tokens_reference
from transformers.utils.logging import tqdm

from eval import command_line

EPS = 1e-6
BUFFER_BYTES = 2 * 2**30


@dataclass(frozen=True, slots=True)
class Shape:
    """A model's matmuls: hidden size, outputs of q, k and v, inputs of o, half of gate and up, vocabulary."""

    layers: int
    hidden: int
    qkv: int
    attention: int
    intermediate: int
    vocab: int

    @property
    def num_bytes(self) -> int:
        """Of the weights that a step reads, bfloat16."""
        layer = self.qkv + self.attention + 3 * self.intermediate
        return 2 * self.hidden * (self.layers * layer + self.vocab)


SHAPES = {
    "llama3-8b": Shape(32, 4096, 6144, 4096, 14_336, 128_256),
    "qwen3-0.6b": Shape(28, 1024, 4096, 2048, 3072, 151_936),
}
SETTINGS: dict[str, dict[str, float]] = {
    "greedy": {},
    "temperature 0.8": {"temperature": 0.8},
    "top_p 0.95": {"temperature": 0.8, "top_p": 0.95},
    "top_k 50": {"temperature": 0.8, "top_k": 50},
    "min_p 0.05": {"temperature": 0.8, "min_p": 0.05},
}
NEUTRAL = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}


class Step:
    """The linear layers of a decode step of one model, random weights."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        sizes = {
            "qkv": (shape.qkv, shape.hidden), "o": (shape.hidden, shape.attention),
            "gate_up": (2 * shape.intermediate, shape.hidden), "down": (shape.hidden, shape.intermediate),
        }  # fmt: skip
        layer_bytes = 2 * sum(rows * columns for rows, columns in sizes.values())
        count = min(shape.layers, BUFFER_BYTES // layer_bytes)
        self.layers = [{name: _weight(*size) for name, size in sizes.items()} for _ in range(count)]
        self.head = _weight(shape.vocab, shape.hidden)
        self.norm = torch.ones(shape.hidden, device="cuda", dtype=torch.bfloat16)

    def fused(self, h: torch.Tensor) -> torch.Tensor:
        """As a fused model runs them."""
        if len(h) > MAX_TOKENS:
            return self.batched(h)
        for i in range(self.shape.layers):
            layer = self.layers[i % len(self.layers)]
            q = skinny_linear_op(h, layer["qkv"], None, None, self.norm, EPS)[:, : self.shape.attention]
            h = skinny_linear_op(q, layer["o"], None, h, None, 0.0)
            gated = skinny_gated_linear_op(h, layer["gate_up"], None, self.norm, EPS)
            h = skinny_linear_op(gated, layer["down"], None, h, None, 0.0)
        return skinny_linear_op(h, self.head, None, None, self.norm, EPS)

    def batched(self, h: torch.Tensor, cublas_only: bool = False) -> torch.Tensor:
        """As a fused model runs them for more than a few tokens; with every matmul from cuBLAS if asked."""
        normed, total = rms_norm_op(h, self.norm, EPS, 0.0, True, None)[0], h
        for i in range(self.shape.layers):
            layer = self.layers[i % len(self.layers)]
            q = F.linear(normed, layer["qkv"]) if cublas_only else decode_linear_op(normed, layer["qkv"], None)
            normed, total = self._add(q[:, : self.shape.attention], layer["o"], total, cublas_only)
            if cublas_only or decode_linear_settings(normed, layer["gate_up"], gated=True) is None:
                gated = gated_activation_op(F.linear(normed, layer["gate_up"]), "silu", "gate_up")
            else:
                gated = decode_gated_linear_op(normed, layer["gate_up"], None)
            normed, total = self._add(gated, layer["down"], total, cublas_only)
        return F.linear(normed, self.head)

    def _add(
        self, x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor, cublas_only: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The norm of ``x W^T + residual``, and that sum."""
        num_parts = 0 if cublas_only else num_linear_parts(len(x), weight)
        if num_parts == 0:
            return rms_norm_op(F.linear(x, weight), self.norm, EPS, 0.0, True, residual)
        parts = linear_parts_op(x, weight, None, num_parts)
        return rms_norm_parts_op(parts, self.norm, EPS, 0.0, True, residual)

    def unfused(self, h: torch.Tensor) -> torch.Tensor:
        """With PyTorch's kernels, QKV and gate/up as one matmul."""
        for i in range(self.shape.layers):
            layer = self.layers[i % len(self.layers)]
            q = F.linear(self._normed(h), layer["qkv"])[:, : self.shape.attention]
            h = h + F.linear(q, layer["o"])
            gate, up = F.linear(self._normed(h), layer["gate_up"]).chunk(2, -1)
            h = h + F.linear(F.silu(gate) * up, layer["down"])
        return F.linear(self._normed(h), self.head)

    def bare(self, h: torch.Tensor) -> torch.Tensor:
        """The matmuls alone."""
        for i in range(self.shape.layers):
            layer = self.layers[i % len(self.layers)]
            h = F.linear(F.linear(h, layer["qkv"])[:, : self.shape.attention], layer["o"])
            h = F.linear(F.linear(h, layer["gate_up"])[:, : self.shape.intermediate], layer["down"])
        return F.linear(h, self.head)

    def _normed(self, h: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(h, (self.shape.hidden,), self.norm, EPS)


def _weight(rows: int, columns: int) -> torch.Tensor:
    return torch.empty(rows, columns, device="cuda", dtype=torch.bfloat16).normal_(0, columns**-0.5)


def replayed_us(call: Callable[[], Any], repeats: int = 12) -> float:
    """Median microseconds of a replay of ``call``."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream), torch.no_grad():
        call()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            kept = call()
        graph.replay()
        times = []
        for _ in range(repeats):
            started, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            started.record()
            graph.replay()
            ended.record()
            ended.synchronize()
            times.append(started.elapsed_time(ended) * 1e3)
    del kept
    return statistics.median(times)


def linear_rows(tokens: list[int]) -> list[dict[str, Any]]:
    """The linear layers of a step, for each model and number of tokens."""
    rows = []
    for name, shape in SHAPES.items():
        step = Step(shape)
        for num in tqdm(tokens, desc=f"linear layers, {name}"):
            h = torch.randn(num, shape.hidden, device="cuda").to(torch.bfloat16)
            with torch.no_grad():
                wanted, got = step.unfused(h).float(), step.fused(h).float()
            row: dict[str, Any] = {
                "model": name, "tokens": num, "roofline_us": shape.num_bytes / 4.3e6,
                "difference": float((got - wanted).norm() / wanted.norm()),
            }  # fmt: skip
            ways = {
                "fused": step.fused, "cublas": partial(step.batched, cublas_only=True), "unfused": step.unfused,
                "bare": step.bare,
            }  # fmt: skip
            for way, run in ways.items():
                row[f"{way}_us"] = replayed_us(partial(run, h))
            row["fused_tb_s"] = shape.num_bytes / row["fused_us"] / 1e6
            rows.append(row)
        torch.cuda.empty_cache()
    return rows


def sampling_rows(counts: list[int], vocab: int) -> list[dict[str, Any]]:
    """The choice of tokens from bfloat16 logits, whose spread is that of a model sure of some tens of tokens."""
    rows = []
    for count in tqdm(counts, desc="sampling"):
        logits = (3 * torch.randn(count, vocab, device="cuda")).to(torch.bfloat16)
        slots = torch.arange(count, device="cuda")
        row: dict[str, Any] = {"rows": count, "vocab": vocab, "max_us": replayed_us(partial(torch.max, logits, -1))}
        for name, options in SETTINGS.items():
            values = NEUTRAL | options
            dtypes = {"top_k": torch.int64}
            tables = [
                torch.full((count,), values[key], dtype=dtypes.get(key, torch.float64), device="cuda")
                for key in ("temperature", "top_k", "top_p", "min_p")
            ]
            zeros = torch.zeros(count, dtype=torch.int64, device="cuda")
            rules = torch.zeros(count, MARKS, dtype=torch.int64, device="cuda")
            arguments = (logits, slots, slots, *tables, slots, zeros, rules, None)
            got, wanted = sample_tokens_op(*arguments)[0], sample_tokens_reference(*arguments)[0]
            row[name] = {
                "us": replayed_us(partial(sample_tokens_op, *arguments)),
                "same_tokens": int((got == wanted).sum()),
            }
            started, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            started.record()
            sample_tokens_reference(*arguments)
            ended.record()
            ended.synchronize()
            row[name]["eager_us"] = started.elapsed_time(ended) * 1e3
        rows.append(row)
    return rows


def markdown(report: dict[str, Any]) -> str:
    """The report as tables."""
    lines = [
        f"# Parts of a decode step\n\n{report['device']}, python {report['python']}, torch {report['torch']}, triton "
        f"{report['triton']}, {report['date']}; bfloat16, CUDA graphs, medians. `python -m eval.bench_decode_parts`\n",
        "## All linear layers of a step, norms, activation, residuals and head included: us\n",
        "| model | tokens | fused | TB/s of weights | cuBLAS and our small kernels | PyTorch's kernels | "
        "their matmuls alone | weights at 4.3 TB/s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in report["linear"]:
        lines.append(
            f"| {row['model']} | {row['tokens']} | {row['fused_us']:,.0f} | {row['fused_tb_s']:.2f} | "
            f"{row['cublas_us']:,.0f} | {row['unfused_us']:,.0f} | {row['bare_us']:,.0f} | {row['roofline_us']:,.0f} |"
        )
    names = list(SETTINGS)
    lines += [
        "\n## Choice of tokens, vocabulary of "
        f"{report['sampling'][0]['vocab']:,}: us (tokens equal to the eager path; its us)\n",
        f"| rows | torch.max | {' | '.join(names)} |\n|---|---|{'---|' * len(names)}",
    ]
    for row in report["sampling"]:
        cells = [f"{row[n]['us']:.1f} ({row[n]['same_tokens']}; {row[n]['eager_us']:,.0f})" for n in names]
        lines.append(f"| {row['rows']} | {row['max_us']:.1f} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """The command line."""
    parser = command_line.make_parser("bench_decode_parts", __doc__)
    parser.add_argument(
        "--output", type=command_line.output_file, default="decode_parts.json",
        help="JSON file; a .md of the same name goes beside it",
    )  # fmt: skip
    parser.add_argument(
        "--tokens", type=command_line.positive_int, nargs="+", default=[1, 2, 4, 8, 16, 24, 64, 104, 188, 256],
        help="tokens of the linear layers",
    )  # fmt: skip
    parser.add_argument(
        "--rows", type=command_line.positive_int, nargs="+", default=[1, 8, 64, 256], help="rows of logits",
    )  # fmt: skip
    parser.add_argument("--vocab", type=command_line.positive_int, default=151_936, help="width of the logits")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("a CUDA GPU is needed.")
    report = {
        "device": torch.cuda.get_device_name(), "python": platform.python_version(), "torch": torch.__version__,
        "triton": triton.__version__, "date": date.today().isoformat(),
        "sampling": sampling_rows(options.rows, options.vocab), "linear": linear_rows(options.tokens),
    }  # fmt: skip
    options.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    options.output.with_suffix(".md").write_text(markdown(report), encoding="utf-8")
    print(markdown(report))


if __name__ == "__main__":
    command_line.run(main)
