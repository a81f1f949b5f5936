"""Which class of the model each image is: by folder, by a file of labels, by what a shard holds."""

from __future__ import annotations

import csv
import io
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from tome_export.data.folders import some
from tome_export.data.source import printable
from tome_export.errors import InputError

FIX = "or give every image's class with --labels"

IN_ORDER = "--classes-in-order"
"""The option that says that numbers and sorted names are the model's, whatever it calls them."""

WORDNET = re.compile(r"n\d{8}")
"""ImageNet's folders, which nobody's labels are named by; its classes are in their order."""


def composed(name: str) -> str:
    """A name in one spelling: that of macOS has an accent as a character of its own."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)


@dataclass(frozen=True)
class Classes:
    """The classes of a model.

    Attributes:
        count: Number of its outputs.
        names: One per output, where the model brings names.
        in_order: Whether the user says that numbers of data are the model's outputs, and class
            folders are in their order, whatever they are called.
        by_name: Index of each name that only one class has.
    """

    count: int
    names: tuple[str, ...] | None = None
    in_order: bool = False
    by_name: Mapping[str, int] = field(init=False)

    def __post_init__(self) -> None:
        names = [composed(name) for name in self.names or ()]
        # ImageNet has two classes of one name ("crane"): such a name says nothing.
        often = Counter(names)
        single = {name: index for index, name in enumerate(names) if often[name] == 1}
        object.__setattr__(self, "by_name", single)

    def index(self, value: object, where: str) -> int:
        """The class that a label means: a whole number, or text that is a number or a name.

        Raises:
            InputError: if it means none, or its text is the number of one and the name of another.
        """
        # A column of whole numbers is one of floats where some were missing.
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        text = composed(str(value).strip())
        known = self.by_name.get(text)
        digits = text.removeprefix("-")
        # Python refuses to read a number of thousands of digits.
        if digits.isascii() and digits.isdigit() and len(digits) < 20:
            index = int(text)
            if isinstance(value, str) and known not in (None, index) and not self.in_order:
                raise InputError(
                    f"{where} has label {text}, which is the name of the model's class {known} and "
                    f"the number of another; give numbers and say so with {IN_ORDER}"
                )
            if not 0 <= index < self.count:
                raise InputError(
                    f"{where} has label {index}; the model has {self.count} outputs, expected "
                    f"0 to {self.count - 1}"
                )
            return index
        if known is not None:
            return known
        names = (
            f"one of its names ({', '.join(list(self.by_name)[:5])}, …)"
            if self.by_name
            else "no name, as this model brings none"
        )
        shown = text if len(text) <= 80 else text[:80] + "…"
        raise InputError(
            f"{where} has label {shown!r}; expected an index from 0 to {self.count - 1}, or {names}"
        )


def class_folders(folders: Sequence[str], classes: Classes) -> tuple[dict[str, int], str]:
    """The class of each folder, by the first of these rules that holds for all of them.

    In sorted order, as torchvision's ``ImageFolder`` has it, where the user says so; by name, where
    the names are the model's labels; by number, where they are whole numbers; in sorted order,
    where there is one for each output, but only of a model without names or of ImageNet's
    ``n01440764``. A wrong guess would give a result that looks like one of a bad model, so whatever
    fits a rule in part is refused.

    Args:
        folders: Names, sorted, at least one.
        classes: Of the model.

    Returns:
        Class index by folder, and which rule was used.

    Raises:
        InputError: if no rule holds, or two folders would be one class.
    """
    count = len(folders)
    if count > classes.count:
        raise InputError(
            f"the data has {count} class folders; the model has {classes.count} outputs, give data "
            "of the same classes"
        )
    names = {name: composed(name) for name in folders}
    unknown = [name for name in folders if names[name] not in classes.by_name]
    unnamed = classes.names is None or all(map(WORDNET.fullmatch, folders))
    if classes.in_order:
        index, rule = _in_order(folders, classes), f"in sorted order ({IN_ORDER})"
    elif not unknown:
        index, rule = {name: classes.by_name[names[name]] for name in folders}, "by name"
    elif all(name.isascii() and name.isdigit() and len(name) < 20 for name in folders):
        index, rule = {name: int(name) for name in folders}, "by number"
        if beyond := [name for name in folders if index[name] >= classes.count]:
            raise InputError(
                f"the class folders {_some(beyond)} are beyond the model's {classes.count} "
                f"outputs; expected numbers from 0 to {classes.count - 1}: rename them, {FIX}"
            )
    elif len(unknown) < count:
        raise InputError(
            f"the class folders {_some(unknown)} are not, or not of one class only, among the "
            f"model's labels, but the other {count - len(unknown)} are; rename them to labels such "
            f"as {_some(list(classes.by_name))}, {FIX}"
        )
    elif count == classes.count and unnamed:
        index, rule = _in_order(folders, classes), "in sorted order"
    else:
        may_be = f", or say {IN_ORDER} if they are, sorted, the model's"
        raise InputError(
            f"the data has {count} class folders ({_some(folders)}) for {classes.count} outputs, "
            "and their names do not tell which; rename them to the model's labels or to indices "
            f"from 0 to {classes.count - 1}, {FIX}" + (may_be if count == classes.count else "")
        )
    often = Counter(index.values())
    if twice := [name for name in folders if often[index[name]] > 1]:
        same = "number" if rule == "by number" else "name"
        raise InputError(
            f"the class folders {_some(twice)} are the same {same}; rename them, {FIX}"
        )
    return index, f"{count} class folders for {classes.count} outputs, matched {rule}"


def _in_order(folders: Sequence[str], classes: Classes) -> dict[str, int]:
    if len(folders) < classes.count:
        raise InputError(
            f"the data has {len(folders)} class folders for {classes.count} outputs; {IN_ORDER} "
            "takes one for each, leave it out if they are named by the model's labels"
        )
    return {name: number for number, name in enumerate(folders)}


def _some(names: Sequence[str]) -> str:
    return some([printable(name) for name in names])


def numbered_classes(names: Sequence[str], classes: Classes, where: str) -> tuple[list[int], str]:
    """The model's class for each number of a data set that brings names for its numbers.

    By name, where all are the model's labels, or are whole numbers; by number, where the user says
    so, the model has no names, they are ImageNet's, or at least half are the model's labels, and
    those at their numbers.

    Args:
        names: Of the data set's classes, in its order.
        classes: Of the model.
        where: What an error calls the data set.

    Returns:
        Class index by number, and how they were matched.

    Raises:
        InputError: if neither their names nor their numbers tell.
    """
    names = [composed(name) for name in names]
    numbers = list(range(len(names)))
    known = {number: classes.by_name[n] for number, n in enumerate(names) if n in classes.by_name}
    unknown = [name for name in names if name not in classes.by_name]
    if classes.in_order:
        return numbers, f"{len(names)} classes, matched by number ({IN_ORDER})"
    if not unknown:
        return list(known.values()), f"{len(names)} classes, matched by name"
    if all(name.isascii() and name.isdigit() and len(name) < 20 for name in names):
        return [int(name) for name in names], f"{len(names)} classes, matched by number"
    moved = [names[number] for number, index in known.items() if number != index]
    if moved:
        raise InputError(
            f"{where} has the classes {_some(moved)} at other numbers than the model, whose "
            f"labels {_some(unknown)} are not; rename them to labels of the model"
        )
    ordered = classes.names is None or all(map(WORDNET.fullmatch, names))
    if ordered or 2 * len(known) >= len(names):
        return numbers, f"{len(names)} classes, matched by number"
    raise InputError(
        f"{where} has the classes {_some(unknown)}, which are not among the model's labels, such "
        f"as {_some(list(classes.by_name))}; rename them, or say {IN_ORDER} if the numbers are the "
        "model's"
    )


def labels_from_file(path: Path, names: Sequence[str], folder: Path, classes: Classes) -> list[int]:
    """The class of each image by the file of ``--labels``.

    Args:
        path: UTF-8 text of a row ``path,index-or-name`` per image, or with tabs for the commas;
            fields may be in quotes. A path may be absolute, else it is below the folder, and is
            spelt with composed or with separate accents. Empty rows and those that begin with
            ``#`` are left out; so is a first row that names no image.
        names: Relative paths of the images.
        folder: Where they are.
        classes: Of the model.

    Raises:
        InputError: if there is no such file, a row is of another form, repeats an image or is of
            none, or an image has no label or one that the model does not have.
    """
    images = _Images(names, folder)
    labels: dict[str, tuple[int, str]] = {}
    absent = []
    for row, (number, given, label) in enumerate(_rows(path)):
        name = images.name(given)
        if name is None:
            # The first may be the names of the columns.
            absent += [(number, given)] if row or "." in given else []
        elif name in labels:
            raise InputError(
                f"{path}, line {number} repeats {printable(given)}; give each image once"
            )
        else:
            labels[name] = (number, label)
    values = []
    for name in names:
        if name not in labels:
            raise InputError(f"{path} has no label for {printable(name)}; add a line for it")
        number, label = labels[name]
        values.append(classes.index(label, f"{path}, line {number}"))
    absent = [one for one in absent if not os.path.exists(folder / one[1])]  # noqa: PTH110
    if absent:
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
            f"labels {path} cannot be read ({reason}); expected lines of 'relative/path,label'"
        ) from None
    # Not splitlines(), which takes characters of names for ends of lines.
    lines = ["\n" if line[0] == "#" else line for line in io.StringIO(text, newline="")]
    written = next((line for line in lines if line.strip()), "")
    delimiter = "\t" if "\t" in written else ","
    reader = csv.reader(lines, delimiter=delimiter)
    try:
        for row in reader:
            *parts, label = row or [""]
            given = delimiter.join(parts).strip()
            if given and label.strip():
                yield reader.line_num, given, label
            elif parts or label.strip():
                shown = printable(delimiter.join(row).strip())
                raise InputError(
                    f"{path}, line {reader.line_num} is {shown[:80]!r}; expected "
                    "'relative/path,label' with a comma or a tab"
                )
    except csv.Error as error:
        raise InputError(
            f"{path}, line {reader.line_num} cannot be read ({error}); expected "
            "'relative/path,label' with a comma or a tab"
        ) from None


class _Images:
    """The images of a folder, however their paths are written."""

    def __init__(self, names: Sequence[str], folder: Path) -> None:
        often = Counter(map(composed, names))
        self._names = set(names)
        # Where two names differ by the spelling of an accent only, it tells them apart.
        self._spelt = {composed(name): name for name in names if often[composed(name)] == 1}
        places = {os.path.abspath(folder), os.path.realpath(folder)}  # noqa: PTH100
        self._roots = tuple(f"{composed(place)}/".replace("//", "/") for place in places)

    def name(self, given: str) -> str | None:
        """The relative path of an image as it is on the disk; None if there is none."""
        name = os.path.normpath(given)
        if os.path.isabs(name) and "\0" not in name:  # noqa: PTH117
            folder, file = os.path.split(name)
            for one in (name, f"{_real(folder)}/{file}"):
                one = composed(one)
                name = next((one[len(r) :] for r in self._roots if one.startswith(r)), name)
        return name if name in self._names else self._spelt.get(composed(name))


_real = lru_cache(maxsize=1024)(os.path.realpath)
