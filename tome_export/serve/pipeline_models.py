"""The models around a model of pixels: decoding of images or videos, labels, the ensemble."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from tome_export.data import decoder, pixels
from tome_export.errors import InputError
from tome_export.serve.client import IMAGE, PIPELINE, VIDEO
from tome_export.serve.config import (
    KEPT_VERSIONS,
    ModelFolder,
    ServeOptions,
    add_tensor,
    python_config,
    python_folder,
)
from tome_export.serve.source import sizes
from tome_export.spec import INPUT_NAME, VIDEO_MASK, BatchRange
from tome_export.video import frames

if TYPE_CHECKING:
    from tome_export.artifact import Artifact

TOP_K = 5
"""Labels per image, where there are as many classes."""


def pipeline_folders(
    artifact: Artifact, name: str, options: ServeOptions, batch: BatchRange | None = None
) -> list[ModelFolder]:
    """The models that make one of encoded images of a served model of pixels.

    Args:
        artifact: What is served.
        name: Name of its model on the server.
        options: Version and instances.
        batch: Batch sizes of the file that is served; None for the artifact's own.

    Returns:
        ``<name>_preprocess``, ``<name>_postprocess`` (classifiers only) and the ensemble
        ``<name>_pipeline``.

    Raises:
        InputError: if images cannot be given to the model.
    """
    most = (batch or artifact.manifest.batch).max
    folders = [_preprocess(artifact, name, options, most)]
    if artifact.manifest.output.name == "logits":
        folders.append(_postprocess(artifact, name, options, most))
    return [*folders, _pipeline(artifact, folders, name, options)]


def _preprocess(
    artifact: Artifact, name: str, options: ServeOptions, max_batch: int
) -> ModelFolder:
    video, recipe = artifact.manifest.video, artifact.manifest.preprocessing
    if recipe.input_size[0] not in (1, 3):
        raise InputError(
            f"the model takes {recipe.input_size[0]} channels; images can be given to models of 1 "
            "or 3, serve it without preprocessing"
        )
    config = python_config(f"{name}_preprocess", max_batch, options)
    # Its answers come one by one, and of requests that are taken together one whose bytes are not
    # as long as they say fails all, before this model sees any.
    config.ClearField("dynamic_batching")
    limits = {"max_pixels": pixels.MAX_PIXELS, "formats": pixels.SERVED_FORMATS}
    settings = {**asdict(recipe), **limits}
    add_tensor(config.input, VIDEO if video else IMAGE, "bytes", [1])
    shape = sizes(artifact.manifest.input)
    add_tensor(config.output, INPUT_NAME, "float32", shape)
    modules = (pixels, decoder, frames) if video else (pixels, decoder)
    files = [Path(module.__file__ or "") for module in modules]
    beside = {f"{options.folder}/{path.name}": path for path in files}
    if video:
        mask = any(tensor.name == VIDEO_MASK for tensor in artifact.manifest.inputs)
        if mask:
            add_tensor(config.output, VIDEO_MASK, "float32", shape[:1])
        settings |= {"frames": shape[0], "mask": mask}
    folder = python_folder(config, "preprocess", "preprocessing.json", settings, options)
    return replace(folder, files={**folder.files, **beside})


def _postprocess(
    artifact: Artifact, name: str, options: ServeOptions, max_batch: int
) -> ModelFolder:
    shape = sizes(artifact.manifest.output)
    labels = artifact.manifest.labels or tuple(map(str, range(shape[-1])))
    if shape != (len(labels),):
        raise InputError(
            f"{artifact.path} has logits {list(shape)} and {len(labels)} labels; expected one "
            "logit per label, serve it without preprocessing or rebuild the artifact"
        )
    # Of a regression every number is told, and none is better than another.
    k = len(labels) if artifact.manifest.activation == "none" else min(TOP_K, len(labels))
    config = python_config(f"{name}_postprocess", max_batch, options)
    add_tensor(config.input, "logits", "float32", shape)
    for tensor, dtype in (("label", "bytes"), ("score", "float32"), ("index", "int32")):
        add_tensor(config.output, tensor, dtype, [k])
    settings = {"k": k, "labels": labels, "activation": artifact.manifest.activation}
    return python_folder(config, "postprocess", "postprocessing.json", settings, options)


def _pipeline(
    artifact: Artifact, folders: Sequence[ModelFolder], name: str, options: ServeOptions
) -> ModelFolder:
    """The ensemble. It has no queue of its own: that of the model limits it."""
    from tritonclient.grpc.model_config_pb2 import ModelConfig

    outputs, (_, *further) = artifact.manifest.outputs, artifact.manifest.inputs
    first, *last = [folder.config for folder in folders]
    config = ModelConfig(name=f"{name}{PIPELINE}", platform="ensemble")
    config.max_batch_size = first.max_batch_size
    config.version_policy.latest.num_versions = KEPT_VERSIONS
    config.input.add().CopyFrom(first.input[0])
    made = [tensor.name for tensor in first.output]
    for tensor in further:
        if tensor.name not in made:
            add_tensor(config.input, tensor.name, tensor.dtype, sizes(tensor))
    taken, given = [INPUT_NAME, *(t.name for t in further)], [t.name for t in outputs]
    steps = [(first.name, [first.input[0].name], made), (name, taken, given)]
    if last:
        config.output.extend(last[0].output)
        steps.append((last[0].name, given[:1], [tensor.name for tensor in last[0].output]))
    for tensor in outputs[1:] if last else outputs:
        add_tensor(config.output, tensor.name, tensor.dtype, sizes(tensor))
    for model, sources, results in steps:
        config.ensemble_scheduling.step.add(
            model_name=model,
            model_version=-1,  # the latest there is, whichever version of the ensemble is asked
            input_map={tensor: tensor for tensor in sources},
            output_map={tensor: tensor for tensor in results},
        )
    # The server wants a version folder, and a copy of a repository may leave out empty ones.
    note = b"An ensemble has no files: config.pbtxt is all of it.\n"
    return ModelFolder(config.name, config, {f"{options.folder}/README": note})
