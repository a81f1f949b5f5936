"""Which class of the model each image is: by folder, by a file of labels, by what a shard holds."""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tome_export.data.source import printable
from tome_export.errors import InputError

SHOWN = 5
"""Most names that an error repeats."""

FIX = "or give every image's class with --labels"

WORDNET = re.compile(r"n\d{8}")
"""ImageNet's folders, which nobody's labels are named by; its classes are in their order."""


@dataclass(frozen=True)
class Classes:
    """The classes of a model.

    Attributes:
        count: Number of its outputs.
        names: One per output, where the model brings names.
        by_name: Index of each name that only one class has.
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
        digits = text.removeprefix("-")
        # Python refuses to read a number of thousands of digits.
        if digits.isascii() and digits.isdigit() and len(digits) < 20:
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
        shown = text if len(text) <= 80 else text[:80] + "…"
        raise InputError(
            f"{where} has label {shown!r}; expected an index from 0 to {self.count - 1}, or {known}"
        )


def class_folders(folders: Sequence[str], classes: Classes) -> tuple[dict[str, int], str]:
    """The class of each folder, by the first of these rules that holds for all of them.

    By name, where the names are the model's labels; by number, where they are whole numbers; in
    sorted order, where there is one for each output, as torchvision's ``ImageFolder`` has it, but
    only of a model without names or of ImageNet's ``n01440764``. A wrong guess would give a result
    that looks like one of a bad model, so whatever fits a rule in part is refused.

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
    unknown = [name for name in folders if name not in classes.by_name]
    in_order = classes.names is None or all(map(WORDNET.fullmatch, folders))
    if not unknown:
        index, rule = {name: classes.by_name[name] for name in folders}, "by name"
    elif all(name.isascii() and name.isdigit() for name in folders):
        index, rule = _by_number(folders, classes), "by number"
    elif len(unknown) < count:
        raise InputError(
            f"the class folders {_some(unknown)} are not, or not of one class only, among the "
            f"model's labels, but the other {count - len(unknown)} are; rename them to labels such "
            f"as {_some(list(classes.by_name))}, {FIX}"
        )
    elif count == classes.count and in_order:
        index, rule = {name: number for number, name in enumerate(folders)}, "in sorted order"
    else:
        raise InputError(
            f"the data has {count} class folders ({_some(folders)}) for {classes.count} outputs, "
            "and their names do not tell which; rename them to the model's labels or to indices "
            f"from 0 to {classes.count - 1}, {FIX}"
        )
    return index, f"{count} class folders for {classes.count} outputs, matched {rule}"


def _by_number(folders: Sequence[str], classes: Classes) -> dict[str, int]:
    index = {name: int(name) for name in folders}
    beyond = [name for name in folders if index[name] >= classes.count]
    if beyond:
        raise InputError(
            f"the class folders {_some(beyond)} are beyond the model's {classes.count} outputs; "
            f"expected numbers from 0 to {classes.count - 1}: rename them, {FIX}"
        )
    if len(set(index.values())) < len(index):
        twice = [name for name in folders if list(index.values()).count(index[name]) > 1]
        raise InputError(
            f"the class folders {_some(twice)} are the same number; rename them, {FIX}"
        )
    return index


def _some(names: Sequence[str]) -> str:
    return ", ".join(map(printable, names[:SHOWN])) + (", …" if len(names) > SHOWN else "")


def numbered_classes(names: Sequence[str], classes: Classes, where: str) -> tuple[list[int], str]:
    """The model's class for each number of a data set that brings names for its numbers.

    Args:
        names: Of the data set's classes, in its order.
        classes: Of the model.
        where: What an error calls the data set.

    Returns:
        Class index by number, and how they were matched.

    Raises:
        InputError: if some names say another class than their number, and others are unknown.
    """
    known = {number: classes.by_name[n] for number, n in enumerate(names) if n in classes.by_name}
    if len(known) == len(names):
        return list(known.values()), f"{len(names)} classes, matched by name"
    moved = [names[number] for number, index in known.items() if number != index]
    if moved:
        unknown = [name for name in names if name not in classes.by_name]
        raise InputError(
            f"{where} has the classes {_some(moved)} at other numbers than the model, whose "
            f"labels {_some(unknown)} are not; rename them to labels of the model"
        )
    return list(range(len(names))), f"{len(names)} classes, matched by number"


def labels_from_file(path: Path, names: Sequence[str], folder: Path, classes: Classes) -> list[int]:
    """The class of each image by the file of ``--labels``.

    Args:
        path: UTF-8, with a line ``relative/path,index-or-name`` per image, or a tab for the comma.
            Empty lines and those that begin with ``#`` are left out; so is a first line that names
            no image.
        names: Relative paths of the images.
        folder: Where they are.
        classes: Of the model.

    Raises:
        InputError: if there is no such file, a line is of another form, repeats an image or is of
            none, or an image has no label or one that the model does not have.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise InputError(
            f"labels {path} cannot be read ({reason}); expected lines of 'relative/path,label'"
        ) from None
    labels: dict[str, tuple[int, str]] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.startswith("#"):
            continue
        separator = "\t" if "\t" in line else ","
        *parts, label = next(csv.reader([line], delimiter=separator))
        name = separator.join(parts).strip().removeprefix("./")
        if not name or not label.strip():
            raise InputError(
                f"{path}, line {number} is {line.strip()!r}; expected "
                "'relative/path,label' with a comma or a tab"
            )
        if name in labels:
            raise InputError(f"{path}, line {number} repeats {name}; give each image once")
        labels[name] = (number, label)
    values = []
    for name in names:
        if name not in labels:
            raise InputError(f"{path} has no label for {name}; add a line for it")
        number, label = labels[name]
        values.append(classes.index(label, f"{path}, line {number}"))
    if len(names) < len(labels):
        # The names of the columns, which no image has.
        header = next(iter(labels))
        absent = [
            name
            for name in labels
            if not (folder / name).exists() and (name != header or "." in name)
        ]
        if absent:
            raise InputError(
                f"{path} labels {len(absent)} images that are not in {folder}, the first is "
                f"{absent[0]} in line {labels[absent[0]][0]}; add them or remove their lines"
            )
    return values
