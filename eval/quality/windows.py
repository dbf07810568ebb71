"""Which tokens of a text are scored, and with how much before them: the conventions by their names.

Figures of different conventions differ by several percent, so none is quoted without its name.

`hf`         Windows of `window` tokens, each starting `stride` after the one before; the last ends with the text and
             may be shorter. A window scores the tokens that no earlier window scored, so each token of the text is
             scored exactly once, except the very first, which nothing precedes. With 9 tokens, window 6 and stride 2:

                 token    0 1 2 3 4 5 6 7 8
                 window   . x x x x x               x scored
                              . . . . x x           . context only
                                  . . . . x

             The nll is summed over the labels really scored and divided by their number. (The loop of the transformers
             guide weighs each window but the first by one label less than it scored.)
`gptq`       Disjoint windows of `window` tokens, the last `window - 1` of each scored; the tail that fills no window is
             dropped. What papers on quantisation report, at 2048.
`llama.cpp`  Disjoint windows as in `gptq`, of which only the second half is scored: labels `window // 2 + 1` and after.
             (The program also puts the beginning-of-text token in the place of each window's first token, where the
             model has one; this does not.)
`lm-eval`    Each document for itself, behind one beginning-of-text token (end-of-text where the tokenizer has none),
             every token scored. A window feeds `window` tokens and scores what no window before it scored; all but the
             last are disjoint, the last reaches back to be full. Gives word and byte level figures too: the sum over
             all documents, divided by the words and bytes of the documents as they came. (Where a tokenizer adds
             special tokens of its own, lm-eval keeps them unless told `add_bos_token=False`; this never adds them.)
`last-word`  What is reported for LAMBADA: of each document only the last word is scored, after all that stands before
             it. Gives the perplexity of words (exp of the mean nll of a word, all its tokens together) and the share of
             words that greedy decoding writes. A document longer than the window loses its beginning.

Sources: https://huggingface.co/docs/transformers/perplexity, https://github.com/IST-DASLab/gptq,
https://github.com/ggml-org/llama.cpp/tree/master/tools/perplexity and
https://github.com/EleutherAI/lm-evaluation-harness (`get_rolling_token_windows`, tasks `wikitext`,
`lambada_openai`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

CONVENTIONS = ("hf", "gptq", "llama.cpp", "lm-eval", "last-word")
DISJOINT = ("gptq", "llama.cpp", "lm-eval", "last-word")
"""Conventions whose stride is the window."""
BY_DOCUMENT = ("lm-eval", "last-word")
"""Conventions that score each document for itself."""


@dataclass(frozen=True, slots=True)
class Window:
    """Tokens `begin` to `end - 1` of the text, of which the last `num_scored` are scored. The last is never fed."""

    begin: int
    end: int
    num_scored: int

    @property
    def shape(self) -> tuple[int, int]:
        """(tokens, scored tokens): windows of one shape can share a batch without padding."""
        return self.end - self.begin, self.num_scored


def plan_windows(
    num_tokens: int,
    window: int,
    stride: int,
    convention: str = "hf",
    document_starts: Sequence[int] = (0,),
    word_tokens: Sequence[int] = (),
) -> tuple[Window, ...]:
    """The windows over a text of `num_tokens` tokens; the module's docstring draws them.

    Args:
        num_tokens: length of the text in tokens.
        window: most tokens in a window (for "lm-eval" and "last-word": most tokens fed).
        stride: "hf": tokens from one window's start to the next, at most `window - 1`, as the first token of a window
            has nothing before it to be predicted from. Else: equal to `window`.
        convention: one of `CONVENTIONS`.
        document_starts: for "lm-eval" and "last-word": ascending, the first token of each document, which is not
            scored; the first is 0.
        word_tokens: for "last-word": how many tokens the last word of each document has.

    Raises:
        ValueError: a bad value, or a text too short to score one token ("hf", "lm-eval") or to fill one window.
    """
    if convention not in CONVENTIONS:
        raise ValueError(f"convention={convention!r} is unknown; pass one of {CONVENTIONS}")
    if window < 2:
        raise ValueError(f"window={window} must be at least 2: one token to read and one to score")
    if convention in DISJOINT and stride != window:
        raise ValueError(
            f"stride={stride} with window={window}: {convention} windows are disjoint; pass stride={window}"
        )
    if convention == "lm-eval":
        return _plan_documents(num_tokens, window, document_starts)
    if convention == "last-word":
        return _plan_last_words(num_tokens, window, document_starts, word_tokens)
    if tuple(document_starts) != (0,):
        raise ValueError(
            f"document_starts has {len(document_starts)} documents, and convention {convention!r} scores one text; "
            "join them, or pass convention='lm-eval' or 'last-word'"
        )
    if convention in DISJOINT:
        return _plan_disjoint(num_tokens, window, convention)
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


def _plan_disjoint(num_tokens: int, window: int, convention: str) -> tuple[Window, ...]:
    if num_tokens < window:
        raise ValueError(
            f"token_ids has {num_tokens} tokens, and convention {convention!r} drops what fills no window of {window}; "
            "pass a longer text (--data, --max-tokens) or a smaller window (--window)"
        )
    num_context = 1 if convention == "gptq" else window // 2 + 1
    if num_context >= window:
        raise ValueError(f"window={window} must be at least 3: {convention} scores the second half only")
    return tuple(
        Window(begin, begin + window, window - num_context) for begin in range(0, num_tokens - window + 1, window)
    )


def _check_starts(num_tokens: int, starts: Sequence[int]) -> None:
    if not starts or starts[0] != 0 or any(a >= b for a, b in zip(starts, [*starts[1:], num_tokens])):
        raise ValueError(
            f"document_starts={list(starts)[:4]} ... must ascend from 0 to less than the {num_tokens} tokens of the "
            "text, so that each document has at least its beginning-of-text token"
        )


def _plan_last_words(
    num_tokens: int, window: int, starts: Sequence[int], word_tokens: Sequence[int]
) -> tuple[Window, ...]:
    """A window for each document; each holds up to `window` tokens to feed and the label of the last one."""
    _check_starts(num_tokens, starts)
    if len(word_tokens) != len(starts):
        raise ValueError(f"word_tokens has {len(word_tokens)} counts for {len(starts)} documents; pass one for each")
    windows = []
    for index, (start, stop, count) in enumerate(zip(starts, [*starts[1:], num_tokens], word_tokens)):
        if not 1 <= count < stop - start or count > window:
            raise ValueError(
                f"document {index} has {stop - start} tokens and a last word of {count}, and window={window}; pass "
                "documents of at least two words (--data), and a window (--window) that holds a word"
            )
        windows.append(Window(max(start, stop - window - 1), stop, count))
    return tuple(windows)


def _plan_documents(num_tokens: int, window: int, starts: Sequence[int]) -> tuple[Window, ...]:
    """Windows of lm-eval; each holds up to `window` tokens to feed and the label of the last one."""
    _check_starts(num_tokens, starts)
    windows: list[Window] = []
    for start, stop in zip(starts, [*starts[1:], num_tokens]):
        num_covered = start + 1  # the beginning-of-text token is never scored
        while num_covered < stop:
            end = min(num_covered + window, stop)
            windows.append(Window(max(start, end - window - 1), end, end - num_covered))
            num_covered = end
    if not windows:
        raise ValueError(f"token_ids has {num_tokens} tokens in {len(starts)} documents, all empty; pass a longer text")
    return tuple(windows)
