"""Pass or fail: the line that a CI reads, and the limits behind it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from eval.quality.distances import QualityRow
from eval.quality.retrieval import Grid


@dataclass(frozen=True, slots=True)
class Limits:
    """What a run may differ by from eager attention in float32.

    Attributes:
        delta_ppl: of the perplexity, relative: 0.01 is 1%.
        max_abs_diff: of one token's log-probability, in nats. Faults of far context hardly move a perplexity, but they
            show here.
        mean_abs_diff: of the log-probabilities, in nats; None: no limit.
    """

    delta_ppl: float
    max_abs_diff: float
    mean_abs_diff: float | None = None


FLOAT32 = Limits(1e-4, 2e-3)
HALF = Limits(1e-2, 1.0)
QUANTISED = Limits(2e-2, 2.0)
"""For pages of FP8 or INT8, whatever the weights are."""


NOISE = 1.5
"""A run may differ, in the mean, by so many times what eager attention in the same dtype differs by."""


def limits_of(row: QualityRow, rows: Sequence[QualityRow], max_delta_ppl: float | None = None) -> Limits:
    """The limits that a run is held to.

    Args:
        row: the run.
        rows: all runs. With weights in bfloat16 or float16, the prefill of eager attention among them says what the
            dtype alone does: noise, above which no run on unquantised pages may be.
        max_delta_ppl: replaces the limit of the perplexity.
    """
    limits = QUANTISED if row.kv_dtype != "auto" else FLOAT32 if row.dtype == "float32" else HALF
    if limits is HALF:
        eager = [other for other in rows if (other.attn, other.path, other.dtype) == ("eager", "prefill", row.dtype)]
        if eager:
            limits = replace(limits, mean_abs_diff=NOISE * eager[0].mean_abs_diff)
    return limits if max_delta_ppl is None else replace(limits, delta_ppl=max_delta_ppl)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What failed; nothing: it passed.

    Attributes:
        failures: one sentence each.
        num_checks: how many figures were held against a limit.
    """

    failures: tuple[str, ...]
    num_checks: int

    @property
    def passed(self) -> bool:
        """Whether nothing failed."""
        return not self.failures

    @property
    def line(self) -> str:
        """One line: PASS or FAIL, and what failed."""
        if self.passed:
            return f"VERDICT: PASS, {self.num_checks} checks"
        return f"VERDICT: FAIL, {len(self.failures)} of {self.num_checks} checks: {'; '.join(self.failures)}"


def judge(
    rows: Sequence[QualityRow],
    induction: Sequence[Grid],
    passkey: Sequence[Grid] = (),
    max_delta_ppl: float | None = None,
) -> Verdict:
    """Hold every figure against its limit.

    Args:
        rows: of `eval.quality.distances.measure`.
        induction: grids of the induction model; each cell must be 1.
        passkey: grids of the model under test, the first of them by the reference attention: no cell of another may be
            below it.
        max_delta_ppl: see `limits_of`.
    """
    failures = []
    num_checks = 0
    for row in rows:
        limits = limits_of(row, rows, max_delta_ppl)
        num_checks += 2
        if not abs(row.delta_ppl) <= limits.delta_ppl:
            failures.append(f"{row.name}: perplexity differs by {row.delta_ppl:+.2e}, limit {limits.delta_ppl:g}")
        if not row.max_abs_diff <= limits.max_abs_diff:
            failures.append(
                f"{row.name}: a token's log-probability differs by {row.max_abs_diff:.2e} nats, limit "
                f"{limits.max_abs_diff:g}"
            )
        if limits.mean_abs_diff is not None:
            num_checks += 1
            if not row.mean_abs_diff <= limits.mean_abs_diff:
                failures.append(
                    f"{row.name}: log-probabilities differ by {row.mean_abs_diff:.2e} nats in the mean, limit "
                    f"{limits.mean_abs_diff:.2e}, {NOISE:g} times what eager attention in {row.dtype} differs by"
                )
    for grid in induction:
        num_checks += 1
        if grid.worst < 1:
            failures.append(f"{grid.name}: {grid.worst:.3f} at worst, must be 1.000")
    for grid in passkey[1:]:
        num_checks += 1
        lost = sum(a < b for row, first in zip(grid.scores, passkey[0].scores) for a, b in zip(row, first))
        if lost:
            failures.append(f"{grid.name}: {lost} cells below those of {passkey[0].name}")
    return Verdict(tuple(failures), num_checks)
