"""Perplexity of one model under several attention implementations, on the same windows.

    python -m eval.perplexity --model gpt2 --data wikitext:wikitext-2-raw-v1:test \\
        --attn eager sdpa paged_flash --path prefill decode --window 1024 --stride 512 --output ppl.json

The figure is exp of the mean negative log-likelihood (nll, in nats) of the tokens scored. Figures of different
conventions differ by several percent, so the convention is printed and stored with every figure.

Conventions: `eval/quality/windows.py`. Paths, which lead to the same figure; whether they do is what is measured:
`eval/quality/scoring.py`. Texts and datasets by name: `eval/quality/text_data.py`, `eval/quality/named_data.py`.

Several processes: `accelerate launch --num_processes 2 -m eval.perplexity ...` gives the same figures, bit for bit but
for `--path engine`, where other windows share a step: there they agree up to rounding. On CPUs add `--multi_gpu` before
`-m` and `--device cpu` at the end: with `--cpu`, accelerate starts one process. A run that was stopped goes on with
`--resume`, to figures that are the same in the same sense. `--device-map auto` spreads a big model over devices.

Every run is compared with the first one token by token. On a small model that paired difference says more than the
figure. Exit status 0, or 2 and an error that names the argument.
"""

import argparse
import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    Cache,
    DynamicCache,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

import hf_paged
from eval import command_line
from eval.loading import (
    ACCEPTED_DEVICE_MAPS,
    DTYPES,
    attention_implementation,
    cache_name,
    check_attention,
    check_window,
    checked_device,
    device_name,
    did_you_mean,
    load_pretrained,
    max_positions,
    parsed_device_map,
    set_attention,
    versions,
    weights_fingerprint,
)
from eval.quality.partial_results import PartialResults
from eval.quality.perplexity_result import PairedDifference, PerplexityResult
from eval.quality.perplexity_table import format_report, report_row
from eval.quality.processes import Processes
from eval.quality.scoring import (
    KV_DTYPES,
    PATHS,
    default_chunk,
    engine_scores,
    reads_pages,
    reason_against,
    scored_logits,
    token_nll,
)
from eval.quality.text_data import ACCEPTED_SPECS, Documents, load_documents, load_text
from eval.quality.windows import BY_DOCUMENT, CONVENTIONS, DISJOINT, Window, plan_windows

__all__ = [
    "DocumentBounds", "PairedDifference", "PathOptions", "PerplexityResult", "RunControl", "Window", "load_text",
    "main", "perplexity", "plan_windows",
]  # fmt: skip

Figures = tuple[list[list[float]], list[list[int]]]
"""Of one batch: nll and most likely token of the scored tokens of each window."""


@dataclass(frozen=True, slots=True)
class DocumentBounds:
    """Where the documents of a text begin, for the conventions that score document by document.

    Attributes:
        starts: for conventions "lm-eval" and "last-word", the first token of each document.
        word_tokens: for convention "last-word", how many tokens each last word has.
    """

    starts: Sequence[int] = (0,)
    word_tokens: Sequence[int] = ()


@dataclass(frozen=True, slots=True)
class PathOptions:
    """How windows go along a path.

    Attributes:
        page_size: tokens in a page of the default PagedCache and of the engine.
        kv_dtype: of their pages: "auto", "fp8" or "int8".
        chunk: tokens in a forward of path "chunked_prefill".
        batch_size: windows of equal size that share a forward. There is no padding, but in path "padded_prefill".
        cache_factory: gives an empty cache for each batch of windows, in place of the default; not with "prefill" and
            "engine".
    """

    page_size: int = 16
    kv_dtype: str = "auto"
    chunk: int = 64
    batch_size: int = 1
    cache_factory: Callable[[], Cache] | None = None


