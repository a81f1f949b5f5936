"""A small video file, to try out what takes videos."""

from __future__ import annotations

import io
from typing import Any

import numpy as np

SIZE = 48
"""Height and width in pixels."""


def sample_video(frames: int) -> bytes:
    """An AVI file of grey frames that get brighter."""
    import av

    stream = io.BytesIO()
    with av.open(stream, "w", format="avi") as container:
        video: Any = container.add_stream("mpeg4", rate=5)
        video.width = video.height = SIZE
        video.pix_fmt = "yuv420p"
        for index in range(frames):
            level = np.full((SIZE, SIZE, 3), 255 * index // frames, np.uint8)
            container.mux(video.encode(av.VideoFrame.from_ndarray(level, format="rgb24")))
        container.mux(video.encode())
    return stream.getvalue()
