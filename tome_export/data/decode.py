"""Reading and preprocessing images ahead of who takes them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from tome_export.data.source import Item, Pixels, printable
from tome_export.errors import ExportError, InputError, MissingComponentError

Decode = Callable[[bytes, str], Pixels]
"""Encoded image and its name to ``[C, H, W]`` float32; raises ``InputError``; can be pickled."""


@dataclass(frozen=True)
class Task:
    """A numbered chunk of images: the unit of work for processes, machines and resuming."""

    chunk: int
    items: tuple[Item, ...]


@dataclass(frozen=True)
class Decoded:
    """The images of a chunk.

    Attributes:
        chunk: Number of the chunk.
        pixels: Those that could be read, ``[B, C, H, W]`` float32.
        unreadable: Position, name and reason of the others.
    """

    chunk: int
    pixels: Pixels
    unreadable: tuple[tuple[int, str, str], ...]


def decode_task(task: Task, decode: Decode) -> Decoded:
    """Read and preprocess the images of one chunk; what cannot be read is told, not raised."""
    pixels, unreadable = [], []
    for position, item in enumerate(task.items):
        found = pixels_or_reason(item, decode)
        if isinstance(found, str):
            unreadable.append((position, item.name, found))
        else:
            pixels.append(found)
    array = np.stack(pixels) if pixels else np.zeros((0, 1, 1, 1), np.float32)
    return Decoded(task.chunk, array, tuple(unreadable))


def pixels_or_reason(item: Item, decode: Decode) -> Pixels | str:
    """An image's pixels ``[C, H, W]`` float32, or in one line why there are none."""
    try:
        data = item.load()
        return decode(data, item.name) if isinstance(data, bytes) else data
    except (ExportError, MissingComponentError):  # nothing can be decoded here
        raise
    # One bad image of a million must not end the run, whatever the decoder makes of it.
    except Exception as error:
        return reason_of(error, item.name)


def reason_of(error: BaseException, name: str = "") -> str:
    """Why an image could not be had, in one line that can be printed and need not name it."""
    if isinstance(error, OSError) and error.strerror:
        return printable(error.strerror)
    text = printable(" ".join(str(error).split()))
    if not isinstance(error, InputError):
        return f"{type(error).__name__}: {text}" if text else type(error).__name__
    for what in ("image ", "video "):
        text = text.removeprefix(what)
    return text.removeprefix(" ".join(name.split())).strip()


def decoded_chunks(
    tasks: Iterable[Task], decode: Decode, workers: int
) -> Generator[Decoded, None, None]:
    """Decode chunks in order, a bounded number of them ahead of what is taken.

    Each of the ``workers`` threads has a process that decodes; 0 decodes when a chunk is taken.
    """
    if workers == 0:
        yield from (decode_task(task, decode) for task in tasks)
        return
    pool = ThreadPoolExecutor(workers)
    waiting: deque[Future[Decoded]] = deque()
    try:
        for task in tasks:
            waiting.append(pool.submit(decode_task, task, decode))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
