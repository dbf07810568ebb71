"""What a server keeps of requests that have ended: nothing. Objects are counted, not bytes."""

import asyncio
import gc
import random
import threading
import time
from collections import Counter, deque
from collections.abc import Mapping, Set
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_paged
from hf_paged.serve import require_extra, serve

try:
    require_extra()
except ImportError as error:
    pytest.skip(str(error), allow_module_level=True)

SMALL_MODEL = Path(__file__).parent.parent / "assets" / "small_model"
NUM_PAGES = 40


def sizes_of(root: object) -> Counter[str]:
    """Entries of all containers that are reached through attributes of this package's objects, by the attributes' path.

    What an object outside this package holds is not looked at.
    """
    found, seen = Counter[str](), set[int]()

    def visit(value: object, path: str) -> None:
        if id(value) in seen:
            return
        if isinstance(value, Mapping):
            found[path] += len(value)
            parts = [(part, path) for pair in value.items() for part in pair]
        elif isinstance(value, (list, tuple, Set, deque)):
            found[path] += len(value)
            parts = [(part, path) for part in value]
        elif type(value).__module__.startswith("hf_paged"):
            names = [*getattr(value, "__dict__", ()), *getattr(type(value), "__slots__", ())]
            parts = [(getattr(value, name, None), f"{path}.{name}") for name in names]
        else:
            return
        seen.add(id(value))
        for part, its_path in parts:
            visit(part, its_path)

    visit(root, "server")
    return found


def alive() -> Counter[str]:
    """Objects of this package's classes, and messages, by class. Those of gRPC come and go with the client as well."""
    gc.collect()
    kinds = (type(thing) for thing in gc.get_objects())
    wanted = ("hf_paged", "smg_grpc_proto")
    return Counter(str(kind) for kind in kinds if str(getattr(kind, "__module__", "")).startswith(wanted))


async def ask_all(address: str, rng: random.Random, name: str) -> None:
    """Requests of all kinds, a few of them beside one another: whole, streamed, drawn, refused, left and aborted."""
    import grpc
    from smg_grpc_proto import vllm_engine_pb2 as pb
    from smg_grpc_proto import vllm_engine_pb2_grpc

    async with grpc.aio.insecure_channel(address) as channel:
        stub = vllm_engine_pb2_grpc.VllmEngineStub(channel)

        async def one(number: int) -> None:
            ids = [rng.randrange(100, 400) for _ in range(20)]
            params = pb.SamplingParams(temperature=0.0, max_tokens=3)
            kind = number % 6
            if kind == 1:
                params.temperature, params.n, params.logprobs = 1.0, 2, 2
            if kind == 2:
                params.regex = "[a-z]{1,3}"
            if kind == 3:
                params.top_p = 7.0
            if kind >= 4:
                params.max_tokens = 200
            request = pb.GenerateRequest(
                request_id=f"{name}-{number}", tokenized=pb.TokenizedInput(input_ids=ids), sampling_params=params,
                stream=kind != 0,
            )  # fmt: skip
            call = stub.Generate(request)
            answers = aiter(call)
            if kind == 3:
                with pytest.raises(grpc.aio.AioRpcError, match="top_p must be"):
                    await anext(answers)
                return
            if kind == 4:
                await anext(answers)
                call.cancel()
                return
            if kind == 5:
                await anext(answers)
                await stub.Abort(pb.AbortRequest(request_ids=[request.request_id]))
            async for _ in answers:
                pass

        for first in range(0, 12, 4):
            await asyncio.gather(*(one(number) for number in range(first, first + 4)))


def test_nothing_is_kept_of_requests_that_have_ended():
    model = AutoModelForCausalLM.from_pretrained(SMALL_MODEL, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(SMALL_MODEL)
    config = hf_paged.EngineConfig(num_pages=NUM_PAGES, max_num_seqs=8, max_model_len=256, trace_steps=1)
    with hf_paged.Engine(model, config) as engine, serve(engine, tokenizer, port=0, gateway="none") as server:

        async def rounds() -> list[tuple[Counter[str], Counter[str], int]]:
            rng, kept = random.Random(0), []
            for number in range(3):
                await ask_all(server.address, rng, f"round{number}")
                end = time.monotonic() + 60
                while (server._servicers[0].num_requests or engine.snapshot().requests) and time.monotonic() < end:
                    await asyncio.sleep(0.01)
                assert server._servicers[0].num_requests == 0
                assert 0 < engine.stats().pages_cached <= NUM_PAGES
                await asyncio.to_thread(engine.drop_prefixes)
                assert engine.stats().pages_used == 0
                kept.append((alive(), sizes_of(server), threading.active_count()))
            return kept

        # The first round fills what is made once: workers, grammars, label sets.
        _, first, second = asyncio.run(rounds())
        ended = engine.stats().finished
    assert sum(ended.values()) == 3 * 10
    assert set(ended) >= {"length", "cancelled"}
    assert second == first
    assert first[1]["server.engine.loop.trace.requests"] == 1  # The walk has come there.
