"""Which class each sub-folder of an ``ImageFolder`` is."""

from __future__ import annotations

from collections.abc import Sequence

from tome_export.errors import InputError
from tome_export.evaluation.source import Classes, printable

SHOWN = 5
"""Most names that an error repeats."""

FIX = "or give every image's class with --labels"


def class_folders(folders: Sequence[str], classes: Classes) -> tuple[dict[str, int], str]:
    """The class of each folder, by the first of these rules that holds for all of them.

    By name, where the names are the model's labels; by number, where they are whole numbers; in
    sorted order, where there is one for each output, as torchvision's ``ImageFolder`` has it and
    as it is right for ImageNet's ``n01440764``. A wrong guess would give a result that looks like
    one of a bad model, so whatever fits a rule in part is refused.

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
    numbers = [name for name in folders if name.isascii() and name.isdigit()]
    if not unknown:
        index, rule = {name: classes.by_name[name] for name in folders}, "by name"
    elif len(numbers) == count:
        index, rule = _by_number(folders, classes), "by number"
    elif len(unknown) < count:
        raise InputError(
            f"the class folders {_some(unknown)} are not, or not of one class only, among the "
            f"model's labels, but the other {count - len(unknown)} are; rename them to labels such "
            f"as {_some(list(classes.by_name))}, {FIX}"
        )
    elif count == classes.count:
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
