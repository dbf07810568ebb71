"""The tokens of a step that has run: into histories, and who has ended."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from ..errors import InvalidScoresError
from .endings import Endings
from .execution.engine_cache import EngineCache
from .execution.step_inputs import DeviceSlotState
from .in_flight import InFlightStep
from .ranks import Alone
from .sampling.beam_search import BeamSearch, BeamStep
from .sampling.logprobs import prompt_logprobs
from .sampling.token_selector import Selection, TokenSelector, invalid_scores_error
from .scheduling.request import Request, Sequence, SequenceOutput, State
from .scheduling.scheduler import Scheduler


class Collector:
    """Takes the tokens of steps.

    Args:
        scheduler, selector, tables, cache: of the sequences.
        endings: ends requests.
        ranks: what a request's own code does, the first of them does.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        selector: TokenSelector,
        tables: DeviceSlotState,
        cache: EngineCache,
        endings: Endings,
        ranks: Alone,
    ) -> None:
        self.scheduler, self.slots, self.pages = scheduler, scheduler.slots, scheduler.pages
        self.selector, self.tables, self.cache, self.endings, self.ranks = selector, tables, cache, endings, ranks

    def collect(self, launched: InFlightStep) -> int:
        """Take the tokens of a step; requests that end are put in ``endings.finished``.

        Returns:
            How many tokens were dropped, because their sequences have left.
        """
        tokens = None if launched.tokens is None else launched.tokens.wait()
        self.ranks.check()
        now = self.endings.clock()
        for request in launched.firsts:
            request.first_token = now if request.first_token is None else request.first_token
        for sequence, start, logits in launched.prompts:
            self._guarded(sequence.request, self._take_prompt_logprobs, sequence, start, logits)
        dropped = 0
        if tokens is not None and launched.selection is not None:
            slots = launched.slots
            is_there = self.slots.generation[slots] == launched.generation
            dropped = len(slots) - int(is_there.sum())
            if len(slots) > dropped:
                self._take_tokens(slots[is_there], tokens[is_there], launched.selection)
        for sequence, logits in launched.drafted:
            self._guarded(sequence.request, self._verify, sequence, logits)
        for request, beams in launched.beams.items():
            if request.state is State.RUNNING:
                beams.sort(key=lambda entry: entry[0].index)
                self._guarded(request, self._step_beams, request, torch.cat([logits for _, logits in beams]))
        return dropped

    def _guarded(self, request: Request, function: Callable[..., None], *args: Any) -> None:
        """Whatever a request's own code raises ends that request alone."""
        try:
            function(*args)
        except BaseException as error:
            self.endings.end_request(request, "error", error)

    def _take_tokens(self, slots: np.ndarray, ids: np.ndarray, selection: Selection) -> None:
        """One token for each of ``slots``."""
        # A row that is no longer there has ended; its slot may be another's.
        errors = {slot: error for slot, error in selection.errors.items() if slot in slots} if selection.errors else {}
        for slot in slots[ids < 0].tolist():
            errors.setdefault(slot, invalid_scores_error(slot))
        if errors:
            slots, ids = self._drop_failed(slots, ids, errors)
            if not len(slots):
                return
        host = self.slots
        lengths = host.length[slots]
        host.reserve(int(lengths.max()) + 2)
        host.history[slots, lengths] = ids
        lengths = lengths + 1
        host.length[slots] = lengths
        logprobs = selection.logprobs
        if logprobs:
            for slot in slots.tolist():
                if slot in logprobs:
                    host.sequence(slot).logprobs.append(logprobs[slot])
        is_eos = (ids[:, None] == host.eos[slots]).any(1)
        ended = is_eos | (lengths >= host.max_length[slots])
        if host.watched[slots].any():
            stopped, errors = self.selector.stopped(slots[host.watched[slots]], host.history, host.length)
            if errors:
                self._end_failed(errors)
            is_eos |= np.isin(slots, list(stopped))
            ended |= is_eos
        if ended.any():
            for slot, is_stop in zip(slots[ended].tolist(), is_eos[ended].tolist()):
                ended = host.sequences[slot]
                if ended is not None:
                    self.endings.finish_sequence(ended, "stop" if is_stop else "length")

    def _end_failed(self, errors: dict[int, BaseException]) -> None:
        for slot, error in errors.items():
            sequence = self.slots.sequences[slot]
            if sequence is not None and not (isinstance(error, InvalidScoresError) and self._begins_again(sequence)):
                self.endings.end_request(sequence.request, "error", error)

    def _begins_again(self, sequence: Sequence) -> bool:
        """Let a sequence whose scores are invalid compute what others computed for it, once: NaN may have come from
        their pages. Returns whether it does."""
        request = sequence.request
        is_alone = request.rules.is_plain and len(request.sequences) == 1
        if not (request.uses_prefixes and request.cached_tokens and is_alone):
            return False
        self.pages.forget_prefix(sequence.slot)
        request.uses_prefixes, request.cached_tokens = False, 0
        self.slots.computed[sequence.slot] = 0  # Nothing of it is stored.
        self.scheduler.preempt(request, allow_swap=False)
        return True

    def _drop_failed(
        self, slots: np.ndarray, ids: np.ndarray, errors: dict[int, BaseException]
    ) -> tuple[np.ndarray, np.ndarray]:
        """End the requests of failed sequences; returns the slots that still run, and their tokens."""
        self._end_failed(errors)
        runs = np.array([self.slots.sequences[slot] is not None for slot in slots.tolist()], dtype=bool)
        return slots[runs], ids[runs]

    def _verify(self, sequence: Sequence, logits: torch.Tensor) -> None:
        """Take the tokens of a sequence that had candidates, and propose the next ones."""
        host, slot = self.slots, sequence.slot
        if slot < 0:
            return
        length, draft = int(host.length[slot]), int(host.draft[slot])
        host.draft[slot] = 0
        candidates = host.history[slot, length : length + draft].copy()
        tokens = self.selector.verify(slot, candidates, logits, host.history, length)
        host.reserve(length + len(tokens) + 1)
        host.history[slot, length : length + len(tokens)] = tokens
        length += len(tokens)
        host.length[slot] = length
        # What was rejected is behind the sequence's end: its slots are written again.
        host.computed[slot] = length - 1
        self.pages.shrink(slot, length - 1)
        self.tables.stale[slot] = host.decoding[slot] = True
        is_stop = tokens[-1] in sequence.request.rules.eos_token_ids
        if host.watched[slot]:
            stopped, errors = self.selector.stopped(np.array([slot]), host.history, host.length)
            if errors:
                raise errors[slot]
            is_stop |= slot in stopped
        if is_stop or length >= host.max_length[slot]:
            self.endings.finish_sequence(sequence, "stop" if is_stop else "length")
        elif not self.cache.has_states:
            proposed = self.selector.propose(slot, host.history, length)
            host.reserve(length + len(proposed) + 1)
            host.history[slot, length : length + len(proposed)] = proposed
            host.draft[slot] = len(proposed)

    def _step_beams(self, request: Request, logits: torch.Tensor) -> None:
        """Move the sequences of a beam search; ``logits``: ``[num_beams, vocab]``, or ``[1, vocab]`` at the start."""
        def search() -> BeamStep:
            if request.beams is None:
                request.beams = BeamSearch(request.rules, request.prompt.tolist())
            return request.beams.step(logits)

        step = self.ranks.decide(search)
        if step.is_done:
            self._finish_beams(request)
            return
        host = self.slots
        slots = [sequence.slot for sequence in request.sequences]
        parents = [slots[parent] for parent in step.parents]
        length = int(host.length[slots[0]])
        host.reserve(length + 2)
        host.history[slots, :length] = host.history[parents, :length]
        host.history[slots, length] = step.tokens
        host.length[slots] = length + 1
        self.pages.permute(slots, parents)
        if self.cache.has_states:
            self.cache.copy_states(slots, parents)
        host.shares[slots] = host.decoding[slots] = self.tables.stale[slots] = True

    def _finish_beams(self, request: Request) -> None:
        prompt = len(request.prompt)
        eos = request.rules.eos_token_ids
        sequences = []
        for beam in self.ranks.decide(lambda: request.beams.finalize()):
            at_limit = prompt + len(beam.token_ids) >= request.rules.max_length
            ended = "length" if at_limit and (not beam.token_ids or beam.token_ids[-1] not in eos) else "stop"
            tokens = np.concatenate([request.prompt, np.array(beam.token_ids, dtype=np.int64)])
            stopped_by = self.endings.stop_reason(request, tokens) if ended == "stop" else None
            sequences.append(SequenceOutput(beam.token_ids, ended, None, stopped_by, beam.score, beam.beam_indices))
        for sequence in request.sequences:
            sequence.finish_reason = sequences[0].finish_reason
            self.scheduler.finish_sequence(sequence)
        self.endings.finalize(request, tuple(sequences))

    def _take_prompt_logprobs(self, sequence: Sequence, start: int, logits: torch.Tensor) -> None:
        request = sequence.request
        if request.prompt_logprobs is None:
            request.prompt_logprobs = [None]
        known = request.prompt_logprobs
        # A prompt that is computed again has some of them already.
        skip = len(known) - 1 - start
        following = request.prompt[start + 1 + skip : start + 1 + len(logits)]
        if skip >= 0 and len(following):
            ids = torch.from_numpy(following).to(logits.device)
            count = request.rules.num_prompt_logprobs or 0
            known.extend(prompt_logprobs(logits[skip : skip + len(following)], ids, count))
