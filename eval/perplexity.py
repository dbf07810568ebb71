"""Perplexity of one model under several attention implementations, on the same windows.

    python -m eval.perplexity --model gpt2 --data wikitext:wikitext-2-raw-v1:test \\
        --attn eager sdpa paged_flash --path prefill decode --window 1024 --stride 512 --output ppl.json

The figure is exp of the mean negative log-likelihood (nll, in nats) of the tokens scored. Figures of different
conventions differ by several percent, so the convention is printed and stored with every figure:

`hf`    Windows of `window` tokens, each starting `stride` after the one before; the last ends with the text and may be
        shorter. A window scores the tokens that no earlier window scored, so each token of the text is scored exactly
        once, except the very first, which nothing precedes. With 9 tokens, window 6 and stride 2:

            token    0 1 2 3 4 5 6 7 8
            window   . x x x x x               x scored
                         . . . . x x           . context only
                             . . . . x

        The nll is summed over the labels really scored and divided by their number. (The loop of the transformers guide
        weighs each window but the first by one label less than it scored.)
`gptq`  Disjoint windows of `window` tokens, the last `window - 1` of each scored; the tail that fills no window is
        dropped.

Sources: https://huggingface.co/docs/transformers/perplexity and https://github.com/IST-DASLab/gptq.

Three paths lead to the same figure; whether they do is what is being measured:

`prefill`        one forward per window, no cache;
`paged_prefill`  one forward per window that also goes through a `hf_paged.PagedCache`;
`decode`         the tokens before the first scored one in one forward, then one token per forward through a cache:
                 `hf_paged.PagedCache` under "paged_flash", transformers' `DynamicCache` under any other implementation.

Every run is compared with the first one token by token. On a small model that paired difference says more than the
figure.
"""

import argparse
import hashlib
import importlib.metadata
import inspect
import json
import math
import platform
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from tqdm import tqdm
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    Cache,
    DynamicCache,
    PreTrainedConfig,
    PreTrainedModel,
)

import hf_paged  # importing it is what registers "paged_flash"
from eval.text_data import ACCEPTED_SPECS, load_text

PATHS = ("prefill", "decode", "paged_prefill")
CONVENTIONS = ("hf", "gptq")
DTYPES = ("auto", "float32", "bfloat16", "float16")

# Logits turned to float32 at once: 2**26 of them are 256 MiB, a few hundred rows of a large vocabulary.
MAX_FLOAT32_LOGITS = 2**26


