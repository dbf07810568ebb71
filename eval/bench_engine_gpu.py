"""The engine on a GPU: models in their real shapes with random bfloat16 weights, decode graphs on and off.

    python -m eval.bench_engine --gpu --output eval/results/bench_engine_h200.json

Per model, and with graphs on and off:

* start: seconds from the weights on the card to a ready engine, and to capture every batch size.
* latency: one request of 128 prompt tokens, milliseconds a token in steady state.
* steady: 256 running requests of 128 prompt tokens, milliseconds of a decode step, greedy and sampled (top_p 0.95);
  beside the greedy one, the same graph replayed with nothing between the replays, just after: what the host adds.
* throughput: 256 requests at once, prompts and outputs of 100 to 1,024 tokens (Python's random, seed 0), greedy, no
  eos.

The roofline counts the bytes of the weights and of the keys and values at 4.3 TB/s, and the prompts' arithmetic at 700
TFLOP/s. A part that takes longer than its limit is cut, and the report says so.
"""

import contextlib
import gc
import json
import platform
import random
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
import triton
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

import hf_paged

BYTES_PER_S = 4.3e12
FLOPS_PER_S = 700e12
NUM_REQUESTS = 256
LENGTHS = (100, 1024)
MAX_MODEL_LEN = 2 * LENGTHS[1]
MAX_BATCH_TOKENS = 8192
LATENCY_PROMPT = 128
PAGE_SIZE = 16


def build(name: str) -> Any:
    """A model in its real shape, random weights on the GPU."""
    if name == "qwen3-0.6b":
        kind: Any = Qwen3ForCausalLM
        config: Any = Qwen3Config(
            vocab_size=151_936, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16,
            num_key_value_heads=8, head_dim=128, max_position_embeddings=40_960, rope_theta=1e6,
            tie_word_embeddings=True, rms_norm_eps=1e-6, eos_token_id=None, bos_token_id=None, pad_token_id=None,
        )  # fmt: skip
    elif name == "llama3-8b":
        kind = LlamaForCausalLM
        config = LlamaConfig(
            vocab_size=128_256, hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32,
            num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=8192, rope_theta=500_000.0,
            tie_word_embeddings=False, rms_norm_eps=1e-5, eos_token_id=None, bos_token_id=None, pad_token_id=None,
        )  # fmt: skip
    else:
        raise ValueError(f"unknown model {name!r}: qwen3-0.6b or llama3-8b.")
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = kind._from_config(config, attn_implementation="sdpa", dtype=torch.bfloat16).eval()
    model.generation_config = GenerationConfig(do_sample=False)
    return model


def draw_requests() -> tuple[list[list[int]], list[int]]:
    """Prompts and output lengths of the throughput run."""
    draw = random.Random(0)
    prompts = [[draw.randint(0, 10_000) for _ in range(draw.randint(*LENGTHS))] for _ in range(NUM_REQUESTS)]
    return prompts, [draw.randint(*LENGTHS) for _ in range(NUM_REQUESTS)]


def read_bytes(model: Any) -> tuple[int, int, int]:
    """Bytes of the weights that a step reads, of a token's keys and values, and parameters of a token's matmuls."""
    config = model.config
    embeddings = model.get_input_embeddings().weight
    matmul = model.num_parameters() - (0 if config.tie_word_embeddings else embeddings.numel())
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return matmul * 2, config.num_hidden_layers * config.num_key_value_heads * head_dim * 2 * 2, matmul


