"""Texts to evaluate on: a local file, a local dataset folder, or a dataset of the Hugging Face hub.

`load_text` turns one specification into one string. Rows are joined by two newlines, as the GPTQ code and the
transformers perplexity guide join WikiText, so a text file, a `.jsonl` file and a `.parquet` file with the same rows
give the same string. Empty rows are kept (WikiText-2 has many, and published figures count them). `load_documents`
keeps the rows apart. Datasets with a preprocessing of their own have names: `eval/quality/named_data.py`.

Text and `.jsonl` files need nothing but Python; `.parquet` and `.arrow` need pyarrow, dataset names and folders need
`datasets`.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from eval.loading import did_you_mean
from eval.quality.named_data import NAMED_DATA, NamedData

if TYPE_CHECKING:
    from datasets import Dataset

LONE_SURROGATE = re.compile("[\ud800-\udfff]")
ROW_SEPARATOR = "\n\n"
ACCEPTED_SPECS = (
    "a .txt file (any other ending is read as text too), a .jsonl, .parquet or .arrow file, a dataset folder, "
    f"one of {', '.join(NAMED_DATA)} (with a local copy: name@path), "
    "or name:config:split of a dataset, such as wikitext:wikitext-2-raw-v1:test (name::split without a config)"
)


@dataclass(frozen=True, slots=True)
class Documents:
    """Rows of a dataset.

    Attributes:
        rows: what is scored.
        num_words: runs of characters without white space, counted as lm-eval does (`re.split`), before preprocessing.
        num_bytes: of UTF-8, before preprocessing.
        separator: between rows, where they make one text.
        max_windows: how many windows the data's convention uses, None: all.
    """

    rows: tuple[str, ...]
    num_words: int
    num_bytes: int
    separator: str = ROW_SEPARATOR
    max_windows: int | None = None

    @property
    def text(self) -> str:
        """All rows as one text."""
        return self.separator.join(self.rows)


def load_text(spec: str, text_column: str = "text") -> str:
    """The text that `spec` names, as one string.

    Args:
        spec: what to read, in this order of trial.
            - one of `NAMED_DATA`, or `name@path`, if there is no such path;
            - an existing file: `.jsonl`/`.ndjson` (one JSON object a line), `.parquet`, `.arrow`, or else UTF-8 text as
              it is;
            - an existing folder: written by `Dataset.save_to_disk`, or holding data files that
              `datasets.load_dataset` reads; it must have one split only, else name it as below;
            - `name:config:split`: a dataset of the hub or a folder, with one of its splits; the config may be empty.
              `datasets` fetches all splits of the config.
        text_column: column with the text, for everything but text files. Its rows are joined by two newlines.

    Raises:
        FileNotFoundError: `spec` looks like a path and nothing is there.
        ValueError: unknown form or ending, unreadable or unreachable data, no such split or column, a row that is not a
            string, or an empty text.
        ImportError: the data needs `datasets` or pyarrow, and it is not installed.
    """
    return load_documents(spec, text_column).text


def load_documents(spec: str, text_column: str = "text") -> Documents:
    """As `load_text`, the rows apart; a text file is one row. Arguments and errors: `load_text`."""
    name, _, local = spec.partition("@")
    named = None if Path(spec).exists() else NAMED_DATA.get(name)
    if named is not None:
        column = named.column if text_column == "text" else text_column
        rows = _rows_of(local, column) if local else _read_named(name, named, column)
        rows = rows[: named.max_rows]
    else:
        rows = _rows_of(spec, text_column)
    if not any(row.strip() for row in rows):
        raise ValueError(
            f"spec (--data) {spec!r} gives an empty text: {len(ROW_SEPARATOR.join(rows))} characters in {len(rows)} "
            "rows, none but white space; pass a text"
        )
    num_words = sum(len(re.split(r"\s+", row)) for row in rows)
    num_bytes = sum(len(row.encode()) for row in rows)
    if named is None:
        return Documents(tuple(rows), num_words, num_bytes)
    if named.transform is not None:
        rows = [named.transform(row) for row in rows]
    return Documents(tuple(rows), num_words, num_bytes, named.separator, named.max_windows)


def _rows_of(spec: str, text_column: str) -> list[str]:
    """The rows of a path or of a dataset named by its parts."""
    path = Path(spec)
    if path.is_file():
        return _read_file(path, text_column)
    if path.is_dir():
        return _read_dataset(spec, None, None, text_column)
    if spec.count(":") == 2:
        name, config, split = spec.split(":")
        if not name or not split:
            raise ValueError(f"spec (--data) {spec!r} lacks the {'split' if name else 'name'}; pass {ACCEPTED_SPECS}")
        return _read_dataset(name, config or None, split, text_column)
    if ":" in spec:
        parts = spec.count(":") + 1
        raise ValueError(f"spec (--data) {spec!r} is no existing path and has {parts} parts; pass {ACCEPTED_SPECS}")
    raise FileNotFoundError(
        f"spec (--data) {spec!r}: no such file or folder{did_you_mean(spec, tuple(NAMED_DATA))}; pass {ACCEPTED_SPECS}"
    )


def _read_named(name: str, named: NamedData, text_column: str) -> list[str]:
    dataset = _load_split(named.repository, named.config, named.split, named.data_files, called=name)
    if text_column not in dataset.column_names:
        _refuse_column(text_column, f"{name!r} ({named.repository})", dataset.column_names)
    if named.max_rows is not None:
        dataset = dataset.select(range(min(named.max_rows, len(dataset))))
    return _checked_rows(dataset[text_column], name, text_column)


def _read_file(path: Path, text_column: str) -> list[str]:
    ending = path.suffix.lower()
    if ending in (".parquet", ".arrow"):
        return _read_table(path, text_column)
    if ending == ".json":
        raise ValueError(f"spec (--data) {str(path)!r}: a .json file is neither rows nor text; pass {ACCEPTED_SPECS}")
    try:
        # Bytes, not read_text(): universal newlines would change the text. "utf-8-sig" drops a byte-order mark.
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"spec (--data) {str(path)!r} is not UTF-8 text: {error}; pass {ACCEPTED_SPECS}") from error
    return _read_json_lines(text, path, text_column) if ending in (".jsonl", ".ndjson") else [text]


def _read_json_lines(text: str, path: Path, text_column: str) -> list[str]:
    rows = []
    # Not splitlines(): a JSON string may hold U+2028 and its like unescaped, which splitlines() takes for line ends.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{str(path)!r}, line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"spec (--data) {where} is not JSON: {error}; each line must be an object") from error
        if not isinstance(row, dict):
            raise ValueError(f"spec (--data) {where} is a JSON {type(row).__name__}; each line must be an object")
        if text_column not in row:
            _refuse_column(text_column, where, row)
        rows.append(row[text_column])
    return _checked_rows(rows, str(path), text_column)


def _read_table(path: Path, text_column: str) -> list[str]:
    """A parquet file, or an Arrow file or stream, as `datasets` keeps them."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(f'reading {str(path)!r} needs pyarrow: pip install "hf-paged[eval]"') from error
    kind = path.suffix.lower().removeprefix(".")
    try:
        if kind == "parquet":
            columns = pyarrow.parquet.read_schema(path).names
            table = None
        else:
            table = _read_arrow(path)
            columns = table.column_names
        if text_column not in columns:
            _refuse_column(text_column, repr(str(path)), columns)
        if table is None:
            table = pyarrow.parquet.read_table(path, columns=[text_column])
        rows = table[text_column].to_pylist()
    except pyarrow.ArrowInvalid as error:
        article = "an" if kind == "arrow" else "a"
        raise ValueError(f"spec (--data) {str(path)!r} is not {article} {kind} file: {error}") from error
    return _checked_rows(rows, str(path), text_column)


