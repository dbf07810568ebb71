"""A server: the engine's gRPC service in a thread; the gateway, and a guard before it, as child processes."""

import asyncio
import contextlib
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, Protocol

import grpc
from grpc_health.v1 import health_pb2_grpc
from smg_grpc_proto import vllm_engine_pb2_grpc
from transformers.utils import logging

from ..engine import Engine
from ..engine.scheduling.request import ACTIVE
from .gateway import DRAIN_S, LOOPBACK, POLL_S, Gateway, bracketed, check_address
from .limits import Limits
from .metrics import Metrics
from .requests import ModelFacts
from .smg import HealthServicer, Servicer

logger = logging.get_logger(__name__)

MESSAGE_BYTES = 64 * 2**20


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
        adapters: Sequence[str] = (),
    ) -> None:
        if not engine.background:
            raise ValueError("a served engine runs its steps by itself: make it with background=True.")
        check_address(host, port, gateway, api_key)
        self.engine, self.limits = engine, limits
        self.model_name = model_name or getattr(engine.model.config, "name_or_path", "") or "model"
        _check_adapters(engine, adapters, self.model_name, gateway)
        self._metrics = Metrics(engine)
        self.metrics_address = None
        self._folder = tempfile.mkdtemp(prefix="hf-paged-serve-")
        self._gateway: Gateway | None = None
        self._is_closed = False
        # The protocol has no place for an adapter: each is a model with a service of its own on the same engine.
        models = [(self.model_name, None if adapters else ACTIVE), *((name, name) for name in adapters)]
        facts = facts_of(engine, tokenizer)
        self._servicers = [
            Servicer(engine, tokenizer, name, facts, limits, self._metrics, self._folder, adapter)
            for name, adapter in models
        ]
        listens = (host, port) if gateway == "none" else (LOOPBACK, 0)
        self._services = [_Service(servicer, *listens) for servicer in self._servicers]
        try:
            if metrics_port is not None:
                self.metrics_address = f"http://{LOOPBACK}:{self._metrics.listen(metrics_port)}/metrics"
            tokenizer.save_pretrained(self._folder)
            grpc_ports = [service.start() for service in self._services]
            self.address = f"{host}:{grpc_ports[0]}"
            if gateway == "smg":
                self._gateway = Gateway(
                    grpc_ports, self._folder, host=host, port=port, api_key=api_key, limits=limits,
                    start=lambda *arguments, **options: self._services[0].call(
                        lambda: subprocess.Popen(*arguments, **options)
                    ),
                )  # fmt: skip
                self.address = self._gateway.address
        except BaseException:
            self.close(drain_s=0)
            raise

    @property
    def is_running(self) -> bool:
        """Whether the engine serves, and the gateway, if there is one, runs."""
        gateway_runs = self._gateway is None or self._gateway.is_running
        return not self._is_closed and self._servicers[0].is_healthy() and gateway_runs

    def wait(self, stop: threading.Event | None = None) -> None:
        """Return once ``stop`` is set.

        Raises:
            RuntimeError: the engine or the gateway has ended.
        """
        stop = stop or threading.Event()
        while not stop.wait(1.0):
            if not self.is_running:
                gateway = "" if self._gateway is None else f", {self._gateway.describe()}"
                raise RuntimeError(f"the server has ended: the engine is {self.engine.health().state}{gateway}.")

    def close(self, *, drain_s: float = DRAIN_S) -> None:
        """Stop serving; the engine stays open.

        Args:
            drain_s: seconds that requests have to end; then they are cancelled. New ones are refused.
        """
        if self._is_closed:
            return
        self._is_closed = True
        for servicer in self._servicers:
            servicer.is_draining = True
        end = time.monotonic() + drain_s
        if self._gateway is not None:
            self._gateway.refuse_connections()
        while any(servicer.num_requests for servicer in self._servicers) and time.monotonic() < end:
            time.sleep(POLL_S)
        if self._gateway is not None:
            self._gateway.close()
        for service in self._services:
            service.stop()
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
        self._servicer.end_subscriptions()
        await server.stop(grace=0.5)
        pump.cancel()


def _check_adapters(engine: Engine, adapters: Sequence[str], model_name: str, gateway: str) -> None:
    """
    Raises:
        ValueError: they cannot be served under their names.
    """
    if isinstance(adapters, str):
        raise ValueError(f"adapters must be a list of names, got {adapters!r}.")
    if adapters and gateway == "none":
        raise ValueError(
            f"adapters={list(adapters)} cannot be served without a gateway: vLLM's gRPC protocol has no field for them."
        )
    if len({model_name, *adapters}) != len(adapters) + 1:
        raise ValueError(f"adapters and the model must have different names, got {[model_name, *adapters]}.")
    for name in (None, *adapters) if adapters else ():
        engine.admission.check_adapter(name)


def facts_of(engine: Engine, tokenizer: Any) -> ModelFacts:
    """What requests need to know of an engine's model."""
    config = engine.model.generation_config
    given = config.eos_token_id if config.eos_token_id is not None else tokenizer.eos_token_id
    eos = tuple(given) if isinstance(given, (list, tuple)) else () if given is None else (int(given),)
    pad = next((token for token in (config.pad_token_id, tokenizer.pad_token_id, *eos) if isinstance(token, int)), 0)
    return ModelFacts(eos, pad, engine.max_model_len)


class Running(Protocol):
    """What :func:`run_until_signal` runs."""

    def wait(self, stop: threading.Event | None = None) -> None:
        """Return once ``stop`` is set."""

    def close(self) -> None:
        """End."""


def run_until_signal(make: Callable[[], Running], announce: Callable[[Any], None]) -> None:
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
