"""A listing of images: made cheaply once, then read one by one by whoever decodes them."""

from __future__ import annotations

import hashlib
import os
import re
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from tome_export.data.decoder import DecodeError, check_size
from tome_export.errors import InputError

Pixels = NDArray[np.float32]
Labels = NDArray[np.int32]
Kind = Literal["folder", "tar", "parquet", "samples"]

_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def printable(name: str) -> str:
    """A name that any terminal, file and parser takes, on one line.

    File names are bytes: those that are not UTF-8, and control characters, become escapes.
    """
    return _UNPRINTABLE.sub(_escape, name)


def _escape(found: re.Match[str]) -> str:
    code = ord(found[0])
    # Python reads a byte that is not UTF-8 as a lone surrogate from here on.
    if 0xDC80 <= code <= 0xDCFF:
        return f"\\x{code - 0xDC00:02x}"
    return found[0].encode("unicode_escape").decode()


@dataclass(frozen=True)
class Item:
    """One image, small enough to be sent to another process or machine.

    Attributes:
        name: What people call it.
        content: ``[C, H, W]`` float32 that are already preprocessed, or what reads the encoded
            image, or such pixels, and is told the name for its errors; can be pickled.
    """

    name: str
    content: Pixels | Callable[[str], bytes | Pixels]

    def load(self) -> bytes | Pixels:
        """The encoded image, or its pixels.

        Raises:
            InputError: if it is not there in full.
            OSError: if it cannot be read.
        """
        return self.content(self.name) if callable(self.content) else self.content


Reader = Callable[[str, str, int, int, str], bytes]
"""Reads an image: path of the root, name in it, two numbers of its place, and the shown name."""


class Source:
    """A listing of images, made image by image. It holds no encoded image: it may list millions.

    Args:
        pixels: ``[B, C, H, W]`` float32 of samples, preprocessed.

    Attributes:
        roots: Folders and files that must be there to read the images.
        read: What reads an image of the folder or the shards; samples have none.
        classes: Class index of each image; empty where there are no labels.
        notes: What a user should know of the listing.
    """

    read: Reader

    def __init__(
        self, kind: Kind, text: str, paths: Sequence[Path] = (), pixels: Pixels | None = None
    ) -> None:
        self.kind: Kind = kind
        self.text = text
        self.roots = tuple(path.absolute() for path in paths)
        self.classes: list[int] = []
        self.notes: list[str] = []
        self._pixels = pixels
        self._names: list[str] = []
        self._places = array("q")
        self._digest = hashlib.sha256()
        if pixels is not None:
            self._digest.update(np.ascontiguousarray(pixels).tobytes())
        for path in self.roots if kind != "folder" else ():
            self._digest.update(os.fsencode(f"{path}\0{stamp(path)}\0"))

    def __len__(self) -> int:
        return len(self._names if self._pixels is None else self._pixels)

    def add(self, name: str, root: int = 0, start: int = 0, size: int = 0, mark: str = "") -> None:
        """Add an image.

        Args:
            name: Its path below the root.
            root: Index of the root that it is in.
            start: In a tar file the offset of its bytes, in Parquet its row group.
            size: In a tar file the number of its bytes, in Parquet its row within the group.
            mark: The ``stamp`` of an image that is a file.
        """
        self._names.append(name)
        self._places.extend((root, start, size))
        if mark:
            self._digest.update(os.fsencode(f"{name}\0{mark}\0"))

    @property
    def labels(self) -> Labels | None:
        """Class index per image ``[B]`` int32; None where there are none."""
        return np.asarray(self.classes, np.int32) if self.classes else None

    @property
    def digest(self) -> str:
        """Changes when an image, its place, size, time of change or label does."""
        digest = self._digest.copy()
        digest.update(np.asarray(self.classes, np.int32).tobytes())
        return digest.hexdigest()

    def items(self, indices: Iterable[int]) -> list[Item]:
        """Some of the images, in the order of ``indices``."""
        return [self._item(int(index)) for index in indices]

    def _item(self, index: int) -> Item:
        if self._pixels is not None:
            return Item(f"sample {index}", self._pixels[index])
        name = self._names[index]
        number, start, size = self._places[3 * index : 3 * index + 3]
        root = self.roots[number]
        shown = printable(name if self.kind == "folder" else f"{root.name}:{name}")
        return Item(shown, partial(self.read, str(root), name, start, size))


def samples_source(pixels: Pixels, labels: Labels | None) -> Source:
    """Images ``[B, C, H, W]`` in memory, preprocessed, with labels ``[B]`` if there are any."""
    source = Source("samples", "samples", pixels=pixels)
    source.classes = [] if labels is None else labels.tolist()
    return source


def stamp(path: Path) -> str:
    """Size and time of change of a file, for the digest of a listing."""
    status = path.stat()
    return f"{status.st_size} {status.st_mtime_ns}"


def require_size(size: int, name: str) -> None:
    """Raise ``InputError`` if an encoded image has more bytes than are read."""
    try:
        check_size(size)
    except DecodeError as error:
        raise InputError(f"{name} {error}") from None


def selection(count: int, limit: int | None) -> NDArray[np.int64]:
    """Indices ``[B]`` of the images to take: evenly over the listing, which is sorted by class."""
    taken = count if limit is None else min(count, limit)
    return np.arange(taken, dtype=np.int64) * count // taken
