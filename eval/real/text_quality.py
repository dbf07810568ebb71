"""Perplexity of a text by attention, path and cache dtype, each beside eager attention in float32 and a baseline."""

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel

from eval.loading import set_attention
from eval.perplexity import PathOptions, RunControl, perplexity
from eval.quality.distances import Reference, Settings
from eval.quality.perplexity_result import PerplexityResult

T95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14, 2.13)
"""Standard errors of a 95% interval by Student's t, for 1, 2, 3, ... degrees of freedom."""


def half_interval(standard_error: float | None, num_windows: int) -> float:
    """Half of the 95% interval of a mean over windows; 0 where there is no standard error."""
    if standard_error is None:
        return 0.0
    freedom = num_windows - 1
    # Beyond the table: the expansion of Student's quantile around the normal one.
    factor = T95[freedom - 1] if freedom <= len(T95) else 1.96 + 2.37 / freedom
    return factor * standard_error


@dataclass(frozen=True, slots=True)
class TextRow:
    """One run.

    Attributes:
        attn, path, kv_dtype: of the run.
        ppl: perplexity.
        mean_diff, standard_error: of the nll less that of eager attention in float32, nats a token; None: one window.
        max_abs_diff: of one token, in nats.
        top1_agreement: share of tokens with the same most likely token as eager attention in float32.
        kl_mean, kl_max: from eager attention in float32, in nats; None where a path gives no logits.
        baseline: what `cost` is against: for quantised pages the same run on unquantised ones, for others eager
            attention in the same dtype; "" where the run is that one itself.
        cost, cost_error: mean difference of the nll from the baseline, nats a token, and its standard error.
        cost_half: half of its 95% interval.
        num_scored, kl_tokens: tokens behind the figures.
        seconds: of the forwards, and of the start of an engine.
    """

    attn: str
    path: str
    kv_dtype: str
    ppl: float
    mean_diff: float
    standard_error: float | None
    max_abs_diff: float
    top1_agreement: float
    kl_mean: float | None
    kl_max: float | None
    baseline: str
    cost: float
    cost_error: float | None
    cost_half: float
    num_scored: int
    kl_tokens: int
    seconds: float

    @property
    def name(self) -> str:
        """The run, in words."""
        return run_name(self.attn, self.path, self.kv_dtype)


def run_name(attn: str, path: str, kv_dtype: str) -> str:
    """A run, in words."""
    return f"{attn} {path}" + ("" if kv_dtype == "auto" else f" {kv_dtype}")


def measure_text(
    model: PreTrainedModel,
    reference: Reference,
    ids: Sequence[int],
    settings: Settings,
    runs: Sequence[tuple[str, str, str]],
) -> list[TextRow]:
    """A row for each run (attn, path, kv_dtype); the first must be eager's prefill, the baseline of the others."""
    if runs[0] != ("eager", "prefill", "auto"):
        raise ValueError(f"runs begin with {runs[0]}; the first is the baseline: ('eager', 'prefill', 'auto')")
    results: dict[tuple[str, str, str], PerplexityResult] = {}
    rows = []
    for run in runs:
        attn, path, kv_dtype = run
        set_attention(model, attn)
        if model.device.type == "cuda":  # kernels are compiled before the clock starts
            _score(model, ids[: settings.window // 4 + 1], settings, path, kv_dtype, RunControl())
        divergences: list[float] = []
        observe = None if path == "engine" else reference.divergence(divergences)
        result = _score(model, ids, settings, path, kv_dtype, RunControl(observe=observe, progress=True))
        results[run] = result
        base = runs[0] if kv_dtype == "auto" else (attn, path, "auto")
        base = base if base in results else runs[0]
        rows.append(_row(result, reference.result, divergences, results[base], "" if base == run else run_name(*base)))
    return rows


def _score(
    model: PreTrainedModel, ids: Sequence[int], settings: Settings, path: str, kv_dtype: str, control: RunControl
) -> PerplexityResult:
    options = PathOptions(
        page_size=settings.page_size, kv_dtype=kv_dtype, chunk=settings.chunk, batch_size=settings.batch_size
    )
    return perplexity(
        model, ids, window=settings.window, stride=settings.stride, convention=settings.convention, path=path,
        options=options, control=control,
    )  # fmt: skip


def _row(
    result: PerplexityResult,
    reference: PerplexityResult,
    divergences: list[float],
    baseline: PerplexityResult,
    baseline_name: str,
) -> TextRow:
    difference = result.paired_difference(reference)
    cost = result.paired_difference(baseline)
    return TextRow(
        attn=result.attn,
        path=result.path,
        kv_dtype=result.kv_dtype,
        ppl=result.perplexity,
        mean_diff=difference.mean,
        standard_error=difference.standard_error,
        max_abs_diff=difference.max_abs,
        top1_agreement=result.top1_agreement(reference),
        kl_mean=sum(divergences) / len(divergences) if divergences else None,
        kl_max=max(divergences) if divergences else None,
        baseline=baseline_name,
        cost=cost.mean,
        cost_error=cost.standard_error,
        cost_half=half_interval(cost.standard_error, len(result.windows)),
        num_scored=result.num_scored,
        kl_tokens=len(divergences),
        seconds=result.seconds,
    )
