"""The engine on a GPU beside its peers: models in their real shapes with random bfloat16 weights.

    python -m eval.bench_engine --gpu --output eval/results/bench_engine_h200.json
    python -m eval.bench_engine --gpu --models qwen3-0.6b --parts throughput arrivals --limits arrivals=240
    python -m eval.bench_engine --plots eval/results/bench_engine_h200.json

Parts, for each model:

* latency: one request of 128 prompt tokens, milliseconds a token.
* throughput: 256 requests in one call of ``generate``, prompts and outputs of 100 to 1,024 tokens (Python's random,
  seed 0), greedy, no eos.
* throughput_in_order: the same, submitted one by one, which run in that order.
* steady: 256 running requests of 128 prompt tokens, milliseconds of a greedy decode step; beside it the same graph
  replayed with nothing between the replays.
* steady_sampled: the same steps with temperature 0.8 and top_p 0.95, and the ratio of both.
* busy: the share of wall time in which the device works, from a profile of such steps; kernels, gaps.
* arrivals: requests that arrive at random, at fractions of saturation: time to first token, time between tokens.
* long_context: prompts of 32k tokens, 1 and 8 at a time.
* shared_prefix: 64 prompts with 16 samples each, with and without sharing.
* cold: a patched ``generate()`` in new processes, with an empty cache of kernels and with the one filled then.
* calls: seconds of each of six equal calls of a patched ``generate()``, by default and with ``keep_awake``.
* plain: milliseconds a token of ``generate()`` without a patch, "paged_flash" and "sdpa".
* training: milliseconds of a forward and backward pass, "paged_flash" and "sdpa".
* prompts: 8 prompts of 32k tokens and 64 of 4k, one new token each.
* jobs: the run of `throughput` four times on a new engine.
* equality: the same tokens as with everything off (float32), log-probabilities (bfloat16), on a small model of the
  family.

Every part has a limit of seconds; a part that is cut says so. Engines have their default options. Variants of the
engine: everything on ("graphs"), and with switches off or on: "unfused", "eager" (no graphs), "plain" (neither),
"compiled". One that this version of the engine lacks is left out, and the report says why. `--tiny` runs all of it on
tiny models, without a GPU too.

The report (JSON and Markdown beside it) is written after each part, a PNG at the end where matplotlib is installed;
`--add` puts several runs into one report.
"""

import argparse
import contextlib
import dataclasses
import gc
import json
import platform
import sys
import time
from collections.abc import Callable, Iterator
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers

import hf_paged
from eval import bench_engine_peers
from eval.engine_bench import plots as bench_engine_plots
from eval.engine_bench.arrivals import arrivals
from eval.engine_bench.busy import busy
from eval.engine_bench.doors import DOORS
from eval.engine_bench.equality import equality
from eval.engine_bench.models import MODELS, NUM_REQUESTS, Costs, build, draw_requests
from eval.engine_bench.models import TINY as TINY_SHAPE
from eval.engine_bench.parts import (
    FULL,
    TINY,
    Sizes,
    config,
    first_requests,
    latency,
    long_context,
    make_engine,
    shared_prefix,
    steady,
    steady_sampled,
    synchronize,
    throughput,
    throughput_in_order,
)
from eval.engine_bench.report import VARIANTS, markdown

__all__ = ["NUM_REQUESTS", "PARTS", "add_arguments", "build", "config", "draw_requests", "main", "make_engine", "run"]

SWITCHES: dict[str, dict[str, Any]] = {
    "graphs": {},
    "unfused": {"fuse": False},
    "eager": {"cuda_graphs": False},
    "plain": {"fuse": False, "cuda_graphs": False},
    "compiled": {"compile": True},
}
"""Options of the variants of the engine."""

ON_ENGINE: dict[str, Callable[[hf_paged.Engine, Sizes, float], dict[str, Any]]] = {
    "latency": latency,
    "throughput": throughput,
    "throughput_in_order": throughput_in_order,
    "steady": steady,
    "steady_sampled": steady_sampled,
    "busy": busy,
    "arrivals": arrivals,
}
"""Parts that share an engine."""

ON_MODEL: dict[str, Callable[[Any, Sizes, float, dict[str, Any]], dict[str, Any]]] = {
    "long_context": long_context,
    "shared_prefix": shared_prefix,
    **DOORS,
}
"""Parts that make engines of their own."""

