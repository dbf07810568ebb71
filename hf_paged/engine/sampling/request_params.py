"""What one request does with its logits: the whole of its GenerationConfig, resolved once, at submit."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from numbers import Integral, Real
from typing import Any, Literal

import numpy as np
import torch
from hf_paged_kernels.sampling.reference import MAX_BIASES
from transformers import (
    EosTokenCriteria,
    GenerationConfig,
    LogitsProcessorList,
    MaxLengthCriteria,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    StoppingCriteriaList,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation import GenerationMode

from ...transformers_internals import PreparedGeneration, prepare_generation, processor_of_row, special_tokens
from .count_penalties import CountPenalties
from .grammar import Grammar, GrammarProcessor, GuidedSequence, checked_grammar
from .stop_strings import StopStrings

Mode = Literal["rows", "beams", "assisted"]

SEED_LIMIT = 2**64

ALWAYS = 2**62
"""A position that no sequence reaches."""


@dataclasses.dataclass(frozen=True, slots=True)
class WarperParams:
    """Parameters of a row that needs no more than the vectorised path: the meaning of transformers' warpers.

    ``temperature`` 1, ``top_k`` 0, ``top_p`` 1 and ``min_p`` 0 change nothing.
    """

    do_sample: bool
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


@dataclasses.dataclass(frozen=True, slots=True)
class LogitAdjustments:
    """What changes a row's logits ahead of temperature and warpers, where the device does it.

    Attributes:
        biases: token, bias, and the first and last position + 1 of the new token where it is added.
        penalty: of tokens in the history, None for none.
        num_ignored: tokens at its start, padding included, that are not penalised.
        banned: tokens that are never chosen.
        presence, frequency: penalties of generated tokens; ``num_prompt`` tokens of the history are not generated.
        grammar: follows the row and gives a mask before each choice, None for none.
    """

    biases: tuple[tuple[int, float, int, int], ...] = ()
    penalty: float | None = None
    num_ignored: int = 0
    banned: tuple[int, ...] = ()
    presence: float = 0.0
    frequency: float = 0.0
    num_prompt: int = 0
    grammar: GrammarProcessor | None = None

    def is_within(self, vocab_size: int) -> bool:
        """Whether the device can do it: with a vocabulary that is known, and biases for tokens of it."""
        return vocab_size > 0 and all(token < vocab_size or end < ALWAYS for token, _, _, end in self.biases)


@dataclasses.dataclass(frozen=True, slots=True)
class RequestParams:
    """What one request does with its logits. Made by :meth:`make`, or :meth:`from_prepared` inside ``generate()``.

    Attributes:
        config: the resolved config, lengths final.
        mode: "rows" (greedy or sampled), "beams" or "assisted" (prompt lookup).
        num_sequences: sequences that run: ``num_return_sequences``, or ``num_beams``.
        max_length: the most tokens of a row, prompt included, padding not.
        eos_token_ids: tokens that end a row.
        pad_token_id: what ``generate()`` fills finished rows with, if anything.
        plain: parameters of the vectorised path, None where a processor asks for more.
        changes: what the vectorised path changes ahead of them, None for nothing.
        processors: as ``generate()`` made them, in its order.
        criteria: stopping criteria beyond ``max_length`` and eos.
        all_criteria: with those two, as ``generate()`` made them; lengths count padding.
        seed: of the first row; :meth:`seed_of_row` gives the others'.
        num_logprobs: sampled and this many best log-probabilities of each new token; None for none.
        num_prompt_logprobs: the same for the prompt's tokens.
        padding_ids: padding that processors and criteria see before the prompt, as in a padded batch.
    """

    # Its own repr fails on the tensors that generate() puts into it.
    config: GenerationConfig = dataclasses.field(repr=False)
    mode: Mode
    num_sequences: int
    max_length: int
    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None
    plain: WarperParams | None
    processors: LogitsProcessorList
    criteria: StoppingCriteriaList
    all_criteria: StoppingCriteriaList
    seed: int
    num_logprobs: int | None
    num_prompt_logprobs: int | None
    padding_ids: tuple[int, ...]
    batch_row: int
    batch_rows: int
    changes: LogitAdjustments | None = None
    _row_processors: dict[int, LogitsProcessorList] = dataclasses.field(default_factory=dict, repr=False)

    @classmethod
    def make(  # noqa: PLR0913
        cls,
        model: Any,
        generation_config: GenerationConfig | None,
        *,
        prompt_ids: Sequence[int] | torch.Tensor,
        logits_processor: Sequence[Any] | None = None,
        stopping_criteria: Sequence[Any] | None = None,
        prefix_allowed_tokens_fn: Callable[[int, torch.Tensor], list[int]] | None = None,
        seed: int | None = None,
        tokenizer: Any = None,
        logprobs: int | None = None,
        prompt_logprobs: int | None = None,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        logit_bias: Mapping[int, float] | None = None,
        grammar: Grammar | None = None,
    ) -> "RequestParams":
        """Resolve a config against the model's own exactly as ``model.generate(prompt)`` does.

        Args:
            model: a causal LM.
            generation_config: None means the model's own.
            prompt_ids: the prompt's tokens, ``[L]``, at least one.
            logits_processor, stopping_criteria: objects called with the full history of their row, ``[1, L]``, and its
                scores, ``[1, vocab]``, on the model's device.
            prefix_allowed_tokens_fn: gives the allowed next tokens from (batch index, history ``[L]``).
            seed: of the sampled tokens, 0 <= seed < 2**64; None draws one from torch's global generator.
            tokenizer: needed for ``stop_strings``.
            logprobs: report log-probabilities of new tokens and of this many best ones.
            prompt_logprobs: the same for the prompt.
            presence_penalty, frequency_penalty: of generated tokens, see :class:`CountPenalties`.
            logit_bias: added to the logits of tokens, before everything else.
            grammar: makes a matcher for each sequence, see :class:`GrammarMatcher`.

        Raises:
            ValueError, TypeError: an argument is not valid, or is not served; the message names it.
        """
        if generation_config is not None and not isinstance(generation_config, GenerationConfig):
            raise TypeError(f"generation_config is {generation_config!r}: a GenerationConfig or None is accepted.")
        prompt = _checked_prompt(model, prompt_ids)
        processors = _checked_callables("logits_processor", logits_processor)
        criteria = _checked_callables("stopping_criteria", stopping_criteria)
        if prefix_allowed_tokens_fn is not None and not callable(prefix_allowed_tokens_fn):
            raise TypeError(
                f"prefix_allowed_tokens_fn is {prefix_allowed_tokens_fn!r}: a callable or None is accepted."
            )

        biases = _checked_biases(logit_bias, num_logits_of(model))
        own: list[Any] = []
        penalties = (
            _checked_penalty("presence_penalty", presence_penalty),
            _checked_penalty("frequency_penalty", frequency_penalty),
        )
        if any(penalties):
            own.append(CountPenalties(*penalties, prompt.shape[1]))
        if grammar is not None:
            own.append(GrammarProcessor(checked_grammar(grammar), prompt.shape[1]))

        def prepared(prompt: torch.Tensor) -> PreparedGeneration:
            made = prepare_generation(
                model,
                generation_config,
                prompt,
                logits_processor=own + processors,
                stopping_criteria=criteria,
                prefix_allowed_tokens_fn=prefix_allowed_tokens_fn,
                tokenizer=tokenizer,
                stop_criterion=StopStrings,
            )
            if biases:
                made.processors.insert(0, SequenceBiasLogitsProcessor(biases))
            return made

        if not (processors or criteria or prefix_allowed_tokens_fn):
            # Copies to the device would wait for the steps that are queued there; most requests need none.
            rules = cls.from_prepared(prepared(prompt), seed=seed, logprobs=logprobs, prompt_logprobs=prompt_logprobs)
            needs_objects = not rules.is_plain or rules.has_criteria
            if model.device.type == "cpu" or not needs_objects:
                return rules
            seed = rules.seed
        return cls.from_prepared(
            prepared(prompt.to(model.device)), seed=seed, logprobs=logprobs, prompt_logprobs=prompt_logprobs
        )

    @classmethod
    def from_prepared(
        cls,
        prepared: PreparedGeneration,
        *,
        seed: int | None = None,
        logprobs: int | None = None,
        prompt_logprobs: int | None = None,
        padding_ids: Sequence[int] = (),
        batch_row: int = 0,
        batch_rows: int = 1,
    ) -> "RequestParams":
        """Rules of one row of a batch that ``generate()`` has prepared.

        Args:
            prepared: the config, processors and criteria of the batch.
            seed, logprobs, prompt_logprobs: as in :meth:`make`.
            padding_ids: the padding at the left of the row.
            batch_row: which row of the batch, before rows are repeated for beams and samples.
            batch_rows: rows of that batch.

        Raises:
            ValueError: as :meth:`make`.
        """
        config = prepared.config
        for name in ("num_beams", "num_return_sequences"):
            _check_at_least_one(name, getattr(config, name))
        if config.prompt_lookup_num_tokens is not None:
            _check_at_least_one("prompt_lookup_num_tokens", config.prompt_lookup_num_tokens)
        reason = unserved_reason(config)
        if reason is not None:
            raise ValueError(f"generation_config: {reason}")
        mode = mode_of(config)
        if logprobs is not None and mode != "rows":
            raise ValueError(
                f"logprobs={logprobs!r} is reported for greedy and sampled requests only, not for {mode}: leave it out."
            )
        do_sample = bool(config.do_sample)
        eos_token_ids, pad_token_id = special_tokens(config)
        max_length = prepared.criteria.max_length
        if mode != "rows" and any(type(processor) is GrammarProcessor for processor in prepared.processors):
            raise ValueError(f"grammar: greedy and sampled requests are served with one, not {mode}: leave it out.")
        changes, warpers = _logit_changes(prepared.processors, len(padding_ids))
        if mode != "rows" or (changes is not None and _plain_sampling(warpers, do_sample) is None):
            changes, warpers = None, prepared.processors
        by_type = [c for c in prepared.criteria if type(c) is EosTokenCriteria]
        return cls(
            config=config,
            mode=mode,
            num_sequences=config.num_beams if mode == "beams" else config.num_return_sequences,
            max_length=(config.max_length if max_length is None else max_length) - len(padding_ids),
            eos_token_ids=tuple(int(token) for c in by_type for token in c.eos_token_id),
            pad_token_id=pad_token_id if pad_token_id is not None or not eos_token_ids else eos_token_ids[0],
            plain=_plain_sampling(warpers, do_sample) if mode != "beams" else None,
            changes=changes,
            processors=prepared.processors,
            criteria=StoppingCriteriaList(
                c for c in prepared.criteria if type(c) not in (EosTokenCriteria, MaxLengthCriteria)
            ),
            all_criteria=prepared.criteria,
            seed=_seed_of(seed, do_sample),
            num_logprobs=_checked_count("logprobs", logprobs),
            num_prompt_logprobs=_checked_count("prompt_logprobs", prompt_logprobs),
            padding_ids=tuple(padding_ids),
            batch_row=batch_row,
            batch_rows=batch_rows,
        )

    @property
    def do_sample(self) -> bool:
        """Whether tokens are drawn."""
        return bool(self.config.do_sample)

    @property
    def is_plain(self) -> bool:
        """Whether the vectorised path serves its rows."""
        return self.plain is not None and self.mode == "rows"

    @property
    def has_criteria(self) -> bool:
        """Whether anything but eos and the maximum length can end a row."""
        return len(self.criteria) > 0

    @property
    def ends_by_length(self) -> bool:
        """Whether nothing but the maximum length can end a row."""
        return not self.eos_token_ids and not self.has_criteria

    @property
    def num_beams(self) -> int:
        """Beams; 1 for every other mode."""
        return self.config.num_beams if self.mode == "beams" else 1

    @property
    def num_return_sequences(self) -> int:
        """Sequences that the caller gets."""
        return self.config.num_return_sequences

    def seed_of_row(self, row: int) -> int:
        """The rows of a request draw independently of each other."""
        return derived_seed(self.seed, row)

    def processors_of_row(self, row: int) -> LogitsProcessorList:
        """The processors of one row, to be called with ``[1, L]``; the same objects at every call.

        For beams, those of the whole request (``row`` 0), to be called with ``[num_beams, L]``.
        """
        if row not in self._row_processors:
            repeated_row = self.batch_row * self.num_sequences + row
            self._row_processors[row] = LogitsProcessorList(
                p.of_row()
                if isinstance(p, GrammarProcessor)
                else processor_of_row(p, self.batch_row, self.batch_rows, len(self.padding_ids), repeated_row)
                for p in self.processors
            )
        return self._row_processors[row]

    def guided(self, row: int) -> GuidedSequence:
        """What follows a row of a request with a grammar; the same object at every call."""
        return next(p.sequence for p in self.processors_of_row(row) if isinstance(p, GrammarProcessor))

    def processed(self, row: int, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """``scores`` ``[n, vocab]`` as the processors of a row (see :meth:`processors_of_row`) change them.

        Raises:
            ValueError: they gave back another shape: an index into it may be no token at all.
        """
        shape = list(scores.shape)
        changed = self.processors_of_row(row)(ids, scores)
        got = list(changed.shape) if isinstance(changed, torch.Tensor) else changed
        if got != shape:
            raise ValueError(
                f"logits processors gave scores of shape {got}, those of the model's {shape[-1]} logits are accepted, "
                f"{shape}: a processor that pads or cuts the vocabulary must give back as many as it was given."
            )
        return changed


MODES: dict[GenerationMode, Mode] = {
    GenerationMode.GREEDY_SEARCH: "rows",
    GenerationMode.SAMPLE: "rows",
    GenerationMode.BEAM_SEARCH: "beams",
    GenerationMode.BEAM_SAMPLE: "beams",
    GenerationMode.ASSISTED_GENERATION: "assisted",
}


def mode_of(config: GenerationConfig) -> Mode:
    """How the engine runs a config that it serves (:func:`unserved_reason` is None)."""
    return MODES[config.get_generation_mode()]


def unserved_reason(config: GenerationConfig) -> str | None:
    """Why the engine does not run a resolved config; None if it does."""
    mode = config.get_generation_mode()
    if mode not in MODES:
        return f"{mode.value.replace('_', ' ')} is not served by the engine; only the original generate() runs it."
    if mode == GenerationMode.ASSISTED_GENERATION and config.prompt_lookup_num_tokens is None:
        return "assisted generation is served with prompt_lookup_num_tokens only, not with an assistant model."
    for name in ("token_healing", "output_attentions", "output_hidden_states", "low_memory", "is_assistant"):
        if getattr(config, name, None):
            return f"{name}={getattr(config, name)!r} is not served by the engine; leave it out."
    if config.guidance_scale not in (None, 1, 1.0):
        return f"guidance_scale={config.guidance_scale!r} needs a second forward a token, which the engine has not."
    if config.cache_implementation in ("quantized", "paged"):
        return (
            f"cache_implementation={config.cache_implementation!r} is not served by the engine, which has its own "
            f'pages; quantised ones are EngineConfig(kv_dtype="fp8" or "int8").'
        )
    return None


TOKENS = (
    "eos_token_id", "pad_token_id", "forced_bos_token_id", "forced_eos_token_id", "suppress_tokens",
    "begin_suppress_tokens", "sequence_bias", "bad_words_ids",
)  # fmt: skip
"""Options whose values have token ids in them."""
INDEXING = ("forced_bos_token_id", "forced_eos_token_id")
"""Those that transformers indexes scores with, unchecked."""
MAY_BE_NEGATIVE = ("eos_token_id", "pad_token_id")
"""-1 is a usual way to say that there is none."""


def check_token_ids(config: GenerationConfig, num_logits: int, names: Sequence[str] = TOKENS) -> None:
    """Refuse token ids that a config names and the model's logits do not have: on a GPU, an index outside of them ends
    every later call of the process.

    Args:
        config: resolved.
        num_logits: of :func:`num_logits_of`.
        names: options to look at.

    Raises:
        ValueError: it names the option, the id and what is accepted.
    """
    for name in names if num_logits else ():
        for token in _integers(getattr(config, name, None), is_bias=name == "sequence_bias"):
            if token >= num_logits or (token < 0 and name not in MAY_BE_NEGATIVE):
                raise ValueError(
                    f"generation_config: {name} has token {token}, and the model has {num_logits} logits: ids from 0 "
                    f"to {num_logits - 1} are accepted."
                )


def _integers(value: Any, is_bias: bool = False) -> Iterator[int]:
    """The token ids in an option: a number, a tensor, lists of lists; keys of a dict, or a list of (ids, bias)."""
    if value is None:
        return
    if is_bias:
        value = list(value) if isinstance(value, dict) else [entry[0] for entry in value]
    if isinstance(value, (torch.Tensor, np.ndarray)):
        value = value.tolist()
    if isinstance(value, (list, tuple, set, frozenset)):
        for item in value:
            yield from _integers(item)
    elif isinstance(value, Integral):
        yield int(value)


def num_logits_of(model: Any) -> int:
    """Logits of a token: the vocabulary's, or as many as the head gives where that is more; 0: not known."""
    vocab_size = getattr(model.config.get_text_config(decoder=True), "vocab_size", None) or 0
    return max(vocab_size, getattr(model.get_output_embeddings(), "out_features", None) or 0)


