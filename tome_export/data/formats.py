"""Folders, tar shards and Parquet files, each listed by the rules of those who made the format.

Samples of a tar file are those that ``webdataset`` groups; columns and classes of a Parquet file
are those that Hugging Face ``datasets`` reads from its schema, and a listing is one of its tables.
The images themselves are not read through its loaders: they give a data set either as a stream from
its first image on or after copying every image into a cache, whereas an evaluation takes images
evenly from all, goes on where it was killed, and hands chunks to processes and machines in any
order. So ``pyarrow`` reads row groups, and ``tarfile`` says where members lie. Nor are folders
listed by ``imagefolder``: it takes the innermost folder for the class where torchvision's
``ImageFolder`` takes the outermost, makes splits of folders named ``test``, and ends at a link to
nowhere or a name that is not UTF-8, where all other images are wanted.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import tarfile
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tome_export.data.labels import Classes, LabelFile, class_folders, numbered_classes
from tome_export.data.source import Places, Source, printable, stamp
from tome_export.errors import InputError

MAX_LABEL_BYTES = 1 << 20
"""Largest ``.json`` or ``.cls`` member that is read."""

LABELS = ("label", "labels")
"""Columns of a Parquet file that hold its labels."""


def folder_source(
    folder: Path, suffixes: Collection[str], classes: Classes | None, labels: LabelFile | None
) -> Source:
    """List the images of a folder.

    Args:
        folder: With one sub-folder per class, or with the images themselves.
        suffixes: How names of images end, lower case.
        classes: Of the model; None for a model without classes, whose labels are not looked at.
        labels: Class per image, which then counts instead of the sub-folder's.

    Raises:
        InputError: if there is no image, images lie both beside and inside sub-folders, or a
            class is none of the model's.
    """
    root = folder.absolute()
    with os.scandir(root) as found:
        entries = list(found)
    flat = any(not _is_folder(e) for e in entries if _is_image(e.name, suffixes))
    folders = sorted(e.name for e in entries if _is_folder(e) and e.name[0] != ".")
    index: dict[str, int] = {}
    notes: tuple[str, ...] = ()
    by_folder = classes is not None and labels is None and not flat
    if by_folder and folders and classes is not None:
        index, note = class_folders(folders, classes)
        notes = (note,)
    places, values, nested = Places(), [], False
    digest = hashlib.sha256()
    for name, mark in _files(root, "", suffixes, set()):
        places.add(name)
        top = name.partition("/")[0]
        nested = nested or top != name
        if labels is not None and classes is not None:
            values.append(labels.take(name, classes))
        elif by_folder:
            values.append(index[top])
        digest.update(os.fsencode(f"{name}\0{mark}\0"))
    if not places:
        raise InputError(
            f"no images under {folder}; expected class sub-folders with, or flat, files ending in "
            f"{', '.join(suffixes)}, or .tar or .parquet shards"
        )
    if classes is not None and labels is None and flat and nested:
        raise InputError(
            f"{folder} has images both beside and inside sub-folders; keep one layout, or give "
            "every image's class with --labels"
        )
    if labels is not None:
        labels.finish(folder)
    return Source(
        "folder", printable(str(folder)), digest.hexdigest(), _array(values), (root,), notes,
        places.dataset(),
    )  # fmt: skip


def _array(values: list[int]) -> Any:
    return np.asarray(values, dtype=np.int32) if values else None


def _files(
    path: Path, below: str, suffixes: Collection[str], seen: set[tuple[int, int]]
) -> Iterator[tuple[str, str]]:
    """Relative path and stamp of every image, folder by folder in sorted order."""
    status = path.stat()
    # A link may lead back up.
    if (status.st_dev, status.st_ino) in seen:
        return
    seen.add((status.st_dev, status.st_ino))
    folders = []
    with os.scandir(path) as entries:
        for entry in sorted(entries, key=lambda e: e.name):
            if _is_folder(entry):
                folders += [entry.name] if entry.name[0] != "." else []
            elif _is_image(entry.name, suffixes):
                try:
                    mark = stamp(entry)
                except OSError:  # a link that leads nowhere: unreadable, but listed
                    mark = "missing"
                yield f"{below}{entry.name}", mark
    for name in folders:
        yield from _files(path / name, f"{below}{name}/", suffixes, seen)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads in a circle
        return False


def _is_image(name: str, suffixes: Collection[str]) -> bool:
    return os.path.splitext(name)[1].lower() in suffixes  # noqa: PTH122 (a million names)


def tar_source(
    text: str, paths: Sequence[Path], suffixes: Collection[str], classes: Classes | None
) -> Source:
    """List the samples of tar shards, reading headers and labels only.

    A sample is what webdataset makes one of: members next to each other whose paths are the same
    up to the first dot of the file's name. What follows that dot names the member within it.

    Args:
        text: What the user gave.
        paths: Shards, uncompressed.
        suffixes: How names of images end, lower case.
        classes: Of the model; None for a model without classes.

    Raises:
        InputError: if a shard is no tar file, a sample has two images, there is no image, or
            labels are missing for some images or none of the model's.
    """
    from webdataset.tariterators import group_by_keys

    places, notes, values, lonely = Places(), [], [], 0
    digest = hashlib.sha256()
    for number, path in enumerate(paths):
        digest.update(os.fsencode(f"{path.absolute()}\0{stamp(path)}\0"))
        before = len(places)
        shard = _Shard(path, suffixes)
        try:
            for sample in group_by_keys(shard.members()):
                image, label = _image_of(sample, suffixes, path), _label_of(sample)
                if image is None:
                    lonely += label is not None
                    continue
                # Where the shard is cut, the label of the last image may be lost with its tail.
                if shard.cut and label is None:
                    continue
                name, start, length = image
                places.add(name, number, start, length)
                if classes is not None and label is not None:
                    values.append(classes.index(label, printable(f"{path.name}:{name}")))
        except ValueError as error:
            reason = printable(str(error.args[0]).partition(" dict_keys")[0])
            raise InputError(
                f"{path} is no shard of webdataset ({reason}); write it anew"
            ) from None
        if shard.cut:
            count = len(places) - before
            notes.append(f"{printable(str(path))} is cut short after {count} images; copy it again")
    if not places:
        raise InputError(
            f"no images in {text}; expected members such as 000001.jpg with 000001.cls"
        )
    if lonely and classes is not None:
        notes.append(f"{lonely} labels have no image beside them in the shard and are not used")
    if len(values) not in (0, len(places)):
        raise InputError(
            f'{text} has labels (.cls, or .json with "label") for {len(values)} of {len(places)} '
            "images; label all or none"
        )
    roots = tuple(path.absolute() for path in paths)
    return Source(
        "tar", text, digest.hexdigest(), _array(values), roots, tuple(notes), places.dataset()
    )


def _named(sample: dict[str, Any], suffixes: Collection[str]) -> list[str]:
    """Members of a sample by how they end: ``jpg``, or if there is none ``left.jpg``."""
    fields = [field for field in sample if not field.startswith("__")]
    exact = [field for field in fields if f".{field}" in suffixes]
    return exact or [f for f in fields if f".{f.rpartition('.')[2]}" in suffixes]


def _image_of(
    sample: dict[str, Any], suffixes: Collection[str], path: Path
) -> tuple[str, int, int] | None:
    found = _named(sample, suffixes)
    if len(found) > 1:
        shown = ", ".join(map(printable, found[:3])) + (", …" if len(found) > 3 else "")
        key = printable(sample["__key__"])
        raise InputError(
            f"{path} has {len(found)} images under one key, {key} ({shown}); webdataset's key ends "
            "at the first dot of a file's name, write the shard with one image for each"
        )
    return sample[found[0]] if found else None


def _label_of(sample: dict[str, Any]) -> Any:
    for suffix in (".cls", ".json"):
        for field in _named(sample, (suffix,)):
            if sample[field] is not None:
                return sample[field]
    return None


class _Shard:
    """One pass over the headers of a tar file."""

    def __init__(self, path: Path, suffixes: Collection[str]) -> None:
        self.path, self.suffixes, self.cut = path, suffixes, False

    def members(self) -> Iterator[dict[str, Any]]:
        """Images as name, offset and size, labels as they are; as webdataset passes them on."""
        for member, data in self._scanned():
            yield {"fname": member.name, "data": data, "__url__": str(self.path)}

    def _scanned(self) -> Iterator[tuple[tarfile.TarInfo, Any]]:
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
                base, suffix = os.path.split(member.name)[1], Path(member.name).suffix.lower()
                # What macOS adds, and webdataset's own notes.
                if not member.isfile() or base.startswith((".", "__")):
                    continue
                if suffix in self.suffixes:
                    yield member, (member.name, member.offset_data, member.size)
                elif suffix in (".cls", ".json") and member.size <= MAX_LABEL_BYTES:
                    yield member, self._label(archive, member, suffix)

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
            values = {"label": text.strip()} if suffix == ".cls" else json.loads(text)
        except (ValueError, RecursionError):
            raise InputError(
                f"{self.path}:{printable(member.name)} cannot be read as a label; expected "
                f"{'a class index' if suffix == '.cls' else 'JSON with a label'}"
            ) from None
        return values.get("label") if isinstance(values, dict) else None


def parquet_source(text: str, paths: Sequence[Path], classes: Classes | None) -> Source:
    """List the rows of Parquet files, reading their footers and labels only.

    Args:
        text: What the user gave.
        paths: Files with a column of images: bytes, or a struct with ``bytes``.
        classes: Of the model; None for a model without classes.

    Raises:
        InputError: if a file is no Parquet file, has no such column or no row, or a label is none
            of the model's.
    """
    import pyarrow
    from pyarrow import parquet

    places, column = Places(), ""
    parts: list[list[int] | None] = []
    notes: dict[str, None] = {}
    digest = hashlib.sha256()
    for number, path in enumerate(paths):
        digest.update(os.fsencode(f"{path.absolute()}\0{stamp(path)}\0"))
        try:
            file = parquet.ParquetFile(path)
        except (pyarrow.ArrowException, OSError):
            raise InputError(f"{path} is not a whole Parquet file; copy it again") from None
        with file:
            features = _features(file.schema_arrow, path)
            column = _image_column(features, column, path)
            row = 0
            for group in range(file.num_row_groups):
                for within in range(file.metadata.row_group(group).num_rows):
                    places.add(f"row {row}", number, group, within)
                    row += 1
            if classes is not None:
                parts.append(_labels(file, features, path, classes, notes))
    if not places:
        raise InputError(f"no images in {text}; the Parquet files have no rows")
    known = [part for part in parts if part is not None]
    if known and len(known) != len(parts):
        raise InputError(f"{text} has labels in some of its files only; label all or none")
    return Source(
        "parquet", text, digest.hexdigest(), _array([*itertools.chain(*known)]),
        tuple(path.absolute() for path in paths), tuple(notes), places.dataset(), column,
    )  # fmt: skip


def _features(schema: Any, path: Path) -> Any:
    """Columns as ``datasets`` wrote them: which hold images, and names of classes."""
    os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
    from datasets import Features

    try:
        return Features.from_arrow_schema(schema)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = printable(" ".join(str(error).split()))[:200]
        raise InputError(
            f"{path} has a description by Hugging Face datasets that cannot be read ({reason}); "
            "write it anew"
        ) from None


def _image_column(features: Any, expected: str, path: Path) -> str:
    from datasets import Image

    images = [name for name, feature in features.items() if isinstance(feature, Image)]
    if expected:
        images = [expected] if expected in features else []
    elif "image" in features or len(images) != 1:
        images = ["image"] if "image" in features else []
    if not images:
        raise InputError(
            f"{path} has the columns {', '.join(features)}; expected {expected or 'image'!r} and "
            f"{LABELS[0]!r}"
        )
    return str(images[0])


def _labels(
    file: Any, features: Any, path: Path, classes: Classes, notes: dict[str, None]
) -> list[int] | None:
    from datasets import ClassLabel

    column = next((name for name in LABELS if name in features), None)
    values = file.read(columns=[column])[column].to_pylist() if column is not None else []
    # Hugging Face marks test images without a label with -1.
    if all(value in (None, -1) for value in values):
        return None
    feature = features[column]
    names = feature.names if isinstance(feature, ClassLabel) else None
    if names and classes.by_name:
        index, note = numbered_classes(names, classes, path.name)
        notes[note] = None
        values = [
            index[value] if isinstance(value, int) and 0 <= value < len(index) else value
            for value in values
        ]
    where = f"{path.name}:row"
    return [classes.index(value, f"{where} {row}") for row, value in enumerate(values)]