PARTS = (*ON_ENGINE, *ON_MODEL, "equality")
LIMITS_S = {
    "arrivals": 220.0, "throughput": 60.0, "throughput_in_order": 60.0, "long_context": 60.0, "shared_prefix": 90.0,
    "cold": 120.0, "jobs": 90.0, "training": 60.0, "prompts": 60.0,
}  # fmt: skip
PEER_LIMIT_S = 100.0


@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
    """What to run.

    Attributes:
        models: of :data:`~eval.engine_bench.models.MODELS`.
        parts: of :data:`PARTS`, with everything on.
        switch_parts: with the other variants.
        variants: of :data:`SWITCHES`.
        limits_s: seconds of a part; ``default_s`` of those not named.
        switch_limit_s: at most this for a part of the other variants.
        peers: names of peers; ``peer_limit_s`` seconds each.
        is_tiny: tiny models and little work, on a CPU if there is no GPU.
        sizes: of the parts.
    """

    models: tuple[str, ...]
    parts: tuple[str, ...] = PARTS
    switch_parts: tuple[str, ...] = ("latency", "throughput")
    variants: tuple[str, ...] = tuple(SWITCHES)
    limits_s: dict[str, float] = dataclasses.field(default_factory=dict)
    default_s: float = 30.0
    switch_limit_s: float = 30.0
    peers: tuple[str, ...] = ()
    peer_limit_s: float = PEER_LIMIT_S
    is_tiny: bool = False
    sizes: Sizes = FULL

    def limit_s(self, part: str, variant: str = "graphs") -> float:
        """Seconds of a part."""
        limit = self.limits_s.get(part, self.default_s)
        return limit if variant == "graphs" else min(limit, self.switch_limit_s)


