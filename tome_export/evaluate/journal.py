"""Finished chunks in an SQLite file, so that a killed evaluation goes on where it was."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sqlite3
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tome_export.errors import InputError
from tome_export.evaluate.records import Record

KEPT_DAYS = 30
"""Age at which what an evaluation left that nobody took up again is deleted."""


class Journal:
    """Records of one evaluation; its file is locked while this is open.

    Args:
        file: The database, which is made where it is missing, and made anew where it is damaged.

    Raises:
        InputError: if another process has it open.
        OSError: if it cannot be written.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        try:
            self._database = _opened(file)
        except sqlite3.OperationalError as error:
            if "locked" in str(error):
                raise InputError(
                    "the same evaluation is running already; wait for it to end, or stop it"
                ) from None
            raise OSError(0, str(error)) from None
        except sqlite3.DatabaseError:
            self._database = _anew(file)

    def records(self) -> list[Record]:
        """What is there; of a damaged file nothing, which then is empty."""
        try:
            rows = self._database.execute("SELECT record FROM records").fetchall()
            return [Record.from_json(row) for (row,) in rows]
        except (sqlite3.DatabaseError, ValueError, TypeError, AttributeError, RecursionError):
            self.clear()
            return []

    def append(self, record: Record) -> None:
        """Write one down.

        Raises:
            InputError: if the disk is full.
        """
        try:
            self._database.execute(
                "INSERT OR REPLACE INTO records VALUES (?, ?)", (record.chunk, record.to_json())
            )
        except sqlite3.Error as error:
            raise InputError(
                f"cannot write {self._file} ({error}); free some space, or set XDG_CACHE_HOME to "
                "another place"
            ) from error

    def clear(self) -> None:
        """Forget all records."""
        try:
            self._database.execute("DELETE FROM records")
        except sqlite3.DatabaseError:
            self._database.close()
            self._database = _anew(self._file)

    def remove(self) -> None:
        """Delete the journal: its evaluation has ended."""
        with contextlib.suppress(OSError):
            self._file.unlink()

    def close(self) -> None:
        """Give up the lock."""
        self._database.close()


def _opened(file: Path) -> sqlite3.Connection:
    database = sqlite3.connect(file, timeout=0, isolation_level=None)
    try:
        # One process alone; a kill costs nothing, and after a loss of power what is damaged is
        # done again: no need to wait for the disk.
        database.execute("PRAGMA locking_mode = EXCLUSIVE")
        database.execute("PRAGMA synchronous = OFF")
        database.execute("BEGIN IMMEDIATE")
        database.execute(
            "CREATE TABLE IF NOT EXISTS records (chunk INTEGER PRIMARY KEY, record TEXT)"
        )
        database.execute("COMMIT")
    except BaseException:
        database.close()
        raise
    return database


def _anew(file: Path) -> sqlite3.Connection:
    for one in (file, file.with_name(f"{file.name}-journal")):
        one.unlink(missing_ok=True)
    return _opened(file)


@contextlib.contextmanager
def open_journal(key: Mapping[str, Any]) -> Iterator[Journal]:
    """The journal of an evaluation, under ``$XDG_CACHE_HOME/tome-export/eval``.

    Those of others that nobody has open and nobody took up for ``KEPT_DAYS`` are deleted first.

    Args:
        key: All that its records hang on; JSON-ready.

    Raises:
        InputError: if another process has it open.
        OSError: if the folder cannot be written.
    """
    given = os.environ.get("XDG_CACHE_HOME", "")
    base = Path(given) if given.startswith("/") else Path.home() / ".cache"
    folder = base / "tome-export" / "eval"
    folder.mkdir(parents=True, exist_ok=True)
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
    with contextlib.closing(Journal(folder / f"{name}.sqlite3")) as journal:
        os.utime(folder / f"{name}.sqlite3")
        _sweep(folder)
        yield journal


def _sweep(folder: Path) -> None:
    """Delete what was abandoned; what is locked, or cannot be deleted, stays."""
    for file in folder.glob("*.sqlite3"):
        with contextlib.suppress(OSError, InputError):
            if not _expired(file):
                continue
            with contextlib.closing(Journal(file)) as journal:
                # Someone may have taken it up before it was locked.
                if _expired(file):
                    journal.remove()


def _expired(file: Path) -> bool:
    return file.stat().st_mtime < time.time() - KEPT_DAYS * 86400
