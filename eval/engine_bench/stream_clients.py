"""Clients of :mod:`eval.bench_serve`: a process that reads many streams. Run by its path, it imports little.

Says "ready"; reads a line of JSON, [host, port, requests]; writes [seconds to the first token, tokens] of each, or of
one that failed what is wrong.
"""

import asyncio
import importlib
import json
import sys
import time
from typing import Any


async def http_stream(host: str, port: int, body: str, start: float) -> tuple[float, int]:
    """One completion: when its first token came, and how many came."""
    reader, writer = await asyncio.open_connection(host, port, limit=1 << 20)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n{body}".encode())
    await writer.drain()
    first, count = 0.0, 0
    status = await reader.readline()
    if b" 200 " not in status:
        raise RuntimeError(f"{status.decode().strip() or 'no answer'}: {(await reader.read()).decode()[-300:]}")
    while line := await reader.readline():
        if b'"error"' in line:
            raise RuntimeError(line.decode()[:300])
        if line.startswith(b"data: {"):
            first = first or time.perf_counter() - start
            usage = json.loads(line[6:]).get("usage") if b'"usage"' in line else None
            count = usage["completion_tokens"] if usage else count
    writer.close()
    if not count:
        raise RuntimeError("the stream ended without its usage")
    return first, count


async def http(host: str, port: int, bodies: list[str]) -> list[Any]:
    """Completions, at once."""
    start = time.perf_counter()
    streams = (http_stream(host, port, body, start) for body in bodies)
    return await asyncio.gather(*streams, return_exceptions=True)


async def grpc(host: str, port: int, requests: list[tuple[list[int], int]]) -> list[Any]:
    """The same, without a gateway."""
    from grpc import aio
    from smg_grpc_proto import vllm_engine_pb2 as pb
    from smg_grpc_proto import vllm_engine_pb2_grpc

    async with aio.insecure_channel(f"{host}:{port}") as channel:
        stub = vllm_engine_pb2_grpc.VllmEngineStub(channel)
        start = time.perf_counter()

        async def one(ids: list[int], new: int) -> tuple[float, int]:
            params = pb.SamplingParams(temperature=0.8, top_k=50, max_tokens=new)
            tokens = pb.TokenizedInput(input_ids=ids)
            first, count = 0.0, 0
            async for message in stub.Generate(
                pb.GenerateRequest(tokenized=tokens, sampling_params=params, stream=True)
            ):
                first = first or time.perf_counter() - start
                count += len(message.chunk.token_ids)
            return first, count

        return await asyncio.gather(*(one(ids, new) for ids, new in requests), return_exceptions=True)


def main() -> None:
    """Run the client."""
    client: Any = {"http": http, "grpc": grpc}[sys.argv[1]]
    if client is grpc:
        # Takes a while; the package finds its modules as attributes alone.
        _ = importlib.import_module("smg_grpc_proto").vllm_engine_pb2_grpc
    print("ready", flush=True)
    got = asyncio.run(client(*json.loads(sys.stdin.readline())))
    print(json.dumps([f"{type(x).__name__}: {x}" if isinstance(x, Exception) else x for x in got]))


if __name__ == "__main__":
    main()
