"""Files of a kind under a folder: images and videos, by one rule for every command."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from tome_export.errors import InputError

RESOURCE_FORKS = "._"
"""What begins the names of files in which macOS keeps a file's attributes (AppleDouble)."""

ARCHIVED_FORKS = "__MACOSX"
"""The folder of such files in archives that macOS packs."""


def walk(root: Path, left_out: list[str]) -> Iterator[tuple[str, list[str], list[str]]]:
    """Each folder below, sorted: relative path with its slash, the folders and files in it.

    Links to folders are not followed: one may lead out of the folder, as to ``/``, or back up, and
    what it leads to within the folder is listed there. Neither are folders entered whose names
    begin with a dot, nor is what macOS adds to archives listed; ``left_out`` is told of these.
    Links to files are files.
    """
    # Not os.walk, which calls itself for every level up to Python 3.11.
    links, forks, hidden, waiting = [], 0, [], [""]
    while waiting:
        below = waiting.pop()
        folders, files = [], []
        try:
            with os.scandir(f"{root}/{below}") as entries:
                for entry in entries:
                    name = entry.name
                    if name.startswith(RESOURCE_FORKS) or name == ARCHIVED_FORKS:
                        forks += 1
                    # A link in a circle is a file that cannot be read.
                    elif entry.is_symlink() and os.path.isdir(entry.path):  # noqa: PTH112
                        links.append(f"{below}{name}")
                    elif not entry.is_dir(follow_symlinks=False):
                        files.append(name)
                    elif name[0] == ".":
                        hidden.append(f"{below}{name}")
                    else:
                        folders.append(name)
        except OSError as error:
            raise InputError(
                f"{root / below} cannot be read ({error.strerror}); allow it to be read"
            ) from None
        folders.sort()
        waiting += [f"{below}{name}/" for name in reversed(folders)]
        yield below, folders, sorted(files)
    if links:
        left_out.append(f"links to folders, which are not followed: {some(sorted(links))}")
    if hidden:
        left_out.append(f"hidden folders: {some(sorted(hidden))}")
    if forks:
        left_out.append(f"{forks} of macOS ({RESOURCE_FORKS}*, {ARCHIVED_FORKS})")


def some(names: Sequence[str], most: int = 5) -> str:
    """The first few names, and whether there are more."""
    return ", ".join(names[:most]) + (", …" if len(names) > most else "")


def suffix(name: str) -> str:
    """How a name ends, in lower case and with its dot."""
    return os.path.splitext(name)[1].lower()  # noqa: PTH122 (a million names)


def find_files(folder: str | Path, suffixes: Collection[str], what: str) -> list[Path]:
    """Every file of a kind under a folder, sorted by path; a single file stands for itself.

    ``suffixes`` are in lower case; ``what`` is what messages call one of them. See ``walk``.
    """
    folder = Path(folder)
    article = "an" if what[0] in "aeiou" else "a"
    if folder.is_file():
        return [folder]
    if not folder.is_dir():
        raise InputError(
            f"{folder} does not exist; expected {article} {what} or a folder of {what}s"
        )
    left_out: list[str] = []
    found = sorted(
        folder / below / name
        for below, _, files in walk(folder, left_out)
        for name in files
        if suffix(name) in suffixes
    )
    if not found:
        raise InputError(
            f"no {what}s under {folder}; expected files ending in {', '.join(suffixes)}"
            + "".join(f"; left out are {one}" for one in left_out)
        )
    return found
