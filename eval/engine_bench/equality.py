"""Whether the engine computes the same with everything on as with everything off.

A small model of the same family (heads of 128, 4 layers, random weights large enough that layers matter):

* float32: greedy tokens of 32 requests, with everything as it is by default and with compile on, against all off.
* bfloat16: log-probabilities of the tokens that such an engine chose, against the model's own forward with
  eager attention over the same tokens, in bfloat16 and in float32 (the same weights); beside them the difference of
  those two, which is what bfloat16 costs without an engine.
"""

from typing import Any

import numpy as np
import torch

import hf_paged
from eval.engine_bench.models import SMALL, TINY, build, draw_requests
from eval.engine_bench.parts import Deadline, Sizes, config, make_engine

NUM_REQUESTS = 32
PROMPTS = (5, 60)
NEW = 40
GAIN = 1.5


def small_model(name: str, is_tiny: bool, dtype: torch.dtype, device: torch.device | str) -> Any:
    """Weights of standard deviation ``GAIN / sqrt(inputs)``: at the default 0.02 layers would hardly be seen."""
    model = build(name, TINY if is_tiny else SMALL, torch.float32, device)
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=GAIN * parameter.shape[-1] ** -0.5)
    return model.to(dtype)


def equality(
    name: str, sizes: Sizes, limit_s: float, variants: dict[str, dict[str, Any]], off: dict[str, Any],
    device: torch.device | str,
) -> dict[str, Any]:  # fmt: skip
    """Both comparisons of each variant of the engine; see the module.

    Args:
        name: of the family's model.
        sizes: of the engine.
        limit_s: what is not begun by then is left out.
        variants: their options, by name.
        off: options of an engine with everything off.
        device: of the models.
    """
    deadline = Deadline(limit_s)
    is_tiny = torch.device(device).type == "cpu"
    count, new = (6, 8) if is_tiny else (NUM_REQUESTS, NEW)
    prompts, _ = draw_requests(count, PROMPTS, 500, seed=3)
    exact, half = (small_model(name, is_tiny, dtype, device) for dtype in (torch.float32, torch.bfloat16))
    # The float32 model gets the rounded weights: what differs is the arithmetic alone.
    exact.load_state_dict(half.state_dict())
    wanted = [output.token_ids for output in _generate(exact, prompts, new, sizes, off)]
    found: dict[str, Any] = {}
    for variant, options in variants.items():
        if deadline.has_passed:
            break
        tokens = [output.token_ids for output in _generate(exact, prompts, new, sizes, options)]
        outputs = _generate(half, prompts, new, sizes, options, logprobs=0)
        found[variant] = {
            "float32_same": sum(a == b for a, b in zip(tokens, wanted)),
            "bfloat16": _differences(half, exact, prompts, outputs),
        }
    return {
        "parameters": exact.num_parameters(), "layers": exact.config.num_hidden_layers, "requests": count,
        "new_tokens": count * new, "variants": found, "cut": len(found) < len(variants),
    }  # fmt: skip


def _generate(
    model: Any, prompts: list[list[int]], new: int, sizes: Sizes, options: dict[str, Any], **request: Any
) -> list[hf_paged.RequestOutput]:
    with make_engine(model, sizes=sizes, num_seqs=len(prompts), max_len=128, **options) as engine:
        outputs = engine.generate(prompts, generation_config=config(new), **request)
    for output in outputs:
        if output.error is not None:
            raise output.error
    return outputs


def _differences(
    half: Any, exact: Any, prompts: list[list[int]], outputs: list[hf_paged.RequestOutput]
) -> dict[str, dict[str, float]]:
    """Of log-probabilities of the engine's tokens: by the engine, by eager bfloat16 and by eager float32."""
    engine = np.concatenate([[entry.logprob for entry in output.logprobs or []] for output in outputs])
    chosen = [(prompt, output.token_ids) for prompt, output in zip(prompts, outputs)]
    eager_half, eager_exact = _forced(half, chosen), _forced(exact, chosen)
    differences = {
        "engine_to_eager_bfloat16": np.abs(engine - eager_half),
        "engine_to_eager_float32": np.abs(engine - eager_exact),
        "eager_bfloat16_to_eager_float32": np.abs(eager_half - eager_exact),
    }
    return {
        key: {"mean": float(value.mean()), "p99": float(np.percentile(value, 99)), "max": float(value.max())}
        for key, value in differences.items()
    }


@torch.no_grad()
def _forced(model: Any, chosen: list[tuple[list[int], list[int]]]) -> np.ndarray:
    """Log-probabilities of given new tokens by the model's own forward, one sequence at a time."""
    model.set_attn_implementation("eager")
    found = []
    for prompt, new in chosen:
        ids = torch.tensor([prompt + new], device=model.device)
        logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
        found.append(logits.log_softmax(-1).gather(1, ids[0, len(prompt) :, None])[:, 0].cpu().numpy())
    return np.concatenate(found)
