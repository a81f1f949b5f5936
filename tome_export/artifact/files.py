"""Files written whole or not at all, folders kept from others meanwhile, text as bytes."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import secrets
import shutil
import stat
import time
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from tome_export.errors import ExportError, InputError, UnrecordedError

POLL_S = 0.05
"""Seconds between two tries for a lock."""

_NO_LINKS = (errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK, errno.EOPNOTSUPP, errno.ENOSYS)
"""Why a file gets no second name: another filesystem, somebody else's file, none of such names."""


def utf8(text: str) -> bytes:
    r"""Text as bytes; what is no text, as in file names of another encoding, becomes ``\udcff``.

    In JSON that is an escape, and reading gives the same text back.
    """
    return text.encode("utf-8", "backslashreplace")


def json_bytes(values: Mapping[str, Any]) -> bytes:
    """A JSON object as every file of ours has it."""
    return utf8(json.dumps(values, indent=2, ensure_ascii=False) + "\n")


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write a JSON file as every file of ours is written."""
    path.write_bytes(json_bytes(values))


def open_regular(folder: Path, name: str) -> BinaryIO:
    """Open a file of a folder to read it, if it is one and lies there."""
    file, part = folder / name, folder
    for step in PurePosixPath(name).parts:
        part /= step
        if part.is_symlink():
            raise InputError(
                f"{part} is a symbolic link, expected a file inside the artifact itself; copy the "
                "artifact with 'cp -rL'"
            )
    try:
        # A link that has come since is refused, and a pipe is not waited for.
        descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{file} is missing; rebuild the artifact or copy it whole") from None
    except OSError as error:
        raise InputError(f"{file} cannot be read ({error.strerror}); copy it again") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise InputError(
            f"{file} is a folder, pipe or device, expected a file; copy the artifact again"
        )
    return os.fdopen(descriptor, "rb")


def draft_of(path: Path) -> Path:
    """A hidden sibling that no other command has, to be renamed when it is whole."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")


def write_whole(path: Path, content: bytes) -> None:
    """Write a file in one step, as open to others as any new file."""
    draft = draft_of(path)
    try:
        draft.write_bytes(content)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def link_or_copy(source: Path, target: Path) -> None:
    """Give a file a second name, or where the filesystem cannot a copy.

    Only for files that are replaced and never changed in place, which all of ours are.
    """
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        shutil.copyfile(source, target)


def is_open_as(descriptor: int, folder: Path) -> bool:
    """Whether the folder of that name is the one that the descriptor has open."""
    try:
        return os.path.samestat(folder.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def locked(folder: Path, patience_s: float = 0.0) -> Iterator[None]:
    """Keep other writers of a folder out; the lock ends with the process."""
    descriptor = _lock(folder, fcntl.LOCK_EX, patience_s)
    if descriptor is None:
        raise InputError(f"another command is writing {folder}; wait for it and repeat this one")
    try:
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def shared(folder: Path, patience_s: float) -> Iterator[None]:
    """Keep writers of a folder out while it is read, as far as that is possible."""
    try:
        descriptor = _lock(folder, fcntl.LOCK_SH, patience_s)
    except OSError:  # there is no such folder, or its filesystem has no locks
        descriptor = None
    try:
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _lock(folder: Path, kind: int, patience_s: float) -> int | None:
    """The descriptor that holds a lock; None if others hold it for longer."""
    deadline = time.monotonic() + patience_s
    while True:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
                # Another folder may have got the name since.
                if is_open_as(descriptor, folder):
                    kept, descriptor = descriptor, -1
                    return kept
        finally:
            if descriptor >= 0:
                os.close(descriptor)
        if time.monotonic() >= deadline:
            return None
        time.sleep(POLL_S)


@contextlib.contextmanager
def writing_to(output: Path, what: str = "directory") -> Iterator[None]:
    """Say in one line why something cannot be written."""
    reasons = {
        errno.ENOSPC: f"no space is left on the device; free some or give another {what}",
        errno.EDQUOT: f"the disk quota is used up; free some space or give another {what}",
        errno.EFBIG: "a file would be larger than may be written here; raise the limit (ulimit -f) "
        f"or give another {what}",
        errno.EROFS: f"the filesystem is read-only; give another {what}",
        errno.EACCES: f"permission is denied; give a {what} you can write",
        errno.EPERM: f"permission is denied; give a {what} you can write",
        errno.ENOTDIR: f"a part of the path is a file; give another {what}",
        errno.ENAMETOOLONG: "the name is too long; give a shorter one",
    }
    if what == "file":
        reasons[errno.ENOENT] = "its folder does not exist; make it or give another file"
    try:
        yield
    except (OSError, ExportError) as error:
        # A stage that failed for want of space says so as its cause.
        cause = error if isinstance(error, OSError) else error.__cause__
        if not isinstance(cause, OSError) or cause.errno not in reasons:
            raise
        raise InputError(f"cannot write {output}: {reasons[cause.errno]}") from error


@contextlib.contextmanager
def keeping(result: object) -> Iterator[None]:
    """Write down what long work has found; where that fails, the error holds it.

    Raises:
        UnrecordedError: in place of an ``InputError`` or ``ExportError`` inside.
    """
    try:
        yield
    except (InputError, ExportError) as error:
        raise UnrecordedError(str(error), result) from error


def check_new_file(path: Path, *, force: bool) -> None:
    """Find out before long work whether its result can be written."""
    if path.is_dir():
        raise InputError(f"{path} is a folder; give the name of a file")
    if path.exists() and not path.is_file():  # it would be replaced by a file
        raise InputError(f"{path} is a device, pipe or socket; give the name of a file")
    if path.exists() and not force:
        raise InputError(f"{path} exists; give another file, or --force to replace it")
    with writing_to(path, "file"):
        draft = draft_of(path)
        draft.touch()
        draft.unlink()
