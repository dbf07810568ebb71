"""What ``import hf_paged`` does to transformers: one attention implementation, its mask, its default cache."""

from typing import Any

from transformers import AttentionInterface, AttentionMaskInterface
from transformers.utils import logging

from .attention.flash_functions import all_functions
from .attention.interface import paged_flash_attention
from .attention.mask import paged_flash_mask
from .cache.paged_cache import PagedCache
from .errors import UnsupportedModelError
from .transformers_internals import NAMES, PACKED_PREFIX, install

logger = logging.get_logger(__name__)


def register() -> None:
    """Make "paged_flash" a valid ``attn_implementation``. Idempotent.

    Lines that the package logs have the level and the handlers of transformers' own: ``set_verbosity_error()`` and the
    like hold for them too.
    """
    logging.get_logger("hf_paged").parent = logging.get_logger()
    for name in NAMES:
        AttentionInterface.register(name, paged_flash_attention)
        AttentionInterface.register(PACKED_PREFIX + name, paged_flash_attention)
        # Without a mask function transformers would hand over None, and padding would take part in attention.
        AttentionMaskInterface.register(name, paged_flash_mask)
        AttentionMaskInterface.register(PACKED_PREFIX + name, paged_flash_mask)
    install(all_functions, default_cache, PagedCache)


def default_cache(config: Any) -> PagedCache | None:
    """The cache of ``generate()`` where none was given; None where the model's layers do not fit into pages."""
    try:
        return PagedCache(config)
    except UnsupportedModelError as error:
        logger.warning_once(f"generate() keeps transformers' DynamicCache for this model: {error}")
        return None
