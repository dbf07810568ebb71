"""How long a report will take: a few forwards of its real sizes are timed before it begins, and all of them counted.

It is a forecast of forwards. Loading, tables and pictures are not in it.
"""

import time
from collections import Counter
from collections.abc import Sequence
from itertools import islice, pairwise
from statistics import median

import torch
from transformers import Cache, PreTrainedModel

import hf_paged
from eval.loading import set_attention
from eval.perplexity import PathOptions, default_cache_factory
from eval.quality.distances import Settings
from eval.quality.retrieval import chunk_of
from eval.quality.scoring import scored_logits
from eval.quality.windows import plan_windows

MAX_TIMED_STEPS = 4


def in_words(seconds: float) -> str:
    """A duration: "40 s", "3 min", "2.5 h"."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


@torch.no_grad()
def forward_seconds(
    model: PreTrainedModel, rows: torch.Tensor, num_scored: int, path: str, cache: Cache | None, chunk: int
) -> tuple[float, float]:
    """(seconds to the first logits, seconds for each further part) of `eval.quality.scoring.scored_logits`.

    Args:
        model, rows, num_scored, path, cache, chunk: as there. At most `MAX_TIMED_STEPS` further parts are run.
    """
    begin = time.perf_counter()
    marks = []
    for _ in islice(scored_logits(model, rows, num_scored, path, cache, chunk), 1 + MAX_TIMED_STEPS):
        if rows.is_cuda:
            torch.cuda.synchronize(rows.device)
        marks.append(time.perf_counter())
    steps = [after - before for before, after in pairwise(marks)]
    return marks[0] - begin, median(steps) if steps else 0.0  # a first step may be slow for once


def run_seconds(model: PreTrainedModel, ids: Sequence[int], settings: Settings, run: tuple[str, str, str]) -> float:
    """Seconds that `eval.quality.distances.measure` will take, from one batch of the most frequent shape of window.

    Args:
        model, ids, settings, run: as there. An engine is taken for as fast as a prefill through pages, and started.
    """
    attn, path, kv_dtype = run
    set_attention(model, attn)
    start = 0.0
    if path == "engine":
        begin = time.perf_counter()
        config = hf_paged.EngineConfig(page_size=settings.page_size, kv_dtype=kv_dtype, max_model_len=settings.window)
        hf_paged.Engine(model, config, background=False).close()
        start, path = time.perf_counter() - begin, "paged_prefill"
    shapes = Counter(
        item.shape for item in plan_windows(len(ids), settings.window, settings.stride, settings.convention)
    )
    (length, num_scored), count = shapes.most_common(1)[0]
    rows = torch.tensor([list(ids[:length])] * min(count, settings.batch_size), device=model.device)
    make_cache = default_cache_factory(model, path, PathOptions(settings.page_size, kv_dtype))
    for _ in range(2 if rows.is_cuda else 1):  # a GPU's first forward compiles kernels
        first, further = forward_seconds(model, rows, num_scored, path, make_cache(), settings.chunk)
    total = start
    for (length, num_scored), count in shapes.items():
        batches = -(-count // settings.batch_size)
        total += batches * (first + further * (_num_parts(length, num_scored, path, settings.chunk) - 1))
    return total


def prompts_seconds(
    model: PreTrainedModel,
    prompt: torch.Tensor,
    lengths: Sequence[int],
    num_scored: int,
    path: str,
    *,
    kv_dtype: str = "auto",
    page_size: int = 16,
) -> float:
    """Seconds for a prompt of each of the lengths on "paged_flash"; a prompt's time is taken to grow with its length.

    Args:
        model: its attention implementation is set.
        prompt: [1, max(lengths)] token ids, which are run.
        lengths: of the prompts, in tokens.
        num_scored: last tokens of each that are scored; with path "decode" one step for each but the first.
        path: "decode"; any other is taken for "chunked_prefill" in the chunks of `eval.quality.retrieval`.
        kv_dtype, page_size: of the pages.
    """
    set_attention(model, "paged_flash")
    rows = prompt.to(model.device)
    path = path if path == "decode" else "chunked_prefill"
    for _ in range(2 if rows.is_cuda else 1):
        cache = hf_paged.PagedCache(model.config, page_size=page_size, kv_dtype=kv_dtype)
        first, further = forward_seconds(model, rows, num_scored, path, cache, chunk_of(rows.shape[1]))
    steps = further * (num_scored - 1) if path == "decode" else 0.0
    return first * sum(lengths) / rows.shape[1] + steps * len(lengths)


def _num_parts(length: int, num_scored: int, path: str, chunk: int) -> int:
    """How many parts `eval.quality.scoring.scored_logits` yields."""
    if path == "decode":
        return num_scored
    if path == "chunked_prefill":
        num_fed = length - 1
        return -(-num_fed // chunk) - (num_fed - num_scored) // chunk
    return 1
