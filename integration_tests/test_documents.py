"""Every code block of the README and the documentation runs, and every link between pages leads somewhere.

A block that is not run has a comment before it that says why: ``<!-- not run: downloads a model -->``. Python blocks of
a page run in order and share their names; those of the README each run alone, as they may be pasted alone.
"""

import ast
import importlib
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from eval import command_line
from hf_paged import cli
from integration_tests.support.host import CACHE

ROOT = Path(__file__).resolve().parent.parent
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
BLOCK = re.compile(r"(?:^<!-- (?P<mark>.+?) -->\n)?^```(?P<language>\w*)\n(?P<code>.*?)^```$", re.M | re.S)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
CI_COMMAND = "tests"
"""The mark of the block that ``.ci/run`` runs: the test suite itself."""


@dataclass(frozen=True)
class Block:
    """One fenced block."""

    page: Path
    line: int
    mark: str | None
    language: str
    code: str

    @property
    def name(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def is_run(self) -> bool:
        return self.mark is None


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    assert text.count("```") % 2 == 0, f"{page} has a block that does not end"
    found = [
        Block(page, text[: match.start("code")].count("\n") + 1, match["mark"], match["language"], match["code"])
        for match in BLOCK.finditer(text)
    ]
    assert len(found) == text.count("```") // 2, f"{page} has a block that this test does not see"
    return found


BLOCKS = [block for page in PAGES for block in blocks_of(page)]
RUN = {language: [b for b in BLOCKS if b.is_run and b.language == language] for language in ("python", "bash")}
README = ROOT / "README.md"


def run_python(blocks: list[Block]) -> None:
    """Run Python blocks that share their names; a traceback shows the page and its line."""
    names = {"__name__": "document"}
    for block in blocks:
        # The quickstart says what transformers before 5.24 calls the cache.
        source = "\n" * (block.line - 1) + block.code.replace("cache=cache", f"{CACHE}=cache")
        exec(compile(source, str(block.page.relative_to(ROOT)), "exec"), names)


def test_blocks_were_found():
    assert len(BLOCKS) > 30
    assert sum(block.mark == CI_COMMAND for block in BLOCKS) == 1


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.name)
def test_a_block_says_what_it_is(block):
    assert block.language in ("python", "bash", "text"), "text is for what is no code"
    if block.mark is not None:
        assert block.mark == CI_COMMAND or re.match(r"not run: .{10,}", block.mark)
    if block.mark == CI_COMMAND:
        assert block.page.name == "README.md"


