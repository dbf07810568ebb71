"""How a window's tokens get their logits: the paths through a model whose figures are compared.

`prefill`          one forward for each window, no cache;
`paged_prefill`    one forward that also goes through a `hf_paged.PagedCache`;
`padded_prefill`   as `paged_prefill`, in a left-padded batch with an attention mask;
`chunked_prefill`  a `hf_paged.PagedCache` and `chunk` tokens in each forward: all but the first read pages;
`decode`           the tokens before the first scored one in one forward, then one token in each:
                   `hf_paged.PagedCache` under "paged_flash", transformers' `DynamicCache` under any other one;
`engine`           prompt log-probabilities of `hf_paged.Engine`, all windows submitted as requests.

The prefill of a first forward attends to the new keys as they are; so a quantised cache (`kv_dtype`) is measured on
`chunked_prefill`, `decode` and `engine` only. `reads_pages` says which tokens are predicted with keys out of pages.
"""

import inspect
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from transformers import Cache, GenerationConfig, PreTrainedModel

import hf_paged
from eval.loading import with_cache

PATHS = ("prefill", "decode", "paged_prefill", "padded_prefill", "chunked_prefill", "engine")
KV_DTYPES = ("auto", "fp8", "int8")
QUANTISED_PATHS = ("chunked_prefill", "decode", "engine")
"""Paths that read what a quantised cache holds."""

PADDING = 21
"""Tokens of padding of "padded_prefill": no multiple of a page."""

# Logits turned to float32 at once: 2**26 of them are 256 MiB, a few hundred rows of a large vocabulary.
MAX_FLOAT32_LOGITS = 2**26


def reason_against(attn: str, path: str, kv_dtype: str) -> str | None:
    """Why a combination is not measured, None if it is."""
    is_paged = attn.startswith("paged_flash")
    if path == "engine" and not is_paged:
        return "the engine runs paged_flash, whatever the model has"
    if kv_dtype != "auto" and path not in QUANTISED_PATHS:
        return f"{path} is one forward, which reads no page that kv_dtype={kv_dtype!r} could quantise"
    if kv_dtype != "auto" and path == "decode" and not is_paged:
        return f"{path} with {attn} goes through no pages that kv_dtype={kv_dtype!r} could quantise"
    return None


