"""Every place where the package uses what transformers does not promise to keep. Nothing else may.

Importing hf_paged looks up every name; where a transformers version has moved one, it fails with a message that names
the version, and so does the name's test. Read in the sources of 5.17.0, 5.23.0 and 5.24.0.
"""

import contextlib
import copy
import dataclasses
import functools
import inspect
import itertools
import operator
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
import transformers
from packaging.version import Version
from transformers import (
    Cache,
    DynamicCache,
    EncoderDecoderCache,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    PreTrainedConfig,
    PreTrainedModel,
    StoppingCriteriaList,
    StopStringCriteria,
    SynthIDTextWatermarkLogitsProcessor,
)
from transformers.generation import (
    EncoderNoRepeatNGramLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,
    GenerationMode,
    PrefixConstrainedLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
)

from transformers import cache_utils, masking_utils, modeling_flash_attention_utils  # isort: skip
from transformers.utils import logging, output_capturing

from .errors import UnsupportedModelError

logger = logging.get_logger(__name__)

NAMES = ("paged_flash", "paged_flash_2")
"""The attention implementation, and an alias that opens transformers' block-table decode path in ``generate_batch``:
it is taken only for names that match ``.*flash.*[23]``."""

PACKED_PREFIX = "paged|"
"""``generate_batch`` of transformers before 5.23 looks an attention function up under this prefix."""

TESTED = ("5.17", "5.24")
"""The oldest and the newest minor version of transformers that the test suite was run on."""

CACHE_NAMES = ("cache", "past_key_values", "cache_params")
"""What forwards and ``generate()`` call the cache: "cache" from transformers 5.24 on, which deprecates the others."""


def strip_prefix(name: object) -> str:
    """An implementation's name without the prefix of older continuous batching."""
    return str(name).removeprefix(PACKED_PREFIX)


def uses_paged_flash(config: Any) -> bool:
    """Whether the model of ``config`` runs attention through this package at the moment."""
    return strip_prefix(getattr(config, "_attn_implementation", None)) in NAMES


def require_attr(owner: Any, name: str) -> Any:
    """``getattr`` with an error that says what to do when transformers has moved the name."""
    try:
        return inspect.getattr_static(owner, name)
    except AttributeError:
        where = getattr(owner, "__name__", repr(owner))
        raise ImportError(
            f"hf_paged rests on {where}.{name}, which transformers {transformers.__version__} does not have. "
            f"hf_paged is tested with transformers {TESTED[0]} to {TESTED[1]}: install one of these, or a newer "
            f"hf_paged."
        ) from None


def written_arguments(operator: Any, args: tuple[Any, ...]) -> list[Any]:
    """The arguments that a PyTorch operator changes in place."""
    aliases = [parameter.alias_info for parameter in operator._schema.arguments]
    return [given for alias, given in zip(aliases, args) if alias is not None and alias.is_write]


def abort_communication(process_group: torch.distributed.ProcessGroup) -> None:
    """End what waits in a group's communication on GPUs.

    Raises:
        RuntimeError: the backend cannot.
    """
    process_group._get_backend(torch.device("cuda")).abort()


def is_tested_version() -> bool:
    """Whether transformers is not newer than what the test suite was run on."""
    return Version(transformers.__version__).release[:2] <= Version(TESTED[1]).release


def cache_name(forward: Callable) -> str:
    """What a forward calls its cache argument; where its signature does not say, what ``generate()`` calls it."""
    signatures = (inspect.signature(f).parameters for f in (forward, GenerationMixin.prepare_inputs_for_generation))
    return next(name for parameters in signatures for name in CACHE_NAMES if name in parameters)


def given_cache(kwargs: dict[str, Any]) -> tuple[str | None, Any]:
    """The cache among keyword arguments, with its name; (None, None): there is none."""
    return next(((name, kwargs[name]) for name in CACHE_NAMES if kwargs.get(name) is not None), (None, None))


NEEDED: dict[Any, tuple[str, ...]] = {
    modeling_flash_attention_utils: ("_lazy_imports", "lazy_import_flash_attention"),
    masking_utils: (
        "causal_mask_function", "bidirectional_mask_function", "sliding_window_overlay",
        "sliding_window_bidirectional_overlay", "chunked_overlay", "and_masks", "packed_sequence_mask_function",
    ),
    PreTrainedModel: ("_check_and_adjust_attn_implementation", "_can_set_attn_implementation", "_supports_flash_attn"),
    PreTrainedConfig: ("_attn_implementation",),
    EncoderDecoderCache: ("check_dynamic_cache",),
    GenerationMixin: (
        "_prepare_cache_for_generation", "_prepare_generation_config", "_validate_generation_mode",
        "_prepare_special_tokens", "_prepare_generated_length", "_validate_generated_length", "_get_logits_processor",
        "_get_stopping_criteria", "_sample", "_beam_search", "_assisted_decoding",
    ),
    output_capturing: ("_active_collector",),
    torch.Tensor: ("_version",),
    torch.nn.Module: ("_compiled_call_impl",),
    torch._C: ("_AutoDispatchBelowAutograd",),
    torch.ops.aten.add_.Tensor: ("_schema",),
    torch.distributed.ProcessGroup: ("_get_backend",),
}  # fmt: skip
"""Every name that is used somewhere below, looked up at import."""


