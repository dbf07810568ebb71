"""What the server costs: the same requests in the process of the engine, and through the gateway.

    python -m eval.bench_serve --model qwen3-0.6b --streams 256

Random weights, no eos, sampled with top-k 50; every request has the same number of new tokens. Three runs on one warm
engine: `submit` with iterators, the gRPC service alone, and the whole server (guard, gateway, HTTP streams). Clients of
the last two are processes of their own. Then guided beside unguided requests in the process: a grammar that allows
half of the tokens, whose mask costs what a mask of llguidance's size costs to send, and nothing to find. A part that
fails is reported, and the others run.
"""

import asyncio
import json
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

import hf_paged
from eval import command_line
from eval.engine_bench.models import MODELS, TINY, build

SMALL_MODEL = Path(__file__).parent.parent / "integration_tests" / "assets" / "small_model"
SWITCH_S = 5e-4
"""Of the command: steps wait less for messages."""
CLIENTS = 4
"""Processes that read streams."""


class HalfOfTheTokens:
    """A matcher that allows even tokens."""

    def fill_bitmask(self, bitmask: np.ndarray) -> None:
        """Even tokens."""
        bitmask[:] = 0x55555555

    def accept(self, token_id: int) -> bool:
        """Whether it is even."""
        return token_id % 2 == 0


def in_process(engine: hf_paged.Engine, prompts: list[list[int]], new: int, **options: Any) -> dict[str, float]:
    """All requests at once, read as they come."""

    async def one(prompt: list[int]) -> tuple[float, int]:
        handle = engine.submit(prompt, generation_config=sampled(new), **options)
        first, count = 0.0, 0
        async for _ in handle:
            first = first or time.perf_counter() - start
            count += 1
        return first, count

    async def every() -> list[tuple[float, int]]:
        return await asyncio.gather(*(one(prompt) for prompt in prompts))

    start = time.perf_counter()
    got = asyncio.run(every())
    return summary(got, time.perf_counter() - start)


def sampled(new: int) -> GenerationConfig:
    """Of every request."""
    return GenerationConfig(max_new_tokens=new, do_sample=True, top_k=50, temperature=0.8, pad_token_id=0)


def summary(got: list[tuple[float, int]], seconds: float) -> dict[str, float]:
    """Of the requests' times to the first token and numbers of tokens."""
    firsts = sorted(first for first, _ in got)
    return {
        "tokens": sum(count for _, count in got),
        "tokens_per_s": sum(count for _, count in got) / seconds,
        "median_first_s": firsts[len(firsts) // 2],
        "last_first_s": firsts[-1],
    }


def through(server: Any, kind: str, jobs: list[Any]) -> dict[str, float]:
    """All requests at once, by processes of clients, which say when they are ready."""
    host, port = server.address.removeprefix("http://").rsplit(":", 1)
    script = Path(__file__).parent / "engine_bench" / "stream_clients.py"
    clients = [
        subprocess.Popen([sys.executable, str(script), kind], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(CLIENTS)
    ]
    for client in clients:
        assert client.stdout is not None
        client.stdout.readline()
    start = time.perf_counter()
    for i, client in enumerate(clients):
        assert client.stdin is not None
        client.stdin.write(json.dumps([host, int(port), jobs[i::CLIENTS]]) + "\n")
        client.stdin.flush()
    got = [entry for client in clients for entry in json.loads(client.communicate()[0])]
    failed = [entry for entry in got if isinstance(entry, str)]
    if failed:
        raise RuntimeError(f"{len(failed)} of {len(got)} requests failed: {' | '.join(sorted(set(failed))[:3])}")
    return summary(got, time.perf_counter() - start)


def tokenizer_of_size(size: int) -> PreTrainedTokenizerFast:
    """The small model's tokenizer with made-up words, so that each token of the model has a text that is streamed."""
    made = json.loads(AutoTokenizer.from_pretrained(SMALL_MODEL).backend_tokenizer.to_str())
    words = made["model"]["vocab"]
    known = {*words.values(), *(token["id"] for token in made["added_tokens"])}
    words.update({f"\u0120t{i}": i for i in range(size) if i not in known})
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(made)))


def main() -> None:
    """Run the command."""
    parser = command_line.make_parser("bench_serve", __doc__)
    parser.add_argument("--model", default="qwen3-0.6b", choices=sorted(MODELS), help="shape of the model")
    parser.add_argument("--tiny", action="store_true", help="a tiny model of that family, for a CPU")
    parser.add_argument("--streams", type=int, default=256, help="requests at once")
    parser.add_argument("--new", type=int, default=512, help="new tokens of each")
    parser.add_argument("--output", type=command_line.output_file, help="a JSON file for the result")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = build(options.model, TINY | {"vocab_size": 4096} if options.tiny else None, device=device)
    tokenizer = tokenizer_of_size(model.config.vocab_size)
    texts = [f"request {i}: " + "import os\n" * 40 for i in range(options.streams)]
    prompts = [[token % model.config.vocab_size for token in tokenizer(text).input_ids] for text in texts]
    longest = max(map(len, prompts)) + options.new + 1
    config = hf_paged.EngineConfig(max_num_seqs=options.streams, max_model_len=longest, prefix_caching=False)
    report: dict[str, Any] = {"model": options.model, "device": device, "streams": options.streams, "new": options.new}
    with hf_paged.Engine(model, config) as engine:
        engine.warm_up()
        in_process(engine, prompts[:8], 8)

        def submitted(**arguments: Any) -> dict[str, float]:
            return in_process(engine, prompts, options.new, **arguments)

        def by_grpc() -> dict[str, float]:
            with hf_paged.serve(engine, tokenizer, port=0, gateway="none") as server:
                return through(server, "grpc", [(ids, options.new) for ids in prompts])

        def by_gateway() -> dict[str, float]:
            body = {
                "model": "bench", "max_tokens": options.new, "temperature": 0.8, "top_k": 50, "stream": True,
                "stream_options": {"include_usage": True},
            }  # fmt: skip
            with hf_paged.serve(engine, tokenizer, port=0, model_name="bench") as server:
                return through(server, "http", [json.dumps({**body, "prompt": text}) for text in texts])

        parts: dict[str, Callable[[], dict[str, float]]] = {
            "in process": submitted,
            "gRPC": by_grpc,
            "gateway": by_gateway,
            "in process again": submitted,
            "guided": lambda: submitted(grammar=HalfOfTheTokens),
            "penalised": lambda: submitted(frequency_penalty=0.1),
        }
        interval = sys.getswitchinterval()
        for name, part in parts.items():
            # As the command does.
            sys.setswitchinterval(SWITCH_S if name in ("gRPC", "gateway") else interval)
            try:
                report[name] = part()
            except Exception as error:
                traceback.print_exc()
                report[name] = {"error": f"{type(error).__name__}: {error}"}
            print(f"{name:17} {report[name]}", flush=True)
            if options.output is not None:
                options.output.write_text(json.dumps(report, indent=1) + "\n")
    rates = {name: report[name].get("tokens_per_s") for name in parts}
    base = max(rates[name] or 0.0 for name in ("in process", "in process again"))
    for name in ("gRPC", "gateway", "guided", "penalised"):
        if base and rates[name]:
            print(f"{name}: {rates[name] / base:.1%} of the tokens/s in the process")
    if None in rates.values():
        sys.exit(1)


if __name__ == "__main__":
    command_line.run(main)