@dataclass(frozen=True, slots=True)
class RunControl:
    """How a run is watched, shared and resumed.

    Attributes:
        observe: called with (index of the first of them among all scored tokens, logits [n, vocab_size]) for every
            scored token in order within its window; not with "engine", which gives no logits, nor with several
            `processes` or `partial` results.
        processes: deal the batches to several processes; each gets the whole result.
        partial: keeps finished batches, and has those of an earlier run.
        progress: show a bar that counts scored tokens.
    """

    observe: Callable[[int, torch.Tensor], None] | None = None
    processes: Processes = field(default_factory=Processes)
    partial: PartialResults | None = None
    progress: bool = False


@dataclass(frozen=True, slots=True)
class _Batch:
    """Windows of one shape that share a forward: `first_scored` is the index of its first among all scored tokens."""

    index: int
    windows: list[Window]
    first_scored: int

    @property
    def num_scored(self) -> int:
        """Scored tokens of all its windows."""
        return sum(item.num_scored for item in self.windows)

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """The windows' tokens of `ids` [num_tokens] -> [batch, length]."""
        return torch.stack([ids[item.begin : item.end] for item in self.windows])


@torch.no_grad()
def perplexity(
    model: PreTrainedModel,
    token_ids: Sequence[int] | torch.Tensor,
    *,
    window: int,
    stride: int,
    convention: str = "hf",
    bounds: DocumentBounds = DocumentBounds(),
    path: str = "prefill",
    options: PathOptions = PathOptions(),
    control: RunControl = RunControl(),
) -> PerplexityResult:
    """Score `token_ids` with `model` window by window, along one of the paths of `eval.quality.scoring`.

    Logits are asked of the model for the scored tokens only (`logits_to_keep`, where its forward has it), in the
    model's dtype, and turned to float32 a bounded number of rows at a time.

    Args:
        model: causal LM on its device, with the attention implementation to measure. It is run in eval mode and left in
            the mode it was in.
        token_ids: [num_tokens], the tokenised text.
        window: most tokens in a window, at most the model's max_position_embeddings.
        stride: tokens from one window to the next; see `plan_windows`.
        convention: one of `eval.quality.windows.CONVENTIONS`.
        bounds: the documents of the text.
        path: one of `eval.quality.scoring.PATHS`.
        options: page size, dtype of the pages and what else a path has.
        control: processes, partial results, progress.

    Raises:
        TypeError: `token_ids` are not integers.
        ValueError: a bad value, a text too short, a token outside the vocabulary, a window beyond the model's
            positions, or a model that takes no cache or does not use it.
        UnsupportedModelError: path "engine", and the engine cannot serve the model.
        FloatingPointError: the nll of a token is nan or infinite.
    """
    check_path(path)
    check_window(model.config, window)
    _check_options(model, path, options, control)
    ids = _checked_token_ids(token_ids, model)
    windows = plan_windows(ids.numel(), window, stride, convention, bounds.starts, bounds.word_tokens)
    attn = attention_implementation(model)
    if options.kv_dtype != "auto" and not _num_from_pages(windows, path, options):
        raise ValueError(
            f"kv_dtype={options.kv_dtype!r} with path={path!r}, chunk={options.chunk} and window={window}: no scored "
            "token would read a quantised page; pass a smaller chunk (--chunk) or a longer window (--window)"
        )

    was_training = model.training
    model.eval()
    start = time.perf_counter()
    try:
        figures = _all_figures(model, ids, windows, path, options, control)
    finally:
        model.train(was_training)
    seconds = time.perf_counter() - start

    nll = torch.tensor([x for rows, _ in figures for row in rows for x in row], dtype=torch.float64)
    top1 = torch.tensor([x for _, rows in figures for row in rows for x in row], dtype=torch.int64)
    positions = torch.cat([torch.arange(item.end - item.num_scored, item.end) for item in windows])
    if not nll.isfinite().all():
        worst = int((~nll.isfinite()).int().argmax())
        raise FloatingPointError(
            f"attn={attn!r}, path={path!r}: the nll of token {int(positions[worst])} is {nll[worst].item()} (dtype "
            f"{model.dtype}), {int((~nll.isfinite()).sum())} of {nll.numel()} are not finite; "
            "try dtype float32 (--dtype)"
        )
    from_pages = _num_from_pages(windows, path, options)
    return PerplexityResult(
        nll, positions, windows, attn, path, convention, seconds, options.kv_dtype, top1, from_pages
    )


