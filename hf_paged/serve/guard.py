"""A relay before the gateway that refuses what the gateway would drop without a word, and routes that control it.

It runs as a process of its own, by its path, and imports the standard library alone. Requests are read and checked;
answers go through as they are.
"""

import argparse
import asyncio
import contextlib
import ctypes
import json
import signal
import sys

HEAD_BYTES = 65_536
HEAD_SECONDS = 30.0
"""How long a client may take to send the head of its first request; the gateway closes idle connections."""
BODY_SECONDS = 60.0
MOST_DIGITS = 18
"""Of a length; Python refuses to read one of thousands."""
BUFFER = 1 << 18
"""Bytes that wait for a slow client before the gateway is not read any more."""

CONNECT_DELAYS = (0.02, 0.05, 0.1, 0.25, 0.5, 1.0)
"""Seconds between attempts to reach the gateway: one that takes many connections at once may refuse some."""
BACKLOG = 4096
"""Connections that wait to be taken; the system may allow fewer."""

SERVED = (
    "/v1/models", "/v1/chat/completions", "/v1/completions", "/health", "/liveness", "/readiness",
)  # fmt: skip
"""What clients may ask for. The gateway has more: routes that add engines, drop caches and start profilers, and others
whose requests may name addresses that it would connect to."""
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
DROPPED: dict[str, dict[str, str]] = {
    CHAT: {
        "logit_bias": "the gateway does not pass it",
        "prompt_logprobs": "the gateway does not return them",
        "generation_config": "send temperature, top_p, max_tokens and the other fields of the protocol",
        "priority": "the gateway does not pass it",
        "cache_salt": "the gateway does not pass it",
        "truncate_prompt_tokens": "send a shorter prompt",
        "lora_path": "name the adapter as the model",
    },
    COMPLETIONS: {
        "logit_bias": "the gateway does not pass it",
        "logprobs": "the gateway does not return them; chat completions have them",
        "prompt_logprobs": "the gateway does not return them",
        "generation_config": "send temperature, top_p, max_tokens and the other fields of the protocol",
        "suffix": "the model completes from the left alone",
        "include_stop_str_in_output": "the gateway does not pass it",
        "priority": "the gateway does not pass it",
        "cache_salt": "the gateway does not pass it",
        "truncate_prompt_tokens": "send a shorter prompt",
        "lora_path": "name the adapter as the model",
    },
}
"""Fields that the gateway reads over, by path, and why they are not served."""
FRAMING = ("content-length", "transfer-encoding")
NEUTRAL: tuple[object, ...] = (None, False, [], {}, "", 0)
"""Values that ask for nothing; logprobs of 0 are asked for."""


