"""From logits to tokens for every row of a step: plain rows together, rows with processors one by one."""

import dataclasses
from collections.abc import Callable

import numpy as np
import torch
from hf_paged_kernels.sampling.reference import INVALID_TOKEN, choose_tokens

from ...errors import InvalidScoresError
from ..async_copy import send
from ..ranks import ALONE, Alone
from . import prompt_lookup
from .logprobs import PendingLogprobs, TokenLogprobs
from .request_params import RequestParams
from .slot_sampling import SlotSampling
from .stopping import history_tensor, is_stopped

__all__ = ["INVALID_TOKEN", "RequestParams", "Selection", "TokenSelector", "invalid_scores_error"]


@dataclasses.dataclass(slots=True)
class Selection:
    """What a step chose.

    Attributes:
        token_ids: ``[num_rows]`` int64 on the device; :data:`INVALID_TOKEN` for a row that must end with its entry of
            ``errors``, or, where it has none, with :func:`invalid_scores_error`.
        coming_logprobs: slots whose requests asked for log-probabilities, and these.
        errors: what a row's processor raised, by slot; other rows are not affected.
    """

    token_ids: torch.Tensor
    coming_logprobs: list[tuple[list[int], PendingLogprobs]] = dataclasses.field(default_factory=list)
    errors: dict[int, BaseException] = dataclasses.field(default_factory=dict)

    @property
    def logprobs(self) -> dict[int, TokenLogprobs]:
        """Log-probabilities by slot, of those that asked for them; waits until they are there."""
        return {slot: entry for slots, coming in self.coming_logprobs for slot, entry in zip(slots, coming.wait())}


def merged(selections: list[Selection], order: torch.Tensor) -> Selection:
    """Several selections as one, whose rows are theirs in ``order``, int64 ``[num_rows]`` on the device."""
    return Selection(
        torch.cat([selection.token_ids for selection in selections])[order],
        [entry for selection in selections for entry in selection.coming_logprobs],
        {slot: error for selection in selections for slot, error in selection.errors.items()},
    )


def invalid_scores_error(slot: int) -> InvalidScoresError:
    """The error of a row for which :data:`INVALID_TOKEN` was chosen."""
    return InvalidScoresError(
        f"no token can be chosen: the scores of the row in slot {slot} have NaN, or leave no token with a probability. "
        f"The model's logits, or a logits processor of the request, made them so."
    )


@dataclasses.dataclass(frozen=True, slots=True)
class _Row:
    """What a slot runs."""

    rules: RequestParams
    row: int


