"""What ``--data`` names: a folder of images, shards, or the samples that come along."""

from __future__ import annotations

import glob
import os
import re
import string
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tome_export.data.folders import some, suffix
from tome_export.data.labels import Classes
from tome_export.data.source import Source, printable, samples_source
from tome_export.errors import InputError, UsageError

if TYPE_CHECKING:
    from tome_export.models import Recipe

SAMPLES = "samples"
"""What names the images that come with a recipe."""

SHARDS = (".tar", ".parquet")

MOST_NAMES = 100_000
"""Most names that braces may stand for."""

MOST_CHARACTERS = 50_000_000
"""Most characters of all of them."""

MOST_NESTED = 20
"""Most braces within one another."""

EXPECTED = (
    "expected a folder of images, .tar or .parquet shards such as 'shard-{000..010}.tar', or "
    "'samples'"
)

LABELS_UNUSED = "--labels are not used: the model has no classes"


def find_data(data: Sequence[str], classes: Classes | None, labels: Path | None = None) -> Source:
    """List the images that a user named.

    Args:
        data: A folder; or shards by path, glob (``*``) or braces (``{000..010}``, ``{a,b}``).
        classes: Of the model; None for a model without classes.
        labels: File of labels for a folder of images.

    Raises:
        InputError: if there are none, or their labels are not usable.
        UsageError: if labels are given for shards, which hold their own.
    """
    from tome_export.data.formats import folder_source, parquet_source, tar_source
    from tome_export.data.preprocess import IMAGE_SUFFIXES

    text = printable(", ".join(data))
    paths = [path for given in data for path in expand(given)]
    notes = []
    if len(paths) == 1 and paths[0].is_dir():
        folder = paths[0]
        inside, others = _shards_in(folder)
        if not inside:
            source = folder_source(folder, IMAGE_SUFFIXES, classes, labels)
            return _noted(source, [LABELS_UNUSED] if labels and classes is None else [])
        if others:
            shown = printable(some(others))
            notes.append(f"read of {text} are its shards only; beside them are {shown}")
        paths = inside
        # As a data set is kept whose parts are in one folder.
        parts = sorted({re.split(r"[-_.]?\d|\.", path.name)[0] for path in paths})
        if len(parts) > 1:
            notes.append(
                f"read as one are the shards of {printable(some(parts))} in {text}; a star, as in "
                f"'{printable(parts[0])}*', takes those of one name"
            )
    kinds = {path.suffix.lower() for path in paths}
    if len(kinds) > 1 or not kinds <= set(SHARDS):
        raise InputError(
            f"data is {text}; expected one folder of images, or shards that all end in .tar or all "
            "in .parquet"
        )
    special = next((path for path in paths if not path.is_file()), None)
    if special is not None:
        raise InputError(f"{special} is not a regular file; expected .tar or .parquet shards")
    if labels is not None:
        raise UsageError("--labels are for a folder of images; shards hold their own labels")
    places: dict[tuple[int, int], Path] = {}
    for path in paths:
        if (first := places.setdefault(_place(path), path)) is not path:
            again = f", also as {first}" if first != path else ""
            raise InputError(f"the shard {path} is given twice{again}; give each once")
    if kinds == {".tar"}:
        return _noted(tar_source(text, paths, IMAGE_SUFFIXES, classes), notes)
    return _noted(parquet_source(text, paths, classes), notes)


def _noted(source: Source, notes: Sequence[str]) -> Source:
    source.notes += notes
    return source


def _place(path: Path) -> tuple[int, int]:
    """What tells whether two paths are one file or folder, also through links."""
    status = path.stat()
    return status.st_dev, status.st_ino


def labelled_source(recipe: Recipe) -> Source | None:
    """The labelled images that come with a recipe; None if there are none."""
    from tome_export.data.samples import labelled_samples

    found = labelled_samples(recipe)
    return None if found is None else samples_source(found[0], found[1].astype(np.int32))


