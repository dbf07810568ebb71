"""What transformers calls a cache: "cache" from 5.24 on, "past_key_values" before. Tests run on both."""

import inspect
from typing import Any

from transformers import GenerationMixin

CACHE = "cache" if "cache" in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters else (
    "past_key_values"
)  # fmt: skip
"""The keyword argument of ``generate()`` and of forwards, and the field of their outputs."""


def with_cache(cache: Any) -> dict[str, Any]:
    """The keyword argument that hands a cache over: ``model(ids, **with_cache(cache))``."""
    return {CACHE: cache}


def cache_of(output: Any) -> Any:
    """The cache in an output of a forward or of ``generate()``; None: there is none."""
    return getattr(output, CACHE)
