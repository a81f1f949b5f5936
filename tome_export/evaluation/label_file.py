"""The file of ``--labels``: one line per image, ``relative/path<TAB or comma>index-or-name``."""

from __future__ import annotations

from pathlib import Path

from tome_export.errors import InputError
from tome_export.evaluation.source import Classes


class LabelFile:
    """Labels by relative path.

    Args:
        path: The file, UTF-8. Empty lines and lines that begin with ``#`` are left out; so is a
            first line that names no image.

    Raises:
        InputError: if there is no such file, or a line is of another form or repeats an image.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._labels: dict[str, tuple[int, str]] = {}
        self._taken = 0
        self._header: str | None = None
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
            raise InputError(
                f"labels {path} cannot be read ({reason}); expected lines of 'relative/path,label'"
            ) from None
        for number, line in enumerate(lines, 1):
            if not line.strip() or line.startswith("#"):
                continue
            name, separator, label = line.rpartition("\t" if "\t" in line else ",")
            name = name.strip().removeprefix("./")
            if not separator or not name or not label.strip():
                raise InputError(
                    f"{path}, line {number} is {line.strip()!r}; expected "
                    "'relative/path,label' with a comma or a tab"
                )
            if name in self._labels:
                raise InputError(f"{path}, line {number} repeats {name}; give each image once")
            if not self._labels:
                self._header = name
            self._labels[name] = (number, label)

    def take(self, name: str, classes: Classes) -> int:
        """The class of an image.

        Raises:
            InputError: if it has none, or one that the model does not have.
        """
        if name not in self._labels:
            raise InputError(f"{self.path} has no label for {name}; add a line for it")
        number, label = self._labels[name]
        self._taken += 1
        return classes.index(label, f"{self.path}, line {number}")

    def finish(self, folder: Path) -> None:
        """Check that every line was of an image; called after the last ``take``.

        Raises:
            InputError: if a line names an image that is not there.
        """
        if self._taken >= len(self._labels):
            return
        absent = [
            (n, name) for name, (n, _) in self._labels.items() if not (folder / name).exists()
        ]
        # The names of the columns, which no image has.
        if absent and absent[0][1] == self._header and "." not in self._header:
            absent = absent[1:]
        if absent:
            number, name = absent[0]
            raise InputError(
                f"{self.path} labels {len(absent)} images that are not in {folder}, the first is "
                f"{name} in line {number}; add them or remove their lines"
            )