def derived_seed(seed: int, index: int) -> int:
    """The seed of the ``index``-th member of a family; the first has the family's own seed.

    One step of SplitMix64 (Steele, Lea, Flood 2014) on integers below 2**64.
    """
    if index == 0:
        return seed
    z = (seed + index * 0x9E3779B97F4A7C15) % SEED_LIMIT
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % SEED_LIMIT
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % SEED_LIMIT
    return z ^ (z >> 31)


def _logit_changes(processors: Sequence[Any], padding: int) -> tuple[LogitAdjustments | None, Sequence[Any]]:
    """What the first processors change, as far as the device can do it (None: nothing), and the others.

    Biases come first, as ``generate()`` has them. Suppressed tokens stay so whatever comes before or after.
    """
    biases: list[tuple[int, float, int, int]] = []
    penalty, num_ignored, banned = None, 0, []
    counted, grammar = None, None
    count = 0
    for processor in processors:
        kind = type(processor)
        if counted is not None and kind not in (CountPenalties, GrammarProcessor):
            break  # What is lowered by counts is lowered last.
        if kind is SequenceBiasLogitsProcessor and penalty is None:
            if any(len(ids) > 1 for ids in processor.sequence_bias):
                break
            biases += [(ids[0], bias, 0, ALWAYS) for ids, bias in processor.sequence_bias.items()]
        elif kind is RepetitionPenaltyLogitsProcessor and penalty is None:
            penalty, given = processor.penalty, processor.prompt_ignore_length
            num_ignored = padding if isinstance(given, torch.Tensor) else given or 0
        elif kind is NoBadWordsLogitsProcessor:
            if any(len(ids) > 1 for ids in processor.sequence_bias):
                break
            banned += [ids[0] for ids in processor.sequence_bias]
        elif kind is SuppressTokensLogitsProcessor:
            banned += processor.suppress_tokens.tolist()
        elif kind is SuppressTokensAtBeginLogitsProcessor:
            start = processor.begin_index - padding
            biases += [(token, -math.inf, start, start + 1) for token in processor.begin_suppress_tokens.tolist()]
        elif kind in (MinLengthLogitsProcessor, MinNewTokensLengthLogitsProcessor):
            is_total = kind is MinLengthLogitsProcessor
            end = processor.min_length if is_total else processor.prompt_length_to_skip + processor.min_new_tokens
            biases += [(token, -math.inf, 0, end - padding) for token in processor.eos_token_id.tolist()]
        elif kind is CountPenalties and counted is None:
            counted = processor
        elif kind is GrammarProcessor and grammar is None:
            grammar = processor
        else:
            break
        count += 1
    if not count or len(biases) > MAX_BIASES:
        return None, processors
    changes = LogitAdjustments(tuple(biases), penalty, num_ignored, tuple(banned), grammar=grammar)
    if counted is not None:
        changes = dataclasses.replace(
            changes, presence=counted.presence, frequency=counted.frequency, num_prompt=counted.prompt_length
        )
    return changes, processors[count:]