def install(
    flash_functions: Callable[[], tuple[Callable, Callable, Callable, Callable, Callable]],
    make_cache: Callable[[Any], Any],
    cache_class: type[Cache],
) -> None:
    """Wrap the functions of transformers that an attention name containing "flash", or our cache, meets. Idempotent.

    Args:
        flash_functions: returns our (dense, varlen, with-kvcache, pad, unpad) functions.
        make_cache: makes the default cache of ``generate()`` from a config, or returns None to keep transformers'.
        cache_class: what can stand for a DynamicCache inside an EncoderDecoderCache.
    """
    for owner, names in NEEDED.items():
        for name in names:
            require_attr(owner, name)
    if not is_tested_version():
        logger.warning_once(
            f"hf_paged is tested with transformers {TESTED[0]} to {TESTED[1]}, and this is {transformers.__version__}. "
            f"It has every name that hf_paged needs, and an Engine compares its forward with the model's own at start."
        )
    _wrap(modeling_flash_attention_utils, "_lazy_imports", functools.partial(_lazy_imports, flash_functions))
    _wrap(PreTrainedModel, "_check_and_adjust_attn_implementation", _check_and_adjust)
    _wrap(GenerationMixin, "_prepare_cache_for_generation", functools.partial(_prepare_cache, make_cache))
    for loop in ("_sample", "_beam_search", "_assisted_decoding"):
        _wrap(GenerationMixin, loop, _decode)
    for factory in MASK_FACTORIES:
        _note_arguments(factory)
    _wrap(EncoderDecoderCache, "check_dynamic_cache", functools.partial(_check_dynamic_cache, cache_class))
    _let_threads_choose(PreTrainedConfig)


def _wrap(owner: Any, name: str, wrapper: Callable) -> None:
    original = require_attr(owner, name)
    if getattr(original, "_hf_paged", False):
        return

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return wrapper(original, *args, **kwargs)

    wrapped._hf_paged = True  # type: ignore[attr-defined]
    setattr(owner, name, wrapped)


def _lazy_imports(functions: Callable, original: Callable, implementation: str | None, *args: Any, **kw: Any) -> Any:
    """Any attention name with "flash" in it is looked up here; an unknown one would go to the hub for a kernel."""
    if strip_prefix(implementation) in NAMES:
        return functions()
    return original(implementation, *args, **kw)


def _check_and_adjust(
    original: Callable, model: PreTrainedModel, attn_implementation: str | None, *args: Any, **kwargs: Any
) -> str:
    """Accept our names as they are: models that list compatible flash kernels would reroute them to the hub.

    Refuses models whose attention never reaches the attention interface, which would run their own code unnoticed, and
    models that do not support flash attention. Towers for images and sound that do not are left as they are.
    """
    if strip_prefix(attn_implementation) not in NAMES:
        return original(model, attn_implementation, *args, **kwargs)
    if not type(model)._can_set_attn_implementation():
        raise UnsupportedModelError(
            f"{type(model).__name__} computes attention in its own code, not through transformers' attention "
            f'interface, so "{attn_implementation}" cannot take its place: load it with attn_implementation="eager".'
        )
    if not supports_flash(type(model)):
        if model.main_input_name != "input_ids":
            logger.warning_once(
                f"{type(model).__name__} takes {model.main_input_name}, not text, and does not support flash "
                f"attention: it keeps transformers' default, while the text model has {attn_implementation}."
            )
            return original(model, None, *args, **kwargs)
        # Such models read or extend the dense mask in their own code, which gets none from a flash implementation.
        raise UnsupportedModelError(
            f"{type(model).__name__} does not support flash attention in transformers {transformers.__version__} and "
            f'would compute something else under "{attn_implementation}": load it with attn_implementation="eager" or '
            f'"sdpa".'
        )
    modeling_flash_attention_utils.lazy_import_flash_attention(attn_implementation)
    return str(attn_implementation)


def _prepare_cache(
    make_cache: Callable, original: Callable, model: Any, generation_config: Any, model_kwargs: dict[str, Any],
    *args: Any, **kwargs: Any,
) -> Any:  # fmt: skip
    """Put a PagedCache where ``generate()`` has just made a DynamicCache for a model on "paged_flash"."""
    _, given = given_cache(model_kwargs)
    result = _prepared(make_cache, original, given, model, generation_config, model_kwargs, *args, **kwargs)
    _, cache = given_cache(model_kwargs)
    cache = getattr(cache, "self_attention_cache", cache)
    if hasattr(cache, "expect_repeats"):
        # Beams and samples are repeated rows, which generate() makes before the first forward.
        cache.expect_repeats(max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1))
        mask = model_kwargs.get("attention_mask")
        if generation_config.is_assistant and cache.get_seq_length() and getattr(mask, "ndim", 0) == 2:
            model_kwargs["attention_mask"] = cache.tokens_so_far(mask)
    return result


