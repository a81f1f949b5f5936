"""Recipes of video towers, and giving one another number of frames or another merging."""

from __future__ import annotations

from dataclasses import replace

from tome_export.errors import InputError, UsageError
from tome_export.merge.schedule import VideoOptions
from tome_export.models.clip4clip_loader import Clip4ClipLoader
from tome_export.models.clip_sizes import ClipSizes
from tome_export.models.recipe import Geometry, Recipe
from tome_export.spec import VIDEO_FEATURES, Preprocessing

_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)

FRAMES = 12
"""Frames that the public training code of CLIP4Clip and TempMe samples on MSR-VTT."""


def _recipe(name: str, arch: str, patch: int) -> Recipe:
    return Recipe(
        name=name,
        family="clip4clip",
        preprocessing=Preprocessing((3, 224, 224), _MEAN, _STD, 1.0, "bicubic"),
        recommended_r=2,
        r_source="TempMe's published setting, ahead of the layers that join frames",
        output_name=VIDEO_FEATURES,
        description=f"CLIP4Clip's mean-pooling video tower on CLIP {arch}, {FRAMES} frames",
        weights_source="a file: CLIP's own, or of video retrieval training",
        licence="that of the file",
        loader=Clip4ClipLoader(ClipSizes(patch=patch), FRAMES),
        geometry=Geometry(768, 12, 3072, patch, head_macs=768 * 512),
        video=VideoOptions(FRAMES),
    )


def _stop_macs(width: int, side: int, patch: int) -> int:
    """MACs per video of what makes STOP's prompts; see ``stop_prompts`` for its sizes."""
    pixels, tokens = FRAMES * (side * patch) ** 2, FRAMES * side**2
    inside = (3 * 9 + 2 * 9 * 9 + 9 * 16) * 3 * 11**2 + 16 * 16 + 16 * 3 + 3 * 5 * 11**2
    between = 2 * 9 * 3 * 15 * 25 + 5 * 11**2
    attention = tokens * 4 * width**2 + 2 * tokens**2 * width
    rows = FRAMES * width * (side**2 * 16 + 16 * 4)
    return pixels * inside + tokens * width * between + attention + rows


_STOP = replace(
    _recipe("stop_b32", "ViT-B/32", 32),
    family="stop",
    description=f"STOP's video tower with prompts on CLIP ViT-B/32, {FRAMES} frames",
    weights_source="a file of STOP's training",
    loader=Clip4ClipLoader(ClipSizes(patch=32), FRAMES, prompts=True),
    # The adapter beside the MLP is as a wider MLP.
    geometry=Geometry(
        768, 12, 3072 + 32, 32, prefix=5, shared=4, video_macs=_stop_macs(768, 7, 32) + 768 * 512
    ),
)

CLIP4CLIP = (
    _recipe("clip4clip_b32", "ViT-B/32", 32),
    _recipe("clip4clip_b16", "ViT-B/16", 16),
    _STOP,
)


def with_video(recipe: Recipe, options: VideoOptions) -> Recipe:
    """The recipe with what is asked of frames.

    Args:
        recipe: Of any model.
        options: Nothing given leaves the recipe as it is.

    Raises:
        UsageError: if anything is given for a model that takes no videos.
        InputError: if the frames cannot be joined as asked.
    """
    if options == VideoOptions():
        return recipe
    if recipe.video is None:
        raise UsageError(
            f"frames were given for {recipe.name}, which takes images; they are for video towers "
            "such as clip4clip_b32"
        )
    video = VideoOptions(options.frames or recipe.video.frames, options.merging)
    loader = recipe.loader
    if isinstance(loader, Clip4ClipLoader):
        loader = replace(loader, frames=video.frames or FRAMES, merging=video.merging)
        if video.merging is not None:
            video.merging.check(loader.sizes.depth, loader.frames)
    elif video.frames != recipe.video.frames:
        raise InputError(
            f"{video.frames} frames were asked of {recipe.name}, whose tower is made for "
            f"{recipe.video.frames}"
        )
    return replace(recipe, video=video, loader=loader)
