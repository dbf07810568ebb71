"""Several engines, each a process of its own, behind one gateway.

::

    client -> guard -> gateway -> engine 0, engine 1, ...        child processes; each engine has a copy of the weights
                                                                 this process starts them and watches
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from transformers.utils import logging

from .gateway import DRAIN_S, ENDS_WITH_PARENT, FLUSH_S, LOOPBACK, POLL_S, Gateway, check_address, free_ports
from .limits import Limits

logger = logging.get_logger(__name__)

ENGINE = ENDS_WITH_PARENT + "from hf_paged.cli import main\nsys.exit(main(sys.argv[1:]))\n"
LOAD_S = 1800.0
"""How long an engine may take to load its model and to compile."""
ASK_S, ANSWER_S = 1.0, 5.0
"""Seconds between two looks at every engine, and for its answer."""
SOON = [(f"grpc.{name}_reconnect_backoff_ms", 200) for name in ("initial", "min", "max")]
"""Of a channel to an engine that does not listen yet: it is tried again at once."""
SERVES, SILENT, LOADS = "serves", "does not answer", "loads"


class Replica:
    """One engine's process.

    Args:
        index: among the replicas.
        arguments: of ``hf-paged``.
        port, metrics_port: where it listens, on loopback.
        environment: of the process.
    """

    def __init__(
        self, index: int, arguments: Sequence[str], port: int, metrics_port: int | None, environment: dict[str, str]
    ) -> None:
        self.index, self.port, self.metrics_port = index, port, metrics_port
        command = [sys.executable, "-c", ENGINE, *arguments, "--gateway", "none", "--port", str(port)]
        if metrics_port is not None:
            command += ["--metrics-port", str(metrics_port)]
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True, env=environment)
        self._channel = grpc.insecure_channel(f"{LOOPBACK}:{port}", options=SOON)
        self._health = health_pb2_grpc.HealthStub(self._channel)
        self.state = LOADS

    def look(self) -> str:
        """Ask it; returns its state, which is kept."""
        status = self.process.poll()
        if status is not None:
            self.state = f"has ended with status {status}"
            return self.state
        try:
            answer = self._health.Check(health_pb2.HealthCheckRequest(), timeout=ANSWER_S)
            is_serving = answer.status == health_pb2.HealthCheckResponse.SERVING
            self.state = SERVES if is_serving else "takes no requests"
        except grpc.RpcError:
            self.state = LOADS if self.state == LOADS else SILENT
        return self.state

    def close(self, seconds: float) -> None:
        """Wait for its end; then end it."""
        try:
            self.process.wait(max(0.0, seconds))
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._channel.close()


class Replicas:
    """Engines behind a gateway that sends a request to the engine whose cache has its beginning.

    Must be made in a thread that lives as long as it. An engine that ends is not started again: the others go on.

    Args:
        arguments: of ``hf-paged`` for each engine, without ports.
        tokenizer: of the model.
        model_name: what clients call the model.
        host, port, api_key, limits: see :func:`hf_paged.serve.serve`.
        metrics_port: of the first engine's metrics, the next one's is one more; 0: any; None: none have them.
        environment: added to that of the engines.

    Attributes:
        address: "http://host:port".
        metrics_addresses: of each engine's metrics.

    Raises:
        RuntimeError: an engine or the gateway did not start.
    """

    def __init__(
        self,
        arguments: Sequence[Sequence[str]],
        tokenizer: Any,
        *,
        model_name: str,
        host: str,
        port: int,
        api_key: str | None,
        limits: Limits,
        metrics_port: int | None = None,
        environment: dict[str, str] | None = None,
    ) -> None:
        check_address(host, port, "smg", api_key)
        self.model_name, self._is_closed = model_name, False
        self._folder = tempfile.mkdtemp(prefix="hf-paged-serve-")
        self._status = Path(self._folder, "status.json")
        self._replicas: list[Replica] = []
        self._gateway: Gateway | None = None
        count = len(arguments)
        ports = free_ports(2 * count)
        metrics: list[int | None] = [None] * count
        if metrics_port is not None:
            metrics = list(ports[count:]) if metrics_port == 0 else [metrics_port + i for i in range(count)]
        self.metrics_addresses = [f"http://{LOOPBACK}:{number}/metrics" for number in metrics if number is not None]
        try:
            tokenizer.save_pretrained(self._folder)
            for index, own in enumerate(arguments):
                variables = os.environ | (environment or {})
                self._replicas.append(Replica(index, own, ports[index], metrics[index], variables))
            self._wait_for_engines()
            self._gateway = Gateway(
                ports[:count], self._folder, host=host, port=port, api_key=api_key, limits=limits, has_replicas=True,
                status=self._status,
            )  # fmt: skip
            self.address = self._gateway.address
        except BaseException:
            self.close(drain_s=0)
            raise

    def _wait_for_engines(self) -> None:
        end = time.monotonic() + LOAD_S
        while self.look() and any(replica.state != SERVES for replica in self._replicas):
            for replica in self._replicas:
                if replica.process.poll() is not None:
                    raise RuntimeError(f"replica {replica.index} {replica.look()}: its output says why.")
            if time.monotonic() > end:
                raise RuntimeError(f"replicas still load after {LOAD_S:.0f} s.")
            time.sleep(POLL_S)

    def look(self) -> dict[str, Any]:
        """The answer to ``/health``: "ok", "degraded" or "down", and the state of each engine."""
        before = [replica.state for replica in self._replicas]
        states = [replica.look() for replica in self._replicas]
        for replica, old in zip(self._replicas, before):
            if LOADS not in (old, replica.state) and old != replica.state:
                logger.warning("replica %d %s", replica.index, replica.state)
        serving = states.count(SERVES)
        status = "ok" if serving == len(states) else "degraded" if serving else "down"
        answer = {"status": status, "replicas": [{"replica": i, "state": s} for i, s in enumerate(states)]}
        new = self._status.with_suffix(".new")
        new.write_text(json.dumps(answer))
        new.replace(self._status)
        return answer

    def wait(self, stop: threading.Event | None = None) -> None:
        """Return once ``stop`` is set.

        Raises:
            RuntimeError: all engines, or the gateway, have ended.
        """
        stop = stop or threading.Event()
        assert self._gateway is not None
        while not stop.wait(ASK_S):
            self.look()
            if not self._gateway.is_running:
                raise RuntimeError(f"the server has ended: {self._gateway.describe()}.")
            if all(replica.process.poll() is not None for replica in self._replicas):
                raise RuntimeError(f"the server has ended: every replica has; the last {self._replicas[-1].state}.")

    def close(self, *, drain_s: float = DRAIN_S) -> None:
        """Stop serving.

        Args:
            drain_s: seconds that requests have to end; then they are cancelled. New ones are refused.
        """
        if self._is_closed:
            return
        self._is_closed = True
        if self._gateway is not None:
            self._gateway.refuse_connections()
        for replica in self._replicas:
            replica.process.send_signal(signal.SIGTERM)
        end = time.monotonic() + drain_s + FLUSH_S
        for replica in self._replicas:
            replica.close(end - time.monotonic())
        if self._gateway is not None:
            self._gateway.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> "Replicas":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def devices_of(count: int, device: str, num_gpus: Callable[[], int]) -> list[str]:
    """The device of each replica.

    Args:
        count: of replicas.
        device: that the command was given: "cuda" is one GPU for each.
        num_gpus: of this machine.

    Raises:
        ValueError: there are fewer GPUs than replicas.
    """
    if device != "cuda":
        return [device] * count
    if num_gpus() < count:
        raise ValueError(
            f"--replicas {count} needs as many GPUs, found {num_gpus()}: ask for fewer, or name a device that all of "
            'them share, as in "--device cuda:0".'
        )
    return [f"cuda:{index}" for index in range(count)]