class Refused(Exception):
    """A request that is not passed on."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def objection(path: str, body: bytes) -> str | None:
    """Why a request is not passed on, None: it is. What is no JSON object is left to the gateway to refuse."""
    dropped = DROPPED.get(path)
    if dropped is None:
        return None
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError):
        return None
    if not isinstance(fields, dict):
        return None
    for name, reason in dropped.items():
        value = fields.get(name)
        is_asked = name.endswith("logprobs") and type(value) is int
        if is_asked or value not in NEUTRAL:
            return f"{name} is not served here: {reason}. Leave it out."
    if path == CHAT and not _is_text(fields.get("messages")):
        return "messages may have text alone: images, audio and files are not served."
    best_of = fields.get("best_of")
    if path == COMPLETIONS and best_of not in (None, 1, fields.get("n") or 1):
        return f"best_of={best_of!r} is not served: only that of n, {fields.get('n') or 1}."
    prompt = fields.get("prompt")
    if path == COMPLETIONS and isinstance(prompt, list) and any(not isinstance(item, str) for item in prompt):
        return "prompt must be a text or a list of texts: the gateway does not take token ids."
    return None


def _is_text(messages: object) -> bool:
    """Whether all parts of messages are text; what is no list of messages is left to the gateway to refuse."""
    if not isinstance(messages, list):
        return True
    contents = [message.get("content") for message in messages if isinstance(message, dict)]
    parts = [part for content in contents if isinstance(content, list) for part in content]
    return all(not isinstance(part, dict) or part.get("type") in ("text", "refusal") for part in parts)


def host_objection(head: bytes, hosts: frozenset[str]) -> str | None:
    """Why a request's Host is not accepted, None: it is. A page of a browser that was made to find this machine under
    a name of its own sends that name."""
    for line in head.decode("latin-1").split("\r\n")[1:]:
        name, _, value = line.partition(":")
        if name.lower() == "host":
            host = value.strip().lower()
            without_port = host[: host.rfind(":")] if host.rfind(":") > host.rfind("]") else host
            if without_port not in hosts:
                return f"the Host {host[:80]!r} is not served without a key: {', '.join(sorted(hosts))} are."
    return None


async def read_request(
    reader: asyncio.StreamReader, most_bytes: int, seconds: float | None
) -> tuple[bytes, str, bytes] | None:
    """The next request: its head, path and body; None: the client has closed.

    Args:
        reader: of the client.
        most_bytes: of a body.
        seconds: that its head may take; None: any, since the answer to the one before may be on its way.

    Raises:
        Refused: it is too large, too slow, or no HTTP/1.
    """
    try:
        head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), seconds)
    except asyncio.LimitOverrunError:
        raise Refused(431, f"the head of a request must have at most {HEAD_BYTES} bytes.") from None
    except asyncio.IncompleteReadError as error:
        if error.partial:
            raise Refused(400, "the request is not complete.") from None
        return None
    lines = head[:-4].decode("latin-1").split("\r\n")
    parts = lines[0].split(" ")
    # A line feed alone would end the line for the gateway, and what follows would be a header for it alone.
    if len(parts) != 3 or parts[2] not in ("HTTP/1.1", "HTTP/1.0") or not lines[0].isprintable():
        raise Refused(400, "HTTP/1.1 is accepted.")
    headers: dict[str, str] = {}
    for line in lines[1:]:
        name, colon, value = line.partition(":")
        name = name.lower()
        is_readable = colon and "\n" not in line and "\r" not in line and name == name.strip()
        if not is_readable or (name in headers and name in FRAMING):
            raise Refused(400, f"the header {name[:80]!r} cannot be read.")
        headers[name] = value.strip()
    if "transfer-encoding" in headers:
        raise Refused(411, "a body needs a Content-Length.")
    length = headers.get("content-length", "0")
    if not (length.isascii() and length.isdigit()):
        raise Refused(400, "Content-Length must be a number.")
    if len(length) > MOST_DIGITS or int(length) > most_bytes:
        raise Refused(413, f"a body must have at most {most_bytes} bytes, got {length[:MOST_DIGITS]}.")
    path = parts[1].split("?")[0]
    if path not in SERVED:
        raise Refused(404, f"{path[:200]} is not served: {', '.join(SERVED)} are.")
    if headers.get("expect", "").lower() == "100-continue":
        raise Refused(417, "send the body without asking first.")
    try:
        body = await asyncio.wait_for(reader.readexactly(int(length)), BODY_SECONDS)
    except asyncio.IncompleteReadError:
        raise Refused(400, "the request is not complete.") from None
    return head, path, body


def refusal(status: int, message: str) -> bytes:
    """An answer in the words of the OpenAI API, after which the connection is closed."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    body = json.dumps({"error": {"message": message, "type": kind, "param": None, "code": status}})
    data = body.encode()
    head = f"HTTP/1.1 {status} Refused\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n"
    return f"{head}Connection: close\r\n\r\n".encode() + data


def health(status_file: str) -> bytes:
    """An answer to ``/health`` from the file in which it is kept: status 503 where no engine serves."""
    with open(status_file, "rb") as file:
        data = file.read()
    status = "503 Service Unavailable" if json.loads(data)["status"] == "down" else "200 OK"
    head = f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n"
    return f"{head}Connection: close\r\n\r\n".encode() + data


