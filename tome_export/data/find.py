"""What ``--data`` names: a folder of images, shards, or the samples that come along."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tome_export.data.labels import Classes
from tome_export.data.source import Source, printable, samples_source
from tome_export.errors import InputError, UsageError

if TYPE_CHECKING:
    from tome_export.models import Recipe

SAMPLES = "samples"
"""What names the images that come with a recipe."""

SHARDS = (".tar", ".parquet")


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
    from tome_export.models.preprocess import IMAGE_SUFFIXES

    text = printable(", ".join(data))
    paths = [path for given in data for path in expand(given)]
    if len(paths) == 1 and paths[0].is_dir():
        folder = paths[0]
        inside = _shards_in(folder)
        if not inside:
            return folder_source(folder, IMAGE_SUFFIXES, classes, labels)
        paths = inside
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
    if kinds == {".tar"}:
        return tar_source(text, paths, IMAGE_SUFFIXES, classes)
    return parquet_source(text, paths, classes)


def labelled_source(recipe: Recipe) -> Source | None:
    """The labelled images that come with a recipe; None if there are none."""
    from tome_export.models.samples import labelled_samples

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
            for one in (path.is_dir() and _shards_in(path)) or [path]
        }
        for named in (data, others)
    )
    shared = (
        path
        for paths, above in ((second, first), (first, second))
        for path in sorted(paths)
        if not above.isdisjoint((path, *path.parents))
    )
    return next(shared, None)


def _shards_in(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in SHARDS)


def expand(pattern: str) -> list[Path]:
    """The paths of a name with braces and stars, in order.

    Raises:
        InputError: if one is not there.
    """
    from braceexpand import braceexpand

    # A file may bear such characters in its name.
    if os.path.exists(pattern):  # noqa: PTH110 - which takes names that are too long
        return [Path(pattern)]
    paths: list[Path] = []
    try:
        names = list(braceexpand(pattern, escape=False))
    except ValueError:  # braces that are not in pairs
        names = [pattern]
    for name in names:
        found = sorted(glob.glob(name)) if glob.has_magic(name) else [name]  # noqa: PTH207
        if not found or not os.path.exists(found[0]):  # noqa: PTH110
            raise InputError(
                f"{name} does not exist; expected a folder of images, .tar or .parquet shards such "
                "as 'shard-{000..010}.tar', or 'samples'"
            )
        paths += map(Path, found)
    return paths
