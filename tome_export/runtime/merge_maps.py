"""Which patches are one token after each layer: an artifact's own decisions, put on the image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tome_export.artifact import Artifact, Manifest
from tome_export.artifact.manifest import Layer
from tome_export.data.images import load_inputs
from tome_export.errors import InputError
from tome_export.progress import Progress, Silent
from tome_export.runtime.inputs import extra_inputs, refuse_extra_inputs, unit_inputs
from tome_export.runtime.model import model_from_artifact, open_runner
from tome_export.runtime.registry import ORT_CPU
from tome_export.runtime.runner import Runner, infer_in_batches
from tome_export.spec import INPUT_NAME, BatchRange, PatchGrid, Preprocessing

if TYPE_CHECKING:
    from tome_export.merge.plan import Step
    from tome_export.onnx.twin import Twin

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


def merge_maps(
    artifact: Artifact,
    images: Sequence[Path] | NDArray[Any],
    progress: Progress | None = None,
    inputs: Mapping[str, NDArray[np.float32]] | None = None,
) -> list[MergeMap]:
    """Which patches are one token after each layer, as the shipped graph decides it.

    The graph runs on ONNX Runtime's CPU provider, instrumented and free to choose; no PyTorch.
    Images are files, or ``pixel_values [B, ...]`` in the model's form, at least one; for a model of
    videos, video files or pixel values. ``inputs`` are what the model takes besides, by name,
    ``[B, ...]``.
    """
    from tome_export.onnx.files import load
    from tome_export.onnx.twin import twin_from_model

    progress = progress or Silent()
    if inputs is None:
        refuse_extra_inputs(artifact, "report")
    manifest = artifact.manifest
    grid_from_manifest(manifest, artifact.path)  # refuses what cannot be drawn, before any work
    pixels = images if isinstance(images, np.ndarray) else load_inputs(manifest, images)
    plans: dict[Step, Plans] = {}
    if manifest.merges:
        progress.detail("reading the model")
        twin = twin_from_model(load(artifact.model_path))
        progress.detail("running it")
        masks = unit_inputs(extra_inputs(manifest), len(pixels))  # every frame counts
        model = replace(model_from_artifact(artifact, str(artifact.path)), graph=twin.model)
        with open_runner(ORT_CPU, model, progress) as runner:
            plans = chosen_plans(twin, runner, pixels, manifest.batch, {**masks, **(inputs or {})})
    return maps_from_plans(manifest, artifact.path, plans, pixels)


def chosen_plans(
    twin: Twin,
    runner: Runner,
    pixels: NDArray[Any],
    batch: BatchRange,
    further: Mapping[str, NDArray[np.float32]] | None = None,
) -> dict[Step, Plans]:
    """The plans that an instrumented graph chooses by itself for images or videos, by merge.

    Where a merge works on several sequences of one video, those of all videos follow each other.
    """
    from tome_export.onnx.twin import LEAD

    count = len(pixels)
    shapes = {
        value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim[1:]]
        for value in twin.model.graph.input
    }
    # Not led: the plans it could be led by are looked at for their shape only.
    inputs = {**(further or {}), INPUT_NAME: pixels, LEAD: np.zeros((count, 1), bool)}
    for layer in twin.layers:
        inputs |= {name: np.zeros((count, *shapes[name]), np.int32) for name in layer.given}
    size = max(batch.min, min(batch.opt, count))
    results = infer_in_batches(runner, inputs, count, size)
    return {
        layer.step: Plans(*(results[n].reshape(-1, results[n].shape[-1]) for n in layer.chosen))
        for layer in twin.layers
    }


def maps_from_plans(
    manifest: Manifest, where: Path, plans: Mapping[Step, Plans], pixels: NDArray[Any]
) -> list[MergeMap]:
    """Images, or videos as mosaics of their frames, with their tokens after every layer.

    A token of several frames of a video is one group in all of them.
    """
    grid, prefix = grid_from_manifest(manifest, where), manifest.merge.prefix
    if not _agree(plans, manifest.layers):
        raise InputError(
            f"model.onnx of {where} merges other tokens than its build.json says; rebuild the "
            "artifact"
        )
    pixels = pixels if manifest.video else pixels[:, None]
    batch, frames = pixels.shape[:2]
    beside = mosaic_side(frames)
    whole = replace(grid, rows=grid.rows * (frames // beside), cols=grid.cols * beside)
    positions = groups_by_layer(plans, manifest.layers, batch, frames)
    maps = []
    for parts, one in zip(pixels, positions, strict=True):
        images = [image_from_pixels(frame, manifest.preprocessing) for frame in parts]
        if manifest.video:
            # What lies beyond the last whole patch would part the frames' grids.
            images = [x[: grid.rows * grid.height, : grid.cols * grid.width] for x in images]
        layers = layers_from_positions(one, manifest.tokens, prefix, grid)
        maps.append(MergeMap(mosaic(np.stack(images)), whole, layers))
    return maps


def grid_from_manifest(manifest: Manifest, where: Path) -> PatchGrid:
    """Where a model's patches lie in an image; an error if that cannot be told."""
    _, height, width = manifest.preprocessing.input_size
    grid, patches = manifest.patches, manifest.layers[0].tokens_in - manifest.merge.prefix
    if (
        grid is None
        or grid.patches != patches
        or grid.rows * grid.height > height
        or grid.cols * grid.width > width
    ):
        raise InputError(
            f"the {patches} patches of {where} are not a grid over its images of {height} x "
            f"{width} pixels, so its tokens have no place in the image; only models that cut "
            "images into equal patches can be drawn"
        )
    return grid