@dataclass(frozen=True, slots=True)
class Window:
    """Tokens `begin` to `end - 1` of the text, of which the last `num_scored` are scored."""

    begin: int
    end: int
    num_scored: int

    @property
    def shape(self) -> tuple[int, int]:
        """(tokens, scored tokens): windows of one shape can share a batch without padding."""
        return self.end - self.begin, self.num_scored


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
        path: "prefill", "decode" or "paged_prefill".
        convention: "hf" or "gptq".
        seconds: wall time of all forwards, compilation of kernels included.
    """

    nll: torch.Tensor
    positions: torch.Tensor
    windows: tuple[Window, ...]
    attn: str
    path: str
    convention: str
    seconds: float

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

    def paired_difference(self, reference: "PerplexityResult") -> PairedDifference:
        """How this run differs from `reference`, which must have scored the same tokens in the same windows.

        With d_w the sum of the differences in window w and n_w its number of scored tokens, the mean is
        r = sum d_w / sum n_w, and its standard error over W windows that of a ratio estimator:
        sqrt(W / (W - 1) * sum (d_w - r n_w)^2) / sum n_w. For windows of equal size it is the usual error of the
        windows' means. It takes windows for independent, which neighbours in one text are only roughly.

        Raises:
            ValueError: the two runs did not score the same windows.
        """
        if self.windows != reference.windows:
            raise ValueError(
                f"reference scored {reference.num_scored} tokens in {len(reference.windows)} windows, this run "
                f"{self.num_scored} in {len(self.windows)}; pair runs of equal text, window, stride and convention"
            )
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


def plan_windows(num_tokens: int, window: int, stride: int, convention: str = "hf") -> tuple[Window, ...]:
    """The windows over a text of `num_tokens` tokens; the module's docstring draws them.

    Args:
        num_tokens: length of the text in tokens.
        window: most tokens in a window.
        stride: "hf": tokens from one window's start to the next, at most `window - 1`, as the first token of a window
            has nothing before it to be predicted from. "gptq": equal to `window`.
        convention: "hf" or "gptq".

    Raises:
        ValueError: a bad value, or a text too short to score one token ("hf") or to fill one window ("gptq").
    """
    if convention not in CONVENTIONS:
        raise ValueError(f"convention={convention!r} is unknown; pass one of {CONVENTIONS}")
    if window < 2:
        raise ValueError(f"window={window} must be at least 2: one token to read and one to score")
    if convention == "gptq":
        if stride != window:
            raise ValueError(f"stride={stride} with window={window}: gptq windows are disjoint; pass stride={window}")
        if num_tokens < window:
            raise ValueError(
                f"token_ids has {num_tokens} tokens, and convention 'gptq' drops what fills no window of {window}; "
                "pass a longer text (--data, --max-tokens) or a smaller window"
            )
        return tuple(Window(begin, begin + window, window - 1) for begin in range(0, num_tokens - window + 1, window))

    if not 1 <= stride < window:
        raise ValueError(
            f"stride={stride} must be from 1 to window - 1 = {window - 1}, so that each window has context for its "
            "first scored token; for disjoint windows pass convention='gptq'"
        )
    if num_tokens < 2:
        raise ValueError(
            f"token_ids has {num_tokens} tokens, and at least 2 are needed to score one; pass a longer text"
        )
    windows: list[Window] = []
    num_covered = 1  # The first token counts as scored: nothing predicts it.
    for begin in range(0, num_tokens, stride):
        end = min(begin + window, num_tokens)
        windows.append(Window(begin, end, end - num_covered))
        num_covered = end
        if end == num_tokens:
            break
    return tuple(windows)


@torch.no_grad()
def perplexity(
    model: PreTrainedModel,
    token_ids: Sequence[int] | torch.Tensor,
    *,
    window: int,
    stride: int,
    path: str = "prefill",
    convention: str = "hf",
    page_size: int = 16,
    cache_factory: Callable[[], Cache] | None = None,
    batch_size: int = 1,
    progress: bool = False,
) -> PerplexityResult:
    """Score `token_ids` with `model` window by window, along one of the three paths of the module's docstring.

    Logits are asked of the model for the scored tokens only (`logits_to_keep`, where its forward has it), in the
    model's dtype, and turned to float32 a bounded number of rows at a time.

    Args:
        model: causal LM on its device, with the attention implementation to measure. It is run in eval mode and left in
            the mode it was in.
        token_ids: [num_tokens], the tokenised text.
        window: most tokens in a window, at most the model's max_position_embeddings.
        stride: tokens from one window to the next; see `plan_windows`.
        path: "prefill", "decode" or "paged_prefill".
        convention: "hf" or "gptq".
        page_size: tokens in a page of the default PagedCache.
        cache_factory: gives an empty cache for each batch of windows, in place of the default; not with "prefill".
        batch_size: windows of equal size that share a forward. There is never any padding.
        progress: show a bar that counts scored tokens.

    Raises:
        TypeError: `token_ids` are not integers.
        ValueError: a bad value, a text too short, a token outside the vocabulary, a window beyond the model's
            positions, or a model that takes no cache or does not use it.
        FloatingPointError: the nll of a token is nan or infinite.
    """
    check_path(path)
    check_window(model.config, window)
    for name, value in (("page_size", page_size), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    if path == "prefill" and cache_factory is not None:
        raise ValueError(
            "cache_factory is given, and path='prefill' uses no cache; pass path='decode' or 'paged_prefill'"
        )
    if path != "prefill" and "past_key_values" not in inspect.signature(model.forward).parameters:
        raise ValueError(f"path={path!r}: {type(model).__name__}.forward takes no past_key_values; pass path='prefill'")
    ids = _checked_token_ids(token_ids, model)
    windows = plan_windows(ids.numel(), window, stride, convention)
    attn = attention_implementation(model)
    make_cache = cache_factory or _default_cache_factory(model, attn, path, page_size)

    was_training = model.training
    model.eval()
    parts: list[torch.Tensor] = []
    total = sum(item.num_scored for item in windows)
    start = time.perf_counter()
    try:
        with tqdm(total=total, desc=f"{attn} {path}", unit="token", disable=not progress, leave=False) as bar:
            for batch in _batches(windows, batch_size):
                num_scored = batch[0].num_scored
                rows = torch.stack([ids[item.begin : item.end] for item in batch]).to(model.device)
                if path == "decode":
                    nll = _score_decode(model, rows, num_scored, make_cache(), bar)
                else:
                    nll = _score_prefill(model, rows, num_scored, None if path == "prefill" else make_cache(), bar)
                # The copy also waits for the device, so that `seconds` is the whole time.
                parts.append(nll.double().flatten().cpu())
    finally:
        model.train(was_training)
    seconds = time.perf_counter() - start

    nll = torch.cat(parts)
    positions = torch.cat([torch.arange(item.end - item.num_scored, item.end) for item in windows])
    if not nll.isfinite().all():
        worst = int((~nll.isfinite()).int().argmax())
        raise FloatingPointError(
            f"attn={attn!r}, path={path!r}: the nll of token {int(positions[worst])} is {nll[worst].item()} (dtype "
            f"{model.dtype}), {int((~nll.isfinite()).sum())} of {total} are not finite; try dtype float32 (--dtype)"
        )
    return PerplexityResult(nll, positions, windows, attn, path, convention, seconds)


def attention_implementation(model: PreTrainedModel) -> str:
    """Name of the attention implementation that the decoder of `model` runs with."""
    # Underscored, yet it is the name by which the attention interface is documented; there is no other way to ask.
    return str(model.config.get_text_config(decoder=True)._attn_implementation)


def check_path(path: str) -> None:
    """Raise ValueError unless `path` is one of `PATHS`."""
    if path not in PATHS:
        raise ValueError(f"path={path!r} is unknown{_did_you_mean(path, PATHS)}; pass one of {PATHS}")


def check_window(config: PreTrainedConfig, window: int) -> None:
    """Raise ValueError if `window` is longer than a model of `config` has positions for."""
    limit = _max_positions(config)
    if limit is not None and window > limit:
        raise ValueError(
            f"window={window} is larger than the model's max_position_embeddings={limit}; pass a window (--window) of "
            f"at most {limit}"
        )


def check_attention(name: str) -> None:
    """Raise ValueError unless `name` is a registered attention implementation, or "owner/kernel" of the hub."""
    known = ("eager", *sorted(AttentionInterface().valid_keys()))
    if name not in known and "/" not in name:
        raise ValueError(f"attn (--attn) {name!r} is unknown{_did_you_mean(name, known)}; pass one of {known}")


def _max_positions(config: PreTrainedConfig) -> int | None:
    """Most tokens in a sequence, None where the model sets no limit (ALiBi, for one)."""
    return getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)


def _did_you_mean(name: str, known: Sequence[str]) -> str:
    close = get_close_matches(str(name), known, n=1)
    return f", did you mean {close[0]!r}?" if close else ""


def _checked_token_ids(token_ids: Sequence[int] | torch.Tensor, model: PreTrainedModel) -> torch.Tensor:
    """`token_ids` as [num_tokens] int64 on the CPU, each inside the model's vocabulary."""
    ids = torch.as_tensor(token_ids).cpu()
    if ids.ndim != 1:
        raise ValueError(f"token_ids has the shape {list(ids.shape)}; pass the tokens of one text as [num_tokens]")
    if ids.numel() and (ids.dtype == torch.bool or ids.is_floating_point() or ids.is_complex()):
        raise TypeError(f"token_ids has the dtype {ids.dtype}; pass integers")
    ids = ids.long()
    vocab_size = model.get_input_embeddings().weight.shape[0]
    outside = ids[(ids < 0) | (ids >= vocab_size)]
    if outside.numel():
        raise ValueError(
            f"token_ids holds {int(outside[0])}, and the model's vocabulary is 0 to {vocab_size - 1}; pass the ids of "
            "this model's own tokenizer"
        )
    return ids


