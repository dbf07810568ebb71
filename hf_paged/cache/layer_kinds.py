"""Which of a model's layers keep keys and values in pages, and by which sliding window."""

from collections import Counter
from typing import Any

from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionLayer,
)

from ..errors import UnsupportedModelError
from ..paging import PageGroup, PagePool
from ..transformers_internals import is_dummy_layer

HYBRID = (LinearAttentionAndFullAttentionLayer, LinearAttentionAndSlidingWindowAttentionLayer)


def set_layers(config: PreTrainedConfig, pool: PagePool) -> list[tuple[Any, PageGroup | None]]:
    """Make the groups of a pool for a model's layers.

    Returns:
        Per layer, transformers' own layer of a cache, and the group of pages of its keys and values; None: it has none.

    Raises:
        UnsupportedModelError: a layer has other states than plain keys and values.
        ValueError: the pool serves another model.
    """
    templates = DynamicCache(config=config).layers
    windows = [_layer_window(template, i, config) for i, template in enumerate(templates)]
    pool.set_layers(dict(Counter(window for window in windows if window != "none")))
    return [(t, None if window == "none" else pool.groups[window]) for t, window in zip(templates, windows)]


def _layer_window(template: Any, index: int, config: PreTrainedConfig) -> Any:
    """The sliding window of one of DynamicCache's layers, None for full attention, "none" where it has no keys."""
    if type(template) in (DynamicLayer, LinearAttentionAndFullAttentionLayer):
        return None
    if type(template) in (DynamicSlidingWindowLayer, LinearAttentionAndSlidingWindowAttentionLayer):
        return template.sliding_window
    if type(template) is LinearAttentionLayer or is_dummy_layer(template):
        return "none"
    raise UnsupportedModelError(
        f"PagedCache does not hold layers of type {type(template).__name__} (layer {index} of {config.model_type}); "
        f"leave past_key_values out, or pass a DynamicCache(config=model.config)."
    )