def _agree(plans: Mapping[Step, Plans], layers: Sequence[Layer]) -> bool:
    """Whether a graph's plans lead through the token counts of the layers."""
    from tome_export.merge.plan import Across

    before = layers[0].tokens_in
    for index, layer in enumerate(layers):
        count = before * (layer.joined or 1)
        for step in (Across(index), index):
            plan = plans.get(step)
            if plan is not None and plan.keep.shape[1] + plan.src.shape[1] != count:
                return False
            count = count if plan is None else plan.keep.shape[1]
        if count != layer.tokens_out:
            return False
        before = count
    return True


def groups_by_layer(
    plans: Mapping[Step, Plans], layers: Sequence[Layer], batch: int, frames: int = 1
) -> NDArray[np.int64]:
    """Where each token of the first layer is after every layer, ``[B, depth, F, N]`` int64.

    That is the position, among the tokens that leave the layer, of the token that holds each of the
    N of a frame, ``DROPPED`` for none; clips count on. Equal numbers are one token. ``plans`` are
    of the layers that merge, every other layer is the identity; of videos ``[B S, ...]``, the clips
    of one behind those of another. ``layers`` have the token counts of one clip.
    """
    from tome_export.merge.plan import Across

    first = layers[0].tokens_in
    places = np.broadcast_to(np.arange(first), (batch, frames, first))
    result = np.empty((batch, len(layers), frames, first), np.int64)
    for index, layer in enumerate(layers):
        joined, clips = layer.joined or 1, layer.clips or 1
        if joined > 1:  # nothing is dropped where clips are joined
            part = (np.arange(frames) * clips * joined // frames % joined)[:, None]
            protected = (layer.prefix or 0) // joined
            rest = part * (layer.tokens_in - protected) + (joined - 1) * protected
            places = places + np.where(places < protected, part * protected, rest)
        for step in (Across(index), index):
            if step in plans:
                rows = places.reshape(batch * clips, -1)
                moved = np.take_along_axis(token_map(plans[step]), rows.clip(0), axis=1)
                places = np.where(rows < 0, DROPPED, moved).reshape(batch, frames, first)
        clip = (np.arange(frames) * clips // frames)[:, None]
        result[:, index] = np.where(places < 0, DROPPED, places + clip * layer.tokens_out)
    return result


def token_map(plans: Plans) -> NDArray[np.int64]:
    """Output position of every input token of one layer: ``[B, K + R]`` int64, -1 for dropped."""
    batch, kept = plans.keep.shape
    result = np.empty((batch, kept + plans.src.shape[1]), np.int64)
    np.put_along_axis(result, plans.keep.astype(np.int64), np.arange(kept)[None], axis=1)
    np.put_along_axis(result, plans.src.astype(np.int64), plans.dst.astype(np.int64), axis=1)
    return result


def layers_from_positions(
    positions: NDArray[np.int64], tokens: Sequence[int], prefix: int, grid: PatchGrid
) -> tuple[LayerGroups, ...]:
    """One image's part ``[depth, F, prefix + rows * cols]`` of what ``groups_by_layer`` gives.

    It is put on the image or the mosaic of frames; ``tokens`` leave each layer in all frames.
    """
    layers = []
    for layer, (frames, count) in enumerate(zip(positions, tokens, strict=True)):
        ids = mosaic(frames[:, prefix:].reshape(-1, grid.rows, grid.cols))
        ahead = frames[:, :prefix]
        # A dropped prefix token is not where dropped patches are.
        lost = int(np.isin(ids, ahead[ahead >= 0]).sum())
        layers.append(LayerGroups(layer, count, ids, lost))
    return tuple(layers)


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


def image_from_pixels(pixels: NDArray[Any], preprocessing: Preprocessing) -> NDArray[np.uint8]:
    """The image ``[H, W, 3]`` uint8 that became pixels, in their form, of one or three channels."""
    if preprocessing.pixel_dtype == "uint8":
        image = pixels if preprocessing.form == "uint8" else pixels.transpose(1, 2, 0)
        return np.ascontiguousarray(np.broadcast_to(image, (*image.shape[:2], 3)))
    mean = np.asarray(preprocessing.mean)[:, None, None]
    std = np.asarray(preprocessing.std)[:, None, None]
    values = np.rint((pixels * std + mean) * 255).clip(0, 255).astype(np.uint8)
    return np.ascontiguousarray(np.broadcast_to(values, (3, *values.shape[1:])).transpose(1, 2, 0))
