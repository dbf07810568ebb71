"""Bytes that a PagedCache holds, beside transformers' caches and the ideal: tokens times bytes per token.

    python -m eval.cache_memory --output eval/results/cache_memory.json

Five cases: a ragged batch, beams, samples of one prompt, a chat, and a model with sliding windows; and the time of a
beam reorder. The models are small and random: bytes are exact counts, whatever the weights. Runs on a CPU in a few
minutes. Also writes the tables as Markdown beside the JSON.
"""

import gc
import json
import platform
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import date
from functools import partial
from typing import Any

import torch
import transformers
from tqdm import tqdm
from transformers import (
    Cache,
    DynamicCache,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    QuantizedCache,
    StaticCache,
)

import hf_paged
from eval import command_line
from eval.loading import with_cache

VOCAB_SIZE = 512
DTYPE = torch.bfloat16
PAGED, DYNAMIC = "PagedCache", "DynamicCache"
ONCE, STORED = "PagedCache, prompt computed once", "PagedCache, prompt stored before"
CACHES = (PAGED, DYNAMIC, "StaticCache", "QuantizedCache fp8")
RAGGED_CACHES = (
    PAGED, "PagedCache fp8", "PagedCache int8", DYNAMIC, "StaticCache", "QuantizedCache fp8",
    "QuantizedCache quanto 4 bits", "QuantizedCache hqq 4 bits",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Sizes:
    """How large the cases are; lengths in tokens.

    Attributes:
        num_layers: layers of the Llama.
        head_dim: of its 2 key/value heads.
        page_size: of every PagedCache.
        ragged: prompts of the ragged batch.
        ragged_shortest: the shortest of them.
        ragged_longest: the longest of them.
        beams: beams.
        beam_prompt: their prompt.
        samples: samples of one prompt.
        sample_prompt: their prompt.
        new_tokens: generated tokens of beams and samples.
        turns: turns of the chat.
        first_message: the first message of the chat, with what an application puts before it.
        message: the longest of its later messages.
        answer: its answers.
        window: sliding window of the Gemma 3.
        windowed_prompt: its prompt.
        windowed_chunk: its prefill goes by chunks of this length.
        reorder_prompts: prompts of the beams whose reorder is timed.
        repeats: timed reorders.
    """

    num_layers: int = 2
    head_dim: int = 64
    page_size: int = 16
    ragged: int = 32
    ragged_shortest: int = 16
    ragged_longest: int = 2048
    beams: int = 8
    beam_prompt: int = 2048
    samples: int = 16
    sample_prompt: int = 4096
    new_tokens: int = 8
    turns: int = 10
    first_message: int = 200
    message: int = 60
    answer: int = 24
    window: int = 1024
    windowed_prompt: int = 8192
    windowed_chunk: int = 1024
    reorder_prompts: tuple[int, ...] = (2048, 32768)
    repeats: int = 9


@dataclass(frozen=True, slots=True)
class Row:
    """One cache in one case; None where it could not be measured, which ``note`` explains.

    Attributes:
        case: the case.
        cache: the cache.
        held_bytes: bytes of keys and values (and scales) held at the end.
        most_bytes: the most held after any forward.
        committed_bytes: memory taken from the device at the end: what a pool keeps free counts.
        ideal_bytes: tokens times bytes per token, a shared prompt counted once, in the precision of the cache.
        page_slack_bytes: one page of every layer for each sequence, in bytes; 0 for caches without pages.
        computed_tokens: tokens that went through the model.
        note: what to know about the row.
    """

    case: str
    cache: str
    held_bytes: int | None
    most_bytes: int | None
    committed_bytes: int | None
    ideal_bytes: int
    page_slack_bytes: int = 0
    computed_tokens: int | None = None
    note: str = ""


# Models


def llama(sizes: Sizes) -> LlamaForCausalLM:
    """A random Llama with 2 query and 2 key/value heads, in bfloat16, that never ends a sequence by itself."""
    torch.manual_seed(0)
    longest = max(sizes.ragged_longest, sizes.beam_prompt, sizes.sample_prompt)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE, hidden_size=2 * sizes.head_dim, intermediate_size=2 * sizes.head_dim,
        num_hidden_layers=sizes.num_layers, num_attention_heads=2, num_key_value_heads=2, head_dim=sizes.head_dim,
        max_position_embeddings=longest + 4096, bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM._from_config(config, attn_implementation="sdpa", dtype=DTYPE).eval()


def gemma3(sizes: Sizes) -> Gemma3ForCausalLM:
    """A random Gemma 3 of 6 layers, 5 with a sliding window and 1 without, in bfloat16."""
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=VOCAB_SIZE, hidden_size=2 * sizes.head_dim, intermediate_size=2 * sizes.head_dim,
        num_hidden_layers=6, num_attention_heads=2, num_key_value_heads=2, head_dim=sizes.head_dim,
        sliding_window=sizes.window, layer_types=["sliding_attention"] * 5 + ["full_attention"],
        max_position_embeddings=sizes.windowed_prompt + 64, bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return Gemma3ForCausalLM._from_config(config, attn_implementation="sdpa", dtype=DTYPE).eval()


# Bytes


def token_bytes(config: PreTrainedConfig, kind: str = PAGED) -> int:
    """Bytes of one token's keys and values in one layer, in the precision of a cache ``kind``; scales per token too."""
    heads, head_dim = config.num_key_value_heads, config.head_dim
    if kind in ("PagedCache fp8", "PagedCache int8"):
        return 2 * heads * (head_dim + 4)  # a float32 scale per token and head
    if kind == "QuantizedCache fp8":
        return 2 * heads * head_dim
    if kind.endswith("4 bits"):
        return heads * head_dim
    return 2 * heads * head_dim * DTYPE.itemsize


def held_bytes(cache: Cache) -> int:
    """Bytes of the keys and values that a cache holds: pages with an owner, or the storages of the layers' tensors."""
    if isinstance(cache, hf_paged.PagedCache):
        return sum(group.held_bytes for group in cache.memory())
    storages: dict[int, int] = {}
    for layer in cache.layers:
        for name in ("keys", "values", "_quantized_keys", "_quantized_values"):
            for tensor in _tensors(getattr(layer, name, None)):
                storage = tensor.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def committed_bytes(cache: Cache) -> int:
    """Bytes taken from the device."""
    if isinstance(cache, hf_paged.PagedCache):
        return sum(group.committed_bytes for group in cache.memory())
    return held_bytes(cache)


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """Plain tensors in nested containers and in quantised tensors that wrap others."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
    elif hasattr(value, "__tensor_flatten__"):
        for name in value.__tensor_flatten__()[0]:
            yield from _tensors(getattr(value, name))
    elif isinstance(value, torch.Tensor) and value.numel():
        yield value


def page_slack(cache: Cache, num_seqs: int) -> int:
    """Bytes of one page of every layer for each of ``num_seqs`` sequences."""
    if not isinstance(cache, hf_paged.PagedCache):
        return 0
    return num_seqs * cache.pool.page_bytes


def make_cache(kind: str, config: PreTrainedConfig, max_tokens: int, page_size: int) -> Cache:
    """The cache that a row names; ``max_tokens`` is the room of a StaticCache, no more than it needs.

    Raises:
        ImportError: the cache needs a package that is not installed.
        ValueError: this version of transformers does not have it, or not for this model.
    """
    name, *options = kind.split(",")[0].split()
    if name == PAGED:
        return hf_paged.PagedCache(config, page_size=page_size, kv_dtype=options[0] if options else "auto")
    if name == DYNAMIC:
        return DynamicCache(config=config)
    if name == "StaticCache":
        return StaticCache(config=config, max_cache_len=max_tokens)
    return QuantizedCache(options[0], config)


class Watch:
    """Follows a model's forwards while it is in use: tokens computed, and the most bytes held by a cache.

    Attributes:
        calls: tokens of each forward, over all rows, padding included.
        most_bytes: the most bytes held after a forward.
    """

    def __init__(self) -> None:
        self.calls: list[int] = []
        self.most_bytes = 0

    @contextmanager
    def on(self, model: PreTrainedModel, cache: Cache | None = None) -> Iterator["Watch"]:
        """Watch ``model``, and ``cache`` if given."""

        def before(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.calls.append((args[0] if args else kwargs["input_ids"]).numel())

        def after(*_: Any) -> None:
            if cache is not None:
                self.most_bytes = max(self.most_bytes, held_bytes(cache))

        handles = [model.register_forward_pre_hook(before, with_kwargs=True), model.register_forward_hook(after)]
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()


def _measure(
    case: str,
    kind: str,
    model: PreTrainedModel,
    max_tokens: int,
    page_size: int,
    ideal_tokens: int,
    num_seqs: int,
    fill: Callable[[Cache], Cache | None],
) -> Row:
    """Fill a cache of ``kind`` and count; ``ideal_tokens`` are tokens times layers.

    ``fill`` may return another cache, which is then the one that is measured.
    """
    ideal = ideal_tokens * token_bytes(model.config, kind)
    try:
        model.set_attn_implementation("paged_flash" if kind.startswith(PAGED) else "sdpa")
        cache = make_cache(kind, model.config, max_tokens, page_size)
    except ImportError:
        return Row(case, kind, None, None, None, ideal, note="not installed")
    except ValueError as error:
        return Row(case, kind, None, None, None, ideal, note=f"not available: {error}")
    gc.collect()
    with Watch().on(model, cache) as watch:
        try:
            cache = fill(cache) or cache
        except RuntimeError as error:
            if not kind.startswith("QuantizedCache"):
                raise
            # torch 2.11 makes NaN of later keys that are larger than the float8 scale of the first ones.
            return Row(case, kind, None, None, None, ideal, note=f"failed: {error}")
    most = max(watch.most_bytes, held_bytes(cache))
    return Row(
        case=case,
        cache=kind,
        held_bytes=held_bytes(cache),
        most_bytes=most,
        committed_bytes=committed_bytes(cache),
        ideal_bytes=ideal,
        page_slack_bytes=page_slack(cache, num_seqs),
        computed_tokens=sum(watch.calls),
        note=_NOTES.get(kind, ""),
    )


_NOTES = {
    ONCE: "one forward over the prompt, batch_repeat_interleave(), then generate()",
    STORED: "the prompt stored by store_prefix(), found by match_prefix(), then generate()",
    "QuantizedCache fp8": "one scale per tensor",
}


# Cases


def ragged_lengths(sizes: Sizes) -> list[int]:
    """Lengths drawn evenly between the shortest and the longest, both among them."""
    draw = random.Random(0)
    between = [draw.randint(sizes.ragged_shortest, sizes.ragged_longest) for _ in range(sizes.ragged - 2)]
    return [sizes.ragged_shortest, *between, sizes.ragged_longest]


@torch.inference_mode()
def ragged(model: LlamaForCausalLM, sizes: Sizes, kind: str) -> Row:
    """Case a: prompts of many lengths, left-padded into one batch, after their prefill."""
    lengths = torch.tensor(ragged_lengths(sizes))
    width = int(lengths.max())
    mask = torch.arange(width)[None, :] >= width - lengths[:, None]
    ids = torch.randint(1, VOCAB_SIZE, mask.shape, generator=torch.Generator().manual_seed(1)) * mask
    tokens = int(lengths.sum()) * sizes.num_layers

    def fill(cache: Cache) -> None:
        model(ids, attention_mask=mask.long(), **with_cache(model, cache), logits_to_keep=1)

    return _measure("a", kind, model, width, sizes.page_size, tokens, len(lengths), fill)


@torch.inference_mode()
def forked(model: LlamaForCausalLM, sizes: Sizes, kind: str, case: str) -> Row:
    """Case b: beams of one prompt; case c: samples of one prompt. By ``generate()``, whose last token is not cached."""
    if case == "b":
        num_seqs, prompt, options = sizes.beams, sizes.beam_prompt, {"num_beams": sizes.beams, "do_sample": False}
    else:
        num_seqs, prompt = sizes.samples, sizes.sample_prompt
        options = {"num_return_sequences": sizes.samples, "do_sample": True}
    torch.manual_seed(2)
    ids = torch.randint(1, VOCAB_SIZE, (1, prompt))
    new = sizes.new_tokens

    def fill(cache: Cache) -> Cache:
        if kind == ONCE:
            # All but the last token: generate() needs one to go on from.
            model(ids[:, :-1], **with_cache(model, cache), logits_to_keep=1)
            cache.batch_repeat_interleave(num_seqs)
        elif kind == STORED:
            assert isinstance(cache, hf_paged.PagedCache)
            model(ids, **with_cache(model, cache), logits_to_keep=1)
            cache.store_prefix(ids)
            cache.reset()
            cache.match_prefix(ids.expand(num_seqs, -1))
        model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new,
            **with_cache(model, cache), **options,
        )  # fmt: skip
        return cache

    ideal_tokens = (prompt + num_seqs * (new - 1)) * sizes.num_layers
    return _measure(case, kind, model, prompt + new, sizes.page_size, ideal_tokens, num_seqs, fill)


@torch.inference_mode()
def windowed(model: Gemma3ForCausalLM, sizes: Sizes, kind: str) -> Row:
    """Case e: sliding windows in 5 of 6 layers; a prefill by chunks, then some decode steps."""
    ids = torch.randint(1, VOCAB_SIZE, (1, sizes.windowed_prompt), generator=torch.Generator().manual_seed(3))
    held = sizes.windowed_prompt + sizes.new_tokens

    def fill(cache: Cache) -> None:
        last = ids[:, -1:]
        for chunk in [*ids.split(sizes.windowed_chunk, dim=1), *[last] * sizes.new_tokens]:
            model(chunk, **with_cache(model, cache), logits_to_keep=1)

    # The next query sees itself and the window's other tokens.
    tokens = held + 5 * min(held, sizes.window - 1)
    return _measure("e", kind, model, held, sizes.page_size, tokens, 1, fill)


@dataclass(frozen=True, slots=True)
class Turn:
    """Tokens of one turn of the chat.

    Attributes:
        prompt: the conversation so far, with the new message.
        new: tokens of it that no turn has computed: the message, and the last token of the answer before.
        partial: tokens at the end of the turn before that do not fill a page: a prefix is made of full pages.
        paged: tokens in the prefill with a PagedCache that found its prefix.
        fresh: tokens in the prefill with a fresh DynamicCache.
        kept: tokens in the prefill with one DynamicCache that the application keeps for this conversation.
    """

    prompt: int
    new: int
    partial: int
    paged: int
    fresh: int
    kept: int


@torch.inference_mode()
def chat(model: LlamaForCausalLM, sizes: Sizes) -> list[Turn]:
    """Case d: tokens that each turn of a chat computes before its first new token."""
    draw = random.Random(4)
    pool = hf_paged.PagePool(page_size=sizes.page_size)
    kept = DynamicCache(config=model.config)
    turns: list[Turn] = []
    conversation: list[int] = []
    computed = 0
    for turn in range(sizes.turns):
        length = draw.randint(sizes.message // 4, sizes.message) if turn else sizes.first_message
        conversation += [draw.randrange(1, VOCAB_SIZE) for _ in range(length)]
        ids = torch.tensor([conversation])

        model.set_attn_implementation("paged_flash")
        cache = hf_paged.PagedCache(model.config, pool=pool)
        cache.match_prefix(ids)
        paged, answer = _turn(model, ids, cache, sizes.answer)
        cache.store_prefix(answer)
        cache.reset()

        model.set_attn_implementation("sdpa")
        fresh, _ = _turn(model, ids, DynamicCache(config=model.config), sizes.answer)
        again, _ = _turn(model, ids, kept, sizes.answer)
        new, partial = ids.shape[1] - computed, computed % sizes.page_size
        turns.append(Turn(ids.shape[1], new, partial, paged, fresh, again))
        # Answers may differ by rounding; all are as long, and lengths are all that is counted.
        conversation = answer[0].tolist()
        computed = len(conversation) - 1
    pool.check()
    return turns


def _turn(model: LlamaForCausalLM, ids: torch.Tensor, cache: Cache, answer: int) -> tuple[int, torch.Tensor]:
    """Tokens of the prefill of a ``generate()``, and prompt with answer."""
    with Watch().on(model) as watch:
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), **with_cache(model, cache), max_new_tokens=answer,
            min_new_tokens=answer, do_sample=False,
        )  # fmt: skip
    return sum(watch.calls) - (answer - 1), out


@dataclass(frozen=True, slots=True)
class ReorderTime:
    """Time of ``reorder_cache``, medians in milliseconds.

    Attributes:
        prompt: tokens of the prompt that the beams share.
        cache: the cache.
        reorder_ms: the reorder alone.
        reorder_and_write_ms: the reorder and the next token's write, where copy-on-write and concatenation are paid.
    """

    prompt: int
    cache: str
    reorder_ms: float
    reorder_and_write_ms: float


@torch.inference_mode()
def reorder(model: LlamaForCausalLM, sizes: Sizes, kind: str, prompt: int) -> ReorderTime:
    """Time reorders of beams that share ``prompt`` tokens and have one to three pages of their own."""
    model.set_attn_implementation("paged_flash" if kind == PAGED else "sdpa")
    cache = make_cache(kind, model.config, 0, sizes.page_size)
    heads, head_dim = model.config.num_key_value_heads, model.config.head_dim

    def write(num_seqs: int, tokens: int) -> None:
        for layer in range(sizes.num_layers):
            states = torch.ones(num_seqs, heads, tokens, head_dim, dtype=DTYPE)
            cache.update(states, states, layer)
        if isinstance(cache, hf_paged.PagedCache):
            cache.planner.flush()  # attention does it in a model

    write(1, prompt)
    cache.batch_repeat_interleave(sizes.beams)
    for _ in range(sizes.page_size):
        write(sizes.beams, 1)
    generator = torch.Generator().manual_seed(5)
    alone, both = [], []
    for _ in range(sizes.repeats + 1):
        beam_idx = torch.randint(sizes.beams, (sizes.beams,), generator=generator)
        started = time.perf_counter()
        cache.reorder_cache(beam_idx)
        reordered = time.perf_counter()
        write(sizes.beams, 1)
        alone.append((reordered - started) * 1e3)
        both.append((time.perf_counter() - started) * 1e3)
    return ReorderTime(prompt, kind, statistics.median(alone[1:]), statistics.median(both[1:]))


# The report


def cases(sizes: Sizes) -> dict[str, str]:
    """What each case is, in words."""
    return {
        "a": f"{sizes.ragged} prompts of {sizes.ragged_shortest} to {sizes.ragged_longest:,} tokens, left-padded",
        "b": f"{sizes.beams} beams of a prompt of {sizes.beam_prompt:,} tokens, {sizes.new_tokens} new",
        "c": f"{sizes.samples} samples of a prompt of {sizes.sample_prompt:,} tokens, {sizes.new_tokens} new",
        "d": f"a chat of {sizes.turns} turns, answers of {sizes.answer} tokens",
        "e": f"Gemma 3, window {sizes.window:,} in 5 of 6 layers, {sizes.windowed_prompt:,} tokens in chunks of "
        f"{sizes.windowed_chunk:,}, {sizes.new_tokens} decode steps",
    }


def run(sizes: Sizes) -> dict[str, Any]:
    """Measure every case."""
    model = llama(sizes)
    jobs: list[Callable[[], Row]] = [partial(ragged, model, sizes, kind) for kind in RAGGED_CACHES]
    for case in "bc":
        for kind in (PAGED, ONCE, STORED, *CACHES[1:]):
            jobs.append(partial(forked, model, sizes, kind, case))
    gemma = gemma3(sizes)
    jobs += [partial(windowed, gemma, sizes, kind) for kind in CACHES]
    rows = [job() for job in tqdm(jobs, desc="caches")]
    turns = chat(model, sizes)
    times = [
        reorder(model, sizes, kind, prompt)
        for prompt in tqdm(sizes.reorder_prompts, desc="reorders")
        for kind in (PAGED, DYNAMIC)
    ]
    return {
        "what": f"Llama of {sizes.num_layers} layers and Gemma 3 of 6, 2 key/value heads of {sizes.head_dim}, "
        f"bfloat16, pages of {sizes.page_size} tokens",
        "cases": cases(sizes),
        "sizes": asdict(sizes),
        "device": "CPU",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__,
                     "hf_paged": hf_paged.__version__, "python": platform.python_version()},
        "date": date.today().isoformat(),
        "command": "python -m eval.cache_memory",
        "rows": [asdict(row) for row in rows],
        "turns": [asdict(turn) for turn in turns],
        "reorders": [asdict(entry) for entry in times],
    }  # fmt: skip


def table(report: dict[str, Any]) -> str:
    """The report as Markdown: a table of bytes for each case, the turns of the chat, the reorder times."""
    lines = [
        "# Memory of the caches",
        "",
        f"{report['what']}. {report['device']}, "
        + ", ".join(f"{k} {v}" for k, v in report["versions"].items())
        + f", {report['date']}. `{report['command']}`",
        "",
        "MiB of keys and values. held: at the end; most: the most held after any forward; taken: from the device, with",
        "what a pool keeps free; ideal: tokens x bytes per token in the cache's precision, a shared prompt counted",
        "once; over: held above the ideal, in pages (of every layer) per sequence; computed: tokens through the model.",
    ]
    for case in ("a", "b", "c", "e"):
        lines += ["", f"## ({case}) {report['cases'][case]}", ""]
        lines += ["| cache | held | most | taken | ideal | held / ideal | DynamicCache / held | over | computed |"]
        lines += ["|---" * 9 + "|"]
        rows = [row for row in report["rows"] if row["case"] == case]
        dynamic = next(row["held_bytes"] for row in rows if row["cache"] == DYNAMIC)
        lines += [_line(row, dynamic) for row in rows]
        if case == "b":
            lines += ["", "Below the ideal: it counts an answer for each beam, and beams share beginnings of theirs."]
        lines += [f"\n{row['cache'].partition(', ')[2] or row['cache']}: {row['note']}." for row in rows
                  if row["note"] and row["held_bytes"] is not None]  # fmt: skip
    lines += ["", f"## (d) {report['cases']['d']}", ""]
    lines += [
        "Tokens computed before a turn's first new token. new: computed by no turn before (the message, and the last",
        "token of the answer before it, which was sampled and never computed); partial: tokens behind the last full",
        "page of the turn before, computed again because prefixes are full pages; kept: one DynamicCache that the",
        "application keeps for this conversation alone.",
        "",
        "| turn | prompt | new | partial | PagedCache, shared pool | fresh DynamicCache | kept DynamicCache |",
        "|---" * 7 + "|",
    ]
    names = ("prompt", "new", "partial", "paged", "fresh", "kept")
    for index, turn in enumerate(report["turns"], 1):
        lines.append(f"| {index} | " + " | ".join(f"{turn[name]:,}" for name in names) + " |")
    totals = [sum(turn[name] for turn in report["turns"]) for name in names]
    lines.append("| all | " + " | ".join(f"{total:,}" for total in totals) + " |")
    lines += ["", f"## reorder_cache, {report['sizes']['beams']} beams", ""]
    lines += [
        f"Milliseconds, median of {report['sizes']['repeats']}, {report['sizes']['num_layers']} layers: a "
        "DynamicCache copies every layer, a PagedCache changes",
        "one page table for all. In brackets: with the next token's write, where a PagedCache copies pages that are",
        "still shared and a DynamicCache concatenates.",
        "",
        "| prompt | PagedCache | DynamicCache |",
        "|---|---|---|",
    ]
    for prompt in report["sizes"]["reorder_prompts"]:
        both = {entry["cache"]: entry for entry in report["reorders"] if entry["prompt"] == prompt}
        shown = [f"{both[k]['reorder_ms']:.2f} ({both[k]['reorder_and_write_ms']:.2f})" for k in (PAGED, DYNAMIC)]
        lines.append(f"| {prompt:,} | " + " | ".join(shown) + " |")
    return "\n".join(lines) + "\n"


def _line(row: dict[str, Any], dynamic: int) -> str:
    """A row of a table of bytes."""
    held, ideal, slack = row["held_bytes"], row["ideal_bytes"], row["page_slack_bytes"]
    if held is None:
        return f"| {row['cache']} | {row['note'].partition('. ')[0]} | | | {ideal / 2**20:.2f} | | | | |"
    cells = [f"{row[name] / 2**20:.2f}" for name in ("held_bytes", "most_bytes", "committed_bytes", "ideal_bytes")]
    cells += [f"{held / ideal:.3f}", f"{dynamic / held:.2f}", f"{(held - ideal) / slack:.2f}" if slack else ""]
    return f"| {row['cache']} | " + " | ".join(cells) + f" | {row['computed_tokens']:,} |"


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Command line; returns the report."""
    parser = command_line.make_parser("cache_memory", __doc__)
    parser.add_argument("--output", type=command_line.output_file, help="JSON file; the Markdown tables go beside it")
    parsed = parser.parse_args(arguments)
    transformers.utils.logging.set_verbosity_error()
    report = run(Sizes())
    print(table(report))
    if parsed.output:
        parsed.output.parent.mkdir(parents=True, exist_ok=True)
        parsed.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        parsed.output.with_suffix(".md").write_text(table(report), encoding="utf-8")
    return report


if __name__ == "__main__":
    command_line.run(main)
