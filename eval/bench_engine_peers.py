"""Others on the same requests and the same weights: `generate()`, transformers' batching, vLLM where it is installed.

Each peer gets the requests of the part `throughput` at once and has a limit of seconds for them, its preparations
(graphs, compiling) not counted. A peer over its limit says so; "tokens_per_s" is then that of the tokens it gave by
then (of transformers' batching: those of requests that had ended).
"""

import argparse
import importlib.util
import inspect
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

from eval.engine_bench.models import draw_requests
from eval.engine_bench.parts import Deadline, Sizes, synchronize

VLLM_START_S = 400
# The size of a page is called page_size from transformers 5.18 on.
PAGE_SIZE = "page_size" if "page_size" in inspect.signature(ContinuousBatchingConfig).parameters else "block_size"
# Older versions take "sdpa" for a wish for any flash attention that is installed; newer ones warn of the prefix.
SDPA = "sdpa" if PAGE_SIZE == "page_size" else "paged|sdpa"

Requests = tuple[list[list[int]], list[int]]


def available() -> dict[str, Callable[[Any, Requests, float], dict[str, Any]]]:
    """The peers that can run here, by name."""
    peers: dict[str, Callable[[Any, Requests, float], dict[str, Any]]] = {
        "generate_batch, paged_flash": lambda *args: run_batching("paged_flash_2", *args),
        "generate_batch, paged_flash, prompts without graphs": lambda *args: run_batching(
            "paged_flash_2", *args, use_cuda_graph=(False, True)
        ),
    }
    if is_flash_attn_3_available():
        peers["generate_batch, flash_attention_3"] = lambda *args: run_batching("flash_attention_3", *args)
    if is_flash_attn_2_available():
        peers["generate_batch, flash_attention_2"] = lambda *args: run_batching("flash_attention_2", *args)
    peers["generate(), padded"] = run_padded
    peers["generate_batch, sdpa"] = lambda *args: run_batching(SDPA, *args)
    if importlib.util.find_spec("vllm") is not None:
        peers["vLLM"] = run_vllm
    return peers


def run_peer(name: str, model: Any, sizes: Sizes, limit_s: float) -> dict[str, Any]:
    """One peer; what it raises is its result."""
    requests = draw_requests(sizes.num_requests, sizes.lengths, sizes.tokens)
    before = model.config._attn_implementation
    try:
        result = available()[name](model, requests, limit_s)
    except Exception as error:  # a peer that fails must not take the others' figures with it
        return {"error": f"{type(error).__name__}: {error}"[:500]}
    finally:
        model.set_attn_implementation(before)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    if result.get("new_tokens") is not None:
        result["tokens_per_s"] = result["new_tokens"] / result["seconds"]
    return result


def run_padded(model: Any, requests: Requests, limit_s: float) -> dict[str, Any]:
    """One left-padded batch: everybody waits for the longest prompt and the most new tokens."""
    prompts, new = requests
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device)
    model.set_attn_implementation("sdpa")
    config = GenerationConfig(max_new_tokens=2, do_sample=False, pad_token_id=0)
    model.generate(ids[:2], attention_mask=mask[:2], generation_config=config)
    synchronize()
    started = time.perf_counter()
    config = GenerationConfig(max_new_tokens=max(new), do_sample=False, pad_token_id=0, max_time=limit_s)
    steps = model.generate(ids, attention_mask=mask, generation_config=config).shape[1] - width
    synchronize()
    seconds = time.perf_counter() - started
    useful = sum(min(count, steps) for count in new)
    return {"seconds": seconds, "new_tokens": useful, "steps": steps, "cut": steps < max(new), "limit_s": limit_s}


