"""A server: the engine's gRPC service in a thread; the gateway, and a guard before it, as child processes."""

import asyncio
import contextlib
import ipaddress
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2_grpc
from smg_grpc_proto import vllm_engine_pb2_grpc
from transformers.utils import logging

from ..engine import Engine
from .limits import Limits
from .metrics import Metrics
from .requests import ModelFacts
from .smg import HealthServicer, Servicer

logger = logging.get_logger(__name__)

LOOPBACK = "127.0.0.1"
START_S, POLL_S = 120.0, 0.1
"""How long the gateway may take to answer, and how often it is asked."""
DRAIN_S, FLUSH_S = 60.0, 2.0
"""How long requests may take to end, and then the gateway to hand over the last answers."""
MESSAGE_BYTES = 64 * 2**20
GATEWAY = """
import ctypes, signal, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)
from smg.cli import main
main(sys.argv[1:])
"""
"""The gateway's process: it ends when the thread that started it does (PR_SET_PDEATHSIG), however that ends."""


class Server:
    """See :func:`hf_paged.serve.serve`, which makes one.

    Attributes:
        address: where clients find it, "http://host:port", or "host:port" of the gRPC service without a gateway.
        model_name: what they call the model.
        metrics_address: where Prometheus finds this process' metrics, None: nowhere.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Any,
        *,
        host: str,
        port: int,
        gateway: str,
        model_name: str | None,
        api_key: str | None,
        metrics_port: int | None,
        limits: Limits,
    ) -> None:
        if not engine.background:
            raise ValueError("a served engine runs its steps by itself: make it with background=True.")
        if not 0 <= port < 65536:
            raise ValueError(f"port must be 0 to 65535, got {port!r}.")
        if not is_loopback(host) and (gateway == "none" or not api_key):
            remedy = "the gRPC service has no keys" if gateway == "none" else "give an api_key"
            raise ValueError(f"host {host!r} can be reached from other machines: {remedy}, or listen on {LOOPBACK}.")
        self.engine, self.limits = engine, limits
        self.model_name = model_name or getattr(engine.model.config, "name_or_path", "") or "model"
        self._metrics = Metrics(engine)
        self.metrics_address = None
        self._folder = tempfile.mkdtemp(prefix="hf-paged-serve-")
        self._children: list[subprocess.Popen[bytes]] = []
        self._is_closed = False
        self._servicer = Servicer(
            engine, tokenizer, self.model_name, facts_of(engine, tokenizer), limits, self._metrics, self._folder
        )
        self._service = _Service(self._servicer, host if gateway == "none" else LOOPBACK, port * (gateway == "none"))
        try:
            if metrics_port is not None:
                self.metrics_address = f"http://{LOOPBACK}:{self._metrics.listen(metrics_port)}/metrics"
            tokenizer.save_pretrained(self._folder)
            grpc_port = self._service.start()
            self.address = f"{host}:{grpc_port}"
            if gateway == "smg":
                self._start_gateway(host, port, grpc_port, api_key)
        except BaseException:
            self.close(drain_s=0)
            raise

    def _start_gateway(self, host: str, port: int, grpc_port: int, api_key: str | None) -> None:
        """Start it and the guard before it, and wait until they answer.

        Raises:
            RuntimeError: one of them ended, or they do not answer.
        """
        gateway_port, metrics_port = free_ports(2)
        command = [
            sys.executable, "-c", GATEWAY, "launch", "--host", LOOPBACK, "--port", str(gateway_port),
            "--worker-urls", f"grpc://{LOOPBACK}:{grpc_port}", "--backend", "vllm",
            "--model-path", self._folder, "--tokenizer-path", self._folder, "--history-backend", "none",
            "--prometheus-host", LOOPBACK, "--prometheus-port", str(metrics_port),
            "--max-payload-size", str(self.limits.body_bytes),
            "--request-timeout-secs", str(int(self.limits.request_seconds) + 1),
            "--shutdown-grace-period-secs", "1", "--health-check-interval-secs", "5",
            # One engine: what it refuses, it would refuse again.
            "--disable-retries", "--disable-circuit-breaker", "--log-level", "error",
        ]  # fmt: skip
        if api_key:
            command += ["--api-key", api_key]
        self._start_child(command)
        guard = [
            sys.executable, str(Path(__file__).with_name("guard.py")), "--host", host, "--port", str(port),
            "--to-host", LOOPBACK, "--to-port", str(gateway_port), "--most-bytes", str(self.limits.body_bytes),
            "--drain-seconds", str(DRAIN_S + FLUSH_S),
        ]  # fmt: skip
        if not api_key:
            for name in sorted({"localhost", LOOPBACK, "[::1]", bracketed(host)}):
                guard += ["--accept-host", name]
        output = self._start_child(guard, stdout=subprocess.PIPE).stdout
        assert output is not None
        bound = output.readline()
        if not bound:
            raise RuntimeError(f"the server cannot listen on port {port} of {host}: its output says why.")
        self.address = f"http://{bracketed(host)}:{int(bound)}"
        end = time.monotonic() + START_S
        while not _answers(f"http://{_reachable(host)}:{int(bound)}", api_key):
            if not self._children_run():
                raise RuntimeError("the gateway has ended: its output says why.")
            if time.monotonic() > end:
                raise RuntimeError(f"the gateway does not answer at {self.address} after {START_S:.0f} s.")
            time.sleep(POLL_S)

    def _start_child(self, command: list[str], **options: Any) -> "subprocess.Popen[bytes]":
        # A session of its own: Ctrl-C is for this process, which then stops its children.
        child = self._service.call(
            lambda: subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True, **options)
        )
        self._children.append(child)
        return child

    def _children_run(self) -> bool:
        return all(child.poll() is None for child in self._children)

    @property
    def is_running(self) -> bool:
        """Whether the engine serves, and the gateway, if there is one, runs."""
        return not self._is_closed and self._servicer.is_healthy() and self._children_run()

    def wait(self, stop: threading.Event | None = None) -> None:
        """Return once ``stop`` is set.

        Raises:
            RuntimeError: the engine or the gateway has ended.
        """
        stop = stop or threading.Event()
        while not stop.wait(1.0):
            if not self.is_running:
                states = ["runs" if child.poll() is None else "has ended" for child in self._children]
                gateway = "".join(f", {name} {state}" for name, state in zip(("the gateway", "the guard"), states))
                raise RuntimeError(f"the server has ended: the engine is {self.engine.health().state}{gateway}.")

    def close(self, *, drain_s: float = DRAIN_S) -> None:
        """Stop serving; the engine stays open.

        Args:
            drain_s: seconds that requests have to end; then they are cancelled. New ones are refused.
        """
        if self._is_closed:
            return
        self._is_closed = self._servicer.is_draining = True
        end = time.monotonic() + drain_s
        for guard in self._children[1:]:
            guard.send_signal(signal.SIGTERM)  # No new connections.
        while self._servicer.num_requests and time.monotonic() < end:
            time.sleep(POLL_S)
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
        self._service.stop()
        self._metrics.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Server({self.address!r}, {'closed' if self._is_closed else 'running'})"


class _Service:
    """A gRPC server in a thread.

    Args:
        servicer: that answers.
        host, port: where; port 0: any free one.
    """

    def __init__(self, servicer: Servicer, host: str, port: int) -> None:
        self._servicer, self._host, self._port = servicer, host, port
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ending: asyncio.Event | None = None
        self._thread = threading.Thread(target=self._run, name="hf-paged-serve", daemon=True)
        self._bound: Future[int] = Future()

    def start(self) -> int:
        """Start it; returns the port.

        Raises:
            OSError: the port is taken.
        """
        self._thread.start()
        return self._bound.result()

    def call(self, function: Callable[[], Any]) -> Any:
        """What a function gives in the thread of the server, which lives as long as that."""
        assert self._loop is not None

        async def run() -> Any:
            return function()

        return asyncio.run_coroutine_threadsafe(run(), self._loop).result()

    def stop(self) -> None:
        """End it; requests that have not ended are cancelled."""
        if self._loop is not None and self._ending is not None:
            with contextlib.suppress(RuntimeError):  # The loop has ended.
                self._loop.call_soon_threadsafe(self._ending.set)
            self._thread.join()

    def _run(self) -> None:
        asyncio.run(self._serve())

    async def _serve(self) -> None:
        try:
            self._loop, self._ending = asyncio.get_running_loop(), asyncio.Event()
            options = [("grpc.max_receive_message_length", MESSAGE_BYTES), ("grpc.so_reuseport", 0)]
            server = grpc.aio.server(options=options)
            vllm_engine_pb2_grpc.add_VllmEngineServicer_to_server(self._servicer, server)
            health_pb2_grpc.add_HealthServicer_to_server(HealthServicer(self._servicer), server)
            port = server.add_insecure_port(f"{bracketed(self._host)}:{self._port}")
            if not port:
                raise OSError(f"port {self._port} of {self._host} is taken: give another.")
            await server.start()
        except BaseException as error:
            self._bound.set_exception(error)
            return
        pump = asyncio.create_task(self._servicer.pump())
        self._bound.set_result(port)
        await self._ending.wait()
        await server.stop(grace=0.5)
        pump.cancel()


def facts_of(engine: Engine, tokenizer: Any) -> ModelFacts:
    """What requests need to know of an engine's model."""
    config = engine.model.generation_config
    given = config.eos_token_id if config.eos_token_id is not None else tokenizer.eos_token_id
    eos = tuple(given) if isinstance(given, (list, tuple)) else () if given is None else (int(given),)
    pad = next((token for token in (config.pad_token_id, tokenizer.pad_token_id, *eos) if isinstance(token, int)), 0)
    return ModelFacts(eos, pad, engine.max_model_len)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a host."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


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
    """Whether a gateway has found its engine."""
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


def run_until_signal(make: Callable[[], Server], announce: Callable[[Server], None]) -> None:
    """Serve until SIGTERM or Ctrl-C, then drain; a second signal does not wait.

    Args:
        make: starts the server.
        announce: is called once it answers.
    """
    stop = threading.Event()

    def on_signal(number: int, frame: Any) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        server = make()
        try:
            announce(server)
            server.wait(stop)
            logger.info("draining")
        finally:
            server.close()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
