"""The main job in one command: generate with "paged_flash", and see by perplexity that nothing was lost.

    python -m eval.demo [--model FOLDER_OR_ID] [--prompt TEXT]
"""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

import hf_paged
from eval import command_line
from eval.loading import cache_name, load_pretrained
from eval.perplexity import perplexity
from eval.quality.verdict import FLOAT32

ASSETS = Path(__file__).parent.parent / "integration_tests" / "assets"
PROMPT = 'def read_lines(path):\n    """Return the lines of a text file."""\n'


def main() -> int:
    """Command line; the exit status says whether nothing was lost."""
    parser = command_line.make_parser("demo", __doc__)
    parser.add_argument("--model", default=str(ASSETS / "small_model"), help="model folder or hub id")
    parser.add_argument("--prompt", default=PROMPT, help="text to go on from")
    parser.add_argument("--max-new-tokens", type=command_line.positive_int, default=96, help="tokens to generate")
    parser.add_argument("--tokens", type=command_line.positive_int, default=1024, help="held-out tokens to score")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        tokenizer = load_pretrained(AutoTokenizer, arguments.model)
        model = load_pretrained(
            AutoModelForCausalLM, arguments.model, attn_implementation="paged_flash", dtype=torch.float32
        ).to(device)  # fmt: skip
    except ValueError as error:
        parser.error(str(error))
    inputs = tokenizer(arguments.prompt, return_tensors="pt").to(device)
    out = model.generate(
        **inputs, max_new_tokens=arguments.max_new_tokens, do_sample=False, repetition_penalty=1.2,
        return_dict_in_generate=True,
    )  # fmt: skip
    print(tokenizer.decode(out.sequences[0], skip_special_tokens=True))
    cache = out[cache_name(model)]
    assert isinstance(cache, hf_paged.PagedCache)
    print(f"\n--- on {device}: {cache} ({cache.bytes_in_use / 1024:.0f} KiB)\n")

    text = (ASSETS / "heldout.txt").read_text(encoding="utf-8")
    ids = tokenizer(text, return_tensors="pt").input_ids[0, : arguments.tokens]
    window = min(256, model.config.max_position_embeddings)
    print(f"perplexity of {len(ids)} held-out tokens, window {window}, stride {window // 2}:")
    found = []
    for name, path in (("eager", "prefill"), ("paged_flash", "prefill"), ("paged_flash", "paged_prefill"),
                       ("paged_flash", "decode")):  # fmt: skip
        model.set_attn_implementation(name)
        found.append(perplexity(model, ids, window=window, stride=window // 2, path=path).perplexity)
        print(f"  {name:12} {path:14} {found[-1]:.5f}", flush=True)
    passed, line = verdict(found)
    print(f"\n{line}")
    return 0 if passed else 1


def verdict(perplexities: list[float]) -> tuple[bool, str]:
    """Whether all agree with the first one, which is eager's, and the line that says so."""
    eager, limit = perplexities[0], FLOAT32.delta_ppl
    largest = max(abs(other / eager - 1) for other in perplexities[1:])
    passed = largest <= limit  # False for NaN
    word, said = ("PASS", "agree with") if passed else ("FAIL", "differ from")
    return passed, f"{word}: paged_flash and its pages {said} eager attention: {largest:.1e} apart, limit {limit:.0e}"


if __name__ == "__main__":
    command_line.run(main)