def _plain_sampling(processors: Sequence[Any], do_sample: bool) -> WarperParams | None:
    """The parameters of a list of processors that is nothing but the four plain warpers, each once, in order."""
    order = (TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper, MinPLogitsWarper)
    kinds = [type(processor) for processor in processors]
    if kinds != [kind for kind in order if kind in kinds] or (kinds and not do_sample):
        return None
    values: dict[str, Any] = {}
    for kind, name, processor in (
        (kind, name, processor)
        for processor in processors
        for kind, name in zip(order, ("temperature", "top_k", "top_p", "min_p"))
        if type(processor) is kind
    ):
        is_stock = getattr(processor, "filter_value", -math.inf) == -math.inf
        if not is_stock or (kind is not TopKLogitsWarper and getattr(processor, "min_tokens_to_keep", 1) != 1):
            return None
        values[name] = getattr(processor, name)
    return WarperParams(do_sample=do_sample, **values)


def _checked_prompt(model: Any, prompt_ids: Any) -> torch.Tensor:
    """The prompt, int64 ``[1, L]`` on the host.

    Raises:
        ValueError: it is empty, not one sequence, or has an id outside the vocabulary.
    """
    embeddings = model.get_input_embeddings()
    vocab_size = getattr(embeddings, "num_embeddings", None) or model.config.get_text_config().vocab_size
    tokens: Any
    if isinstance(prompt_ids, np.ndarray) and prompt_ids.ndim == 1 and prompt_ids.dtype == np.int64:
        tokens = prompt_ids
        is_within = not len(tokens) or (tokens.min() >= 0 and tokens.max() < vocab_size)
    else:
        tokens = prompt_ids.tolist() if hasattr(prompt_ids, "tolist") else list(prompt_ids)
        if not all(issubclass(kind, int) for kind in set(map(type, tokens))):
            raise ValueError(
                f"prompt_ids is one sequence of token ids [L]; got {type(prompt_ids).__name__} {tokens[:3]}."
            )
        is_within = not tokens or (min(tokens) >= 0 and max(tokens) < vocab_size)
    if not len(tokens):
        raise ValueError("prompt_ids is empty: at least one token is needed (the model's bos_token_id, for example).")
    if not is_within:
        bad = next(token for token in tokens if not 0 <= token < vocab_size)
        raise ValueError(f"prompt_ids has {bad}: ids from 0 to {vocab_size - 1} are accepted.")
    return torch.tensor(tokens, dtype=torch.int64)[None]


