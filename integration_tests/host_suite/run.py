"""Run transformers' own generation and flash tests with "paged_flash", plain and patched.

    git clone --depth 1 --branch v5.24.0 https://github.com/huggingface/transformers
    python integration_tests/host_suite/run.py transformers --families llama mistral gemma2 gpt_oss

The checkout should be of the installed version; ``pip install parameterized pytest-env`` for its tests. Every test runs
three times: as it is, with "paged_flash" as the default attention, and with patched models too (``plugin.py``). A test
that passes as it is and fails with "paged_flash" is printed, unless :data:`DOCUMENTED` says why; exit status 1 if there
is one. Slow tests, which need the network, do not run.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
FAMILIES = (
    "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "gpt_oss", "phi3", "gpt2", "opt", "gpt_neox", "olmo2",
)  # fmt: skip
SELECTED = (
    "generat or greedy or beam or assisted or prompt_lookup or padding or past_key_values or logits_to_keep or "
    "position_ids or 4d_attention_mask or flash"
)
DOCUMENTED = {
    "dict_output": "output_attentions is refused: there is no attention matrix",
    "attention_outputs": "output_attentions is refused: there is no attention matrix",
    "compilation_all_outputs": "output_attentions is refused: there is no attention matrix",
    "dropout": "attention dropout is refused",
    "static_cache": "transformers' StaticCache is compared with its own DynamicCache layers, by their class",
    "quant_cache": "compares the class of the cache's layers",
    "past_key_values_format": "compares the class and the tensors of the cache's layers",
}
"""Parts of names of tests that fail, and why."""


def run_mode(mode: str, checkout: Path, families: list[str], processes: int, counts: Path) -> dict[str, str]:
    """Outcome by test in one mode."""
    files = [f"tests/models/{family}/test_modeling_{family}.py" for family in families]
    environment = os.environ | {
        "HF_PAGED_HOST_MODE": mode,
        "HF_PAGED_HOST_COUNTS": str(counts),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(HERE), str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]),
    }
    command = [
        sys.executable, "-m", "pytest", *files, "-k", SELECTED, "-p", "plugin", "-q", "-rA", "--no-header", "--tb=line",
        "-n", str(processes), "-p", "no:cacheprovider", "-W", "ignore",
    ]  # fmt: skip
    result = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)
    found = re.findall(r"^(PASSED|FAILED|ERROR|SKIPPED) (\S+::\S+)", result.stdout, re.MULTILINE)
    if not found:
        raise SystemExit(f"no test ran in mode {mode}:\n{result.stdout[-3000:]}\n{result.stderr[-3000:]}")
    (counts.parent / f"{mode}.log").write_text(result.stdout, encoding="utf-8")
    return {test: outcome for outcome, test in found}


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkout", type=Path, help="a checkout of transformers")
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), help="folders of tests/models")
    parser.add_argument("--modes", nargs="+", default=["plain", "patched"], choices=["plain", "patched"])
    parser.add_argument("--processes", type=int, default=2, help="test processes (default: 2)")
    parser.add_argument("--logs", type=Path, help="folder for the output of each mode")
    arguments = parser.parse_args()
    missing = [f for f in arguments.families if not (arguments.checkout / "tests" / "models" / f).is_dir()]
    if missing:
        parser.error(f"{arguments.checkout} has no tests/models/{missing[0]}: pass a checkout of transformers.")
    failures = 0
    with tempfile.TemporaryDirectory() as folder:
        logs = arguments.logs or Path(folder)
        logs.mkdir(parents=True, exist_ok=True)
        baseline = run_mode("baseline", arguments.checkout, arguments.families, arguments.processes, logs / "none")
        passing = {test for test, outcome in baseline.items() if outcome == "PASSED"}
        for mode in arguments.modes:
            counts = logs / f"{mode}.counts"
            outcomes = run_mode(mode, arguments.checkout, arguments.families, arguments.processes, counts)
            failed = sorted(test for test, outcome in outcomes.items() if outcome in ("FAILED", "ERROR"))
            lost = [test for test in failed if test in passing or test not in baseline]
            reasons = {test: next((why for part, why in DOCUMENTED.items() if part in test), None) for test in lost}
            new = [test for test in lost if reasons[test] is None]
            num_compared = sum(map(int, counts.read_text().split())) if counts.exists() else 0
            print(
                f"{mode}: {len(passing)} pass as they are; {sum(o == 'PASSED' for o in outcomes.values())} pass with "
                f"paged_flash, {len(lost) - len(new)} fail for a documented reason, {len(new)} fail; "
                f"{num_compared} calls of generate() compared with eager"
            )
            for test in new:
                print(f"  {test}")
            failures += len(new)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
