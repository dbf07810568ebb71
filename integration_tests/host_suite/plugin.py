"""A pytest plugin for transformers' own tests: "paged_flash" by default, and each generate() is held to eager's.

``HF_PAGED_HOST_MODE`` is "baseline" (transformers as it is), "plain" or "patched" (each model that generates is patched
by its first call). In the last two every deterministic ``generate()`` runs with eager attention on a deep copy first,
and the tokens must be equal; tests that ask for "flash_attention_2" get "paged_flash", on a CPU too.
"""

import copy
import functools
import inspect
import os
from typing import Any

import pytest
import torch
import transformers.testing_utils as testing
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedModel

import hf_paged
from hf_paged.generation.patch import PatchedGenerate
from hf_paged.transformers_internals import uses_attention_interface

MODE = os.environ.get("HF_PAGED_HOST_MODE", "baseline")
compared = 0


def pytest_configure(config: pytest.Config) -> None:
    """Before test modules are imported: they read the decorators that say what a machine must have."""
    if MODE not in ("baseline", "plain", "patched"):
        raise pytest.UsageError(f"HF_PAGED_HOST_MODE={MODE!r}: baseline, plain or patched is accepted.")
    if MODE == "baseline":
        return
    for name in ("require_flash_attn", "require_torch_accelerator", "require_torch_gpu"):
        setattr(testing, name, lambda test: test)
    PreTrainedModel._check_and_adjust_attn_implementation = _with_default(
        PreTrainedModel._check_and_adjust_attn_implementation
    )
    GenerationMixin.generate = _held_to_eager(GenerationMixin.generate)


class _AnyDynamicCache(type):
    """transformers' DynamicCache, of which a PagedCache counts as an instance."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Cache:
        return DynamicCache(*args, **kwargs)

    def __instancecheck__(cls, cache: Any) -> bool:
        return isinstance(cache, DynamicCache | hf_paged.PagedCache)


class AnyDynamicCache(metaclass=_AnyDynamicCache):
    """For test modules: they ask for the class to know that a cache is the default one, which grows."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """After test modules are imported."""
    if MODE == "baseline":
        return
    for module in {inspect.getmodule(base) for item in items for base in getattr(item, "cls", object).__mro__}:
        if getattr(module, "DynamicCache", None) is DynamicCache and "test" in module.__name__:
            module.DynamicCache = AnyDynamicCache


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Each process leaves the number of calls that were compared."""
    path = os.environ.get("HF_PAGED_HOST_COUNTS")
    if path and compared:
        with open(path, "a", encoding="utf-8") as file:
            file.write(f"{compared}\n")


def _with_default(original: Any) -> Any:
    @functools.wraps(original)
    def check(model: PreTrainedModel, attn_implementation: str | None, *args: Any, **kwargs: Any) -> str:
        if attn_implementation in (None, "flash_attention_2") and uses_attention_interface(model):
            attn_implementation = "paged_flash"
        return original(model, attn_implementation, *args, **kwargs)

    return check


def _held_to_eager(original: Any) -> Any:
    @functools.wraps(original)
    def generate(model: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(vars(model).get("generate"), PatchedGenerate) or not _runs_paged(model):
            return original(model, *args, **kwargs)
        state = torch.get_rng_state()
        expected = _with_eager(original, model, args, kwargs)
        torch.set_rng_state(state)
        if MODE == "plain":
            got = original(model, *args, **kwargs)
        else:
            hf_paged.patch_generate(model, hf_paged.EngineConfig(num_pages=512))
            try:
                got = model.generate(*args, **kwargs)
            finally:
                hf_paged.unpatch_generate(model)
        if expected is not None:
            global compared
            compared += 1
            wanted, given = (getattr(x, "sequences", x) for x in (expected, got))
            assert torch.equal(given.cpu(), wanted.cpu()), f"tokens differ from eager's: {given}, {wanted}"
        return got

    return generate


def _runs_paged(model: Any) -> bool:
    config = model.config.get_text_config(decoder=True)
    return getattr(config, "_attn_implementation", None) == "paged_flash"


def _with_eager(original: Any, model: Any, args: Any, kwargs: Any) -> Any:
    """What eager attention gives; None where the call samples, goes on from a cache, or is not to be compared."""
    config = kwargs.get("generation_config") or model.generation_config
    samples = kwargs.get("do_sample", config.do_sample)
    if samples or any(isinstance(x, Cache) for x in kwargs.values()) or kwargs.get("streamer") is not None:
        return None
    if model.dtype not in (torch.float32, torch.float64):
        return None  # Roundings of half precision choose among close tokens.
    mask = kwargs.get("attention_mask")
    if MODE == "patched" and mask is not None and not bool(mask[:, -1].all()):
        return None  # Padding at the right: a patched model serves each prompt as if it were alone.
    try:
        twin = copy.deepcopy(model)
        twin.set_attn_implementation("eager")
        # As it is written: a test that counts compilations counts those of "paged_flash".
        with torch.compiler.set_stance("force_eager"):
            return original(twin, *copy.deepcopy(args), **copy.deepcopy(kwargs))
    except Exception:
        return None  # The test expects an error, or says itself what is wrong.
