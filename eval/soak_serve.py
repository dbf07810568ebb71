"""The server under clients of all kinds, for minutes: does every request end, is a page lost, does memory stay flat?

    python -m eval.soak_serve --seconds 600 --output eval/results/soak_serve.json

Starts ``hf-paged serve --replicas 2`` with the small model on the CPU, and fills the prefix cache of both engines:
pages get memory when they are first used, which is no growth. Healthy clients ask alone; as many of them as there are
clients of all kinds; and beside clients that leave, send nonsense, ask for too much, or read slowly; these three in
turns. Then one engine is killed, and in the end the server gets SIGTERM, both under load. Exit status 1: a request
had no end, a healthy one another text than before, a page was lost, or memory grew.
"""

import asyncio
import contextlib
import json
import os
import platform
import random
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from eval import command_line

SMALL_MODEL = Path(__file__).parent.parent / "integration_tests" / "assets" / "small_model"
ROLES = {"healthy": 40, "leaves": 8, "nonsense": 6, "too much": 4, "slow": 6}
"""Clients of each kind; together 64."""
PHASES = {"healthy alone": 0.15, "as many healthy": 0.1, "all kinds": 0.45, "one engine killed": 0.3}
"""Parts of the time."""
TURNS = 3
"""The phases before an engine is killed take turns, since other work of the machine comes and goes."""
CLIENTS = {"healthy alone": {"healthy": ROLES["healthy"]}, "as many healthy": {"healthy": sum(ROLES.values())}}
"""Of phases that have not all kinds."""
END_S, REQUEST_S = 120.0, 60
"""A request that has not ended after so many seconds has no end; the server ends it with what it has after so many."""
NOTICED_S = 10.0
"""Requests that begin so many seconds after an engine was killed must not fail any more."""
SAMPLE_S = 5.0
ENOUGH_SAMPLES = 30
"""For a line through a process' memory."""
FULL, FILLING = 0.95, 400
"""The part of an engine's pages that are cached once its cache counts as filled, and the prompts that may take."""
GROWTH = 0.05
"""The part of its memory by which a process may grow in ten minutes, as the fitted line has it."""
PROMPTS = [f"def f{i}(x):\n    " for i in range(8)]
JUNK: list[Any] = [
    None, -1, 0, 10**9, 1e308, -0.5, "x", "", [], {}, True, [[1]], {"a": {"b": []}}, ["a"] * 50, "\u0000",
    "\u00df\u4e00" * 99,
]  # fmt: skip
FIELDS = (
    "model", "prompt", "max_tokens", "temperature", "top_p", "top_k", "min_p", "n", "best_of", "stream",
    "stream_options", "stop", "seed", "presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias",
    "logprobs", "echo", "suffix", "user", "response_format", "regex", "json_schema", "min_tokens", "stop_token_ids",
    "ignore_eos", "messages",
)  # fmt: skip


@dataclass
class Record:
    """A request.

    Attributes:
        role, phase: of the client, and when it began.
        end: "done", "error" (of the server), "refused" (status 400 to 499), "left" (by the client), "closed" (without
            an answer), "cut" (amid an answer), "none" (within :data:`END_S`).
        seconds, first_s: until its end, and until the first part of its answer.
        text: of the answer.
        began: seconds since the load began.
    """

    role: str
    phase: str
    end: str
    seconds: float
    first_s: float | None = None
    text: str = ""
    began: float = 0.0


