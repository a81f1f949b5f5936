"""Which patches are one token after each layer: merge plans composed, in numpy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tome_export.spec import PatchGrid

DROPPED = -1
"""In place of the token of a patch of which nothing is left."""


class Plans(NamedTuple):
    """One merging layer's plans for B images, as ``merge.plan.MergePlan`` has them.

    Attributes:
        keep: ``[B, K]`` int, input index of each output token.
        src: ``[B, R]`` int, input indices of the tokens folded away.
        dst: ``[B, R]`` int, for each src the OUTPUT position it is folded into; -1 for a token that
            is dropped.
    """

    keep: NDArray[np.integer]
    src: NDArray[np.integer]
    dst: NDArray[np.integer]


def token_map(plans: Plans) -> NDArray[np.int64]:
    """Output position of every input token of one layer.

    Returns:
        ``[B, N]`` int64 with ``N = K + R``; -1 for dropped tokens.
    """
    batch, kept = plans.keep.shape
    result = np.empty((batch, kept + plans.src.shape[1]), np.int64)
    np.put_along_axis(result, plans.keep.astype(np.int64), np.arange(kept)[None], axis=1)
    np.put_along_axis(result, plans.src.astype(np.int64), plans.dst.astype(np.int64), axis=1)
    return result


def groups_by_layer(
    plans: Mapping[int, Plans], depth: int, tokens: int, batch: int
) -> NDArray[np.int64]:
    """Where each token of the first layer is after every layer, by composing the plans.

    Args:
        plans: Of the layers that merge, by index; every other layer is the identity.
        depth: Number of layers.
        tokens: Tokens N that enter the first layer, prefix tokens included.
        batch: Images B.

    Returns:
        ``[B, depth, N]`` int64: the position, among the tokens that leave the layer, of the token
        that holds each initial one, ``DROPPED`` for none. Equal numbers are one token.
    """
    composed = np.broadcast_to(np.arange(tokens), (batch, tokens))
    result = np.empty((batch, depth, tokens), np.int64)
    for layer in range(depth):
        if layer in plans:
            moved = np.take_along_axis(token_map(plans[layer]), composed.clip(0), axis=1)
            composed = np.where(composed < 0, DROPPED, moved)
        result[:, layer] = composed
    return result


def clip_groups(
    plans: Mapping[tuple[int, bool], Plans],
    layers: Sequence[Mapping[str, int]],
    frames: int,
    batch: int,
) -> NDArray[np.int64]:
    """As ``groups_by_layer`` for videos, whose clips are joined between the plans.

    Args:
        plans: By layer, and whether it is the merge across clips; ``[B S, ...]``, the clips of one
            video behind those of another.
        layers: Token counts of each layer, as ``build.json`` has them.
        frames: Frames of one video.
        batch: Videos B.

    Returns:
        ``[B, depth, frames, N]`` int64: for every token of every frame the token that holds it
        behind each layer, clips counted on.
    """
    first = layers[0]["tokens_in"]
    places = np.broadcast_to(np.arange(first), (batch, frames, first))
    result = np.empty((batch, len(layers), frames, first), np.int64)
    for layer, counts in enumerate(layers):
        joined, clips = counts["joined"], counts["clips"]
        protected = counts["prefix"] // joined
        part = (np.arange(frames) * clips * joined // frames % joined)[:, None]
        rest = part * (counts["tokens_in"] - protected) + (joined - 1) * protected
        places = places + np.where(places < protected, part * protected, rest)
        for key in ((layer, True), (layer, False)):
            if key in plans:
                rows = places.reshape(batch * clips, -1)
                places = np.take_along_axis(token_map(plans[key]), rows, axis=1)
                places = places.reshape(batch, frames, first)
        clip = (np.arange(frames) * clips // frames)[:, None]
        result[:, layer] = places + clip * counts["tokens_out"]
    return result


def mosaic_side(frames: int) -> int:
    """Frames beside each other in a picture: the smallest divisor that makes it no taller."""
    return next(n for n in range(1, frames + 1) if frames % n == 0 and n * n >= frames)


def mosaic(parts: NDArray[Any]) -> NDArray[Any]:
    """Frames ``[F, H, W, ...]`` beside and below each other, row by row: one array."""
    frames, height, width, *rest = parts.shape
    cols = mosaic_side(frames)
    rows = parts.reshape(frames // cols, cols, height, width, *rest).swapaxes(1, 2)
    whole: NDArray[Any] = rows.reshape(frames // cols * height, cols * width, *rest)
    return whole


@dataclass(frozen=True)
class LayerGroups:
    """The patches of one image after one layer.

    Attributes:
        layer: Index of the layer, from 0.
        tokens: Tokens that leave it, prefix tokens included.
        ids: ``[rows, cols]`` int64, the token that holds each patch, ``DROPPED`` for none. Equal
            numbers are one token.
        patches_in_prefix: Patches merged into a class, distillation or register token, which have
            no place in the image; 0 where these are protected.
    """

    layer: int
    tokens: int
    ids: NDArray[np.int64]
    patches_in_prefix: int

    @property
    def merged(self) -> dict[int, int]:
        """Token -> patches in it, for tokens of more than one patch."""
        ids, counts = np.unique(self.ids, return_counts=True)
        pairs = zip(ids.tolist(), counts.tolist(), strict=True)
        return {i: n for i, n in pairs if n > 1 and i != DROPPED}

    @property
    def largest(self) -> int:
        """Patches of the largest token; 0 if there is none in the image."""
        there = self.ids[self.ids != DROPPED]
        return int(np.unique(there, return_counts=True)[1].max(initial=0))

    @property
    def dropped(self) -> int:
        """Patches of which nothing is left."""
        return int((self.ids == DROPPED).sum())


@dataclass(frozen=True)
class MergeMap:
    """One image as the model sees it, and its tokens after every layer.

    Attributes:
        image: ``[H, W, 3]`` uint8 RGB: resized and cut as for the model, not normalised.
        grid: How it is cut into patches.
        layers: One entry per layer, whether it merges or not.
    """

    image: NDArray[np.uint8]
    grid: PatchGrid
    layers: tuple[LayerGroups, ...]


def layers_from_positions(
    positions: NDArray[np.int64], tokens: tuple[int, ...], prefix: int, grid: PatchGrid
) -> tuple[LayerGroups, ...]:
    """One image's part of what ``groups_by_layer`` gives, put on the image.

    Args:
        positions: ``[depth, prefix + rows * cols]`` int64.
        tokens: Tokens that leave each layer.
        prefix: Tokens at the front that are no patches.
        grid: How the image is cut into patches.
    """
    layers = []
    for layer, (row, count) in enumerate(zip(positions, tokens, strict=True)):
        ids = row[prefix:].reshape(grid.rows, grid.cols)
        # A dropped prefix token is not where dropped patches are.
        lost = int(np.isin(ids, row[:prefix][row[:prefix] >= 0]).sum())
        layers.append(LayerGroups(layer, count, ids, lost))
    return tuple(layers)


def video_layers(
    ids: NDArray[np.int64], tokens: Sequence[int], prefix: int, grid: PatchGrid
) -> tuple[LayerGroups, ...]:
    """One video's part of what ``clip_groups`` gives, put on a mosaic of its frames.

    Args:
        ids: ``[depth, frames, prefix + rows * cols]`` int64.
        tokens: Tokens of the video that leave each layer.
        prefix: Tokens at the front of a frame that are no patches.
        grid: How a frame is cut into patches.
    """
    layers = []
    for layer, (frames, count) in enumerate(zip(ids, tokens, strict=True)):
        patches = frames[:, prefix:].reshape(len(frames), grid.rows, grid.cols)
        layers.append(LayerGroups(layer, count, mosaic(patches), 0))
    return tuple(layers)
