"""A folder of images: flat, in a sub-folder per class, or labelled by a file.

It is not listed by Hugging Face's ``imagefolder``, which takes the innermost folder for the class
where torchvision's ``ImageFolder`` takes the outermost, makes splits of folders named ``test``, and
ends at a link to nowhere or a name that is not UTF-8, where all other images are wanted.
"""

from __future__ import annotations

import csv
import io
import os
import stat
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from functools import lru_cache
from pathlib import Path

from tome_export.data.folders import suffix, walk
from tome_export.data.labels import IN_ORDER, Classes, composed, is_number, some_printable
from tome_export.data.source import Source, printable, require_size, stamp
from tome_export.errors import InputError

FIX = "or give every image's class with --labels"
ROW = "'relative/path,label'"


def folder_source(
    folder: Path, suffixes: Collection[str], classes: Classes | None, labels: Path | None
) -> Source:
    """The images of a folder, with the classes that sub-folders or a file give."""
    root = folder.absolute()
    source = Source("folder", printable(str(folder)), [root])
    source.read = read_file
    tops: list[str] = []
    names: list[str] = []
    left_out: list[str] = []
    for below, folders, files in walk(root, left_out):
        tops = tops if below else folders
        for name in files:
            if suffix(name) in suffixes:
                try:
                    mark = stamp(root / below / name)
                except OSError:  # a link that leads nowhere: unreadable, but listed
                    mark = "missing"
                names.append(f"{below}{name}")
                source.add(names[-1], mark=mark)
    source.notes = [f"left out of {source.text} are {printable(one)}" for one in left_out]
    if not names:
        raise InputError(
            f"no images under {folder}; expected class sub-folders with, or flat, files ending in "
            + "; ".join([f"{', '.join(suffixes)}, or .tar or .parquet shards", *source.notes])
        )
    if classes is None:
        return source
    flat = any("/" not in name for name in names)
    if labels is not None:
        source.classes = labels_from_file(labels, names, folder, classes)
    elif not flat:
        index, note = class_folders(tops, classes)
        source.notes.append(note)
        source.classes = [index[name.partition("/")[0]] for name in names]
    elif any("/" in name for name in names):
        raise InputError(
            f"{folder} has images both beside and inside sub-folders; keep one layout, {FIX}"
        )
    return source


def read_file(root: str, name: str, _start: int, _size: int, shown: str) -> bytes:
    """The content of an image file; see ``Reader``."""
    path = f"{root}/{name}"
    found = os.stat(path)  # noqa: PTH116 (a million names)
    # A pipe would be waited for without end, and a device may do anything.
    if not stat.S_ISREG(found.st_mode):
        raise InputError(f"{shown} is not a regular file; expected an image")
    require_size(found.st_size, shown)
    return Path(path).read_bytes()


def class_folders(folders: Sequence[str], classes: Classes) -> tuple[dict[str, int], str]:
    """The class of each folder, by the first rule that holds for all of them, and which that is.

    In sorted order, as torchvision's ``ImageFolder`` has it, where the user says so; by name, where
    the names are the model's labels; by number, where they are whole numbers; in sorted order,
    where there is one for each output, but only of a model without names or of ImageNet's
    ``n01440764``. A wrong guess would give a result that looks like one of a bad model, so whatever
    fits a rule in part is refused.
    """
    count, names = len(folders), [composed(name) for name in folders]
    unknown = [f for f, name in zip(folders, names, strict=True) if name not in classes.by_name]
    in_order = list(range(count))
    if count > classes.count:
        raise InputError(
            f"the data has {count} class folders; the model has {classes.count} outputs, give data "
            "of the same classes"
        )
    if classes.in_order:
        if count < classes.count:
            raise InputError(
                f"the data has {count} class folders for {classes.count} outputs; {IN_ORDER} takes "
                "one for each, leave it out if they are named by the model's labels"
            )
        index, rule = in_order, f"in sorted order ({IN_ORDER})"
    elif not unknown:
        index, rule = [classes.by_name[name] for name in names], "by name"
    elif all(map(is_number, folders)):
        index, rule = list(map(int, folders)), "by number"
        if beyond := [f for f in folders if int(f) >= classes.count]:
            raise InputError(
                f"the class folders {some_printable(beyond)} are beyond the model's "
                f"{classes.count} outputs; expected numbers from 0 to {classes.count - 1}: rename "
                f"them, {FIX}"
            )
    elif len(unknown) < count:
        raise InputError(
            f"the class folders {some_printable(unknown)} are not, or not of one class only, among "
            f"the model's labels, but the other {count - len(unknown)} are; rename them to labels "
            f"such as {some_printable(list(classes.by_name))}, {FIX}"
        )
    elif count == classes.count and classes.ordered_as(folders):
        index, rule = in_order, "in sorted order"
    else:
        may_be = f", or say {IN_ORDER} if they are, sorted, the model's"
        raise InputError(
            f"the data has {count} class folders ({some_printable(folders)}) for {classes.count} "
            "outputs, and their names do not tell which; rename them to the model's labels or to "
            f"indices from 0 to {classes.count - 1}, {FIX}"
            + (may_be if count == classes.count else "")
        )
    often = Counter(index)
    if twice := [f for f, number in zip(folders, index, strict=True) if often[number] > 1]:
        same = "number" if rule == "by number" else "name"
        raise InputError(
            f"the class folders {some_printable(twice)} are the same {same}; rename them, {FIX}"
        )
    note = f"{count} class folders for {classes.count} outputs, matched {rule}"
    return dict(zip(folders, index, strict=True)), note


