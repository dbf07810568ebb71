"""What the soak of the server takes for an end, and for a fault."""

import copy
import json
import random

import pytest

from eval.soak_serve import CLIENTS, FIELDS, Load, dechunked, faults_of, how_it_ended

STREAM = b"".join(
    b'data: {"choices":[{"text":"%b","finish_reason":%b}]}\n\n' % p for p in ((b"a", b"null"), (b"b", b'"length"'))
)
EVENTS = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"


def answer(status: int, body: bytes, length: int | None = None) -> bytes:
    return f"HTTP/1.1 {status} X\r\nContent-Length: {len(body) if length is None else length}\r\n\r\n".encode() + body


WHOLE = json.dumps({"choices": [{"text": "ab", "finish_reason": "stop"}]}).encode()


@pytest.mark.parametrize(
    ("data", "end"),
    [
        (b"", "closed"),
        (answer(200, WHOLE), "done"),
        (answer(200, WHOLE, len(WHOLE) + 1), "cut"),
        (answer(200, b'{"choices":[{"text":"a","finish_reason":null}]}'), "cut"),
        (answer(400, b"no"), "refused"),
        (answer(500, b"no"), "error"),
        (EVENTS + STREAM + b"data: [DONE]\n\n", "done"),
        (EVENTS + STREAM, "cut"),
        (EVENTS + b'data: {"error": {"message": "x"}}\n\ndata: [DONE]\n\n', "error"),
    ],
    ids=str,
)
def test_ends(data, end):
    assert how_it_ended(data)[0] == end
    if end == "done":
        assert how_it_ended(data)[1] == "ab"


def test_chunks():
    parts = [b"abc", b"d" * 20, b"\r\n0\r\n"]
    data = b"".join(f"{len(part):x}\r\n".encode() + part + b"\r\n" for part in parts)
    assert dechunked(data + b"0\r\n\r\n") == (b"".join(parts), True)
    for cut in range(len(data)):
        body, is_whole = dechunked(data[:cut])
        assert not is_whole
        assert b"".join(parts).startswith(body)


def test_nonsense_is_what_its_kind_says():
    load = Load("localhost", 1, random.Random(3))
    for _ in range(300):
        data, patience, _ = load._request("nonsense")
        head, _, body = data.partition(b"\r\n\r\n")
        if patience is None:  # Its client waits for an answer, so there must be one to come.
            assert f"Content-Length: {len(body)}".encode() in head
    assert len(set(FIELDS)) == len(FIELDS)


def test_faults():
    engine = {"requests_running": 0, "requests_waiting": 0, "pages": 9, "pages_used": 3, "pages_cached": 3}
    line = {"samples": 90, "last_mib": 500.0, "mib_per_minute": 0.5, "standard_error": 0.1}
    good = {
        "without an end": [], "different texts": [], "pages": {"all kinds": [engine]}, "exit status": 0,
        "errors of late requests": 0,
        "phases": {name: {"ends": {"healthy": {"done": 5}}} for name in (*CLIENTS, "all kinds")},
        "memory": {"engine 0": line},
    }  # fmt: skip
    assert faults_of(good) == []
    changes = [
        ("without an end", [{}]), ("different texts", ["a"]), ("exit status", 1), ("errors of late requests", 2),
        ("pages", {"all kinds": [engine | {"pages_used": 4}]}),
        ("pages", {"all kinds": [engine | {"requests_running": 1}]}),
        ("phases", good["phases"] | {"all kinds": {"ends": {"healthy": {"done": 5, "error": 1}}}}),
        ("memory", {"engine 0": line | {"mib_per_minute": 5.0}}),
    ]  # fmt: skip
    for name, value in changes:
        assert len(faults_of(copy.deepcopy(good) | {name: value})) == 1, name
