"""A hash of the PTX of every kernel variant, compiled for sm_90 without a GPU: shows whether a change touches kernels.

    python integration_tests/support/ptx_hashes.py                    # print them
    python integration_tests/support/ptx_hashes.py --compare main     # beside those of a commit; exit status 1: others

Lines and files of the source are left out of the PTX, so that a moved or reformatted kernel has the same hash. Variants
are those of ``compile_for_hopper.py``. A comparison runs this script of the other commit, in a worktree of its own.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = Path(__file__).relative_to(ROOT)


def normalised(ptx: str) -> str:
    """PTX without comments and what names the source."""
    lines = (line.split("//")[0].rstrip() for line in ptx.splitlines())
    return "\n".join(line for line in lines if line and not line.lstrip().startswith((".loc", ".file")))


def hashes_of_family(family: str) -> dict[str, list[str]]:
    """Hashes by kernel, in the order of compilation; this process has no GPU afterwards."""
    import compile_for_hopper

    compile_for_hopper.pretend_hopper()
    compile_for_hopper.FAMILIES[family]()
    found: dict[str, list[str]] = {}
    for name, kernel in compile_for_hopper.KERNELS:
        digest = hashlib.sha256(normalised(kernel.asm["ptx"]).encode()).hexdigest()[:16]
        found.setdefault(name, [])
        if digest not in found[name]:
            found[name].append(digest)
    return found


def run(checkout: Path, *arguments: str) -> str:
    """Standard output of this script of a checkout, with that checkout's kernels and no kernel from a cache."""
    with tempfile.TemporaryDirectory() as cache:
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        environment |= {
            "PYTHONPATH": os.pathsep.join([str(checkout), str(checkout / "kernels")]), "TRITON_CACHE_DIR": cache,
            "TRITON_DISABLE_LINE_INFO": "1", "CUDA_VISIBLE_DEVICES": "",
        }  # fmt: skip
        command = [sys.executable, str(checkout / SCRIPT), *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=checkout)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    return done.stdout


def all_hashes(checkout: Path, families: list[str]) -> dict[str, list[str]]:
    """Hashes by family and kernel."""
    return {
        f"{family}/{name}": hashes
        for family in families
        for name, hashes in json.loads(run(checkout, "--family", family)).items()
    }


def differences(old: dict[str, list[str]], new: dict[str, list[str]]) -> list[str]:
    """A line for each kernel that is not the same in both."""
    lines = []
    for name in sorted(old.keys() | new.keys()):
        before, after = old.get(name, []), new.get(name, [])
        if before != after:
            gone, added = len(set(before) - set(after)), len(set(after) - set(before))
            lines.append(f"{name}: {gone} of {len(before)} variants are gone, {added} of {len(after)} are new")
    return lines


def main() -> int:
    """The command line."""
    families = ["attention", "quantised", "linear", "small", "sampling"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compare", metavar="COMMIT", help="a commit that has this script (default: none)")
    parser.add_argument("--only", nargs="+", choices=families, default=families, help="families (default: all)")
    parser.add_argument("--family", choices=families, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.family:
        print(json.dumps(hashes_of_family(options.family)))
        return 0
    new = all_hashes(ROOT, options.only)
    if options.compare is None:
        for name, hashes in sorted(new.items()):
            print(f"{name:40} {' '.join(hashes)}")
        return 0
    with tempfile.TemporaryDirectory() as folder:
        checkout = Path(folder) / "checkout"
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "-q", "--detach", str(checkout), options.compare], check=True)
        try:
            if not (checkout / SCRIPT).is_file():
                parser.error(f"--compare {options.compare!r}: that commit has no {SCRIPT}")
            old = all_hashes(checkout, options.only)
        finally:
            subprocess.run([*git, "remove", "--force", str(checkout)], check=True)
    found = differences(old, new)
    print("\n".join(found) or f"the same PTX: {sum(map(len, new.values()))} variants of {len(new)} kernels")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
