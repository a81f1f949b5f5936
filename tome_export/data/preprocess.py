"""Images and videos on disk to ``pixel_values``, as timm evaluates; imports no torch."""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tome_export.data import pixels
from tome_export.data.decoder import (
    DecodeError,
    Decoder,
    NoDecoderError,
    NoProcessError,
    check_size,
)
from tome_export.data.folders import find_files
from tome_export.errors import ExportError, InputError, MissingComponentError
from tome_export.video import frames as video_frames

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL import Image

    from tome_export.spec import Preprocessing

IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
VIDEO_SUFFIXES = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm")


def is_video(path: Path) -> bool:
    """Whether a file is a video, by its name."""
    return path.suffix.lower() in VIDEO_SUFFIXES


def find_images(folder: str | Path) -> list[Path]:
    """Every image under a folder, sorted by path; see ``find_files``."""
    return find_files(folder, IMAGE_SUFFIXES, "image")


def find_videos(folder: str | Path) -> list[Path]:
    """Every video under a folder, sorted by path; see ``find_files``."""
    return find_files(folder, VIDEO_SUFFIXES, "video")


def load_images(paths: Sequence[str | Path], preprocessing: Preprocessing) -> NDArray[np.float32]:
    """Read and preprocess images to ``pixel_values [B, C, H, W]`` float32; see ``Preprocessing``.

    EXIF orientation is applied; transparency is laid on white; 16-bit grey keeps its upper byte.
    """
    if not paths:
        raise InputError("no images given; expected at least one image file")
    return np.stack([pixels_from_bytes(read_file(p), str(p), preprocessing) for p in paths])


def load_videos(
    paths: Sequence[str | Path], preprocessing: Preprocessing, frames: int
) -> NDArray[np.float32]:
    """Preprocess videos, every frame as an image, to ``[B, F, C, H, W]`` float32."""
    if not paths:
        raise InputError("no videos given; expected at least one video file")
    check_channels(preprocessing)
    return np.stack([_video("video", path, asdict(preprocessing), frames) for path in paths])


def read_image(path: str | Path, formats: Sequence[str] = pixels.FORMATS) -> Image.Image:
    """Decode one image file upright, as mode ``L`` or ``RGB``.

    ``formats`` are what it may be, by Pillow's names.
    """
    from PIL import Image

    settings = {"formats": formats}
    return Image.fromarray(decoded("image", read_file(path), f"image {path}", settings))


def read_frames(path: str | Path, frames: int) -> list[Image.Image]:
    """Uniformly sampled frames of one video file; see ``tome_export.video.frames``."""
    from PIL import Image

    return [Image.fromarray(frame) for frame in _video("frames", path, {}, frames)]


def _video(kind: str, path: str | Path, settings: dict[str, Any], frames: int) -> NDArray[Any]:
    _check_file(path, "video")
    settings = {**settings, "frames": frames, "path": str(Path(path).absolute())}
    return decoded(kind, b"", f"video {path}", settings)


def read_file(path: str | Path) -> bytes:
    """The content of an image file."""
    size = _check_file(path, "image")
    try:
        check_size(size)
        return Path(path).read_bytes()
    except DecodeError as error:
        raise InputError(f"image {path} {error}") from None
    except OSError as error:
        raise InputError(
            f"image {path} cannot be read ({error.strerror}); expected an image file"
        ) from None


def _check_file(path: str | Path, what: str) -> int:
    """Size in bytes of a file; an ``InputError`` if it is missing or no regular file."""
    expected = f"expected {'an' if what[0] in 'aeiou' else 'a'} {what} file"
    try:
        found = Path(path).stat()
    except (OSError, ValueError) as error:  # the latter of a zero byte
        missing = isinstance(error, FileNotFoundError | NotADirectoryError)
        reason = getattr(error, "strerror", None) or error
        state = "does not exist" if missing else f"cannot be read ({reason})"
        raise InputError(f"{what} {path} {state}; {expected}") from None
    if not stat.S_ISREG(found.st_mode):
        state = "is a folder" if stat.S_ISDIR(found.st_mode) else "is no regular file"
        raise InputError(f"{what} {path} {state}; {expected}")
    return found.st_size


def pixels_from_bytes(data: bytes, name: str, preprocessing: Preprocessing) -> NDArray[np.float32]:
    """Decode and preprocess one encoded image to ``[C, H, W]`` float32.

    ``name`` is what an error calls it.
    """
    check_channels(preprocessing)
    return decoded("pixels", data, f"image {name}", asdict(preprocessing))


_own = threading.local()


def decoded(kind: str, data: bytes, name: str, settings: dict[str, Any]) -> NDArray[Any]:
    """Decode an image or a video in the process of this thread; see ``Decoder``."""
    if getattr(_own, "pid", None) != os.getpid():  # a fork must leave that of its parent alone
        _own.pid = os.getpid()
        _own.decoder = Decoder(Path(pixels.__file__), Path(video_frames.__file__))
    try:
        found: NDArray[Any] = _own.decoder(kind, data, settings)
    except DecodeError as error:
        raise InputError(f"{name} {error}") from None
    except NoProcessError as error:
        raise ExportError(f"images cannot be decoded here: {error}") from None
    except NoDecoderError as error:
        raise MissingComponentError(
            f"{error}; install the extra: pip install 'tome-export[video]'"
        ) from None
    return found


def pixels_from_image(image: Image.Image, preprocessing: Preprocessing) -> NDArray[np.float32]:
    """Preprocess one image in memory to ``[C, H, W]`` float32, as ``load_images`` does a file."""
    check_channels(preprocessing)
    settings = asdict(preprocessing)
    try:
        return pixels.pixels_from_image(pixels.upright(image, settings), settings)
    except pixels.BadImageError as error:
        raise InputError(f"image {error}") from None


def check_channels(preprocessing: Preprocessing) -> None:
    """Raise an ``InputError`` if a model takes other than one or three channels."""
    channels = preprocessing.input_size[0]
    if channels not in pixels.MODES:
        raise InputError(
            f"the model takes {channels} channels; images can be given to models of 1 or 3"
        )