def _checked_callables(name: str, objects: Sequence[Any] | None) -> list[Any]:
    """Raises TypeError: not a list of callables."""
    if objects is None:
        return []
    if callable(objects) and not isinstance(objects, (list, tuple)):
        raise TypeError(f"{name} is {objects!r}: a list of callables is accepted, [{name}] for one.")
    for item in objects:
        if not callable(item):
            raise TypeError(f"{name} has {item!r}: callables are accepted.")
    return list(objects)


def _checked_penalty(name: str, penalty: Any) -> float:
    """Raises ValueError: not a finite number."""
    if isinstance(penalty, bool) or not isinstance(penalty, Real) or not math.isfinite(penalty):
        raise ValueError(f"{name} is {penalty!r}: a finite number is accepted, 0 for none.")
    return float(penalty)


def _checked_biases(logit_bias: Any, num_logits: int) -> dict[tuple[int, ...], float]:
    """Raises ValueError: not numbers by tokens of the model."""
    if logit_bias is None:
        return {}
    if not isinstance(logit_bias, Mapping):
        raise ValueError(f"logit_bias is {logit_bias!r}: a dict of token ids and numbers is accepted.")
    biases: dict[tuple[int, ...], float] = {}
    for token, bias in logit_bias.items():
        is_token = isinstance(token, Integral) and not isinstance(token, bool)
        if not is_token or not 0 <= int(token) < (num_logits or SEED_LIMIT):
            raise ValueError(f"logit_bias has token {token!r}: ids from 0 to {num_logits - 1} are accepted.")
        if isinstance(bias, bool) or not isinstance(bias, Real) or not math.isfinite(bias):
            raise ValueError(f"logit_bias has {bias!r} for token {token}: a finite number is accepted.")
        biases[(int(token),)] = float(bias)
    return biases


