"""Peak memory and time of a prefill over its length, by attention implementation.

    python -m eval.prefill_memory --output eval/results/prefill_memory.json

The model has the shape of Llama-3-8B's attention (32 query heads, 8 key/value heads of 128) in a few layers with random
weights: right for memory and speed. What is reported is the peak above the weights, so anything quadratic in the
length shows. Also writes the table as Markdown beside the JSON.
"""

import json
import platform
import time
from datetime import date
from typing import Any

import torch
import transformers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

import hf_paged
from eval import command_line
from eval.loading import check_attention, with_cache

LENGTHS = (2048, 4096, 8192, 16384, 32768)


def build(num_layers: int, attn_implementation: str, device: str) -> LlamaForCausalLM:
    """A Llama with Llama-3-8B's attention shape, few layers and a small MLP and vocabulary, random bfloat16 weights."""
    config = LlamaConfig(
        vocab_size=1024, hidden_size=4096, intermediate_size=4096, num_hidden_layers=num_layers,
        num_attention_heads=32, num_key_value_heads=8, head_dim=128, max_position_embeddings=max(LENGTHS) + 8,
    )  # fmt: skip
    with torch.device(device):
        model = LlamaForCausalLM._from_config(config, attn_implementation=attn_implementation, dtype=torch.bfloat16)
    return model.eval()


@torch.inference_mode()
def measure(model: LlamaForCausalLM, length: int) -> dict[str, float]:
    """Peak bytes above the weights, milliseconds (median of 3 after a warm-up) and K/V bytes of one prefill."""
    device = model.device
    ids = torch.randint(0, 1024, (1, length), device=device)
    paged = model.config._attn_implementation == "paged_flash"
    times, peak = [], 0.0
    for _ in range(4):
        cache = hf_paged.PagedCache(model.config) if paged else transformers.DynamicCache(config=model.config)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        started = time.perf_counter()
        model(ids, **with_cache(model, cache), logits_to_keep=1)
        torch.cuda.synchronize()
        times.append((time.perf_counter() - started) * 1e3)
        peak = float(torch.cuda.max_memory_allocated() - before)
        if isinstance(cache, hf_paged.PagedCache):
            # Pages are mapped by the driver, outside of PyTorch's accounting.
            peak += sum(group.committed_bytes for group in cache.memory())
        del cache
    return {"peak_bytes": peak, "ms": sorted(times[1:])[1]}


def run(implementations: list[str], lengths: list[int], num_layers: int) -> dict[str, Any]:
    """Measure every pair; an implementation that runs out of memory is recorded as such."""
    rows: list[dict[str, Any]] = []
    for name in implementations:
        model = build(num_layers, name, "cuda")
        for length in tqdm(lengths, desc=name):
            try:
                result: dict[str, Any] = measure(model, length)
            except torch.cuda.OutOfMemoryError:
                result = {"peak_bytes": None, "ms": None}
            torch.cuda.empty_cache()
            rows.append({"attn_implementation": name, "tokens": length, **result})
        del model
        torch.cuda.empty_cache()
    return {
        "what": "one prefill of a Llama with 32/8 heads of 128, hidden size 4096, bfloat16, batch 1",
        "layers": num_layers,
        "device": torch.cuda.get_device_name(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__,
                     "hf_paged": hf_paged.__version__, "python": platform.python_version()},
        "date": date.today().isoformat(),
        "command": "python -m eval.prefill_memory",
        "rows": rows,
    }  # fmt: skip


def table(report: dict[str, Any]) -> str:
    """The report as Markdown: MiB above the weights and milliseconds, a column per implementation."""
    names = list(dict.fromkeys(row["attn_implementation"] for row in report["rows"]))
    cells = {(row["attn_implementation"], row["tokens"]): row for row in report["rows"]}
    lines = [
        "# Peak memory and time of a prefill",
        "",
        f"{report['what']}, {report['layers']} layers. {report['device']}, "
        + ", ".join(f"{k} {v}" for k, v in report["versions"].items())
        + f", {report['date']}. `{report['command']}`",
        "",
        "MiB above the weights (K/V cache included) / milliseconds; -: out of memory.",
        "",
        "| tokens | " + " | ".join(names) + " |",
        "|---" * (len(names) + 1) + "|",
    ]
    for tokens in sorted({row["tokens"] for row in report["rows"]}):
        shown = []
        for name in names:
            row = cells[name, tokens]
            shown.append("-" if row["ms"] is None else f"{row['peak_bytes'] / 2**20:,.0f} / {row['ms']:,.1f}")
        lines.append(f"| {tokens:,} | " + " | ".join(shown) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Command line."""
    parser = command_line.make_parser("prefill_memory", __doc__)
    parser.add_argument("--attn", nargs="+", default=["paged_flash", "sdpa", "eager"], help="implementations")
    parser.add_argument("--lengths", nargs="+", type=command_line.positive_int, default=list(LENGTHS), help="tokens")
    parser.add_argument("--layers", type=command_line.positive_int, default=2, help="of the model")
    parser.add_argument("--output", type=command_line.output_file, help="JSON file; the Markdown table goes beside it")
    arguments = parser.parse_args()
    for name in arguments.attn:
        check_attention(name)
    if not torch.cuda.is_available():
        raise SystemExit("eval.prefill_memory measures GPU memory: it needs a CUDA GPU.")
    report = run(arguments.attn, arguments.lengths, arguments.layers)
    print(table(report))
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(report, indent=1) + "\n")
        arguments.output.with_suffix(".md").write_text(table(report))


if __name__ == "__main__":
    command_line.run(main)