def roofline(model: Any, prompts: list[int], outputs: list[int]) -> float:
    """Seconds that requests of these lengths, all started together, need at the card's limits."""
    weights, per_token, matmul = read_bytes(model)
    head = model.config.vocab_size * model.config.hidden_size
    flops = 2 * (matmul - head) * sum(prompts)
    cached = sum(new * prompt + new * new // 2 for prompt, new in zip(prompts, outputs))
    return flops / FLOPS_PER_S + (weights * max(outputs) + per_token * cached) / BYTES_PER_S


def make_engine(model: Any, graphs: bool, num_seqs: int = NUM_REQUESTS) -> hf_paged.Engine:
    """An engine that whoever calls ``step`` drives."""
    options = hf_paged.EngineConfig(
        page_size=PAGE_SIZE, max_num_seqs=num_seqs, max_batch_tokens=MAX_BATCH_TOKENS, max_model_len=MAX_MODEL_LEN,
        prefix_caching=False, cuda_graphs=graphs,
    )  # fmt: skip
    return hf_paged.Engine(model, options, background=False)


def timed_steps(engine: hf_paged.Engine, steps: int, limit_s: float) -> tuple[float, int]:
    """Milliseconds of a step over ``steps`` steps, fewer if the limit is reached; and how many."""
    torch.cuda.synchronize()
    started = time.perf_counter()
    done = 0
    while done < steps and time.perf_counter() - started < limit_s:
        engine.step()
        done += 1
    torch.cuda.synchronize()
    return (time.perf_counter() - started) * 1e3 / max(done, 1), done


def config(new: int, **options: Any) -> GenerationConfig:
    """Generates exactly ``new`` tokens."""
    return GenerationConfig(max_new_tokens=new, pad_token_id=0, **({"do_sample": False} | options))


def latency(engine: hf_paged.Engine, limit_s: float, steps: int = 256) -> dict[str, Any]:
    """Milliseconds a token of one request."""
    handle = engine.submit(list(range(LATENCY_PROMPT)), generation_config=config(steps + 64))
    for _ in range(12):
        engine.step()
    ms, done = timed_steps(engine, steps, limit_s)
    handle.cancel()
    return {"ms_per_token": ms, "steps": done, "cut": done < steps}


def steady(engine: hf_paged.Engine, limit_s: float, sampled: bool, steps: int = 100) -> dict[str, Any]:
    """Milliseconds of a decode step of 256 requests."""
    how = dict(do_sample=True, top_p=0.95, top_k=0, temperature=0.8) if sampled else {}
    prompt = list(range(LATENCY_PROMPT))
    handles = [engine.submit(prompt, generation_config=config(steps + 400, **how)) for _ in range(NUM_REQUESTS)]
    deadline = time.perf_counter() + limit_s
    core = engine._core
    while core.slots.decoding.sum() < NUM_REQUESTS and time.perf_counter() < deadline:
        engine.step()
    for _ in range(12 if core.runner.graphs is not None else 2):
        engine.step()
    ms, done = timed_steps(engine, steps, max(1.0, deadline - time.perf_counter()))
    result: dict[str, Any] = {"step_ms": ms, "steps": done, "cut": done < steps}
    graphs = core.runner.graphs
    if graphs is not None and not sampled and not graphs.failure:
        started, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        slots = np.arange(NUM_REQUESTS)
        graphs.run(slots)
        started.record()
        for _ in range(20):
            graphs.run(slots)
        ended.record()
        torch.cuda.synchronize()
        result["replay_ms"] = started.elapsed_time(ended) / 20
        core.tables.stale[:] = True
    for handle in handles:
        handle.cancel()
    return result


def throughput(engine: hf_paged.Engine, limit_s: float) -> dict[str, Any]:
    """New tokens a second of the whole run, or of what fitted into the limit."""
    prompts, outputs = draw_requests()
    torch.cuda.synchronize()
    started = time.perf_counter()
    before = engine.stats()
    handles = [engine.submit(p, generation_config=config(n)) for p, n in zip(prompts, outputs)]
    while engine.step() and time.perf_counter() - started < limit_s:
        pass
    torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    after = engine.stats()
    tokens = after.new_tokens - before.new_tokens
    unfinished = sum(not handle.is_done for handle in handles)
    for handle in handles:
        handle.cancel()
    return {
        "seconds": seconds, "new_tokens": tokens, "tokens_per_s": tokens / seconds, "steps": after.steps - before.steps,
        "cut": unfinished > 0, "unfinished": unfinished, "preemptions": after.preemptions - before.preemptions,
    }  # fmt: skip


PARTS: dict[str, Callable[[hf_paged.Engine, float], dict[str, Any]]] = {
    "latency": latency,
    "throughput": throughput,
    "steady": lambda engine, limit_s: steady(engine, limit_s, sampled=False),
    "steady_sampled": lambda engine, limit_s: steady(engine, limit_s, sampled=True, steps=40),
}


def describe() -> dict[str, Any]:
    """The machine and the versions."""
    return {
        "date": date.today().isoformat(), "device": torch.cuda.get_device_name(), "python": platform.python_version(),
        "torch": torch.__version__, "triton": triton.__version__, "transformers": transformers.__version__,
        "hf_paged": hf_paged.__version__, "max_model_len": MAX_MODEL_LEN, "max_batch_tokens": MAX_BATCH_TOKENS,
        "page_size": PAGE_SIZE,
    }  # fmt: skip


def run(output: Path, models: list[str], parts: dict[bool, list[str]], limits_s: dict[bool, float]) -> dict[str, Any]:
    """These parts, with graphs (True) and without, each within its limit; the report is written after each."""
    report: dict[str, Any] = {**describe(), "models": {}}

    def write() -> None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        output.with_suffix(".md").write_text(markdown(report), encoding="utf-8")

    for name in models:
        model = build(name)
        prompts, outputs = draw_requests()
        weights, _, _ = read_bytes(model)
        entry: dict[str, Any] = {
            "parameters": model.num_parameters(),
            "roofline": {
                "ms_per_token": weights / BYTES_PER_S * 1e3,
                "tokens_per_s": sum(outputs) / roofline(model, [len(p) for p in prompts], outputs),
            },
        }
        report["models"][name] = entry
        for is_on in parts:
            results: dict[str, Any] = {}
            entry["graphs" if is_on else "eager"] = results
            torch.cuda.synchronize()
            started = time.perf_counter()
            engine = make_engine(model, is_on)
            torch.cuda.synchronize()
            results["start_s"] = time.perf_counter() - started
            with engine:
                if is_on:
                    started = time.perf_counter()
                    results["num_graphs"] = engine.warm_up()
                    torch.cuda.synchronize()
                    results["capture_s"] = time.perf_counter() - started
                    results["failure"] = engine._core.runner.graphs.failure  # type: ignore[union-attr]
                for part, measure in PARTS.items():
                    if part in parts[is_on]:
                        print(name, "graphs" if is_on else "eager", part, flush=True)
                        results[part] = measure(engine, limits_s[is_on])
                        print(results[part], flush=True)
                        while engine.step():
                            pass
                        write()
            del engine
            write()
        del model
        gc.collect()
        with contextlib.suppress(RuntimeError):
            torch.cuda.empty_cache()
    return report


def markdown(report: dict[str, Any]) -> str:
    """The report as a table."""
    lines = [
        f"# Engine on a GPU\n\n{report['device']}, python {report['python']}, torch {report['torch']}, triton "
        f"{report['triton']}, transformers {report['transformers']}, hf_paged {report['hf_paged']}, {report['date']}; "
        f"written by `python -m eval.bench_engine --gpu`. Random bfloat16 weights; (cut): stopped at the part's limit. "
        f"The replays come after the measured steps, at contexts about 60 tokens longer, so they may take longer.\n",
        "| model | decode | ready, s | graphs, s | batch 1, ms a token | roofline | 256 running, ms a step "
        "| replay alone, ms | sampled, ms | throughput, tokens/s | roofline |\n|" + "---|" * 11,
    ]
    for name, entry in report["models"].items():
        for kind in ("graphs", "eager"):
            if kind not in entry:
                continue
            row = entry[kind]

            def cell(part: str, key: str, form: str, row: dict[str, Any] = row) -> str:
                if part not in row or key not in row[part]:
                    return ""
                return format(row[part][key], form) + (" (cut)" if row[part].get("cut") else "")

            lines.append(
                f"| {name} | {kind} | {row.get('start_s', 0):.1f} | {row.get('capture_s', 0):.1f} | "
                f"{cell('latency', 'ms_per_token', '.2f')} | {entry['roofline']['ms_per_token']:.2f} | "
                f"{cell('steady', 'step_ms', '.2f')} | {cell('steady', 'replay_ms', '.2f')} | "
                f"{cell('steady_sampled', 'step_ms', '.2f')} | {cell('throughput', 'tokens_per_s', ',.0f')} | "
                f"{entry['roofline']['tokens_per_s']:,.0f} |"
            )
    return "\n".join(lines) + "\n"