def _default_cache_factory(model: PreTrainedModel, attn: str, path: str, page_size: int) -> Callable[[], Cache]:
    # The aliases of "paged_flash" begin with its name.
    if path == "paged_prefill" or attn.startswith("paged_flash"):
        return lambda: hf_paged.PagedCache(model.config, page_size=page_size)
    return lambda: DynamicCache(config=model.config)


def _batches(windows: Iterable[Window], batch_size: int) -> Iterable[list[Window]]:
    """The windows in order, `batch_size` of one shape at a time."""
    for _, group in groupby(windows, key=lambda item: item.shape):
        while batch := list(islice(group, batch_size)):
            yield batch


def _score_prefill(
    model: PreTrainedModel, rows: torch.Tensor, num_scored: int, cache: Cache | None, bar: tqdm
) -> torch.Tensor:
    """nll of the last `num_scored` tokens of each row, from one forward.

    Args:
        model: the model.
        rows: [batch, length] int64.
        num_scored: at most length - 1.
        cache: an empty cache to go through, or None.
        bar: moved on by the tokens scored.

    Returns:
        [batch, num_scored], float32 or float64.
    """
    # The logits of a token predict the next one, so the window's last are not needed; no forward can leave them out.
    logits = _forward(model, rows, cache, num_logits=num_scored + 1)
    nll = _token_nll(logits[:, :-1], rows[:, -num_scored:])
    bar.update(nll.numel())
    return nll