@dataclass
class Load:
    """Clients, and what they saw."""

    host: str
    port: int
    rng: random.Random
    phase: str = ""
    start: float = field(default_factory=time.monotonic)
    records: list[Record] = field(default_factory=list)
    texts: dict[str, str] = field(default_factory=dict)
    different: list[str] = field(default_factory=list)

    async def run(self, roles: dict[str, int], seconds: float) -> None:
        """Clients ask, one request after another, until the time is over; then the last requests end."""
        stop = time.monotonic() + seconds

        async def client(role: str) -> None:
            while time.monotonic() < stop:
                await self.one(role)

        await asyncio.gather(*(client(role) for role, count in roles.items() for _ in range(count)))

    async def one(self, role: str) -> None:
        """A request of a client."""
        data, patience, pace = self._request(role)
        phase, start = self.phase, time.monotonic()
        first: list[float] = []
        try:
            end, text = await asyncio.wait_for(self.ask(data, patience, pace, start, first), END_S)
        except (asyncio.TimeoutError, TimeoutError):
            end, text = "none", ""
        seconds = time.monotonic() - start
        first_s = first[0] - start if first else None
        self.records.append(Record(role, phase, end, seconds, first_s, text[:200], start - self.start))
        if role == "healthy" and end == "done" and self.texts.setdefault(data.decode(), text) != text:
            self.different.append(text[:200])
        if end in ("closed", "refused", "error"):
            await asyncio.sleep(0.05)

    def _request(self, role: str) -> tuple[bytes, float | None, float]:
        """Bytes, seconds after which the client leaves (None: it does not), and seconds between its reads."""
        rng = self.rng
        body: dict[str, Any] = {"model": "small", "prompt": rng.choice(PROMPTS), "max_tokens": 24, "temperature": 0}
        body["stream"] = rng.random() < 0.7
        path = "/v1/completions"
        if role == "leaves":
            body |= {"max_tokens": 200, "stream": rng.random() < 0.5, "temperature": 1.0, "n": rng.choice([1, 1, 3])}
            return self.post(path, json.dumps(body).encode()), rng.choice([0.0, 0.05, 0.3, 1.0]), 0.0
        if role == "slow":
            return self.post(path, json.dumps(body | {"max_tokens": 100, "stream": True}).encode()), None, 0.05
        if role == "too much":
            kind = rng.randrange(3)
            if kind == 0:
                return self.post(path, json.dumps(body | {"prompt": "x = 1\n" * 5000}).encode()), None, 0.0
            if kind == 1:
                return self.post(path, b" " * (8 * 2**20 + 1), whole=False), None, 0.0
            return self.post(path, json.dumps(body | {"max_tokens": 10**7, "n": 16}).encode()), None, 0.0
        if role == "nonsense":
            return *self._nonsense(body), 0.0
        return self.post(path, json.dumps(body).encode()), None, 0.0

    def _nonsense(self, body: dict[str, Any]) -> tuple[bytes, float | None]:
        """A request with wrong fields, a body that is no JSON, or bytes that are no request, whose client leaves."""
        rng = self.rng
        chat = rng.random() < 0.3
        if chat:
            body["messages"] = [{"role": "user", "content": body.pop("prompt")}]
        for name in rng.sample(FIELDS, rng.randint(1, 3)):
            body[name] = rng.choice(JUNK)
        data = json.dumps(body).encode()
        kind = rng.randrange(4)
        if kind == 1:
            data = data[: rng.randrange(len(data))]
        elif kind == 2:
            data = bytes(byte if rng.random() < 0.95 else rng.randrange(256) for byte in data)
        request = self.post("/v1/chat/completions" if chat else "/v1/completions", data)
        if kind == 3:
            at = rng.randrange(len(request))
            request = request[:at] + rng.randbytes(rng.randrange(40)) + request[at + rng.randrange(40) :]
        return request, 1.0 if kind == 3 else None

    def post(self, path: str, data: bytes, whole: bool = True) -> bytes:
        """A request's bytes; ``whole``: its body is among them."""
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\n"
        return f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + (data if whole else b"")

    async def ask(
        self, data: bytes, patience: float | None, pace: float, start: float, first: list[float]
    ) -> tuple[str, str]:
        """Send a request and read its answer; returns how it ended, and its text."""
        got = b""
        writer = None
        try:
            reader, writer = await asyncio.open_connection(self.host, self.port, limit=4096 if pace else 1 << 16)
            writer.write(data)
            await writer.drain()
            while True:
                wait = None if patience is None else max(0.0, start + patience - time.monotonic())
                try:
                    part = await asyncio.wait_for(reader.read(2048 if pace else 1 << 16), wait)
                except (asyncio.TimeoutError, TimeoutError):
                    return "left", ""
                if not part:
                    break
                if not first:
                    first.append(time.monotonic())
                got += part
                if pace:
                    await asyncio.sleep(pace)
        except (ConnectionError, OSError):
            return ("cut" if got else "closed"), ""
        finally:
            if writer is not None:
                with contextlib.suppress(ConnectionError, OSError):
                    writer.close()
        return how_it_ended(got)


