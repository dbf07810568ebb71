"""The command ``hf-paged serve``."""

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.distributed import DistributedConfig
from transformers.utils import logging

from ..engine import Engine, EngineConfig
from ..errors import UnsupportedModelError
from . import Limits, check_gateway, require_extra, serve

SWITCH_S = 5e-4
KEY = "HF_PAGED_API_KEY"
"""The environment variable that has a key which is on no command line."""


def add_serve_parser(commands: Any) -> None:
    """Add the command to those of ``hf-paged``."""
    parser = commands.add_parser(
        "serve", help="an OpenAI-compatible server",
        description="Loads a model, and serves it through the gateway SMG until SIGTERM or Ctrl-C, which let running "
        "requests end first. Under torchrun the model is sharded over its processes, and rank 0 serves. Needs "
        'pip install "hf-paged[serve]".',
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )  # fmt: skip
    parser.add_argument("model", metavar="MODEL", help="folder or hub id of a model")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; others than loopback need a key")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on; 0: any free one")
    parser.add_argument("--gateway", default="smg", help='"smg", or "none": the gRPC service alone')
    parser.add_argument("--replicas", type=int, default=1, help="engines behind the gateway, each a process and a GPU")
    parser.add_argument("--api-key", help=f"that clients must send (better: the variable {KEY})")
    parser.add_argument("--served-model-name", help="what clients call the model (default: MODEL)")
    parser.add_argument(
        "--adapter", action="append", default=[], metavar="NAME=PATH",
        help="a LoRA adapter of PEFT, folder or hub id, which clients ask for as the model NAME; may be repeated",
    )  # fmt: skip
    parser.add_argument("--device", help="torch device (default: cuda if there is one, else cpu)")
    parser.add_argument("--dtype", default="auto", help="of the weights, as for from_pretrained")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")
    parser.add_argument("--max-num-seqs", type=int, default=256, help="sequences that run at a time")
    parser.add_argument("--max-waiting", type=int, default=1024, help="requests that wait; more get status 429")
    parser.add_argument("--max-model-len", type=int, help="tokens of a request (default: what the model's config says)")
    parser.add_argument("--memory-fraction", type=float, default=0.9, help="of the free memory, for pages")
    parser.add_argument("--kv-dtype", default="auto", help='"auto", "fp8" or "int8"')
    parser.add_argument("--metrics-port", type=int, help="of Prometheus metrics, on loopback; each replica has its own")
    parser.add_argument("--trace", metavar="FILE", help="steps and requests, written at the end (.json: Chrome trace)")
    parser.add_argument("--request-seconds", type=float, default=3600.0, help="after which a request ends")
    parser.add_argument("--no-warm-up", action="store_true", help="capture steps when they are first needed")


