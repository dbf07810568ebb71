"""Answers for many prompts, one a line of a text file, as JSON lines in the same order.

    python examples/batch.py --model integration_tests/assets/small_model --prompts prompts.txt --output answers.jsonl
"""

import argparse
import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import hf_paged


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or hub id")
    parser.add_argument("--prompts", type=Path, required=True, help="text file, one prompt a line")
    parser.add_argument("--output", type=Path, required=True, help="JSON lines")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="default: 128")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: greedy (the default)")
    options = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype="auto").to(device)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    lines = options.prompts.read_text(encoding="utf-8").splitlines()
    sampling = dict(do_sample=True, temperature=options.temperature) if options.temperature else dict(do_sample=False)
    config = GenerationConfig(max_new_tokens=options.max_new_tokens, **sampling)

    with hf_paged.Engine(model, hf_paged.EngineConfig(seed=0)) as engine:
        outputs = engine.generate(tokenizer(lines).input_ids, generation_config=config, progress=True)
        stats = engine.stats()
    with options.output.open("w", encoding="utf-8") as file:
        for line, output in zip(lines, outputs):
            answer = tokenizer.decode(output.token_ids, skip_special_tokens=True)
            error = None if output.error is None else str(output.error)
            entry = {"prompt": line, "answer": answer, "finish_reason": output.finish_reason, "error": error}
            file.write(json.dumps(entry) + "\n")
    print(f"{len(outputs)} answers, {stats.new_tokens:,} tokens, {stats.tokens_per_s:,.0f} tokens/s")


if __name__ == "__main__":
    main()
