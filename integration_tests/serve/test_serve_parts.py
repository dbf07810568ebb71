"""Parts of the server that need nothing that is not installed with the package."""

import asyncio
import contextlib
import importlib.metadata
import json
import sys
from types import SimpleNamespace

import pytest

from hf_paged import cli
from hf_paged.serve import Limits, command, guard, require_extra, serve
from hf_paged.serve.gateway import free_ports


def test_a_missing_extra_is_named(monkeypatch, capsys):
    def version(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(ImportError, match=r'smg-grpc-proto, .*: pip install "hf-paged\[serve\]"'):
        require_extra()
    with pytest.raises(SystemExit) as raised:
        cli.main(["serve", "some/model"])
    assert raised.value.code == 2
    assert 'pip install "hf-paged[serve]"' in capsys.readouterr().err


def test_gateways_are_named():
    with pytest.raises(ValueError, match=r"gateway must be one of .*smg.*none.*, got 'nginx'"):
        serve(None, None, gateway="nginx")
    with pytest.raises(ValueError, match=r"gateway \"dynamo\" is not served: its workers register .* Use one of"):
        serve(None, None, gateway="dynamo")
    with pytest.raises(ValueError, match="Limits: n must be a number above 0, got 0"):
        Limits(n=0)


@pytest.mark.parametrize("status", ["ok", "degraded", "down"])
def test_health_is_that_of_the_file(tmp_path, status):
    file = tmp_path / "status.json"
    file.write_text(json.dumps({"status": status, "replicas": []}))
    head, body = guard.health(str(file)).split(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 503 " if status == "down" else b"HTTP/1.1 200 ")
    assert f"Content-Length: {len(body)}".encode() in head
    assert json.loads(body)["status"] == status


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--replicas", "0"], "--replicas must be at least 1, got 0"),
        (["--replicas", "2", "--gateway", "none"], "--replicas needs a gateway"),
        (["--replicas", "2", "--trace", "a.json"], "--trace is of one engine"),
        (["--trace", "a.txt"], "--trace must end in .json or .csv, got 'a.txt'"),
        (["--replicas", "2", "--adapter", "a=b"], "--adapter is served by one engine"),
        (["--gateway", "dynamo"], 'gateway "dynamo" is not served'),
    ],
    ids=str,
)
def test_options_that_are_refused(monkeypatch, capsys, options, message):
    monkeypatch.setattr(command, "require_extra", lambda: None)
    monkeypatch.setitem(sys.modules, "hf_paged.serve.server", SimpleNamespace(Server=None, run_until_signal=None))
    with pytest.raises(SystemExit) as raised:
        cli.main(["serve", "some/model", *options])
    assert raised.value.code == 2
    assert message in capsys.readouterr().err


def request(head: str, body: bytes = b"") -> bytes:
    return head.replace("\n", "\r\n").encode() + body


async def reader_of(data: bytes) -> asyncio.StreamReader:
    reader = asyncio.StreamReader(limit=guard.HEAD_BYTES)
    reader.feed_data(data)
    reader.feed_eof()
    return reader


def read(data: bytes, most: int = 1000):
    async def run():
        return await guard.read_request(await reader_of(data), most, 5.0)

    return asyncio.run(run())


def test_requests_are_read():
    head = "POST /v1/completions?x=1 HTTP/1.1\nHost: a\nContent-Length: 4\n\n"
    assert read(request(head, b"{}ab more")) == (request(head), "/v1/completions", b"{}ab")
    assert read(b"") is None
    assert read(request("GET /health HTTP/1.1\nHost: a\n\n"))[1:] == ("/health", b"")


