"""The engine's own cost, and its throughput beside its peers, in one run on one machine.

    python -m eval.bench_engine --output eval/results/bench_engine_cpu.json

Two measurements:

* host: milliseconds of a decode step without a model (a stub gives the logits), at 256 and 2,000 running requests,
  greedy and sampled: what the engine's own bookkeeping costs.
* throughput: 64 requests of 16 to 512 prompt tokens and 16 to 256 new tokens (seed 0, no eos, greedy), useful new
  tokens a second: the engine, one padded `generate()` batch, and transformers' `generate_batch` with sdpa. Each
  contestant has one warm-up with two short requests; all have the same weights, and give the same tokens where their
  arithmetic agrees.

Writes the table as Markdown beside the JSON. With ``--gpu``: what :mod:`eval.engine_bench.gpu` measures; ``--plots``:
its plots from its JSON.
"""

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm import tqdm
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast

import hf_paged
from eval import command_line
from eval.engine_bench import gpu as bench_engine_gpu
from eval.engine_bench import plots as bench_engine_plots

NUM_REQUESTS = 64
PROMPT_LENGTHS = (16, 512)
NEW_TOKENS = (16, 256)
HOST_SIZES = (256, 2000)
HOST_VOCABULARY = 32
RESULT_TIMEOUT_S = 900


class StubLlama(LlamaForCausalLM):
    """No layers run: the logits are the same at every call."""

    def forward(  # type: ignore[override]
        self, input_ids: torch.Tensor, logits_to_keep: torch.Tensor | int = 0, **kwargs: Any
    ) -> CausalLMOutputWithPast:
        """As the model it stands for."""
        count = logits_to_keep.numel() if isinstance(logits_to_keep, torch.Tensor) else input_ids.numel()
        if not hasattr(self, "stub_logits") or self.stub_logits.shape[1] < count:
            self.stub_logits = torch.randn(1, count, self.config.vocab_size)
        return CausalLMOutputWithPast(logits=self.stub_logits[:, :count])  # type: ignore[arg-type]


def host_cost(num_running: int, do_sample: bool, steps: int = 300) -> dict[str, Any]:
    """Milliseconds of a decode step without a model: median, 90th percentile and mean over ``steps`` steps."""
    config = LlamaConfig(
        vocab_size=HOST_VOCABULARY, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=1,
        max_position_embeddings=4096, eos_token_id=None,
    )  # fmt: skip
    options = hf_paged.EngineConfig(
        max_num_seqs=num_running, max_batch_tokens=max(4096, num_running), num_pages=64 * num_running, self_check=False
    )
    prompts = torch.randint(0, HOST_VOCABULARY, (num_running, 24), generator=torch.Generator().manual_seed(0)).tolist()
    sampled = dict(do_sample=True, temperature=0.8, top_p=0.95) if do_sample else dict(do_sample=False)
    generation = GenerationConfig(max_new_tokens=2 * steps, pad_token_id=0, **sampled)
    times = []
    with hf_paged.Engine(StubLlama(config).eval(), options, background=False) as engine:
        handles = [engine.submit(prompt, generation_config=generation) for prompt in prompts]
        while engine.stats().running < num_running:
            engine.step()
        for _ in range(20):
            engine.step()
        for _ in range(steps):
            started = time.perf_counter()
            engine.step()
            times.append((time.perf_counter() - started) * 1e3)
        for handle in handles:
            handle.cancel()
    return {
        "running": num_running, "sampling": "top_p 0.95" if do_sample else "greedy", "steps": steps,
        "median_ms": statistics.median(times), "p90_ms": statistics.quantiles(times, n=10)[-1],
        "mean_ms": statistics.fmean(times),
    }  # fmt: skip


