"""A listing of images: made cheaply once, then read one by one by whoever decodes them."""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from tome_export.errors import InputError

if TYPE_CHECKING:
    from datasets import Dataset

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
        kind: Of its source.
        path: The file that it is, or is in.
        start: Of a tar file the offset of its bytes, of Parquet its row group.
        size: Of a tar file the number of its bytes, of Parquet its row within the group.
        column: Of Parquet, where images are.
        pixels: ``[C, H, W]`` float32 that are already preprocessed, of samples.
    """

    name: str
    kind: Kind
    path: str = ""
    start: int = 0
    size: int = 0
    column: str = ""
    pixels: Pixels | None = None

    def load(self) -> bytes | Pixels:
        """The encoded image, or its pixels.

        Raises:
            InputError: if it is not there in full.
            OSError: if it cannot be read.
        """
        if self.pixels is not None:
            return self.pixels
        if self.kind == "parquet":
            value = _images(self.path, self.start, self.column)[self.size].as_py()
            data = value.get("bytes") if isinstance(value, dict) else value
            if not isinstance(data, bytes):
                raise InputError(
                    f"{self.name} holds no bytes; expected the image itself in the shard"
                )
            return data
        # A pipe would be waited for without end, and a device may do anything.
        if not stat.S_ISREG(os.stat(self.path).st_mode):  # noqa: PTH116 (a million names)
            raise InputError(f"{self.name} is not a regular file; expected an image")
        if self.kind == "folder":
            return Path(self.path).read_bytes()
        with Path(self.path).open("rb") as stream:
            stream.seek(self.start)
            data = stream.read(self.size)
        if len(data) < self.size:
            raise InputError(
                f"{self.name} is cut short: {len(data)} of {self.size} bytes are in the shard; "
                "copy the shard again"
            )
        return data


@lru_cache(maxsize=1)
def _images(path: str, group: int, column: str) -> Any:
    """The images of one row group: neighbours are wanted next, so the last group is kept."""
    from pyarrow import parquet

    with parquet.ParquetFile(path) as file:
        return file.read_row_group(group, columns=[column])[column]


@dataclass(frozen=True)
class Source:
    """A listing of images. It holds no encoded image, so that it may list millions.

    Attributes:
        kind: Its format.
        text: What the user gave.
        digest: Changes when an image, its place, size or time of change does.
        labels: Class index per image ``[B]`` int32; None where there are none.
        roots: Folders and files that must be there to read the images.
        notes: What a user should know of the listing.
        places: Where each image is: ``name``, number of the root, and ``start`` and ``size`` as of
            ``Item``; None for samples.
        column: As of ``Item``.
        pixels: ``[B, C, H, W]`` float32 of samples, preprocessed.
    """

    kind: Kind
    text: str
    digest: str
    labels: Labels | None
    roots: tuple[Path, ...] = ()
    notes: tuple[str, ...] = ()
    places: Dataset | None = None
    column: str = ""
    pixels: Pixels | None = None

    def __len__(self) -> int:
        return len(self.places) if self.places is not None else len(self._pixels)

    @property
    def _pixels(self) -> Pixels:
        return self.pixels if self.pixels is not None else np.zeros((0, 1, 1, 1), np.float32)

    def items(self, indices: Iterable[int]) -> list[Item]:
        """Some of the images, in the order of ``indices``."""
        chosen = [int(index) for index in indices]
        if self.places is None:
            return [Item(f"sample {i}", self.kind, pixels=self._pixels[i]) for i in chosen]
        rows = self.places[chosen]
        return [
            self._item(os.fsdecode(name), file, start, size)
            for name, file, start, size in zip(
                rows["name"], rows["file"], rows["start"], rows["size"], strict=True
            )
        ]

    def _item(self, name: str, file: int, start: int, size: int) -> Item:
        root = self.roots[file]
        if self.kind == "folder":
            return Item(printable(name), self.kind, str(root / name))
        shown = printable(f"{root.name}:{name}")
        return Item(shown, self.kind, str(root), start, size, self.column)


class Listing:
    """A ``Source`` that is put together image by image.

    Attributes:
        labels: Class of each image; empty where there are none.
        notes: As of ``Source``.
        column: As of ``Source``.
    """

    def __init__(self, kind: Kind, text: str, paths: Sequence[Path]) -> None:
        self.labels: list[int] = []
        self.notes: list[str] = []
        self.column = ""
        self._kind: Kind = kind
        self._text = text
        self._roots = tuple(path.absolute() for path in paths)
        self._rows: list[tuple[bytes, int, int, int]] = []
        self._digest = hashlib.sha256()
        for path in self._roots if kind != "folder" else ():
            self._digest.update(os.fsencode(f"{path}\0{stamp(path)}\0"))

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, name: str, file: int = 0, start: int = 0, size: int = 0, mark: str = "") -> None:
        """Add an image; see ``Item``. ``mark`` is the ``stamp`` of one that is a file."""
        self._rows.append((os.fsencode(name), file, start, size))
        if mark:
            self._digest.update(os.fsencode(f"{name}\0{mark}\0"))

    def source(self) -> Source:
        """The finished listing."""
        # Nothing is looked up anywhere; should the library want to, it is told not to.
        os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
        from datasets import Dataset, Features, Value

        kinds = {"name": "binary", "file": "int32", "start": "int64", "size": "int64"}
        columns = dict(zip(kinds, zip(*self._rows, strict=True), strict=True))
        features = Features({name: Value(kind) for name, kind in kinds.items()})
        places = Dataset.from_dict(columns, features=features)
        labels = np.asarray(self.labels, dtype=np.int32) if self.labels else None
        digest = self._digest.hexdigest()
        return Source(
            self._kind, self._text, digest, labels, self._roots, tuple(self.notes), places,
            self.column,
        )  # fmt: skip


def samples_source(pixels: Pixels, labels: Labels | None) -> Source:
    """Images in memory, preprocessed, such as those that come with a recipe.

    Args:
        pixels: ``[B, C, H, W]`` float32.
        labels: ``[B]`` int32.
    """
    digest = hashlib.sha256(np.ascontiguousarray(pixels).tobytes())
    if labels is not None:
        digest.update(labels.tobytes())
    return Source("samples", "samples", digest.hexdigest(), labels, pixels=pixels)


def stamp(path: Path) -> str:
    """Size and time of change of a file, for the digest of a listing."""
    status = path.stat()
    return f"{status.st_size} {status.st_mtime_ns}"


def selection(count: int, limit: int | None) -> NDArray[np.int64]:
    """Indices ``[B]`` of the images to take: evenly over the listing, which is sorted by class."""
    taken = count if limit is None else min(count, limit)
    return np.arange(taken, dtype=np.int64) * count // taken