def shared_path(data: Sequence[str], others: Sequence[str]) -> Path | None:
    """The first path, links followed, of whose images two such lists both have some; or None.

    Raises:
        InputError: if a path is not there.
    """
    first, second = (
        {
            one.resolve()
            for given in named
            for path in expand(given)
            for one in (path.is_dir() and _shards_in(path)[0]) or [path]
        }
        for named in (data, others)
    )
    for paths, above in ((second, first), (first, second)):
        places = set(map(_place, above))
        for path in sorted(paths):
            if not places.isdisjoint(map(_place, (path, *path.parents))):
                return path
    return None


def _shards_in(folder: Path) -> tuple[list[Path], list[str]]:
    """The shards right in a folder, and names of what is beside them; nothing that is hidden."""
    try:
        names = sorted(name for name in os.listdir(folder) if name[0] != ".")  # noqa: PTH208
    except OSError as error:
        raise InputError(
            f"{folder} cannot be read ({error.strerror}); allow it to be read"
        ) from None
    shards = [name for name in names if suffix(name) in SHARDS]
    return [folder / name for name in shards], [name for name in names if name not in {*shards}]


def expand(pattern: str) -> list[Path]:
    """The paths of a name with braces and stars, in order.

    Raises:
        InputError: if one is not there, or the braces stand for too many.
    """
    from braceexpand import braceexpand

    if not pattern:
        raise InputError(f"the name of the data is empty; {EXPECTED}")
    # A file may bear such characters in its name.
    if os.path.exists(pattern):  # noqa: PTH110 - which takes names that are too long
        return [Path(pattern)]
    paths: list[Path] = []
    for name in braceexpand(pattern, escape=False) if _is_small(pattern) else [pattern]:
        there = os.path.exists(name)  # noqa: PTH110
        magic = not there and glob.has_magic(name)
        found = sorted(glob.glob(name)) if magic else [name]  # noqa: PTH207
        if not there and not (found and os.path.exists(found[0])):  # noqa: PTH110
            raise InputError(f"{name} does not exist; {EXPECTED}")
        paths += map(Path, found)
    return paths


def _is_small(pattern: str) -> bool:
    """Whether braces are in pairs, and stand for as many names as can be looked up.

    The grammar is that of ``braceexpand``, which makes all names of a part before the first is
    taken, and calls itself for each part within another.

    Raises:
        InputError: if there are too many, or too many in one another.
    """
    # Of the pattern and each open part: where it begins, names of its words before the last comma,
    # those of the word since then, and whether it is neither a range nor nothing but a word.
    start, before, names, simple = 0, 0, 1, True
    parts: list[tuple[int, int, int, bool]] = []
    most = min(MOST_NAMES, MOST_CHARACTERS // len(pattern))
    for position, character in enumerate(pattern):
        if character == "{":
            parts.append((start, before, names, False))
            start, before, names, simple = position + 1, 0, 1, True
        elif character == "}" and not parts:
            return False
        elif character == "}":
            inside = before + names
            if simple:
                try:
                    inside = _in_range(pattern[start:position])
                except ValueError:  # a number of thousands of digits
                    return False
            start, before, names, simple = parts.pop()
            names *= inside
        elif character == "," and parts:
            before, names, simple = before + names, 1, False
        if before + names > most or len(parts) > MOST_NESTED:
            raise InputError(
                f"{pattern[:80]}{'…' * (len(pattern) > 80)} stands for too many names; expected "
                f"at most {most:,}, and braces at most {MOST_NESTED} deep: give a folder, or a star"
            )
    return not parts


def _in_range(text: str) -> int:
    """How many names ``1..9`` or ``a..z`` stand for, with a step or without; 1 if it is neither."""
    found = re.match(r"(-?\d+)\.\.(-?\d+)(?:\.\.-?(\d+))?$", text)
    index: Callable[[str], int] = int
    if found is None:
        found = re.match(r"([A-Za-z])\.\.([A-Za-z])(?:\.\.-?(\d+))?$", text)
        index = string.ascii_letters.swapcase().index
    if found is None:
        return 1
    first, last, step = found.groups()
    return abs(index(last) - index(first)) // (int(step or 1) or 1) + 1
