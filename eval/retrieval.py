"""Far context: is a token found again that stands far back? On a grid of depth and length.

`induction_grid`  the hand-built model of `eval.induction_model`, which copies a string without a miss at any length:
                  less than 1.000 is a fault of attention or cache.
`passkey_grid`    a number in filler text that the model under test is asked for at the end (Mohtashami and Jaggi 2023,
                  https://arxiv.org/abs/2305.16300): what the model can do, beside the same with another attention.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tqdm import tqdm
from transformers import Cache, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

import hf_paged
from eval.induction_model import copy_prompt

FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
KEY = "The pass key is {key}. Remember it. {key} is the pass key. "
QUESTION = "What is the pass key? The pass key is "
MAX_ANSWER = 10


@dataclass(frozen=True, slots=True)
class Grid:
    """Scores from 0 to 1 by length and depth.

    Attributes:
        name: what was run.
        lengths: tokens of the prompt.
        depths: where the answer stands, 0 at the beginning.
        scores: a list of each depth's scores by length.
    """

    name: str
    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    scores: tuple[tuple[float, ...], ...]

    @property
    def worst(self) -> float:
        """The least score."""
        return min(min(row) for row in self.scores)

    @property
    def mean(self) -> float:
        """The mean score."""
        return sum(map(sum, self.scores)) / (len(self.lengths) * len(self.depths))


@torch.no_grad()
def induction_score(
    model: LlamaForCausalLM, length: int, depth: float, cache: Cache, chunk: int, string_len: int, seed: int = 0
) -> float:
    """Share of the second string that the induction model predicts, the prompt fed `chunk` tokens at a time.

    Args:
        model: of `eval.induction_model.induction_model`.
        length, depth, string_len, seed: of `copy_prompt`.
        cache: empty.
        chunk: tokens of a forward.
    """
    prompt = copy_prompt(model.config.vocab_size, length, seed, string_len=string_len, depth=depth).to(model.device)
    predicted = []
    for begin in range(0, length, chunk):
        rows = prompt[:, begin : begin + chunk]
        keep = min(rows.shape[1], max(1, begin + rows.shape[1] - (length - string_len)))
        logits = model(rows, past_key_values=cache, use_cache=True, logits_to_keep=keep).logits
        if begin + rows.shape[1] > length - string_len:
            predicted.append(logits.argmax(dim=-1))
    answers = torch.cat(predicted, dim=1)[:, -string_len:-1]
    return (answers == prompt[:, length - string_len + 1 :]).double().mean().item()


def induction_grid(
    model: LlamaForCausalLM,
    lengths: Sequence[int],
    depths: Sequence[float],
    *,
    kv_dtype: str = "auto",
    page_size: int = 16,
    chunk: int = 512,
    string_len: int = 32,
) -> Grid:
    """The induction model through a `hf_paged.PagedCache`, on "paged_flash"."""
    model.set_attn_implementation("paged_flash")
    scores = {
        (depth, length): induction_score(
            model, length, depth, hf_paged.PagedCache(model.config, page_size=page_size, kv_dtype=kv_dtype), chunk,
            string_len,
        )
        for depth in tqdm(depths, desc=f"induction {kv_dtype}")
        for length in lengths
    }  # fmt: skip
    return _grid(f"induction model, paged_flash, {kv_dtype} pages", lengths, depths, scores)


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
    num_keys: int = 3,
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
