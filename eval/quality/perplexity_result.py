"""What a perplexity run gives, and how two runs on the same windows are compared."""

import math
from dataclasses import dataclass

import torch

from eval.quality.windows import Window


@dataclass(frozen=True, slots=True)
class PairedDifference:
    """What one run's nll exceeds another's by, on the same tokens, in nats.

    Attributes:
        mean: mean over the scored tokens.
        standard_error: of `mean`, over windows; None with fewer than two windows.
        max_abs: largest absolute difference of a single token.
        max_abs_token: index in the text of that token.
    """

    mean: float
    standard_error: float | None
    max_abs: float
    max_abs_token: int


@dataclass(frozen=True, slots=True, eq=False)
class PerplexityResult:
    """One run of `perplexity`.

    Attributes:
        nll: [num_scored] float64 on the CPU, nats; computed in float32, or in float64 for a float64 model.
        positions: [num_scored] int64, index in the text of the token that each nll belongs to; ascending.
        windows: the windows, in the order of `nll`.
        attn: attention implementation of the model.
        path: one of `eval.quality.scoring.PATHS`.
        convention: one of `eval.quality.windows.CONVENTIONS`.
        seconds: wall time of all forwards of this process, compilation of kernels included; batches taken over from an
            earlier run are not in it.
        kv_dtype: of the pages: "auto", "fp8", "int8"; or the name of a cache of the caller.
        top1: [num_scored] int64, the most likely token at each place.
        num_from_pages: scored tokens whose query read keys of earlier tokens out of pages, see
            `eval.quality.scoring.reads_pages`.
    """

    nll: torch.Tensor
    positions: torch.Tensor
    windows: tuple[Window, ...]
    attn: str
    path: str
    convention: str
    seconds: float
    kv_dtype: str = "auto"
    top1: torch.Tensor | None = None
    num_from_pages: int = 0

    @property
    def num_scored(self) -> int:
        """Number of tokens scored."""
        return self.nll.numel()

    @property
    def mean_nll(self) -> float:
        """Mean nll of the scored tokens, in nats."""
        return self.nll.mean().item()

    @property
    def perplexity(self) -> float:
        """exp(mean nll), inf where that overflows a float64."""
        return self.nll.mean().exp().item()

    def top1_agreement(self, reference: "PerplexityResult") -> float:
        """Share of the scored tokens at which both hold the same token for the most likely, 0 to 1.

        Raises:
            ValueError: the two runs did not score the same windows, or one has no `top1`.
        """
        self._check_paired(reference)
        if self.top1 is None or reference.top1 is None:
            raise ValueError("top1 is None in one of the runs; take results of `perplexity`")
        return (self.top1 == reference.top1).double().mean().item()

    def window_sums(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(sum of the nll, number of tokens scored) of each window, both [num_windows] float64."""
        counts = [window.num_scored for window in self.windows]
        sums = torch.stack([part.sum() for part in self.nll.split(counts)])
        return sums, torch.tensor(counts, dtype=torch.float64)

    def confidence_interval(self, level: float = 0.95, num_draws: int = 2000, seed: int = 0) -> tuple[float, float]:
        """Bootstrap interval of the perplexity: windows drawn with replacement, percentiles of the figure.

        Efron 1979, https://doi.org/10.1214/aos/1176344552. It says how much the figure depends on the text; two runs on
        the same windows differ by far less (`paired_difference`).

        Args:
            level: share of the draws inside, 0 to 1.
            num_draws: bootstrap samples.
            seed: of the draws.
        """
        sums, counts = self.window_sums()
        generator = torch.Generator().manual_seed(seed)
        picks = torch.randint(len(sums), (num_draws, len(sums)), generator=generator)  # [num_draws, num_windows]
        figures = (sums[picks].sum(dim=1) / counts[picks].sum(dim=1)).exp()
        low, high = torch.quantile(figures, torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64))
        return low.item(), high.item()

    def _check_paired(self, reference: "PerplexityResult") -> None:
        if self.windows != reference.windows:
            raise ValueError(
                f"reference scored {reference.num_scored} tokens in {len(reference.windows)} windows, this run "
                f"{self.num_scored} in {len(self.windows)}; pair runs of equal text, window, stride and convention"
            )

    def paired_difference(self, reference: "PerplexityResult") -> PairedDifference:
        """How this run differs from `reference`, which must have scored the same tokens in the same windows.

        With d_w the sum of the differences in window w and n_w its number of scored tokens, the mean is
        r = sum d_w / sum n_w, and its standard error over W windows that of a ratio estimator:
        sqrt(W / (W - 1) * sum (d_w - r n_w)^2) / sum n_w. For windows of equal size it is the usual error of the
        windows' means. It takes windows for independent, which neighbours in one text are only roughly.

        Raises:
            ValueError: the two runs did not score the same windows.
        """
        self._check_paired(reference)
        difference = self.nll - reference.nll
        mean = difference.mean().item()
        standard_error = None
        num_windows = len(self.windows)
        if num_windows > 1:
            counts = [window.num_scored for window in self.windows]
            sums = torch.stack([part.sum() for part in difference.split(counts)])  # [num_windows]
            residuals = sums - mean * torch.tensor(counts, dtype=torch.float64)
            variance = num_windows / (num_windows - 1) * residuals.square().sum().item()
            standard_error = math.sqrt(variance) / self.num_scored
        worst = int(difference.abs().argmax())
        return PairedDifference(mean, standard_error, difference[worst].abs().item(), int(self.positions[worst]))
