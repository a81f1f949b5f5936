"""Writing an artifact directory whole or not at all, whoever else writes there."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from tome_export.artifact.files import is_open_as, writing_to
from tome_export.artifact.manifest import MANIFEST, RESULTS, listed_files
from tome_export.errors import InputError

_WRITTEN = "|".join(re.escape(name) for name in (MANIFEST, *RESULTS))

DRAFT = re.compile(rf"\.(?:{_WRITTEN})(?:\.\w+)?\.partial")
"""Names of what is written into an artifact, until it is whole; see ``files.draft_of``."""

UNRECORDED = re.compile(r"\.engine-\w+|model(?:\.\w+)?\.engine")
"""Names of what a killed ``engine`` may leave: the folder it built in, or an engine not listed."""


SIZE = re.compile(r"[0-9]+x[0-9]+")
"""Names of the artifacts of one model that were built at several image sizes together."""


@contextlib.contextmanager
def staged(
    output: Path, *, force: bool, replaceable: Callable[[Path], None] | None = None
) -> Iterator[Path]:
    """A folder that becomes ``output`` when the block ends well and vanishes when it does not.

    The folder is a sibling named ``.<name>.partial`` and locked, so that a second build into the
    same output is refused and one left by a killed process is cleared by the next build.

    Args:
        output: The directory to write.
        force: Replace an existing one.
        replaceable: Raises ``InputError`` if what is there must not be replaced even so; by
            default whatever is no artifact.

    Raises:
        InputError: if the output exists (without ``force``), is not an artifact (with it), is
            being built by another process, or cannot be written (read-only, disk full).
    """
    given = _named(output)
    with writing_to(given):
        # A link to a directory stays a link, and what it leads to is replaced.
        output = _named(given.resolve() if given.is_dir() else given)
        partial = output.with_name(f".{output.name}.partial")
        check = replaceable or _check_artifact
        _check_replaceable(output, force, check)
        _make(output.parent)
        lock = _claim(partial, output)
        try:
            # Another build may have ended between the first look and the claim.
            _check_replaceable(output, force, check)
            yield partial
            _check_replaceable(output, force, check)
            _publish(partial, output)
        finally:
            # Once published the name is free, and another build may have claimed it.
            if is_open_as(lock, partial):
                shutil.rmtree(partial, ignore_errors=True)
            os.close(lock)


def _named(output: Path) -> Path:
    """The absolute path without ``..``; it must have a name."""
    plain = Path(os.path.normpath(output.absolute()))
    if not plain.name:
        raise InputError(f"output is {output}, which has no name; give a directory to make")
    return plain


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileNotFoundError, FileExistsError) as error:  # /proc, or a file of that name
        raise InputError(f"cannot make the folder {folder}; give another directory") from error


def _check_replaceable(output: Path, force: bool, check: Callable[[Path], None]) -> None:
    if not output.exists() and not output.is_symlink():
        return
    if not force:
        raise InputError(f"{output} exists; give another directory, or --force to replace it")
    check(output)


def check_artifacts(output: Path) -> None:
    """Refuse what is no artifact, and no folder of those of one model at several image sizes."""
    sizes = _sizes_in(output)
    for folder in sizes:
        _check_ours(folder)
    if not sizes:
        _check_artifact(output)


def _sizes_in(output: Path) -> list[Path]:
    """The artifacts in a folder of nothing but artifacts called by their image sizes."""
    found = sorted(output.iterdir()) if output.is_dir() else []
    ours = all(SIZE.fullmatch(one.name) and (one / MANIFEST).is_file() for one in found)
    return found if ours else []


def _check_artifact(output: Path) -> None:
    if sizes := _sizes_in(output):
        raise InputError(
            f"{output} holds artifacts of image sizes ({', '.join(one.name for one in sizes)}), "
            f"which a single one would replace; give one of them, such as {sizes[0]}, or another "
            "directory"
        )
    if not output.is_dir() or (any(output.iterdir()) and not (output / MANIFEST).is_file()):
        raise InputError(
            f"{output} exists and is not an artifact (it has no {MANIFEST}); "
            "--force replaces artifacts only, give another directory"
        )
    _check_ours(output)


def _check_ours(output: Path) -> None:
    """Other tools write a ``build.json`` too, and people keep notes beside an artifact."""
    entries = sorted(output.iterdir())
    if not entries:
        return
    files = listed_files(output)
    if files is None:
        raise InputError(
            f"{output} exists and its {MANIFEST} is not that of an artifact; --force replaces "
            "artifacts only, give another directory"
        )
    foreign = [
        entry.name
        for entry in entries
        if not (DRAFT.fullmatch(entry.name) or UNRECORDED.fullmatch(entry.name))
        and not _is_listed(entry, (*files, *RESULTS, MANIFEST))
    ]
    if foreign:
        more = f" and {len(foreign) - 3} more" if len(foreign) > 3 else ""
        raise InputError(
            f"{output} holds what is not of the artifact ({', '.join(foreign[:3])}{more}), which "
            "--force would delete; move it away or give another directory"
        )


def _is_listed(entry: Path, names: Collection[str]) -> bool:
    """Whether an entry of an artifact is one of its files, or a folder of them and nothing else."""
    if entry.is_symlink() or not entry.is_dir():
        return entry.is_file() and entry.name in names
    inside = [path for path in entry.rglob("*") if path.is_symlink() or not path.is_dir()]
    known = {path.relative_to(entry.parent).as_posix() for path in inside} <= {*names}
    return bool(inside) and known and all(path.is_file() for path in inside)


def _claim(partial: Path, output: Path) -> int:
    """Make the staging folder and lock it; returns the descriptor that holds the lock."""
    busy = InputError(f"another build is writing {output}; wait for it or give another directory")
    # A folder without a lock was left by a killed build: it is cleared, and the claim repeated.
    for _ in range(3):
        with contextlib.suppress(FileExistsError):
            partial.mkdir()
        try:
            descriptor = os.open(partial, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise busy from None
        if is_open_as(descriptor, partial):
            if not any(partial.iterdir()):
                return descriptor
            shutil.rmtree(partial)
        os.close(descriptor)
    raise busy


def _publish(partial: Path, output: Path) -> None:
    old = output.with_name(f".{output.name}.replaced")
    shutil.rmtree(old, ignore_errors=True)
    if not output.exists():
        partial.rename(output)
        return
    output.rename(old)
    try:
        partial.rename(output)
    except BaseException:
        # An interrupt may come after the rename as well as before it.
        if not output.exists():
            old.rename(output)
        raise
    finally:
        if output.exists():
            shutil.rmtree(old, ignore_errors=True)