def labels_from_file(path: Path, names: Sequence[str], folder: Path, classes: Classes) -> list[int]:
    """The class of each image of a folder by the file of ``--labels``.

    It is UTF-8 text of a row ``path,index-or-name`` per image, or with tabs for the commas; fields
    may be in quotes. A path may be absolute, else it is below the folder, and is spelt with
    composed or with separate accents. Empty rows and those that begin with ``#`` are left out; so
    is a first row that names no image.
    """
    real = lru_cache(maxsize=1024)(os.path.realpath)

    def whole(given: str) -> str:
        """The path without links to folders, whether it was absolute or below the folder."""
        head, tail = os.path.split(os.path.normpath(os.path.join(folder, given)))  # noqa: PTH118
        return given if "\0" in given else f"{real(head)}/{tail}"

    exact = {whole(name): name for name in names}
    # Where two names differ by the spelling of an accent only, it tells them apart.
    spelt = {composed(path): name for path, name in exact.items()}
    labels: dict[str, tuple[int, str]] = {}
    absent = []
    for row, (number, given, label) in enumerate(_rows(path)):
        name = exact.get(whole(given)) or spelt.get(composed(whole(given)))
        if name is None:
            # The first may be the names of the columns.
            absent += [(number, given)] if row or "." in given else []
        elif name in labels:
            raise InputError(
                f"{path}, line {number} repeats {printable(given)}; give each image once"
            )
        else:
            labels[name] = (number, label)
    if unlabelled := next((name for name in names if name not in labels), None):
        raise InputError(f"{path} has no label for {printable(unlabelled)}; add a line for it")
    values = [
        classes.index(label, f"{path}, line {number}")
        for number, label in (labels[name] for name in names)
    ]
    if absent := [one for one in absent if not os.path.exists(folder / one[1])]:  # noqa: PTH110
        number, given = absent[0]
        raise InputError(
            f"{path} labels {len(absent)} images that are not in {folder}, the first is "
            f"{printable(given)} in line {number}; add them or remove their lines"
        )
    return values


def _rows(path: Path) -> Iterator[tuple[int, str, str]]:
    """Number of the line, path and label of each row."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise InputError(
            f"labels {path} cannot be read ({reason}); expected lines of {ROW}"
        ) from None
    # Not splitlines(), which takes characters of names for ends of lines.
    lines = ["\n" if line[0] == "#" else line for line in io.StringIO(text, newline="")]
    written = next((line for line in lines if line.strip()), "")
    delimiter = "\t" if "\t" in written else ","
    reader = csv.reader(lines, delimiter=delimiter)
    expected = f"expected {ROW} with a comma or a tab"
    try:
        for row in reader:
            *parts, label = row or [""]
            given = delimiter.join(parts).strip()
            if given and label.strip():
                yield reader.line_num, given, label
            elif parts or label.strip():
                shown = printable(delimiter.join(row).strip())
                raise InputError(f"{path}, line {reader.line_num} is {shown[:80]!r}; {expected}")
    except csv.Error as error:
        raise InputError(
            f"{path}, line {reader.line_num} cannot be read ({error}); {expected}"
        ) from None
