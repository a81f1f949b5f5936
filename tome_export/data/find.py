"""What ``--data`` names: a folder of images, shards, or the samples that come along."""

from __future__ import annotations

import glob
import itertools
import math
import os
import re
import string
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tome_export.data.folders import some, suffix
from tome_export.data.labels import Classes
from tome_export.data.source import Source, printable, samples_source
from tome_export.errors import InputError, UsageError

if TYPE_CHECKING:
    from tome_export.artifact import Artifact
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


def find_data(data: Sequence[str], classes: Classes | None, labels: Path | None = None) -> Source:
    """List the images that a user named.

    They are in a folder, or in shards by path, glob (``*``) or braces (``{000..010}``, ``{a,b}``).
    """
    from tome_export.data.image_folder import folder_source
    from tome_export.data.parquet_files import parquet_source
    from tome_export.data.preprocess import IMAGE_SUFFIXES
    from tome_export.data.tar_shards import tar_source

    text = printable(", ".join(data))
    paths = [path for given in data for path in expand(given)]
    notes = []
    if len(paths) == 1 and paths[0].is_dir():
        folder = paths[0]
        paths, others = _shards_in(folder)
        if not paths:
            source = folder_source(folder, IMAGE_SUFFIXES, classes, labels)
            if labels and classes is None:
                source.notes.append("--labels are not used: the model has no classes")
            return source
        if others:
            shown = printable(some(others))
            notes.append(f"read of {text} are its shards only; beside them are {shown}")
        # As a data set is kept whose parts are in one folder.
        parts = sorted({re.split(r"[-_.]?\d|\.", path.name)[0] for path in paths})
        if len(parts) > 1:
            notes.append(
                f"read as one are the shards of {printable(some(parts))} in {text}; a star, as in "
                f"'{printable(parts[0])}*', takes those of one name"
            )
    _check_shards(text, paths, labels)
    if paths[0].suffix.lower() == ".tar":
        source = tar_source(text, paths, IMAGE_SUFFIXES, classes)
    else:
        source = parquet_source(text, paths, classes)
    source.notes += notes
    return source


def _check_shards(text: str, paths: Sequence[Path], labels: Path | None) -> None:
    """Require regular files of one kind, each once."""
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
    first: dict[tuple[int, int], Path] = {}
    for path in paths:
        if (same := first.setdefault(_file_id(path), path)) is not path:
            again = f", also as {same}" if same != path else ""
            raise InputError(f"the shard {path} is given twice{again}; give each once")


def source_of(
    artifact: Artifact,
    data: Sequence[str],
    labels: Path | None,
    classes: Classes | None,
    weights: str | None = None,
) -> Source:
    """Images of ``find_data``, or with ``samples`` those that come with the artifact's model."""
    from tome_export.models import resolve

    if tuple(data) != (SAMPLES,):
        return find_data(data, classes, labels)
    if labels is not None:
        raise UsageError("--labels are for a folder of images; the samples have their own")
    recipe = resolve(artifact.manifest.model.resolvable_name(weights))
    recipe = replace(recipe, preprocessing=artifact.manifest.preprocessing)
    found, name = labelled_source(recipe), artifact.manifest.model.name
    if found is None:
        raise InputError(f"no labelled images come with {name}; give a folder of them with --data")
    if classes is not None and classes.names != recipe.output.labels:
        raise InputError(
            f"the images that come with {name} have its own labels, and this artifact tells "
            f"{classes.count} other classes apart; give a folder of images with --data"
        )
    return found


def _file_id(path: Path) -> tuple[int, int]:
    """What tells whether two paths are one file or folder, also through links."""
    status = path.stat()
    return status.st_dev, status.st_ino


def labelled_source(recipe: Recipe) -> Source | None:
    """The labelled images that come with a recipe; None if there are none."""
    from tome_export.data.samples import labelled_samples

    found = labelled_samples(recipe)
    return None if found is None else samples_source(found[0], found[1].astype(np.int32))


def shared_path(data: Sequence[str], others: Sequence[str]) -> Path | None:
    """The first path, links followed, of whose images two such lists both have some; or None."""
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
        ids = set(map(_file_id, above))
        for path in sorted(paths):
            if not ids.isdisjoint(map(_file_id, (path, *path.parents))):
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
    """The paths of a name with braces and stars, in order."""
    from braceexpand import braceexpand

    if not pattern:
        raise InputError(f"the name of the data is empty; {EXPECTED}")
    # A file may bear such characters in its name.
    if os.path.exists(pattern):  # noqa: PTH110 - which takes names that are too long
        return [Path(pattern)]
    paths: list[Path] = []
    for name in braceexpand(pattern, escape=False) if _has_braces(pattern) else [pattern]:
        there = os.path.exists(name)  # noqa: PTH110
        magic = not there and glob.has_magic(name)
        found = sorted(glob.glob(name)) if magic else [name]  # noqa: PTH207
        if not there and not (found and os.path.exists(found[0])):  # noqa: PTH110
            raise InputError(f"{name} does not exist; {EXPECTED}")
        paths += map(Path, found)
    return paths


def _has_braces(pattern: str) -> bool:
    """Whether all braces are in pairs; they may stand for as many names as can be looked up.

    ``braceexpand`` makes all names of a part before the first is taken, and calls itself for each
    part within another.
    """
    depths = list(itertools.accumulate((c == "{") - (c == "}") for c in pattern))
    most = min(MOST_NAMES, MOST_CHARACTERS // len(pattern))
    outside = re.sub(r"\{[^{}]*\}", "", pattern)
    try:
        names = math.prod(map(_count, re.findall(r"\{([^{}]*)\}", pattern)))
    except ValueError:  # a number of thousands of digits
        return False
    # At most: each comma between parts within others doubles them.
    if max(depths) > MOST_NESTED or names << outside.count(",") * ("{" in outside) > most:
        raise InputError(
            f"{pattern[:80]}{'…' * (len(pattern) > 80)} stands for too many names; expected "
            f"at most {most:,}, and braces at most {MOST_NESTED} deep: give a folder, or a star"
        )
    return min(depths) >= 0 == depths[-1]


def _count(part: str) -> int:
    """How many names a part stands for: ``1..9`` or ``a..z``, or alternatives with commas."""
    found = re.match(r"(-?\d+)\.\.(-?\d+)(?:\.\.-?(\d+))?$", part)
    index: Callable[[str], int] = int
    if found is None:
        found = re.match(r"([A-Za-z])\.\.([A-Za-z])(?:\.\.-?(\d+))?$", part)
        index = string.ascii_letters.swapcase().index
    if found is None:
        return part.count(",") + 1
    first, last, step = found.groups()
    return abs(index(last) - index(first)) // (int(step or 1) or 1) + 1
