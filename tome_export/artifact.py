"""The artifact directory: written whole or not at all, and verified when it is opened."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tome_export.errors import InputError
from tome_export.schema import FORMAT, MANIFEST, MODEL, read_manifest
from tome_export.staging import staged, writing_to

__all__ = [
    "FORMAT",
    "MANIFEST",
    "MODEL",
    "PARITY",
    "Artifact",
    "sha256_of",
    "staged",
    "write_json",
    "write_manifest",
    "writing_to",
]

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
        manifest = read_manifest(path)
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

        The changes go into the manifest as it is by now: others may have added to the artifact
        since it was opened.

        Args:
            changes: Top-level manifest entries; ``engines`` adds to those that are there.
            files: File name in the artifact -> finished file to move there (same filesystem).

        Raises:
            InputError: if the artifact cannot be written (read-only, disk full), another command
                is writing it, or its model was replaced since it was opened.
        """
        records = {name: _record(source) for name, source in files.items()}
        draft = self.path / f".{MANIFEST}.partial"
        with writing_to(self.path), locked(self.path):
            fresh = read_manifest(self.path)
            if fresh["files"][MODEL] != self.manifest["files"][MODEL]:
                raise InputError(f"{self.path} was rebuilt meanwhile; repeat this command")
            manifest = {**fresh, **changes, "files": {**fresh["files"], **records}}
            if "engines" in changes:
                manifest["engines"] = {**fresh["engines"], **changes["engines"]}
            try:
                # What needs disk space comes first: when it runs out, the artifact is as it was.
                draft.write_text(_dumps(manifest))
                for name, source in files.items():
                    source.replace(self.path / name)
                draft.replace(self.path / MANIFEST)
            finally:
                draft.unlink(missing_ok=True)
        return Artifact(self.path, manifest)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other writers of a folder out; the lock ends with the process.

    Raises:
        InputError: if another command holds the lock.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise InputError(
            f"another command is writing {folder}; wait for it and repeat this one"
        ) from None
    finally:
        os.close(descriptor)


def write_manifest(folder: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """Write ``build.json`` with the size and sha256 of every other file in the folder and below.

    Returns:
        What was written.
    """
    found = {f.relative_to(folder).as_posix(): f for f in sorted(folder.rglob("*")) if f.is_file()}
    files = {name: _record(file) for name, file in found.items() if name != MANIFEST}
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
