"""Videos as a model takes them: how many frames, where they are joined, what tokens that leaves.

Imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from tome_export.errors import InputError
from tome_export.merge.schedule import LayerTokens, Schedule
from tome_export.merge.spec import clamp_r

HEAD_WIDTH = 64
"""Width of one attention head in every CLIP ViT; its public code counts the heads by it."""


@dataclass(frozen=True)
class ClipSizes:
    """Sizes of a CLIP image tower.

    Attributes:
        patch: Side of a patch in pixels.
        image: Side of a frame in pixels.
    """

    width: int = 768
    depth: int = 12
    patch: int = 32
    image: int = 224
    features: int = 512

    @property
    def side(self) -> int:
        """Patches along one side of a frame."""
        return self.image // self.patch

    @property
    def tokens(self) -> int:
        """Tokens of one frame: its patches and the class token."""
        return self.side**2 + 1

    @property
    def heads(self) -> int:
        """Attention heads of a block."""
        return max(1, self.width // HEAD_WIDTH)


@dataclass(frozen=True)
class FrameMerging:
    """Where and how far the frames of a video are joined and merged.

    Attributes:
        layers: Blocks, counted from 0, that join neighbouring clips ahead of their attention.
        frames: For each of them, how many neighbouring clips become one.
        proportions: Percent of a joined clip's tokens to merge across its parts, and percent of
            what is left to merge by keys behind the attention (TempMe, section 3.3).
        position: Add a learned vector per clip between matching and averaging.

    Raises:
        InputError: if layers and frames do not belong together, or a number is out of range.
    """

    layers: tuple[int, ...] = (8, 9, 10)
    frames: tuple[int, ...] = (2, 2, 3)
    proportions: tuple[float, float] = (30, 10)
    position: bool = True

    def __post_init__(self) -> None:
        layers, frames = _listed(self.layers), _listed(self.frames)
        if not self.layers:
            raise InputError("no layer joins frames; expected layers in order, such as 8,9,10")
        if min(self.layers) < 0 or any(
            a >= b for a, b in zip(self.layers, self.layers[1:], strict=False)
        ):
            raise InputError(
                f"layers that join frames are {layers}; expected them in rising order, counted "
                "from 0, such as 8,9,10"
            )
        if len(self.frames) != len(self.layers):
            raise InputError(
                f"{len(self.layers)} layers ({layers}) join {len(self.frames)} numbers of frames "
                f"({frames}); expected one number per layer"
            )
        if min(self.frames) < 2:
            raise InputError(
                f"clips to join are {frames}; expected 2 or more for every layer, such as 2,2,3"
            )
        if len(self.proportions) != 2 or not all(0 <= p <= 100 for p in self.proportions):
            raise InputError(
                f"proportions are {_listed(self.proportions)}; expected two percentages from 0 to "
                "100, across frames and inside them, such as 30,10"
            )

    @classmethod
    def parse(cls, layers: str, frames: str, proportions: str, position: bool) -> FrameMerging:
        """Read the command line's lists, such as ``8,9,10``, ``2,2,3`` and ``30,10``."""
        inter = _numbers(proportions, "proportions", "30,10", float)
        if len(inter) != 2:
            raise InputError(
                f"proportions are {proportions!r}; expected two percentages, across frames and "
                "inside them, such as 30,10"
            )
        return cls(
            _numbers(layers, "layers that join frames", "8,9,10", int),
            _numbers(frames, "clips to join", "2,2,3", int),
            inter,
            position,
        )

    def check(self, depth: int, frames: int) -> None:
        """Refuse a model of so many blocks, or a number of frames, that this does not fit."""
        if self.layers[-1] >= depth:
            raise InputError(
                f"layer {self.layers[-1]} is to join frames; the model has layers 0 to {depth - 1}"
            )
        product = math.prod(self.frames)
        if frames % product:
            raise InputError(
                f"{frames} frames cannot be joined {_listed(self.frames)} at a time; expected a "
                f"multiple of {product}"
            )

    def clips_entering(self, frames: int) -> dict[int, int]:
        """For each layer that joins, how many clips of a video of so many frames enter it."""
        entering, clips = {}, frames
        for layer, joined in zip(self.layers, self.frames, strict=True):
            entering[layer], clips = clips, clips // joined
        return entering

    def __str__(self) -> str:
        position = "" if self.position else ", no frame position"
        return (
            f"layers {_listed(self.layers)} join {_listed(self.frames)} clips, "
            f"{_listed(self.proportions)} %{position}"
        )


