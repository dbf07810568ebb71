"""Run the host-facing tests on other versions of transformers, torch and triton, each in an environment of its own.

    python integration_tests/support/versions.py                          # every version of VERSIONS, and the table
    python integration_tests/support/versions.py --only oldest            # what CI runs; what else has run is kept
    python integration_tests/support/versions.py --transformers 5.25.0    # the drill for a release: CONTRIBUTING.md

Each environment is made once, in ``--environments``; what its tests gave last is kept there, and the table is written
once every version of VERSIONS has run. Exit status 1: a test failed or a version cannot be installed.
"""

import argparse
import datetime
import json
import os
import platform
import re
import subprocess
import sys
import time
import venv
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).parents[2]
TABLE = ROOT / "eval" / "results" / "versions.md"

TORCH = "2.13.0"
VERSIONS = {
    "oldest": {"transformers": "5.17.0", "torch": TORCH, "triton": "3.6.0"},
    **{
        f"transformers {version}": {"transformers": version, "torch": TORCH, "triton": "3.7.1"}
        for version in ("5.18.0", "5.19.0", "5.20.2", "5.21.1", "5.22.2", "5.23.0", "5.24.0")
    },
    "newest triton": {"transformers": "5.24.0", "torch": TORCH, "triton": "3.9.0"},
    "newest": {"transformers": "5.24.0", "torch": "2.14.1", "triton": "3.8.0"},
}
"""What is run: the newest release of each minor version of transformers, the oldest and newest torch and triton.

torch 2.11, the oldest that is supported, has no build for CPUs on the package index: tests on a GPU run on it.
"""

PARITY = "integration_tests/models/test_parity.py::test_generates_the_tokens_of_eager_or_refuses_clearly"
FAMILIES = ("llama", "qwen3", "mistral", "gemma3_text", "gpt_oss", "phi3", "gpt2", "deepseek_v3")
HOST_TESTS = (
    "integration_tests/models/test_transformers_internals.py",
    *(f"{PARITY}[{family}]" for family in FAMILIES),
    "integration_tests/models/test_generate_batch.py",
    "integration_tests/cache/test_paged_cache.py",
    "integration_tests/generation",
    "integration_tests/engine/test_clients.py",
    "integration_tests/engine/test_fusion.py",
)
"""Tests of what rests on transformers: names, parity, its batching, the cache, patched generate(), clients, fusion."""


@dataclass(frozen=True, slots=True)
class Run:
    """What the tests gave on one set of versions; counts are None where it could not be installed."""

    name: str
    versions: dict[str, str]
    passed: int | None
    failed: int | None
    skipped: int | None
    seconds: float
    date: str
    failures: list[str] = field(default_factory=list)

    @property
    def is_right(self) -> bool:
        """Whether tests ran and none failed."""
        return bool(self.passed) and self.failed == 0


def make_environment(folder: Path, versions: dict[str, str]) -> Path:
    """The Python of an environment with these versions and this checkout, made where it is not there yet.

    Raises:
        subprocess.CalledProcessError: pip could not install them.
    """
    python = folder / "bin" / "python"
    done = folder / ".complete"
    if not done.exists():
        venv.create(folder, with_pip=True, clear=True)
        pip = [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
        subprocess.run([*pip, f"torch=={versions['torch']}", f"transformers=={versions['transformers']}"], check=True)
        subprocess.run([*pip, "-e", f"{ROOT}[test]", "accelerate"], check=True)
        # Last and alone: torch names the one triton that it was built with.
        subprocess.run([*pip, "--no-deps", f"triton=={versions['triton']}"], check=True)
        done.touch()
    return python


def run_tests(name: str, versions: dict[str, str], folder: Path, processes: int) -> Run:
    """Install one set of versions and run :data:`HOST_TESTS` there."""
    start, today = time.monotonic(), str(datetime.date.today())
    print(f"\n=== {name}: {versions}", flush=True)
    try:
        python = make_environment(folder / "-".join(versions.values()), versions)
    except subprocess.CalledProcessError as error:
        print(f"cannot be installed: {error}", flush=True)
        return Run(name, versions, None, None, None, time.monotonic() - start, today)
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        # An environment may have been made for another checkout: this one is tested.
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]),
    }
    command = [str(python), "-m", "pytest", "-q", "-n", str(processes), "-p", "no:cacheprovider", *HOST_TESTS]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|skipped|error)", result.stdout)}
    failed = counts.get("failed", 0) + counts.get("error", 0)
    if result.returncode != 0:
        print(result.stdout[-6000:], result.stderr[-2000:], flush=True)
        failed = failed or 1
    seconds = time.monotonic() - start
    failures = re.findall(r"^(?:FAILED|ERROR) (\S+)", result.stdout, re.MULTILINE)
    run = Run(name, versions, counts.get("passed", 0), failed, counts.get("skipped", 0), seconds, today, failures)
    print(f"{run.passed} passed, {run.failed} failed, {run.skipped} skipped in {run.seconds:.0f} s", flush=True)
    return run


