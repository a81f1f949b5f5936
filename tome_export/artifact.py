"""The artifact directory: written whole or not at all, and verified when it is opened."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tome_export.errors import ExportError, InputError

FORMAT = 1
"""Version of ``build.json``; raised when a reader of the old form would misread the new."""

MANIFEST = "build.json"
MODEL = "model.onnx"
PARITY = "parity.json"


@dataclass(frozen=True)
class Artifact:
    """A built artifact.

    Attributes:
        path: Its directory.
        manifest: The content of ``build.json``.
    """

    path: Path
    manifest: dict[str, Any]

    @classmethod
    def open(cls, path: Path) -> Artifact:
        """Read an artifact and verify the sha256 of every file.

        Raises:
            InputError: if it is not an artifact, of another format, incomplete or changed.
        """
        manifest = _read_manifest(path)
        for name, recorded in manifest["files"].items():
            file = path / name
            if not file.is_file():
                raise InputError(f"{file} is missing; rebuild the artifact or copy it whole")
            size = file.stat().st_size
            if size != recorded["bytes"]:
                raise InputError(
                    f"{file} has {size} bytes; {MANIFEST} records {recorded['bytes']}: the file "
                    "is truncated or was changed, rebuild the artifact or copy it again"
                )
            if sha256_of(file) != recorded["sha256"]:
                raise InputError(
                    f"{file} does not match the sha256 in {MANIFEST}: the file is corrupted or "
                    "was changed, rebuild the artifact or copy it again"
                )
        return cls(path, manifest)

    @property
    def model_path(self) -> Path:
        """The ONNX model."""
        return self.path / MODEL

    def with_files(self, changes: dict[str, Any], files: dict[str, Path]) -> Artifact:
        """Add or replace files and manifest entries; the manifest is replaced last, in one step.

        Args:
            changes: Top-level manifest entries.
            files: File name in the artifact -> finished file to move there (same filesystem).

        Raises:
            InputError: if the artifact cannot be written (read-only, disk full).
        """
        manifest = {**self.manifest, **changes}
        records = {name: _record(source) for name, source in files.items()}
        manifest["files"] = {**manifest["files"], **records}
        draft = self.path / f".{MANIFEST}.partial"
        with writing_to(self.path):
            try:
                # What needs disk space comes first: when it runs out, the artifact is as it was.
                draft.write_text(_dumps(manifest))
                for name, source in files.items():
                    source.replace(self.path / name)
                draft.replace(self.path / MANIFEST)
            finally:
                draft.unlink(missing_ok=True)
        return Artifact(self.path, manifest)


def _read_manifest(path: Path) -> dict[str, Any]:
    file = path / MANIFEST
    if not file.is_file():
        raise InputError(
            f"{path} is not an artifact: it has no {MANIFEST}; give the directory that "
            "'tome-export build' wrote"
        )
    try:
        manifest = json.loads(file.read_text())
    except (ValueError, UnicodeDecodeError) as error:
        raise InputError(f"{file} is not valid JSON ({error}); rebuild the artifact") from error
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if found != FORMAT:
        raise InputError(
            f"{file} has format {found!r}; this version reads format {FORMAT}, rebuild the artifact"
        )
    if not isinstance(manifest.get("files"), dict):
        raise InputError(f"{file} lists no files; rebuild the artifact")
    return dict(manifest)


def write_manifest(folder: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """Write ``build.json`` with the size and sha256 of every other file in the folder.

    Returns:
        What was written.
    """
    files = {f.name: _record(f) for f in sorted(folder.iterdir()) if f.name != MANIFEST}
    whole = {"format": FORMAT, **manifest, "files": files}
    (folder / MANIFEST).write_text(_dumps(whole))
    # As a reader will find it: tuples are lists.
    written: dict[str, Any] = json.loads(_dumps(whole))
    return written


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write a JSON file as every file of the artifact is written."""
    path.write_text(_dumps(values))


def _dumps(values: dict[str, Any]) -> str:
    return json.dumps(values, indent=2, ensure_ascii=False) + "\n"


def _record(file: Path) -> dict[str, Any]:
    return {"bytes": file.stat().st_size, "sha256": sha256_of(file)}


def sha256_of(file: Path) -> str:
    """Hex digest of a file's content."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextlib.contextmanager
def staged(output: Path, *, force: bool) -> Iterator[Path]:
    """A folder that becomes ``output`` when the block ends well and vanishes when it does not.

    The folder is a sibling named ``.<name>.partial`` and locked, so that a second build into the
    same output is refused and one left by a killed process is cleared by the next build.

    Args:
        output: The artifact directory to write.
        force: Replace an existing artifact.

    Raises:
        InputError: if the output exists (without ``force``), is not an artifact (with it), is
            being built by another process, or cannot be written (read-only, disk full).
    """
    with writing_to(output.absolute()):
        output = output.resolve() if output.is_dir() else output.absolute()
        partial = output.with_name(f".{output.name}.partial")
        _check_replaceable(output, force)
        _make(output.parent)
        lock = _claim(partial, output)
        try:
            # Another build may have ended between the first look and the claim.
            _check_replaceable(output, force)
            yield partial
            _check_replaceable(output, force)
            _publish(partial, output)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
            os.close(lock)


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileNotFoundError, FileExistsError) as error:  # /proc, or a file of that name
        raise InputError(f"cannot make the folder {folder}; give another directory") from error


def _check_replaceable(output: Path, force: bool) -> None:
    if not output.exists() and not output.is_symlink():
        return
    if not force:
        raise InputError(f"{output} exists; give another directory, or --force to replace it")
    if not output.is_dir() or (any(output.iterdir()) and not (output / MANIFEST).is_file()):
        raise InputError(
            f"{output} exists and is not an artifact (it has no {MANIFEST}); "
            "--force replaces artifacts only, give another directory"
        )


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
        with contextlib.suppress(FileNotFoundError):
            same = partial.stat().st_ino == os.fstat(descriptor).st_ino
            if same and not any(partial.iterdir()):
                return descriptor
            if same:
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


@contextlib.contextmanager
def writing_to(output: Path) -> Iterator[None]:
    """Say in one line why a directory cannot be written.

    Raises:
        InputError: in place of the ``OSError`` that says so.
    """
    reasons = {
        errno.ENOSPC: "no space is left on the device; free some or give another directory",
        errno.EDQUOT: "the disk quota is used up; free some space or give another directory",
        errno.EROFS: "the filesystem is read-only; give another directory",
        errno.EACCES: "permission is denied; give a directory you can write",
        errno.EPERM: "permission is denied; give a directory you can write",
        errno.ENOTDIR: "a part of the path is a file; give another directory",
        errno.ENAMETOOLONG: "the name is too long; give a shorter one",
    }
    try:
        yield
    except (OSError, ExportError) as error:
        # A stage that failed for want of space says so as its cause.
        cause = error if isinstance(error, OSError) else error.__cause__
        if not isinstance(cause, OSError) or cause.errno not in reasons:
            raise
        raise InputError(f"cannot write {output}: {reasons[cause.errno]}") from error