@dataclass(frozen=True)
class VideoSchedule(Schedule):
    """Tokens to merge in each frame, in the layers ahead of the first that joins frames.

    Attributes:
        frames: Where frames are joined, and how many tokens merge from there on; None for never.
    """

    frames: FrameMerging | None = None

    def of_one_frame(self) -> Schedule:
        """See ``Schedule``."""
        if self.frames is not None:
            raise InputError(
                f"{self.frames}: that is for video towers, and this model takes images"
            )
        return self

    def __str__(self) -> str:
        return super().__str__() + ("" if self.frames is None else f"; {self.frames}")


@dataclass(frozen=True)
class VideoOptions:
    """What a video tower is to take and how it joins frames.

    Attributes:
        frames: Frames of one video; None for the recipe's own number.
        merging: Where frames are joined; None for never.
    """

    frames: int | None = None
    merging: FrameMerging | None = None

    def __post_init__(self) -> None:
        if self.frames is not None and self.frames < 1:
            raise InputError(f"{self.frames} frames were asked for; expected 1 or more")

    def schedule(self, schedule: Schedule) -> Schedule:
        """A schedule for frames, which are joined as these options say."""
        if self.merging is None:
            return schedule
        return VideoSchedule(schedule.r, schedule.inflect, schedule.per_layer, self.merging)


def video_token_counts(
    resolved: Sequence[int], merging: FrameMerging | None, frames: int, tokens: int, prefix: int
) -> tuple[LayerTokens, ...]:
    """Token counts of every layer of a video tower (TempMe, section 3.3).

    Layers ahead of the first that joins merge the number ``resolved`` of tokens inside each frame;
    from it on the proportions say how many. Products are truncated as in the public code.
    ``tokens`` are those of one frame that enter the first block, protected ones included.
    """
    if merging is not None:
        merging.check(len(resolved), frames)
    joins = dict(zip(merging.layers, merging.frames, strict=True)) if merging else {}
    inter, intra = (p / 100 for p in merging.proportions) if merging else (0.0, 0.0)
    first = merging.layers[0] if merging else len(resolved)
    clips, layers = frames, []
    for layer, wanted in enumerate(resolved):
        joined = joins.get(layer, 1)
        clips, prefix, whole = clips // joined, prefix * joined, tokens * joined
        cross = clamp_r(whole, int(whole * inter), prefix) if joined > 1 else 0
        asked = wanted if layer < first else int((whole - cross) * intra)
        r = clamp_r(whole - cross, asked, prefix)
        left = whole - cross - r
        layers.append(LayerTokens(tokens, r, left, sequences=clips, joined=joined, cross=cross))
        tokens = left
    return tuple(layers)


def without_last_merge(layers: Sequence[LayerTokens]) -> tuple[LayerTokens, ...]:
    """The layers without the last one's merge behind its attention.

    For towers whose output is read from tokens that the clips only are attended to by: what the
    last merge makes is read by nobody.
    """
    *rest, last = layers
    return (*rest, replace(last, r=0, tokens_out=last.attended))


def _numbers(text: str, what: str, example: str, kind: type) -> Any:
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError:
        raise InputError(f"{what} are {text!r}; expected numbers such as {example}") from None


def _listed(values: Sequence[float]) -> str:
    return ",".join(f"{value:g}" for value in values)
