"""Finished chunks, a line each in a file, so that a killed evaluation goes on where it was."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tome_export.errors import InputError
from tome_export.evaluate.records import Record

KEPT_DAYS = 30
"""Age at which what an evaluation left that nobody took up again is deleted."""


class Journal:
    """Records of one evaluation; its file is locked while this is open."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._stream = file.open("a+", encoding="utf-8", errors="replace")
        try:
            fcntl.flock(self._stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.close()
            raise InputError(
                "the same evaluation is running already; wait for it to end, or stop it"
            ) from None

    def records(self) -> list[Record]:
        """What is there; a damaged line, as the last of a killed process, is left out."""
        self._stream.seek(0)
        return list(filter(None, map(_record, self._stream)))

    def append(self, record: Record) -> None:
        """Write one down."""
        try:
            # The line before may be without its end.
            self._stream.write(f"\n{record.to_json()}")
            self._stream.flush()
        except OSError as error:
            raise InputError(
                f"cannot write {self._file} ({error.strerror}); free some space, or set "
                "XDG_CACHE_HOME to another place"
            ) from error

    def clear(self) -> None:
        """Forget all records."""
        self._stream.truncate(0)

    def remove(self) -> None:
        """Delete the journal: its evaluation has ended."""
        with contextlib.suppress(OSError):
            self._file.unlink()

    def close(self) -> None:
        """Give up the lock."""
        with contextlib.suppress(OSError):  # of what could not be written
            self._stream.close()


def _record(line: str) -> Record | None:
    try:
        return Record.from_json(line)
    except (ValueError, TypeError, AttributeError, RecursionError):
        return None


@contextlib.contextmanager
def open_journal(key: Mapping[str, Any]) -> Iterator[Journal]:
    """The journal of an evaluation, under ``$XDG_CACHE_HOME/tome-export/eval``.

    Those of others that nobody has open and nobody took up for ``KEPT_DAYS`` are deleted first.

    Raises:
        InputError: if another process has it open.
        OSError: if the folder cannot be written.
    """
    given = os.environ.get("XDG_CACHE_HOME", "")
    base = Path(given) if given.startswith("/") else Path.home() / ".cache"
    folder = base / "tome-export" / "eval"
    folder.mkdir(parents=True, exist_ok=True)
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
    with contextlib.closing(Journal(folder / f"{name}.jsonl")) as journal:
        os.utime(folder / f"{name}.jsonl")
        for file in folder.glob("*.jsonl"):
            # What is locked, or cannot be deleted, stays.
            with contextlib.suppress(OSError, InputError):
                if _expired(file):
                    with contextlib.closing(Journal(file)) as abandoned:
                        # Someone may have taken it up before it was locked.
                        if _expired(file):
                            abandoned.remove()
        yield journal


def _expired(file: Path) -> bool:
    return file.stat().st_mtime < time.time() - KEPT_DAYS * 86400