def _score_decode(model: PreTrainedModel, rows: torch.Tensor, num_scored: int, cache: Cache, bar: tqdm) -> torch.Tensor:
    """As `_score_prefill`, with only the tokens before the first scored one in one forward, and then one per forward.

    The last token of a row is never fed: its logits predict nothing that is scored.
    """
    length = rows.shape[1]
    num_context = length - num_scored
    parts = []
    for begin, end in [(0, num_context), *((step, step + 1) for step in range(num_context, length - 1))]:
        logits = _forward(model, rows[:, begin:end], cache, num_logits=1)
        parts.append(_token_nll(logits, rows[:, end : end + 1]))
        bar.update(len(rows))
    return torch.cat(parts, dim=1)


def _forward(model: PreTrainedModel, rows: torch.Tensor, cache: Cache | None, num_logits: int) -> torch.Tensor:
    """Logits of the last `num_logits` tokens of rows [batch, length] -> [batch, num_logits, vocab_size].

    Positions and mask are left to the model, which takes them from the length that the cache reports.
    """
    kwargs: dict[str, Any] = {"use_cache": False}
    if cache is not None:
        num_before = cache.get_seq_length()
        kwargs = {"use_cache": True, "past_key_values": cache}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        kwargs["logits_to_keep"] = num_logits
    logits = model(input_ids=rows, **kwargs).logits
    # A model that ignores the cache would answer each token without its context and still give a figure.
    if cache is not None and cache.get_seq_length() != num_before + rows.shape[1]:
        raise ValueError(
            f"the {type(cache).__name__} held {num_before} tokens, was given {rows.shape[1]} and reports "
            f"{cache.get_seq_length()}: {type(model).__name__} does not use past_key_values; pass path='prefill'"
        )
    return logits[:, -num_logits:]


