"""The Brown corpus as ordinary text: its files hold a word and a tag at a time, `said/vbd`.

What is undone: tags, spaces before punctuation, the two-character quotes, doubled marks at the end of a sentence.
Single quotes are ambiguous in the source: the first opens, the next closes.
"""

import json
import re
import tarfile
from collections.abc import Iterable
from pathlib import Path

NO_SPACE_BEFORE = frozenset([",", ".", ";", ":", "?", "!", ")", "]", "}", "''", "%"])
NO_SPACE_BEHIND = frozenset(["(", "[", "{", "``", "$"])
DOUBLED = frozenset(["?", "!", ";", ":"])
"""Marks that the corpus writes twice at the end of some sentences."""


def detokenize(tagged: str) -> str:
    """A file of the corpus as text: paragraphs apart by an empty line, without tags."""
    paragraphs: list[list[str]] = []
    is_new = True
    for line in tagged.split("\n"):
        words = line.split()
        if not words:
            is_new = True
            continue
        is_headline = all(word.endswith("-hl") for word in words)
        if is_new or is_headline or line.startswith("\t") or not paragraphs:
            paragraphs.append([])
        is_new = is_headline
        paragraphs[-1] += [word.rsplit("/", 1)[0] for word in words]
    return "\n\n".join(_joined(words) for words in paragraphs)


def _joined(words: Iterable[str]) -> str:
    text, previous, is_quoted = "", "", False
    for word in words:
        if word in DOUBLED and word == previous:
            continue
        shown = {"``": '"', "''": '"'}.get(word, word)
        before = word in NO_SPACE_BEFORE or (word == "'" and is_quoted)
        behind = previous in NO_SPACE_BEHIND or previous == "'("
        text += shown if not text or before or behind else " " + shown
        previous = word
        if word == "'":
            is_quoted = not is_quoted
            previous = "'(" if is_quoted else word
    return text


def write(archive: tarfile.TarFile, folder: Path) -> None:
    """`GENRE.jsonl` for each genre, a text a line, and `all.jsonl`, the genres in turn.

    Args:
        archive: the package, whose `cats.txt` names each file's genre.
        folder: where to.
    """
    members = {Path(member.name).name: member for member in archive.getmembers()}

    def read(name: str) -> str:
        file = archive.extractfile(members[name])
        assert file is not None
        return file.read().decode("latin-1")

    by_genre: dict[str, list[dict[str, str]]] = {}
    for line in read("cats.txt").split("\n"):
        if found := re.fullmatch(r"(c\w\d\d) (\w+)", line.strip()):
            row = {"id": found[1], "genre": found[2], "text": detokenize(read(found[1]))}
            by_genre.setdefault(found[2], []).append(row)
    longest = max(map(len, by_genre.values()))
    mixed = [rows[i] for i in range(longest) for rows in by_genre.values() if i < len(rows)]
    for name, rows in {**by_genre, "all": mixed}.items():
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
