"""Pages: who owns which, and where a sequence's tokens are. Plain Python and torch; no kernels, no transformers."""

from .allocator import PageAllocator
from .pool import PagePool
from .sequences import SequenceTable

__all__ = ["PageAllocator", "PagePool", "SequenceTable"]