def default_chunk(window: int) -> int:
    """Tokens in a forward of "chunked_prefill" where none are given: 64, or a quarter of the window if that is less."""
    return max(1, min(64, window // 4))


def reads_pages(num_tokens: int, num_scored: int, path: str, chunk: int) -> int:
    """How many scored tokens of a window are predicted by a query that reads keys of earlier tokens out of pages.

    Args:
        num_tokens, num_scored: of the window, see `eval.quality.windows.Window`.
        path: one of `PATHS`.
        chunk: tokens in a forward of "chunked_prefill".
    """
    if path == "engine":  # writes keys before it reads them, all of them out of pages
        return num_scored
    num_in_first = {"chunked_prefill": chunk, "decode": num_tokens - num_scored}.get(path, num_tokens)
    # Token i is predicted by the query of token i - 1, which is in the first forward if it stands before its end.
    return max(0, min(num_scored, num_tokens - 1 - num_in_first))


def scored_logits(
    model: PreTrainedModel, rows: torch.Tensor, num_scored: int, path: str, cache: Cache | None, chunk: int
) -> Iterator[torch.Tensor]:
    """Logits for the last `num_scored` tokens of each row, in order, in parts.

    The last token of a row is never fed: its logits predict nothing that is scored.

    Args:
        model: the model, in eval mode.
        rows: [batch, length] int64.
        num_scored: at most length - 1.
        path: one of `PATHS` but "engine".
        cache: an empty cache to go through; None for "prefill".
        chunk: tokens in a forward of "chunked_prefill".

    Yields:
        [batch, n, vocab_size]; the n add up to `num_scored`.

    Raises:
        ValueError: the model does not use the cache.
    """
    fed = rows[:, :-1]
    num_fed = fed.shape[1]
    if path == "padded_prefill":
        yield _padded_forward(model, fed, cache, num_scored)
        return
    if path == "decode":
        num_context = rows.shape[1] - num_scored
        steps = [(0, num_context), *((step, step + 1) for step in range(num_context, num_fed))]
    elif path == "chunked_prefill":
        steps = [(begin, min(begin + chunk, num_fed)) for begin in range(0, num_fed, chunk)]
    else:
        steps = [(0, num_fed)]
    first_needed = num_fed - num_scored
    for begin, end in steps:
        # At least one: 0 would mean all of them to transformers.
        num_logits = max(1, end - max(begin, first_needed))
        logits = _forward(model, fed[:, begin:end], cache, num_logits)
        if end > first_needed:
            yield logits


def _padded_forward(model: PreTrainedModel, fed: torch.Tensor, cache: Cache | None, num_scored: int) -> torch.Tensor:
    """Each row behind `PADDING` tokens that the mask hides; one more row, without padding, makes the batch ragged."""
    batch, length = fed.shape
    # Padding that is seen must show: the row's own tokens, not one that models are trained to ignore.
    junk = fed[:, torch.arange(PADDING, device=fed.device) % length]
    rows = torch.cat([junk, fed], dim=1)
    rows = torch.cat([rows, rows[:1]])
    mask = torch.ones_like(rows)
    mask[:batch, :PADDING] = 0
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    logits = _forward(model, rows, cache, num_scored, attention_mask=mask, position_ids=positions)
    return logits[:batch]


def _forward(
    model: PreTrainedModel, rows: torch.Tensor, cache: Cache | None, num_logits: int, **inputs: torch.Tensor
) -> torch.Tensor:
    """Logits of the last `num_logits` tokens of rows [batch, length] -> [batch, num_logits, vocab_size].

    Positions and mask, where not given, are left to the model, which takes them from the length that the cache reports.
    """
    kwargs: dict[str, Any] = {"use_cache": False, **inputs}
    if cache is not None:
        num_before = cache.get_seq_length()
        kwargs |= {"use_cache": True, **with_cache(model, cache)}
    parameters = inspect.signature(model.forward).parameters
    if "logits_to_keep" in parameters:
        kwargs["logits_to_keep"] = num_logits
    if "position_ids" not in parameters:
        kwargs.pop("position_ids", None)
    logits = model(input_ids=rows, **kwargs).logits
    # A model that ignores the cache would answer each token without its context and still give a figure.
    if cache is not None and cache.get_seq_length() != num_before + rows.shape[1]:
        raise ValueError(
            f"the {type(cache).__name__} held {num_before} tokens, was given {rows.shape[1]} and reports "
            f"{cache.get_seq_length()}: {type(model).__name__} does not use its cache; pass path='prefill'"
        )
    return logits[:, -num_logits:]


def token_nll(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """-log softmax(logits)[label], in float32 at least, a bounded number of rows at a time.

    As the logarithm of a sum, less the label's logit: torch's cross_entropy in float32 is off by 2e-5 on a CPU, the
    same way for all tokens of a large vocabulary.

    Args:
        logits: [length, vocab_size], any dtype.
        labels: [length] int64.

    Returns:
        [length], float32, or float64 for float64 logits.
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    rows_at_once = max(1, MAX_FLOAT32_LOGITS // logits.shape[-1])
    parts = []
    for rows, row_labels in zip(logits.split(rows_at_once), labels.to(logits.device).split(rows_at_once)):
        above = rows.to(dtype) - rows.amax(-1, keepdim=True)
        parts.append(above.logsumexp(-1) - above.gather(1, row_labels[:, None])[:, 0])
    return torch.cat(parts)


def engine_scores(
    engine: hf_paged.Engine, batches: Iterable[Sequence[torch.Tensor]], num_scored: Sequence[int]
) -> Iterator[list[tuple[list[float], list[int]]]]:
    """nll and most likely token of the last tokens of each row, by an engine, which serves all rows at a time.

    A row is a prompt and the one token that the engine "generates": its last, the only one allowed. So no token is fed
    but those that the other paths feed, and a row may be one token longer than the model has positions. All
    log-probabilities are of the model's own distribution, before what is allowed.

    Args:
        engine: an engine for rows as long as the longest.
        batches: rows [length] int64 of at least 2 tokens, in batches.
        num_scored: for each batch, how many tokens of its rows are scored.

    Yields:
        For each batch, for each row: (nll [num_scored], token ids [num_scored]).

    Raises:
        RequestError: the engine could not serve a row.
    """
    pending = [[_submit(engine, row.tolist()) for row in rows] for rows in batches]
    for handles, count in zip(pending, num_scored):
        scores = []
        for handle in handles:
            output = handle.result()
            if output.error is not None:
                raise output.error
            known = [*output.prompt_logprobs, *output.logprobs][-count:]
            scores.append(([-item.logprob for item in known], [item.top_ids[0] for item in known]))
        yield scores


def _submit(engine: hf_paged.Engine, tokens: list[int]) -> hf_paged.RequestHandle:
    *prompt, last = tokens
    # The end-of-text of the model's own config cannot end a request of one token.
    config = GenerationConfig(max_new_tokens=1, do_sample=False, num_beams=1)
    return engine.submit(
        prompt, generation_config=config, prompt_logprobs=1, logprobs=1,
        prefix_allowed_tokens_fn=lambda _, history: [last],
    )  # fmt: skip
