"""Prompts out of a text: plain excerpts, questions in the model's chat template, and long excerpts."""

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

QUESTIONS = (
    "Summarise this text in a few sentences:",
    "Who or what is this text about?",
    "Continue this text in the same style:",
    "What could be the title of this text?",
)
SHORTEST = 16
"""Tokens of the shortest excerpt."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids to go on from; `kind` is "plain", "chat" or "long"."""

    kind: str
    ids: tuple[int, ...]


def make_prompts(
    tokenizer: PreTrainedTokenizerBase,
    ids: Sequence[int],
    num_prompts: int,
    longest: int,
    num_long: int = 0,
    long_lengths: tuple[int, int] = (0, 0),
) -> list[Prompt]:
    """Prompts from pieces of a text, one behind the other.

    Args:
        tokenizer: of the model; without a chat template no prompt is a chat.
        ids: the tokens of the text.
        num_prompts: all prompts; those that are not long are plain and chat in turn.
        longest: tokens of the longest excerpt of a prompt that is not long.
        num_long: how many of them are long.
        long_lengths: tokens of the shortest and the longest of these.

    Raises:
        ValueError: the text is too short.
    """
    num_short = num_prompts - num_long
    shortest = min(SHORTEST, longest)
    lengths = [shortest + (longest - shortest) * i // max(1, num_short - 1) for i in range(num_short)]
    low, high = long_lengths
    lengths += [low + (high - low) * i // max(1, num_long - 1) for i in range(num_long)]
    if sum(lengths) > len(ids):
        raise ValueError(
            f"data (--data) has {len(ids):,} tokens, and {num_prompts} prompts need {sum(lengths):,}; pass a longer "
            "text or fewer --prompts"
        )
    beginning = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    # A tokenizer whose texts begin with that token says so by an empty text.
    starts = beginning if tokenizer("").input_ids == beginning else []
    prompts: list[Prompt] = []
    begin = 0
    for index, length in enumerate(lengths):
        piece = list(ids[begin : begin + length])
        begin += length
        if index >= num_short:
            prompts.append(Prompt("long", (*starts, *piece)))
        elif tokenizer.chat_template and index % 2:
            content = f"{QUESTIONS[index // 2 % len(QUESTIONS)]}\n\n{tokenizer.decode(piece, skip_special_tokens=True)}"
            text = tokenizer.apply_chat_template(
                [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
            )
            prompts.append(Prompt("chat", tuple(tokenizer(text, add_special_tokens=False).input_ids)))
        else:
            prompts.append(Prompt("plain", (*starts, *piece)))
    return prompts