@pytest.mark.parametrize(
    ("head", "status"),
    [
        ("POST /health HTTP/1.1\nContent-Length: 1001\n\n", 413),
        ("POST /health HTTP/1.1\nContent-Length: 4\nContent-Length: 5\n\n", 400),
        ("POST /health HTTP/1.1\nContent-Length: -1\n\n", 400),
        ("POST /health HTTP/1.1\nContent-Length: 9\n\n", 400),
        ("POST /health HTTP/1.1\nTransfer-Encoding: chunked\n\n", 411),
        ("POST /health HTTP/1.1\nContent-Length : 4\n\n", 400),
        ("POST /health HTTP/1.1\nA: b\n c: d\n\n", 400),
        ("POST /health HTTP/1.1\nExpect: 100-continue\nContent-Length: 4\n\n", 417),
        ("POST /health HTTP/1.1\nContent-Length: " + "9" * 5000 + "\n\n", 413),
        ("PRI * HTTP/2.0\n\n", 400),
        ("nonsense\n\n", 400),
        ("POST /workers HTTP/1.1\nContent-Length: 4\n\n", 404),
        ("POST //workers HTTP/1.1\nContent-Length: 4\n\n", 404),
        ("POST /v1/../workers HTTP/1.1\nContent-Length: 4\n\n", 404),
        ("POST /flush_cache?a=/v1/models HTTP/1.1\nContent-Length: 4\n\n", 404),
        ("GET http://a/v1/models HTTP/1.1\n\n", 404),
        ("POST /v1/responses HTTP/1.1\nContent-Length: 4\n\n", 404),
        ("GET /health HTTP/1.1\nA: " + "b" * 70_000 + "\n\n", 431),
        ("GET /health HTTP/1.1\nA: b", 400),
    ],
)
def test_requests_that_are_not_read(head, status):
    with pytest.raises(guard.Refused) as raised:
        read(request(head, b"abcd"))
    assert raised.value.status == status


@pytest.mark.parametrize(
    "line",
    [
        "POST /health HTTP/1.1\nContent-Length:4",
        "POST /health?a\nb HTTP/1.1",
        "\nPOST /health HTTP/1.1",
        "POST /health HTTP/1.1\r",
    ],
)
def test_a_line_that_the_gateway_would_end_elsewhere_is_not_passed(line):
    with pytest.raises(guard.Refused) as raised:
        read(f"{line}\r\nHost: a\r\n\r\nabcd".encode())
    assert raised.value.status == 400


@pytest.mark.parametrize(
    ("path", "fields", "reason"),
    [
        (guard.CHAT, {"logit_bias": {"5": 1}}, "logit_bias is not served here"),
        (guard.CHAT, {"logit_bias": {}, "priority": 0, "cache_salt": None}, None),
        (guard.CHAT, {"generation_config": "{}"}, "generation_config is not served here"),
        (guard.CHAT, {"logprobs": True, "top_logprobs": 2}, None),
        (guard.CHAT, {"prompt_logprobs": 0}, "prompt_logprobs is not served here"),
        (guard.CHAT, {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]}, None),
        (guard.CHAT, {"messages": [{"content": [{"type": "image_url", "image_url": {}}]}]}, "messages may have text"),
        (guard.CHAT, {"messages": "a"}, None),
        (guard.COMPLETIONS, {"prompt": "a", "logprobs": None}, None),
        (guard.COMPLETIONS, {"prompt": "a", "logprobs": 0}, "logprobs is not served here"),
        (guard.COMPLETIONS, {"prompt": "a", "n": 2, "best_of": 2}, None),
        (guard.COMPLETIONS, {"prompt": "a", "n": 2, "best_of": 3}, "best_of=3 is not served: only that of n, 2"),
        (guard.COMPLETIONS, {"prompt": ["a", 5]}, "prompt must be a text or a list of texts"),
        (guard.COMPLETIONS, {"prompt": ["a", "b"], "suffix": ""}, None),
        ("/v1/messages", {"logit_bias": {"5": 1}}, None),
    ],
    ids=str,
)
def test_what_the_gateway_would_drop(path, fields, reason):
    found = guard.objection(path, json.dumps(fields).encode())
    assert found is None if reason is None else found.startswith(reason)


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b"\xff", b"[" * 100_000])
def test_what_is_no_object_goes_to_the_gateway(body):
    assert guard.objection(guard.CHAT, body) is None


@pytest.mark.parametrize(
    ("host", "is_accepted"),
    [("localhost:8000", True), ("127.0.0.1", True), ("[::1]:80", True), ("[::1]", True), ("LOCALHOST", True),
     ("evil.example:8000", False), ("localhost.evil.example", False), ("127.0.0.1.evil:1", False), ("", False)],
)  # fmt: skip
def test_hosts(host, is_accepted):
    hosts = frozenset({"localhost", "127.0.0.1", "[::1]"})
    found = guard.host_objection(request(f"GET /health HTTP/1.1\nhOst: {host}\n\n"), hosts)
    assert (found is None) == is_accepted


