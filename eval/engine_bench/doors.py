"""Parts of the engine's GPU benchmark that measure what a user meets first, by the public functions and their defaults.

Each makes what it needs of a model in memory. Peers (transformers' own loop and attention) are in the same part.
"""

import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

import hf_paged
from eval.engine_bench.models import TINY as TINY_SHAPE
from eval.engine_bench.models import build
from eval.engine_bench.parts import Deadline, Sizes, config, random_prompt, synchronize


def padded_batch(count: int, least: int, most: int, tokens: int, device: Any, seed: int = 0) -> dict[str, torch.Tensor]:
    """``input_ids`` and ``attention_mask`` ``[count, longest]`` of prompts of random lengths, padded on the left."""
    draw = random.Random(seed)
    lengths = [draw.randint(least, most) for _ in range(count)]
    ids, mask = torch.zeros(2, count, max(lengths), dtype=torch.int64)
    for row, length in enumerate(lengths):
        ids[row, -length:] = torch.tensor([draw.randint(1, tokens) for _ in range(length)])
        mask[row, -length:] = 1
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


def generate(model: Any, batch: dict[str, torch.Tensor], new: int) -> torch.Tensor:
    """Greedy, exactly ``new`` tokens."""
    return model.generate(**batch, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0)


def timed(call: Callable[[], object]) -> float:
    """Seconds of a call, with the device waited for at both ends."""
    synchronize()
    started = time.perf_counter()
    call()
    synchronize()
    return time.perf_counter() - started


@contextmanager
def patched(model: Any, **options: Any) -> Iterator[Any]:
    """The model with a patched ``generate``."""
    hf_paged.patch_generate(model, **options)
    try:
        yield model
    finally:
        hf_paged.unpatch_generate(model)


@contextmanager
def attention(model: Any, name: str) -> Iterator[None]:
    """The model with another attention."""
    before = model.config._attn_implementation
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def equal_calls(model: Any, sizes: Sizes, count: int) -> list[float]:
    """Seconds of equal calls of ``generate``."""
    batch = padded_batch(sizes.call_rows, *sizes.call_lengths, sizes.tokens, model.device)
    return [timed(partial(generate, model, batch, sizes.call_new)) for _ in range(count)]


def calls(model: Any, sizes: Sizes, limit_s: float, options: dict[str, Any]) -> dict[str, Any]:
    """Seconds of each of equal calls of a patched ``generate()``: the default, and ``keep_awake``."""
    deadline, rows = Deadline(limit_s), []
    for keep_awake in (False, True):
        if deadline.has_passed:
            break
        with patched(model, config=hf_paged.EngineConfig(**options), keep_awake=keep_awake):
            free = _free_bytes()
            seconds = equal_calls(model, sizes, 6)
            rows.append(
                {"keep_awake": keep_awake, "seconds": seconds, "then_s": statistics.median(seconds[1:]),
                 "between_gib": (free - _free_bytes()) / 2**30}
            )  # fmt: skip
    return {"ways": rows, "cut": len(rows) < 2}


def _free_bytes() -> int:
    if not torch.cuda.is_available():
        return 0
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]


COLD = """
import json, sys
from eval.engine_bench import doors
print(json.dumps(doors.cold_calls(*json.loads(sys.argv[1]))))
"""


def cold(model: Any, sizes: Sizes, limit_s: float, options: dict[str, Any]) -> dict[str, Any]:
    """Seconds of equal calls of a patched ``generate()`` in new processes: with an empty cache of kernels; with the one
    that is filled then."""
    name = model.bench_name
    is_tiny = model.config.get_text_config().hidden_size == TINY_SHAPE["hidden_size"]
    rows: list[dict[str, Any]] = []
    deadline = Deadline(limit_s)
    with tempfile.TemporaryDirectory() as cache:
        for said in ("empty", "filled"):
            command = [sys.executable, "-c", COLD, json.dumps([name, is_tiny, options])]
            try:
                done = subprocess.run(
                    command, env=os.environ | {"TRITON_CACHE_DIR": cache, "PYTHONPATH": os.pathsep.join(sys.path)},
                    capture_output=True, text=True, timeout=max(1.0, deadline.left_s), check=False,
                )  # fmt: skip
            except subprocess.TimeoutExpired:
                break
            if done.returncode:
                raise RuntimeError(f"the process has failed: {done.stderr[-300:]}")
            rows.append({"cache": said} | json.loads(done.stdout.splitlines()[-1]))
    return {"ways": rows, "cut": len(rows) < 2}


def cold_calls(name: str, is_tiny: bool, options: dict[str, Any]) -> dict[str, Any]:
    """What :func:`cold` runs in a process of its own."""
    from eval.engine_bench.parts import FULL, TINY

    device = "cuda" if torch.cuda.is_available() else "cpu"
    sizes = TINY if is_tiny else FULL
    model = build(name, TINY_SHAPE if is_tiny else None, torch.float32 if is_tiny else torch.bfloat16, device)
    with patched(model, config=hf_paged.EngineConfig(**options)):
        first, *then = equal_calls(model, sizes, 4)
    return {"first_s": first, "then_s": then}


