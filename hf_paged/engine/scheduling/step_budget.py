"""How many tokens the next step computes, from what runs and what waits."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .pacing import min_graph_fill, plan_offline_step, wanted_prompt_tokens
from .queue import RequestQueue
from .request import Request, Sequence
from .slot_pages import SlotPages
from .slots import Slots


@dataclass(slots=True)
class StepLimits:
    """What bounds a step.

    Attributes:
        max_batch_tokens: tokens of a step at most.
        mixed_prompt_tokens: prompt tokens of a step beside decode rows while few are queued; None: the whole budget.
        offline_step_tokens: tokens of a step at least where there are only requests of offline batches; None: such
            steps are like others.
        whole_prompts: a prompt is computed in one step (models whose states cannot go on from a chunk).
        tokens_to_fill_graph: called with a number of decode rows, of prompt tokens, and of tokens of a step: prompt
            tokens that fill a captured step of at least so many; None: there is none.
    """

    max_batch_tokens: int
    mixed_prompt_tokens: int | None = None
    offline_step_tokens: int | None = None
    whole_prompts: bool = False
    tokens_to_fill_graph: Callable[[int, int, int], int | None] = lambda num_decode, count, least: None


class StepBudget:
    """Chooses the tokens of a step.

    Args:
        slots, pages: of the sequences.
        limits: of a step.
        waiting, running, prefilling: the scheduler's requests, and sequences whose prompts are being computed.
    """

    def __init__(
        self,
        slots: Slots,
        pages: SlotPages,
        limits: StepLimits,
        waiting: RequestQueue,
        running: dict[Request, None],
        prefilling: list[Sequence],
    ) -> None:
        self.slots, self.pages, self.limits = slots, pages, limits
        self.waiting, self.running, self.prefilling = waiting, running, prefilling

    def prompt_tokens(self, decode: np.ndarray, is_blocked: bool) -> int:
        """Prompt tokens that a step computes beside the decode rows in slots ``decode``.

        Args:
            is_blocked: no waiting request finds a slot or pages.
        """
        if self.limits.mixed_prompt_tokens is None or self.limits.whole_prompts:
            return self.limits.max_batch_tokens
        if not len(decode) or (
            self.limits.offline_step_tokens == self.limits.max_batch_tokens and self._has_only_offline()
        ):
            return self.limits.max_batch_tokens
        queued = sum(self.slots.target(one) - int(self.slots.computed[one.slot]) for one in self.prefilling)
        if not is_blocked and self.waiting:
            # Those that find a slot, at their mean length; what prefixes will save is not known yet.
            queued += self.waiting.num_tokens * min(len(self.waiting), self.slots.num_free) // len(self.waiting)
        count = wanted_prompt_tokens(self.limits.mixed_prompt_tokens, queued, self.limits.max_batch_tokens)
        return self.limits.tokens_to_fill_graph(len(decode), min_graph_fill(count), 0) or count

    def has_room_for_all(self) -> bool:
        """Whether there are prompts to compute, all of offline batches, and slots and pages for all of them."""
        if self.limits.offline_step_tokens in (None, self.limits.max_batch_tokens) or self.limits.whole_prompts:
            return False
        if not (self.prefilling or self.waiting) or not self._has_only_offline():
            return False
        free, waiting = self.slots.num_free, list(self.waiting)
        if len(waiting) > free or sum(len(request.live) for request in waiting) > free:
            return False
        pages = np.array([request.most_pages for request in [*self.running, *waiting]]).sum(axis=0)
        return all(count <= table.allocator.num_pages for count, table in zip(pages, self.pages.tables))

    def plan_offline_step(self, decode: np.ndarray) -> tuple[np.ndarray, int, int]:
        """A step of an offline batch that all of it has room for, see :func:`.pacing.plan_offline_step`.

        Args:
            decode: slots of sequences that may decode.

        Returns:
            The same slots, those with most tokens to go first; how many of them cannot wait; tokens of the step.
        """
        slots, least = self.slots, self.limits.offline_step_tokens
        assert least is not None, "the model's offline batches have steps like others"
        left = slots.max_length[decode] - 1 - slots.computed[decode]
        order = np.argsort(-left, kind="stable")
        num_due, rate = plan_offline_step(left[order], *self._queue())
        prompt_tokens = self.limits.tokens_to_fill_graph(num_due, rate - num_due, least) or max(
            rate - num_due, least - num_due, 1
        )
        return decode[order], num_due, min(num_due + prompt_tokens, self.limits.max_batch_tokens)

    def _has_only_offline(self) -> bool:
        """Whether every request that runs or waits is one of an offline batch."""
        return not self.waiting.num_online and all(request.is_offline for request in self.running)

    def _queue(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of prompts, in the order of service: tokens to compute, sequences that go on from it, and their steps."""
        slots, queue = self.slots, []
        for sequence in sorted(self.prefilling, key=lambda sequence: sequence.request.key):
            request, target = sequence.request, self.slots.target(sequence)
            count = 1 if request.forked else len(request.live)
            queue.append((target - int(slots.computed[sequence.slot]), count, request.rules.max_length - 1 - target))
        for request in self.waiting.ordered():
            known = [len(sequence.tokens) for sequence in request.live]
            count = sum(known) if request.forked else known[0]
            queue.append((count, len(known), request.rules.max_length - 1 - max(known)))
        tokens, sequences, steps = np.array(queue).T
        return tokens, sequences, steps
