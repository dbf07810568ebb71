"""Answers for the prompts of a file of JSON lines ({"prompt": ...}), by a pool of Ray actors with an engine each.

    pip install "ray[data]"
    python examples/ray_data.py --model PATH --input prompts.jsonl --output answers --actors 2 --gpus 1
"""

import argparse
from typing import Any

import ray
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import hf_paged


class Generate:
    """An actor. Ray gives it several batches at a time, so that the engine is full between two of them too."""

    def __init__(self, name: str, max_new_tokens: int) -> None:
        device = "cuda" if torch.cuda.is_available() else "cpu"  # Ray shows an actor its own GPUs only
        model = AutoModelForCausalLM.from_pretrained(name, dtype="auto").to(device)
        self.tokenizer = AutoTokenizer.from_pretrained(name)
        self.config = GenerationConfig(max_new_tokens=max_new_tokens, do_sample=False)
        self.engine = hf_paged.Engine(model)

    async def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Answers of one batch."""
        prompts = self.tokenizer([str(prompt) for prompt in batch["prompt"]]).input_ids
        handles = [self.engine.submit(prompt, generation_config=self.config) for prompt in prompts]
        outputs = [await handle.result_async() for handle in handles]
        return batch | {
            "answer": [self.tokenizer.decode(output.token_ids, skip_special_tokens=True) for output in outputs],
            "error": ["" if output.error is None else str(output.error) for output in outputs],
        }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or hub id")
    parser.add_argument("--input", required=True, help="JSON lines with a prompt each")
    parser.add_argument("--output", required=True, help="folder for JSON lines")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="default: 128")
    parser.add_argument("--actors", type=int, default=1, help="engines (default: 1)")
    parser.add_argument("--gpus", type=float, default=0, help="of each actor (default: 0)")
    parser.add_argument("--batch-size", type=int, default=64, help="Ray gives an actor four of them (default: 64)")
    options = parser.parse_args()
    answers = ray.data.read_json(options.input, lines=True, override_num_blocks=4 * options.actors).map_batches(
        Generate, fn_constructor_args=(options.model, options.max_new_tokens), batch_size=options.batch_size,
        compute=ray.data.ActorPoolStrategy(
            size=options.actors, max_tasks_in_flight_per_actor=4, max_concurrent_calls_per_actor=2
        ),
        num_gpus=options.gpus,
    )  # fmt: skip
    answers.write_json(options.output)


if __name__ == "__main__":
    main()
