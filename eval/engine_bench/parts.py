"""Parts of the engine's GPU benchmark: each runs requests on an engine, step by step, within a limit of seconds.

A part returns a dictionary of figures. One that reaches its limit has ``"cut": True`` and figures of what fitted in.
The prompts' tokens are random. Times are those of the host, with the device waited for at both ends.
"""

import contextlib
import random
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig

import hf_paged
from eval.engine_bench.models import LENGTHS, NUM_REQUESTS, TOKENS, Costs, draw_requests

SAMPLED = dict(do_sample=True, temperature=0.8, top_p=0.95, top_k=0)
SPARE_STEPS = 80
"""Steps before and behind those that are measured."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much work the parts are.

    Attributes:
        num_requests: at once in `throughput`, and running in `steady` and `busy`.
        lengths: least and most tokens of prompts and outputs.
        tokens: the largest token id of a prompt.
        page_size, max_batch_tokens: of the engines; None: the default.
        short_prompt: tokens of a prompt in `latency` and `steady`.
        latency_steps, steady_steps, profile_steps: decode steps measured.
        long_prompt, long_running, long_steps: of `long_context`.
        shared_prompts, samples, shared_new: of `shared_prefix`: prompts, samples of each, new tokens of each sample.
        fractions: of saturation, in `arrivals`.
        load_s: longest load of one rate; saturation_s: of the measurement of saturation.
        call_rows, call_lengths, call_new: of `calls` and `cold`: prompts, their least and most tokens, new tokens.
        plain_long_prompt, plain_new: of `plain`.
        training: of `training`: sequences and their length, for each step.
        prompt_batches: of `prompts`: prompts and their length.
    """

    num_requests: int = NUM_REQUESTS
    lengths: tuple[int, int] = LENGTHS
    tokens: int = TOKENS
    page_size: int | None = None
    max_batch_tokens: int | None = None
    short_prompt: int = 128
    latency_steps: int = 256
    steady_steps: int = 100
    profile_steps: int = 50
    long_prompt: int = 32_768
    long_running: tuple[int, ...] = (1, 8)
    long_steps: int = 64
    shared_prompts: int = 64
    samples: int = 16
    shared_new: int = 128
    fractions: tuple[float, ...] = (0.2, 0.4, 0.6, 0.8, 0.9, 1.0)
    load_s: float = 30.0
    saturation_s: float = 10.0
    call_rows: int = 32
    call_lengths: tuple[int, int] = (20, 200)
    call_new: int = 128
    plain_long_prompt: int = 8192
    plain_new: int = 64
    training: tuple[tuple[int, int], ...] = ((4, 1024), (1, 8192))
    prompt_batches: tuple[tuple[int, int], ...] = ((8, 32_766), (64, 4096))


FULL = Sizes()
TINY = Sizes(
    num_requests=6, lengths=(5, 20), tokens=500, page_size=8, max_batch_tokens=64, short_prompt=8, latency_steps=6,
    steady_steps=5, profile_steps=4, long_prompt=100, long_running=(1, 2), long_steps=4, shared_prompts=3, samples=2,
    shared_new=4, fractions=(0.4, 0.8), load_s=1.0, saturation_s=0.5, call_rows=3, call_lengths=(2, 6), call_new=4,
    plain_long_prompt=20, plain_new=2, training=((2, 8),), prompt_batches=((2, 20),),
)  # fmt: skip
"""For a model that is tiny, on a CPU."""


class Deadline:
    """A limit of seconds that starts now."""

    def __init__(self, limit_s: float) -> None:
        self.end = time.perf_counter() + limit_s

    @property
    def left_s(self) -> float:
        """Seconds left, negative behind it."""
        return self.end - time.perf_counter()

    @property
    def has_passed(self) -> bool:
        """Whether none are left."""
        return self.left_s <= 0


def make_engine(
    model: Any, graphs: bool | None = None, sizes: Sizes = FULL, *, num_seqs: int | None = None,
    max_len: int | None = None, **options: Any,
) -> hf_paged.Engine:  # fmt: skip
    """An engine that whoever calls ``step`` drives, for the requests of ``sizes`` unless said otherwise."""
    settings = dict(
        page_size=sizes.page_size, max_num_seqs=num_seqs or sizes.num_requests, cuda_graphs=graphs,
        max_model_len=max_len, max_batch_tokens=sizes.max_batch_tokens,
    )  # fmt: skip
    # What is not said is the default: what a user gets is measured.
    settings = {name: value for name, value in settings.items() if value is not None}
    return hf_paged.Engine(model, hf_paged.EngineConfig(**settings | options), background=False)


