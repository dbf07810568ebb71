"""Which calls of ``generate()`` the engine does not run, and why: they go to transformers, with one line in the log."""

from typing import Any

import torch
from transformers import (
    AlternatingCodebooksLogitsProcessor,
    ClassifierFreeGuidanceLogitsProcessor,
    GenerationConfig,
    GenerationMixin,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
    WhisperTimeStampLogitsProcessor,
)
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.integrations.fsdp import is_fsdp_managed_module

from ..engine.sampling.request_params import unserved_reason
from ..engine.startup.support import reasons_in_state
from ..mixed_precision import autocast_dtype
from ..transformers_internals import CACHE_NAMES

SERVED_KEYWORDS = {"input_ids", "attention_mask", "position_ids", "use_cache", "logits_to_keep", "labels"}
"""What a text prompt brings. ``position_ids`` are compared with those of the attention mask; ``labels`` come from
trainers, and ``generate()`` drops them as well."""

LOOP_KEYWORDS = SERVED_KEYWORDS | set(CACHE_NAMES)
"""What ``generate()`` adds before its loop."""

NOT_ROW_WISE = (
    AlternatingCodebooksLogitsProcessor,
    ClassifierFreeGuidanceLogitsProcessor,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
    WhisperTimeStampLogitsProcessor,
)


def reason_in_arguments(model: Any, arguments: dict[str, Any], keywords: dict[str, Any]) -> str | None:
    """Why a call stays with transformers, told from the arguments of ``generate()`` that are not in the config.

    Args:
        model: the model.
        arguments: by name, those that the signature of ``generate()`` has.
        keywords: the others, without those of the config.
    """
    if type(model).generate is not GenerationMixin.generate:
        return f"{type(model).__name__} has a generate() of its own"
    for name in (
        "custom_generate", "assistant_model", "synced_gpus", "negative_prompt_ids", "negative_prompt_attention_mask",
    ):  # fmt: skip
        if arguments.get(name):
            return f"{name} is given"
    if arguments.get("synced_gpus") is None and torch.distributed.is_available() and torch.distributed.is_initialized():
        is_sharded = is_deepspeed_zero3_enabled() or is_fsdp_managed_module(model)
        if is_sharded and torch.distributed.get_world_size() > 1:
            return "the model's weights are sharded over processes that must generate in step (synced_gpus)"
    unserved = sorted(name for name, value in keywords.items() if value is not None and name not in SERVED_KEYWORDS)
    if unserved:
        return f"{', '.join(unserved)} is given"
    return reason_in_model(model)


def reason_in_model(model: Any) -> str | None:
    """Why a call stays with transformers, told from the state that the model is in."""
    for reason in reasons_in_state(model):
        return reason
    if model.device.type == "meta":
        return "the model's weights are offloaded (accelerate), and come to the device layer by layer"
    if autocast_dtype(model.device) is not None:
        return "autocast is enabled, and the engine's pages have the dtype of the weights"
    if not model.training:
        return None
    for name, module in model.named_modules():
        if getattr(module, "gradient_checkpointing", False):
            return "the model is in training mode with gradient checkpointing, which has no cache"
        if isinstance(module, torch.nn.Dropout) and module.training and module.p > 0:
            return f"the model is in training mode with dropout ({name}); call model.eval() first"
    config = model.config.get_text_config(decoder=True).to_dict()
    for name, value in config.items():
        if any(word in name for word in ("dropout", "pdrop", "jitter")) and isinstance(value, float) and value > 0:
            return f"the model is in training mode with {name}={value}; call model.eval() first"
    return None


def reason_in_config(config: GenerationConfig, has_streamer: bool) -> str | None:
    """Why a call stays with transformers, told from its resolved config."""
    reason = unserved_reason(config)
    if reason is not None:
        return reason.rstrip(".")
    if config.return_dict_in_generate:
        for name in ("output_scores", "output_logits"):
            if getattr(config, name):
                return f"{name} is asked for"
    if config.cache_implementation is not None and config.cache_implementation != "dynamic":
        return f"cache_implementation={config.cache_implementation!r} is asked for"
    if has_streamer and (config.num_beams > 1 or config.num_return_sequences > 1):
        return "a streamer takes one sequence a prompt"
    return None


def is_row_wise(processor: Any) -> bool:
    """Whether a logits processor may be called with one row, ``[1, L]``, of a batch.

    transformers' own are, but for a few that pair rows up. Any other object may keep something for each row of the
    batch that it was made for; it says that it does not with an attribute ``row_wise = True``.
    """
    if type(processor).__module__ == GenerationMixin.__module__.replace(".utils", ".logits_process"):
        return not isinstance(processor, NOT_ROW_WISE)
    return getattr(processor, "row_wise", False) is True
