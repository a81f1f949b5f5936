"""Writing beside a server that reads: nothing appears half-made, two folders swap in one step."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from tome_export import artifact
from tome_export.errors import InputError

STAGING = ".tome-export-staging"
"""Ends the name of the folder where models are made."""

_RENAME_EXCHANGE = 2  # linux/fs.h
_AT_FDCWD = -100  # fcntl.h


@contextlib.contextmanager
def locked(repository: Path) -> Iterator[None]:
    """Make the repository if it is missing and keep other writers out."""
    made = not repository.exists()
    try:
        repository.mkdir(parents=True, exist_ok=True)
    except FileNotFoundError as error:  # /proc
        raise InputError(f"cannot make the folder {repository}; give another directory") from error
    try:
        with artifact.locked(repository):
            yield
    finally:
        if made:
            with contextlib.suppress(OSError):  # it has models now
                repository.rmdir()


@contextlib.contextmanager
def staging(repository: Path, models: Sequence[str]) -> Iterator[Path]:
    """A folder on the same filesystem that no server looks into; what a killed command left goes.

    Best beside the repository. Where that is another filesystem or not ours to write, inside a
    model, where folders that are no numbers are ignored; in an empty repository, at its top.

    Args:
        repository: The directory; ``locked``.
        models: Names of the models in it.
    """
    places = [repository.with_name(f".{repository.name}{STAGING}")]
    inside = [repository / name / STAGING for name in models]
    places += [*inside[:1], repository / STAGING]
    for place in (*places, *inside):
        with contextlib.suppress(OSError):
            shutil.rmtree(place)
    for place in places:
        try:
            place.mkdir()
        except OSError as error:
            if place is places[-1] or error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise
            continue
        try:
            if not _renames_into(place, repository):
                continue
            yield place
        finally:
            shutil.rmtree(place, ignore_errors=True)
        return


def _renames_into(place: Path, repository: Path) -> bool:
    """Whether one is on the mount of the other, which device numbers do not tell."""
    probe, landed = place / "probe", repository / f"{STAGING}-probe"
    probe.touch()
    try:
        probe.rename(landed)  # a file, which servers do not look at
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        return False
    finally:
        landed.unlink(missing_ok=True)
    return True


def exchange(first: Path, second: Path) -> None:
    """Swap two folders; in one step where the kernel and the filesystem know how."""
    library = ctypes.CDLL(None, use_errno=True)
    rename = getattr(library, "renameat2", None)
    arguments = (_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE)
    if rename is not None and rename(*arguments) == 0:
        return
    aside = first.with_name(f"{first.name}.old")
    second.rename(aside)
    try:
        first.rename(second)
    except BaseException:
        if not second.exists():
            aside.rename(second)
        raise
    aside.rename(first)
