"""The decoding loop of ``generate()`` over the engine: a padded batch becomes requests, their tokens a padded batch.

``generate()`` of transformers prepares everything (config, masks, processors, criteria, repeated rows) and calls this
instead of its own loop, so what a call means is decided there. ::

    [pad pad  a   b ]      request 0: a b          [pad pad  a   b   x   y ]
    [ c   d   e   f ]  ->  request 1: c d e f  ->  [ c   d   e   f   z  pad]

Each prompt is a request of its own, with as many rows as it has samples or beams. Processors and criteria see a row as
it is in the batch, its padding first.
"""

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import (
    EosTokenCriteria,
    GenerationConfig,
    LogitsProcessorList,
    MaxLengthCriteria,
    MaxTimeCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.generation import GenerateBeamDecoderOnlyOutput, GenerateDecoderOnlyOutput
from transformers.utils import logging

from ..cache.step_plan import padding_behind
from ..engine.sampling.request_params import RequestParams, checked_seed, derived_seed, mode_of
from ..engine.sampling.stop_strings import StopStrings
from ..engine.scheduling.request import RequestOutput
from ..errors import OutOfPagesError, RequestError
from ..transformers_internals import PreparedGeneration, given_cache, own_decoding_loop, shortest_window, special_tokens
from .fallback_reasons import LOOP_KEYWORDS, is_row_wise, reason_in_config

logger = logging.get_logger(__name__)

_salts = itertools.count()


def refuse_seed(seed: int | None, reason: str) -> None:
    """Raises ValueError: a call has a ``seed`` and does not run in the engine; transformers would ignore it."""
    if seed is not None:
        raise ValueError(
            f"seed={seed!r} is for calls that the engine runs, and this one it does not: {reason}. Use "
            f"torch.manual_seed."
        )


def log_original(reason: str) -> None:
    """Say, once for each reason, that the engine does not run a call."""
    logger.warning_once(f"transformers' own generate() runs this call, not the engine of hf_paged: {reason}.")


@dataclasses.dataclass(frozen=True, slots=True)
class Batch:
    """What ``generate()`` hands to its loop.

    Attributes:
        input_ids: ``[num_prompts * expand, L]`` int64, rows of a prompt next to each other.
        expand: rows of a prompt: beams, or samples.
        prompts: tokens of each prompt, without padding.
        paddings: what is masked in it.
        config, processors, criteria: prepared.
        seed: of the first prompt; None: drawn.
    """

    input_ids: torch.Tensor
    expand: int
    prompts: list[list[int]]
    paddings: list[list[int]]
    config: GenerationConfig
    processors: LogitsProcessorList
    criteria: StoppingCriteriaList
    seed: int | None

    @property
    def has_eos(self) -> bool:
        """Whether finished rows are filled with padding; without an eos, ``generate()`` lets them run on."""
        return any(hasattr(criterion, "eos_token_id") for criterion in self.criteria)

    @property
    def pad_token_id(self) -> int:
        """What finished rows are filled with; 0 where no row is shorter than another."""
        pad = special_tokens(self.config)[1]
        return 0 if pad is None else pad


def run_loop(
    submitter: Callable[[], Any],
    model: Any,
    input_ids: torch.Tensor,
    *,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    seed: int | None = None,
    streamer: Any = None,
    **model_kwargs: Any,
) -> Any:
    """Generate with the engine what ``generate()`` prepared, or with transformers' own loop where the engine cannot.

    Args:
        submitter: context manager of an engine that may be submitted to, entered only when it is needed.
        model: the model.
        input_ids: ``[num_prompts * expand, L]`` int64.
        logits_processor, stopping_criteria, generation_config, model_kwargs: as ``generate()`` prepared them.
        seed: of the first prompt.
        streamer: gets the tokens of all rows after each step; it has had the prompts.

    Returns:
        ``[num_sequences, L + new]`` int64 or a ``ModelOutput``, as ``generate()`` returns.

    Raises:
        ValueError: ``seed`` is no seed, or the engine cannot run the call that has it.
    """
    options = dict(
        logits_processor=logits_processor, stopping_criteria=stopping_criteria, generation_config=generation_config
    )

    if seed is not None:
        seed = checked_seed(seed)

    def run_original(reason: str) -> Any:
        refuse_seed(seed, reason)
        log_original(reason)
        loop = own_decoding_loop(model, generation_config)
        extra = {} if streamer is None else {"streamer": streamer}
        return loop(model, input_ids, **options, **extra, **model_kwargs)

    reason = _reason_in_prepared(generation_config, model_kwargs, streamer)
    if reason is not None:
        return run_original(reason)
    prompts = _split_prompts(model, generation_config, input_ids, model_kwargs)
    if isinstance(prompts, str):
        return run_original(prompts)
    expand = max(generation_config.num_beams, generation_config.num_return_sequences)
    batch = Batch(input_ids, expand, *prompts, generation_config, logits_processor, stopping_criteria, seed)
    reason = _reason_in_batch(batch, streamer)
    if reason is not None:
        return run_original(reason)
    in_step = streamer is not None or bool(_criteria_of_the_batch(batch))
    handles: list[Any] = []
    refusal = None
    with contextlib.ExitStack() as stack:
        try:
            engine = stack.enter_context(submitter())
            stack.callback(_cancel, handles)
            _submit(engine, batch, in_step, handles)
        except (ValueError, RequestError, OutOfPagesError) as error:
            refusal = str(error).rstrip(".")
        else:
            if in_step:
                return _in_step(engine, batch, handles, streamer)
            return _together(batch, [handle.result() for handle in handles])
    return run_original(refusal)


# Reasons


def _reason_in_prepared(config: GenerationConfig, model_kwargs: dict[str, Any], streamer: Any) -> str | None:
    unserved = sorted(name for name, value in model_kwargs.items() if value is not None and name not in LOOP_KEYWORDS)
    if unserved:
        return f"{', '.join(unserved)} is given"
    name, cache = given_cache(model_kwargs)
    if cache is not None and cache.get_seq_length() > 0:
        return f"{name} is given"
    return reason_in_config(config, streamer is not None)


def _split_prompts(
    model: Any, config: GenerationConfig, input_ids: torch.Tensor, model_kwargs: dict[str, Any]
) -> tuple[list[list[int]], list[list[int]]] | str:
    """Prompts and paddings, or why the batch is not one of padded prompts."""
    expand = max(config.num_beams, config.num_return_sequences)
    ids = input_ids[::expand].cpu()
    mask = model_kwargs.get("attention_mask")
    if mask is None:
        shown = torch.ones_like(ids, dtype=torch.bool)
    elif mask.shape != input_ids.shape or not bool(((mask == 0) | (mask == 1)).all()):
        return f"attention_mask {list(mask.shape)} is not one of zeros and ones for each token"
    else:
        shown = mask[::expand].cpu() == 1
    if not bool(shown.any(dim=1).all()):
        return "a prompt is empty"
    is_gap = ~shown & (shown.cumsum(1) > 0) & ~padding_behind(shown, shown.any(1))
    window = shortest_window(model.config.get_text_config(decoder=True))
    if window is not None and bool(is_gap.any()) and max(config.max_length, ids.shape[1]) > window:
        return "attention_mask has padding between tokens, and the model's sliding windows or states count its columns"
    positions = model_kwargs.get("position_ids")
    if positions is not None:
        expected = shown.long().cumsum(-1) - 1
        given = positions.cpu().expand(len(input_ids), -1)[::expand] if positions.ndim == 2 else None
        if given is None or given.shape != ids.shape or not torch.equal(given[shown], expected[shown]):
            return "position_ids are not those of the attention mask"
    return (
        [row[is_shown].tolist() for row, is_shown in zip(ids, shown)],
        [row[~is_shown].tolist() for row, is_shown in zip(ids, shown)],
    )


def _reason_in_batch(batch: Batch, streamer: Any) -> str | None:
    if len(batch.prompts) > 1 or (batch.expand > 1 and mode_of(batch.config) != "beams"):
        for processor in batch.processors:
            if not is_row_wise(processor):
                return (
                    f"{type(processor).__name__} may depend on the rows of the batch; set row_wise = True on a logits "
                    f"processor that may be called with one row at a time"
                )
    if _criteria_of_the_batch(batch) and batch.expand > 1:
        names = ", ".join(type(criterion).__name__ for criterion in _criteria_of_the_batch(batch))
        return f"stopping criteria ({names}) that see all beams or samples of a batch in step"
    return None


def _criteria_of_the_batch(batch: Batch) -> list[Any]:
    """Criteria that must see all rows after each step, as in ``generate()``; a single row's are asked by the engine."""
    if len(batch.prompts) == 1 and (batch.expand == 1 or mode_of(batch.config) == "beams"):
        return []
    own: tuple[type, ...] = (MaxLengthCriteria, EosTokenCriteria)
    if batch.has_eos or mode_of(batch.config) == "beams":
        # Each of these ends a row by itself, and the row is filled with padding.
        own = (*own, StopStringCriteria, StopStrings, MaxTimeCriteria)
    return [criterion for criterion in batch.criteria if type(criterion) not in own]


# Running


def _submit(engine: Any, batch: Batch, in_step: bool, handles: list[Any]) -> None:
    """Submit every prompt; ``handles`` has those that were accepted, also when one is refused."""
    criteria = batch.criteria
    if in_step:
        criteria = StoppingCriteriaList(c for c in criteria if type(c) in (MaxLengthCriteria, EosTokenCriteria))
    prepared = PreparedGeneration(batch.config, batch.processors, criteria)
    salt = ("generate", next(_salts))
    seed = batch.seed
    asked = []
    for index, (prompt, padding) in enumerate(zip(batch.prompts, batch.paddings)):
        rules = RequestParams.from_prepared(
            prepared,
            seed=None if seed is None else derived_seed(seed, index),
            padding_ids=padding,
            batch_row=index,
            batch_rows=len(batch.prompts),
        )
        if seed is None:
            # One draw for the call, whatever the number of its prompts.
            seed = rules.seed
        # A salt for each call: weights and adapters may have changed since the last one, unseen.
        asked.append((prompt, dict(rules=rules, cache_salt=salt)))
        if not engine.ranks.is_joint:
            handles.append(engine.submit(prompt, rules=rules, cache_salt=salt))
    if engine.ranks.is_joint:
        handles += engine.submit_together(lambda: [engine.prepare(prompt, **options) for prompt, options in asked])


def _cancel(handles: list[Any]) -> None:
    for handle in handles:
        if not handle.is_done:
            handle.cancel()


def _together(batch: Batch, outputs: list[RequestOutput]) -> Any:
    """The padded batch of requests that have all ended."""
    for output in outputs:
        if output.error is not None:
            raise output.error
    sequences = [sequence for output in outputs for sequence in output.sequences]
    is_beams = mode_of(batch.config) == "beams"
    length = batch.input_ids.shape[1]
    longest = max(len(sequence.token_ids) for sequence in sequences)
    fill = _beam_fill(batch) if is_beams else batch.pad_token_id
    result = torch.full((len(sequences), length + longest), fill, dtype=torch.int64)
    # Beams: num_return_sequences of the num_beams rows are returned; samples: all.
    per_prompt = batch.config.num_return_sequences
    result[:, :length] = batch.input_ids[:: batch.expand].cpu().repeat_interleave(per_prompt, 0)
    for row, sequence in zip(result, sequences):
        row[length : length + len(sequence.token_ids)] = torch.tensor(sequence.token_ids)
    result = result.to(batch.input_ids.device)
    if not batch.config.return_dict_in_generate:
        return result
    if not is_beams:
        return _model_output(GenerateDecoderOnlyOutput, sequences=result)
    beam_indices = torch.full((len(sequences), longest), -1, dtype=torch.int32)
    for i, sequence in enumerate(sequences):
        offset = i // per_prompt * batch.config.num_beams
        indices = torch.tensor(sequence.beam_indices, dtype=torch.int32) + offset
        beam_indices[i, : len(indices)] = indices
    return _model_output(GenerateBeamDecoderOnlyOutput, sequences=result, beam_indices=beam_indices.to(result.device))


def _model_output(kind: type, **fields: Any) -> Any:
    logger.warning_once(
        "generate() with return_dict_in_generate gives no cache (past_key_values) when the engine of hf_paged runs "
        "it: keys and values stay in the engine's pages."
    )
    return kind(**fields)


def _beam_fill(batch: Batch) -> int:
    """What ``generate()`` fills shorter beams with: its expression takes a pad token of 0 for none."""
    eos, pad = special_tokens(batch.config)
    return (pad or eos[0]) if eos else -1


def _in_step(engine: Any, batch: Batch, handles: list[Any], streamer: Any) -> Any:
    """Follow all rows step by step, as ``generate()`` runs them, and ask the criteria with the whole batch.

    Rows of the engine may be ahead of the slowest one; what they have beyond the last common step is dropped.
    """
    ids = batch.input_ids
    streams: list[Iterator[int]] = [iter(handle) for handle in handles]
    unfinished = torch.ones(len(streams), dtype=torch.bool, device=ids.device)
    while bool(unfinished.any()):
        runs = unfinished.tolist() if batch.has_eos else [True] * len(streams)
        column = [next(stream) if is_running else batch.pad_token_id for stream, is_running in zip(streams, runs)]
        tokens = torch.tensor(column, dtype=torch.int64, device=ids.device)
        ids = torch.cat([ids, tokens[:, None]], dim=1)
        is_done = engine.ranks.decide_call(functools.partial(batch.criteria, ids, None))
        unfinished = unfinished & ~is_done.to(ids.device)
        if streamer is not None:
            streamer.put(tokens.cpu())
        if batch.has_eos:
            _cancel([handle for handle, is_running in zip(handles, unfinished.tolist()) if not is_running])
    if streamer is not None:
        streamer.end()
    return _model_output(GenerateDecoderOnlyOutput, sequences=ids) if batch.config.return_dict_in_generate else ids
