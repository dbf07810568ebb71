"""The continuous-batching engine: requests, scheduler, steps, tokens."""

from .config import EngineConfig
from .distributed import generate_distributed
from .engine import Engine
from .events import TokenEvent, TokenEvents
from .handle import RequestHandle
from .page_events import PageEventBatch, PageEvents, PagesCleared, PagesRemoved, PagesStored
from .scheduling.request import RequestOutput, RequestTiming, SequenceOutput
from .startup.support import is_supported
from .trace import EngineStats
from .views import EngineHealth, EngineSnapshot, RequestSnapshot

__all__ = [
    "Engine",
    "EngineConfig",
    "EngineHealth",
    "EngineSnapshot",
    "EngineStats",
    "PageEventBatch",
    "PageEvents",
    "PagesCleared",
    "PagesRemoved",
    "PagesStored",
    "RequestHandle",
    "RequestOutput",
    "RequestSnapshot",
    "RequestTiming",
    "SequenceOutput",
    "TokenEvent",
    "TokenEvents",
    "generate_distributed",
    "is_supported",
]