def plain(model: Any, sizes: Sizes, limit_s: float, options: dict[str, Any]) -> dict[str, Any]:
    """Milliseconds a token of plain ``generate()``, without prompts: what ``new`` tokens take more than one."""
    del options
    batches = ((1, sizes.short_prompt), (8, sizes.short_prompt), (8, sizes.plain_long_prompt))
    measures = [
        (
            {"rows": count, "prompt": length},
            partial(_token_ms, model, padded_batch(count, length, length, sizes.tokens, model.device), sizes.plain_new),
        )
        for count, length in batches
    ]
    return _beside_sdpa(model, measures, limit_s)


def _token_ms(model: Any, batch: dict[str, torch.Tensor], new: int) -> float:
    one = timed(partial(generate, model, batch, 1))
    return (timed(partial(generate, model, batch, 1 + new)) - one) / new * 1e3


def training(model: Any, sizes: Sizes, limit_s: float, options: dict[str, Any]) -> dict[str, Any]:
    """Milliseconds of a forward and backward pass with a loss, weights as they are and under bfloat16 autocast."""
    del options
    model.requires_grad_(True).train()
    try:
        batches = [torch.randint(1, sizes.tokens, shape, device=model.device) for shape in sizes.training]
        measures = [
            (
                {"rows": len(ids), "length": ids.shape[1], "autocast": autocast},
                partial(_step_ms, model, ids, autocast),
            )
            for ids in batches
            for autocast in (False, True)
        ]
        return _beside_sdpa(model, measures, limit_s)
    finally:
        model.zero_grad(set_to_none=True)
        model.requires_grad_(False).eval()


def _step_ms(model: Any, ids: torch.Tensor, autocast: bool) -> float:
    return timed(partial(_training_step, model, ids, autocast)) * 1e3


ROUNDS = 8
"""In which paged_flash and sdpa take turns, since hosts change their speed within a minute."""


def _beside_sdpa(
    model: Any, measures: Sequence[tuple[dict[str, Any], Callable[[], float]]], limit_s: float
) -> dict[str, Any]:
    """Medians of milliseconds with "paged_flash" and with "sdpa", all of them, and ``ratio``, the median of the rounds'
    ratios.

    Args:
        measures: what a row is, and its measurement.
        limit_s: seconds, shared by the rows alike. Rows without a round are left out.
    """
    rows = []
    is_cut = False
    for said, measure in measures:
        deadline = Deadline(limit_s / len(measures))
        taken: dict[str, list[float]] = {"paged_flash": [], "sdpa": []}
        for number in range(1 + ROUNDS):
            if deadline.has_passed:
                is_cut = True
                break
            for name, values in taken.items():
                with attention(model, name):
                    value = measure()
                if number:  # the first one has new shapes
                    values.append(value)
        if taken["sdpa"]:
            medians = {name: statistics.median(values) for name, values in taken.items()}
            ratios = [ours / sdpa for ours, sdpa in zip(*taken.values(), strict=True)]
            rows.append(said | medians | {"ratio": statistics.median(ratios), "rounds": taken})
    return {"ways": rows, "cut": is_cut}


def _training_step(model: Any, ids: torch.Tensor, autocast: bool) -> None:
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=autocast):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()


def prompts(model: Any, sizes: Sizes, limit_s: float, options: dict[str, Any]) -> dict[str, Any]:
    """Seconds of prompts with one new token each: few long ones, and as many of middle length as an evaluation has."""
    deadline, rows = Deadline(limit_s), []
    longest = max(length for _, length in sizes.prompt_batches) + 2
    config_length = model.config.get_text_config().max_position_embeddings
    engine_options = {"max_model_len": max(longest, config_length)} | options
    with hf_paged.Engine(model, hf_paged.EngineConfig(**engine_options)) as engine:
        for count, length in sizes.prompt_batches:
            engine.generate([random_prompt(length, sizes, 99)], generation_config=config(1))
            taken = []
            for run in range(3):
                if deadline.has_passed:
                    return {"ways": rows, "cut": True}
                ids = [random_prompt(length, sizes, 1000 * run + i) for i in range(count)]
                taken.append(timed(partial(engine.generate, ids, generation_config=config(1))))
                engine.drop_prefixes()
            rows.append({"prompts": count, "length": length, "seconds": statistics.median(taken)})
    return {"ways": rows, "cut": False}


def jobs(model: Any, sizes: Sizes, limit_s: float, options: dict[str, Any]) -> dict[str, Any]:
    """Seconds of equal jobs of a new engine, kernels compiled: the run of `throughput` four times, other prompts each
    time."""
    from eval.engine_bench.models import draw_requests

    deadline, taken = Deadline(limit_s), []
    drawn, outputs = draw_requests(sizes.num_requests, sizes.lengths, sizes.tokens)
    with hf_paged.Engine(model, hf_paged.EngineConfig(**options)) as engine:
        for number in range(4):
            if deadline.has_passed:
                break
            ids = [[(token + 17 * number) % sizes.tokens for token in prompt] for prompt in drawn]
            taken.append(timed(partial(engine.generate, ids, generation_config=[config(new) for new in outputs])))
    return {"seconds": taken, "new_tokens": sum(outputs), "cut": len(taken) < 4}


DOORS: dict[str, Callable[[Any, Sizes, float, dict[str, Any]], dict[str, Any]]] = {
    "cold": cold, "calls": calls, "plain": plain, "training": training, "prompts": prompts, "jobs": jobs,
}  # fmt: skip
