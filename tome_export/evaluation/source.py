"""Where images come from: listed cheaply once, then read one by one by whoever decodes them."""

from __future__ import annotations

import hashlib
import os
import re
from array import array
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from tome_export.errors import InputError

Pixels = NDArray[np.float32]
Labels = NDArray[np.int32]
Kind = Literal["folder", "tar", "parquet", "samples"]


class Item(Protocol):
    """One image, small enough to be sent to another process or machine."""

    @property
    def name(self) -> str:
        """What people call it."""

    def load(self) -> bytes | Pixels:
        """The encoded image, or pixels ``[C, H, W]`` that are already preprocessed.

        Raises:
            InputError: if it is not there in full.
            OSError: if it cannot be read.
        """


class Source(Protocol):
    """A listing of images. It holds no pixels, so that it may list millions."""

    @property
    def kind(self) -> Kind:
        """Its format."""

    @property
    def text(self) -> str:
        """What the user gave."""

    @property
    def labels(self) -> Labels | None:
        """Class index per image ``[B]`` int32; None where there are none."""

    @property
    def digest(self) -> str:
        """Changes when an image, its place, size or time of change does."""

    @property
    def roots(self) -> tuple[Path, ...]:
        """Folders and files that must be there to read the images."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know of the listing."""

    def __len__(self) -> int: ...

    def item(self, index: int) -> Item:
        """Where one image is."""


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


class Names:
    """Many strings in two flat arrays: a tenth of the memory of a list."""

    def __init__(self, names: Iterable[str] = ()) -> None:
        self._text = bytearray()
        self._ends = array("Q")
        for name in names:
            self.append(name)

    def append(self, name: str) -> None:
        """Add one."""
        self._text += os.fsencode(name)
        self._ends.append(len(self._text))

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> str:
        start = self._ends[index - 1] if index else 0
        return os.fsdecode(bytes(self._text[start : self._ends[index]]))


@dataclass(frozen=True)
class Classes:
    """The classes of a model.

    Attributes:
        count: Number of its outputs.
        names: One per output, where the model brings names.
    """

    count: int
    names: tuple[str, ...] | None = None
    by_name: Mapping[str, int] = field(init=False)

    def __post_init__(self) -> None:
        names = self.names or ()
        # ImageNet has two classes of one name ("crane"): such a name says nothing.
        single = {n: i for i, n in enumerate(names) if names.count(n) == 1}
        object.__setattr__(self, "by_name", single)

    def index(self, value: object, where: str) -> int:
        """The class that a label means: a whole number, or a name.

        Raises:
            InputError: if it means none.
        """
        text = str(value).strip()
        if text.removeprefix("-").isascii() and text.removeprefix("-").isdigit():
            index = int(text)
            if not 0 <= index < self.count:
                raise InputError(
                    f"{where} has label {index}; the model has {self.count} outputs, expected "
                    f"0 to {self.count - 1}"
                )
            return index
        if text in self.by_name:
            return self.by_name[text]
        known = (
            f"one of its names ({', '.join(list(self.by_name)[:5])}, …)"
            if self.by_name
            else "no name, as this model brings none"
        )
        raise InputError(
            f"{where} has label {text!r}; expected an index from 0 to {self.count - 1}, or {known}"
        )


@dataclass(frozen=True)
class ArrayItem:
    """Pixels that are in memory."""

    name: str
    pixels: Pixels

    def load(self) -> Pixels:
        """See ``Item``."""
        return self.pixels


@dataclass(frozen=True)
class ArraySource:
    """Labelled images in memory, preprocessed, such as those that come with a recipe.

    Attributes:
        pixels: ``[B, C, H, W]`` float32.
        labels: ``[B]`` int32.
        kind: ``samples``.
        text: ``samples``.
        digest: Of both arrays.
        roots: None.
        notes: None.
    """

    pixels: Pixels
    labels: Labels | None
    kind: Kind = "samples"
    text: str = "samples"
    digest: str = field(init=False)
    roots: tuple[Path, ...] = ()
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        digest = hashlib.sha256(np.ascontiguousarray(self.pixels).tobytes())
        if self.labels is not None:
            digest.update(self.labels.tobytes())
        object.__setattr__(self, "digest", digest.hexdigest())

    def __len__(self) -> int:
        return len(self.pixels)

    def item(self, index: int) -> ArrayItem:
        """See ``Source``."""
        return ArrayItem(f"sample {index}", self.pixels[index])


def stamp(path: str | Path | os.DirEntry[str]) -> str:
    """Size and time of change of a file, for the digest of a listing."""
    found: Any = path.stat() if isinstance(path, os.DirEntry) else Path(path).stat()
    return f"{found.st_size} {found.st_mtime_ns}"
