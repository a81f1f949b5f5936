"""Small video files, made with PyAV."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np


def grey(index: int) -> int:
    """Grey level of a frame."""
    return 20 + 20 * index % 220


def write_video(path: Path, frames: int, size: tuple[int, int] = (48, 48)) -> Path:
    """A video whose i-th frame is of one grey level, ``grey(i)``."""
    import av

    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("mpeg4", rate=5)
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        for index in range(frames):
            level = np.full((size[1], size[0], 3), grey(index), np.uint8)
            for packet in stream.encode(av.VideoFrame.from_ndarray(level, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return path