def build(size: str) -> LlamaForCausalLM:
    """A Llama with random float32 weights: "small" has 17 million parameters, "tiny" 1 million."""
    hidden, layers = {"tiny": (128, 4), "small": (384, 6)}[size]
    config = LlamaConfig(
        vocab_size=8192 if size == "small" else 1024, hidden_size=hidden, intermediate_size=4 * hidden,
        num_hidden_layers=layers, num_attention_heads=hidden // 64, num_key_value_heads=max(1, hidden // 128),
        head_dim=64, max_position_embeddings=1024, pad_token_id=0, bos_token_id=1, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM._from_config(config, attn_implementation="sdpa", dtype=torch.float32).eval()
    model.generation_config = GenerationConfig(pad_token_id=0, bos_token_id=1, do_sample=False)
    return model


def draw_requests(vocabulary: int, seed: int = 0) -> tuple[list[list[int]], list[int]]:
    """Prompts and new tokens of :data:`NUM_REQUESTS` requests."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda low, high: torch.randint(low, high + 1, (NUM_REQUESTS,), generator=generator).tolist()  # noqa: E731
    prompts = [torch.randint(2, vocabulary, (n,), generator=generator).tolist() for n in draw(*PROMPT_LENGTHS)]
    return prompts, draw(*NEW_TOKENS)


def run_engine(model: LlamaForCausalLM, prompts: list[list[int]], new: list[int]) -> list[list[int]]:
    """All requests through the engine."""
    configs = [GenerationConfig(max_new_tokens=n, do_sample=False, pad_token_id=0) for n in new]
    options = hf_paged.EngineConfig(max_num_seqs=NUM_REQUESTS, prefix_caching=False)
    with hf_paged.Engine(model, options) as engine:
        return [output.token_ids for output in engine.generate(prompts, generation_config=configs)]


def run_padded(model: LlamaForCausalLM, prompts: list[list[int]], new: list[int]) -> list[list[int]]:
    """One left-padded batch: everybody waits for the longest prompt and the most new tokens."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    config = GenerationConfig(max_new_tokens=max(new), do_sample=False, pad_token_id=0)
    out = model.generate(ids, attention_mask=mask, generation_config=config)
    return [row[width : width + count].tolist() for row, count in zip(out, new)]


def run_generate_batch(model: LlamaForCausalLM, prompts: list[list[int]], new: list[int]) -> list[list[int]]:
    """transformers' own continuous batching with sdpa, each request with its own number of new tokens."""
    config = GenerationConfig(max_new_tokens=max(new), do_sample=False, pad_token_id=0, eos_token_id=-1)
    manager = model.init_continuous_batching(generation_config=config)
    manager.start()
    try:
        ids = [manager.add_request(p, max_new_tokens=count, eos_token_id=-1) for p, count in zip(prompts, new)]
        results: dict[str, list[int]] = {}
        while len(results) < len(ids):
            result = manager.get_result(timeout=RESULT_TIMEOUT_S)
            if result is None:
                raise RuntimeError(f"generate_batch gave {len(results)} of {len(ids)} results and stopped")
            if result.is_finished():
                if result.error is not None:
                    raise RuntimeError(f"generate_batch failed: {result.error}")
                results[result.request_id] = list(result.generated_tokens)
    finally:
        manager.stop(block=True)
    return [results[request_id] for request_id in ids]


def throughput(model: LlamaForCausalLM, repeats: int) -> list[dict[str, Any]]:
    """Useful new tokens a second of each contestant, best of ``repeats``."""
    prompts, new = draw_requests(model.config.vocab_size)
    contestants: dict[str, Callable[..., list[list[int]]]] = {
        "hf_paged engine": run_engine, "generate(), one padded batch": run_padded,
        "generate_batch, sdpa": run_generate_batch,
    }  # fmt: skip
    rows, reference = [], None
    for name, run in tqdm(contestants.items(), desc="throughput"):
        run(model, [prompt[:8] for prompt in prompts[:2]], [4, 4])
        seconds = []
        for _ in range(repeats):
            started = time.perf_counter()
            tokens = run(model, prompts, new)
            seconds.append(time.perf_counter() - started)
        reference = tokens if reference is None else reference
        same = sum(a == b for a, b in zip(tokens, reference))
        rows.append(
            {"name": name, "seconds": min(seconds), "new_tokens": sum(new), "tokens_per_s": sum(new) / min(seconds),
             "given_tokens": sum(map(len, tokens)), "requests_with_the_engine's_tokens": same}
        )  # fmt: skip
    return rows


def markdown(report: dict[str, Any]) -> str:
    """The report as tables."""
    lines = [
        f"# Engine benchmark\n\n{report['machine']}, {report['threads']} threads, torch {report['torch']}, "
        f"transformers {report['transformers']}, hf_paged {report['hf_paged']}, {report['date']}; written by "
        f"`python -m eval.bench_engine`.\n",
        "## Host cost of a decode step, no model\n\nSampled rows include the arithmetic of sampling on the logits "
        f"(vocabulary {HOST_VOCABULARY}), which runs on the CPU here and on the device elsewhere.\n",
        "| running requests | tokens by | median ms | p90 ms | mean ms |\n|---|---|---|---|---|",
    ]
    for row in report["host"]:
        lines.append(
            f"| {row['running']:,} | {row['sampling']} | {row['median_ms']:.3f} | {row['p90_ms']:.3f} | "
            f"{row['mean_ms']:.3f} |"
        )
    if report["throughput"]:
        base = report["throughput"][0]["tokens_per_s"]
        lines.append(
            f"\n## Throughput\n\n{NUM_REQUESTS} requests of {PROMPT_LENGTHS[0]} to {PROMPT_LENGTHS[1]} prompt and "
            f"{NEW_TOKENS[0]} to {NEW_TOKENS[1]} new tokens, a Llama of {report['parameters'] / 1e6:.1f}M parameters, "
            f"float32, greedy.\n"
        )
        lines.append(
            "| | seconds | useful new tokens/s | the engine is faster by | same tokens |\n|---|---|---|---|---|"
        )
        for row in report["throughput"]:
            lines.append(
                f"| {row['name']} | {row['seconds']:.1f} | {row['tokens_per_s']:.0f} | "
                f"{base / row['tokens_per_s']:.2f}x | {row[SAME]} of {NUM_REQUESTS} |"
            )
    return "\n".join(lines) + "\n"


SAME = "requests_with_the_engine's_tokens"


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = command_line.make_parser("bench_engine", __doc__)
    parser.add_argument(
        "--output", type=command_line.output_file,
        help="JSON file (default: eval/results/bench_engine_cpu.json, with --gpu bench_engine_gpu.json)",
    )  # fmt: skip
    parser.add_argument("--gpu", action="store_true", help="models in their real shapes on a GPU, beside peers")
    parser.add_argument("--plots", type=command_line.input_file, metavar="JSON", help="draw the PNG of a --gpu run")
    bench_engine_gpu.add_arguments(parser)
    parser.add_argument("--model", choices=("tiny", "small"), default="small", help="without --gpu: size of the model")
    parser.add_argument("--repeats", type=command_line.positive_int, default=1, help="without --gpu: runs")
    parser.add_argument("--only", choices=("host", "throughput"), help="without --gpu: one of the two tables")
    argv = sys.argv[1:] if argv is None else argv
    options = parser.parse_args(argv)
    transformers.utils.logging.set_verbosity_error()
    if options.plots:
        bench_engine_plots.draw(
            command_line.read_report(options.plots, "models", "eval.bench_engine --gpu"),
            options.output or options.plots.with_suffix(".png"),
        )
        return
    if options.gpu:
        bench_engine_gpu.main(options, argv)
        return
    options.output = options.output or Path("eval/results/bench_engine_cpu.json")
    model = build(options.model)
    host = [host_cost(size, sample) for size in HOST_SIZES for sample in (False, True)]
    report = {
        "date": date.today().isoformat(), "machine": f"{platform.machine()} CPU, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(), "torch": torch.__version__, "transformers": transformers.__version__,
        "hf_paged": hf_paged.__version__, "parameters": model.num_parameters(),
        "host": host if options.only != "throughput" else [],
        "throughput": throughput(model, options.repeats) if options.only != "host" else [],
    }  # fmt: skip
    options.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    options.output.with_suffix(".md").write_text(markdown(report), encoding="utf-8")
    print(markdown(report))


if __name__ == "__main__":
    command_line.run(main)