def test_a_refusal_is_an_answer():
    head, body = guard.refusal(413, "too much").split(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 413 ")
    assert f"Content-Length: {len(body)}".encode() in head
    assert json.loads(body)["error"]["message"] == "too much"


@pytest.mark.parametrize(
    ("names", "expected"),
    [({}, 1), ({"WORLD_SIZE": "4"}, 1), ({"WORLD_SIZE": "4", "RANK": "1", "LOCAL_RANK": "1"}, 4)],
)
def test_only_torchrun_shards_the_model(names, expected, monkeypatch):
    from hf_paged.serve import command

    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in names.items():
        monkeypatch.setenv(name, value)
    assert command._num_ranks() == expected


def test_page_events_of_an_adapter_are_those_of_its_requests():
    """Pages of other adapters are not of its model; names that it never gave are of no harm in what has gone."""
    pytest.importorskip("smg_grpc_proto")
    from hf_paged import PageEventBatch, PagesRemoved, PagesStored
    from hf_paged.engine.scheduling.request import ACTIVE
    from hf_paged.serve.smg import _kv_batch

    salts = (("adapter", "a", None), ("adapter", "a", "tenant"), ("adapter", "b", None), ("adapter", None, None), "own")
    stored = [PagesStored((i,), None, (7, 8), 2, salt) for i, salt in enumerate(salts)]
    batch = PageEventBatch(3, 0.5, (*stored, PagesRemoved((0, 2))))

    def found(adapter):
        events = _kv_batch(batch, adapter).events
        assert [list(event.removed.block_hashes) for event in events if event.HasField("removed")] == [[0, 2]]
        blocks = [event.stored for event in events if event.HasField("stored")]
        return [(x.blocks[0].block_hash, x.cache_salt if x.HasField("cache_salt") else None) for x in blocks]

    assert found("a") == [(0, None), (1, "tenant")]
    assert found("b") == [(2, None)]
    assert found(None) == [(3, None)]
    assert [name for name, _ in found(ACTIVE)] == [0, 1, 2, 3, 4]


@contextlib.asynccontextmanager
async def relaying(port: int):
    """Asks a relay to a gateway on ``port``; gives what comes back."""
    relay = guard.Relay("127.0.0.1", port, 1000)
    server = await asyncio.start_server(relay, "127.0.0.1", 0)

    async def ask(count: int = 1) -> bytes:
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        found = b""
        for number in range(count):
            writer.write(b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n")
            is_last = number == count - 1
            found += await asyncio.wait_for(reader.read() if is_last else reader.readexactly(len(ANSWER)), 30)
        writer.close()
        return found

    try:
        yield ask
    finally:
        server.close()


ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"


def test_a_gateway_that_is_not_there_is_an_answer(monkeypatch):
    monkeypatch.setattr(guard, "CONNECT_DELAYS", (0.01,))

    async def run():
        async with relaying(free_ports(1)[0]) as ask:
            return await ask()

    head, body = asyncio.run(run()).split(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 502 ")
    error = json.loads(body)["error"]
    assert error["type"] == "server_error"
    assert "the gateway cannot be reached" in error["message"]


def test_a_gateway_that_refuses_connections_for_a_while_is_asked_again():
    async def answer(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(ANSWER)
        writer.close()

    async def run():
        port = free_ports(1)[0]
        async with relaying(port) as ask:
            asked = asyncio.create_task(ask())
            await asyncio.sleep(0.1)
            assert not asked.done()
            async with await asyncio.start_server(answer, "127.0.0.1", port):
                return await asked

    assert asyncio.run(run()) == ANSWER


@pytest.mark.parametrize("answered", [0, 1])
def test_a_gateway_that_closes_without_an_answer_is_an_error(answered):
    """The client is told, of a later request of a connection too; answers that have come stay as they are."""

    async def answer(reader, writer):
        for _ in range(answered):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(ANSWER)
            await writer.drain()
        await reader.readuntil(b"\r\n\r\n")
        writer.close()

    async def run():
        gateway = await asyncio.start_server(answer, "127.0.0.1", 0)
        async with gateway, relaying(gateway.sockets[0].getsockname()[1]) as ask:
            return await ask(1 + answered)

    found = asyncio.run(run())
    assert found.startswith(ANSWER * answered)
    rest = found[len(ANSWER) * answered :]
    assert rest.startswith(b"HTTP/1.1 502 ")
    assert b"without an answer" in rest
