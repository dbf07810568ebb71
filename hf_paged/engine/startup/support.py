"""Which models the engine can serve, told before anything runs."""

from typing import Any

from transformers import PreTrainedModel

from ...errors import UnsupportedModelError
from ...hooks import reason_in_hooks, reason_in_modules
from ...paging import PagePool
from ...transformers_internals import (
    heads_of_plan,
    hooks_of,
    is_sharded,
    other_sharding,
    overridden_step_method,
    uses_attention_interface,
)
from ..execution.engine_cache import EngineCache


def is_supported(model: Any) -> list[str]:
    """Why the engine cannot serve a model: reasons, an empty list where it can.

    Told from the model's class and config, and from the hooks and methods that were put onto it; the engine's
    self-check, which runs the model, may refuse more.
    """
    if not isinstance(model, PreTrainedModel):
        return [f"it is a {type(model).__name__}, not a transformers PreTrainedModel"]
    config = model.config
    reasons = []
    if getattr(config, "is_encoder_decoder", False):
        reasons.append("it is an encoder-decoder model")
    if model.main_input_name != "input_ids":
        reasons.append(f"its main input is {model.main_input_name}, not input_ids")
    if not model.can_generate():
        reasons.append(f"{type(model).__name__} has no generate()")
    if not uses_attention_interface(model):
        reasons.append(
            f"{type(model).__name__} does not run its attention through transformers' attention interface, or does "
            f"not support flash attention there"
        )
    text = config.get_text_config(decoder=True)
    if getattr(text, "is_causal", True) is False:
        reasons.append("its attention is not causal")
    reasons += _rope_reasons(text)
    if not reasons:
        try:
            EngineCache(config, PagePool(), num_slots=1)
        except UnsupportedModelError as error:
            reasons.append(str(error))
    return reasons + reasons_in_state(model)


def reasons_in_state(model: PreTrainedModel) -> list[str]:
    """What keeps the engine from giving what ``generate()`` gives at present: methods, hooks, modules, shards."""
    method = overridden_step_method(model)
    found = (
        method and f"{method}, which generate() calls at each step and the engine does not",
        reason_in_hooks(hooks_of(model)),
        reason_in_modules(model),
        _reason_in_weights(model),
    )
    return [reason for reason in found if reason] + _sharding_reasons(model)


def _reason_in_weights(model: PreTrainedModel) -> str | None:
    for name, weight in model.named_parameters():
        if weight.is_meta:
            return f"{name} is on the meta device (accelerate has offloaded it), and the engine needs it in place"
    return None


def _sharding_reasons(model: PreTrainedModel) -> list[str]:
    """Ranks that hold parts of a model must all run the same steps: those of transformers' tensor parallelism do."""
    size = getattr(model, "tp_size", None) or 1
    if size > 1:
        return _tensor_parallel_reasons(model, size)
    if is_sharded(model):
        return [
            "its weights are sharded over processes (FSDP): all of them must run the same steps, and the engine's "
            "depend on when requests come"
        ]
    if any(hasattr(tensor, "ds_id") for tensor in model.parameters()):
        return ["its weights are sharded by DeepSpeed"]
    return []


def _tensor_parallel_reasons(model: PreTrainedModel, size: int) -> list[str]:
    reasons = []
    other = other_sharding(model)
    if other is not None:
        reasons.append(f"it is spread over processes by {other} beside tensor parallelism, which is served alone")
    text = model.config.get_text_config(decoder=True)
    for name in ("num_attention_heads", "num_key_value_heads") if heads_of_plan(model) else ():
        heads = getattr(text, name, None)
        if isinstance(heads, int) and heads % size:
            reasons.append(f"its {heads} heads ({name}) cannot be divided among {size} processes")
    for name, module in model.named_modules():
        if type(module).__module__.startswith("peft."):
            reasons.append(f"{name}, a {type(module).__name__} of PEFT, is in a model that is sharded over processes")
            break
    return reasons


def _rope_reasons(config: Any) -> list[str]:
    """Rotary frequencies that depend on the longest sequence would mix the sequences of a step."""
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    kinds = {str(entry.get("rope_type")) for entry in (nested or [parameters])}
    return [
        f"its rotary embedding ({kind}) depends on the longest sequence of a batch"
        for kind in sorted(kinds & {"dynamic", "longrope"})
    ]