def how_it_ended(answer: bytes) -> tuple[str, str]:
    """Of the bytes of an answer to a request whose client has not left."""
    head, _, body = answer.partition(b"\r\n\r\n")
    parts = head.split(b" ", 2)
    if len(parts) < 2 or not parts[1].isdigit():
        return "closed", ""
    if b"transfer-encoding: chunked" in head.lower():
        body, is_whole = dechunked(body)
    else:
        length = re.search(rb"content-length: *(\d+)", head.lower())
        is_whole = length is None or len(body) >= int(length[1])
    text = body.decode("utf-8", "replace")
    if not is_whole:
        return "cut", text
    status = int(parts[1])
    if status >= 500 or ('"error":{' in text.replace(" ", "") and status < 400):
        return "error", text
    if status >= 400:
        return "refused", text
    if b"text/event-stream" in head.lower():
        if "data: [DONE]" not in text:
            return "cut", text
        chunks = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
        choices = [choice for chunk in chunks for choice in chunk.get("choices", ())]
    else:
        choices = json.loads(text).get("choices", [])
    if not any(choice.get("finish_reason") for choice in choices):
        return "cut", text
    return "done", "".join(choice.get("text") or "" for choice in choices)


def dechunked(data: bytes) -> tuple[bytes, bool]:
    """A body without the frames of its chunks, and whether its last one is there."""
    body = b""
    while True:
        size, found, rest = data.partition(b"\r\n")
        if not found:
            return body, False
        count = int(size.split(b";")[0], 16)
        if count == 0:
            return body, True
        body, data = body + rest[:count], rest[count + 2 :]
        if len(rest) < count + 2:
            return body, False


class Memory:
    """Resident memory of processes, seen every few seconds."""

    def __init__(self, processes: dict[str, int]) -> None:
        self.processes, self.start = processes, time.monotonic()
        self.seen: dict[str, list[tuple[float, float]]] = {name: [] for name in processes}

    async def watch(self) -> None:
        """Look until cancelled."""
        page = os.sysconf("SC_PAGE_SIZE")
        while True:
            for name, process in self.processes.items():
                with contextlib.suppress(OSError, IndexError):
                    resident = int(Path(f"/proc/{process}/statm").read_text().split()[1]) * page / 2**20
                    if resident:
                        self.seen[name].append((time.monotonic() - self.start, resident))
            await asyncio.sleep(SAMPLE_S)

    def fitted(self, name: str, after: float) -> dict[str, float]:
        """A line through the samples after some seconds: MiB, MiB a minute and the slope's standard error."""
        samples = np.array([sample for sample in self.seen[name] if sample[0] >= after])
        if len(samples) < 5:
            return {"samples": len(samples)}
        minutes, mib = samples[:, 0] / 60, samples[:, 1]
        slope, base = np.polyfit(minutes, mib, 1)
        residual = mib - (slope * minutes + base)
        error = np.sqrt(residual.var() * len(mib) / (len(mib) - 2) / (len(mib) * minutes.var()))
        return {
            "samples": len(samples), "first_mib": round(float(mib[0]), 1), "last_mib": round(float(mib[-1]), 1),
            "mib_per_minute": round(float(slope), 3), "standard_error": round(float(error), 3),
        }  # fmt: skip


def metrics_of(address: str) -> dict[str, float]:
    """An engine's metrics without labels."""
    text = urllib.request.urlopen(address, timeout=30).read().decode()
    return {name: float(value) for name, value in re.findall(r"^(hf_paged_\w+) (\S+)$", text, re.M)}


async def settled(addresses: list[str]) -> list[dict[str, float]]:
    """Pages that are used and cached in each engine, once nothing runs."""
    end = time.monotonic() + END_S
    while True:
        found = [await asyncio.to_thread(metrics_of, address) for address in addresses]
        busy = [m["hf_paged_requests_running"] + m["hf_paged_requests_waiting"] for m in found]
        if not any(busy) or time.monotonic() > end:
            names = ("requests_running", "requests_waiting", "pages", "pages_used", "pages_cached")
            return [{name: m[f"hf_paged_{name}"] for name in names} for m in found]
        await asyncio.sleep(0.5)


