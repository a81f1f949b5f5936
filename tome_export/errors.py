"""Errors a user can cause, each with the exit code that the command line ends with.

A message is one line and says what was got, what was expected, and what to do.
"""

from __future__ import annotations

import os
import traceback
from pathlib import Path


class TomeExportError(Exception):
    """Base of every error this package raises on purpose."""

    exit_code = 1


class UsageError(TomeExportError):
    """The command or call was not formed correctly."""

    exit_code = 2


class InputError(TomeExportError):
    """The model, weights, schedule, images or artifact given are not usable."""

    exit_code = 3


class UnrecordedError(InputError):
    """A result was found, and could not be written down."""

    def __init__(self, message: str, result: object) -> None:
        super().__init__(message)
        self.result = result


class MissingComponentError(TomeExportError):
    """A needed component (TensorRT, a GPU, a package) is not on this machine."""

    exit_code = 4


class ParityError(TomeExportError):
    """The exported graph or engine does not compute what PyTorch computes."""

    exit_code = 5


class ExportError(TomeExportError):
    """The ONNX export or the engine build failed."""

    exit_code = 6


def exit_text(error: SystemExit) -> str:
    """Which line of the user's code ended the program, as in ``sys.exit(2) in mine.py, line 7``.

    It is the last one of a file under the current folder, or the very last.
    """
    frames = traceback.extract_tb(error.__traceback__)
    here = f"{Path.cwd()}{os.sep}"
    last = next((f for f in reversed(frames) if f.filename.startswith(here)), frames[-1])
    code = "" if error.code is None else repr(error.code)
    return f"sys.exit({code}) in {last.filename}, line {last.lineno}"