def keep(runs: list[Run], file: Path) -> list[Run]:
    """Put runs among those of earlier calls; all of VERSIONS in its order, without counts where there is no run."""
    kept = {row["name"]: Run(**row) for row in json.loads(file.read_text())} if file.exists() else {}
    kept |= {run.name: run for run in runs}
    file.write_text(json.dumps([asdict(run) for run in kept.values()], indent=1), encoding="utf-8")
    not_run = {name: Run(name, versions, None, None, None, 0.0, "") for name, versions in VERSIONS.items()}
    return [
        kept[name] if name in kept and kept[name].versions == run.versions else run for name, run in not_run.items()
    ]


def absent(run: Run) -> str:
    """Why there are no counts."""
    return "not installed" if run.date else "not run"


def render(runs: list[Run]) -> str:
    """The table as Markdown."""
    rows = [
        f"| {run.versions['transformers']} | {run.versions['torch']} | {run.versions['triton']} | "
        + (f"{run.passed} | {run.failed} | {run.skipped} |" if run.passed is not None else f"{absent(run)} | | |")
        for run in runs
    ]
    families = ", ".join(FAMILIES)
    return "\n".join(
        [
            "# The host-facing tests on other versions",
            "",
            f"`make versions`, {max(run.date for run in runs)}, Python {platform.python_version()}, CPU. Private names "
            f"of transformers, parity of {families}, `generate_batch`, PagedCache, `patch_generate`, clients, fusion. "
            "Skipped: tests that need a GPU or a client that is not installed.",
            "",
            "| transformers | torch | triton | passed | failed | skipped |",
            "|---|---|---|---|---|---|",
            *rows,
            "",
            *(f"- {run.name} fails: `{test}`\n" for run in runs for test in run.failures),
        ]
    )


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=list(VERSIONS), help="some of the sets of versions, by name")
    parser.add_argument("--transformers", help="try one release of transformers, with the newest torch and triton here")
    parser.add_argument("--torch", default=TORCH, help=f"with --transformers (default: {TORCH})")
    parser.add_argument("--triton", default="3.7.1", help="with --transformers (default: 3.7.1)")
    parser.add_argument("--environments", type=Path, default=ROOT / ".versions", help="folder of the environments")
    parser.add_argument("--processes", type=int, default=2, help="test processes (default: 2)")
    arguments = parser.parse_args()
    sets = {name: VERSIONS[name] for name in arguments.only or VERSIONS}
    if arguments.transformers:
        given = {"transformers": arguments.transformers, "torch": arguments.torch, "triton": arguments.triton}
        sets = {f"transformers {arguments.transformers}": given}
    runs, kept = [], []
    for name, versions in tqdm(sets.items(), unit="environment", disable=len(sets) == 1):
        runs.append(run_tests(name, versions, arguments.environments, arguments.processes))
        kept = keep(runs, arguments.environments / "runs.json")
    print(f"\n{render(runs)}")
    if all(run.date for run in kept):
        TABLE.write_text(render(kept), encoding="utf-8")
    # The plain line that test runners close with.
    print(f"{sum(run.passed or 0 for run in runs)} passed, {sum(run.failed or 0 for run in runs)} failed")
    return 0 if all(run.is_right for run in runs) else 1


if __name__ == "__main__":
    sys.exit(main())
