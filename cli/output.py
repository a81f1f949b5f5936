"""Results on standard output: text for people, or one JSON object."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TextIO

from tome_export.artifact.files import json_bytes


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

    def result(self, values: dict[str, Any], lines: Sequence[str]) -> None:
        """Print a command's result in the form that was asked for."""
        if self.json:
            told = json_bytes(values).decode()
            if not _takes(sys.stdout, told):
                told = json.dumps(values, indent=2) + "\n"
        else:
            told = "\n".join(lines) + "\n"
        _write(sys.stdout, told)

    def error(self, kind: str, message: str, exit_code: int) -> None:
        """One line on standard error; with JSON also the object that is promised."""
        if self.json:
            failure = {"type": kind, "message": message, "exit_code": exit_code}
            self.result({"error": failure, **self.findings}, ())
        _write(sys.stderr, f"Error: {message}\n")


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


@contextlib.contextmanager
def beside_the_error() -> Iterator[None]:
    """Print what belongs to an error: should that fail, the error itself is still told."""
    try:
        yield
    except BrokenPipeError:
        raise
    except Exception as error:
        sys.stderr.write(f"The report cannot be shown: {type(error).__name__}: {error}\n")


def table(headers: Sequence[str], rows: Sequence[Sequence[object]], sides: str = "") -> list[str]:
    """Lines of a table.

    Args:
        headers: One per column.
        rows: Cells, shown with ``str``.
        sides: ``l`` or ``r`` per column; all to the right, as for numbers, where it is empty.
    """
    cells = [list(map(str, row)) for row in (headers, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if side == "l" else cell.rjust(width)
            for cell, width, side in zip(row, widths, sides or "r" * len(widths), strict=True)
        ).rstrip()
        for row in cells
    ]


def fields(pairs: Sequence[tuple[str, str]]) -> list[str]:
    """Lines of ``name  value``, values aligned."""
    width = max(len(name) for name, _ in pairs)
    return [f"{name.ljust(width)}  {value}".rstrip() for name, value in pairs]


def size(count: int) -> str:
    """Bytes for people, in decimal units as file managers show them."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count} bytes"


def macs(count: int) -> str:
    """Multiply-accumulates for people."""
    return f"{count / 1e9:.2f} G" if count >= 1e9 else f"{count / 1e6:.2f} M"


def number(value: float | None, spec: str) -> str:
    """A number by its format; reports hold None for what is not finite."""
    return "not finite" if value is None else format(value, spec)


def percent(share: float | None) -> str:
    """A share of one with as many decimals as it needs, at most two."""
    if share is None:
        return number(share, "")
    return f"{100 * share:.2f}".rstrip("0").rstrip(".") + " %"