def run_batching(attention: str, model: Any, requests: Requests, limit_s: float, **settings: Any) -> dict[str, Any]:
    """transformers' own continuous batching, each request with its own number of new tokens.

    Args:
        attention: its implementation; "paged_flash_2" is "paged_flash" under the name that opens the block tables.
        model: gets its attention back from :func:`run_peer`.
        requests: prompts and numbers of new tokens.
        limit_s: of the requests.
        settings: of ``ContinuousBatchingConfig``. Its default captures a graph of every new size of a step with prompts
            too, in the middle of the run.
    """
    prompts, new = requests
    model.set_attn_implementation(attention)
    longest = max(len(prompt) + count for prompt, count in zip(prompts, new))
    page_size = int(getattr(ContinuousBatchingConfig(), PAGE_SIZE))
    options: dict[str, Any] = dict(max_requests_per_batch=len(prompts), max_blocks_per_request=longest // page_size + 2)
    if model.device.type == "cpu":
        # Without a GPU the pool would take all of the machine's memory.
        options |= dict(num_blocks=2 * len(prompts), max_batch_tokens=256)
    config = GenerationConfig(max_new_tokens=max(new), do_sample=False, pad_token_id=0, eos_token_id=-1)
    started = time.perf_counter()
    manager = model.init_continuous_batching(
        generation_config=config, continuous_batching_config=ContinuousBatchingConfig(**options | settings)
    )
    with torch.no_grad():
        if model.device.type != "cpu":
            manager.warmup()
        manager.start()
        try:
            few = [(prompt, 4) for prompt in prompts[:8]]
            _serve(manager, few, Deadline(limit_s))
            synchronize()
            ready_s = time.perf_counter() - started
            started = time.perf_counter()
            tokens, finished = _serve(manager, list(zip(prompts, new)), Deadline(limit_s))
            seconds = time.perf_counter() - started
        finally:
            manager.stop(block=True, timeout=20, hard_stop=True)
            manager.destroy()
    return {
        "seconds": seconds, "new_tokens": tokens, "finished": finished, "cut": finished < len(prompts),
        "limit_s": limit_s, "ready_s": ready_s,
    }  # fmt: skip


def _serve(manager: Any, requests: list[tuple[list[int], int]], deadline: Deadline) -> tuple[int, int]:
    """New tokens of the requests that ended before the deadline, and how many those are."""
    ids = {manager.add_request(prompt, max_new_tokens=count, eos_token_id=-1) for prompt, count in requests}
    tokens = finished = 0
    while finished < len(ids) and not deadline.has_passed:
        result = manager.get_result(timeout=0.2)
        if result is None:
            if not manager.is_running():
                raise RuntimeError("the thread of transformers' batching has ended")
            continue
        if result.error is not None:
            raise RuntimeError(f"transformers' batching failed: {result.error}")
        if result.request_id in ids and result.is_finished():
            tokens += len(result.generated_tokens)
            finished += 1
    return tokens, finished


def run_vllm(model: Any, requests: Requests, limit_s: float) -> dict[str, Any]:
    """vLLM in a process of its own, with random weights in the same shape.

    Raises:
        RuntimeError: it fails; the message has the end of what it wrote.
    """
    prompts, new = requests
    free, total = torch.cuda.mem_get_info()
    with tempfile.TemporaryDirectory() as folder:
        model.config.save_pretrained(folder)
        task = {
            "folder": folder, "prompts": prompts, "new": new, "dtype": str(model.dtype).removeprefix("torch."),
            "max_len": max(map(len, prompts)) + max(new) + 8, "memory": round(0.9 * free / total, 3),
        }  # fmt: skip
        command = [sys.executable, "-m", "eval.bench_engine_peers"]
        try:
            done = subprocess.run(
                command, input=json.dumps(task), capture_output=True, text=True, timeout=VLLM_START_S + limit_s,
                env=os.environ | {"VLLM_LOGGING_LEVEL": "ERROR"}, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return {"seconds": VLLM_START_S + limit_s, "new_tokens": None, "cut": True, "limit_s": limit_s}
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        raise RuntimeError(f"vLLM ended with {done.returncode}: {done.stderr[-300:]}")
    return json.loads(lines[-1]) | {"cut": False, "limit_s": limit_s}


def serve_with_vllm(task: dict[str, Any]) -> dict[str, Any]:
    """The other process: the task of :func:`run_vllm`, its figures."""
    from vllm import LLM, SamplingParams

    started = time.perf_counter()
    engine = LLM(
        model=task["folder"], load_format="dummy", skip_tokenizer_init=True, dtype=task["dtype"],
        max_model_len=task["max_len"], gpu_memory_utilization=task["memory"], enable_prefix_caching=False,
    )  # fmt: skip
    how = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True, detokenize=False) for n in task["new"]]
    inputs = [{"prompt_token_ids": prompt} for prompt in task["prompts"]]
    few = [SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, detokenize=False)] * 2
    engine.generate(inputs[:2], few, use_tqdm=False)
    ready_s = time.perf_counter() - started
    started = time.perf_counter()
    outputs = engine.generate(inputs, how, use_tqdm=False)
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "new_tokens": sum(len(o.outputs[0].token_ids) for o in outputs), "ready_s": ready_s}


def main() -> None:
    """The command line of the other process."""
    parser = argparse.ArgumentParser(
        prog="python -m eval.bench_engine_peers",
        description="vLLM's part of eval.bench_engine --gpu, which starts this: a task as JSON on standard input.",
    )
    parser.parse_args()
    print(json.dumps(serve_with_vllm(json.load(sys.stdin))))


if __name__ == "__main__":
    main()
