"""How many prompt tokens a step computes: pure functions of numbers and arrays.

Decode rows wait for the chunks of a mixed step. So it computes few prompt tokens, ``mixed_prompt_tokens``, as
long as few are queued, and more with the square of their number, up to the whole budget: then more sequences wait for
prompts than are slowed down by them::

    queued prompt tokens, in whole budgets     1/4    1/2    1     1.4 and more
    computed in a mixed step                   1/32   1/8    1/2   1

Where no caller waits for a first token, all ends are known (an *offline batch*) and there is room for all at once, the
last tokens of the longest request end the batch, and the others have time. A step of few tokens takes hardly less time
than one of :data:`OFFLINE_STEP_TOKENS`, since the weights are read anyway, and more tokens take time in proportion. So
all steps have about as many: the longest requests go first, rows that would end early wait while there are prompts to
compute in their place, and with the last prompts all rows decode::

    tokens     | c c c c c c c c c c c c d d |    c  chunks of prompts
    of a step  | c c c c c c c c d d d d d d |    d  rows with as many tokens to go as the batch has steps
               | c c c d d d d d d d d d d d |
    steps ->   | d d d d d d d d d d d d d d |    all end together
"""

import numpy as np

MIXED_WORK = 300_000_000_000
"""Prompt tokens times parameters of a mixed step: at two operations for each, a millisecond of an H200."""
MIXED_TOKENS = (192, 1024)
"""Fewest and most prompt tokens that follow from that: with fewer, reading the weights costs more than the tokens."""

OFFLINE_STEP_TOKENS = 256
"""Tokens of a step of an offline batch at least: fewer take hardly less time, since the weights are read anyway."""

LONG_QUEUE = 2
"""Of the queued prompt tokens a mixed step computes the part that they are of so many whole budgets."""


def mixed_prompt_tokens(option: int | str | None, num_parameters: int) -> int | None:
    """``EngineConfig.mixed_prompt_tokens`` with "auto" resolved for a model of ``num_parameters``."""
    if option != "auto":
        return option  # type: ignore[return-value]
    least, most = MIXED_TOKENS
    return min(max(least, MIXED_WORK // max(1, num_parameters)), most)


def min_graph_fill(count: int) -> int:
    """Prompt tokens that will do where ``count`` are wanted: a captured step that is somewhat smaller is better filled
    than a larger one."""
    return 3 * count // 4


def offline_step_tokens(option: int | str | None, num_parameters: int, max_batch_tokens: int) -> int | None:
    """Tokens of an offline batch's steps at least; None: its steps are like others, since ``mixed_prompt_tokens`` is
    given.

    Of small models a step's own costs are more than their weights' reading: whole budgets keep the number of steps with
    prompts low.
    """
    if option != "auto":
        return None
    is_small = MIXED_WORK // max(1, num_parameters) > MIXED_TOKENS[0]
    return max_batch_tokens if is_small else min(OFFLINE_STEP_TOKENS, max_batch_tokens)


def wanted_prompt_tokens(mixed_prompt_tokens: int, queued: int, max_batch_tokens: int) -> int:
    """Prompt tokens that a step beside decode rows should compute, while ``queued`` of them wait."""
    return max(mixed_prompt_tokens, queued * queued // (LONG_QUEUE * max_batch_tokens))


def plan_offline_step(left: np.ndarray, tokens: np.ndarray, rows: np.ndarray, steps: np.ndarray) -> tuple[int, int]:
    """A step of an offline batch that all of it has room for.

    The batch takes as many steps as the row with most tokens to go. Of these each other row can spare some, and a
    prompt is due when its rows have none to spare. Of the work that must be done by then, whichever prompt that is, a
    step takes its share.

    Args:
        left: tokens to go of each row that decodes, most first.
        tokens: that each prompt has to compute, in the order of service.
        rows: that go on from it.
        steps: that these take.

    Returns:
        How many of the first rows in ``left`` cannot wait; tokens of the step.
    """
    horizon = max(int(left.max(initial=1)), int(steps.max()))
    num_due = int((left >= horizon).sum())
    # By the time that each prompt is due, and at the end: tokens of it and those before it, and of rows that could
    # not spare all of the steps till then.
    due = np.append(horizon - steps, horizon)
    spare = horizon - np.concatenate([left, steps])
    order = np.argsort(spare)
    spare, rows = spare[order], np.concatenate([np.ones(len(left), dtype=np.int64), rows])[order]
    started = np.searchsorted(spare, due)
    num_rows, spared = (np.append(0, x.cumsum())[started] for x in (rows, rows * spare))
    work = np.append(tokens, 0).cumsum() + num_rows * due - spared
    return num_due, int(np.ceil(work / np.maximum(due, 1)).max())


def bucket_sizes(num_slots: int) -> list[int]:
    """Batch sizes of decode steps that are captured, ascending; the last one is ``num_slots``."""
    sizes = [1, 2, 4, *range(8, 257, 8), *range(272, 513, 16), *range(544, num_slots, 32)]
    return [size for size in sizes if size < num_slots] + [num_slots]
