"""Everything about videos: frames of files, towers that take them, and merging across frames.

``frames`` imports nothing of this package: the server runs it as it is.
"""

from typing import Literal

VIDEO_MASK: Literal["video_mask"] = "video_mask"
"""Input ``[B, F]``: 1 for frames that count, 0 for padding."""

VIDEO_FEATURES: Literal["video_features"] = "video_features"
"""Output ``[B, E]`` of a video tower."""
