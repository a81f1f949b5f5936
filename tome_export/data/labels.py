"""The classes of a model, and which of them a label means."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tome_export.data.folders import some
from tome_export.data.source import printable
from tome_export.errors import InputError

if TYPE_CHECKING:
    from tome_export.artifact import Artifact

IN_ORDER = "--classes-in-order"
"""The option that says that numbers and sorted names are the model's, whatever it calls them."""

WORDNET = re.compile(r"n\d{8}")
"""ImageNet's folders, which nobody's labels are named by; its classes are in their order."""


def composed(name: str) -> str:
    """A name in one spelling: that of macOS has an accent as a character of its own."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def is_number(text: str) -> bool:
    """Whether a text is a whole number, of fewer digits than Python refuses to read."""
    return text.isascii() and text.isdigit() and len(text) < 20


def some_printable(names: Sequence[str]) -> str:
    """The first few names, as an error shows them."""
    return some([printable(name) for name in names])


@dataclass(frozen=True)
class Classes:
    """The classes of a model.

    Attributes:
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

    def ordered_as(self, names: Sequence[str]) -> bool:
        """Whether sorted names, none of which is the model's, may be its classes in their order."""
        return self.names is None or all(map(WORDNET.fullmatch, names))

    @classmethod
    def of_outputs(cls, outputs: int, names: tuple[str, ...] | None) -> Classes:
        """The classes that so many logits of these names tell apart: one logit says no or yes."""
        names = names if names and len(names) == outputs else None
        if outputs > 1:
            return cls(outputs, names)
        return cls(2, (f"not {names[0]}", names[0]) if names else None)

    def index(self, value: object, where: str) -> int:
        """The class that a label means: a whole number, or text that is a number or a name."""
        # A column of whole numbers is one of floats where some were missing.
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        text = composed(str(value).strip())
        known = self.by_name.get(text)
        if is_number(text.removeprefix("-")):
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

    def indices(self, names: Sequence[str], where: str) -> tuple[list[int], str]:
        """The model's class for each class of a data set, and how they were matched.

        By name, where all are the model's labels, or are whole numbers; by number, where the user
        says so, the model has no names, they are ImageNet's, or at least half are the model's
        labels, and those at their numbers. An error calls the data set ``where``.
        """
        names = [composed(name) for name in names]
        found, by_number = list(range(len(names))), f"{len(names)} classes, matched by number"
        unknown = [name for name in names if name not in self.by_name]
        if self.in_order:
            return found, f"{by_number} ({IN_ORDER})"
        if not unknown:
            return [self.by_name[n] for n in names], f"{len(names)} classes, matched by name"
        if all(map(is_number, names)):
            return list(map(int, names)), by_number
        moved = [name for i, name in enumerate(names) if self.by_name.get(name, i) != i]
        if moved:
            raise InputError(
                f"{where} has the classes {some_printable(moved)} at other numbers than the model, "
                f"whose labels {some_printable(unknown)} are not; rename them to labels of the "
                "model"
            )
        if self.ordered_as(names) or 2 * len(unknown) <= len(names):
            return found, by_number
        raise InputError(
            f"{where} has the classes {some_printable(unknown)}, which are not among the model's "
            f"labels, such as {some_printable(list(self.by_name))}; rename them, or say {IN_ORDER} "
            "if the numbers are the model's"
        )


def classes_of(artifact: Artifact) -> Classes | None:
    """The classes of an artifact; None if it gives features, or a regression's numbers."""
    manifest = artifact.manifest
    if manifest.activation in (None, "none"):
        return None
    return Classes.of_outputs(int(manifest.output.shape[-1]), manifest.labels)