def _read_arrow(path: Path) -> Any:
    """A pyarrow.Table; `datasets` writes streams, other programs files."""
    import pyarrow

    with path.open("rb") as file:
        is_file = file.read(6) == b"ARROW1"
    with pyarrow.memory_map(str(path)) as source:
        reader = pyarrow.ipc.open_file(source) if is_file else pyarrow.ipc.open_stream(source)
        return reader.read_all()


def _read_dataset(name: str, config: str | None, split: str | None, text_column: str) -> list[str]:
    dataset = _load_split(name, config, split)
    if text_column not in dataset.column_names:
        _refuse_column(text_column, repr(name), dataset.column_names)
    return _checked_rows(dataset[text_column], name, text_column)


def _load_split(
    name: str, config: str | None, split: str | None, data_files: str | None = None, called: str | None = None
) -> "Dataset":
    """One split of a dataset; `split` None means the only split there is. `called`: what the user called it."""
    try:
        import datasets
    except ImportError as error:
        raise ImportError(f'reading the dataset {name!r} needs datasets: pip install "hf-paged[eval]"') from error

    is_saved = any((Path(name) / marker).is_file() for marker in ("state.json", "dataset_dict.json"))
    try:
        loaded = (
            datasets.load_from_disk(name)
            if is_saved
            else datasets.load_dataset(name, config, **({"data_files": {str(split): data_files}} if data_files else {}))
        )
    # load_dataset raises errors of the network, of the hub, of its builders and plain ones, with no common class.
    except Exception as error:
        raise ValueError(
            f"spec (--data){f' {called!r}' if called else ''}: the dataset {name!r} with config {config!r} could not "
            f"be loaded: {type(error).__name__}: {error}; check the name and the network, or pass a local file"
            f"{f' ({called}@path keeps the preprocessing)' if called else ''}: {ACCEPTED_SPECS}"
        ) from error

    if is_saved and config is not None:
        raise ValueError(
            f"spec (--data): {name!r} is a saved dataset, without any config {config!r}; pass {name}::split"
        )
    if isinstance(loaded, datasets.Dataset):
        # Dataset.save_to_disk writes one split.
        if split not in (None, str(loaded.split)):
            raise ValueError(f"spec (--data): {name!r} holds the split {loaded.split} only, not {split!r}; pass {name}")
        return loaded
    if split is None and len(loaded) == 1:
        return next(iter(loaded.values()))
    if split not in loaded:
        raise ValueError(
            f"spec (--data): the dataset {name!r} has the splits {sorted(loaded)}, and {split!r} was asked for; "
            f"pass {name}:{config or ''}:{sorted(loaded)[0]}"
        )
    return loaded[split]


def _checked_rows(rows: Iterable[object], source: str, text_column: str) -> list[str]:
    texts = []
    for index, row in enumerate(rows):
        if not isinstance(row, str):
            raise ValueError(
                f"text_column (--text-column) {text_column!r} of {source!r}: row {index} is {type(row).__name__}, not "
                "a string; name a column that has text in every row"
            )
        if not row.isascii() and (bad := LONE_SURROGATE.search(row)):
            raise ValueError(
                f"text_column (--text-column) {text_column!r} of {source!r} (--data): row {index} holds the lone "
                f"surrogate {bad[0]!a} at character {bad.start()}, half of a character and no text; mend the row"
            )
        texts.append(row)
    return texts


def _refuse_column(text_column: str, where: str, columns: Iterable[str]) -> NoReturn:
    raise ValueError(
        f"text_column (--text-column) {text_column!r} is not in {where}, which has {sorted(columns)}; pass one of these"
    )
