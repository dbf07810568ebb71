"""Datasets by the names papers call them, with the preprocessing that published figures use.

| name | dataset of the hub, split | preprocessing |
|---|---|---|
| `wikitext-2`, `wikitext-103` | Salesforce/wikitext, test | rows joined by two newlines (empty rows kept) |
| `wikitext-2-documents` | EleutherAI/wikitext_document_level, test | a document each, detokenised after counting |
| `c4` | allenai/c4, en, first validation shard | the first 1100 rows joined by a space; 256 windows are used of them |
| `pg19` | emozilla/pg19-test, test | a book each; joined by two newlines where documents are not kept apart |
| `lambada` | EleutherAI/lambada_openai, test | a passage each; for `--convention last-word` |

`name@path` takes the rows from a local file or folder instead of the hub, with the same preprocessing.

Sources: https://github.com/IST-DASLab/gptq (`datautils.py`: wikitext-2, c4) and
https://github.com/EleutherAI/lm-evaluation-harness (tasks `wikitext`, `lambada_openai`).
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

DETOKENIZE: tuple[tuple[str, str], ...] = (
    # possessives and quoted years
    (r"s '", "s'"), (r"/' [0-9]/", r"/'[0-9]/"),
    # separators inside numbers and compounds
    (r" @-@ ", "-"), (r" @,@ ", ","), (r" @\.@ ", "."),
    # punctuation
    (r" : ", ": "), (r" ; ", "; "), (r" \. ", ". "), (r" ! ", "! "), (r" \? ", "? "), (r" , ", ", "),
    # brackets and quotes
    (r"\(\s*([^\)]*?)\s*\)", r"(\1)"), (r"\[\s*([^\]]*?)\s*\]", r"[\1]"), (r"{\s*([^}]*?)\s*}", r"{\1}"),
    (r"\"\s*([^\"]*?)\s*\"", r'"\1"'), (r"'\s*([^']*?)\s*'", r"'\1'"),
    # headings and the rest
    (r"= = = =", "===="), (r"= = =", "==="), (r"= =", "=="), (r" ° ", "°"), (r" \n", "\n"), (r"\n ", "\n"),
    (r" N ", " 1 "), (r" 's", "'s"),
)  # fmt: skip
"""What the task `wikitext` of lm-evaluation-harness (version 2) replaces, in its order: pattern, replacement."""


def detokenize_wikitext(document: str) -> str:
    """A WikiText document as ordinary text."""
    for pattern, replacement in DETOKENIZE:
        document = re.sub(pattern, replacement, document)
    return document


@dataclass(frozen=True, slots=True)
class NamedData:
    """A dataset of the hub and its conventional preprocessing.

    Attributes:
        repository, config, split: of the hub; `config` None: the default.
        column: with the text.
        data_files: the files to read, where not all of a config's are wanted.
        separator: between rows, where they make one text.
        max_rows: how many rows are used, None: all.
        max_windows: how many windows are used, None: all.
        transform: from a row to what is scored; words and bytes are counted before.
    """

    repository: str
    config: str | None
    split: str
    column: str = "text"
    data_files: str | None = None
    separator: str = "\n\n"
    max_rows: int | None = None
    max_windows: int | None = None
    transform: Callable[[str], str] | None = None


NAMED_DATA = {
    "wikitext-2": NamedData("Salesforce/wikitext", "wikitext-2-raw-v1", "test"),
    "wikitext-103": NamedData("Salesforce/wikitext", "wikitext-103-raw-v1", "test"),
    "wikitext-2-documents": NamedData(
        "EleutherAI/wikitext_document_level", "wikitext-2-raw-v1", "test", column="page", transform=detokenize_wikitext
    ),
    "c4": NamedData(
        "allenai/c4", None, "validation", data_files="en/c4-validation.00000-of-00008.json.gz", separator=" ",
        max_rows=1100, max_windows=256,
    ),
    "pg19": NamedData("emozilla/pg19-test", None, "test"),
    "lambada": NamedData("EleutherAI/lambada_openai", "default", "test"),
}  # fmt: skip
