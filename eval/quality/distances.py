"""How far each attention implementation, path and cache dtype is from eager attention in float32, token by token."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from eval.loading import set_attention
from eval.perplexity import PathOptions, RunControl, perplexity
from eval.quality.perplexity_result import PerplexityResult
from eval.quality.windows import DISJOINT

MAX_KEPT_LOGITS = 2**27
"""Log-probabilities of the reference that are kept for the divergence, in float32: 512 MiB."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What is scored, for all runs alike; the fields are those of `eval.perplexity.perplexity`."""

    window: int
    stride: int
    convention: str = "hf"
    page_size: int = 16
    chunk: int = 64
    batch_size: int = 1


@dataclass(frozen=True, slots=True)
class QualityRow:
    """One run beside eager attention in float32.

    Attributes:
        attn, path, kv_dtype: of the run.
        dtype: of the weights.
        ppl, ppl_low, ppl_high: perplexity, and its bootstrap interval (95%) over windows.
        delta_ppl: perplexity over the reference's, less 1.
        mean_diff, standard_error: of the nll less the reference's, in nats; None with one window.
        mean_abs_diff, max_abs_diff: of a token's log-probability, in nats.
        top1_agreement: share of tokens with the same most likely token.
        kl_mean, kl_max: Kullback-Leibler divergence from the reference, in nats; None where a path gives no logits.
        num_scored, kl_tokens: tokens behind the figures.
        seconds: of the forwards, and of the start of an engine.
    """

    attn: str
    path: str
    kv_dtype: str
    dtype: str
    ppl: float
    ppl_low: float
    ppl_high: float
    delta_ppl: float
    mean_diff: float
    standard_error: float | None
    mean_abs_diff: float
    max_abs_diff: float
    top1_agreement: float
    kl_mean: float | None
    kl_max: float | None
    num_scored: int
    kl_tokens: int
    seconds: float

    @property
    def name(self) -> str:
        """The run, in words."""
        return f"{self.attn} {self.path}" + ("" if self.kv_dtype == "auto" else f" {self.kv_dtype}")


class Reference:
    """Eager attention in float32: its result, and its log-probabilities as far as they are kept.

    Args:
        model: in float32; its attention implementation is set to eager.
        ids: [num_tokens] token ids.
        settings: of all runs.
    """

    def __init__(self, model: PreTrainedModel, ids: Sequence[int], settings: Settings) -> None:
        if model.dtype != torch.float32:
            raise ValueError(f"model has the dtype {model.dtype}; the reference is eager attention in float32")
        set_attention(model, "eager")
        vocab_size = model.get_output_embeddings().weight.shape[0]
        self._limit = MAX_KEPT_LOGITS // vocab_size
        self._kept: dict[int, torch.Tensor] = {}
        self.result = _run(model, ids, settings, "prefill", "auto", self._keep)

    def _keep(self, first: int, logits: torch.Tensor) -> None:
        room = self._limit - first
        if room > 0:
            for index, row in enumerate(logits[:room].float().log_softmax(dim=-1).cpu(), start=first):
                self._kept[index] = row

    def divergence(self, into: list[float]) -> Callable[[int, torch.Tensor], None]:
        """An observer that appends KL(reference || observed) of each token that is kept."""

        def observe(first: int, logits: torch.Tensor) -> None:
            rows = [index for index in range(first, first + len(logits)) if index in self._kept]
            if not rows:
                return
            reference = torch.stack([self._kept[index] for index in rows])  # [n, vocab_size]
            observed = logits[[index - first for index in rows]].float().log_softmax(dim=-1).cpu()
            # A vocabulary's padding may have no probability at all in both.
            terms = torch.where(reference.isneginf(), 0.0, reference.exp() * (reference - observed))
            into.extend(terms.double().sum(dim=-1).clamp(min=0).tolist())

        return observe


def measure(
    model: PreTrainedModel,
    reference: Reference,
    ids: Sequence[int],
    settings: Settings,
    run: tuple[str, str, str],
) -> QualityRow:
    """The row of a run (attn, path, kv_dtype) of `model`, on the windows of `reference`."""
    attn, path, kv_dtype = run
    set_attention(model, attn)
    if model.device.type == "cuda":  # kernels are compiled before the clock starts
        num_tokens = settings.window if settings.convention in DISJOINT else settings.window // 4 + 1
        _run(model, ids[:num_tokens], settings, path, kv_dtype, None)
    divergences: list[float] = []
    observe = None if path == "engine" else reference.divergence(divergences)
    result = _run(model, ids, settings, path, kv_dtype, observe)
    return _row(result, reference.result, divergences, str(model.dtype).removeprefix("torch."))


def _run(
    model: PreTrainedModel,
    ids: Sequence[int],
    settings: Settings,
    path: str,
    kv_dtype: str,
    observe: Callable[[int, torch.Tensor], None] | None,
) -> PerplexityResult:
    return perplexity(
        model, ids, window=settings.window, stride=settings.stride, convention=settings.convention, path=path,
        options=PathOptions(settings.page_size, kv_dtype, settings.chunk, settings.batch_size),
        control=RunControl(observe=observe, progress=True),
    )  # fmt: skip


def _row(result: PerplexityResult, reference: PerplexityResult, divergences: list[float], dtype: str) -> QualityRow:
    difference = result.paired_difference(reference)
    low, high = result.confidence_interval()
    return QualityRow(
        attn=result.attn,
        path=result.path,
        kv_dtype=result.kv_dtype,
        dtype=dtype,
        ppl=result.perplexity,
        ppl_low=low,
        ppl_high=high,
        delta_ppl=result.perplexity / reference.perplexity - 1,
        mean_diff=difference.mean,
        standard_error=difference.standard_error,
        mean_abs_diff=(result.nll - reference.nll).abs().mean().item(),
        max_abs_diff=difference.max_abs,
        top1_agreement=result.top1_agreement(reference),
        kl_mean=sum(divergences) / len(divergences) if divergences else None,
        kl_max=max(divergences) if divergences else None,
        num_scored=result.num_scored,
        kl_tokens=len(divergences),
        seconds=result.seconds,
    )
