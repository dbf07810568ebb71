"""The gateway, and the guard before it: child processes that end with the thread that started them."""

import contextlib
import ipaddress
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .limits import Limits

LOOPBACK = "127.0.0.1"
START_S, POLL_S = 120.0, 0.1
"""How long the gateway may take to answer, and how often it is asked."""
DRAIN_S, FLUSH_S = 60.0, 2.0
"""How long requests may take to end, and then the gateway to hand over the last answers."""
ENDS_WITH_PARENT = """
import ctypes, signal, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)
"""
"""Begins a child's program: it ends when the thread that started it does (PR_SET_PDEATHSIG), however that ends."""
GATEWAY = ENDS_WITH_PARENT + """
import smg.launch_router
from smg.cli import main
# It would name the gateway's own address, before which there is no guard.
smg.launch_router.print_banner = lambda *arguments: None
main(sys.argv[1:])
"""
ONE_ENGINE = ("--disable-retries", "--health-check-interval-secs", "5")
"""What one engine refuses, it would refuse again."""
SEVERAL_ENGINES = (
    "--policy", "prefix_hash", "--prefix-hash-load-factor", "1.1", "--prefix-hash-balance-abs-threshold", "2",
    "--retry-max-retries", "2", "--retry-initial-backoff-ms", "20", "--disable-worker-overload-protection",
    "--health-check-interval-secs", "1", "--health-check-timeout-secs", "5", "--health-failure-threshold", "1",
    "--health-success-threshold", "1",
)  # fmt: skip
"""Requests that begin alike go to one engine, until it has a tenth and two requests more than the mean; one whose
engine is gone before its first token is tried once more elsewhere. The policy "cache_aware" goes by loads that it
asks engines for every ten seconds: prompts shorter than a page all went to one engine for that time, then all to the
other. The gateway's own protection from overload is off: it is taken to leave out an engine that has a queue while
another has none, and to count one that has ended as such."""


