"""Keeping third-party noise off the terminal while a library call runs."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO


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
