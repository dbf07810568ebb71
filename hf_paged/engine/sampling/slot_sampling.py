"""The vectorised path: greedy and plainly sampled rows of a batch, chosen together, whatever their parameters are."""

import numpy as np
import torch
from hf_paged_kernels.sampling.ops import sample_tokens_op
from hf_paged_kernels.sampling.reference import (
    COUNTS_AT,
    MASK_AT,
    MASK_IS_SPENT,
    MOST_COUNTED,
    WITH_COUNTS,
    WITH_MASK,
    choose_tokens,
    gumbel_noise,
    rules_places,
    slot_rules,
)

from ..async_copy import send
from .request_params import RequestParams, WarperParams

NEUTRAL: dict[str, float] = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 0, "logprobs": 0}
INTEGERS = ("top_k", "seed", "logprobs")
"""Parameters of a slot, in the order of the op's arguments, and the values of a greedy row. Each takes eight bytes:
float64, in which 1 - top_p rounds as it does in transformers, or int64."""

SMALLEST_TEMPERATURE = 1e-45
"""The smallest that is not zero as float32."""


class SlotSampling:
    """Sampling parameters of every slot, on the host and on the device, and the choice of tokens from them.

    A row's token depends on its logits, its parameters, its seed and its position only.

    Attributes:
        on_device: bool ``[num_slots]`` on the host: slots whose next token is chosen by what is here alone.
        is_guided: bool ``[num_slots]`` on the host: slots that need a mask before each choice, see :meth:`put_masks`,
            and nothing else.
        has_rules: bool ``[num_slots]`` on the host: slots with penalties, biases, masks or suppressed tokens.
        rules: int64 ``[num_slots + 1, words]`` on the device, rows of :func:`slot_rules` with masks and counts.

    Args:
        num_slots: slots; one more, that of no row, is greedy.
        device: where tokens are chosen.
        vocab_size: of the logits; 0: not known, rows with penalties and the like need the host.
    """

    def __init__(self, num_slots: int, device: torch.device, vocab_size: int = 0) -> None:
        self.device, self.vocab_size = device, vocab_size
        self.has_rules = np.zeros(num_slots, dtype=bool)
        self.rules = self._empty_rules(num_slots)
        self._new_rules: dict[int, np.ndarray] = {}
        self._new_counts: dict[int, np.ndarray] = {}
        self._kinds = np.zeros(num_slots, dtype=np.int64)
        self.is_guided = np.zeros(num_slots, dtype=bool)
        self.on_device = np.zeros(num_slots, dtype=bool)
        self._make_tables(num_slots)
        self._token_ids = torch.empty(0, dtype=torch.int32, device=device)

    def _make_tables(self, num_slots: int) -> None:
        self._num_slots = num_slots
        # An even number of columns: every table starts at a multiple of 16 bytes, whatever the number of slots is.
        self._words = np.zeros((len(NEUTRAL), (num_slots + 2) // 2 * 2), dtype=np.int64)
        for name, neutral in NEUTRAL.items():
            self._column(name)[:] = neutral
        # On a CPU the host's tables are the device's.
        self._device_words = torch.from_numpy(self._words).to(self.device, copy=self.device.type != "cpu")
        self._is_stale = False

    def set(self, slot: int, rules: RequestParams, row: int, tokens: np.ndarray) -> None:
        """Take over the parameters of a row; a row with processors of its own has only a seed here.

        Args:
            slot: of the row.
            rules: of its request.
            row: number of the row in the request.
            tokens: int64 ``[num_tokens]``, prompt and what it has generated so far.
        """
        sampling = rules.plain or WarperParams(do_sample=rules.do_sample)
        for name in ("top_k", "top_p", "min_p"):
            self._column(name)[slot] = getattr(sampling, name)
        self._column("temperature")[slot] = (
            max(sampling.temperature, SMALLEST_TEMPERATURE) if sampling.do_sample else 0.0
        )
        seed = rules.seed_of_row(row)
        self._column("seed")[slot] = seed - 2**64 if seed >= 2**63 else seed
        self.on_device[slot] = rules.is_plain
        self._set_rules(slot, rules, tokens)
        self._column("logprobs")[slot] = rules.num_logprobs is not None
        self._is_stale = self.device.type != "cpu"

    def sync(self) -> None:
        """Send what :meth:`set` has changed, in the order of the stream."""
        for slot, words in self._new_rules.items():
            self.rules[slot, : len(words)] = send(words, self.device)
        self._new_rules.clear()
        for slot, generated in self._new_counts.items():
            counts = self.rules[slot, rules_places(self.vocab_size)[1] :].zero_().view(torch.int16)
            ids, times = np.unique(generated, return_counts=True)
            if len(ids):
                times = np.minimum(times, MOST_COUNTED).astype(np.int16)
                counts[send(ids, self.device)] = send(times, self.device)
        self._new_counts.clear()
        if self._is_stale:
            self._device_words.copy_(send(self._words, self.device))
            self._is_stale = False

    def choose(self, logits: torch.Tensor, slots: np.ndarray, positions: np.ndarray) -> torch.Tensor:
        """The next token of each row.

        Args:
            logits: ``[num_rows, vocab]``, any float dtype, not written.
            slots: ``[num_rows]`` int; a slot may occur more than once, at different positions.
            positions: ``[num_rows]`` int64, index of the new token in its sequence.

        Returns:
            ``[num_rows]`` int64; ``INVALID_TOKEN`` where no token can be chosen.
        """
        if not self._column("temperature")[slots].any() and not self._any_rules(slots):
            # One launch in the place of several, where no graph hides what they cost the host.
            return choose_tokens(logits)
        self.sync()
        index = send(slots.astype(np.int64, copy=False), self.device)
        return self.choose_static(logits.to(self.device), index, send(positions, self.device))[0]

    def choose_static(
        self,
        logits: torch.Tensor,
        slots: torch.Tensor,
        positions: torch.Tensor,
        last_token: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """:meth:`choose` with slots and positions on the device, by what :meth:`sync` has sent.

        With ``last_token``, int64 by slot, tokens are noted there and ``positions`` are by slot too.

        Returns:
            The tokens, and float64 ``[num_rows]``: the log-sum-exp of the logits of rows that report log-probabilities.
        """
        self._grow(logits.shape[-1])
        tables = (
            words if name in INTEGERS else words.view(torch.float64) for name, words in zip(NEUTRAL, self._device_words)
        )
        return sample_tokens_op(logits, slots, positions, *tables, self.rules, last_token)

    def put_masks(self, slots: np.ndarray, masks: np.ndarray) -> None:
        """Give guided slots the mask of their next choice, in the order of the stream.

        Args:
            slots: int64 ``[n]``.
            masks: int32 ``[n, ceil(vocab / 32)]``, see :meth:`GrammarMatcher.fill_bitmask`.
        """
        self.sync()
        start = 2 * rules_places(self.vocab_size)[0]
        index = send(slots, self.device)
        self.rules.view(torch.int32)[index, start : start + masks.shape[1]] = send(masks, self.device)
        self.rules[index, 0] = send(self._kinds[slots] ^ (WITH_MASK | MASK_IS_SPENT), self.device)

    def noise(self, slots: np.ndarray, positions: np.ndarray, vocab_size: int) -> torch.Tensor:
        """Gumbel noise ``[num_rows, vocab]`` of rows at their positions."""
        seeds = send(self._column("seed")[slots], self.device)
        return gumbel_noise(seeds, send(positions, self.device), self.token_ids(vocab_size))

    def token_ids(self, vocab_size: int) -> torch.Tensor:
        """0 to ``vocab_size - 1`` as int32 on the device."""
        if len(self._token_ids) < vocab_size:
            self._token_ids = torch.arange(vocab_size, dtype=torch.int32, device=self.device)
        return self._token_ids[:vocab_size]

    def _any_rules(self, slots: np.ndarray) -> bool:
        """The slot behind the last one has none."""
        return bool(self.has_rules[slots[slots < self._num_slots]].any())

    def _set_rules(self, slot: int, rules: RequestParams, tokens: np.ndarray) -> None:
        changes = rules.changes
        if changes is not None and not changes.is_within(self.vocab_size):
            # Its processors say what is wrong.
            changes, self.on_device[slot] = None, False
        self.is_guided[slot] = changes is not None and changes.grammar is not None
        if self.is_guided[slot]:
            self.on_device[slot] = False
        if changes is not None:
            self._new_rules[slot] = slot_rules(
                self.vocab_size,
                biases=changes.biases,
                penalty=changes.penalty,
                seen=np.concatenate([rules.padding_ids, tokens])[changes.num_ignored :].astype(np.int64),
                banned=changes.banned,
                presence=changes.presence,
                frequency=changes.frequency,
                has_mask=changes.grammar is not None,
            )
            self._kinds[slot] = self._new_rules[slot][0]
            if self._kinds[slot] & WITH_COUNTS:
                self._new_counts[slot] = tokens[changes.num_prompt :].astype(np.int64)
        elif self.has_rules[slot]:
            self._new_rules[slot] = slot_rules(0)[:1]
        self.has_rules[slot] = changes is not None

    def _empty_rules(self, num_slots: int) -> torch.Tensor:
        width = rules_places(self.vocab_size)[2]
        return torch.zeros(num_slots + 1, width, dtype=torch.int64, device=self.device)

    def _grow(self, vocab_size: int) -> None:
        """Have marks for so many tokens: a model's graphs are all captured with the same number."""
        if vocab_size > self.vocab_size:
            before, old = rules_places(self.vocab_size), self.rules
            self.vocab_size = vocab_size
            self.rules, now = self._empty_rules(len(old) - 1), rules_places(vocab_size)
            # Marks, masks and counts of the tokens that were known.
            for start, end, place in zip((0, *before), before, (0, *now)):
                self.rules[:, place : place + end - start] = old[:, start:end]
            self.rules[:, MASK_AT], self.rules[:, COUNTS_AT] = now[0], now[1]

    def _column(self, name: str) -> np.ndarray:
        """A parameter of every slot, on the host."""
        words = self._words[list(NEUTRAL).index(name)]
        return words if name in INTEGERS else words.view(np.float64)
