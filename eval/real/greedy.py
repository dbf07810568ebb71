"""Greedy tokens of one model by every way to generate, prompt by prompt, beside eager attention.

A greedy text that differs in one token differs behind it. In float32 differences of rounding hardly ever change a
token; in bfloat16 they do, for eager attention as well. So each way is also compared with eager attention in float32,
beside eager attention in the model's dtype: a way that is sound leaves the float32 text no earlier than that one, by
chance sooner on some prompts and later on others.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from tqdm import tqdm
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel

import hf_paged
from eval.loading import set_attention
from eval.real.prompts import Prompt

EAGER, EAGER32 = "eager", "eager float32"
WAYS = ("paged_flash", "patched", "engine")
"""Ways held against eager attention: `generate()` on "paged_flash", patched `generate()`, and `Engine.generate`."""
LEAST_P = 1e-3
"""A sign test below this chance says that a way leaves the float32 text earlier than eager attention does."""
MAX_GAP = {"float32": 1e-2, "other": 1.0}
"""Nats between eager's two best tokens above which another token is no matter of rounding."""


@dataclass(frozen=True, slots=True)
class Texts:
    """What one way wrote.

    Attributes:
        way: its name.
        tokens: new tokens of each prompt, up to an end of text.
        gaps: nats between the best two tokens at each step; None where they were not kept.
        seconds: of all prompts, kernels' compilation included.
    """

    way: str
    tokens: tuple[tuple[int, ...], ...]
    gaps: tuple[tuple[float, ...], ...] | None
    seconds: float