def _prepared(
    make_cache: Callable, original: Callable, given: Any, model: Any, generation_config: Any,
    model_kwargs: dict[str, Any], *args: Any, **kwargs: Any,
) -> Any:  # fmt: skip
    result = original(model, generation_config, model_kwargs, *args, **kwargs)
    name, made = given_cache(model_kwargs)
    decoder_config = model.config.get_text_config(decoder=True)
    if name is None or made is given or not uses_paged_flash(decoder_config):
        return result
    is_pair = type(made) is EncoderDecoderCache
    if not _is_plain(made.self_attention_cache if is_pair else made):
        return result
    paged = make_cache(decoder_config)
    if paged is None:
        return result
    if generation_config.is_assistant:
        paged.activate_past_recording()
    if is_pair:
        made.self_attention_cache = paged
    else:
        model_kwargs[name] = paged
    return result


def _decode(original: Callable, model: Any, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """A decoding loop of transformers, which counts padding behind tokens as columns; our windows count tokens."""
    mask, generation_config = kwargs.get("attention_mask"), kwargs.get("generation_config")
    config = model.config.get_text_config(decoder=True)
    window = None if model.config.is_encoder_decoder or not uses_paged_flash(config) else shortest_window(config)
    if window is not None and isinstance(mask, torch.Tensor) and mask.ndim == 2 and generation_config is not None:
        num_padded = int((mask[:, -1] == 0).sum())
        if num_padded and max(generation_config.max_length, mask.shape[1]) > window:
            raise ValueError(
                f"attention_mask hides the last column of {num_padded} of {len(mask)} rows, and {type(model).__name__} "
                f"has layers that see {window} columns: pad on the left (tokenizer.padding_side = 'left'). If you gave "
                f"no mask, generate() made one that hides every pad_token_id in input_ids: pass "
                f"attention_mask=torch.ones_like(input_ids)."
            )
    return original(model, input_ids, *args, **kwargs)


def shortest_window(config: Any) -> int | None:
    """Columns that the layers with the shortest sliding window see; 0 where layers keep states, None: all see all."""
    layer_types = getattr(config, "layer_types", None) or []
    if any("linear" in kind or kind == "conv" for kind in layer_types):
        return 0
    window = getattr(config, "sliding_window", None) or getattr(config, "attention_chunk_size", None)
    has_windows = any("full" not in kind for kind in layer_types) if layer_types else True
    return window if has_windows else None


def _check_dynamic_cache(cache_class: type[Cache], original: Callable, cache: EncoderDecoderCache, method: str) -> None:
    """Encoder-decoder caches crop, repeat and select only DynamicCaches, by their class; ours does the same."""
    parts = (cache.self_attention_cache, cache.cross_attention_cache)
    if not all(isinstance(part, (DynamicCache, cache_class)) for part in parts):
        original(cache, method)


def _is_plain(cache: Any) -> bool:
    """A DynamicCache without options, which is what generate() makes when nothing else was asked for."""
    return type(cache) is DynamicCache and not cache.offloading


def is_dummy_layer(layer: Any) -> bool:
    """Whether a cache layer holds nothing (transformers 5.23 has such layers, 5.17 leaves them out)."""
    dummy = getattr(cache_utils, "DummyLayer", None)
    return dummy is not None and isinstance(layer, dummy)


# Masks


def is_plain_mask(mask_function: Callable) -> bool:
    """Whether a mask function is one that ``is_causal`` and ``sliding_window`` express: causal, sliding, bidirectional.

    transformers composes masks from functions; the two plain parts are module functions, and a window is the function
    that ``sliding_window_overlay`` makes.
    """
    plain = (masking_utils.causal_mask_function, masking_utils.bidirectional_mask_function)
    overlays = (
        masking_utils.sliding_window_overlay, masking_utils.sliding_window_bidirectional_overlay,
        masking_utils.chunked_overlay,
    )  # fmt: skip
    windows = {overlay.__name__ + ".<locals>.inner_mask" for overlay in overlays}
    if mask_function in plain:
        return True
    # A chunk is plain only because transformers refuses flash implementations beyond one chunk.
    parts = _made_from("and_masks", mask_function)
    return len(parts) > 0 and all(part in plain or getattr(part, "__qualname__", None) in windows for part in parts)


def is_causal_mask(mask_function: Callable) -> bool:
    """Whether a plain mask (:func:`is_plain_mask`) is causal."""
    return masking_utils.causal_mask_function in (_made_from("and_masks", mask_function) or (mask_function,))


def packed_segments(mask_function: Callable) -> torch.Tensor | None:
    """Segment index of each token ``[B, L]`` when a mask function is a plain mask inside packed sequences."""
    parts = _made_from("and_masks", mask_function)
    if len(parts) != 2:
        return None
    # 5.23 puts the segments first and counts positions within each (the plain mask is inside); 5.17 puts them last.
    for packed, other in (parts, parts[::-1]):
        segments = _made_from("packed_sequence_mask_function", packed)
        inner = _made_from("remap_positions_for_packed_sequence", other)
        if segments and is_plain_mask(inner[0] if inner else other):
            return segments[0]
    return None


MASK_FACTORIES = ("and_masks", "packed_sequence_mask_function", "remap_positions_for_packed_sequence")
"""What makes the mask functions that are looked into; 5.17 does not have the last one."""


def _note_arguments(name: str) -> None:
    """Let a factory of mask functions write on each of them what it was made from.

    It is in the function's closure as well, but that cannot be read while a model is compiled.
    """
    original = getattr(masking_utils, name, None)
    if original is None or getattr(original, "_hf_paged", False):
        return

    @functools.wraps(original)
    def factory(*args: Any, **kwargs: Any) -> Callable:
        made = original(*args, **kwargs)
        made.made_by, made.made_from = name, (*args, *kwargs.values())
        return made

    factory._hf_paged = True  # type: ignore[attr-defined]
    setattr(masking_utils, name, factory)


def _made_from(factory: str, mask_function: Callable) -> tuple[Any, ...]:
    """The arguments of the factory that made a mask function; (): another one made it."""
    return mask_function.made_from if getattr(mask_function, "made_by", None) == factory else ()  # type: ignore


# What a model's caller asked for


def collects_attentions() -> bool:
    """Whether the model that runs collects attention matrices for its output (``output_attentions``).

    Some layers keep the argument to themselves, so attention does not see it.
    """
    collector = output_capturing._active_collector
    if torch.compiler.is_compiling() and not collector.compiling:
        return False  # The context variable of a caller that is not compiled itself cannot be traced.
    return any(name.endswith("attentions") for name in collector.get() or ())


# transformers' own continuous batching: up to 5.23 its cache arrives as a keyword argument of the attention function,
# which updates it; from 5.24 on the model's layers update it, and attention gets what that left in the keywords.


def is_batching_cache(cache: Any) -> bool:
    """Whether ``cache`` is that of transformers' continuous batching, which is no :class:`Cache`."""
    return cache is not None and not isinstance(cache, Cache)


def batching_update(
    cache: Any, module: Any, key: torch.Tensor, value: torch.Tensor, kwargs: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Let transformers' batching cache place new keys and values, and complete ``kwargs`` in place.

    After it, ``kwargs`` has ``cu_seq_lens_k`` and ``max_length_k`` of this layer, and for a block-table step
    ``block_table`` ``[num_seqs, max_blocks]``, ``k_cache`` and ``v_cache`` ``[num_blocks, block_size, heads, dim]``,
    into which the caller writes the new keys and values itself. Otherwise the result is all keys and values, gathered
    by transformers, ``[1, H, T, D]``.

    Args:
        cache: None from transformers 5.24 on: the module has updated it.
    """
    if cache is None:
        return key, value
    if "kwargs" in inspect.signature(cache.update).parameters:
        return cache.update(key_states=key, value_states=value, layer_idx=module.layer_idx, kwargs=kwargs)
    # 5.17 and 5.18: one argument per index, and no help with the block table.
    for old, new in (("max_seqlen_q", "max_length_q"), ("max_seqlen_k", "max_length_k")):
        if old in kwargs:
            kwargs[new] = kwargs.pop(old)
    layer_type = "sliding_attention" if getattr(module, "sliding_window", False) else "full_attention"
    for name in ("cu_seq_lens_k", "max_length_k"):
        if isinstance(kwargs[name], dict):
            kwargs[name] = kwargs[name][layer_type]
    if kwargs.get("block_table") is None:
        key, value = cache.update(
            key_states=key, value_states=value, layer_idx=module.layer_idx,
            read_index=kwargs["read_index"], write_index=kwargs["write_index"],
        )  # fmt: skip
        return key.transpose(0, 1).unsqueeze(0), value.transpose(0, 1).unsqueeze(0)
    if hasattr(cache, "get_cache_for_block_table"):  # 5.18
        group, kwargs["k_cache"], kwargs["v_cache"] = cache.get_cache_for_block_table(module.layer_idx)
    else:
        group, layer = instance_attr(cache, "layer_index_to_group_indices")[module.layer_idx]
        shape = (-1, cache.block_size, cache.num_key_value_heads, cache.head_dim)
        kwargs["k_cache"] = instance_attr(cache, "key_cache")[layer].view(shape)
        kwargs["v_cache"] = instance_attr(cache, "value_cache")[layer].view(shape)
    kwargs["block_table"] = kwargs["block_table"][group]
    return key, value


def default_store() -> Any:
    """The store by which processes of torch.distributed find each other: torch has no public name for it."""
    return torch.distributed.distributed_c10d._get_default_store()


def instance_attr(obj: Any, name: str) -> Any:
    """An instance attribute that transformers does not promise to keep."""
    if not hasattr(obj, name):
        require_attr(obj, name)
    return getattr(obj, name)


def tensor_version(tensor: torch.Tensor) -> int:
    """A number that changes with every change in place (PyTorch's name for it is as private); 0 for a tensor born in
    inference mode, which has none."""
    return 0 if tensor.is_inference() else tensor._version


def tensor_versions(tensors: Iterable[torch.Tensor]) -> list[int]:
    """:func:`tensor_version` of many tensors, none of them born in inference mode."""
    return list(map(operator.attrgetter("_version"), tensors))


def without_autograd() -> AbstractContextManager:
    """A context in which PyTorch's dispatcher passes autograd by, which it otherwise asks for every operation: 62
    captures of Llama-3-8B on an H200 took 5.3 s instead of 6.6."""
    return instance_attr(torch._C, "_AutoDispatchBelowAutograd")()


# What generate() makes of a GenerationConfig


@dataclasses.dataclass(slots=True)
class PreparedGeneration:
    """What ``generate()`` hands to its decoding loop: the resolved config, the processors and the stopping criteria.

    The config is a private copy whose lengths are final and whose special tokens are tensors
    (:func:`special_tokens`).
    """

    config: GenerationConfig
    processors: LogitsProcessorList
    criteria: StoppingCriteriaList


PLAIN_TYPES = frozenset({type(None), bool, int, float, str})
MAX_RESOLVED = 64
_RESOLVED: dict[tuple[str, str], GenerationConfig] = {}


def resolve_generation_config(
    model: Any, generation_config: GenerationConfig | None, **kwargs: Any
) -> tuple[GenerationConfig, dict[str, Any]]:
    """A copy of a config completed by the model's own defaults, as ``generate()`` does it, and unused keywords.

    Most requests have the same config but for ``max_new_tokens``, which is handed through where it is given: the rest
    is remembered.
    """
    is_usual = type(model)._prepare_generation_config is GenerationMixin._prepare_generation_config
    given, own = generation_config, model.generation_config
    if given is None or given.max_new_tokens is None or kwargs or not is_usual:
        return model._prepare_generation_config(given, **kwargs)
    if not (_is_written_out(given) and _is_written_out(own)):
        return model._prepare_generation_config(given)
    # As text: 1, 1.0 and True are different values, and what changes in place is seen.
    key = repr(vars(given) | {"max_new_tokens": 1}), repr(vars(own))
    known = _RESOLVED.get(key)
    if known is None:
        known = model._prepare_generation_config(generation_config)[0]
        if len(_RESOLVED) >= MAX_RESOLVED:
            _RESOLVED.clear()
        _RESOLVED[key] = known
    config = copy.copy(known)
    for name, value in vars(config).items():
        if isinstance(value, list):
            setattr(config, name, value.copy())
    config.max_new_tokens = given.max_new_tokens
    config.validate()
    return config, {}


def _is_written_out(config: Any) -> bool:
    """Whether a config's text says all that it holds."""
    return type(config) is GenerationConfig and all(
        type(value) in PLAIN_TYPES or (type(value) is list and PLAIN_TYPES.issuperset(map(type, value)))
        for value in vars(config).values()
    )


def prepare_generation(
    model: Any,
    generation_config: GenerationConfig | None,
    prompt: torch.Tensor,
    *,
    logits_processor: list[Any] | None = None,
    stopping_criteria: list[Any] | None = None,
    prefix_allowed_tokens_fn: Callable[[int, torch.Tensor], list[int]] | None = None,
    tokenizer: Any = None,
    stop_criterion: Callable[[Any, Any], Any] | None = None,
) -> PreparedGeneration:
    """Everything that ``model.generate(prompt, generation_config)`` prepares before its decoding loop.

    Args:
        model: the model; its ``generation_config`` gives what the given one leaves open.
        generation_config: None means the model's own.
        prompt: ``[1, L]`` int64 on the model's device, without padding.
        logits_processor, stopping_criteria, prefix_allowed_tokens_fn, tokenizer: as for ``generate()``.
        stop_criterion: makes the criterion of a tokenizer and stop strings; None: transformers' own.

    Raises:
        ValueError: ``generate()`` would raise it for the same arguments.
    """
    def is_default(name: str) -> bool:
        given = None if generation_config is None else getattr(generation_config, name)
        return given is None and getattr(model.generation_config, name) is None

    has_default_max_length, has_default_min_length = is_default("max_length"), is_default("min_length")
    config, _ = resolve_generation_config(model, generation_config)
    model._validate_generation_mode(config.get_generation_mode(), config, {})
    model._prepare_special_tokens(config, True, device=prompt.device, batch_size=1)
    config = model._prepare_generated_length(
        generation_config=config,
        has_default_max_length=has_default_max_length,
        has_default_min_length=has_default_min_length,
        model_input_name="input_ids",
        inputs_tensor=prompt,
        input_ids_length=prompt.shape[1],
    )
    model._validate_generated_length(config, prompt.shape[1], has_default_max_length)
    processors = model._get_logits_processor(
        generation_config=config,
        input_ids_seq_length=prompt.shape[1],
        encoder_input_ids=prompt,
        prefix_allowed_tokens_fn=prefix_allowed_tokens_fn,
        logits_processor=LogitsProcessorList(logits_processor or []),
        device=prompt.device,
        model_kwargs={},
    )
    stop_strings = config.stop_strings
    if stop_criterion is not None and stop_strings is not None and tokenizer is not None:
        stopping_criteria = [*(stopping_criteria or []), stop_criterion(tokenizer, stop_strings)]
        config.stop_strings = None
    criteria = model._get_stopping_criteria(
        generation_config=config,
        stopping_criteria=StoppingCriteriaList(stopping_criteria or []),
        tokenizer=tokenizer,
    )
    config.stop_strings = stop_strings
    return PreparedGeneration(config, processors, criteria)


def special_tokens(config: GenerationConfig) -> tuple[tuple[int, ...], int | None]:
    """(eos token ids, pad token id) of a prepared config."""
    eos, pad = instance_attr(config, "_eos_token_tensor"), instance_attr(config, "_pad_token_tensor")
    return () if eos is None else tuple(eos.tolist()), None if pad is None else int(pad)


class _OneToken:
    """A tokenizer whose vocabulary is one token."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer, self.vocab, self._encoded = tokenizer, dict[str, int](), dict[str, Any]()

    def get_vocab(self) -> dict[str, int]:
        return self.vocab

    def __call__(self, text: str, **options: Any) -> Any:
        # Once: encoding changes the state of a fast tokenizer, which its owner may be using in another thread.
        if text not in self._encoded:
            self._encoded[text] = self._tokenizer(text, **options)
        return self._encoded[text]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)


def token_texts(tokenizer: Any) -> tuple[bool, Callable[[int], str | bytes | None]]:
    """What ``StopStringCriteria`` takes for the text of a token: whether that is bytes, and a function that gives it by
    id, None for an id that is no token."""
    find_mode = require_attr(StopStringCriteria, "_get_stop_string_matching_mode")
    mode = find_mode.__get__(None, StopStringCriteria)(tokenizer)
    one = _OneToken(tokenizer)

    def find(token: int) -> str | bytes | None:
        name = tokenizer.convert_ids_to_tokens(token) if 0 <= token < len(tokenizer) else None
        if name is None:
            return None
        one.vocab = {name: token}
        return StopStringCriteria.clean_tokenizer_vocab(one, stop_string_matching_mode=mode)[0][0]

    find(0)  # Encodes what it needs, in the thread of the caller.
    return mode is not None, find


class _PrefixOfRow(PrefixConstrainedLogitsProcessor):
    """Checks the tokens that a caller's function allows before they index scores: on a GPU an index outside of them
    ends every later call of the process."""

    def __init__(self, allowed: Callable[[int, torch.Tensor], list[int]]) -> None:
        super().__init__(self._checked, 1)
        self._allowed, self._vocab_size = allowed, 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        # All rows are of one prompt.
        self._num_beams, self._vocab_size = scores.shape
        return super().__call__(input_ids, scores)

    def _checked(self, batch_index: int, ids: torch.Tensor) -> list[int]:
        allowed = self._allowed(batch_index, ids)
        tokens = torch.as_tensor(allowed)
        outside = tokens[(tokens < 0) | (tokens >= self._vocab_size)]
        if tokens.dtype != torch.bool and outside.numel():
            raise ValueError(
                f"prefix_allowed_tokens_fn gave token {int(outside[0])}: 0 to {self._vocab_size - 1} are accepted."
            )
        return allowed


def processor_of_row(processor: Any, row: int, num_rows: int, padding: int, repeated_row: int) -> Any:
    """A processor made for a batch, as one for a row of it, ``[1, L]``, or for the row's beams, ``[num_beams, L]``.

    Only four of transformers' processors know about the batch; every other object is returned as it is.

    Args:
        processor: a logits processor.
        row: its row of the batch that ``generate()`` was called with, before rows were repeated.
        num_rows: rows of that batch.
        padding: tokens of padding at the row's left.
        repeated_row: the same, after rows were repeated for samples or beams.
    """
    if type(processor) is RepetitionPenaltyLogitsProcessor:
        if isinstance(processor.prompt_ignore_length, torch.Tensor):
            return RepetitionPenaltyLogitsProcessor(processor.penalty, prompt_ignore_length=padding)
    elif type(processor) is PrefixConstrainedLogitsProcessor:
        allowed = instance_attr(processor, "_prefix_allowed_tokens_fn")
        # Rows of a prompt: its beams; from 5.24 on, its samples too.
        batch_index = repeated_row // instance_attr(processor, "_num_beams")
        return _PrefixOfRow(lambda _, ids: allowed(batch_index, ids))
    elif type(processor) is EncoderRepetitionPenaltyLogitsProcessor and num_rows > 1:
        clone = copy.copy(processor)
        clone.encoder_input_ids = instance_attr(processor, "encoder_input_ids")[row : row + 1]
        return clone
    elif type(processor) is EncoderNoRepeatNGramLogitsProcessor and num_rows > 1:
        clone = copy.copy(processor)
        clone.batch_size = 1
        clone.generated_ngrams = instance_attr(processor, "generated_ngrams")[row : row + 1]
        return clone
    elif type(processor) is SynthIDTextWatermarkLogitsProcessor:
        return copy.deepcopy(processor)  # It remembers what it saw.
    return processor


def uses_attention_interface(model: PreTrainedModel) -> bool:
    """Whether "paged_flash" would take the place of a model's attention; see :func:`_check_and_adjust`."""
    return bool(type(model)._can_set_attn_implementation() and supports_flash(type(model)))


def supports_flash(model_class: type[PreTrainedModel]) -> bool:
    """Whether a model computes the same under "paged_flash".

    From 5.24 on, models for text and images say that they do not support flash attention, since it drops their
    bidirectional masks over images; the base class, for which text models count, says that it does. "paged_flash" gets
    these masks from its mask function.
    """
    if model_class._supports_flash_attn or model_class.main_input_name != "input_ids":
        return bool(model_class._supports_flash_attn)
    return any(vars(base).get("_supports_flash_attn", False) for base in model_class.__mro__)


class _Chosen(threading.local):
    """Attention implementations of this thread, by the ids of configs; the others have what is written in them."""

    def __init__(self) -> None:
        # An attribute of the object, not of the class: compiled code checks it, in the thread that runs it.
        self.names: dict[int, str] = {}


_CHOSEN = _Chosen()


class AttentionChoice:
    """Lets one thread's forwards of a model run another attention implementation than its configs say.

    Nothing is written: other threads, copies of the model and ``set_attn_implementation`` see the configs as they are.

    Args:
        model: a transformers model; those of its configs count that ``set_attn_implementation`` would write to.
        name: of the implementation.

    Raises:
        UnsupportedModelError, ValueError: the model cannot run it.
    """

    def __init__(self, model: PreTrainedModel, name: str) -> None:
        model._check_and_adjust_attn_implementation(name)
        configs = [model.config]
        configs += [
            module.config
            for module in model.modules()
            if isinstance(module, PreTrainedModel) and type(module)._can_set_attn_implementation()
        ]
        for config in configs:  # grows meanwhile
            configs += [part for key in config.sub_configs if (part := getattr(config, key, None)) is not None]
        for config in configs:
            owner = next(c for c in type(config).__mro__ if "_attn_implementation" in c.__dict__)
            _let_threads_choose(owner)
        # Kept, so that no other config gets one of the ids.
        self._configs = configs
        self._names = {id(config): name for config in configs}

    @contextlib.contextmanager
    def here(self) -> Iterator[None]:
        """Choose it in this thread."""
        before, _CHOSEN.names = _CHOSEN.names, self._names
        try:
            yield
        finally:
            _CHOSEN.names = before


def _let_threads_choose(owner: type) -> None:
    """Let a config class's ``_attn_implementation`` read what :class:`AttentionChoice` says first. Idempotent."""
    own = require_attr(owner, "_attn_implementation")
    if getattr(own.fget, "_hf_paged", False):
        return
    written = own.fget

    def read(config: Any) -> Any:
        name = _CHOSEN.names.get(id(config))
        return written(config) if name is None else name

    read._hf_paged = True  # type: ignore[attr-defined]
    owner._attn_implementation = property(read, own.fset, own.fdel, own.__doc__)  # type: ignore[attr-defined]


def sorts_drawn_beams() -> bool:
    """Whether ``generate()`` orders the candidates of beam sampling by score, as from 5.24 on, or as they were drawn.

    It tells which of them may end a sequence: those in the first ``num_beams`` places.
    """
    return Version(transformers.__version__).release >= (5, 24)


def own_decoding_loop(model: Any, config: GenerationConfig) -> Callable[..., Any]:
    """transformers' own loop for a prepared config, called as ``custom_generate`` is.

    Raises:
        ValueError: a mode that has no loop in transformers itself.
    """
    loops = {
        GenerationMode.GREEDY_SEARCH: "_sample",
        GenerationMode.SAMPLE: "_sample",
        GenerationMode.BEAM_SEARCH: "_beam_search",
        GenerationMode.BEAM_SAMPLE: "_beam_search",
        GenerationMode.ASSISTED_GENERATION: "_assisted_decoding",
    }
    mode = config.get_generation_mode()
    if mode not in loops:
        raise ValueError(f"transformers has no loop for {mode.value.replace('_', ' ')}: leave custom_generate out.")
    return getattr(type(model), loops[mode])


def hooks_of(model: torch.nn.Module) -> list[dict[int, Any]]:
    """The forward hooks and pre-hooks of every module, and those of all modules at once, as torch keeps them: what is
    added later shows up in them."""
    module = torch.nn.modules.module
    everywhere = [instance_attr(module, "_global_forward_hooks"), instance_attr(module, "_global_forward_pre_hooks")]
    return everywhere + [h for m in model.modules() for h in (m._forward_hooks, m._forward_pre_hooks)]


def has_compiled(model: torch.nn.Module) -> bool:
    """Whether a module, or its forward, is compiled by ``torch.compile``."""
    return any(
        instance_attr(m, "_compiled_call_impl") is not None or hasattr(m.forward, "_torchdynamo_orig_callable")
        for m in model.modules()
    )


def tables_of(module: torch.nn.Module) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """A module's own children, parameters and buffers, as torch keeps them: what is exchanged shows up there."""
    return module._modules, module._parameters, module._buffers


def any_hooks(hooks: list[dict[int, Any]]) -> bool:
    """Whether there are hooks in what :func:`hooks_of` gave, beside those of ``output_hidden_states`` and the like.

    transformers leaves these in a model for good, once one of its calls has asked for them; they do nothing in others.
    """
    return any(hooks) and any(
        getattr(hook, "__module__", None) != "transformers.utils.output_capturing"
        for some in hooks
        for hook in some.values()
    )


HARMLESS_HOOKS = (
    "torch.", "transformers.utils.output_capturing.", "transformers.modeling_utils.", "peft.mixed_model.",
    "peft.peft_model.", "peft.utils.other.", "hf_paged.",
)  # fmt: skip
"""Whose hooks do the same to packed rows: torch's (of weights and shards), those of ``output_hidden_states``, those
that make the embeddings require a gradient, and this package's."""


def is_harmless_hook(hook: Callable) -> bool:
    """Whether a forward hook is known to do the same to packed rows ``[1, T, ...]`` as to the rows of a batch."""
    return origin_of(hook).startswith(HARMLESS_HOOKS)


def origin_of(function: Callable) -> str:
    """The module and name of the code that a callable runs: not what :func:`functools.wraps` has copied."""
    while isinstance(function, functools.partial):
        function = function.func
    function = getattr(function, "__func__", function)
    code = getattr(function, "__code__", None)
    if code is not None:
        return f"{function.__globals__.get('__name__')}.{getattr(code, 'co_qualname', code.co_name)}"
    kind = function if isinstance(function, type) else type(function)
    return f"{kind.__module__}.{kind.__qualname__}"


# What generate() calls at each step

STEP_METHODS = (
    "prepare_inputs_for_generation", "_update_model_kwargs_for_generation", "_prepare_position_ids_for_generation",
    "_prefill", "_sample", "_beam_search", "_assisted_decoding", "_get_candidate_generator",
    "_has_unfinished_sequences", "_beam_search_has_unfinished_sequences", "_check_early_stop_heuristic",
    "_get_top_k_continuations", "_get_running_beams_for_next_iteration", "_update_finished_beams",
)  # fmt: skip
"""Methods of GenerationMixin that decide what a step computes or which token follows; the engine calls none of them."""

HARMLESS_PREPARATION = frozenset(
    {
        "BambaForCausalLM", "CTRLLMHeadModel", "Ernie4_5_VLMoeForConditionalGeneration", "FalconH1ForCausalLM",
        "Gemma3ForConditionalGeneration", "Gemma4ForConditionalGeneration", "Gemma4UnifiedForConditionalGeneration",
        "InklingForConditionalGeneration", "MiniCPMOcrForConditionalGeneration", "MiniCPMV4_6ForConditionalGeneration",
        "MiniCPMV4_7ForConditionalGeneration", "Molmo2ForConditionalGeneration", "NemotronHForCausalLM",
        "Phi3ForCausalLM", "Phi4MultimodalForCausalLM", "PhimoeForCausalLM", "RoCBertForCausalLM", "Zamba2ForCausalLM",
        "ZambaForCausalLM",
    }
)  # fmt: skip
"""Classes of transformers whose own ``prepare_inputs_for_generation`` gives for text what GenerationMixin's gives, but
for the number of logits."""


def overridden_step_method(model: Any) -> str | None:
    """The first of :data:`STEP_METHODS` that a model has of its own, and what it is; None: it has none that matters."""
    for name in STEP_METHODS:
        own = getattr(GenerationMixin, name, None)  # versions differ in the helpers of their loops
        found: Any = getattr(model, name, None)
        function: Any = getattr(found, "__func__", found)
        if own is None or function is own:
            continue
        if name not in vars(model) and getattr(function, "__module__", "").startswith("transformers.models."):
            is_harmless = function.__qualname__.split(".")[0] in HARMLESS_PREPARATION
            # Positions of images; those of text are the usual ones, which is looked at for each call.
            if name == "_prepare_position_ids_for_generation" or (name == STEP_METHODS[0] and is_harmless):
                continue
        return f"{name}() is {origin_of(function)}"
    return None


def is_moved_by_accelerate(model: torch.nn.Module) -> bool:
    """Whether accelerate moves or offloads a module of the model: it leaves its hook there."""
    return any(hasattr(module, "_hf_hook") for module in model.modules())


def is_sharded(model: PreTrainedModel) -> bool:
    """Whether a process holds only a part of the model: a tensor parallel plan was applied, or weights are DTensors."""
    if (getattr(model, "_tp_size", None) or 1) > 1:
        return True
    if not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return any(isinstance(tensor, DTensor) for tensor in itertools.chain(model.parameters(), model.buffers()))


def tensor_parallel_group(model: PreTrainedModel) -> Any:
    """The process group over which transformers' tensor parallel layers of a model communicate; None: it has none."""
    if (getattr(model, "_tp_size", None) or 1) <= 1:
        return None
    manager = getattr(model, "_mesh_manager", None)  # from 5.19 on
    mesh: Any = getattr(model, "_device_mesh", None) if manager is None else manager.get_mesh("tp")
    return (mesh["tp"] if mesh.ndim > 1 else mesh).get_group()


def other_sharding(model: PreTrainedModel) -> str | None:
    """How a model with tensor parallel layers is spread over processes beside that; None: not at all."""
    config = getattr(model.config, "distributed_config", None)
    for name in ("fsdp_size", "dp_replicate_size", "pp_size", "ep_size"):
        size = getattr(config, name, None) or 1
        if size > 1:
            return f"{name}={size}"
    return "enable_expert_parallel" if getattr(config, "enable_expert_parallel", False) else None


def heads_of_plan(model: PreTrainedModel) -> bool:
    """Whether the tensor parallel plan that a model was loaded with gives each rank some of its attention heads."""
    plan = getattr(model, "_tp_plan", None) or {}
    return any(
        name.rsplit(".", 1)[-1] in ("q_proj", "k_proj", "qkv_proj", "query_key_value") and style.startswith("colwise")
        for name, style in plan.items()
    )


def shallow_copy(module: Any) -> Any:
    """A module with the same parameters, buffers and children, whose children can be exchanged by themselves."""
    twin = copy.copy(module)
    twin._modules = dict(module._modules)
    return twin
