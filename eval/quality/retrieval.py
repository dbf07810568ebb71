"""Far context: is a token found again that stands far back? On a grid of depth and length.

`induction_grid`  the hand-built model of `eval.quality.induction_model`, which copies a string without a miss at any
                  length: less than 1.000 is a fault of attention or cache. Along the paths of `eval.quality.scoring`.
`passkey_grid`    a number in filler text that the model under test is asked for at the end (Mohtashami and Jaggi 2023,
                  https://arxiv.org/abs/2305.16300): what the model can do, beside the same with another attention.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tqdm import tqdm
from transformers import LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

import hf_paged
from eval.cache_memory import held_bytes
from eval.quality.induction_model import copy_prompt
from eval.quality.scoring import engine_scores, scored_logits

FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
KEY = "The pass key is {key}. Remember it. {key} is the pass key. "
QUESTION = "What is the pass key? The pass key is "
MAX_ANSWER = 10
NUM_KEYS = 3
"""Passkeys asked for in each cell."""

INDUCTION_PATHS = ("prefill", "paged_prefill", "chunked_prefill", "decode", "engine")
STRING_LEN = 32
"""Tokens that the induction model copies; all but the first are scored."""
SEED = 0


@dataclass(frozen=True, slots=True)
class Grid:
    """Scores from 0 to 1 by length and depth.

    Attributes:
        name: what was run.
        lengths: tokens of the prompt.
        depths: where the answer stands, 0 at the beginning.
        scores: a list of each depth's scores by length.
        seconds: of a prompt of each length, the fastest of its depths; None: not taken.
        cache_bytes: that the cache holds after a prompt of each length; None where there is none to ask.
    """

    name: str
    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    scores: tuple[tuple[float, ...], ...]
    seconds: tuple[float, ...] | None = None
    cache_bytes: tuple[int, ...] | None = None

    @property
    def worst(self) -> float:
        """The least score."""
        return min(min(row) for row in self.scores)

    @property
    def mean(self) -> float:
        """The mean score."""
        return sum(map(sum, self.scores)) / (len(self.lengths) * len(self.depths))


def induction_grid(
    model: LlamaForCausalLM,
    lengths: Sequence[int],
    depths: Sequence[float],
    *,
    path: str = "chunked_prefill",
    kv_dtype: str = "auto",
    page_size: int = 16,
) -> Grid:
    """Share of a string seen before that the induction model predicts, on "paged_flash".

    Args:
        model: of `eval.quality.induction_model.induction_model`.
        lengths, depths: of the prompts, see `eval.quality.induction_model.copy_prompt`.
        path: one of `INDUCTION_PATHS`.
        kv_dtype, page_size: of the pages.
    """
    model.set_attn_implementation("paged_flash")
    grid = _engine_grid if path == "engine" else _forward_grid
    scores, seconds, cache_bytes = grid(model, lengths, depths, path, kv_dtype, page_size)
    return Grid(
        f"induction model, {path}, {kv_dtype} pages",
        tuple(lengths),
        tuple(depths),
        tuple(tuple(scores[depth, length] for length in lengths) for depth in depths),
        tuple(min(seconds[depth, length] for depth in depths) for length in lengths),
        tuple(cache_bytes[length] for length in lengths) if cache_bytes else None,
    )


Cells = dict[tuple[float, int], float]
"""A figure by depth and length."""


@torch.no_grad()
def _forward_grid(
    model: LlamaForCausalLM, lengths: Sequence[int], depths: Sequence[float], path: str, kv_dtype: str, page_size: int
) -> tuple[Cells, Cells, dict[int, int]]:
    """Scores, seconds, and bytes of the cache by length."""
    scores, seconds, cache_bytes = {}, {}, {}
    for depth in tqdm(depths, desc=f"induction {path} {kv_dtype}"):
        for length in lengths:
            prompt = _induction_prompt(model, length, depth).to(model.device)
            cache = None
            if path != "prefill":
                cache = hf_paged.PagedCache(model.config, page_size=page_size, kv_dtype=kv_dtype)
            begin = time.perf_counter()
            logits = scored_logits(model, prompt, STRING_LEN - 1, path, cache, chunk=chunk_of(length))
            predicted = torch.cat([part.argmax(dim=-1) for part in logits], dim=1)[0].tolist()
            seconds[depth, length] = time.perf_counter() - begin
            scores[depth, length] = _hits(predicted, prompt)
            if cache is not None:
                cache_bytes[length] = held_bytes(cache)
                cache.reset()
    return scores, seconds, cache_bytes


def _engine_grid(
    model: LlamaForCausalLM, lengths: Sequence[int], depths: Sequence[float], path: str, kv_dtype: str, page_size: int
) -> tuple[Cells, Cells, dict[int, int]]:
    """As `_forward_grid`, each prompt a request of an engine, without bytes: its pages are gone with the request."""
    scores, seconds = {}, {}
    config = hf_paged.EngineConfig(
        page_size=page_size, kv_dtype=kv_dtype, max_model_len=max(lengths), max_num_seqs=4, max_batch_tokens=4096
    )
    with hf_paged.Engine(model, config, background=False) as engine:
        for depth in tqdm(depths, desc=f"induction {path} {kv_dtype}"):
            for length in lengths:
                prompt = _induction_prompt(model, length, depth)
                begin = time.perf_counter()
                [[(_, predicted)]] = engine_scores(engine, [prompt], [STRING_LEN - 1])
                seconds[depth, length] = time.perf_counter() - begin
                scores[depth, length] = _hits(predicted, prompt)
    return scores, seconds, {}


def chunk_of(length: int) -> int:
    """At most 32 chunks, and at least 4, so that the string is read out of pages."""
    return max(min(512, length // 4), length // 32)


def _induction_prompt(model: LlamaForCausalLM, length: int, depth: float) -> torch.Tensor:
    """[1, length] int64."""
    return copy_prompt(model.config.vocab_size, length, SEED, string_len=STRING_LEN, depth=depth)


def _hits(predicted: Sequence[int], prompt: torch.Tensor) -> float:
    """Share of the string's tokens but the first that are predicted."""
    expected = prompt[0, 1 - STRING_LEN :].tolist()
    return sum(a == b for a, b in zip(predicted, expected, strict=True)) / len(expected)