class Gateway:
    """An HTTP server before engines.

    Args:
        engine_ports: of their gRPC services, on loopback.
        folder: with the tokenizer's files.
        host, port: where it listens; port 0: any free one.
        api_key: that clients must send, None: none.
        limits: of requests.
        has_replicas: requests for a model may go to several of them.
        status: a file with the answer to ``/health``, None: the gateway's own.
        start: makes a child process in a thread that lives as long as this.

    Attributes:
        address: "http://host:port".

    Raises:
        RuntimeError: a process ended, or they do not answer.
    """

    def __init__(
        self,
        engine_ports: Sequence[int],
        folder: str,
        *,
        host: str,
        port: int,
        api_key: str | None,
        limits: Limits,
        has_replicas: bool = False,
        status: Path | None = None,
        start: Callable[..., "subprocess.Popen[bytes]"] = subprocess.Popen,
    ) -> None:
        self._children: list[subprocess.Popen[bytes]] = []
        self._start = start
        try:
            bound = self._start_both(engine_ports, folder, host, port, api_key, limits, has_replicas, status)
            self.address = f"http://{bracketed(host)}:{bound}"
            self._wait_for_answer(f"http://{_reachable(host)}:{bound}", api_key)
        except BaseException:
            self.close()
            raise

    def _start_both(
        self,
        engine_ports: Sequence[int],
        folder: str,
        host: str,
        port: int,
        api_key: str | None,
        limits: Limits,
        has_replicas: bool,
        status: Path | None,
    ) -> int:
        """Start the gateway and the guard; returns the guard's port."""
        gateway_port, metrics_port = free_ports(2)
        command = [
            sys.executable, "-c", GATEWAY, "launch", "--host", LOOPBACK, "--port", str(gateway_port),
            "--worker-urls", *(f"grpc://{LOOPBACK}:{engine_port}" for engine_port in engine_ports),
            "--backend", "vllm", "--model-path", folder, "--tokenizer-path", folder, "--history-backend", "none",
            "--prometheus-host", LOOPBACK, "--prometheus-port", str(metrics_port),
            "--max-payload-size", str(limits.body_bytes),
            "--request-timeout-secs", str(int(limits.request_seconds) + 1),
            "--shutdown-grace-period-secs", "1", "--log-level", "error",
            # A client whose requests fail must not open it for all others.
            "--disable-circuit-breaker",
            # A long step is no end: whether engines serve is asked by this process.
            "--worker-wedge-secs", "120",
            *(SEVERAL_ENGINES if has_replicas else ONE_ENGINE),
        ]  # fmt: skip
        if api_key:
            command += ["--api-key", api_key]
        self._start_child(command)
        guard = [
            sys.executable, str(Path(__file__).with_name("guard.py")), "--host", host, "--port", str(port),
            "--to-host", LOOPBACK, "--to-port", str(gateway_port), "--most-bytes", str(limits.body_bytes),
            "--drain-seconds", str(DRAIN_S + FLUSH_S),
        ]  # fmt: skip
        if status is not None:
            guard += ["--status-file", str(status)]
        if not api_key:
            for name in sorted({"localhost", LOOPBACK, "[::1]", bracketed(host)}):
                guard += ["--accept-host", name]
        output = self._start_child(guard, stdout=subprocess.PIPE).stdout
        assert output is not None
        bound = output.readline()
        if not bound:
            raise RuntimeError(f"the server cannot listen on port {port} of {host}: its output says why.")
        return int(bound)

    def _wait_for_answer(self, address: str, api_key: str | None) -> None:
        end = time.monotonic() + START_S
        while not _answers(address, api_key):
            if not self.is_running:
                raise RuntimeError("the gateway has ended: its output says why.")
            if time.monotonic() > end:
                raise RuntimeError(f"the gateway does not answer at {self.address} after {START_S:.0f} s.")
            time.sleep(POLL_S)

    def _start_child(self, command: list[str], **options: Any) -> "subprocess.Popen[bytes]":
        # A session of its own: Ctrl-C is for this process, which then stops its children.
        child = self._start(command, stdin=subprocess.DEVNULL, start_new_session=True, **options)
        self._children.append(child)
        return child

    @property
    def is_running(self) -> bool:
        """Whether both processes run."""
        return all(child.poll() is None for child in self._children)

    def describe(self) -> str:
        """Which of them runs, for messages."""
        states = ["runs" if child.poll() is None else "has ended" for child in self._children]
        return ", ".join(f"{name} {state}" for name, state in zip(("the gateway", "the guard"), states))

    def refuse_connections(self) -> None:
        """Take no new ones; those that are open go on."""
        for guard in self._children[1:]:
            guard.send_signal(signal.SIGTERM)

    def close(self) -> None:
        """End both, once the last answers have gone out."""
        for child in self._children:
            child.send_signal(signal.SIGTERM)
            try:
                # Answers are on their way to clients; what is left are connections that none of them uses.
                child.wait(FLUSH_S)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
            if child.stdout is not None:
                child.stdout.close()


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a host."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_address(host: str, port: int, gateway: str, api_key: str | None) -> None:
    """
    Raises:
        ValueError: the port is none, or other machines would reach a server that has no key.
    """
    if not 0 <= port < 65536:
        raise ValueError(f"port must be 0 to 65535, got {port!r}.")
    if not is_loopback(host) and (gateway == "none" or not api_key):
        remedy = "the gRPC service has no keys" if gateway == "none" else "give an api_key"
        raise ValueError(f"host {host!r} can be reached from other machines: {remedy}, or listen on {LOOPBACK}.")


def bracketed(host: str) -> str:
    """A host as addresses have it."""
    return f"[{host}]" if ":" in host else host


def _reachable(host: str) -> str:
    """Where this machine finds a server that listens on ``host``."""
    return {"0.0.0.0": LOOPBACK, "::": "[::1]"}.get(host, bracketed(host))


def free_ports(count: int) -> list[int]:
    """Different ports of loopback that nothing listens on now."""
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind((LOOPBACK, 0))
        return [probe.getsockname()[1] for probe in probes]


def _answers(address: str, api_key: str | None) -> bool:
    """Whether a gateway has found its engines."""
    request = urllib.request.Request(f"{address}/v1/models")
    if api_key:
        request.add_header("Authorization", f"Bearer {api_key}")
    # Never through a proxy: it is this machine.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=5) as answer:
            return answer.status == 200 and b'"id"' in answer.read()
    except (urllib.error.URLError, OSError):
        return False
