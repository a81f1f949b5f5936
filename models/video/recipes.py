"""Video towers on CLIP's image tower: their recipes and loader. Imports no torch by itself."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from tome_export.errors import InputError, UsageError
from tome_export.models.facts import CLIP_NORM, Geometry, MergingAdvice, ModelOutput
from tome_export.models.recipe import LoadedModel, Loader, ModelSource, Recipe, filled
from tome_export.spec import ImageSize, Preprocessing
from tome_export.video import VIDEO_FEATURES
from tome_export.video.options import ClipSizes, FrameMerging, VideoOptions
from tome_export.weights.files import Checkpoint, stored_dtype

if TYPE_CHECKING:
    from torch import nn

FRAMES = 12
"""Frames that the public training code of CLIP4Clip and TempMe samples on MSR-VTT."""


@dataclass(frozen=True)
class Clip4ClipLoader(Loader):
    """Makes a video tower.

    Attributes:
        merging: Where frames are joined: its frame positions are weights of the tower.
        prompts: Whether it is STOP's tower, and not the plain one.
    """

    sizes: ClipSizes = field(default_factory=ClipSizes)
    frames: int = 12
    merging: FrameMerging | None = None
    prompts: bool = False

    def create(self, depth: int | None = None) -> nn.Module:
        """See ``Loader``."""
        from tome_export.video.clip4clip import Clip4ClipTower
        from tome_export.video.stop import StopTower

        sizes, merging = replace(self.sizes, depth=depth or self.sizes.depth), self.merging
        if merging is not None:
            merging.check(sizes.depth, self.frames)
        positions = merging.clips_entering(self.frames) if merging and merging.position else {}
        made = StopTower if self.prompts else Clip4ClipTower
        return made(sizes, self.frames, positions)

    def from_file(self, recipe: Recipe, checkpoint: Checkpoint, depth: int | None) -> LoadedModel:
        """See ``Loader``."""
        from tome_export.video.checkpoints import stop_state, tower_state, with_positions

        module = self.create(depth)
        state, path = checkpoint.state, checkpoint.path
        if self.prompts:
            state = stop_state(state, path, self.frames, self.sizes.width)
        else:
            state = tower_state(state, path)
        stored = stored_dtype(state.values())
        state, remark = with_positions(state, module)
        return filled(recipe, module, state, checkpoint, stored, remark)

    def at(self, image_size: ImageSize) -> Loader:
        """Refused, as the public code of these towers has nothing that resamples positions."""
        side = self.sizes.image
        raise InputError(
            f"image size {image_size} was asked for a video tower of frames of {side}x{side}, "
            "whose public code resamples no positions; leave --image-size out"
        )

    def download(self, recipe: Recipe) -> Path:
        """Refuse: there is no place to get these weights from."""
        raise InputError(
            f"{recipe.name} has no weights of its own to download; give the file of a CLIP or "
            "video retrieval checkpoint with --weights PATH, or try the toolchain with --weights "
            "random"
        )


def _recipe(
    name: str,
    loader: Clip4ClipLoader,
    geometry: Geometry,
    description: str,
    weights: str = "a file: CLIP's own, or of video retrieval training",
    family: str = "clip4clip",
) -> Recipe:
    return Recipe(
        name=name,
        source=ModelSource(loader, weights, "that of the file"),
        preprocessing=Preprocessing((3, 224, 224), *CLIP_NORM, 1.0, "bicubic"),
        merging=MergingAdvice(
            2, "TempMe's published setting, ahead of the layers that join frames"
        ),
        output=ModelOutput(VIDEO_FEATURES),
        family=family,
        description=f"{description}, {FRAMES} frames",
        geometry=geometry,
        video=VideoOptions(FRAMES),
    )


def _stop_macs(width: int, side: int, patch: int) -> int:
    """MACs per video of what makes STOP's prompts; ``video.stop.TemporalPrompt`` has its sizes."""
    pixels, tokens = FRAMES * (side * patch) ** 2, FRAMES * side**2
    inside = (3 * 9 + 2 * 9 * 9 + 9 * 16) * 3 * 11**2 + 16 * 16 + 16 * 3 + 3 * 5 * 11**2
    between = 2 * 9 * 3 * 15 * 25 + 5 * 11**2
    attention = tokens * 4 * width**2 + 2 * tokens**2 * width
    rows = FRAMES * width * (side**2 * 16 + 16 * 4)
    return pixels * inside + tokens * width * between + attention + rows


_STOP = _recipe(
    "stop_b32",
    Clip4ClipLoader(ClipSizes(patch=32), FRAMES, prompts=True),
    # The adapter beside the MLP is as a wider MLP.
    Geometry(
        768, 12, 3072 + 32, 32, prefix=5, shared=4, video_macs=_stop_macs(768, 7, 32) + 768 * 512
    ),
    "STOP's video tower with prompts on CLIP ViT-B/32",
    "a file of STOP's training",
    "stop",
)

CLIP4CLIP = (
    *(
        _recipe(
            f"clip4clip_b{patch}",
            Clip4ClipLoader(ClipSizes(patch=patch), FRAMES),
            Geometry(768, 12, 3072, patch, head_macs=768 * 512),
            f"CLIP4Clip's mean-pooling video tower on CLIP ViT-B/{patch}",
        )
        for patch in (32, 16)
    ),
    _STOP,
)


def with_video(recipe: Recipe, options: VideoOptions) -> Recipe:
    """The recipe with what is asked of frames."""
    if options == VideoOptions():
        return recipe
    if recipe.video is None:
        raise UsageError(
            f"frames were given for {recipe.name}, which takes images; they are for video towers "
            "such as clip4clip_b32"
        )
    video = VideoOptions(options.frames or recipe.video.frames, options.merging)
    loader = recipe.source.loader
    if isinstance(loader, Clip4ClipLoader):
        loader = replace(loader, frames=video.frames or FRAMES, merging=video.merging)
        if video.merging is not None:
            video.merging.check(loader.sizes.depth, loader.frames)
    elif video.frames != recipe.video.frames:
        raise InputError(
            f"{video.frames} frames were asked of {recipe.name}, whose tower is made for "
            f"{recipe.video.frames}"
        )
    return replace(recipe, video=video, source=replace(recipe.source, loader=loader))