def describe(sizes: Sizes) -> dict[str, Any]:
    """The machine and the versions."""
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = "not installed"
    return {
        "date": date.today().isoformat(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU",
        "python": platform.python_version(), "torch": torch.__version__, "triton": triton_version,
        "transformers": transformers.__version__, "hf_paged": hf_paged.__version__,
        "sizes": dataclasses.asdict(sizes),
    }  # fmt: skip


def unavailable_reason(options: dict[str, Any]) -> str | None:
    """Why this version of the engine has no such variant; None: it has."""
    missing = [name for name in options if name not in {f.name for f in dataclasses.fields(hf_paged.EngineConfig)}]
    if missing:
        return f"the engine has no option {missing[0]}"
    try:
        hf_paged.EngineConfig(**options)
    except ValueError as error:
        return str(error)
    return None


def run(output: Path, plan: Plan, command: str = "", is_added: bool = False) -> dict[str, Any]:
    """The plan; the report is written after each part.

    Args:
        output: the JSON.
        plan: what to run.
        command: for the report.
        is_added: what ``output`` has of other models, variants, parts and peers stays in the report.
    """
    weights = "tiny models, float32" if plan.is_tiny else "the models' real shapes, bfloat16"
    report: dict[str, Any] = {**describe(plan.sizes), "weights": weights, "command": command, "models": {}}
    if is_added and output.exists():
        before = json.loads(output.read_text(encoding="utf-8"))
        report |= {"models": before["models"], "command": f"{before['command']}`, `{command}"}
    bench = _Bench(output, plan, report)
    for name in plan.models:
        bench.run_model(name)
        bench.free()
    return report


class _Bench:
    """One run: the plan, and the report as it grows."""

    def __init__(self, output: Path, plan: Plan, report: dict[str, Any]) -> None:
        self.output, self.plan, self.report = output, plan, report
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def write(self) -> None:
        """The report as it is by now."""
        self.output.parent.mkdir(parents=True, exist_ok=True)
        self.output.write_text(json.dumps(self.report, indent=2) + "\n", encoding="utf-8")
        self.output.with_suffix(".md").write_text(markdown(self.report), encoding="utf-8")

    def measure(self, where: dict[str, Any], part: str, said: str, function: Callable[[], dict[str, Any]]) -> None:
        """Put a part's figures, or what it raised, into ``where``."""
        print(f"{said} ...", flush=True)
        started = time.perf_counter()
        try:
            where[part] = function()
        except Exception as error:  # the other parts' figures shall not be lost
            where[part] = {"error": f"{type(error).__name__}: {error}"[:500]}
        where[part]["took_s"] = round(time.perf_counter() - started, 2)
        print(f"{said}: {json.dumps(where[part])[:400]}", flush=True)
        self.write()

    def run_model(self, name: str) -> None:
        """All of one model."""
        plan = self.plan
        changes, dtype = (TINY_SHAPE, torch.float32) if plan.is_tiny else (None, torch.bfloat16)
        started = time.perf_counter()
        model = build(name, changes, dtype, self.device)
        model.bench_name = name
        synchronize()
        prompts, outputs = draw_requests(plan.sizes.num_requests, plan.sizes.lengths, plan.sizes.tokens)
        costs, lengths = Costs.of(model), [len(prompt) for prompt in prompts]
        entry: dict[str, Any] = self.report["models"].setdefault(name, {})
        entry |= {
            "parameters": model.num_parameters(), "build_s": time.perf_counter() - started,
            "roofline": {
                "ms_per_token": costs.decode_s([plan.sizes.short_prompt]) * 1e3,
                "tokens_per_s": sum(outputs) / costs.run_s(lengths, outputs),
            },
        }  # fmt: skip
        for variant in plan.variants:
            self.run_variant(name, model, variant, entry)
        if "equality" in plan.parts:
            off = {key: value for key, value in SWITCHES["plain"].items() if unavailable_reason({key: value}) is None}
            kinds = {kind: SWITCHES[kind] for kind in ("graphs", "compiled") if kind in plan.variants}
            kinds = {kind: options for kind, options in kinds.items() if unavailable_reason(options) is None}
            limit_s = plan.limit_s("equality")
            self.measure(
                entry, "equality", f"{name} equality",
                partial(equality, name, plan.sizes, limit_s, kinds, off, self.device),
            )  # fmt: skip
        for peer in plan.peers:
            self.measure(
                entry.setdefault("peers", {}), peer, f"{name} {peer}",
                partial(bench_engine_peers.run_peer, peer, model, plan.sizes, plan.peer_limit_s),
            )  # fmt: skip

    def run_variant(self, name: str, model: Any, variant: str, entry: dict[str, Any]) -> None:
        """All parts of a model with one variant of the engine."""
        plan, options = self.plan, SWITCHES[variant]
        parts = plan.parts if variant == "graphs" else plan.switch_parts
        reason = unavailable_reason(options)
        if reason is not None:
            entry[variant] = {"failure": reason}
            return
        on_engine = [part for part in parts if part in ON_ENGINE]
        results: dict[str, Any] = {}
        if parts:
            results = entry.setdefault(variant, {})
            results.pop("failure", None)
        if on_engine:
            try:
                said = f"{name} {VARIANTS[variant]}"
                self.run_on_engine(said, model, variant, on_engine, results)
                if variant == plan.variants[0]:
                    self.free()
                    with self.started(f"{said} again", model, variant, results.setdefault("again", {})):
                        pass
                    self.write()
            except Exception as error:  # an engine that cannot start is a result
                results["failure"] = f"{type(error).__name__}: {error}"[:500]
                print(f"{name} {variant}: {results['failure']}", flush=True)
                self.write()
            self.free()
        for part, function in ON_MODEL.items():
            if part in parts:
                limit_s = plan.limit_s(part, variant)
                said = f"{name} {VARIANTS[variant]} {part}"
                self.measure(results, part, said, partial(function, model, plan.sizes, limit_s, options))
                self.free()

    def run_on_engine(self, said: str, model: Any, variant: str, parts: list[str], results: dict[str, Any]) -> None:
        """The parts that share an engine."""
        plan = self.plan
        with self.started(said, model, variant, results) as engine:
            for part in parts:
                engine.drop_prefixes()  # Parts have prompts in common.
                limit_s = plan.limit_s(part, variant)
                function = partial(ON_ENGINE[part], engine, plan.sizes, limit_s)
                self.measure(results, part, f"{said} {part}", function)

    @contextlib.contextmanager
    def started(self, said: str, model: Any, variant: str, results: dict[str, Any]) -> Iterator[hf_paged.Engine]:
        """An engine with graphs captured and first requests served; ``results`` get the seconds of it."""
        synchronize()
        begun = time.perf_counter()
        with make_engine(model, sizes=self.plan.sizes, **SWITCHES[variant]) as engine:
            synchronize()
            results["start_s"] = time.perf_counter() - begun
            begun = time.perf_counter()
            results["num_graphs"] = engine.warm_up()
            synchronize()
            results["capture_s"] = time.perf_counter() - begun
            graphs = engine.core.runner.graphs
            results["graph_failure"] = None if graphs is None else graphs.failure
            results["first_s"] = first_requests(engine, self.plan.sizes)
            results["ready_s"] = results["start_s"] + results["capture_s"] + results["first_s"]
            keys = ("start_s", "capture_s", "first_s", "ready_s", "graph_failure")
            print(said, {key: results[key] for key in keys}, flush=True)
            yield engine

    def free(self) -> None:
        """Give memory back to the device."""
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``--gpu``."""
    gpu = parser.add_argument_group("with --gpu")
    models = ["qwen3-0.6b", "llama3-8b", "mistral-7b", "olmoe-1b-7b"]
    gpu.add_argument("--models", nargs="+", choices=list(MODELS), default=models, help="shapes with random weights")
    gpu.add_argument("--parts", nargs="*", choices=PARTS, default=list(PARTS), help="with everything on")
    gpu.add_argument(
        "--variants", nargs="+", choices=list(SWITCHES), default=list(SWITCHES), help="of the engine's options"
    )
    switch_parts = [part for part in PARTS if part != "equality" and part not in DOORS]
    gpu.add_argument(
        "--switch-parts", nargs="*", choices=switch_parts, default=["latency", "throughput"],
        help="with the other variants",
    )  # fmt: skip
    gpu.add_argument("--limit-s", type=float, default=30.0, help="seconds of a part that --limits does not name")
    gpu.add_argument("--limits", nargs="+", type=_limit, default=[], metavar="PART=SECONDS", help=f"default {LIMITS_S}")
    gpu.add_argument("--switch-limit-s", type=float, default=30.0, help="seconds of a part of the other variants")
    peers = list(bench_engine_peers.available())
    gpu.add_argument("--peers", nargs="*", choices=peers, default=peers, help="default: all that are installed")
    gpu.add_argument("--peer-limit-s", type=float, default=PEER_LIMIT_S, help="seconds of a peer")
    gpu.add_argument("--saturation-s", type=float, default=FULL.saturation_s, help="of measuring saturation")
    gpu.add_argument("--load-s", type=float, default=FULL.load_s, help="longest load of one arrival rate")
    gpu.add_argument("--fractions", nargs="+", type=float, default=list(FULL.fractions), help="of saturation")
    gpu.add_argument("--add", action="store_true", help="keep what --output has of other models, parts and peers")
    gpu.add_argument("--tiny", action="store_true", help="tiny models and little work, without a GPU too")


def _limit(text: str) -> tuple[str, float]:
    part, _, seconds = text.partition("=")
    if part not in PARTS or not seconds:
        raise argparse.ArgumentTypeError(f"must be PART=SECONDS with a part of {', '.join(PARTS)}, got {text!r}")
    return part, float(seconds)


def make_plan(options: argparse.Namespace) -> Plan:
    """The plan of the command line."""
    sizes = TINY
    if not options.tiny:
        sizes = dataclasses.replace(
            FULL, load_s=options.load_s, saturation_s=options.saturation_s, fractions=tuple(options.fractions)
        )
    return Plan(
        models=tuple(options.models), parts=tuple(options.parts), switch_parts=tuple(options.switch_parts),
        variants=tuple(options.variants), limits_s=LIMITS_S | dict(options.limits), default_s=options.limit_s,
        switch_limit_s=options.switch_limit_s, is_tiny=options.tiny, sizes=sizes, peer_limit_s=options.peer_limit_s,
        peers=tuple(options.peers),
    )  # fmt: skip


def main(options: argparse.Namespace, argv: list[str]) -> None:
    """``--gpu``, from parsed options.

    Raises:
        ValueError: there is no GPU, and ``--tiny`` was not given.
    """
    if not options.tiny and not torch.cuda.is_available():
        raise ValueError("--gpu needs a CUDA GPU; --tiny runs every part on tiny models without one.")
    output = options.output or Path("eval/results/bench_engine_gpu.json")
    report = run(output, make_plan(options), "python -m eval.bench_engine " + " ".join(argv), options.add)
    if bench_engine_plots.can_draw():
        bench_engine_plots.draw(report, output.with_suffix(".png"))
    else:
        print(f"no matplotlib here: python -m eval.bench_engine --plots {output} draws where it is", file=sys.stderr)
    print(markdown(report))