def passkey_prompt(tokenizer: PreTrainedTokenizerBase, length: int, depth: float, key: int) -> list[int]:
    """Token ids of a prompt of at most `length` tokens, filler around a sentence with the key.

    Raises:
        ValueError: `length` has no room for the sentences.
    """

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    beginning = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    needle, question, filler = encode(KEY.format(key=key)), encode(QUESTION), encode(FILLER)
    room = length - len(beginning) - len(needle) - len(question)
    if room < 0:
        raise ValueError(
            f"length={length} (--passkey-lengths) must be at least {length - room} for this tokenizer, the sentence "
            "with the key and the question"
        )
    padding = (filler * (room // len(filler) + 1))[:room]
    cut = round(depth * room)
    return [*beginning, *padding[:cut], *needle, *padding[cut:], *question]


@torch.no_grad()
def passkey_grid(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    lengths: Sequence[int],
    depths: Sequence[float],
    *,
    num_keys: int = NUM_KEYS,
    seed: int = 0,
) -> Grid:
    """Share of `num_keys` keys that greedy `generate()` answers, under the model's attention implementation."""
    generator = torch.Generator().manual_seed(seed)
    scores = {}
    for depth in tqdm(depths, desc="passkey"):
        for length in lengths:
            keys = torch.randint(10_000, 100_000, (num_keys,), generator=generator).tolist()
            prompts = [passkey_prompt(tokenizer, length, depth, key) for key in keys]
            scores[depth, length] = sum(
                _answers(model, tokenizer, prompt, key) for prompt, key in zip(prompts, keys)
            ) / len(keys)
    attn = model.config.get_text_config(decoder=True)._attn_implementation
    return _grid(f"passkey, {attn}", lengths, depths, scores)


def _answers(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: list[int], key: int) -> bool:
    ids = torch.tensor([prompt], device=model.device)
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=MAX_ANSWER, do_sample=False, num_beams=1,
        pad_token_id=tokenizer.pad_token_id or 0,
    )  # fmt: skip
    return str(key) in tokenizer.decode(out[0, len(prompt) :])


def _grid(name: str, lengths: Sequence[int], depths: Sequence[float], scores: dict[tuple[float, int], float]) -> Grid:
    return Grid(name, tuple(lengths), tuple(depths), tuple(tuple(scores[d, n] for n in lengths) for d in depths))
