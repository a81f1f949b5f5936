"""Video files and moving samples to ``pixel_values`` of video towers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tome_export.data.folders import find_files
from tome_export.data.preprocess import (
    check_channels,
    check_file,
    decoded,
    pixels_from_image,
    read_image,
)
from tome_export.data.samples import sample_paths
from tome_export.errors import InputError

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL import Image

    from tome_export.spec import Preprocessing

VIDEO_SUFFIXES = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm")


def is_video(path: Path) -> bool:
    """Whether a file is a video, by its name."""
    return path.suffix.lower() in VIDEO_SUFFIXES


WINDOW = 0.75
"""Side of the part of a photograph that a moving sample shows."""


def find_videos(place: str | Path) -> list[Path]:
    """Every video under a folder, sorted by path; a single file stands for itself.

    Raises:
        InputError: if there is no such folder or file, or no video in it.
    """
    return find_files(place, VIDEO_SUFFIXES, "video")


def read_frames(path: str | Path, frames: int) -> list[Image.Image]:
    """Uniformly sampled frames of one video file; see ``tome_export.video.frames``.

    Raises:
        InputError: naming the file, if it is missing, no video, damaged, or too short.
        MissingComponentError: if PyAV is not installed.
    """
    from PIL import Image

    return [Image.fromarray(frame) for frame in _decoded("frames", path, {}, frames)]


def _decoded(
    kind: str, path: str | Path, settings: dict[str, Any], frames: int
) -> NDArray[np.float32]:
    check_file(path, "video")
    settings = {**settings, "frames": frames, "path": str(Path(path).absolute())}
    return decoded(kind, b"", f"video {path}", settings)


def load_videos(
    paths: Sequence[str | Path], preprocessing: Preprocessing, frames: int
) -> NDArray[np.float32]:
    """Decode and preprocess videos, every frame as an image, to ``[B, F, C, H, W]`` float32.

    Raises:
        InputError: as ``read_frames``, and if there are no videos.
        MissingComponentError: as ``read_frames``.
    """
    if not paths:
        raise InputError("no videos given; expected at least one video file")
    check_channels(preprocessing)
    return np.stack([_decoded("video", path, asdict(preprocessing), frames) for path in paths])


def moving_samples(preprocessing: Preprocessing, count: int, frames: int) -> NDArray[np.float32]:
    """Videos ``[count, F, C, H, W]`` float32 of the photographs: a window that moves across each.

    The n-th video of a photograph moves in the n-th direction: right, left, down, up.
    """
    photographs = sample_paths()
    made = []
    for index in range(count):
        image = read_image(photographs[index % len(photographs)])
        direction = index // len(photographs) % 4
        shown = [_window(image, step / max(1, frames - 1), direction) for step in range(frames)]
        made.append(_pixels(shown, preprocessing))
    return np.stack(made)


def _window(image: Image.Image, done: float, direction: int) -> Image.Image:
    """The part of an image that is seen when a share of the way is done."""
    width, height = round(image.width * WINDOW), round(image.height * WINDOW)
    done = 1 - done if direction % 2 else done
    across, down = (done, 0.5) if direction < 2 else (0.5, done)
    left, top = round(across * (image.width - width)), round(down * (image.height - height))
    return image.crop((left, top, left + width, top + height))


def _pixels(frames: Sequence[Image.Image], preprocessing: Preprocessing) -> NDArray[np.float32]:
    return np.stack([pixels_from_image(frame, preprocessing) for frame in frames])
