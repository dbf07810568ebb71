"""An OpenAI-compatible server: an engine behind a gateway that others maintain.

::

    client -> guard (refuses what the gateway drops) -> gateway (HTTP, chat templates, tools, keys)    child processes
           -> gRPC on loopback -> engine                                                               this process

Needs the extra ``serve``; importing this package does not.
"""

import importlib.metadata
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .limits import Limits

if TYPE_CHECKING:
    from ..engine import Engine
    from .server import Server

__all__ = ["GATEWAYS", "Limits", "serve"]

GATEWAYS = ("smg", "none")
EXTRA = ("smg", "smg-grpc-proto", "grpcio", "grpcio-health-checking", "llguidance", "prometheus-client")
"""Distributions of the extra ``serve``."""


def check_gateway(gateway: str) -> None:
    """
    Raises:
        ValueError: it is none of :data:`GATEWAYS`.
    """
    if gateway == "dynamo":
        raise ValueError(
            'gateway "dynamo" is not served: its workers register with a runtime of its own (ai-dynamo-runtime) as a '
            f"dynamo.common.backend.LLMEngine, and there is no such adapter here. Use one of {GATEWAYS}."
        )
    if gateway not in GATEWAYS:
        raise ValueError(f"gateway must be one of {GATEWAYS}, got {gateway!r}.")


def require_extra() -> None:
    """
    Raises:
        ImportError: a distribution of the extra is not installed; the message names the extra.
    """
    missing = []
    for name in EXTRA:
        try:
            importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
    if missing:
        raise ImportError(f'serving needs {", ".join(missing)}: pip install "hf-paged[serve]".')


def serve(
    engine: "Engine",
    tokenizer: Any,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    gateway: str = "smg",
    model_name: str | None = None,
    api_key: str | None = None,
    metrics_port: int | None = None,
    limits: Limits | None = None,
    adapters: Sequence[str] = (),
) -> "Server":
    """Serve an engine that this process goes on using; returns once the server answers.

    Args:
        engine: with ``background=True``.
        tokenizer: of the model; its chat template is the server's.
        host, port: where the gateway listens; port 0: any free one.
        gateway: "smg": the OpenAI protocol. "none": the engine's gRPC service alone, on ``port``, which has no keys.
        model_name: what clients call the model; None: its name or path.
        api_key: that clients must send; needed where ``host`` is not of this machine alone.
        metrics_port: of this process' Prometheus metrics, on loopback; None: there are none.
        limits: of what a request may ask for.
        adapters: LoRA adapters (:meth:`Engine.adapters`) that clients ask for as models of these names. With some, the
            model under its own name is the base model; otherwise it is what is active on it.

    Returns:
        The running server: ``with serve(...) as server``, or :meth:`Server.close`.

    Raises:
        ImportError: the extra is not installed.
        ValueError: an argument is not one of those accepted.
        RuntimeError: the gateway did not start.
    """
    check_gateway(gateway)
    require_extra()
    from .server import Server

    return Server(
        engine, tokenizer, host=host, port=port, gateway=gateway, model_name=model_name, api_key=api_key,
        metrics_port=metrics_port, limits=limits or Limits(), adapters=adapters,
    )  # fmt: skip
