"""lm-evaluation-harness from Python: a task's scores with the engine.

    python examples/evaluate.py --model gpt2 --tasks arc_easy --limit 100
"""

import argparse

import lm_eval
import torch
from lm_eval.tasks import TaskManager

from hf_paged.lm_eval_model import PagedLM


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or hub id")
    parser.add_argument("--tasks", nargs="+", required=True, help="names of tasks")
    parser.add_argument("--include-path", help="folder with tasks of your own (default: none)")
    parser.add_argument("--limit", type=int, help="documents of a task (default: all)")
    parser.add_argument("--dtype", default="auto", help="of the weights (default: auto)")
    options = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = PagedLM(options.model, dtype=options.dtype, device=device, max_num_seqs=128)
    results = lm_eval.simple_evaluate(
        model=model,
        tasks=options.tasks,
        task_manager=TaskManager(include_path=options.include_path),
        limit=options.limit,
        bootstrap_iters=0,
    )
    for task, scores in results["results"].items():
        for name, value in scores.items():
            if isinstance(value, float):
                print(f"{task}  {name}  {value:.4f}")


if __name__ == "__main__":
    main()