class Relay:
    """Passes connections on.

    Args:
        host, port: of the gateway.
        most_bytes: of a body.
        hosts: names of this server that are accepted; none: any.
        status_file: with the answer to ``/health``, None: the gateway answers.
    """

    def __init__(
        self,
        host: str,
        port: int,
        most_bytes: int,
        hosts: frozenset[str] = frozenset(),
        status_file: str | None = None,
    ) -> None:
        self._host, self._port, self._most_bytes, self._hosts = host, port, most_bytes, hosts
        self._status_file = status_file

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one client."""
        upstream: asyncio.StreamWriter | None = None
        answers: asyncio.Task[None] | None = None
        has_answer = asyncio.Event()
        try:
            while True:
                got = await read_request(reader, self._most_bytes, HEAD_SECONDS if upstream is None else None)
                if got is None:
                    break
                head, path, body = got
                misnamed = host_objection(head, self._hosts) if self._hosts else None
                if misnamed is not None:
                    raise Refused(421, misnamed)
                reason = objection(path, body)
                if reason is not None:
                    raise Refused(400, reason)
                if path == "/health" and self._status_file is not None:
                    if answers is not None:
                        answers.cancel()  # Of an earlier request, whose client has not waited for it.
                    writer.write(health(self._status_file))
                    await writer.drain()
                    break
                if upstream is None:
                    source, upstream = await self._connected()
                    answers = asyncio.create_task(self._pass_back(source, writer, has_answer))
                has_answer.clear()
                upstream.write(head + body)
                await upstream.drain()
        except Refused as refused:
            if answers is not None:
                answers.cancel()  # Nothing of an earlier answer comes behind the refusal.
            with contextlib.suppress(ConnectionError):
                writer.write(refusal(refused.status, str(refused)))
                await writer.drain()
        except (ConnectionError, asyncio.TimeoutError, TimeoutError):
            pass
        finally:
            # A client that is gone is gone for the gateway too, which then cancels its request.
            if answers is not None:
                answers.cancel()
            for one in (upstream, writer):
                if one is not None:
                    with contextlib.suppress(ConnectionError):
                        one.close()

    async def _connected(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A connection to the gateway.

        Raises:
            Refused: it takes none.
        """
        for delay in CONNECT_DELAYS:
            with contextlib.suppress(OSError):
                return await asyncio.open_connection(self._host, self._port, limit=BUFFER)
            await asyncio.sleep(delay)
        try:
            return await asyncio.open_connection(self._host, self._port, limit=BUFFER)
        except OSError as error:
            raise Refused(502, f"the gateway cannot be reached ({error}): try again.") from None

    async def _pass_back(
        self, source: asyncio.StreamReader, writer: asyncio.StreamWriter, has_answer: asyncio.Event
    ) -> None:
        """Pass the gateway's answers on until it closes; ``has_answer``: the request passed on last has some of its."""
        with contextlib.suppress(ConnectionError):
            while data := await source.read(BUFFER):
                has_answer.set()
                writer.write(data)
                await writer.drain()
        if not has_answer.is_set() and not writer.is_closing():
            with contextlib.suppress(ConnectionError):
                writer.write(refusal(502, "the gateway has closed the connection without an answer: try again."))
                await writer.drain()
        writer.close()


async def run(options: argparse.Namespace) -> None:
    """Serve until SIGTERM; connections that are open then go on until they end."""
    hosts = frozenset(options.accept_host or ())
    relay = Relay(options.to_host, options.to_port, options.most_bytes, hosts, options.status_file)
    stop = asyncio.Event()
    open_ones: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        open_ones.add(task)
        try:
            await relay(reader, writer)
        except asyncio.CancelledError:
            pass  # The time to drain is over. asyncio's callback of a cancelled task would print a traceback.
        finally:
            open_ones.discard(task)

    server = await asyncio.start_server(serve, options.host, options.port, limit=HEAD_BYTES, backlog=BACKLOG)
    print(server.sockets[0].getsockname()[1], flush=True)
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    await stop.wait()
    server.close()
    if open_ones:
        await asyncio.wait(open_ones, timeout=options.drain_seconds)


def main() -> None:
    """Run the relay."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG: it ends with the thread that started it.
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--host", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--to-host", required=True)
    parser.add_argument("--to-port", type=int, required=True)
    parser.add_argument("--most-bytes", type=int, required=True)
    parser.add_argument("--accept-host", action="append")
    parser.add_argument("--status-file")
    parser.add_argument("--drain-seconds", type=float, required=True)
    asyncio.run(run(parser.parse_args()))


if __name__ == "__main__":
    main()
