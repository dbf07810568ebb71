"""Paged attention for every Hugging Face causal LM.

``import hf_paged`` makes ``attn_implementation="paged_flash"`` valid in ``from_pretrained``, ``from_config`` and
``set_attn_implementation``; ``generate()`` on such a model keeps its keys and values in a :class:`PagedCache`.
"""

from .cache import PagedCache
from .errors import OutOfPagesError, UnsupportedModelError
from .paging import PagePool
from .registration import register

__version__ = "0.1.0"
__all__ = ["OutOfPagesError", "PagePool", "PagedCache", "UnsupportedModelError", "__version__"]

register()
