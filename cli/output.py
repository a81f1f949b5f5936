"""The streams: results on standard output, all else on standard error, others' noise nowhere."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import io
import json
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from tome_export.errors import InputError


@dataclass
class Terminal:
    """How to talk to whoever runs the command.

    Attributes:
        findings: What the JSON object of a failure holds besides the error.
    """

    json: bool = False
    debug: bool = False
    verbose: bool = False
    findings: dict[str, Any] = field(default_factory=dict)

    def result(self, values: Mapping[str, Any], lines: Sequence[str]) -> None:
        """Print a command's result: values, and parts of documents, for JSON, lines for people."""
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
        """Print a result; where it could not be written down, that is an error nevertheless."""
        error = None
        if unrecorded is not None:
            error = InputError(f"the result was not recorded: {unrecorded}")
        self.result_with(values, lines, error)

    def result_with(
        self, values: Mapping[str, Any], lines: Sequence[str], error: Exception | None
    ) -> None:
        """Print a result, and raise the error that comes with it, if there is one."""
        if error is None:
            self.result(values, lines)
            return
        if not self.json:
            with beside_the_error():
                self.result(values, lines)
        self.findings = dict(values)
        raise error

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


@contextlib.contextmanager
def quiet(*, debug: bool) -> Iterator[TextIO]:
    """Lead away what others print, from Python and from C++; yields our own way to stderr.

    Standard output is for results alone, so even with ``debug`` what others print there goes to
    standard error. Everything else is dropped without ``debug``: the libraries below warn of
    their own inner matters, and whatever concerns the user comes as an exception.
    """
    # Text still in Python's buffers must not end up behind the redirected descriptors.
    sys.stdout.flush()
    with _full():
        sys.stderr.flush()
    own = _own_stderr()
    with contextlib.ExitStack() as stack:
        if own is not sys.stderr:
            stack.callback(_close, own)
        sink: TextIO = own
        if not debug:
            sink = stack.enter_context(Path(os.devnull).open("w"))
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
            stack.callback(logging.disable, logging.root.manager.disable)
            logging.disable(logging.CRITICAL)
            stack.enter_context(contextlib.redirect_stderr(sink))
            stack.enter_context(_descriptor(2, sink))
        stack.enter_context(contextlib.redirect_stdout(sink))
        stack.enter_context(_descriptor(1, sink))
        yield own


@contextlib.contextmanager
def _full() -> Iterator[None]:
    """What a full disk has refused already, a stream would write once more when it is closed."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise


def _close(stream: TextIO) -> None:
    with _full():
        stream.close()


def _own_stderr() -> TextIO:
    """A stream to where standard error goes now, whatever becomes of descriptor 2."""
    stream = sys.stderr
    try:
        if stream.fileno() != 2:
            return stream
    except (io.UnsupportedOperation, AttributeError, ValueError):
        return stream  # not a file: a test's or a notebook's
    encoding, errors = stream.encoding, stream.errors
    return os.fdopen(os.dup(2), "w", buffering=1, encoding=encoding, errors=errors)


@contextlib.contextmanager
def _descriptor(number: int, sink: TextIO) -> Iterator[None]:
    try:
        target = sink.fileno()
        saved = os.dup(number)
    except (OSError, io.UnsupportedOperation, AttributeError):
        yield  # closed by the caller, or nothing to lead to
        return
    os.dup2(target, number)
    try:
        yield
    finally:
        _flush_c()
        os.dup2(saved, number)
        os.close(saved)


def _flush_c() -> None:
    """Empty C's own buffers while they still lead away; else they would appear at exit."""
    if os.name == "posix":
        ctypes.CDLL(None).fflush(None)
