"""Run transformers' own generation and flash tests with "paged_flash", plain and patched.

    git clone --depth 1 --branch v5.24.0 https://github.com/huggingface/transformers
    python integration_tests/host_suite/run.py transformers --families llama mistral gemma2 gpt_oss

The checkout should be of the installed version (drop from its tests what another version cannot import); ``pip install
parameterized pytest-env timeout-decorator`` for its tests. Every test runs three times: as it is, with "paged_flash" as
the default attention, and with patched models too (``plugin.py``). A test that passes as it is and fails with
"paged_flash" is printed, unless :data:`DOCUMENTED` says why; exit status 1 if there is one. Slow tests, which need the
network, do not run. ``--output`` writes the counts as Markdown.
"""

import argparse
import datetime
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import version
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
    "compile_model_forward_fullgraph": "counts compilations with dynamic=False: a 2D mask grows with each token, with "
    'any attention called "flash", for which transformers itself takes back fullgraph',
}
"""Parts of names of tests that fail, and why."""


def run_mode(mode: str, checkout: Path, families: list[str], processes: int, logs: Path) -> tuple[dict[str, str], int]:
    """Outcome by test in one mode, and the number of calls that were compared with eager's."""
    counts = logs / f"{mode}.counts"
    counts.unlink(missing_ok=True)
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
    (logs / f"{mode}.log").write_text(result.stdout, encoding="utf-8")
    num_compared = sum(map(int, counts.read_text().split())) if counts.exists() else 0
    return {test: outcome for outcome, test in found}, num_compared


@dataclass(frozen=True, slots=True)
class Mode:
    """What the tests gave in one mode, beside what they give as they are."""

    name: str
    passed: list[str]
    documented: dict[str, str]
    """Why by test: a key of :data:`DOCUMENTED`."""
    failed: list[str]
    num_compared: int
    """Calls of ``generate()`` whose tokens were compared with eager's."""


def compare(name: str, baseline: dict[str, str], outcomes: dict[str, str], num_compared: int) -> Mode:
    """Sort the tests of one mode: those that fail in the baseline too are left out, and one that is skipped is lost."""
    passed = [test for test, outcome in outcomes.items() if outcome == "PASSED"]
    ran = [test for test in baseline | outcomes if baseline.get(test, "PASSED") == "PASSED"]
    lost = [test for test in ran if outcomes.get(test) != "PASSED"]
    reasons = {test: next((part for part in DOCUMENTED if part in test), None) for test in lost}
    documented = {test: part for test, part in reasons.items() if part}
    return Mode(name, passed, documented, sorted(set(lost) - set(documented)), num_compared)


def render(checkout: Path, passing: set[str], modes: list[Mode], families: list[str]) -> str:
    """Counts by family and the exceptions, as Markdown."""

    def count(tests: Iterable[str], family: str) -> int:
        return sum(f"/{family}/" in test for test in tests)

    head = ["family", "as they are", *(f"{mode.name}: {x}" for mode in modes for x in ("pass", "documented", "fail"))]
    rows = [
        [
            family,
            count(passing, family),
            *(count(tests, family) for mode in modes for tests in (mode.passed, mode.documented, mode.failed)),
        ]
        for family in families
    ]
    rows.append(["all", *(sum(column) for column in list(zip(*rows))[1:])])
    met = Counter(part for mode in modes for part in mode.documented.values())
    of_tests = re.search(r'__version__ = "(.+)"', (checkout / "src" / "transformers" / "__init__.py").read_text())
    command = f"run.py CHECKOUT --families {' '.join(families)}"
    packages = ", ".join(f"{name} {version(name)}" for name in ("transformers", "torch", "triton"))
    return "\n".join(
        [
            '# transformers\' own tests with "paged_flash"',
            "",
            f"{datetime.date.today()}, {packages}, Python {platform.python_version()}, CPU. The tests are those of",
            f"transformers {of_tests[1] if of_tests else 'of an unknown version'}. Written by",
            f"`python integration_tests/host_suite/{command}`.",
            "",
            'Tests of generation, caches, masks and flash attention, as they are, with "paged_flash" as the default',
            "attention (plain), and with patched models too (patched). What fails as it is is left out. In the last",
            "two every deterministic `generate()` of a float32 model must also give the tokens of eager attention:",
            " and ".join(f"{mode.num_compared} calls {mode.name}" for mode in modes) + ".",
            "",
            *("| " + " | ".join(map(str, row)) + " |" for row in (head, ["---"] * len(head), *rows)),
            "",
            "Documented exceptions, by a part of the test's name:",
            "",
            *(f"- `{part}` ({met[part]} tests): {DOCUMENTED[part]}." for part in DOCUMENTED if met[part]),
            *(["", "Failed:", ""] if any(mode.failed for mode in modes) else []),
            *(f"- {mode.name}: `{test}`" for mode in modes for test in mode.failed),
            "",
        ]
    )


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkout", type=Path, help="a checkout of transformers")
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), help="folders of tests/models")
    parser.add_argument("--modes", nargs="+", default=["plain", "patched"], choices=["plain", "patched"])
    parser.add_argument("--processes", type=int, default=2, help="test processes (default: 2)")
    parser.add_argument("--logs", type=Path, help="folder for the output of each mode")
    parser.add_argument("--output", type=Path, help="Markdown file for the counts by family and the exceptions")
    arguments = parser.parse_args()
    missing = [f for f in arguments.families if not (arguments.checkout / "tests" / "models" / f).is_dir()]
    if missing:
        parser.error(f"{arguments.checkout} has no tests/models/{missing[0]}: pass a checkout of transformers.")
    modes = []
    with tempfile.TemporaryDirectory() as folder:
        logs = arguments.logs or Path(folder)
        logs.mkdir(parents=True, exist_ok=True)
        baseline, _ = run_mode("baseline", arguments.checkout, arguments.families, arguments.processes, logs)
        passing = {test for test, outcome in baseline.items() if outcome == "PASSED"}
        silent = [family for family in arguments.families if not any(f"/{family}/" in test for test in passing)]
        if silent:
            parser.error(f"no test of {silent[0]} passes as it is: see baseline.log in the folder of --logs.")
        for name in arguments.modes:
            outcomes, num_compared = run_mode(name, arguments.checkout, arguments.families, arguments.processes, logs)
            mode = compare(name, baseline, outcomes, num_compared)
            print(
                f"{name}: {len(passing)} pass as they are; {len(mode.passed)} pass with paged_flash, "
                f"{len(mode.documented)} fail for a documented reason, {len(mode.failed)} fail; "
                f"{num_compared} calls of generate() compared with eager",
                *(f"  {test}" for test in mode.failed),
                sep="\n",
                flush=True,
            )
            modes.append(mode)
    if arguments.output:
        arguments.output.write_text(render(arguments.checkout, passing, modes, arguments.families), encoding="utf-8")
    return 1 if any(mode.failed for mode in modes) else 0


if __name__ == "__main__":
    sys.exit(main())
