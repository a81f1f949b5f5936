"""A generator in a Python process of its own, which shares nothing with this one.

Unlike ``multiprocessing`` it does not import the caller's main module, which may be a script that
begins its work anew.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import sys
from collections.abc import Callable, Iterator
from typing import IO, Any

_START = """
import sys
# Python looks for modules in the current folder first, where a user may have a torch or an inspect.
if sys.path[:1] == [""]:
    del sys.path[0]
import pickle
sys.path[:] = pickle.load(sys.stdin.buffer)
from tome_export.runtime.process import main
main()
"""

COMMAND = (sys.executable, "-c", _START)
"""Starts the process, which reads a request from its standard input."""


def request(function: Callable[..., Iterator[object]], *arguments: object) -> bytes:
    """What tells the process to run a generator; function and arguments can be pickled."""
    path = pickle.dumps([folder for folder in sys.path if folder])
    return path + pickle.dumps((function, arguments))


def answers(stream: IO[bytes]) -> Iterator[Any]:
    """What the generator gives, from the standard output of the process, until it ends."""
    with contextlib.suppress(EOFError, pickle.UnpicklingError):
        while True:
            yield pickle.load(stream)  # noqa: S301 (our own process's)


def main() -> None:
    """Run the requested generator in the process of its own, and end it."""
    # Whatever libraries print is not an answer.
    stream = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    function, arguments = pickle.load(sys.stdin.buffer)  # noqa: S301 (from our own starter)
    for answer in function(*arguments):
        pickle.dump(answer, stream)
        stream.flush()
    os._exit(0)  # whatever libraries do at the end is not waited for
