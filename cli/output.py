"""Results on standard output: text for people, or one JSON object."""

from __future__ import annotations

import contextlib
import io
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TextIO

from tome_export import display
from tome_export.display import size
from tome_export.errors import InputError

__all__ = ["Terminal", "beside_the_error", "fields", "macs", "number", "percent", "size", "table"]


@dataclass
class Terminal:
    """How to talk to whoever runs the command.

    Attributes:
        json: One JSON object on standard output instead of text.
        debug: Show tracebacks and the output of third parties.
        verbose: Show what happens within each stage.
        findings: What the JSON object of a failure holds besides the error.
    """

    json: bool = False
    debug: bool = False
    verbose: bool = False
    findings: dict[str, Any] = field(default_factory=dict)

    def result(self, values: Mapping[str, Any], lines: Sequence[str]) -> None:
        """Print a command's result in the form that was asked for.

        Args:
            values: For JSON; parts of documents may be among them.
            lines: For people.
        """
        if not self.json:
            _write(sys.stdout, "\n".join(lines) + "\n")
            return
        from tome_export.artifact.files import json_bytes  # and pydantic

        plain = json.loads(json.dumps(values, default=lambda part: part.model_dump(mode="json")))
        text = json_bytes(plain).decode()
        _write(sys.stdout, text if _takes(sys.stdout, text) else json.dumps(plain, indent=2) + "\n")

    def recorded(
        self, values: Mapping[str, Any], lines: Sequence[str], unrecorded: str | None
    ) -> None:
        """Print a result; where it could not be written down, that is an error nevertheless.

        Args:
            values: See ``result``.
            lines: Likewise.
            unrecorded: Why it could not be written down; None if it was.

        Raises:
            InputError: if it could not.
        """
        if unrecorded is None:
            self.result(values, lines)
            return
        if not self.json:
            with beside_the_error():
                self.result(values, lines)
        self.findings = dict(values)
        raise InputError(f"the result was not recorded: {unrecorded}")

    def error(self, kind: str, message: str, exit_code: int) -> None:
        """One line on standard error; with JSON also the object that is promised."""
        if self.json:
            failure = {"type": kind, "message": message, "exit_code": exit_code}
            with beside_the_error():
                self.result({"error": failure, **self.findings}, ())
        aside(sys.stderr, f"Error: {message}\n")


def _takes(stream: TextIO, text: str) -> bool:
    try:
        text.encode(stream.encoding or "utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _write(stream: TextIO, text: str) -> None:
    """Write at once; what the stream has no characters for, as in some file names, is escaped."""
    if not _takes(stream, text):
        encoding = stream.encoding or "utf-8"
        text = text.encode(encoding, "backslashreplace").decode(encoding)
    stream.write(text)
    stream.flush()


def aside(stream: TextIO, text: str) -> None:
    """Write to standard error, which may be a file on a full disk: no result hangs on that."""
    try:
        _write(stream, text)
    except OSError as error:
        if isinstance(error, BrokenPipeError):
            raise


@contextlib.contextmanager
def beside_the_error() -> Iterator[None]:
    """Print what belongs to an error: should that fail, the error itself is still told."""
    try:
        yield
    except BrokenPipeError:
        raise
    except Exception as error:
        aside(sys.stderr, f"The report cannot be shown: {type(error).__name__}: {error}\n")


def table(headers: Sequence[str], rows: Sequence[Sequence[object]], sides: str = "") -> list[str]:
    """Lines of a table.

    Args:
        headers: One per column.
        rows: Cells, shown with ``str``.
        sides: ``l`` or ``r`` per column; all to the right, as for numbers, where it is empty.
    """
    return _aligned([headers, *rows], sides or "r" * len(headers))


def fields(pairs: Sequence[tuple[str, str]]) -> list[str]:
    """Lines of ``name  value``, values aligned."""
    return _aligned(pairs, "ll")


def _aligned(rows: Sequence[Sequence[object]], sides: str) -> list[str]:
    """The same text on a terminal and in a pipe: a table is as wide as it is."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 2))
    for side in sides:
        grid.add_column(justify="left" if side == "l" else "right", no_wrap=True)
    for row in rows:
        grid.add_row(*(Text(str(cell)) for cell in row))
    console = Console(file=io.StringIO(), width=1 << 16, color_system=None)
    with console.capture() as shown:
        console.print(grid)
    return [line.rstrip() for line in shown.get().split("\n")[:-1]]


def macs(count: float) -> str:
    """Multiply-accumulates without their name, which the label has."""
    return display.macs(count).removesuffix("MACs")


def number(value: float, spec: str) -> str:
    """A number by its format, if it is finite."""
    return format(value, spec) if math.isfinite(value) else "not finite"


def percent(share: float) -> str:
    """A share of one with as many decimals as it needs, at most two."""
    return display.percent(share, None) if math.isfinite(share) else "not finite"