class TokenSelector:
    """Chooses the next token of each row from its logits, by the rules of its request.

    A row's token depends on its own logits, history and rules only, never on the rest of the batch. What a request's
    own code does, the first rank does.
    """

    def __init__(
        self, num_slots: int, vocab_size: int, device: torch.device | str, ranks: Alone = ALONE
    ) -> None:
        self.device, self.ranks = torch.device(device), ranks
        self.vocab_size = vocab_size
        self.sampling = SlotSampling(num_slots, self.device, vocab_size)
        self.has_logprobs = np.zeros(num_slots, np.bool_)
        self._rows: dict[int, _Row] = {}
        self._verified: dict[int, bool] = {}  # slots whose criteria verify() has asked, and their answer

    def admit(self, slot: int, rules: RequestParams, row: int, tokens: np.ndarray) -> None:
        """Give a slot to a row of a request, the first time or after a preemption.

        Args:
            slot: of the row.
            rules: of its request.
            row: number of the row in the request.
            tokens: int64 ``[num_tokens]``, its history. Only penalties need it: noise is a function of the position,
                and processors are called with the history.
        """
        self._rows[slot] = _Row(rules, row)
        self.sampling.set(slot, rules, row, tokens)
        self.has_logprobs[slot] = rules.num_logprobs is not None

    def release(self, slot: int) -> None:
        """Take a slot back; its parameters stay until the next admission."""
        self._rows.pop(slot, None)
        self._verified.pop(slot, None)
        self.sampling.on_device[slot] = self.sampling.is_guided[slot] = self.has_logprobs[slot] = False

    def select(
        self,
        logits: torch.Tensor,
        slots: np.ndarray,
        history: np.ndarray,
        lengths: np.ndarray,
        coming: Callable[[], dict[int, int]] = dict,
    ) -> Selection:
        """Choose a token for each row.

        Args:
            logits: ``[num_rows, vocab]`` on the device, any float dtype, not written.
            slots: ``[num_rows]`` int, admitted.
            history: ``[num_slots, capacity]`` int64.
            lengths: ``[num_slots]`` int: index of the new token. That is the number of tokens in the history, or more
                for plain and guided rows whose last tokens are on their way.
            coming: waits for these, and gives them by slot; called for guided rows only.
        """
        slots = np.asarray(slots)
        positions = lengths[slots].astype(np.int64, copy=False)
        is_guided = self.sampling.is_guided[slots]
        is_plain = self.sampling.on_device[slots] | is_guided
        errors: dict[int, BaseException] = {}
        if is_guided.any():
            guided = slots[is_guided]
            masks, errors = self.ranks.decide(lambda: self._masks(guided, history, positions[is_guided], coming()))
            self.sampling.put_masks(guided, masks)
        if is_plain.all():
            token_ids = self.sampling.choose(logits, slots, positions)
        else:
            token_ids = torch.full((len(slots),), INVALID_TOKEN, dtype=torch.int64, device=logits.device)
            rows = np.flatnonzero(is_plain)
            if rows.size:
                index = send(rows, logits.device)
                token_ids[index] = self.sampling.choose(logits[index], slots[rows], positions[rows])
            rows = np.flatnonzero(~is_plain)
            ids, failed = self.ranks.decide(lambda: self._choose_each(rows, slots, logits, history, positions))
            token_ids[send(rows, logits.device)] = ids.to(logits.device)
            errors |= failed
        return Selection(token_ids, self._logprobs(slots, token_ids, None, lambda rows: _taken(logits, rows)), errors)

    def _choose_each(
        self, rows: np.ndarray, slots: np.ndarray, logits: torch.Tensor, history: np.ndarray, positions: np.ndarray
    ) -> tuple[torch.Tensor, dict[int, BaseException]]:
        """Tokens ``[len(rows)]`` of rows with processors of their own, and what those raised, by slot."""
        tokens, errors = [], dict[int, BaseException]()
        for i in rows.tolist():
            slot = int(slots[i])
            try:
                tokens.append(self._choose_alone(slot, logits[i : i + 1], history[slot, : positions[i]]))
            except BaseException as error:  # whatever a request's own code raises ends that request alone
                errors[slot] = self.ranks.sendable(error)
                tokens.append(torch.full((1,), INVALID_TOKEN, dtype=torch.int64, device=logits.device))
        return torch.cat(tokens), errors

    def _masks(
        self, slots: np.ndarray, history: np.ndarray, positions: np.ndarray, coming: dict[int, int]
    ) -> tuple[np.ndarray, dict[int, BaseException]]:
        """Masks of the next choice of guided rows, and what their grammars raised, by slot."""
        masks = np.zeros((len(slots), -(-self.sampling.vocab_size // 32)), dtype=np.int32)
        errors: dict[int, BaseException] = {}
        for slot, position, mask in zip(slots.tolist(), positions.tolist(), masks):
            entry = self._rows[slot]
            changes = entry.rules.changes
            assert changes is not None
            assert changes.grammar is not None
            start = changes.grammar.prompt_length
            generated = history[slot, start:position].tolist()
            if slot in coming and position > start:
                generated[-1] = coming[slot]
            try:
                entry.rules.guided(entry.row).fill(generated, mask)
            except BaseException as error:  # as of a processor
                errors[slot] = self.ranks.sendable(error)
                mask[:] = -1
        return masks, errors

    def chosen(
        self,
        slots: np.ndarray,
        token_ids: torch.Tensor,
        lse: torch.Tensor,
        logits_of: Callable[[np.ndarray], torch.Tensor],
    ) -> Selection:
        """What :meth:`select` gives for rows that need no host and whose tokens are chosen.

        Args:
            slots: ``[num_rows]`` int.
            token_ids: ``[num_rows]`` int64.
            lse: ``[num_rows]`` float64, see :meth:`SlotSampling.choose_static`.
            logits_of: gives the logits ``[n, vocab]`` of rows ``[n]``.
        """
        return Selection(token_ids, self._logprobs(slots, token_ids, lse, logits_of))

    def needs_host(self, slots: np.ndarray) -> bool:
        """Whether the next token of one of these rows is chosen with the host's help, in more than masks."""
        return not bool((self.sampling.on_device[slots] | self.sampling.is_guided[slots]).all())

    def stopped(
        self, slots: np.ndarray, history: np.ndarray, lengths: np.ndarray
    ) -> tuple[set[int], dict[int, BaseException]]:
        """Which of these rows their own stopping criteria end, called once after each token of a row.

        Args:
            slots: ``[num_rows]`` int, of requests with ``rules.has_criteria``.
            history: ``[num_slots, capacity]`` int64.
            lengths: ``[num_slots]`` int, the new token included.

        Returns:
            The slots that stop, and what a criterion raised, by slot.
        """
        return self.ranks.decide(lambda: self._asked(np.asarray(slots), history, lengths))

    def _asked(
        self, slots: np.ndarray, history: np.ndarray, lengths: np.ndarray
    ) -> tuple[set[int], dict[int, BaseException]]:
        stopped: set[int] = set()
        errors: dict[int, BaseException] = {}
        for slot in slots.tolist():
            try:
                if slot in self._verified:
                    is_last = self._verified.pop(slot)
                    stopped.update({slot} if is_last else ())
                elif is_stopped(self._rows[slot].rules, history[slot, : lengths[slot]], self.device):
                    stopped.add(slot)
            except BaseException as error:
                errors[slot] = self.ranks.sendable(error)
        return stopped, errors

    def propose(self, slot: int, history: np.ndarray, length: int) -> np.ndarray:
        """Candidates ``[k]`` int64 for an assisted row; none where its maximum length leaves no room."""
        rules = self._rows[slot].rules
        room = rules.max_length - length - 1
        if room <= 0:
            return prompt_lookup.NO_CANDIDATES
        count = min(rules.config.prompt_lookup_num_tokens, room)
        return prompt_lookup.propose(history[slot, :length], count, rules.config.max_matching_ngram_size or 2)

    def verify(
        self, slot: int, candidates: np.ndarray, logits: torch.Tensor, history: np.ndarray, length: int
    ) -> list[int]:
        """The tokens of an assisted row after a forward over its last token and the candidates.

        Args:
            slot: of the row.
            candidates: ``[k]`` int64.
            logits: ``[k + 1, vocab]``.
            history: ``[num_slots, capacity]`` int64.
            length: tokens in the history, candidates not counted.

        Returns:
            1 to k + 1 tokens, none after eos, beyond the maximum length, or after one that a criterion stops at; the
            next :meth:`stopped` of the slot gives what the criteria said, without asking them again.

        Raises:
            Exception: what a processor raised.
            InvalidScoresError: no token can be chosen.
        """
        return self.ranks.decide(lambda: self._accepted(slot, candidates, logits, history, length))

    def _accepted(
        self, slot: int, candidates: np.ndarray, logits: torch.Tensor, history: np.ndarray, length: int
    ) -> list[int]:
        rules = self._rows[slot].rules
        tokens = np.concatenate([history[slot, :length], candidates])
        if rules.plain is not None:
            positions = np.arange(length, length + len(candidates) + 1, dtype=np.int64)
            chosen = self.sampling.choose(logits, np.full(len(positions), slot), positions).tolist()
            choose = chosen.__getitem__
        else:

            def choose(index: int) -> int:
                return int(self._choose_alone(slot, logits[index : index + 1], tokens[: length + index]))

        def checked(index: int) -> int:
            token = choose(index)
            if token == INVALID_TOKEN:
                raise invalid_scores_error(slot)
            return token

        def is_last(index: int, token: int) -> bool:
            is_stop = False
            if rules.has_criteria:
                taken = np.concatenate([tokens[: length + index], [token]])
                is_stop = self._verified[slot] = is_stopped(rules, taken, self.device)
            return is_stop or token in rules.eos_token_ids or length + index + 1 >= rules.max_length

        return prompt_lookup.accept(candidates, checked, is_last)

    def _choose_alone(self, slot: int, logits: torch.Tensor, tokens: np.ndarray) -> torch.Tensor:
        """The token ``[1]`` of a row with processors of its own, from logits ``[1, vocab]``."""
        rules, row = self._rows[slot].rules, self._rows[slot].row
        ids = history_tensor(rules, tokens, logits.device)
        scores = rules.processed(row, ids, logits.to(torch.float32, copy=True))
        noise = None
        if rules.do_sample:
            noise = self.sampling.noise(np.array([slot]), np.array([len(tokens)], np.int64), scores.shape[-1])
        return choose_tokens(scores, noise)

    def _logprobs(
        self,
        slots: np.ndarray,
        token_ids: torch.Tensor,
        lse: torch.Tensor | None,
        logits_of: Callable[[np.ndarray], torch.Tensor],
    ) -> list[tuple[list[int], PendingLogprobs]]:
        wanted = np.flatnonzero(self.has_logprobs[slots])
        if not wanted.size:
            return []
        names = slots[wanted].tolist()
        counts = [self._rows[slot].rules.num_logprobs or 0 for slot in names]
        if len(wanted) < len(slots):
            index = send(wanted, token_ids.device)
            token_ids, lse = token_ids[index], None if lse is None else lse[index]
        return [(names, PendingLogprobs(logits_of(wanted), token_ids, counts, lse))]


def _taken(logits: torch.Tensor, rows: np.ndarray) -> torch.Tensor:
    """Some rows of the logits, themselves if it is all of them; ``rows`` int ``[n]``, ascending."""
    return logits if len(rows) == len(logits) else logits[send(rows, logits.device)]
