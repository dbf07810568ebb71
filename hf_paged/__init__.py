"""A continuous-batching engine, paged attention and a paged KV cache for Hugging Face transformers.

``import hf_paged`` makes ``attn_implementation="paged_flash"`` valid in ``from_pretrained``, ``from_config`` and
``set_attn_implementation``; ``generate()`` on such a model keeps its keys and values in a :class:`PagedCache`.
"""

from .cache.paged_cache import PagedCache
from .engine import (
    Engine,
    EngineConfig,
    EngineHealth,
    EngineSnapshot,
    EngineStats,
    PageEventBatch,
    PageEvents,
    PagesCleared,
    PagesRemoved,
    PagesStored,
    RequestHandle,
    RequestOutput,
    RequestSnapshot,
    RequestTiming,
    SequenceOutput,
    TokenEvent,
    TokenEvents,
    generate_distributed,
    is_supported,
)
from .errors import OutOfPagesError, QueueFullError, RankError, RequestError, UnsupportedModelError
from .generation.patch import generate, patch_generate, unpatch_generate
from .hooks import row_wise
from .paging import PagePool
from .registration import register
from .serve import serve

__version__ = "0.1.0"
__all__ = [
    "Engine",
    "EngineConfig",
    "EngineHealth",
    "EngineSnapshot",
    "EngineStats",
    "OutOfPagesError",
    "PageEventBatch",
    "PageEvents",
    "PagePool",
    "PagedCache",
    "PagesCleared",
    "PagesRemoved",
    "PagesStored",
    "QueueFullError",
    "RankError",
    "RequestError",
    "RequestHandle",
    "RequestOutput",
    "RequestSnapshot",
    "RequestTiming",
    "SequenceOutput",
    "TokenEvent",
    "TokenEvents",
    "UnsupportedModelError",
    "__version__",
    "generate",
    "generate_distributed",
    "is_supported",
    "patch_generate",
    "row_wise",
    "serve",
    "unpatch_generate",
]

register()
