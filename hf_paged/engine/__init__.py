"""The continuous-batching engine: requests, scheduler, steps, tokens."""

from .config import EngineConfig
from .engine import Engine
from .handle import RequestHandle
from .scheduling.request import RequestOutput, RequestTiming, SequenceOutput
from .startup.support import is_supported
from .trace import EngineStats

__all__ = [
    "Engine",
    "EngineConfig",
    "EngineStats",
    "RequestHandle",
    "RequestOutput",
    "RequestTiming",
    "SequenceOutput",
    "is_supported",
]
