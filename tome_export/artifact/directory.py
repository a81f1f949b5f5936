"""The artifact directory: written whole or not at all, and verified when it is opened."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from tome_export.artifact.document import Document
from tome_export.artifact.files import draft_of, locked, open_regular, shared, writing_to
from tome_export.artifact.graph import check_graph
from tome_export.artifact.manifest import (
    MANIFEST,
    MODEL,
    RESULTS,
    EngineInfo,
    FileRecord,
    Manifest,
    read_manifest,
)
from tome_export.artifact.parity import ParitySummary
from tome_export.artifact.staging import DRAFT
from tome_export.errors import InputError
from tome_export.weights.files import sha256, sha256_of_stream

PATIENCE_S = 10.0
"""Seconds to wait for a command that is recording into the artifact, which takes far less."""


@dataclass(frozen=True)
class Artifact:
    """A built artifact.

    Attributes:
        path: Its directory.
        manifest: The content of ``build.json``, without the files that are stale.
        stale: Result that is not as it was recorded -> what to do about it, in a line.
    """

    path: Path
    manifest: Manifest
    stale: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path) -> Artifact:
        """Read an artifact and verify the sha256 of every file.

        A result (``RESULTS``) that is lost or was changed is none: the model is usable without.

        Raises:
            InputError: if it is not an artifact, of another format, incomplete or changed.
        """
        with contextlib.suppress(InputError):
            found = cls._verified(path)
            if not found.stale:
                return found
        # Perhaps a command is recording into it: what counts is what is there with that kept out.
        with shared(path, PATIENCE_S):
            return cls._verified(path)

    @classmethod
    def _verified(cls, path: Path) -> Artifact:
        manifest = read_manifest(path)
        stale: dict[str, str] = {}
        for name, recorded in manifest.files.items():
            if name not in RESULTS:
                _check_file(path, name, recorded)
            elif not _is_as_recorded(path, name, recorded):
                what = "was changed after" if os.path.lexists(path / name) else "is gone since"
                command = f"'tome-export {RESULTS[name]}'"
                stale[name] = f"{name} {what} it was recorded: run {command} again"
        _check_folders(path, manifest)
        sizes = {name: recorded.bytes for name, recorded in manifest.files.items()}
        check_graph(path, MODEL, sizes, manifest.precision)
        return cls(path, manifest)._without(stale)

    def _without(self, stale: Mapping[str, str]) -> Artifact:
        files = {n: r for n, r in self.manifest.files.items() if n not in stale}
        manifest = self.manifest.model_copy(update={"files": files})
        return replace(self, manifest=manifest, stale=stale)

    @property
    def model_path(self) -> Path:
        """The ONNX model."""
        return self.path / MODEL

    def record(
        self, name: str, content: bytes | Document, parity: ParitySummary | None = None
    ) -> Artifact:
        """Add or replace one of ``RESULTS``, whoever else is recording; None leaves the parity."""
        whole = content if isinstance(content, bytes) else content.json_bytes()
        update = {} if parity is None else {"parity": parity}
        return self.with_files({name: whole}, lambda fresh: fresh.model_copy(update=update))

    def with_engine(self, engine: EngineInfo, file: Path, note: str) -> Artifact:
        """Add or replace an engine; its finished file is moved here (same filesystem)."""

        def added(fresh: Manifest) -> Manifest:
            engines = {**fresh.engines, engine.backend: engine}
            return fresh.model_copy(update={"engines": engines, "engine_note": note})

        return self.with_files({engine.file: file}, added)

    def with_files(
        self, files: Mapping[str, Path | bytes], edit: Callable[[Manifest], Manifest]
    ) -> Artifact:
        """Add or replace files and edit the manifest, which is replaced last, in one step.

        The edit is of the manifest as it is by now: others may have added to the artifact since it
        was opened. A command that is killed meanwhile leaves a whole artifact, if perhaps without
        what it replaces.

        Args:
            files: File name in the artifact -> its content, or a finished file to move there (same
                filesystem).
            edit: Returns the manifest with whatever else changes.

        Raises:
            InputError: if the artifact cannot be written (read-only, disk full), another command
                goes on writing it, or its model was replaced since it was opened.
        """
        records = {name: _record(source) for name, source in files.items()}
        with writing_to(self.path), locked(self.path, PATIENCE_S):
            _clear_drafts(self.path)
            fresh = read_manifest(self.path)
            if fresh.files[MODEL] != self.manifest.files[MODEL]:
                raise InputError(f"{self.path} was rebuilt meanwhile; repeat this command")
            manifest = edit(fresh).model_copy(update={"files": {**fresh.files, **records}})
            with contextlib.ExitStack() as stack:

                def drafted(name: str, content: bytes) -> Path:
                    draft = draft_of(self.path / name)
                    stack.callback(draft.unlink, missing_ok=True)
                    draft.write_bytes(content)
                    return draft

                # What needs disk space comes first: when it runs out, the artifact is as it was.
                sources = {
                    name: drafted(name, source) if isinstance(source, bytes) else source
                    for name, source in files.items()
                }
                last = drafted(MANIFEST, manifest.json_bytes())
                if (without := _without_replaced(fresh, records)) != fresh:
                    drafted(MANIFEST, without.json_bytes()).replace(self.path / MANIFEST)
                for name, source in sources.items():
                    source.replace(self.path / name)
                last.replace(self.path / MANIFEST)
        stale = {name: why for name, why in self.stale.items() if name not in files}
        return Artifact(self.path, manifest)._without(stale)


def _without_replaced(fresh: Manifest, records: Mapping[str, FileRecord]) -> Manifest:
    """The manifest for as long as a file that the model may need is neither the old nor the new."""
    old = {
        name
        for name, record in records.items()
        if name not in RESULTS and fresh.files.get(name, record) != record
    }
    files = {name: record for name, record in fresh.files.items() if name not in old}
    engines = {name: one for name, one in fresh.engines.items() if one.file not in old}
    return fresh.model_copy(update={"files": files, "engines": engines})


def _clear_drafts(folder: Path) -> None:
    """Remove what killed commands left; whoever writes drafts of these names has the lock."""
    for entry in folder.iterdir():
        if DRAFT.fullmatch(entry.name) and entry.is_file():
            entry.unlink()


def _check_file(folder: Path, name: str, recorded: FileRecord) -> None:
    """Raise ``InputError`` unless a file of an artifact is as it was recorded."""
    with open_regular(folder, name) as stream:
        size = os.fstat(stream.fileno()).st_size
        if size != recorded.bytes:
            raise InputError(
                f"{folder / name} has {size} bytes; {MANIFEST} records {recorded.bytes}: the file "
                "is truncated or was changed, rebuild the artifact or copy it again"
            )
        if sha256_of_stream(stream) != recorded.sha256:
            raise InputError(
                f"{folder / name} does not match the sha256 in {MANIFEST}: the file is corrupted "
                "or was changed, rebuild the artifact or copy it again"
            )


def _is_as_recorded(folder: Path, name: str, recorded: FileRecord) -> bool:
    try:
        _check_file(folder, name, recorded)
    except InputError:
        return False
    return True


def _check_folders(path: Path, manifest: Manifest) -> None:
    """Whoever reads a folder of the artifact, such as the kernels', must find only listed files."""
    for folder in {Path(name).parts[0] for name in manifest.files if "/" in name}:
        for entry in (path / folder).rglob("*"):
            name = entry.relative_to(path).as_posix()
            if name not in manifest.files and (entry.is_symlink() or not entry.is_dir()):
                raise InputError(
                    f"{entry} is not listed in {MANIFEST}; remove it, or copy the artifact again"
                )


def write_manifest(folder: Path, manifest: Manifest) -> Manifest:
    """Write ``build.json`` with the size and sha256 of every other file in the folder and below."""
    found = {f.relative_to(folder).as_posix(): f for f in sorted(folder.rglob("*")) if f.is_file()}
    files = {name: _record(file) for name, file in found.items() if name != MANIFEST}
    whole = manifest.model_copy(update={"files": files})
    (folder / MANIFEST).write_bytes(whole.json_bytes())
    return whole


def _record(source: Path | bytes) -> FileRecord:
    if isinstance(source, bytes):
        return FileRecord(bytes=len(source), sha256=hashlib.sha256(source).hexdigest())
    return FileRecord(bytes=source.stat().st_size, sha256=sha256(source))
