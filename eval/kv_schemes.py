"""What schemes of quantising keys and values cost: perplexity with every key and value read quantised.

    python -m eval.kv_schemes --model FOLDER --data FILE --max-tokens 32768

Plain PyTorch, no pages and no kernels: keys and values are quantised and brought back in front of transformers' SDPA
attention. So schemes that pages do not have can be compared with those that they have ("int8, keys rotated" and "fp8").
One scale for each token and head unless a scheme says otherwise.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from eval import command_line
from eval.loading import load_pretrained
from eval.perplexity import perplexity
from eval.quality.perplexity_result import PerplexityResult
from eval.quality.text_data import ACCEPTED_SPECS, load_text

NAME = "quantised_schemes"
LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
"""Largest number of each dtype."""
Change = Callable[[torch.Tensor], torch.Tensor]
"""Keys or values ``[B, H, L, D]``, quantised and brought back."""


def per_row(x: torch.Tensor, dtype: torch.dtype, dim: int = -1) -> torch.Tensor:
    """One scale for each row along ``dim``: of a token and head (-1), or of a channel (-2)."""
    scale = (x.abs().amax(dim, keepdim=True) / LARGEST[dtype]).clamp(min=1e-30)
    scaled = x / scale
    return (scaled.round() if dtype == torch.int8 else scaled).to(dtype).to(x.dtype) * scale


def in_groups(x: torch.Tensor, dtype: torch.dtype, size: int) -> torch.Tensor:
    """One scale for each token, head and ``size`` channels; ValueError where the head dim is no multiple of it."""
    if x.shape[-1] % size:
        raise ValueError(
            f"--schemes: a head dim of {x.shape[-1]} has no whole groups of {size} channels; leave that scheme out"
        )
    return per_row(x.unflatten(-1, (-1, size)), dtype).flatten(-2)


def rotated(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Times Hadamard matrices of the largest power of two that divides the head dim, quantised, and turned back."""
    size = x.shape[-1] & -x.shape[-1]
    matrix = x.new_ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)]) / 2**0.5
    # One scale still spans all channels; the matrix is its own inverse.
    turned = per_row((x.unflatten(-1, (-1, size)) @ matrix).flatten(-2), dtype)
    return (turned.unflatten(-1, (-1, size)) @ matrix).flatten(-2)


INT8, FP8 = torch.int8, torch.float8_e4m3fn
int8, fp8 = partial(per_row, dtype=INT8), partial(per_row, dtype=FP8)
SCHEMES: dict[str, tuple[Change | None, Change | None]] = {
    "unquantised": (None, None),
    "int8": (int8, int8),
    "int8, keys only": (int8, None),
    "int8, values only": (None, int8),
    "int8, a scale for 64 channels": (partial(in_groups, dtype=INT8, size=64), partial(in_groups, dtype=INT8, size=64)),
    "int8, a scale for 32 channels": (partial(in_groups, dtype=INT8, size=32), partial(in_groups, dtype=INT8, size=32)),
    "int8, keys with a scale for each channel": (partial(per_row, dtype=INT8, dim=-2), int8),
    "int8, keys rotated": (partial(rotated, dtype=INT8), int8),
    "int8, keys and values rotated": (partial(rotated, dtype=INT8), partial(rotated, dtype=INT8)),
    "fp8": (fp8, fp8),
    "fp8, keys and values rotated": (partial(rotated, dtype=FP8), partial(rotated, dtype=FP8)),
}


def measure(model: PreTrainedModel, ids: Sequence[int], scheme: str, window: int) -> PerplexityResult:
    """Perplexity of a text with keys and values as ``scheme`` leaves them; the model keeps the attention."""
    of_keys, of_values = SCHEMES[scheme]

    def attend(module: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        k, v = of_keys(k) if of_keys else k, of_values(v) if of_values else v
        return sdpa_attention_forward(module, q, k, v, *args, **kwargs)

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)
    return perplexity(model, ids, window=window, stride=window // 2)


def main(argv: Sequence[str] | None = None) -> None:
    """Print a table in Markdown, a row as soon as it is measured."""
    parser = command_line.make_parser("kv_schemes", __doc__)
    parser.add_argument("--model", required=True, help="a model folder, or a name on the Hugging Face hub")
    parser.add_argument("--data", required=True, help=f"the text: {ACCEPTED_SPECS}")
    parser.add_argument("--max-tokens", type=command_line.positive_int, default=32_768, help="tokens of the text")
    parser.add_argument("--window", type=command_line.positive_int, default=512, help="tokens, half of them scored")
    parser.add_argument("--schemes", nargs="+", choices=SCHEMES, default=list(SCHEMES), help="rows of the table")
    options = parser.parse_args(argv)
    tokenizer = load_pretrained(AutoTokenizer, options.model)
    text = load_text(options.data)
    # More characters than that many tokens have: a whole corpus takes minutes to cut into tokens.
    ids = tokenizer(text[: 32 * options.max_tokens]).input_ids[: options.max_tokens]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_pretrained(AutoModelForCausalLM, options.model, dtype=torch.float32).eval().to(device)
    plain = measure(model, ids, "unquantised", options.window)
    print("| Scheme | Perplexity | Nats per token above unquantised | Largest of a token | Top-1 agreement |")
    print("|---|---|---|---|---|")
    for scheme in options.schemes:
        result = plain if scheme == "unquantised" else measure(model, ids, scheme, options.window)
        difference = result.paired_difference(plain)
        error = difference.standard_error
        print(
            f"| {scheme} | {result.perplexity:.4f} | {difference.mean:+.5f}"
            f"{'' if error is None else f' ± {error:.5f}'} | {difference.max_abs:.2f} "
            f"| {result.top1_agreement(plain):.4f} |",
            flush=True,
        )


if __name__ == "__main__":
    command_line.run(main)