@dataclass(frozen=True, slots=True)
class Agreement:
    """One way's texts beside another's.

    Attributes:
        way, reference: the two.
        first: for each prompt, the index of the first new token that differs; None where all are equal.
        gaps: for each prompt that differs, nats between the reference's best two tokens there; empty where not kept.
        new_tokens: tokens asked for.
    """

    way: str
    reference: str
    first: tuple[int | None, ...]
    gaps: tuple[float, ...]
    new_tokens: int

    @property
    def num_equal(self) -> int:
        """Prompts with the same text."""
        return sum(place is None for place in self.first)

    @property
    def median_first(self) -> float | None:
        """Median place of the first difference, of the prompts that differ."""
        places = sorted(place for place in self.first if place is not None)
        return float(places[len(places) // 2]) if places else None

    def still_equal(self) -> list[float]:
        """Share of prompts whose first n tokens are equal, for n of 0 to `new_tokens`."""
        places = [math.inf if place is None else place for place in self.first]
        return [sum(place >= n for place in places) / len(places) for n in range(self.new_tokens + 1)]


def write_texts(
    model: PreTrainedModel,
    prompts: Sequence[Prompt],
    new_tokens: int,
    way: str,
    *,
    kv_dtype: str = "auto",
    batch_tokens: int = 8192,
) -> Texts:
    """Greedy texts of all prompts.

    Args:
        model: on its device; its attention implementation is left changed.
        prompts: what to go on from.
        new_tokens: of each, unless the model ends a text earlier.
        way: "eager", or one of `WAYS`.
        kv_dtype: of the engine's pages.
        batch_tokens: tokens of a left-padded batch at most, of `generate()`; prompts of like length share one.
    """
    begin = time.perf_counter()
    ends = _ends(model)
    config = GenerationConfig(
        max_new_tokens=new_tokens, do_sample=False, num_beams=1, pad_token_id=0, eos_token_id=sorted(ends) or None
    )
    set_attention(model, EAGER if way in (EAGER, EAGER32) else "paged_flash")
    gaps = None
    if way == "engine":
        tokens = _by_engine(model, prompts, config, kv_dtype)
    elif way == "patched":
        hf_paged.patch_generate(model)
        try:
            tokens, _ = _by_generate(model, prompts, config, batch_tokens, way)
        finally:
            hf_paged.unpatch_generate(model)
    else:
        tokens, gaps = _by_generate(model, prompts, config, batch_tokens, way, keeps_gaps=way in (EAGER, EAGER32))
    tokens = [_until_end(row, ends) for row in tokens]
    name = way if kv_dtype == "auto" else f"{way} {kv_dtype}"
    return Texts(
        name, tuple(map(tuple, tokens)), None if gaps is None else tuple(map(tuple, gaps)), time.perf_counter() - begin
    )


def compare(texts: Texts, reference: Texts, new_tokens: int) -> Agreement:
    """Where texts differ from a reference's first."""
    first: list[int | None] = []
    gaps = []
    for index, (row, other) in enumerate(zip(texts.tokens, reference.tokens, strict=True)):
        place = next((i for i, (a, b) in enumerate(zip(row, other)) if a != b), min(len(row), len(other)))
        if row == other:
            first.append(None)
            continue
        first.append(place)
        if reference.gaps is not None and place < len(reference.gaps[index]):
            gaps.append(reference.gaps[index][place])
    return Agreement(texts.way, reference.way, tuple(first), tuple(gaps), new_tokens)


def sign_test(way: Agreement, eager: Agreement) -> tuple[int, int, float]:
    """(prompts on which a way stays equal to the reference longer than eager does, shorter, chance of so many shorter).

    One-sided, without ties (Dixon and Mood 1946, https://doi.org/10.1080/01621459.1946.10501898).
    """
    pairs = [
        (math.inf if a is None else a, math.inf if b is None else b)
        for a, b in zip(way.first, eager.first, strict=True)
    ]
    longer, shorter = sum(a > b for a, b in pairs), sum(a < b for a, b in pairs)
    count = longer + shorter
    chance = sum(math.comb(count, k) for k in range(shorter, count + 1)) / 2**count
    return longer, shorter, chance


def _ends(model: PreTrainedModel) -> set[int]:
    ends = model.generation_config.eos_token_id
    return set() if ends is None else set(ends) if isinstance(ends, (list, tuple)) else {ends}


def _until_end(row: Sequence[int], ends: set[int]) -> list[int]:
    end = next((i for i, token in enumerate(row) if token in ends), len(row))
    return list(row[: end + 1])


def _by_engine(
    model: PreTrainedModel, prompts: Sequence[Prompt], config: GenerationConfig, kv_dtype: str
) -> list[list[int]]:
    longest = max(len(prompt.ids) for prompt in prompts) + int(config.max_new_tokens or 0)
    options = hf_paged.EngineConfig(kv_dtype=kv_dtype, max_model_len=longest, max_num_seqs=64)
    with hf_paged.Engine(model, options, background=False) as engine:
        outputs = engine.generate([list(prompt.ids) for prompt in prompts], generation_config=config, progress=True)
    for output in outputs:
        if output.error is not None:
            raise output.error
    return [list(output.token_ids) for output in outputs]


@torch.no_grad()
def _by_generate(
    model: PreTrainedModel,
    prompts: Sequence[Prompt],
    config: GenerationConfig,
    batch_tokens: int,
    way: str,
    keeps_gaps: bool = False,
) -> tuple[list[list[int]], list[list[float]] | None]:
    """New tokens of every prompt, and the gaps of each step, from left-padded batches of prompts of like length."""
    tokens: list[list[int]] = [[] for _ in prompts]
    gaps: list[list[float]] = [[] for _ in prompts]
    with tqdm(total=len(prompts), desc=f"greedy {way}", unit="prompt") as bar:
        for batch in _batches(prompts, batch_tokens):
            width = max(len(prompts[i].ids) for i in batch)
            ids = torch.tensor([[0] * (width - len(prompts[i].ids)) + list(prompts[i].ids) for i in batch])
            mask = torch.tensor([[0] * (width - len(prompts[i].ids)) + [1] * len(prompts[i].ids) for i in batch])
            keep: list[torch.Tensor] = []
            processors = LogitsProcessorList([_gap_keeper(keep)] if keeps_gaps else [])
            rows = model.generate(
                ids.to(model.device), attention_mask=mask.to(model.device), generation_config=config,
                logits_processor=processors,
            )[:, width:].tolist()  # fmt: skip
            kept = torch.stack(keep, dim=1).tolist() if keep else [[] for _ in batch]
            for i, row, row_gaps in zip(batch, rows, kept):
                tokens[i], gaps[i] = row, row_gaps
            bar.update(len(batch))
    return tokens, gaps if keeps_gaps else None


def _gap_keeper(keep: list[torch.Tensor]) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    def processor(_: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        best = scores.float().topk(2, dim=-1).values
        keep.append((best[:, 0] - best[:, 1]).cpu())
        return scores

    return processor


def _batches(prompts: Sequence[Prompt], batch_tokens: int) -> list[list[int]]:
    """Indices of prompts, those of like length together, padded `batch_tokens` at most (or one prompt)."""
    batches: list[list[int]] = []
    for index in sorted(range(len(prompts)), key=lambda i: -len(prompts[i].ids)):
        if batches and (len(batches[-1]) + 1) * len(prompts[batches[-1][0]].ids) <= batch_tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches
