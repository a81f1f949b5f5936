"""What ``--data`` names: a folder of images, shards, or the samples that come along."""

from __future__ import annotations

import glob
import itertools
import re
from collections.abc import Collection, Sequence
from pathlib import Path

from tome_export.errors import InputError, UsageError
from tome_export.evaluation.folder import folder_source
from tome_export.evaluation.label_file import LabelFile
from tome_export.evaluation.parquet import parquet_source
from tome_export.evaluation.source import Classes, Source, printable
from tome_export.evaluation.tar import tar_source

SHARDS = (".tar", ".parquet")


def find_data(
    data: Sequence[str],
    suffixes: Collection[str],
    classes: Classes | None,
    labels: Path | None = None,
) -> Source:
    """List the images that a user named.

    Args:
        data: A folder; or shards by path, glob (``*``) or braces (``{000..010}``, ``{a,b}``).
        suffixes: How names of images end, lower case.
        classes: Of the model; None for a model without classes.
        labels: File of labels for a folder of images.

    Raises:
        InputError: if there are none, or their labels are not usable.
        UsageError: if labels are given for shards, which hold their own.
        MissingComponentError: if a package that reads them is not installed.
    """
    text = printable(", ".join(data))
    paths = [path for given in data for path in expand(given)]
    if len(paths) == 1 and paths[0].is_dir():
        folder = paths[0]
        inside = _shards_in(folder)
        if not inside:
            listed = LabelFile(labels) if labels is not None else None
            return folder_source(folder, suffixes, classes, listed)
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
        return tar_source(text, paths, suffixes, classes)
    return parquet_source(text, paths, classes)


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
        InputError: if one is not there, or a span runs backwards.
    """
    # A file may bear such characters in its name.
    if Path(pattern).exists():
        return [Path(pattern)]
    paths: list[Path] = []
    for name in _braces(pattern):
        found = sorted(glob.glob(name)) if glob.has_magic(name) else [name]  # noqa: PTH207
        missing = not found or not Path(found[0]).exists()
        if missing:
            raise InputError(
                f"{name} does not exist; expected a folder of images, .tar or .parquet shards such "
                "as 'shard-{000..010}.tar', or 'samples'"
            )
        paths += map(Path, found)
    return paths


def _braces(pattern: str) -> list[str]:
    parts = re.split(r"(\{[^{}]*\})", pattern)
    return ["".join(choice) for choice in itertools.product(*map(_choices, parts))]


def _choices(part: str) -> list[str]:
    if not (part.startswith("{") and part.endswith("}")):
        return [part]
    span = re.fullmatch(r"\{(\d+)\.\.(\d+)\}", part)
    if span:
        first, last = span[1], span[2]
        if int(first) > int(last):
            raise InputError(
                f"the span {part} runs backwards; expected the lower number first, "
                f"{{{last}..{first}}}"
            )
        width = len(first) if first[0] == "0" or len(first) == len(last) else 0
        return [str(n).zfill(width) for n in range(int(first), int(last) + 1)]
    return part[1:-1].split(",") if "," in part else [part]
