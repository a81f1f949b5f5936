"""Folders of pictures: names of their files, and what --force may replace."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from tome_export.errors import InputError

FILES = ("file", "raw")
"""Entries of a picture in a folder's summary that name files of it."""


def names_of(images: Sequence[Path]) -> list[str]:
    """One name per image, told apart by a number where several files have the same."""
    # A dictionary keeps the order, and is searched at once; numbers go on where they were.
    names: dict[str, None] = {}
    numbers: dict[str, int] = {}
    for path in images:
        name, number = path.stem, numbers.get(path.stem, 2)
        while name in names:
            name, number = f"{path.stem}-{number}", number + 1
        names[name], numbers[path.stem] = None, number
    return list(names)


def pictures_of(summary: str, command: str) -> Callable[[Path], None]:
    """Refuses to replace a folder that holds anything but an earlier run's files.

    The file ``summary`` in it lists them.
    """

    def check(output: Path) -> None:
        written = _written(output, summary)
        entries = list(output.iterdir()) if output.is_dir() else [output]
        foreign = sorted(e.name for e in entries if e.name not in written or not e.is_file())
        if foreign:
            what = f" ({', '.join(foreign[:3])})" if output.is_dir() else ""
            raise InputError(
                f"{output} holds what 'tome-export {command}' did not write{what}, which --force "
                "would delete; give another directory"
            )

    return check


def _written(output: Path, summary: str) -> Collection[str]:
    try:
        pictures = json.loads((output / summary).read_text(encoding="utf-8"))["pictures"]
        return {summary, *(str(one[key]) for one in pictures for key in FILES if key in one)}
    except (OSError, ValueError, KeyError, TypeError):
        return set()
