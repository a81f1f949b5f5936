"""Results on standard output: text for people, or one JSON object."""

from __future__ import annotations

import contextlib
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TextIO

from tome_export import display
from tome_export.artifact.files import json_bytes
from tome_export.display import size

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
        plain = json.loads(json.dumps(values, default=lambda part: part.model_dump(mode="json")))
        text = json_bytes(plain).decode()
        _write(sys.stdout, text if _takes(sys.stdout, text) else json.dumps(plain, indent=2) + "\n")

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


def macs(count: float) -> str:
    """Multiply-accumulates without their name, which the label has."""
    return display.macs(count).removesuffix("MACs")


def number(value: float, spec: str) -> str:
    """A number by its format, if it is finite."""
    return format(value, spec) if math.isfinite(value) else "not finite"


def percent(share: float) -> str:
    """A share of one with as many decimals as it needs, at most two."""
    return display.percent(share, None) if math.isfinite(share) else "not finite"