def synchronize() -> None:
    """Wait for the device, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def config(new: int, **options: Any) -> GenerationConfig:
    """Generates exactly ``new`` tokens."""
    return GenerationConfig(max_new_tokens=new, pad_token_id=0, **({"do_sample": False} | options))


def random_prompt(length: int, sizes: Sizes, seed: int) -> list[int]:
    """Token ids."""
    draw = random.Random(seed)
    return [draw.randint(0, sizes.tokens) for _ in range(length)]


def drain(engine: hf_paged.Engine, handles: list[hf_paged.RequestHandle] = ()) -> None:  # type: ignore[assignment]
    """End these requests, and step until the engine is idle."""
    for handle in handles:
        handle.cancel()
    while engine.step():
        pass
    synchronize()


def timed_steps(engine: hf_paged.Engine, steps: int, limit_s: float) -> tuple[float, int]:
    """Milliseconds of a step over ``steps`` steps, fewer if the limit is reached; and how many."""
    synchronize()
    started = time.perf_counter()
    done = 0
    while done < steps and time.perf_counter() - started < limit_s:
        engine.step()
        done += 1
    synchronize()
    return (time.perf_counter() - started) * 1e3 / max(done, 1), done


def first_requests(engine: hf_paged.Engine, sizes: Sizes) -> float:
    """Seconds of a few requests, greedy and sampled, with which kernels are compiled and libraries start."""
    started = time.perf_counter()
    middle, most = sum(sizes.lengths) // 2, sizes.lengths[1]
    count = min(sizes.num_requests, max(4, 3 * engine.config.max_batch_tokens // most))
    lengths = [most if i % 2 else middle for i in range(count)]
    configs = [config(6 + i % 6, **(SAMPLED if i % 4 == 0 else {})) for i in range(count)]
    handles = [
        engine.submit(random_prompt(length, sizes, i), generation_config=how)
        for i, (length, how) in enumerate(zip(lengths, configs))
    ]
    drain(engine)
    for handle in handles:
        error = handle.result().error
        if error is not None:
            raise error
    return time.perf_counter() - started


def latency(engine: hf_paged.Engine, sizes: Sizes, limit_s: float) -> dict[str, Any]:
    """Milliseconds a token of one request."""
    deadline = Deadline(limit_s)
    prompt = random_prompt(sizes.short_prompt, sizes, 0)
    handle = engine.submit(prompt, generation_config=config(sizes.latency_steps + SPARE_STEPS))
    for _ in range(12):
        engine.step()
    ms, done = timed_steps(engine, sizes.latency_steps, deadline.left_s)
    drain(engine, [handle])
    costs = Costs.of(engine.model)
    context = sizes.short_prompt + sizes.latency_steps // 2
    return {
        "ms_per_token": ms, "steps": done, "cut": done < sizes.latency_steps,
        "roofline_ms": costs.decode_s([context]) * 1e3,
    }  # fmt: skip


def throughput(engine: hf_paged.Engine, sizes: Sizes, limit_s: float) -> dict[str, Any]:
    """New tokens a second of one ``generate`` of all requests, or of what fitted into the limit."""
    prompts, outputs = draw_requests(sizes.num_requests, sizes.lengths, sizes.tokens)
    synchronize()
    before, started = engine.stats(), time.perf_counter()
    results = engine.generate(prompts, generation_config=[config(n) for n in outputs], deadline_s=limit_s)
    synchronize()
    seconds, after = time.perf_counter() - started, engine.stats()
    unfinished = sum(result.finish_reason != "length" for result in results)
    tokens = sum(len(result.token_ids) for result in results)
    first = [result.timing.first_token_s for result in results if result.timing.first_token_s is not None]
    return {
        "seconds": seconds, "new_tokens": tokens, "tokens_per_s": tokens / seconds, "steps": after.steps - before.steps,
        "cut": unfinished > 0, "unfinished": unfinished, "preemptions": after.preemptions - before.preemptions,
        "first_token_s": statistics.mean(first) if first else None,
        "roofline_tokens_per_s": sum(outputs) / Costs.of(engine.model).run_s([len(p) for p in prompts], outputs),
    }  # fmt: skip


def throughput_in_order(engine: hf_paged.Engine, sizes: Sizes, limit_s: float) -> dict[str, Any]:
    """As :func:`throughput`, with each request submitted by itself: they run in that order, first tokens come early."""
    prompts, outputs = draw_requests(sizes.num_requests, sizes.lengths, sizes.tokens)
    synchronize()
    deadline, started = Deadline(limit_s), time.perf_counter()
    before = engine.stats()
    handles = [engine.submit(p, generation_config=config(n)) for p, n in zip(prompts, outputs)]
    while engine.step() and not deadline.has_passed:
        pass
    synchronize()
    seconds, after = time.perf_counter() - started, engine.stats()
    unfinished = sum(not handle.is_done for handle in handles)
    drain(engine, handles)
    tokens = after.new_tokens - before.new_tokens
    waits = (handle.result().timing.first_token_s for handle in handles)
    first = [seconds for seconds in waits if seconds is not None]
    return {
        "seconds": seconds, "new_tokens": tokens, "tokens_per_s": tokens / seconds, "steps": after.steps - before.steps,
        "cut": unfinished > 0, "unfinished": unfinished, "first_token_s": statistics.mean(first) if first else None,
    }  # fmt: skip


@contextlib.contextmanager
def all_decoding(engine: hf_paged.Engine, sizes: Sizes, new: int, deadline: Deadline, **how: Any) -> Iterator[None]:
    """``num_requests`` requests past their prompts, with graphs captured; they are ended behind it."""
    handles = [
        engine.submit(random_prompt(sizes.short_prompt, sizes, i), generation_config=config(new + SPARE_STEPS, **how))
        for i in range(sizes.num_requests)
    ]
    try:
        core = engine.core
        while core.slots.decoding.sum() < sizes.num_requests and not deadline.has_passed:
            engine.step()
        for _ in range(12):
            engine.step()
        yield
    finally:
        drain(engine, handles)


def steady(engine: hf_paged.Engine, sizes: Sizes, limit_s: float, **how: Any) -> dict[str, Any]:
    """Milliseconds of a decode step of all requests."""
    deadline = Deadline(limit_s)
    with all_decoding(engine, sizes, sizes.steady_steps, deadline, **how):
        ms, done = timed_steps(engine, sizes.steady_steps, max(0.5, deadline.left_s))
        context = sizes.short_prompt + 12 + sizes.steady_steps // 2
        result: dict[str, Any] = {
            "step_ms": ms, "steps": done, "cut": done < sizes.steady_steps,
            "roofline_ms": Costs.of(engine.model).decode_s([context] * sizes.num_requests) * 1e3,
        }  # fmt: skip
        if not how:
            result |= _replay(engine, sizes)
    return result


def _replay(engine: hf_paged.Engine, sizes: Sizes) -> dict[str, float]:
    """The graph of all rows replayed with nothing between the replays: what the host adds is the difference."""
    core = engine.core
    graphs = core.runner.graphs
    if graphs is None or graphs.failure:
        return {}
    started, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    slots = np.arange(sizes.num_requests)
    graphs.run(slots)
    started.record()
    for _ in range(20):
        graphs.run(slots)
    ended.record()
    torch.cuda.synchronize()
    core.tables.stale[:] = True
    return {"replay_ms": started.elapsed_time(ended) / 20}


def steady_sampled(engine: hf_paged.Engine, sizes: Sizes, limit_s: float) -> dict[str, Any]:
    """As :func:`steady` with temperature 0.8 and top_p 0.95, after a greedy run of the same steps."""
    deadline = Deadline(limit_s)
    with all_decoding(engine, sizes, sizes.steady_steps, deadline):
        greedy, _ = timed_steps(engine, sizes.steady_steps, max(0.5, deadline.left_s / 2))
    sampled = steady(engine, sizes, max(0.5, deadline.left_s), **SAMPLED)
    return sampled | {"greedy_ms": greedy, "sampled_over_greedy": sampled["step_ms"] / greedy}


def long_context(model: Any, sizes: Sizes, limit_s: float, options: dict[str, Any]) -> dict[str, Any]:
    """Seconds of prompts of 32k tokens until the first new token, then milliseconds of a decode step.

    ``running`` has, for each number of requests: "prompt_s" of all prompts together, "step_ms" of a step of all of them
    (a token each), and the roofline of both.
    """
    deadline, costs = Deadline(limit_s), Costs.of(model)
    room = sizes.long_prompt + sizes.long_steps + 64
    rows: list[dict[str, Any]] = []
    engine = make_engine(model, sizes=sizes, num_seqs=max(sizes.long_running), max_len=room, **options)
    with engine:
        # What compiles kernels and captures graphs comes first; the prompt is none of those below.
        engine.warm_up()
        engine.submit(random_prompt(sizes.long_prompt, sizes, 99), generation_config=config(4))
        while engine.step() and not deadline.has_passed:
            pass
        for count in sizes.long_running:
            if deadline.has_passed:
                break
            synchronize()
            handles = [
                engine.submit(
                    random_prompt(sizes.long_prompt, sizes, i), generation_config=config(sizes.long_steps + 40)
                )
                for i in range(count)
            ]
            started = time.perf_counter()
            while engine.core.slots.decoding.sum() < count and not deadline.has_passed:
                engine.step()
            synchronize()
            prompt_s = time.perf_counter() - started
            row = {
                "running": count, "prompt_s": prompt_s, "cut": deadline.has_passed,
                "roofline_prompt_s": costs.prompt_s([sizes.long_prompt]) * count,
            }  # fmt: skip
            if not row["cut"]:
                for _ in range(8):
                    engine.step()
                ms, done = timed_steps(engine, sizes.long_steps, deadline.left_s)
                row |= {
                    "step_ms": ms, "steps": done, "cut": done < sizes.long_steps,
                    "roofline_step_ms": costs.decode_s([sizes.long_prompt + sizes.long_steps // 2] * count) * 1e3,
                }  # fmt: skip
            rows.append(row)
            drain(engine, handles)
    is_cut = len(rows) < len(sizes.long_running) or any(row["cut"] for row in rows)
    return {"prompt_tokens": sizes.long_prompt, "running": rows, "cut": is_cut}


def shared_prefix(model: Any, sizes: Sizes, limit_s: float, options: dict[str, Any]) -> dict[str, Any]:
    """Samples of shared prompts, three ways, on one engine that keeps prefixes.

    One request with n samples for each prompt; n requests, which find each other's pages; n requests with a salt each,
    which find none.
    """
    prompts, _ = draw_requests(sizes.shared_prompts, sizes.lengths, sizes.tokens)
    each = config(sizes.shared_new, **SAMPLED)
    together = config(sizes.shared_new, **SAMPLED, num_return_sequences=sizes.samples)
    repeated = [prompt for prompt in prompts for _ in range(sizes.samples)]
    ways: dict[str, tuple[list[list[int]], GenerationConfig, bool]] = {
        "samples of one request": (prompts, together, False),
        "requests that share a prefix": (repeated, each, False),
        "requests that share nothing": (repeated, each, True),
    }
    rows: list[dict[str, Any]] = []
    with make_engine(model, sizes=sizes, **options) as engine:
        engine.warm_up()
        first_requests(engine, sizes)
        total = Deadline(limit_s)
        for number, (way, (inputs, how, is_salted)) in enumerate(ways.items()):
            engine.drop_prefixes()
            deadline = Deadline(total.left_s / (len(ways) - number))
            before = engine.stats()
            synchronize()
            started = time.perf_counter()
            handles = [
                engine.submit(ids, generation_config=how, cache_salt=i if is_salted else None)
                for i, ids in enumerate(inputs)
            ]
            while engine.step() and not deadline.has_passed:
                pass
            synchronize()
            seconds, after = time.perf_counter() - started, engine.stats()
            is_cut = not all(handle.is_done for handle in handles)
            drain(engine, handles)
            tokens = sum(len(one.token_ids) for handle in handles for one in handle.result().sequences)
            rows.append(
                {"way": way, "seconds": seconds, "new_tokens": tokens, "tokens_per_s": tokens / seconds,
                 "prompt_tokens": after.prompt_tokens - before.prompt_tokens, "cut": is_cut}
            )  # fmt: skip
    return {
        "prompts": len(prompts), "samples": sizes.samples, "new_tokens_each": sizes.shared_new, "ways": rows,
        "cut": any(row["cut"] for row in rows),
    }  # fmt: skip
