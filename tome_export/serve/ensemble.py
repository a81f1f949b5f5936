"""The models around a model of pixels: decoding of images or videos, labels, the ensemble."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tome_export.data import decoder, headers, pixels, scores
from tome_export.errors import InputError
from tome_export.serve.config import (
    ModelFolder,
    ServeOptions,
    config_from_values,
    interface_values,
    python_config,
    python_folder,
    tensor_values,
)
from tome_export.serve.dali import dali_folder
from tome_export.serve.model_file import image_shape
from tome_export.serve.names import IMAGE, PIPELINE, POSTPROCESS, PREPROCESS, VIDEO
from tome_export.spec import INPUT_NAME
from tome_export.video import VIDEO_MASK, frames

if TYPE_CHECKING:
    from tome_export.artifact import Artifact
    from tome_export.artifact.manifest import Tensor


def pipeline_folders(
    artifact: Artifact,
    name: str,
    options: ServeOptions,
    max_batch: int | None = None,
    further_outputs: Sequence[tuple[str, str]] = (),
) -> list[ModelFolder]:
    """The models that make one of encoded images of a served model of pixels.

    They are ``<name>_preprocess``, ``<name>_postprocess`` (classifiers only), and the ensemble
    ``<name>_pipeline``.
    """
    most = max_batch or artifact.manifest.batch.max
    folders = [_preprocess(artifact, name, options, most)]
    if artifact.manifest.output_kind == "classes":
        folders.append(_postprocess(artifact, name, options, most))
    return [*folders, _ensemble(artifact, folders, name, options, further_outputs)]


def _image_values(tensors: Iterable[Tensor]) -> list[dict[str, Any]]:
    return [tensor_values(one.name, one.dtype, image_shape(one)) for one in tensors]


def _preprocess(
    artifact: Artifact, name: str, options: ServeOptions, max_batch: int
) -> ModelFolder:
    manifest = artifact.manifest
    video, recipe = manifest.video, manifest.preprocessing
    if recipe.input_size[0] not in (1, 3):
        raise InputError(
            f"the model takes {recipe.input_size[0]} channels; images can be given to models of 1 "
            "or 3, serve it without preprocessing"
        )
    shape = image_shape(manifest.input)
    outputs = [tensor_values(INPUT_NAME, manifest.input.dtype, shape)]
    settings = {
        **asdict(recipe),
        "max_pixels": pixels.MAX_PIXELS,
        "formats": pixels.SERVED_FORMATS,
        "scaled_decoding": options.scaled_decoding,
        "decoders": options.decoders,
    }
    if options.dali:
        return dali_folder(manifest, f"{name}{PREPROCESS}", options, max_batch, outputs)
    modules = [Path(pixels.__file__), Path(decoder.__file__), Path(headers.__file__)]
    if video:
        modules.append(Path(frames.__file__))
        mask = any(tensor.name == VIDEO_MASK for tensor in manifest.inputs)
        if mask:
            outputs.append(tensor_values(VIDEO_MASK, "float32", shape[:1]))
        settings |= {"frames": shape[0], "mask": mask}
    config = python_config(
        f"{name}{PREPROCESS}",
        max_batch,
        count=options.instances,
        input=[tensor_values(VIDEO if video else IMAGE, "bytes", [1])],
        output=outputs,
        # Its answers come one by one, and of requests that are taken together one whose bytes are
        # not as long as they say fails all, before this model sees any.
        dynamic_batching=None,
    )
    return python_folder(config, "preprocess", "preprocessing.json", settings, options, modules)


def _postprocess(
    artifact: Artifact, name: str, options: ServeOptions, max_batch: int
) -> ModelFolder:
    manifest = artifact.manifest
    shape = image_shape(manifest.output)
    labels = manifest.labels or tuple(map(str, range(shape[-1])))
    if shape != (len(labels),):
        raise InputError(
            f"{artifact.path} has logits {list(shape)} and {len(labels)} labels; expected one "
            "logit per label, serve it without preprocessing or rebuild the artifact"
        )
    k = scores.count_of(scores.TOP_K, len(labels), manifest.activation or "")
    outputs = (("label", "bytes"), ("score", "float32"), ("index", "int32"))
    config = python_config(
        f"{name}{POSTPROCESS}",
        max_batch,
        count=options.instances,
        input=[tensor_values("logits", "float32", shape)],
        output=[tensor_values(tensor, dtype, [k]) for tensor, dtype in outputs],
    )
    settings = {"k": k, "labels": labels, "activation": manifest.activation}
    modules = [Path(scores.__file__)]
    return python_folder(config, "postprocess", "postprocessing.json", settings, options, modules)


def _ensemble(
    artifact: Artifact,
    folders: Sequence[ModelFolder],
    name: str,
    options: ServeOptions,
    further_outputs: Sequence[tuple[str, str]],
) -> ModelFolder:
    """What hands images from model to model. It has no queue: that of the model limits it."""
    outputs, (_, *further) = artifact.manifest.outputs, artifact.manifest.inputs
    decoding, *labelling = [folder.config for folder in folders]
    decoded = [tensor.name for tensor in decoding.output]
    given = [*(tensor.name for tensor in outputs), *(tensor for tensor, _ in further_outputs)]
    steps = [
        (decoding.name, [decoding.input[0].name], decoded),
        (name, [INPUT_NAME, *(tensor.name for tensor in further)], given),
    ]
    results = []
    if labelling:
        results += interface_values(labelling[0].output)
        steps.append((labelling[0].name, given[:1], [tensor["name"] for tensor in results]))
    results += _image_values(outputs[1:] if labelling else outputs)
    results += [tensor_values(tensor, dtype, [1]) for tensor, dtype in further_outputs]
    config = config_from_values(
        name=f"{name}{PIPELINE}",
        platform="ensemble",
        max_batch_size=decoding.max_batch_size,
        input=[
            *interface_values(decoding.input),
            *_image_values(one for one in further if one.name not in decoded),
        ],
        output=results,
        ensemble_scheduling={
            "step": [
                {
                    "model_name": model,
                    "model_version": -1,  # the latest, whichever of the ensemble's is asked
                    "input_map": {tensor: tensor for tensor in taken},
                    "output_map": {tensor: tensor for tensor in made},
                }
                for model, taken, made in steps
            ]
        },
    )
    # The server wants a version folder, and a copy of a repository may leave out empty ones.
    note = b"An ensemble has no files: config.pbtxt is all of it.\n"
    return ModelFolder(config.name, config, {f"{options.folder}/README": note})
