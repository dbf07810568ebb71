"""What the server costs: the same requests in the process of the engine, and through the gateway.

    python -m eval.bench_serve --model qwen3-0.6b --streams 256

Random weights, no eos, sampled with top-k 50; every request has the same number of new tokens. Three runs on one warm
engine: `submit` with iterators, the gRPC service alone, and the whole server (guard, gateway, HTTP streams). Clients of
the last two are processes of their own. Then guided beside unguided requests in the process: a grammar that allows
half of the tokens, whose mask costs what a mask of llguidance's size costs to send, and nothing to find.
"""

import asyncio
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer, GenerationConfig

import hf_paged
from eval import command_line
from eval.engine_bench.models import MODELS, TINY, build

SMALL_MODEL = Path(__file__).parent.parent / "integration_tests" / "assets" / "small_model"
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
    got = [tuple(entry) for client in clients for entry in json.loads(client.communicate()[0])]
    return summary(got, time.perf_counter() - start)


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
    model = build(options.model, TINY | {"vocab_size": 1024} if options.tiny else None, device=device)
    tokenizer = AutoTokenizer.from_pretrained(SMALL_MODEL)
    texts = [f"request {i}: " + "import os\n" * 40 for i in range(options.streams)]
    prompts = [[token % model.config.vocab_size for token in tokenizer(text).input_ids] for text in texts]
    longest = max(map(len, prompts)) + options.new + 1
    config = hf_paged.EngineConfig(max_num_seqs=options.streams, max_model_len=longest, prefix_caching=False)
    report: dict[str, Any] = {"model": options.model, "device": device, "streams": options.streams}
    with hf_paged.Engine(model, config) as engine:
        engine.warm_up()
        in_process(engine, prompts[:8], 8)
        report["in process"] = in_process(engine, prompts, options.new)
        with hf_paged.serve(engine, tokenizer, port=0, gateway="none") as server:
            jobs: list[Any] = [(ids, options.new) for ids in prompts]
            report["gRPC"] = through(server, "grpc", jobs)
        with hf_paged.serve(engine, tokenizer, port=0, model_name="bench") as server:
            body = {
                "model": "bench", "max_tokens": options.new, "temperature": 0.8, "top_k": 50, "stream": True,
                "stream_options": {"include_usage": True},
            }  # fmt: skip
            jobs = [json.dumps({**body, "prompt": text}) for text in texts]
            report["gateway"] = through(server, "http", jobs)
        report["in process again"] = in_process(engine, prompts, options.new)
        report["guided"] = in_process(engine, prompts, options.new, grammar=HalfOfTheTokens)
        report["penalised"] = in_process(engine, prompts, options.new, frequency_penalty=0.1)
    for name, found in report.items():
        print(f"{name:17} {found}")
    base = max(report[name]["tokens_per_s"] for name in ("in process", "in process again"))
    for name in ("gRPC", "gateway", "guided", "penalised"):
        print(f"{name}: {report[name]['tokens_per_s'] / base:.1%} of the tokens/s in the process")
    if options.output is not None:
        options.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    command_line.run(main)
