"""A folder of images: one sub-folder per class as torchvision's ``ImageFolder``, or flat."""

from __future__ import annotations

import hashlib
import os
import stat
from array import array
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tome_export.errors import InputError
from tome_export.evaluation.class_folders import class_folders
from tome_export.evaluation.source import Classes, Kind, Labels, Names, printable, stamp

if TYPE_CHECKING:
    from tome_export.evaluation.label_file import LabelFile


@dataclass(frozen=True)
class FileItem:
    """An image file."""

    name: str
    path: str

    def load(self) -> bytes:
        """See ``Item``."""
        # A pipe would be waited for without end, and a device may do anything.
        if not stat.S_ISREG(os.stat(self.path).st_mode):  # noqa: PTH116 (a million names)
            raise InputError(f"{self.name} is not a regular file; expected an image")
        return Path(self.path).read_bytes()


@dataclass(frozen=True)
class FolderSource:
    """Image files under a folder; see ``Source``."""

    text: str
    root: Path
    names: Names
    labels: Labels | None
    digest: str
    notes: tuple[str, ...] = ()
    kind: Kind = "folder"

    @property
    def roots(self) -> tuple[Path, ...]:
        """See ``Source``."""
        return (self.root,)

    def __len__(self) -> int:
        return len(self.names)

    def item(self, index: int) -> FileItem:
        """See ``Source``."""
        name = self.names[index]
        return FileItem(printable(name), str(self.root / name))


def folder_source(
    folder: Path, suffixes: Collection[str], classes: Classes | None, labels: LabelFile | None
) -> FolderSource:
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
    with os.scandir(root) as found_entries:
        entries = list(found_entries)
    flat = any(not _is_folder(e) for e in entries if _is_image(e.name, suffixes))
    folders = sorted(e.name for e in entries if _is_folder(e) and e.name[0] != ".")
    names, found = Names(), array("i")
    notes: tuple[str, ...] = ()
    digest = hashlib.sha256()
    by_folder = classes is not None and labels is None and not flat
    index: dict[str, int] = {}
    if by_folder and folders and classes is not None:
        index, note = class_folders(folders, classes)
        notes = (note,)
    nested = False
    for name, mark in _files(root, suffixes):
        names.append(name)
        top = name.partition("/")[0]
        nested = nested or top != name
        if labels is not None and classes is not None:
            found.append(labels.take(name, classes))
        elif by_folder:
            found.append(index[top])
        digest.update(os.fsencode(f"{name}\0{mark}\0"))
    if not names:
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
    values = np.asarray(found, dtype=np.int32) if len(found) else None
    return FolderSource(printable(str(folder)), root, names, values, digest.hexdigest(), notes)


def _files(root: Path, suffixes: Collection[str]) -> Iterator[tuple[str, str]]:
    """Relative path and stamp of every image, folder by folder in sorted order."""
    seen: set[tuple[int, int]] = set()

    def walk(path: Path, below: str) -> Iterator[tuple[str, str]]:
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
                    yield f"{below}{entry.name}", _stamp(entry)
        for name in folders:
            yield from walk(path / name, f"{below}{name}/")

    yield from walk(root, "")


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads in a circle
        return False


def _stamp(entry: os.DirEntry[str]) -> str:
    try:
        return stamp(entry)
    except OSError:  # a link that leads nowhere: unreadable, but listed
        return "missing"


def _is_image(name: str, suffixes: Collection[str]) -> bool:
    return os.path.splitext(name)[1].lower() in suffixes  # noqa: PTH122 (a million names)