def _num_from_pages(windows: Iterable[Window], path: str, options: PathOptions) -> int:
    """Scored tokens of all windows that read keys out of pages."""
    return sum(reads_pages(item.end - item.begin, item.num_scored, path, options.chunk) for item in windows)


def _check_options(model: PreTrainedModel, path: str, options: PathOptions, control: RunControl) -> None:
    """Raise ValueError for a bad value, or for options that do not go with each other, the path or the model."""
    for name in ("page_size", "batch_size", "chunk"):
        if getattr(options, name) < 1:
            raise ValueError(f"{name}={getattr(options, name)} must be at least 1")
    kv_dtype = options.kv_dtype
    if kv_dtype not in KV_DTYPES:
        raise ValueError(
            f"kv_dtype={kv_dtype!r} is unknown{did_you_mean(kv_dtype, KV_DTYPES)}; pass one of {KV_DTYPES}"
        )
    if path in ("prefill", "engine") and options.cache_factory is not None:
        uses = "no cache" if path == "prefill" else "its own pages"
        raise ValueError(
            f"cache_factory is given, and path={path!r} uses {uses}; pass path='decode' or 'paged_prefill'"
        )
    if path != "prefill" and cache_name(model) is None:
        raise ValueError(f"path={path!r}: {type(model).__name__}.forward takes no cache; pass path='prefill'")
    count, has_partial = control.processes.count, control.partial is not None
    if control.observe is not None and (path == "engine" or count > 1 or has_partial):
        raise ValueError(
            f"observe is given with path={path!r}, {count} processes and partial={has_partial}; it needs the logits of "
            "all windows in one process"
        )
    attn = attention_implementation(model)
    reason = reason_against(attn, path, kv_dtype) if options.cache_factory is None else None
    if reason is not None:
        raise ValueError(f"path={path!r} with attn={attn!r} and kv_dtype={kv_dtype!r}: {reason}")


def _all_figures(
    model: PreTrainedModel,
    ids: torch.Tensor,
    windows: Sequence[Window],
    path: str,
    options: PathOptions,
    control: RunControl,
) -> list[Figures]:
    """Figures of every batch in order: those known before, this process's own, and the other processes'."""
    processes, partial = control.processes, control.partial
    batches = _batches(windows, options.batch_size)
    run = f"{attention_implementation(model)} {path} {options.kv_dtype}"
    dealt = batches[processes.rank :: processes.count]
    done: list[tuple[int, Figures]] = []
    if partial is not None:
        found = ((batch.index, partial.get(run, batch.index)) for batch in dealt)
        done = [(index, figures) for index, figures in found if figures is not None]
    known = {index for index, _ in done}
    left = [batch for batch in dealt if batch.index not in known]
    if path == "engine":
        scores = _engine_batches(model, ids, left, max((item.end - item.begin for item in windows), default=1), options)
    else:
        scores = _model_batches(model, ids, left, path, options, control.observe)
    total = sum(batch.num_scored for batch in batches)
    hidden = not (control.progress and processes.is_main)
    with tqdm(total=total, desc=run, unit="token", disable=hidden, leave=False) as bar:
        bar.update(sum(batches[index].num_scored for index in known))
        for batch, figures in zip(left, scores):
            done.append((batch.index, figures))
            if partial is not None:
                partial.put(run, batch.index, figures)
            bar.update(batch.num_scored * min(processes.count, len(batches)))
    by_batch = dict(processes.gather(done))
    return [by_batch[batch.index] for batch in batches]


def check_path(path: str) -> None:
    """Raise ValueError unless `path` is one of `PATHS`."""
    if path not in PATHS:
        raise ValueError(f"path={path!r} is unknown{did_you_mean(path, PATHS)}; pass one of {PATHS}")


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


