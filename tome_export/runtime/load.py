"""An artifact as a function of images: ``tome_export.load``."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from tome_export.artifact import Artifact, Manifest
from tome_export.data.scores import TOP_K
from tome_export.errors import ExportError, InputError, UsageError
from tome_export.progress import Progress, Silent
from tome_export.runtime.inputs import asked_inputs, check_pixels, extra_inputs, unit_inputs
from tome_export.runtime.model import check_engine, model_from_artifact, open_runner
from tome_export.runtime.registry import backend_of, require
from tome_export.runtime.runner import infer_in_batches
from tome_export.spec import INPUT_NAME, OutputKind

if TYPE_CHECKING:
    import numpy as np

    from tome_export.data.answers import Label
    from tome_export.data.images import ImageLike

    Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Predictions:
    """What a model says of some images, in their order.

    Attributes:
        manifest: What describes the model.
        outputs: Every output by name, batch first; see ``values`` for the main one.
        top: Labels per image.
    """

    manifest: Manifest
    outputs: Mapping[str, Array]
    top: int

    @property
    def kind(self) -> OutputKind:
        """Whether the model gives classes, of which there are ``labels``, features or a map."""
        return self.manifest.output_kind

    @property
    def values(self) -> Array:
        """The main output as the model gives it ``[B, ...]``, whatever it is: of classes logits."""
        return self.outputs[self.manifest.output.name]

    @cached_property
    def labels(self) -> list[list[Label]]:
        """Of each image the best classes with their scores; of a regression all its numbers.

        Raises:
            UsageError: if the model gives no classes.
            ExportError: if a logit is not finite, as where half precision overflows.
        """
        import numpy as np

        from tome_export.data.answers import labels_from_logits

        self._require("classes", "labels")
        finite = np.isfinite(self.values).all(axis=1)
        if not finite.all():
            raise ExportError(
                f"the model's {self.manifest.output.name} of image {int(finite.argmin()) + 1} are "
                "not finite; build it with --bf16 or --fp32"
            )
        return labels_from_logits(self.manifest, self.values, self.top)

    @property
    def features(self) -> Array:
        """Features ``[B, C]``, or of every token or patch; a ``UsageError`` if there are none."""
        return self._require("features", "features")

    @property
    def map(self) -> Array:
        """The dense output ``[B, ...]`` of every image; a ``UsageError`` if there is none."""
        return self._require("map", "map")

    def _require(self, kind: OutputKind, name: str) -> Array:
        if self.kind != kind:
            gives = {"classes": "labels", "features": "features", "map": "map"}[self.kind]
            raise UsageError(
                f"the model gives {self.manifest.output.name}, no {name}; read .{gives} or .values"
            )
        return self.values


class LoadedArtifact:
    """The model of an artifact, loaded on a backend; a context manager that unloads it.

    Attributes:
        artifact: The artifact, whose manifest says what the model takes and gives.
        batch: Batch sizes that the model takes here.
    """

    def __init__(self, artifact: Artifact, backend: str, progress: Progress | None = None) -> None:
        check_engine(artifact, backend)
        self.artifact = artifact
        self.batch = artifact.manifest.batch_on(backend)
        loaded = model_from_artifact(artifact, str(artifact.path))
        self._stack = ExitStack()
        runner = open_runner(backend, loaded, progress or Silent())
        self._runner = self._stack.enter_context(runner)

    def __call__(
        self, images: ImageLike | Iterable[ImageLike], *, top: int = TOP_K, **inputs: Array
    ) -> Predictions:
        """What the model says of any number of images, preprocessed as the manifest says.

        Args:
            images: One or several: paths of files, PIL images, or arrays ``[H, W, 3]`` (RGB) or
                ``[H, W]`` (grey) uint8. Files are decoded within the limits of docs/images.md. A
                model of videos takes paths of video files.
            top: Labels per image, of a classifier.
            **inputs: What the model takes besides, by name: ``[B, ...]``, or without ``B`` for all
                images alike.

        Raises:
            UsageError: if ``top`` is below 1, or an input of the model is not given.
            InputError: if there is no image, one cannot be read, or an input does not fit.
            MissingComponentError: if videos are given and PyAV is not installed.
            ExportError: if the model fails.
        """
        from tome_export.data.images import listed_inputs, load_inputs

        check_top(top)
        self._check_given(inputs)
        pixels = load_inputs(self.artifact.manifest, listed_inputs(images))
        return Predictions(self.artifact.manifest, self.run(pixels, **inputs), top)

    def run(self, pixel_values: Array, **inputs: Array) -> dict[str, Array]:
        """Run preprocessed images, in batches of at most the largest that the model takes.

        Args:
            pixel_values: ``[B, C, H, W]`` float32, preprocessed as the manifest says; of a model
                built with ``--input uint8`` the pixels themselves, ``[B, H, W, C]`` uint8. Those of
                videos have frames behind the batch.
            **inputs: Further inputs by name, ``[B, ...]``, or without ``B`` for all images alike.
                Without ``video_mask`` every frame counts.

        Returns:
            Every output by name, batch first.

        Raises:
            UsageError: if an input of the model is not given.
            InputError: if there is no image, or a name, dtype or shape does not fit the model.
            ExportError: if the model fails.
        """
        import numpy as np

        pixel_values = np.asarray(pixel_values)
        count = len(pixel_values) if pixel_values.ndim else 0
        if count == 0:
            raise InputError("pixel_values holds no image; give one or more")
        check_pixels(self.artifact.manifest, pixel_values)
        self._check_given(inputs)
        shapes = extra_inputs(self.artifact.manifest)
        given = unit_inputs({n: s for n, s in shapes.items() if n not in inputs}, count)
        for name, value in inputs.items():
            array = np.asarray(value)
            if name in shapes and array.shape == shapes[name]:
                array = np.broadcast_to(array, (count, *array.shape))
            if array.shape[:1] != (count,):
                raise InputError(
                    f"{name} has shape {[*array.shape]}; expected {count} rows, one per image"
                )
            given[name] = array
        size = min(self.batch.max, max(self.batch.min, count))
        return infer_in_batches(self._runner, {INPUT_NAME: pixel_values, **given}, count, size)

    def _check_given(self, inputs: Mapping[str, Array]) -> None:
        asked = asked_inputs(self.artifact.manifest)
        for name, shape in asked.items():
            if name not in inputs:
                raise UsageError(
                    f"the model takes {name} {[*shape]} with every image; give it by name: "
                    f"{name}=array"
                )

    def close(self) -> None:
        """Unload the model."""
        self._stack.close()

    def __enter__(self) -> LoadedArtifact:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def loaded_artifact(path: str | os.PathLike[str], backend: str) -> LoadedArtifact:
    """See ``tome_export.load``."""
    check_runs_artifacts(backend)
    return LoadedArtifact(Artifact.open(Path(path).absolute()), backend)


def check_runs_artifacts(backend: str) -> None:
    """Refuse a backend that takes models of PyTorch, or cannot run here."""
    if backend_of(backend).opens == "module":
        raise UsageError(
            f"backend is {backend!r}, which runs no artifact; choose one that runs graphs or "
            "engines, such as 'ort-cpu'"
        )
    require((backend,))


def check_top(top: int) -> None:
    """Refuse a number of labels that is none."""
    if top < 1:
        raise UsageError(f"top is {top}; expected 1 or more")
