"""Reading and preprocessing images in processes of their own."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace

import numpy as np

from tome_export.data.source import Item, Pixels, printable
from tome_export.errors import ExportError, InputError

Decode = Callable[[bytes, str], Pixels]
"""Encoded image and its name to ``[C, H, W]`` float32; raises ``InputError``; can be pickled."""

DIED = "the process that decoded it died, as of a fault in the decoder or for want of memory"


@dataclass(frozen=True)
class Task:
    """A chunk: the unit of work for processes, machines and resuming.

    Attributes:
        chunk: Its number.
        items: Its images.
    """

    chunk: int
    items: tuple[Item, ...]


@dataclass(frozen=True)
class Decoded:
    """A chunk's images.

    Attributes:
        chunk: Its number.
        pixels: Those that could be read, ``[B, C, H, W]`` float32.
        unreadable: Position, name and reason of the others.
    """

    chunk: int
    pixels: Pixels
    unreadable: tuple[tuple[int, str, str], ...]


def decode_task(task: Task, decode: Decode) -> Decoded:
    """Read and preprocess the images of one chunk; what cannot be read is told, not raised."""
    return _joined(task, [pixels_or_reason(item, decode) for item in task.items])


def _joined(task: Task, found: Sequence[Pixels | str]) -> Decoded:
    pixels = [one for one in found if not isinstance(one, str)]
    array = np.stack(pixels) if pixels else np.zeros((0, 1, 1, 1), np.float32)
    unreadable = tuple(
        (position, item.name, reason)
        for position, (item, reason) in enumerate(zip(task.items, found, strict=True))
        if isinstance(reason, str)
    )
    return Decoded(task.chunk, array, unreadable)


def pixels_or_reason(item: Item, decode: Decode) -> Pixels | str:
    """An image's pixels ``[C, H, W]`` float32, or in one line why there are none."""
    try:
        data = item.load()
        return decode(data, item.name) if isinstance(data, bytes) else data
    # One bad image of a million must not end the run, whatever the decoder makes of it.
    except Exception as error:
        return reason_of(error, item.name)


def reason_of(error: BaseException, name: str = "") -> str:
    """Why an image could not be had, in one line that can be printed.

    Args:
        error: Whatever reading or decoding raised.
        name: The image, which the reason need not repeat.
    """
    if isinstance(error, OSError) and error.strerror:
        return printable(error.strerror)
    text = printable(" ".join(str(error).split()))
    if not isinstance(error, InputError):
        return f"{type(error).__name__}: {text}" if text else type(error).__name__
    return text.removeprefix("image ").removeprefix(" ".join(name.split())).strip()


def decoded_chunks(
    tasks: Iterable[Task], decode: Decode, workers: int
) -> Generator[Decoded, None, None]:
    """Decode chunks in order, a bounded number of them ahead of what is taken.

    Args:
        tasks: Chunks.
        decode: See ``Decode``.
        workers: Processes; 0 decodes in this one.

    Raises:
        ExportError: if processes cannot be started here.
    """
    if workers == 0:
        yield from (decode_task(task, decode) for task in tasks)
        return
    pool = _Pool(decode, workers)
    waiting: deque[tuple[Task, Future[Decoded]]] = deque()
    try:
        for task in tasks:
            waiting.append((task, pool.submit(task)))
            if len(waiting) > 2 * workers:
                yield pool.result(*waiting.popleft())
        while waiting:
            yield pool.result(*waiting.popleft())
    finally:
        pool.close()


class _Pool:
    """Worker processes that are started again when one of them dies."""

    def __init__(self, decode: Decode, workers: int) -> None:
        self._decode = decode
        self._workers = workers
        self._executor = self._start(workers)

    def _start(self, workers: int) -> ProcessPoolExecutor:
        # A fork would copy the runtimes' threads and locks in whatever state they are.
        context = multiprocessing.get_context("spawn")
        return ProcessPoolExecutor(workers, context, _begin, (self._decode,))

    def submit(self, task: Task) -> Future[Decoded]:
        try:
            return self._executor.submit(_work, task)
        except BrokenProcessPool:
            failed: Future[Decoded] = Future()
            failed.set_exception(BrokenProcessPool())
            return failed

    def result(self, task: Task, future: Future[Decoded]) -> Decoded:
        """Wait for a chunk; if a process died, the chunk is decoded once more, apart."""
        try:
            return future.result()
        except BrokenProcessPool:
            if getattr(self._executor, "_broken", False):
                self._executor.shutdown(wait=False, cancel_futures=True)
                self._executor = self._start(self._workers)
            return self._apart(task)

    def _apart(self, task: Task) -> Decoded:
        """Decode a chunk in a process of its own; if that dies too, each image in one."""
        with contextlib.suppress(BrokenProcessPool), self._start(1) as single:
            return single.submit(_work, task).result()
        if len(task.items) == 1:
            self._require_processes()
            return _joined(task, [DIED])
        parts = [self._apart(replace(task, items=(item,))) for item in task.items]
        found = [one.unreadable[0][2] if one.unreadable else one.pixels[0] for one in parts]
        return _joined(task, found)

    def _require_processes(self) -> None:
        """Tell images that kill a process from a machine on which none can be started."""
        try:
            with self._start(1) as single:
                single.submit(os.getpid).result()
        except BrokenProcessPool:
            raise ExportError(
                "the processes that decode images cannot be started here; decode in this one with "
                "--workers 0"
            ) from None

    def close(self) -> None:
        self._executor.shutdown(wait=True, cancel_futures=True)


_decode: Decode | None = None


def _begin(decode: Decode) -> None:
    """Prepare a worker process."""
    global _decode
    _decode = decode
    # Ctrl-C goes to the whole group; the parent ends its workers itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A parent that was killed cannot end its workers."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work(task: Task) -> Decoded:
    if _decode is None:
        raise RuntimeError("the worker was not prepared")
    return decode_task(task, _decode)