def default_cache_factory(model: PreTrainedModel, path: str, options: PathOptions) -> Callable[[], Cache | None]:
    """What makes the cache of each batch of windows, None for a path without one."""
    if path == "prefill":
        return lambda: None
    # The aliases of "paged_flash" begin with its name.
    if path == "decode" and not attention_implementation(model).startswith("paged_flash"):
        return lambda: DynamicCache(config=model.config)
    return lambda: hf_paged.PagedCache(model.config, page_size=options.page_size, kv_dtype=options.kv_dtype)


def _batches(windows: Iterable[Window], batch_size: int) -> list[_Batch]:
    """The windows in order, at most `batch_size` of one shape at a time."""
    batches: list[_Batch] = []
    first_scored = 0
    for _, group in groupby(windows, key=lambda item: item.shape):
        while chosen := list(islice(group, batch_size)):
            batches.append(_Batch(len(batches), chosen, first_scored))
            first_scored += batches[-1].num_scored
    return batches


def _model_batches(
    model: PreTrainedModel,
    all_ids: torch.Tensor,
    batches: Sequence[_Batch],
    path: str,
    options: PathOptions,
    observe: Callable[[int, torch.Tensor], None] | None,
) -> Iterator[Figures]:
    """Figures of each batch by forwards of the model."""
    make_cache = options.cache_factory or default_cache_factory(model, path, options)
    for batch in batches:
        ids = batch.rows(all_ids).to(model.device)
        num_scored = batch.windows[0].num_scored
        nll: list[list[float]] = [[] for _ in batch.windows]
        top1: list[list[int]] = [[] for _ in batch.windows]
        num_done = 0
        for logits in scored_logits(model, ids, num_scored, path, make_cache(), options.chunk):
            count = logits.shape[1]
            begin = ids.shape[1] - num_scored + num_done
            for row, row_logits in enumerate(logits):
                nll[row] += token_nll(row_logits, ids[row, begin : begin + count]).double().tolist()
                top1[row] += row_logits.argmax(dim=-1).tolist()
                if observe is not None:
                    observe(batch.first_scored + row * num_scored + num_done, row_logits)
            num_done += count
        yield nll, top1


def _engine_batches(
    model: PreTrainedModel, ids: torch.Tensor, batches: Sequence[_Batch], longest: int, options: PathOptions
) -> Iterator[Figures]:
    """Figures of each batch by an engine; `longest`: tokens in the longest window of the text."""
    config = hf_paged.EngineConfig(
        page_size=options.page_size, kv_dtype=options.kv_dtype, max_model_len=longest, max_num_seqs=16,
        max_batch_tokens=512,
    )  # fmt: skip
    with hf_paged.Engine(model, config, background=False) as engine:
        rows = (list(batch.rows(ids)) for batch in batches)
        for scores in engine_scores(engine, rows, [batch.windows[0].num_scored for batch in batches]):
            yield [nll for nll, _ in scores], [top1 for _, top1 in scores]


def encode(tokenizer: PreTrainedTokenizerBase, documents: Documents, convention: str) -> tuple[list[int], list[int]]:
    """(token ids, document starts) of the data in a convention.

    "lm-eval": each document behind the tokenizer's beginning-of-text (or end-of-text) token, without special tokens of
    its own; any other: the joined text, as the tokenizer encodes it.

    Raises:
        ValueError: "lm-eval" with a tokenizer that has neither token.
    """
    # `verbose=False` keeps the tokenizer from warning that a whole text is longer than the model's window.
    if convention != "lm-eval":
        return tokenizer(documents.text, verbose=False)["input_ids"], [0]
    prefix = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if prefix is None:
        raise ValueError("convention 'lm-eval' needs a beginning- or end-of-text token, and the tokenizer has neither")
    ids: list[int] = []
    starts: list[int] = []
    for row in documents.rows:
        starts.append(len(ids))
        ids += [prefix, *tokenizer(row, add_special_tokens=False, verbose=False)["input_ids"]]
    return ids, starts