def _seed_of(seed: int | None, do_sample: bool) -> int:
    if seed is None:
        # Drawn only where it is used: a greedy request leaves torch's global generator alone.
        return int(torch.randint(0, 2**63 - 1, ())) if do_sample else 0
    return checked_seed(seed)


def checked_seed(seed: Any) -> int:
    """Raises ValueError: not an integer from 0 to 2**64 - 1."""
    if isinstance(seed, bool) or not isinstance(seed, Integral) or not 0 <= int(seed) < SEED_LIMIT:
        raise ValueError(f"seed is {seed!r}: an integer from 0 to 2**64 - 1, or None, is accepted.")
    return int(seed)


def _check_at_least_one(name: str, count: Any) -> None:
    """Raises ValueError: not a number of at least 1."""
    if isinstance(count, bool) or not isinstance(count, Integral) or count < 1:
        raise ValueError(f"generation_config: {name} is {count!r}: an integer of at least 1 is accepted.")


def _checked_count(name: str, count: int | None) -> int | None:
    """Raises ValueError: not a count."""
    if count is None:
        return None
    if isinstance(count, bool) or not isinstance(count, Integral) or count < 0:
        raise ValueError(f"{name} is {count!r}: a number of tokens from 0, or None, is accepted.")
    return int(count)
