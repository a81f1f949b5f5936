"""A video file to frames, sampled uniformly; also runs inside the server, beside its model.

Of N frames, F are taken: frame ``floor(i (N - 1) / (F - 1))`` for i = 0 to F - 1, the first and the
last among them. That is how the public code of CLIP4Clip and TempMe picks frames; it counts those
of one second each, here all count.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from PIL import Image

EXPECTED = "expected MP4, MOV, WebM, Matroska, AVI or MPEG"
# FFmpeg goes by the content, and also knows texts that name other files and addresses to open.
FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegts,mpegvideo"
"""FFmpeg's names of the containers that are read; none of them leads out of its own file."""

THREADS = 4
"""Threads that decode one video; FFmpeg's own default is one per core, with memory for each."""

T = TypeVar("T")


class BadVideoError(ValueError):
    """Bytes that are no video to take frames from; the message goes behind the video's name."""


class NoDecoderError(RuntimeError):
    """PyAV is not installed."""


def sampled(total: int, count: int) -> list[int]:
    """Indices of ``count`` of ``total`` frames, in order: at least 1, and no more than total."""
    return [i * (total - 1) // max(1, count - 1) for i in range(count)]


def frames_of(source: Path | bytes, count: int, max_pixels: int | None = None) -> list[Image.Image]:
    """Uniformly sampled frames of one video file, upright.

    Args:
        source: The file, or its content.
        count: How many.
        max_pixels: Most pixels of one frame; larger ones are refused before anything is decoded.

    Returns:
        ``count`` images of mode ``RGB`` and of one size.

    Raises:
        BadVideoError: if it is no such file, damaged, too large, or has fewer frames.
        NoDecoderError: if PyAV is missing.
    """
    return prepared_frames(source, count, lambda frame: frame, max_pixels)


def prepared_frames(
    source: Path | bytes,
    count: int,
    prepare: Callable[[Image.Image], T],
    max_pixels: int | None = None,
) -> list[T]:
    """What ``prepare`` makes of each of ``frames_of``; one whole frame is held at a time."""
    with _opened(source) as (container, stream):
        size = stream.codec_context.width, stream.codec_context.height
        if max_pixels is not None and size[0] * size[1] > max_pixels:
            raise BadVideoError(
                f"has frames of {size[0]} x {size[1]} pixels; at most {max_pixels / 1e6:.1f} "
                "megapixels are accepted, give smaller ones"
            )
        total = sum(packet.size > 0 for packet in container.demux(stream))
    found, decoded = _decoded(source, _indices(total, count), prepare)
    if len(found) < count:
        # Packets are not always frames; now their number is known.
        found, _ = _decoded(source, _indices(decoded, count), prepare)
    return found


def _indices(total: int, count: int) -> list[int]:
    if total < count:
        raise BadVideoError(
            f"has {total} frames; expected {count} or more, give a longer one or take fewer frames"
        )
    return sampled(total, count)


def _decoded(
    source: Path | bytes, wanted: list[int], prepare: Callable[[Image.Image], T]
) -> tuple[list[T], int]:
    """The wanted frames that there are, prepared, and how many were met until the last one."""
    found: list[T] = []
    met = 0
    with _opened(source) as (container, stream):
        for frame in container.decode(stream):
            while len(found) < len(wanted) and wanted[len(found)] == met:
                found.append(prepare(_upright(frame)))
            met += 1
            if len(found) == len(wanted):
                break
    return found, met


def _upright(frame: Any) -> Image.Image:
    """The frame as it is meant to be looked at: phones store how they were held."""
    image: Image.Image = frame.to_image()
    turned = round(getattr(frame, "rotation", 0) / 90) % 4
    return image if turned == 0 else image.transpose(_TURNS[turned])


_TURNS = {
    1: Image.Transpose.ROTATE_90,
    2: Image.Transpose.ROTATE_180,
    3: Image.Transpose.ROTATE_270,
}


@contextmanager
def _opened(source: Path | bytes) -> Iterator[tuple[Any, Any]]:
    """Container and video stream; whatever goes wrong with them is the file's fault."""
    try:
        import av
    except ImportError as error:
        raise NoDecoderError("PyAV, which decodes videos, is not installed") from error
    allowed = {"format_whitelist": FORMATS}
    try:
        with _stream(source) as file, av.open(file, container_options=allowed) as container:
            if not container.streams.video:
                raise BadVideoError(f"has no pictures, only sound or text; {EXPECTED}")
            stream = container.streams.video[0]
            if stream.codec_context is None:
                raise BadVideoError(f"has pictures in a code that is not known; {EXPECTED}")
            stream.thread_type = "AUTO"
            stream.codec_context.thread_count = THREADS
            yield container, stream
    except BadVideoError:
        raise
    # FFmpeg's errors are many classes, all of them also one of Python's.
    # A format that is not allowed is an argument that is not.
    except (av.error.InvalidDataError, av.error.ArgumentError) as error:
        raise BadVideoError(
            f"is not a video that can be read ({_line(error)}); {EXPECTED}, whole"
        ) from None
    except (av.error.FFmpegError, OSError, ValueError, EOFError) as error:
        raise BadVideoError(
            f"cannot be decoded ({_line(error)}); it is damaged or cut short, replace it"
        ) from None


def _stream(source: Path | bytes) -> BinaryIO:
    if isinstance(source, bytes):
        return io.BytesIO(source)
    try:
        return source.open("rb")
    except OSError as error:
        raise BadVideoError(
            f"cannot be opened ({_line(error)}); expected a file that can be read"
        ) from None


def _line(error: BaseException) -> str:
    text = str(getattr(error, "strerror", None) or error)
    return text.splitlines()[0] if text else type(error).__name__
