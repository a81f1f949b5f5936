"""Inputs of a model besides its images, such as the query of the reducer ``query``.

Commands that need no answer of the model's give it random ones; the others take the user's or say
that they cannot.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tome_export.artifact import Manifest
from tome_export.errors import InputError, UsageError
from tome_export.runtime.runner import Arrays, Runner
from tome_export.video import VIDEO_MASK

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from tome_export.artifact import Artifact

SEED = 0


def unit_inputs(shapes: Mapping[str, Sequence[int]], count: int) -> dict[str, np.ndarray[Any, Any]]:
    """Random vectors ``[count, ...]`` float32 of unit length, always the same, for want of others.

    A mask of frames says that all count.
    """
    rng = np.random.default_rng(SEED)
    found: dict[str, np.ndarray[Any, Any]] = {}
    for name, shape in shapes.items():
        if name == VIDEO_MASK:
            found[name] = np.ones((count, *shape), np.float32)
            continue
        drawn = rng.standard_normal((count, *shape)).astype(np.float32)
        found[name] = drawn / np.linalg.norm(drawn, axis=-1, keepdims=True)
    return found


def check_pixels(manifest: Manifest, pixels: NDArray[Any]) -> None:
    """Refuse pixel values of another dtype, layout or size than the model takes, in one line."""
    dtype, expected = manifest.input.dtype, tuple(manifest.input.shape[1:])
    if pixels.dtype == dtype and pixels.shape[1:] == expected:
        return
    channels, last = manifest.preprocessing.input_size[0], manifest.preprocessing.form == "uint8"
    axes = "height, width, channels" if last else "channels, height, width"
    fix = "give pixels of that size, or images of any to load(path)()"
    if pixels.dtype != dtype and dtype == "uint8":
        fix = "give an image's own pixels, 0 to 255: the model scales and normalises them itself"
    elif pixels.dtype != dtype and pixels.dtype == np.uint8:
        fix = "scale and normalise them first, or build with --input uint8, whose graph does it"
    elif pixels.dtype != dtype:
        fix = f"convert them with .astype(numpy.{dtype})"
    elif pixels.shape == expected:
        fix = "put the batch in front, pixel_values[None]"
    elif pixels.ndim == len(expected) + 1 and pixels.shape[-3 if last else -1] == channels:
        # The channels stand where they are in the other layout.
        move = "-3, -1" if last else "-1, -3"
        fix = f"move the channels with numpy.moveaxis(pixel_values, {move})"
    raise InputError(
        f"pixel_values are {pixels.dtype} {[*pixels.shape]}; the model takes {dtype} "
        f"{['batch', *expected]} ({axes}): {fix}"
    )


class Fed:
    """A runner that gets ``unit_inputs`` of some shapes besides what it is given, to be timed."""

    def __init__(self, runner: Runner, shapes: Mapping[str, Sequence[int]]) -> None:
        self._runner, self._shapes = runner, shapes
        self._ready: dict[int, dict[str, np.ndarray[Any, Any]]] = {}

    def infer(self, inputs: Arrays) -> dict[str, np.ndarray[Any, Any]]:
        """Run one batch."""
        count = len(next(iter(inputs.values())))
        if count not in self._ready:
            self._ready[count] = unit_inputs(self._shapes, count)
        return self._runner.infer({**self._ready[count], **inputs})


def extra_inputs(manifest: Manifest) -> dict[str, tuple[int, ...]]:
    """Shape of each input besides the images, without the batch."""
    return {one.name: tuple(int(size) for size in one.shape[1:]) for one in manifest.inputs[1:]}


def asked_inputs(manifest: Manifest) -> dict[str, tuple[int, ...]]:
    """The ``extra_inputs`` that a user has to give: not which frames of a video count."""
    return {name: shape for name, shape in extra_inputs(manifest).items() if name != VIDEO_MASK}


def refuse_videos(artifact: Artifact, command: str) -> None:
    """Stop a command that has only images for the model."""
    if artifact.manifest.video:
        raise InputError(
            f"the model of {artifact.path} takes videos, and 'tome-export {command}' is for models "
            "of images; use check, bench, predict, inspect, report or serve"
        )


def refuse_extra_inputs(artifact: Artifact, command: str) -> None:
    """Stop a command that has only images for the model."""
    extra = asked_inputs(artifact.manifest)
    if extra:
        raise InputError(
            f"the model of {artifact.path} takes {', '.join(extra)} with every image, which "
            f"'tome-export {command}' cannot give; use check, bench, predict or inspect --query, "
            "or serve"
        )


def inputs_from_file(
    shapes: Mapping[str, tuple[int, ...]], path: Path | None, count: int
) -> dict[str, NDArray[np.float32]]:
    """The further input of a model from a .npy file, for so many images; shapes lack the batch.

    The file has ``[E]`` for all images alike, or ``[count, E]``.
    """
    wanted = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
    if path is None and shapes:
        raise UsageError(f"the model takes {wanted} with every image; give it by --query FILE.npy")
    if path is None:
        return {}
    if not shapes:
        raise UsageError(f"--query is {path}, but the model takes images only; leave it out")
    try:
        with path.open("rb") as stream:
            array = np.lib.format.read_array(stream, allow_pickle=False)
    except OSError as error:
        raise InputError(f"query file {path} cannot be read ({error.strerror or error})") from None
    except ValueError:
        raise InputError(
            f"query file {path} holds no array of numbers; write one with numpy.save"
        ) from None
    ((name, shape),) = shapes.items()
    fits = array.shape in (shape, (count, *shape)) and array.dtype.kind in "fiu"
    if not fits or not np.isfinite(array).all():
        raise InputError(
            f"query file {path} holds {array.dtype} {list(array.shape)}; expected finite numbers "
            f"of shape {list(shape)}, or {[count, *shape]} for {count} images"
        )
    return {name: np.broadcast_to(array.astype(np.float32), (count, *shape)).copy()}
