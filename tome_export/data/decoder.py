"""Decoding in a process of its own, within limits; also runs inside the server, beside its model.

A ``Decoder`` starts this file as a program, which takes one image or video after the other and
answers with arrays. What takes too long or too much memory, or breaks its decoder, ends that
process and nothing else. Needs NumPy, and the program ``pixels.py`` and ``frames.py`` as well.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import resource
import signal
import subprocess
import sys
import weakref
from collections.abc import Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from socket import socketpair
from types import ModuleType
from typing import Any

import numpy as np

MAX_BYTES = 1 << 28
"""Size of the largest file that is read."""

SECONDS = {"image": 20, "pixels": 20, "frames": 120, "video": 120}
"""Most time of a processor that one image or video takes, by what is asked for."""

PATIENCE = 6
"""Most time that may pass meanwhile on a busy machine, as a multiple of ``SECONDS``."""

MEMORY_BYTES = 3 << 29
"""What one image or video may take; a progressive JPEG of 64 megapixels takes 0.9 GB."""

DIED = "ends the process that decodes it, as of a fault in the decoder or for want of memory"

READY_SECONDS = 60

_START = "import json, runpy, sys; sys.path[:] = json.loads(sys.argv.pop()); runpy.run_path("


class DecodeError(ValueError):
    """What cannot be decoded; the message goes behind the name of the image or video."""


class NoDecoderError(RuntimeError):
    """What decodes videos is not installed; the message says what."""


class NoProcessError(RuntimeError):
    """The process cannot be started; the message says why."""


def check_size(size: int) -> None:
    """Raise a ``DecodeError`` for a file of more bytes than are read."""
    if size > MAX_BYTES:
        raise DecodeError(
            f"has {size / 1e6:.0f} MB; at most {MAX_BYTES / 1e6:.0f} MB are accepted, give a "
            "smaller one"
        )


class Decoder:
    """A process that decodes, started when it is needed and again after it ended; for one thread.

    Args:
        niceness: How far the process stands back behind others.
        seconds: Most time of a processor that one image or video takes, by ``kind``.
    """

    def __init__(
        self,
        pixels: Path,
        frames: Path | None = None,
        niceness: int = 0,
        seconds: Mapping[str, int] = SECONDS,
    ) -> None:
        self._seconds = seconds
        self._arguments = [str(pixels), str(frames or ""), str(niceness)]
        self._running: tuple[Connection, subprocess.Popen[bytes]] | None = None
        self._end: Any = None

    def __call__(self, kind: str, data: bytes, settings: dict[str, Any]) -> np.ndarray[Any, Any]:
        """Decode one image or video.

        Args:
            kind: ``image`` for the image ``[H, W]`` or ``[H, W, 3]`` uint8, ``pixels`` for what
                the model takes of it, ``[C, H, W]`` float32; of a video, ``frames``
                ``[F, H, W, 3]`` and ``video`` ``[F, C, H, W]``.
            data: The content of its file; of a video nothing, where ``settings`` name its
                ``path``.
            settings: See ``pixels.Settings``; of a video also its ``frames``.

        Raises:
            DecodeError: if it cannot be decoded within the limits.
            NoDecoderError: if it is a video, and PyAV is not installed.
            NoProcessError: if the process cannot be started.
        """
        check_size(len(data))
        seconds = self._seconds[kind]
        slow = f"takes more than {seconds} s to decode; give a smaller or simpler one"
        request = json.dumps({**settings, "kind": kind, "seconds": seconds}).encode()
        for attempt in range(2):
            connection, process = self.start()
            try:
                connection.send_bytes(request)
                connection.send_bytes(data)
                if not connection.poll(seconds * PATIENCE):
                    raise TimeoutError
                return _answer(connection)
            except (EOFError, ConnectionError):
                if process.wait() == -signal.SIGPROF:
                    raise DecodeError(slow) from None
                if attempt:  # the first time, something else may have ended it
                    raise DecodeError(DIED) from None
            except TimeoutError:
                self.close()
                raise DecodeError(slow) from None
            except (DecodeError, NoDecoderError):
                raise
            except BaseException:
                self.close()  # or its answer would be taken for that of the next
                raise
        raise AssertionError("unreachable")

    def start(self) -> tuple[Connection, subprocess.Popen[bytes]]:
        """Have the process ready; raises a ``NoProcessError`` if it cannot be started."""
        if self._running is not None and self._running[1].poll() is None:
            return self._running
        self.close()
        ours, theirs = socketpair()
        # The packages of this process, and nothing else that it was started with.
        path = json.dumps([place for place in sys.path if place])
        arguments = [*self._arguments, str(theirs.fileno()), path]
        code = f"{_START}{str(Path(__file__).absolute())!r}, run_name='__main__')"
        failed = f"the process that decodes cannot be started with {sys.executable or 'no Python'}"
        try:
            with theirs:
                process = subprocess.Popen(
                    [sys.executable, "-I", "-c", code, *arguments],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,  # libraries write of damaged files there
                    env={**os.environ, "MALLOC_ARENA_MAX": "1", "OPENBLAS_NUM_THREADS": "1"},
                    pass_fds=[theirs.fileno()],
                )
        except OSError as error:
            ours.close()
            raise NoProcessError(f"{failed} ({error.strerror or error})") from None
        connection = Connection(ours.detach())
        self._running = connection, process
        self._end = weakref.finalize(self, _stop, connection, process)
        reason = "it does not answer"
        try:
            if connection.poll(READY_SECONDS):
                reason = connection.recv_bytes().decode()
        except (EOFError, ConnectionError):
            reason = f"it ends with {process.wait()}"
        if reason:
            self.close()
            raise NoProcessError(f"{failed} ({reason})")
        return self._running

    def close(self) -> None:
        """End the process; the next image starts another."""
        self._running = None
        if self._end is not None:
            self._end()


def _stop(connection: Connection, process: subprocess.Popen[bytes]) -> None:
    connection.close()
    process.kill()
    process.wait()


def _answer(connection: Connection) -> np.ndarray[Any, Any]:
    head = json.loads(connection.recv_bytes())
    if "missing" in head:
        raise NoDecoderError(head["missing"])
    if "bad" in head:
        raise DecodeError(head["bad"])
    array: np.ndarray[Any, Any] = np.empty(head["shape"], head["dtype"])
    connection.recv_bytes_into(array.reshape(-1).view(np.uint8))
    return array


def _module(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"tome_export_{Path(path).stem}", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no module")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _limit(niceness: int) -> None:
    os.nice(niceness)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for who started this
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    limits = [(resource.RLIMIT_CORE, 0)]
    if (used := Path("/proc/self/statm")).is_file():
        here = int(used.read_text().split()[0]) * resource.getpagesize()
        limits.append((resource.RLIMIT_AS, here + MEMORY_BYTES))
    for which, most in limits:
        hard = resource.getrlimit(which)[1]
        resource.setrlimit(which, (most if hard < 0 else min(most, hard), hard))


def _decode(
    pixels: ModuleType, frames: ModuleType | None, request: dict[str, Any], data: bytes
) -> np.ndarray[Any, Any]:
    kind, most = request["kind"], request.get("max_pixels") or pixels.MAX_PIXELS
    if kind == "image":
        return np.asarray(pixels.image_from_bytes(data, request))
    if kind == "pixels":
        found: np.ndarray[Any, Any] = pixels.pixels_from_bytes(data, request)
        return found

    def prepare(frame: Any) -> Any:
        return np.asarray(frame) if kind == "frames" else pixels.pixels_from_image(frame, request)

    if frames is None:
        raise NoDecoderError("videos are not decoded here")
    source = Path(request["path"]) if "path" in request else data
    return np.stack(frames.prepared_frames(source, request["frames"], prepare, most))


def main(pixels: str, frames: str, niceness: str, descriptor: str) -> None:
    """Decode what comes, until whoever sends it is gone."""
    with Connection(int(descriptor)) as connection, contextlib.suppress(EOFError, OSError):
        try:
            images, videos = _module(pixels), _module(frames) if frames else None
            images.Image.MAX_IMAGE_PIXELS = None  # our own limit is lower
            images.Image.preinit()
            _limit(int(niceness))
        except Exception as error:
            connection.send_bytes(f"{type(error).__name__}: {error}".encode())
            return
        connection.send_bytes(b"")
        while True:
            request = json.loads(connection.recv_bytes())
            data: Any = connection.recv_bytes()
            signal.setitimer(signal.ITIMER_PROF, request["seconds"])
            array: Any = None
            try:
                array = np.ascontiguousarray(_decode(images, videos, request, data))
                head = {"dtype": array.dtype.str, "shape": array.shape}
            except MemoryError:
                head = {"bad": "takes more memory to decode than is allowed; give a smaller one"}
            except Exception as error:
                known = type(error).__name__ in ("BadImageError", "BadVideoError")
                text = str(error) if known else f"cannot be decoded ({error!r:.200})"
                missing = type(error).__name__ == "NoDecoderError"
                head = {"missing": str(error)} if missing else {"bad": " ".join(text.split())}
            signal.setitimer(signal.ITIMER_PROF, 0)
            connection.send_bytes(json.dumps(head).encode())
            if array is not None:
                connection.send_bytes(memoryview(array).cast("B"))
            array = data = None


if __name__ == "__main__":
    main(*sys.argv[1:])
