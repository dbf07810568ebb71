"""What the commands of this folder share: help that shows every default, paths checked first, errors in one line."""

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from hf_paged import UnsupportedModelError

BAD_INPUT = (ValueError, OSError, ImportError, UnsupportedModelError)
"""What commands raise where an argument, a file or an installed package is not fit; the message says which."""


INTERRUPTED = 130
"""The exit status after Ctrl-C, as a shell gives it."""


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The description as it is written, and the default of every option."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text = action.help or ""
        if "default" in text or not action.option_strings or action.default is argparse.SUPPRESS:
            return text
        if action.required:
            return f"{text} (required)"
        if action.default is None or action.default is False or action.default == []:
            return f"{text} (default: {'off' if action.nargs == 0 else 'none'})"
        if isinstance(action.default, (list, tuple)):
            words = " ".join(map(str, action.default)).replace("%", "%%")
            return f"{text} (default: {words})"
        return super()._get_help_string(action)


def make_parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """The parser of ``python -m eval.NAME``."""
    prog = f"python -m eval.{name}"
    return argparse.ArgumentParser(prog=prog, description=description, formatter_class=HelpFormatter)


def input_file(text: str) -> Path:
    """An argparse type: a file that is there."""
    path = Path(text)
    if not path.is_file():
        raise argparse.ArgumentTypeError(f"there is no file {text}")
    return path


def output_file(text: str) -> Path:
    """An argparse type: a path that a file can be written to; its folder may have to be made.

    Told before the work begins, not after it.
    """
    try:
        check_output(Path(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return Path(text)


def output_folder(text: str) -> Path:
    """An argparse type: a folder that is there or can be made."""
    try:
        _check_folder(Path(text), text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return Path(text)


def check_output(path: Path) -> None:
    """Raise ValueError unless a file can be written to `path`; its folder may have to be made."""
    if path.is_dir():
        raise ValueError(f"{str(path)!r} is a folder: pass the path of a file")
    if path.exists() and not path.is_file():
        raise ValueError(f"{str(path)!r} is a device or a pipe: pass the path of a file")
    _check_folder(path.parent, str(path))
    if path.exists() and not os.access(path, os.W_OK):
        raise ValueError(f"{str(path)!r} cannot be written: it is read-only here")


def _check_folder(folder: Path, text: str) -> None:
    nearest = next(path for path in (folder, *folder.parents) if path.exists())
    if not nearest.is_dir():
        raise ValueError(f"{text!r} cannot be made: {str(nearest)!r} is not a folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise ValueError(f"{text!r} cannot be made: the folder {str(nearest)!r} is read-only here")


def write_whole(path: Path, text: str) -> None:
    """Write a text file in one piece: an error or a stop midway leaves the file that was there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    work = path.with_name(path.name + ".new")
    work.write_text(text, encoding="utf-8")
    os.replace(work, path.resolve())


def read_report(path: Path, key: str, made_by: str) -> dict[str, Any]:
    """The JSON object of a report.

    Raises:
        ValueError: the file is no JSON, or has no ``key``, which every report of ``made_by`` has.
    """
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}; pass a file that {made_by} has written") from error
    if not isinstance(report, dict) or key not in report:
        raise ValueError(f"{path} has no {key!r}; pass a file that {made_by} has written")
    return report


def positive_int(text: str) -> int:
    """An argparse type: an integer of at least 1."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1, got {text!r}")
    return number


def run(main: Callable[[], Any]) -> NoReturn:
    """Run a command and end the process: with the status that it returns, or with 2 and one line for a bad input."""
    try:
        status = main()
    except BAD_INPUT as problem:
        print(f"error: {problem}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)
    sys.exit(status if isinstance(status, int) else 0)
