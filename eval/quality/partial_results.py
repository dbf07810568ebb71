"""Results of a run that is not finished, on disk, so that `--resume` goes on where it was stopped.

One file for each process, `OUTPUT.partial-RANK.jsonl`: its first line says what is being measured, each further one
holds the figures of one batch. Floats are written with all their digits: a resumed run has the same bits, but on the
path "engine", where the windows that are left share steps with fewer others and agree up to rounding.

`OUTPUT.lock` is held while a run is under way, so that no other writes to the same files.
"""

import fcntl
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from eval.quality.processes import Processes


class PartialResults:
    """Figures by run and batch, kept in files beside `output`.

    Args:
        output: the file that the finished report goes to.
        settings: what is measured, as JSON; a file with other settings is refused.
        resume: take over what an earlier run of these settings left; False: forget it.
        processes: the processes of this run; each writes its own file, and all read all files.

    Raises:
        ValueError: `resume`, and the files there are of other settings; or another run of this output is under way.
    """

    def __init__(self, output: Path, settings: Mapping[str, Any], *, resume: bool, processes: Processes) -> None:
        self._output, self._processes = output, processes
        output.parent.mkdir(parents=True, exist_ok=True)
        self._lock = _locked(output.with_name(f"{output.name}.lock")) if processes.is_main else None
        self._settings = json.loads(json.dumps(dict(settings)))
        self._known: dict[tuple[str, int], Any] = {}
        files = self._files()
        if resume:
            for path in files:
                self._read(path)
        self._barrier()
        if not resume and processes.is_main:
            self._remove(files)
        self._barrier()
        self._file = self._path(processes.rank).open("w", encoding="utf-8")
        self._write(self._settings)
        # What was read is written again: files of more processes than there are now need not be kept.
        for (run, batch), figures in sorted(self._known.items()):
            if batch % processes.count == processes.rank:
                self._write({"run": run, "batch": batch, "figures": figures})
        self._barrier()
        if processes.is_main:
            self._remove([path for path in self._files() if self._rank(path) >= processes.count])

    def get(self, run: str, batch: int) -> Any | None:
        """Figures of a batch that is done, else None."""
        return self._known.get((run, batch))

    def put(self, run: str, batch: int, figures: Any) -> None:
        """Keep the figures of a batch: JSON."""
        self._known[run, batch] = figures
        self._write({"run": run, "batch": batch, "figures": figures})

    def close(self, *, finished: bool) -> None:
        """Close the file; with `finished`, all files are removed."""
        self._file.close()
        if finished:
            self._barrier()
            if self._processes.is_main:
                self._remove(self._files())
        if self._lock is not None:
            self._remove([self._output.with_name(f"{self._output.name}.lock")])
            self._lock.close()

    def _path(self, rank: int) -> Path:
        return self._output.with_name(f"{self._output.name}.partial-{rank}.jsonl")

    def _files(self) -> list[Path]:
        return sorted(self._output.parent.glob(f"{self._output.name}.partial-*.jsonl"))

    @staticmethod
    def _rank(path: Path) -> int:
        return int(path.name.rsplit("-", 1)[1].removesuffix(".jsonl"))

    @staticmethod
    def _remove(files: list[Path]) -> None:
        for path in files:
            path.unlink(missing_ok=True)

    def _read(self, path: Path) -> None:
        lines = path.read_text(encoding="utf-8").split("\n")
        records = []
        for line in lines:
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                break  # the run was stopped while it wrote this line
        if not records:
            return
        if records[0] != self._settings:
            changed = sorted(
                name
                for name in records[0].keys() | self._settings.keys()
                if records[0].get(name) != self._settings.get(name)
            )
            first = changed[0]
            raise ValueError(
                f"resume (--resume): {str(path)!r} was written with {first}={records[0].get(first)!r}, now it is "
                f"{self._settings.get(first)!r} (different: {', '.join(changed)}); pass the same arguments, another "
                "--output, or leave out --resume to start again"
            )
        for record in records[1:]:
            self._known[record["run"], record["batch"]] = record["figures"]

    def _write(self, record: Any) -> None:
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def _barrier(self) -> None:
        self._processes.gather([None])


def _locked(path: Path) -> TextIO:
    """The lock file, held until it is closed; the system lets go of it when the process ends, however it does.

    Raises:
        ValueError: another process holds it.
    """
    while True:
        file = path.open("w", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.close()
            raise ValueError(
                f"output (--output) {str(path).removesuffix('.lock')!r}: another run writes it at the moment; wait for "
                "it, or pass another --output"
            ) from error
        # A run that ended meanwhile has removed the file that is held now: take the one that stands there.
        if path.exists() and path.stat().st_ino == os.fstat(file.fileno()).st_ino:
            return file
        file.close()