def _token_nll(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """-log softmax(logits)[label], in float32 at least.

    Args:
        logits: [batch, length, vocab_size], any dtype.
        labels: [batch, length] int64.

    Returns:
        [batch, length], float32, or float64 for float64 logits.
    """
    vocab_size = logits.shape[-1]
    dtype = torch.promote_types(logits.dtype, torch.float32)
    rows_at_once = max(1, MAX_FLOAT32_LOGITS // vocab_size)
    labels = labels.to(logits.device)
    parts = [
        functional.cross_entropy(row_logits.to(dtype), row_labels, reduction="none")
        for sequence_logits, sequence_labels in zip(logits, labels)
        for row_logits, row_labels in zip(sequence_logits.split(rows_at_once), sequence_labels.split(rows_at_once))
    ]
    return torch.cat(parts).view(labels.shape)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the command; returns what it writes to `--output`.

    Raises:
        ValueError, FileNotFoundError, ImportError: the arguments name something unknown, missing or unfit; the message
            says which, what was found and what to pass.
    """
    args = _parser().parse_args(argv)
    for path in args.path:
        check_path(path)
    for name in args.attn:
        check_attention(name)
    if args.max_tokens is not None and args.max_tokens < 2:
        raise ValueError(f"max_tokens={args.max_tokens} (--max-tokens) must be at least 2, to read one and score one")
    if args.output is not None and args.output.is_dir():
        raise ValueError(f"output (--output) {str(args.output)!r} is a folder; pass the path of a JSON file")

    device = _checked_device(args.device)
    config = _load(AutoConfig, args.model)
    window, stride = _window_and_stride(args, config)
    check_window(config, window)

    text = load_text(args.data, args.text_column)
    # `verbose=False` keeps the tokenizer from warning that a whole text is longer than the model's window.
    token_ids = _load(AutoTokenizer, args.model)(text, verbose=False)["input_ids"][: args.max_tokens]
    # Planned again by each run; here it refuses a bad length before the weights are loaded.
    plan_windows(len(token_ids), window, stride, args.convention)
    model = _load(AutoModelForCausalLM, args.model, dtype=args.dtype, attn_implementation=args.attn[0]).to(device)

    results: list[PerplexityResult] = []
    for name in args.attn:
        _set_attention(model, name)
        for path in args.path:
            results.append(
                perplexity(
                    model,
                    token_ids,
                    window=window,
                    stride=stride,
                    path=path,
                    convention=args.convention,
                    page_size=args.page_size,
                    batch_size=args.batch_size,
                    progress=True,
                )
            )

    report = {
        "model": args.model,
        "data": args.data,
        "text_column": args.text_column,
        "text_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "num_tokens": len(token_ids),
        "convention": args.convention,
        "window": window,
        "stride": stride,
        "batch_size": args.batch_size,
        "page_size": args.page_size,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": _device_name(model.device),
        "versions": _versions(),
        "reference": {"attn": results[0].attn, "path": results[0].path},
        "results": [_row(result, results[0]) for result in results],
    }
    print(format_report(report))
    if args.output is not None:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(report, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    return report


def format_report(report: dict[str, Any]) -> str:
    """The plain-text table of what `main` returns."""
    first = report["reference"]
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    header = (
        f"{report['model']} on {report['data']}: {report['num_tokens']} tokens, convention {report['convention']}, "
        f"window {report['window']}, stride {report['stride']}\n"
        f"{report['dtype']} on {report['device']}; {versions}\n"
        f"differences in nats per token against {first['attn']} {first['path']}, standard error over windows\n"
    )
    titles = (
        "attn",
        "path",
        "windows",
        "scored",
        "ppl",
        "mean nll",
        "difference",
        "std error",
        "max |diff|",
        "seconds",
    )
    rows = [titles]
    for row in report["results"]:
        difference = row["difference"]
        error = difference["standard_error"]
        rows.append(
            (
                row["attn"],
                row["path"],
                str(row["num_windows"]),
                str(row["num_scored"]),
                "overflow" if row["ppl"] is None else f"{row['ppl']:.4f}",
                f"{row['mean_nll']:.6f}",
                f"{difference['mean']:+.2e}",
                "-" if error is None else f"{error:.1e}",
                f"{difference['max_abs']:.1e}",
                f"{row['seconds']:.1f}",
            )
        )
    widths = [max(len(cell) for cell in column) for column in zip(*rows)]
    lines = [
        # Names to the left, figures to the right.
        "  ".join(cell.ljust(width) if i < 2 else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths)))
        for row in rows
    ]
    return header + "\n".join(line.rstrip() for line in lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m eval.perplexity",
        description="Perplexity of one model under several attention implementations, compared token by token.",
    )
    parser.add_argument("--model", required=True, help="model folder or hub id")
    parser.add_argument("--data", required=True, help=ACCEPTED_SPECS)
    parser.add_argument("--text-column", default="text", help="column with the text, for all but text files (text)")
    parser.add_argument(
        "--attn", nargs="+", default=["eager", "paged_flash"], help="implementations; the first is the reference"
    )
    parser.add_argument("--path", nargs="+", default=["prefill"], help=f"from {PATHS}; the first is the reference")
    parser.add_argument("--convention", choices=CONVENTIONS, default="hf", help="windows, see the module (hf)")
    parser.add_argument("--window", type=int, help="tokens in a window (2048, or the model's positions if fewer)")
    parser.add_argument(
        "--stride",
        type=int,
        help="tokens from window to window (hf: 512, or half the window if less; gptq: the window)",
    )
    parser.add_argument("--max-tokens", type=int, help="use the first so many tokens of the text (all)")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="auto: the checkpoint's (auto)")
    parser.add_argument("--device", help="torch device (cuda if there is one, else cpu)")
    parser.add_argument("--batch-size", type=int, default=1, help="windows in a forward (1)")
    parser.add_argument("--page-size", type=int, default=16, help="tokens in a page of the PagedCache (16)")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    return parser


def _load(auto_class: Any, name: str, **kwargs: Any) -> Any:
    """`auto_class.from_pretrained(name, **kwargs)`, its errors naming the argument."""
    try:
        return auto_class.from_pretrained(name, **kwargs)
    except (OSError, ValueError, ImportError) as error:
        raise ValueError(
            f"model (--model) {name!r}: {auto_class.__name__}.from_pretrained with {kwargs} failed: {error}; pass a "
            "folder with a model and its tokenizer, or a reachable hub id"
        ) from error


def _checked_device(name: str | None) -> torch.device:
    """The device of that name, or the default for None, tried out."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    # A torch built without CUDA raises AssertionError for "cuda".
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"device (--device) {name!r} cannot be used here: {error}; pass cpu, cuda or cuda:0"
        ) from error


def _window_and_stride(args: argparse.Namespace, config: PreTrainedConfig) -> tuple[int, int]:
    """(window, stride) in tokens, as given or by default."""
    window = min(2048, _max_positions(config) or 2048) if args.window is None else args.window
    stride = args.stride
    if stride is None:
        stride = window if args.convention == "gptq" else min(512, window // 2)
    return window, stride


def _set_attention(model: PreTrainedModel, name: str) -> None:
    try:
        model.set_attn_implementation(name)
    except (ValueError, ImportError) as error:
        raise ValueError(f"attn (--attn) {name!r} cannot be used with {type(model).__name__} here: {error}") from error
    # transformers may answer with another implementation and a warning: a figure under the wrong name.
    if attention_implementation(model) != name:
        raise ValueError(
            f"attn (--attn) {name!r}: transformers gave {type(model).__name__} "
            f"{attention_implementation(model)!r} in its place; pass that, or another implementation"
        )


def _row(result: PerplexityResult, reference: PerplexityResult) -> dict[str, Any]:
    return {
        "attn": result.attn,
        "path": result.path,
        "num_windows": len(result.windows),
        "num_scored": result.num_scored,
        "mean_nll": result.mean_nll,
        # JSON has no infinity.
        "ppl": result.perplexity if math.isfinite(result.perplexity) else None,
        "seconds": result.seconds,
        "difference": asdict(result.paired_difference(reference)),
    }


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.machine()}, {torch.get_num_threads()} threads)"


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in ("torch", "transformers", "triton"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "none"
    versions["hf_paged"] = hf_paged.__version__
    return versions


if __name__ == "__main__":
    main()