@pytest.mark.parametrize(
    "page", sorted({block.page for block in RUN["python"]} - {README}), ids=lambda page: page.stem
)  # fmt: skip
def test_the_python_blocks_of_a_page_run(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    run_python([block for block in RUN["python"] if block.page == page])


@pytest.mark.parametrize("block", [b for b in RUN["python"] if b.page == README], ids=lambda block: block.name)
def test_each_python_block_of_the_readme_runs_alone(block, monkeypatch):
    monkeypatch.chdir(ROOT)
    run_python([block])


def commands_of(block: Block) -> list[list[str]]:
    """The words of each command of a block, without comments."""
    lines = block.code.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


@pytest.mark.parametrize("block", RUN["bash"], ids=lambda block: block.name)
def test_a_bash_block_runs(block, monkeypatch):
    """In this process: a new one would spend its time on imports."""
    monkeypatch.chdir(ROOT)
    for words in commands_of(block):
        if words[0] == "hf-paged":
            main, arguments = cli.main, words
        else:
            assert words[:2] == ["python", "-m"], f"{block.name}: only hf-paged and python -m eval.X are run here"
            main, arguments = importlib.import_module(words[2]).main, words[2:]
        monkeypatch.setattr(sys, "argv", arguments)
        with pytest.raises(SystemExit) as ended:
            command_line.run(main)
        assert ended.value.code == 0, f"{block.name}: {' '.join(words)}"


def test_the_documentation_builds(tmp_path):
    """Without a warning: every page is reached, every link leads somewhere, every docstring is read."""
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-d", str(tmp_path)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    api = (tmp_path / "api.html").read_text("utf-8")
    for name in ("cached_tokens", "finish_reason", "timeout_s", "drain", "progress"):
        assert name in api


def anchors(page: Path) -> set[str]:
    """The names that headings of a page have in links."""
    lines = re.sub(r"^ *```.*?^ *```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S).splitlines()
    titles = [line.lstrip("# ") for line in lines if line.startswith("#")]
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = re.sub(r"^ *```.*?^ *```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    for target in LINK.findall(text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), f"{target} in {page.name}"
        assert there.is_relative_to(ROOT), f"{target} in {page.name} leaves the repository"
        if anchor:
            assert anchor in anchors(there), f"{target} in {page.name}: no such heading"


def test_the_readme_is_short():
    assert len(README.read_text(encoding="utf-8").split()) <= 900


def test_the_demo_ends_with_its_verdict(monkeypatch, capsys):
    from eval import demo

    monkeypatch.setattr(sys, "argv", ["demo", "--tokens", "100", "--max-new-tokens", "4"])
    assert demo.main() == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("PASS: paged_flash and its pages agree with eager")


@pytest.mark.parametrize(("perplexities", "word"), [([16.0, 16.0, 16.01], "FAIL"), ([16.0, float("nan")], "FAIL")])
def test_the_demo_sees_a_difference(perplexities, word):
    from eval import demo

    passed, line = demo.verdict(perplexities)
    assert not passed
    assert line.startswith(word)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_a_page_names_are_there(page):
    folders = "hf_paged|kernels|eval|integration_tests|examples|docs"
    named = re.findall(rf"`((?:{folders})/[\w./-]+)`", page.read_text("utf-8"))
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_pages_count_the_families_as_the_list_does():
    support = (ROOT / "eval" / "results" / "model_support.md").read_text("utf-8")
    works, refused = (re.search(rf"^## {title} \((\d+)\)", support, re.M)[1] for title in ("Works", "Refused"))
    said = {
        "README.md": (rf"\[{refused} families that are refused\]", rf"\({works} run\)"),
        "CHANGELOG.md": (rf"\b{works} of transformers' causal LM families run, {refused} are refused",),
        "docs/support.md": (rf"\b{works} families give eager's", rf"\b{refused}\b"),
    }
    for page, patterns in said.items():
        text = (ROOT / page).read_text("utf-8")
        assert [pattern for pattern in patterns if not re.search(pattern, text)] == [], page


def defined_names(path: Path) -> set[str]:
    """Classes and functions of a file; methods behind their class and a dot."""
    found = set()
    for node in ast.parse(path.read_text("utf-8")).body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{part.name}" for part in node.body if isinstance(part, ast.FunctionDef)}
    return found


def test_names_that_a_page_puts_beside_a_file_are_in_it():
    text = (ROOT / "docs" / "how_it_works.md").read_text("utf-8")
    named = re.findall(r"`((?:hf_paged|kernels)/[\w/]+\.py)` `([\w.]+)`", text)
    assert len(named) > 12
    assert [(path, name) for path, name in named if name not in defined_names(ROOT / path)] == []


def test_every_committed_result_is_in_the_documentation():
    text = (ROOT / "docs" / "performance.md").read_text("utf-8")
    results = [path.relative_to(ROOT).as_posix() for path in (ROOT / "eval" / "results").rglob("*.md")]
    assert [path for path in results if f"](../{path})" not in text] == []


def literals() -> set[str]:
    """Every literal text of the packages: what messages are made of."""
    found = set()
    for folder in ("hf_paged", "kernels"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.add(node.value)
    return found


def test_troubleshooting_quotes_what_the_code_says():
    text = (ROOT / "docs" / "troubleshooting.md").read_text("utf-8")
    rows = re.findall(r"^\| (`.+?`) \| ", text, re.M)
    assert len(rows) > 40
    everything = "\n".join(literals())
    unknown = [
        part
        for row in rows
        for message in re.findall(r"`(.+?)`(?:, |$)", row)
        for part in (piece.strip(" :(),") for piece in message.split("..."))
        if part and part not in everything
    ]
    assert unknown == []