def encode_last_words(
    tokenizer: PreTrainedTokenizerBase, documents: Documents
) -> tuple[list[int], list[int], list[int]]:
    """(token ids, document starts, tokens of each document's last word): a word is what stands behind the last space.

    Context and word are tokenised together, as lm-eval does: the word's tokens are those that it adds.

    Raises:
        ValueError: a row has fewer than two words.
    """
    ids: list[int] = []
    starts: list[int] = []
    words: list[int] = []
    for index, row in enumerate(documents.rows):
        if len(row.split()) < 2:
            raise ValueError(
                f"row {index} of the data (--data) is {row[:40]!r}, and convention 'last-word' scores the last word "
                "behind at least one other; leave such rows out"
            )
        starts.append(len(ids))
        whole = tokenizer(row, verbose=False)["input_ids"]
        words.append(len(whole) - len(tokenizer(row.rpartition(" ")[0].rstrip(), verbose=False)["input_ids"]))
        ids += whole
    return ids, starts, words


def plan_runs(
    attns: Sequence[str], paths: Sequence[str], kv_dtypes: Sequence[str]
) -> tuple[list[tuple[str, str, str]], list[str]]:
    """((attn, path, kv_dtype) of each run, why each other combination is left out).

    Raises:
        ValueError: nothing is left.
    """
    runs, left_out = [], []
    for attn in attns:
        for path in paths:
            for kv_dtype in kv_dtypes:
                reason = reason_against(attn, path, kv_dtype)
                if reason is None:
                    runs.append((attn, path, kv_dtype))
                else:
                    left_out.append(f"{attn} {path} {kv_dtype}: {reason}")
    if not runs:
        raise ValueError(f"nothing to measure (--attn, --path, --kv-dtype): {'; '.join(left_out)}")
    return runs, left_out


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
    if args.max_tokens is not None and args.convention in BY_DOCUMENT:
        raise ValueError(
            f"max_tokens={args.max_tokens} (--max-tokens) would cut a document, and convention {args.convention!r} "
            "counts its words; pass fewer documents (--data)"
        )
    if args.output is not None:
        try:
            command_line.check_output(args.output)
        except ValueError as error:
            raise ValueError(f"output (--output) {error}") from error
    if args.resume and args.output is None:
        raise ValueError("resume (--resume) goes on from the files beside --output; pass --output")
    runs, left_out = plan_runs(args.attn, args.path, args.kv_dtype)

    processes = Processes.of_environment(args.device)
    device = checked_device(args.device) if processes.device is None else processes.device
    config = load_pretrained(AutoConfig, args.model)
    window, stride = _window_and_stride(args, config)
    check_window(config, window)

    documents = load_documents(args.data, args.text_column)
    tokenizer = load_pretrained(AutoTokenizer, args.model)
    words: list[int] = []
    if args.convention == "last-word":
        token_ids, starts, words = encode_last_words(tokenizer, documents)
    else:
        token_ids, starts = encode(tokenizer, documents, args.convention)
    token_ids = token_ids[: args.max_tokens]
    if documents.max_windows is not None and args.convention in ("gptq", "llama.cpp"):
        token_ids = token_ids[: documents.max_windows * window]
    try:
        # Planned again by each run; here it refuses a bad length before the weights are loaded.
        plan_windows(len(token_ids), window, stride, args.convention, starts, words)
    except ValueError as error:
        raise ValueError(f"spec (--data) {args.data!r}: {error}") from error
    chunk = default_chunk(window) if args.chunk is None else args.chunk
    model = _load_model(args, device, processes)

    settings = {
        "model": args.model,
        "data": args.data,
        "text_column": args.text_column,
        "text_sha256": hashlib.sha256(documents.text.encode()).hexdigest(),
        "token_ids_sha256": hashlib.sha256(json.dumps([token_ids, starts, words]).encode()).hexdigest(),
        "weights_sha256": weights_fingerprint(model),
        "num_tokens": len(token_ids),
        "convention": args.convention,
        "window": window,
        "stride": stride,
        "batch_size": args.batch_size,
        "page_size": args.page_size,
        "chunk": chunk,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": device_name(model.device),
        "versions": versions(),
    }
    partial = None
    if args.output is not None:
        partial = PartialResults(args.output, settings, resume=args.resume, processes=processes)
    control = RunControl(processes=processes, partial=partial, progress=True)
    results: list[PerplexityResult] = []
    finished = False
    report: dict[str, Any] = {}
    try:
        for attn, path, kv_dtype in runs:
            set_attention(model, attn)
            results.append(
                perplexity(
                    model, token_ids, window=window, stride=stride, convention=args.convention, path=path,
                    bounds=DocumentBounds(starts, words), control=control,
                    options=PathOptions(args.page_size, kv_dtype, chunk, args.batch_size),
                )
            )  # fmt: skip
        first = results[0]
        report = {
            **settings,
            "processes": processes.count,
            "left_out": left_out,
            "reference": {"attn": first.attn, "path": first.path},
            "results": [report_row(result, first, documents, token_ids) for result in results],
        }
        if processes.is_main:
            print(format_report(report))
            if args.output is not None:
                command_line.write_whole(args.output, json.dumps(report, indent=2, allow_nan=False) + "\n")
        finished = True
    finally:
        if partial is not None:
            partial.close(finished=finished)
    processes.end()
    return report


