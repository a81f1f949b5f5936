"""A listing of images: made cheaply once, then read one by one by whoever decodes them."""

from __future__ import annotations

import hashlib
import os
import re
import stat
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from tome_export.data.decoder import DecodeError, check_size
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
            try:
                value = _images(self.path, self.start, self.column)[self.size].as_py()
            # Arrow raises errors of its own and of Python's, whichever part is damaged.
            except Exception as error:
                reason = printable(" ".join(str(error).split()))[:200]
                raise InputError(
                    f"{self.name} cannot be read from the shard ({reason}); copy it again"
                ) from None
            data = value.get("bytes") if isinstance(value, dict) else value
            if not isinstance(data, bytes):
                raise InputError(
                    f"{self.name} holds no bytes; expected the image itself in the shard"
                )
            return data
        # A pipe would be waited for without end, and a device may do anything.
        found = os.stat(self.path)  # noqa: PTH116 (a million names)
        if not stat.S_ISREG(found.st_mode):
            raise InputError(f"{self.name} is not a regular file; expected an image")
        try:
            check_size(found.st_size if self.kind == "folder" else self.size)
        except DecodeError as error:
            raise InputError(f"{self.name} {error}") from None
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


@lru_cache(maxsize=2)
def _images(path: str, group: int, column: str) -> Any:
    """The images of one row group; the last two are kept, since neighbours are wanted next."""
    from pyarrow import parquet

    with parquet.ParquetFile(path) as file:
        return file.read_row_group(group, columns=[column])[column]


class Source:
    """A listing of images, made image by image. It holds no encoded image: it may list millions.

    Args:
        kind: Its format.
        text: What the user gave.
        paths: The folder, or the shards.
        pixels: ``[B, C, H, W]`` float32 of samples, preprocessed.

    Attributes:
        kind: Its format.
        text: What the user gave.
        roots: Folders and files that must be there to read the images.
        classes: Class index of each image; empty where there are no labels.
        notes: What a user should know of the listing.
        column: As of ``Item``.
    """

    def __init__(
        self, kind: Kind, text: str, paths: Sequence[Path] = (), pixels: Pixels | None = None
    ) -> None:
        self.kind: Kind = kind
        self.text = text
        self.roots = tuple(path.absolute() for path in paths)
        self.classes: list[int] = []
        self.notes: list[str] = []
        self.column = ""
        self._pixels = pixels
        self._names: list[bytes] = []
        self._numbers = array("q")
        self._count = 0
        self._digest = hashlib.sha256()
        if pixels is not None:
            self._digest.update(np.ascontiguousarray(pixels).tobytes())
        for path in self.roots if kind != "folder" else ():
            self._digest.update(os.fsencode(f"{path}\0{stamp(path)}\0"))

    def __len__(self) -> int:
        return self._count if self._pixels is None else len(self._pixels)

    def add(self, name: str, file: int = 0, start: int = 0, size: int = 0, mark: str = "") -> None:
        """Add an image of the root ``file``; see ``Item``.

        Args:
            name: Its path below the root.
            file: Which root.
            start: As of ``Item``.
            size: As of ``Item``.
            mark: The ``stamp`` of an image that is a file.
        """
        self._names.append(os.fsencode(name))
        self._numbers.extend((file, start, size))
        self._count += 1
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

    @cached_property
    def places(self) -> Dataset:
        """Where each image is, as a table of Arrow; whoever asks for it adds no more images."""
        # Nothing is looked up anywhere; should the library want to, it is told not to.
        os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
        from datasets import Dataset, Features, Value

        kinds = {"name": "binary", "file": "int32", "start": "int64", "size": "int64"}
        numbers = np.asarray(self._numbers).reshape(-1, 3).T
        columns = dict(zip(kinds, (self._names, *numbers), strict=True))
        self._names, self._numbers = [], array("q")
        features = Features({name: Value(kind) for name, kind in kinds.items()})
        return Dataset.from_dict(columns, features=features)

    def items(self, indices: Iterable[int]) -> list[Item]:
        """Some of the images, in the order of ``indices``."""
        chosen = [int(index) for index in indices]
        if self._pixels is not None:
            return [Item(f"sample {i}", self.kind, pixels=self._pixels[i]) for i in chosen]
        return [
            self._item(os.fsdecode(name), self.roots[file], start, size)
            for name, file, start, size in zip(*self.places[chosen].values(), strict=True)
        ]

    def _item(self, name: str, root: Path, start: int, size: int) -> Item:
        if self.kind == "folder":
            return Item(printable(name), self.kind, str(root / name))
        shown = printable(f"{root.name}:{name}")
        return Item(shown, self.kind, str(root), start, size, self.column)


def samples_source(pixels: Pixels, labels: Labels | None) -> Source:
    """Images ``[B, C, H, W]`` in memory, preprocessed, with labels ``[B]`` if there are any."""
    source = Source("samples", "samples", pixels=pixels)
    source.classes = [] if labels is None else labels.tolist()
    return source


def stamp(path: Path) -> str:
    """Size and time of change of a file, for the digest of a listing."""
    status = path.stat()
    return f"{status.st_size} {status.st_mtime_ns}"


def selection(count: int, limit: int | None) -> NDArray[np.int64]:
    """Indices ``[B]`` of the images to take: evenly over the listing, which is sorted by class."""
    taken = count if limit is None else min(count, limit)
    return np.arange(taken, dtype=np.int64) * count // taken