async def fill(load: Load, addresses: list[str]) -> list[dict[str, float]]:
    """Have every engine cache as many prefixes as it can; returns what each holds."""
    rng = random.Random(1)
    for _ in range(FILLING // 8):
        prompts = ["".join(rng.choice("abcdefghijklmnopqrstuvwxyz = (.)\n") for _ in range(600)) for _ in range(8)]
        bodies = [json.dumps({"model": "small", "prompt": prompt, "max_tokens": 1}).encode() for prompt in prompts]
        requests = (load.post("/v1/completions", body) for body in bodies)
        await asyncio.gather(*(load.ask(data, None, 0.0, time.monotonic(), []) for data in requests))
        found = await settled(addresses)
        if all(m["pages_cached"] >= FULL * m["pages"] for m in found):
            break
    return found


def children_of(parent: int) -> dict[str, int]:
    """The server's processes by what they are."""
    found: dict[str, int] = {}
    for child in Path(f"/proc/{parent}/task/{parent}/children").read_text().split():
        line = Path(f"/proc/{child}/cmdline").read_text()
        # The gateway names its own process.
        name = "guard" if "guard.py" in line else "gateway"
        if "--gateway\0none" in line:
            name = f"engine {len(found)}"
        found[name] = int(child)
    return found


def summary(records: list[Record]) -> dict[str, Any]:
    """Ends by kind of client, and the times of healthy requests."""
    ends = Counter((record.role, record.end) for record in records)
    answer: dict[str, Any] = {"ends": {}}
    for (role, end), count in sorted(ends.items()):
        answer["ends"].setdefault(role, {})[end] = count
    errors = Counter(re.sub(r"[0-9a-f]{8,}|\d+", "N", r.text)[:160] for r in records if r.end == "error")
    if errors:
        answer["errors"] = dict(errors.most_common(4))
    for name in ("seconds", "first_s"):
        times = [getattr(r, name) for r in records if r.role == "healthy" and r.end == "done" and getattr(r, name)]
        if times:
            answer[f"healthy_{name}"] = {
                f"p{q}": round(float(np.percentile(times, q)), 3) for q in (50, 90, 99)
            }  # fmt: skip
    return answer


async def soak(server: "subprocess.Popen[str]", address: str, metrics: list[str], options: Any) -> dict[str, Any]:
    """All phases; returns the report."""
    host, port = address.removeprefix("http://").rsplit(":", 1)
    load = Load(host, int(port), random.Random(options.seed))
    processes = children_of(server.pid)
    memory = Memory(processes)
    watch = asyncio.create_task(memory.watch())
    report: dict[str, Any] = {"phases": {}, "pages": {"filled": await fill(load, metrics)}}
    alive, killed = list(metrics), 0.0
    began: list[float] = []
    *shared, (last, last_part) = PHASES.items()
    turns = [(phase, part / TURNS) for _ in range(TURNS) for phase, part in shared] + [(last, last_part)]
    for turn, (phase, part) in enumerate(turns):
        load.phase, before = phase, len(load.records)
        began.append(time.monotonic() - memory.start)
        work = asyncio.create_task(load.run(CLIENTS.get(phase, ROLES), options.seconds * part))
        if phase == last:
            await asyncio.sleep(options.seconds * part / 7)
            os.kill(processes["engine 0"], signal.SIGKILL)
            killed = time.monotonic() - load.start
            alive = metrics[1:]
        await work
        if phase == last:
            late = [r for r in load.records[before:] if r.end == "error" and r.began > killed + NOTICED_S]
            report["errors of late requests"] = len(late)
        report["pages"][f"{phase}, turn {turn}"] = pages = await settled(alive)
        health = await asyncio.to_thread(urllib.request.urlopen, f"{address}/health", None, 30)
        report["phases"][phase] = summary([record for record in load.records if record.phase == phase])
        report["phases"][phase]["health"] = json.loads(health.read())["status"]
        print(phase, json.dumps(summary(load.records[before:])), pages, os.getloadavg()[0], flush=True)
    # Clients may ask again and again; after the signal, most find nobody.
    load.phase, before = "SIGTERM", len(load.records)
    work = asyncio.create_task(load.run(ROLES, 15.0))
    await asyncio.sleep(5.0)
    watch.cancel()
    server.send_signal(signal.SIGTERM)
    signalled = time.monotonic()
    report["exit status"] = await asyncio.to_thread(server.wait, 120)
    report["seconds to drain"] = round(time.monotonic() - signalled, 1)
    await work
    report["phases"]["SIGTERM"] = summary(load.records[before:])
    report["memory"] = {name: memory.fitted(name, began[len(shared)]) for name in processes}
    report["different texts"] = load.different
    report["without an end"] = [
        vars(record) for record in load.records
        if record.end == "none" or (record.end == "cut" and record.role not in ("leaves", "nonsense"))
    ]  # fmt: skip
    return report


def faults_of(report: dict[str, Any]) -> list[str]:
    """What is not as it must be."""
    faults = []
    if report["without an end"]:
        faults.append(f"{len(report['without an end'])} requests had no end")
    if report["different texts"]:
        faults.append(f"{len(report['different texts'])} healthy requests had another text than before")
    for phase, engines in report["pages"].items():
        for index, pages in enumerate(engines):
            if pages["pages_used"] != pages["pages_cached"] or pages["requests_running"] or pages["requests_waiting"]:
                faults.append(f"after {phase!r}, the {index + 1}. engine that is left has {pages}")
    for phase in (*CLIENTS, "all kinds"):
        ends = report["phases"][phase]["ends"]["healthy"]
        if set(ends) != {"done"}:
            faults.append(f"healthy requests ended as {ends} in {phase!r}")
    if report["errors of late requests"]:
        faults.append(f"{report['errors of late requests']} requests failed long after an engine was killed")
    for name, line in report["memory"].items():
        if line["samples"] >= ENOUGH_SAMPLES:
            grown = line["mib_per_minute"] - 2 * line["standard_error"]
            if grown * 10 > GROWTH * line["last_mib"]:
                faults.append(f"the memory of {name} grew by {line['mib_per_minute']} MiB a minute")
    if report["exit status"] != 0:
        faults.append(f"the server ended with status {report['exit status']}")
    return faults


def main() -> None:
    """Run the command."""
    parser = command_line.make_parser("soak_serve", __doc__)
    parser.add_argument("--seconds", type=float, default=600.0, help="of load, before the signal")
    parser.add_argument("--seed", type=int, default=0, help="of what clients do")
    parser.add_argument("--output", type=command_line.output_file, help="a JSON file for the result")
    options = parser.parse_args()
    command = [
        sys.executable, "-m", "hf_paged.cli", "serve", str(SMALL_MODEL), "--port", "0", "--replicas", "2",
        "--device", "cpu", "--metrics-port", "0", "--served-model-name", "small", "--dtype", "float32",
        "--max-num-seqs", "16", "--max-model-len", "1024", "--request-seconds", str(REQUEST_S),
    ]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            lines: list[str] = []
            while not lines or "served at http" not in lines[-1]:
                lines.append(server.stdout.readline())
                if not lines[-1]:
                    raise SystemExit("the server did not start: its output says why.")
            found = re.search(r"served at (http\S+)/v1", lines[-1])
            assert found is not None
            # Its engines name their metrics in the order in which they are ready; the server, in their own.
            metrics = [server.stdout.readline().split()[-1] for _ in range(2)]
            drain = asyncio.to_thread(server.stdout.read)

            async def run() -> dict[str, Any]:
                reading = asyncio.create_task(drain)  # A pipe that nobody reads would stop it.
                report = await soak(server, found[1], metrics, options)
                await reading
                return report

            report = asyncio.run(run())
        finally:
            server.kill()
    faults = faults_of(report)
    report = {
        "date": date.today().isoformat(), "cpu": platform.processor() or platform.machine(), "cores": os.cpu_count(),
        "seconds": options.seconds, "clients": ROLES, "faults": faults,
    } | report  # fmt: skip
    if options.output is not None:
        options.output.write_text(json.dumps(report, indent=1) + "\n")
    for name in ("memory", "seconds to drain", "exit status"):
        print(name, report[name])
    healthy = [report["phases"][phase].get("healthy_seconds", {}).get("p99") for phase in (*CLIENTS, "all kinds")]
    if all(healthy):
        alone, many, beside = healthy
        print(f"p99 of healthy requests: {alone} s alone, {many} s where there are as many, {beside} s beside others: "
              f"{beside / alone:.2f} and {beside / many:.2f} times")  # fmt: skip
    print("faults:", *(faults or ["none"]), sep="\n  ")
    sys.exit(bool(faults))


if __name__ == "__main__":
    command_line.run(main)
