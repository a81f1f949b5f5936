"""Finished chunks on disk, so that a killed evaluation goes on where it was."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import time
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tome_export.errors import InputError
from tome_export.evaluation.records import Record

RECORDS = "records"

KEPT_DAYS = 30
"""Age at which what an evaluation left that nobody took up again is deleted."""

_CHECK = 8
"""Hex digits of the checksum ahead of each line."""


class Journal:
    """Records of one evaluation, whose folder is locked while this is open.

    Each record is a line behind its CRC-32, written in one call: a line that a kill or a full disk
    has cut is known by its checksum, cut off, and its chunk done again.
    """

    def __init__(self, folder: Path, descriptor: int) -> None:
        self._folder = folder
        self._lock = descriptor
        self._file = folder / RECORDS
        self._stream = self._file.open("ab", buffering=0)

    def records(self) -> Iterator[Record]:
        """What is there; whatever follows the first broken line is cut off."""
        sound = 0
        with self._file.open("rb") as stream:
            for line in stream:
                record = _read(line)
                if record is None:
                    break
                sound += len(line)
                yield record
        self._stream.truncate(sound)

    def append(self, record: Record) -> None:
        """Write one down.

        Raises:
            InputError: if the disk is full.
        """
        line = record.to_bytes()
        data = f"{zlib.crc32(line):0{_CHECK}x} ".encode() + line + b"\n"
        try:
            written = self._stream.write(data)
        except OSError as error:
            raise InputError(
                f"cannot write {self._file} ({error.strerror}); free some space, or set "
                "XDG_CACHE_HOME to another place"
            ) from error
        if written != len(data):
            raise InputError(f"cannot write {self._file}: the disk is full; free some space")

    def clear(self) -> None:
        """Forget all records."""
        self._stream.truncate(0)

    def remove(self) -> None:
        """Delete the journal: its evaluation has ended."""
        with contextlib.suppress(OSError):
            self._file.unlink()
            self._folder.rmdir()

    def close(self) -> None:
        """Give up the lock."""
        self._stream.close()
        os.close(self._lock)


def _read(line: bytes) -> Record | None:
    check, _, content = line.removesuffix(b"\n").partition(b" ")
    if not line.endswith(b"\n") or check != f"{zlib.crc32(content):0{_CHECK}x}".encode():
        return None
    try:
        return Record.from_bytes(content)
    except (ValueError, KeyError, TypeError):
        return None


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
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
    cache = _cache()
    journal = _claim(cache / name)
    try:
        os.utime(cache / name)
        _sweep(cache)
        yield journal
    finally:
        journal.close()


def _cache() -> Path:
    given = os.environ.get("XDG_CACHE_HOME", "")
    base = Path(given) if given.startswith("/") else Path.home() / ".cache"
    return base / "tome-export" / "eval"


def _sweep(cache: Path) -> None:
    """Delete what was abandoned; what is locked, or cannot be deleted, stays."""
    for folder in list(cache.iterdir()):
        with contextlib.suppress(OSError, InputError):
            if not _expired(folder):
                continue
            journal = _claim(folder)
            try:
                # Someone may have taken it up before it was locked.
                if _expired(folder):
                    journal.remove()
            finally:
                journal.close()


def _expired(folder: Path) -> bool:
    times = [path.stat().st_mtime for path in (folder, folder / RECORDS) if path.exists()]
    return max(times) < time.time() - KEPT_DAYS * 86400


def _claim(folder: Path) -> Journal:
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:  # another run has just ended and removed it
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(folder.stat(), os.fstat(descriptor)):
                return Journal(folder, descriptor)
            os.close(descriptor)
        except FileNotFoundError:
            os.close(descriptor)
        except BlockingIOError:
            os.close(descriptor)
            raise InputError(
                "the same evaluation is running already; wait for it to end, or stop it"
            ) from None
        except OSError:
            os.close(descriptor)
            raise
