"""Perplexity of one model under several attention implementations, on the same windows.

    python -m eval.perplexity --model gpt2 --data wikitext:wikitext-2-raw-v1:test \\
        --attn eager sdpa paged_flash --path prefill decode --window 1024 --stride 512 --output ppl.json

The figure is exp of the mean negative log-likelihood (nll, in nats) of the tokens scored. Figures of different
conventions differ by several percent, so the convention is printed and stored with every figure:

Conventions: `eval/windows.py`. Paths, all of which lead to the same figure; whether they do is what is being measured:
`eval/scoring.py`. Texts and datasets by name: `eval/text_data.py`, `eval/named_data.py`.

Several processes: `accelerate launch --num_processes 2 -m eval.perplexity ...` gives the same figures, bit for bit.
A run that was stopped goes on with `--resume`. `--device-map auto` spreads a big model over devices.

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


def _window_and_stride(args: argparse.Namespace, config: PreTrainedConfig) -> tuple[int, int]:
    """(window, stride) in tokens, as given or by default."""
    window = min(2048, _max_positions(config) or 2048) if args.window is None else args.window
    stride = args.stride
    if stride is None:
        stride = window if args.convention == "gptq" else min(512, window // 2)
    return window, stride


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


if __name__ == "__main__":
    main()