def _load_model(args: argparse.Namespace, device: torch.device, processes: Processes) -> PreTrainedModel:
    options = {"dtype": args.dtype, "attn_implementation": args.attn[0]}
    if args.device_map is None:
        return load_pretrained(AutoModelForCausalLM, args.model, **options).to(device)
    if processes.count > 1:
        raise ValueError(
            f"device_map (--device-map) {args.device_map!r} spreads one copy of the model over all devices, and there "
            f"are {processes.count} processes; pass one of the two"
        )
    return load_pretrained(AutoModelForCausalLM, args.model, device_map=parsed_device_map(args.device_map), **options)


def _window_and_stride(args: argparse.Namespace, config: PreTrainedConfig) -> tuple[int, int]:
    """(window, stride) in tokens, as given or by default."""
    window = min(2048, max_positions(config) or 2048) if args.window is None else args.window
    stride = args.stride
    if stride is None:
        stride = window if args.convention in DISJOINT else min(512, window // 2)
    return window, stride


def _parser() -> argparse.ArgumentParser:
    parser = command_line.make_parser(
        "perplexity", "Perplexity of one model under several attention implementations, compared token by token."
    )
    parser.add_argument("--model", required=True, help="model folder or hub id")
    parser.add_argument("--data", required=True, help=ACCEPTED_SPECS)
    parser.add_argument("--text-column", default="text", help="column with the text, for all but text files")
    parser.add_argument(
        "--attn", nargs="+", default=["eager", "paged_flash"], help="implementations; the first is the reference"
    )
    parser.add_argument("--path", nargs="+", default=["prefill"], help=f"from {PATHS}; the first is the reference")
    parser.add_argument(
        "--kv-dtype", nargs="+", choices=KV_DTYPES, default=["auto"], help="dtypes of the pages, each a run"
    )
    parser.add_argument("--convention", choices=CONVENTIONS, default="hf", help="windows, see eval/quality/windows.py")
    parser.add_argument("--window", type=int, help="tokens in a window (default: 2048, or the model's positions)")
    parser.add_argument(
        "--stride",
        type=int,
        help="tokens from window to window (default: hf: 512, or half the window if less; others: the window)",
    )
    parser.add_argument("--max-tokens", type=int, help="use the first so many tokens of the text (default: all)")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="auto: the checkpoint's")
    parser.add_argument("--device", help="torch device (default: cuda if there is one, else cpu)")
    parser.add_argument("--batch-size", type=int, default=1, help="windows in a forward")
    parser.add_argument("--page-size", type=int, default=16, help="tokens in a page of the PagedCache")
    parser.add_argument(
        "--chunk", type=int, help="tokens in a forward of chunked_prefill (default: 64, or a quarter of the window)"
    )
    parser.add_argument("--device-map", help=f"spread a big model over devices: {ACCEPTED_DEVICE_MAPS}")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--resume", action="store_true", help="go on with a stopped run of the same --output")
    return parser


if __name__ == "__main__":
    command_line.run(main)
