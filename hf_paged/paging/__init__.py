"""Pages: who owns which, and where a sequence's tokens are. Plain Python and torch; no kernels, no transformers."""

from .allocator import PageAllocator
from .device_table import DeviceTable
from .pool import GroupMemory, LayerPages, PageGroup, PagePool
from .prefix_cache import PrefixCache, PrefixMatch
from .sequences import GONE, SequenceTable

__all__ = [
    "GONE",
    "DeviceTable",
    "GroupMemory",
    "LayerPages",
    "PageAllocator",
    "PageGroup",
    "PagePool",
    "PrefixCache",
    "PrefixMatch",
    "SequenceTable",
]
