"""Perplexity against bits of keys and values: quantised pages beside transformers' `QuantizedCache`.

Every cache is fed the same windows in chunks, so that all but the newest keys are read as the cache keeps them. A
`QuantizedCache` keeps its newest tokens unquantised; here up to `RESIDUAL` of them. Its backends are packages of their
own (`pip install optimum-quanto hqq`); what is not installed has a row that says so.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from tqdm import tqdm
from transformers import Cache, DynamicCache, PreTrainedConfig, PreTrainedModel, QuantizedCache

import hf_paged
from eval.cache_memory import held_bytes
from eval.loading import set_attention, with_cache
from eval.perplexity import PathOptions, perplexity
from eval.quality.distances import Settings

RESIDUAL = 16


def _quantized(backend: str, bits: int, config: PreTrainedConfig, page_size: int) -> Cache:
    """A QuantizedCache, which has no pages. Raises ImportError where its backend is not installed."""
    if backend == "fp8":  # one scale for each tensor, and no options
        return QuantizedCache(backend, config)
    return QuantizedCache(backend, config, nbits=bits, residual_length=RESIDUAL)


CACHES: dict[str, Callable[[PreTrainedConfig, int], Cache]] = {
    "DynamicCache": lambda config, page_size: DynamicCache(config=config),
    "PagedCache auto": lambda config, page_size: hf_paged.PagedCache(config, page_size=page_size),
    "PagedCache fp8": lambda config, page_size: hf_paged.PagedCache(config, page_size=page_size, kv_dtype="fp8"),
    "PagedCache int8": lambda config, page_size: hf_paged.PagedCache(config, page_size=page_size, kv_dtype="int8"),
    **{
        f"QuantizedCache {backend} {bits} bits": partial(_quantized, backend, bits)
        for backend, widths in (("fp8", (8,)), ("quanto", (4, 2)), ("hqq", (8, 4, 2)))
        for bits in widths
    },
}


@dataclass(frozen=True, slots=True)
class CacheRow:
    """One cache.

    Attributes:
        cache: its name.
        bits: of memory for each number of keys and values, scales and unfilled pages included; None: not measured.
        ppl: perplexity.
        delta_ppl: over that of the first cache, less 1.
        max_abs_diff: of a token's log-probability against the first cache, in nats.
        mean_diff, standard_error: of the nll less that of the first cache, nats a token; None: one window.
        num_windows: behind the standard error.
        top1_agreement: share of tokens with the same most likely token as with the first cache.
        note: why it was not measured.
    """

    cache: str
    bits: float | None = None
    ppl: float | None = None
    delta_ppl: float | None = None
    max_abs_diff: float | None = None
    mean_diff: float | None = None
    standard_error: float | None = None
    num_windows: int = 0
    top1_agreement: float | None = None
    note: str = ""


def kv_table(
    model: PreTrainedModel, ids: Sequence[int], settings: Settings, names: Sequence[str] = tuple(CACHES)
) -> Iterator[CacheRow]:
    """A row for each cache, as it is measured; the first is what the others are compared with.

    A cache whose backend is not installed, that refuses the model, or that gives NaN has a row that says so.

    Raises:
        FloatingPointError: a PagedCache gave NaN.
        ValueError: a name that is not in `CACHES`.
    """
    unknown = [name for name in names if name not in CACHES]
    if unknown:
        raise ValueError(f"names has {unknown[0]!r}; pass some of {tuple(CACHES)}")
    reference = None
    for name in tqdm(names, desc="caches", leave=False):
        set_attention(model, "paged_flash" if name.startswith("PagedCache") else "sdpa")
        try:
            bits = _bits(model, ids[: settings.window], CACHES[name], settings)
            options = PathOptions(
                chunk=settings.chunk, batch_size=settings.batch_size,
                cache_factory=lambda name=name: CACHES[name](model.config, settings.page_size),
            )  # fmt: skip
            result = perplexity(
                model, ids, window=settings.window, stride=settings.stride, convention=settings.convention,
                path="chunked_prefill", options=options,
            )  # fmt: skip
        except (ImportError, ValueError, TypeError, RuntimeError, FloatingPointError) as error:
            if isinstance(error, FloatingPointError) and name.startswith("PagedCache"):
                raise  # only of others' caches: later keys overflow the float8 scale of the first ones
            yield CacheRow(name, note=f"{type(error).__name__}: {' '.join(str(error).split())[:160]}")
            continue
        reference = reference or result
        difference = result.paired_difference(reference)
        yield CacheRow(
            name, bits, result.perplexity, result.perplexity / reference.perplexity - 1, difference.max_abs,
            difference.mean, difference.standard_error, len(result.windows), result.top1_agreement(reference),
        )  # fmt: skip


@torch.no_grad()
def _bits(
    model: PreTrainedModel, ids: Sequence[int], make: Callable[[PreTrainedConfig, int], Cache], settings: Settings
) -> float:
    """Bits for each number of keys and values that a cache holds after `ids`, fed in chunks."""
    cache = make(model.config, settings.page_size)
    rows = torch.tensor([list(ids)], device=model.device)
    for part in rows.split(settings.chunk, dim=1):
        model(part, **with_cache(model, cache), use_cache=True, logits_to_keep=1)
    dense = DynamicCache(config=model.config)
    model(rows, **with_cache(model, dense), use_cache=True, logits_to_keep=1)
    numbers = sum(layer.keys.numel() + layer.values.numel() for layer in dense.layers)
    return held_bytes(cache) * 8 / numbers
