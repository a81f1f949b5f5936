"""Pictures of merged tokens of videos: where the groups of all frames lie."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from tome_export.artifact import Manifest
from tome_export.spec import PatchGrid

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from tome_export.inspect.groups import MergeMap, Plans
    from tome_export.merge.plan import Step


def video_maps(
    manifest: Manifest,
    plans: Mapping[Step, Plans],
    pixels: NDArray[np.float32],
    grid: PatchGrid,
    prefix: int,
) -> list[MergeMap]:
    """Videos as mosaics of their frames; a token of several frames is one group in all of them.

    Args:
        manifest: Of the artifact.
        plans: What its graph chose, by merge; the clips of all videos follow each other.
        pixels: ``[B, F, C, H, W]`` float32.
        grid: How a frame is cut into patches.
        prefix: Tokens of a frame that are no patches.
    """
    from tome_export.inspect.groups import MergeMap, clip_groups, mosaic, mosaic_side, video_layers
    from tome_export.inspect.image import image_from_pixels
    from tome_export.merge.plan import Across, step_layer

    preprocessing = manifest.preprocessing
    frames = manifest.video.frames
    keyed = {(step_layer(s), isinstance(s, Across)): plan for s, plan in plans.items()}
    ids = clip_groups(keyed, manifest.layers, frames, len(pixels))
    # What lies beyond the last whole patch would part the frames' grids.
    cut = pixels[..., : grid.rows * grid.height, : grid.cols * grid.width]
    beside = mosaic_side(frames)
    whole = replace(grid, rows=grid.rows * (frames // beside), cols=grid.cols * beside)
    return [
        MergeMap(
            mosaic(np.stack([image_from_pixels(frame, preprocessing) for frame in shown])),
            whole,
            video_layers(one, manifest.tokens, prefix, grid),
        )
        for shown, one in zip(cut, ids, strict=True)
    ]
