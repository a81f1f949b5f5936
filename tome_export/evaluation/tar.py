"""Tar shards as webdataset writes them: members ``key.jpg`` with ``key.cls`` or ``key.json``."""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
from array import array
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tome_export.errors import InputError
from tome_export.evaluation.source import Classes, Kind, Labels, Names, printable, stamp

MAX_LABEL_BYTES = 1 << 20
"""Largest ``.json`` or ``.cls`` member that is read."""


@dataclass(frozen=True)
class TarItem:
    """A member of a tar file, by where its bytes are."""

    name: str
    path: str
    offset: int
    size: int

    def load(self) -> bytes:
        """See ``Item``."""
        with Path(self.path).open("rb") as stream:
            stream.seek(self.offset)
            data = stream.read(self.size)
        if len(data) < self.size:
            raise InputError(
                f"{self.name} is cut short: {len(data)} of {self.size} bytes are in the shard; "
                "copy the shard again"
            )
        return data


@dataclass(frozen=True)
class TarSource:
    """Members of tar files; see ``Source``."""

    text: str
    roots: tuple[Path, ...]
    names: Names
    shard: array[int]
    offset: array[int]
    size: array[int]
    labels: Labels | None
    digest: str
    notes: tuple[str, ...] = ()
    kind: Kind = "tar"

    def __len__(self) -> int:
        return len(self.names)

    def item(self, index: int) -> TarItem:
        """See ``Source``."""
        path = self.roots[self.shard[index]]
        name = printable(f"{path.name}:{self.names[index]}")
        return TarItem(name, str(path), self.offset[index], self.size[index])


def tar_source(
    text: str, paths: Sequence[Path], suffixes: Collection[str], classes: Classes | None
) -> TarSource:
    """List the samples of tar shards, reading headers and labels only.

    Args:
        text: What the user gave.
        paths: Shards, uncompressed.
        suffixes: How names of images end, lower case.
        classes: Of the model; None for a model without classes.

    Raises:
        InputError: if a shard is no tar file, there is no image, or labels are missing for some
            images or none of the model's.
    """
    names, shard, offset, size = Names(), array("L"), array("Q"), array("Q")
    labels, notes = array("i"), []
    digest = hashlib.sha256()
    for number, path in enumerate(paths):
        digest.update(os.fsencode(f"{path.absolute()}\0{stamp(path)}\0"))
        before = len(names)
        scan = _Scan(path)
        for sample in scan.samples(suffixes):
            name, start, length, label = sample
            names.append(name)
            shard.append(number)
            offset.append(start)
            size.append(length)
            if classes is not None and label is not None:
                labels.append(classes.index(label, printable(f"{path.name}:{name}")))
        if scan.cut:
            count = len(names) - before
            notes.append(f"{printable(str(path))} is cut short after {count} images; copy it again")
    if not names:
        raise InputError(
            f"no images in {text}; expected members such as 000001.jpg with 000001.cls"
        )
    if len(labels) not in (0, len(names)):
        raise InputError(
            f'{text} has labels (.cls, or .json with "label") for {len(labels)} of {len(names)} '
            "images; label all or none"
        )
    values = np.asarray(labels, dtype=np.int32) if len(labels) else None
    roots = tuple(path.absolute() for path in paths)
    return TarSource(
        text, roots, names, shard, offset, size, values, digest.hexdigest(), tuple(notes)
    )


class _Scan:
    """One pass over the headers of a shard."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.cut = False

    def samples(self, suffixes: Collection[str]) -> Iterator[tuple[str, int, int, object]]:
        """Name, offset, size and label of each image, whose label may come before or after it."""
        key, image, label = "", None, None
        for member, text in self._members(suffixes):
            folder, base = os.path.split(member.name)
            found = os.path.join(folder, base.partition(".")[0])  # noqa: PTH118 (text, no path)
            if found != key:
                if image is not None:
                    yield (*image, label)
                key, image, label = found, None, None
            if text is not None:
                label = text if label is None else label
            else:
                image = (member.name, member.offset_data, member.size)
        # Where the shard is cut, the label of the last image may be lost with its tail.
        if image is not None and not (self.cut and label is None):
            yield (*image, label)

    def _members(
        self, suffixes: Collection[str]
    ) -> Iterator[tuple[tarfile.TarInfo, object | None]]:
        try:
            opened = tarfile.open(self.path, "r:")  # noqa: SIM115 (closed below)
        except tarfile.ReadError:
            raise InputError(
                f"{self.path} is not an uncompressed tar file; webdataset's shards are not "
                "compressed, unpack it or write it anew"
            ) from None
        with opened as archive:
            while True:
                try:
                    member = archive.next()
                except (tarfile.ReadError, OSError):
                    self.cut = True
                    return
                if member is None:
                    self.cut = not self._ends_at(vars(archive)["offset"])
                    return
                # The module would keep every header that it has seen.
                vars(archive)["members"] = []
                suffix = os.path.splitext(member.name)[1].lower()  # noqa: PTH122 (text, no path)
                if not member.isfile():
                    continue
                if suffix in suffixes:
                    yield member, None
                elif suffix in (".cls", ".json") and member.size <= MAX_LABEL_BYTES:
                    text = self._label(archive, member, suffix)
                    if text is not None:
                        yield member, text

    def _ends_at(self, offset: int) -> bool:
        """Whether the mark of the end is there; the module takes the end of the file for one."""
        with self.path.open("rb") as stream:
            stream.seek(offset)
            return stream.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)

    def _label(self, archive: tarfile.TarFile, member: tarfile.TarInfo, suffix: str) -> Any:
        stream = archive.extractfile(member)
        try:
            data = stream.read() if stream is not None else b""
        except tarfile.ReadError:  # the shard ends here, as the next header will tell
            return None
        try:
            text = data.decode()
            if suffix == ".cls":
                return text.strip()
            values = json.loads(text)
        except ValueError:
            raise InputError(
                f"{self.path}:{member.name} cannot be read as a label; expected "
                f"{'a class index' if suffix == '.cls' else 'JSON with a label'}"
            ) from None
        return values.get("label") if isinstance(values, dict) else None
