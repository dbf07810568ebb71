"""GRPO with TRL: the engine makes the completions between optimiser steps, on the weights that are trained.

    pip install trl
    python examples/grpo.py --model Qwen/Qwen3-0.6B --steps 100
"""

import argparse

import torch
import trl
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_paged

PROMPTS = ["def add(a, b):\n", "import os\n", "class Stack:\n", "for line in file:\n"]


def short_lines(completions: list[str], **_) -> list[float]:
    """A toy reward: completions with short lines."""
    return [-max(len(line) for line in completion.splitlines() or [""]) / 80 for completion in completions]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or hub id")
    parser.add_argument("--steps", type=int, default=20, help="optimiser steps (default: 20)")
    parser.add_argument("--generations", type=int, default=4, help="completions of a prompt (default: 4)")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="of a completion (default: 64)")
    parser.add_argument("--output", default="grpo", help="folder of the trained model (default: grpo)")
    options = parser.parse_args()

    has_gpu = torch.cuda.is_available()
    # With bf16=True accelerate wraps the forward in autocast, and the engine runs unfused and without graphs.
    dtype = torch.bfloat16 if has_gpu else torch.float32
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype, attn_implementation="paged_flash")
    hf_paged.patch_generate(model)
    arguments = trl.GRPOConfig(
        output_dir=options.output, per_device_train_batch_size=options.generations, max_steps=options.steps,
        num_generations=options.generations, max_completion_length=options.max_new_tokens, bf16=False,
        use_cpu=not has_gpu, logging_steps=1, report_to=[], save_strategy="no",
    )  # fmt: skip
    trainer = trl.GRPOTrainer(
        model=model,
        reward_funcs=short_lines,
        args=arguments,
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
        processing_class=AutoTokenizer.from_pretrained(options.model, padding_side="left"),
    )
    trainer.train()
    hf_paged.unpatch_generate(model)
    trainer.save_model(options.output)


if __name__ == "__main__":
    main()