def serve_command(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    """Run it; returns the exit status."""
    try:
        require_extra()
    except ImportError as error:
        parser.error(str(error))
    from .server import Server, run_until_signal

    logging.set_verbosity_warning()
    # The thread of the steps must not wait for that of the messages for as long as Python lets it by itself.
    sys.setswitchinterval(SWITCH_S)
    try:
        check_gateway(options.gateway)
        _check_together(options)
        limits = Limits(request_seconds=options.request_seconds)
        config = EngineConfig(
            max_num_seqs=options.max_num_seqs, max_waiting=options.max_waiting, max_model_len=options.max_model_len,
            max_batch_tokens=max(EngineConfig().max_batch_tokens, options.max_num_seqs),
            memory_fraction=options.memory_fraction, kv_dtype=options.kv_dtype,
            # Records that nobody can ask for would be memory that grows for the first 100,000 requests.
            trace_steps=1 if options.trace is None else EngineConfig().trace_steps,
        )  # fmt: skip
        trust = options.trust_remote_code
        tokenizer = AutoTokenizer.from_pretrained(options.model, trust_remote_code=trust)
        if options.replicas > 1:
            return _serve_replicas(parser, options, tokenizer, _device_of(options), limits)
        adapters = _adapters_of(options)
        engine = Engine(_load(options, adapters), config)
    except (ValueError, TypeError, OSError, ImportError, UnsupportedModelError) as error:
        parser.error(f"{options.model!r}: {' '.join(str(error).split())}")
    if not engine.ranks.leads:
        # Rank 0 hears them as well, and lets requests end first.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        engine.close()
        return 0
    with engine:
        if not options.no_warm_up:
            if adapters:
                # What is captured from here on has them.
                engine.generate([[0]], adapter=None, generation_config=GenerationConfig(max_new_tokens=1))
            engine.warm_up()

        def make() -> Server:
            return serve(
                engine, tokenizer, host=options.host, port=options.port, gateway=options.gateway,
                model_name=options.served_model_name or options.model,
                api_key=options.api_key or os.environ.get(KEY), metrics_port=options.metrics_port, limits=limits,
                adapters=list(adapters),
            )  # fmt: skip

        def announce(server: Server) -> None:
            _announce(server.model_name, server.address, [server.metrics_address])
            weights = sum(p.nbytes for p in {id(p): p for p in engine.model.parameters()}.values())
            tokens = engine.stats().pages_total * config.page_size
            device = engine.model.device
            print(f"on {device}: weights of {weights / 2**30:.2f} GiB, a cache of {tokens:,} tokens", flush=True)

        try:
            run_until_signal(make, announce)
            if options.trace is not None:
                print(f"trace: {engine.trace(options.trace)}", flush=True)
        except (ValueError, OSError, RuntimeError) as error:
            parser.exit(1, f"hf-paged serve: error: {error}\n")
    return 0


def _check_together(options: argparse.Namespace) -> None:
    if options.replicas < 1:
        raise ValueError(f"--replicas must be at least 1, got {options.replicas}.")
    if options.trace is not None and Path(options.trace).suffix not in (".json", ".csv"):
        raise ValueError(f"--trace must end in .json or .csv, got {options.trace!r}.")
    if options.replicas > 1 and options.trace is not None:
        raise ValueError("--trace is of one engine: leave --replicas out.")
    if options.replicas > 1 and _num_ranks() > 1:
        raise ValueError("--replicas cannot be under torchrun, whose processes run one sharded model: leave it out.")
    if options.adapter and (options.replicas > 1 or _num_ranks() > 1):
        raise ValueError("--adapter is served by one engine in one process: leave --replicas out, and torchrun.")
    if options.replicas > 1 and options.gateway == "none":
        raise ValueError('--replicas needs a gateway; without one, start the command several times, each with "none".')


def _serve_replicas(
    parser: argparse.ArgumentParser, options: argparse.Namespace, tokenizer: Any, device: str, limits: Limits
) -> int:
    """Run engines as processes behind one gateway; returns the exit status."""
    from .replicas import Replicas, devices_of
    from .server import run_until_signal

    count = options.replicas
    devices = devices_of(count, device, torch.cuda.device_count)
    # Of one device each takes its part.
    fraction = options.memory_fraction / (count if len(set(devices)) == 1 else 1)
    name = options.served_model_name or options.model
    given = {
        "dtype": options.dtype, "max-num-seqs": options.max_num_seqs, "max-waiting": options.max_waiting,
        "max-model-len": options.max_model_len, "memory-fraction": fraction, "kv-dtype": options.kv_dtype,
        "request-seconds": options.request_seconds, "served-model-name": name,
    }  # fmt: skip
    arguments = ["serve", options.model, *(f"--{key}={value}" for key, value in given.items() if value is not None)]
    arguments += [f"--{key}" for key in ("trust-remote-code", "no-warm-up") if getattr(options, key.replace("-", "_"))]
    environment = {}
    if "OMP_NUM_THREADS" not in os.environ and devices[0] == "cpu":
        environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // count))

    def make() -> Replicas:
        return Replicas(
            [[*arguments, f"--device={own}"] for own in devices], tokenizer, model_name=name, host=options.host,
            port=options.port, api_key=options.api_key or os.environ.get(KEY), limits=limits,
            metrics_port=options.metrics_port, environment=environment,
        )  # fmt: skip

    try:
        run_until_signal(make, lambda made: _announce(made.model_name, made.address, made.metrics_addresses))
    except (ValueError, OSError, RuntimeError) as error:
        parser.exit(1, f"hf-paged serve: error: {error}\n")
    return 0


def _announce(name: str, address: str, metrics: Sequence[str | None]) -> None:
    suffix = "/v1" if address.startswith("http") else " (gRPC)"
    print(f"{name} is served at {address}{suffix}", flush=True)
    for where in metrics:
        if where is not None:
            print(f"metrics: {where}", flush=True)


def _num_ranks() -> int:
    """Processes that torchrun has started. It sets LOCAL_RANK; a cluster's job may have a WORLD_SIZE of its own."""
    return int(os.environ["WORLD_SIZE"]) if "LOCAL_RANK" in os.environ else 1


def _device_of(options: argparse.Namespace) -> str:
    return options.device or ("cuda" if torch.cuda.is_available() else "cpu")


def _adapters_of(options: argparse.Namespace) -> dict[str, str]:
    """Names and paths of adapters.

    Raises:
        ValueError: they are not given as NAME=PATH, or two have one name.
    """
    found: dict[str, str] = {}
    for given in options.adapter:
        name, separator, path = given.partition("=")
        if not (separator and name and path) or name in found:
            raise ValueError(f"--adapter must be NAME=PATH, each name once, got {given!r}.")
        found[name] = path
    return found


def _with_adapters(model: Any, adapters: dict[str, str]) -> Any:
    """The model with these in it.

    Raises:
        ImportError: PEFT is not installed.
    """
    try:
        from peft import PeftModel
    except ImportError:
        raise ImportError("--adapter needs PEFT: pip install peft") from None
    made: Any = None
    for name, path in adapters.items():
        # In the model's dtype, not in float32 as for training.
        if made is None:
            made = PeftModel.from_pretrained(model, path, adapter_name=name, autocast_adapter_dtype=False)
        else:
            made.load_adapter(path, adapter_name=name, autocast_adapter_dtype=False)
    return made.eval().get_base_model()


def _load(options: argparse.Namespace, adapters: dict[str, str]) -> Any:
    """The model with its adapters, on its device; under ``torchrun`` this process' part of it."""
    num_processes = _num_ranks()
    kwargs: dict[str, Any] = {
        "dtype": options.dtype, "attn_implementation": "paged_flash", "trust_remote_code": options.trust_remote_code
    }  # fmt: skip
    if num_processes == 1:
        device = _device_of(options)
        model = AutoModelForCausalLM.from_pretrained(options.model, **kwargs).to(device).eval()
        return _with_adapters(model, adapters) if adapters else model
    if options.device is not None:
        raise ValueError(
            f"--device={options.device} cannot be chosen under torchrun: each of the {num_processes} processes has one."
        )
    kwargs["distributed_config"] = DistributedConfig(tp_size=num_processes)
    return AutoModelForCausalLM.from_pretrained(options.model, **kwargs).eval()
