"""The models around a model: image decoding, labels, the ensemble of all, and the router."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from tome_export.errors import InputError
from tome_export.serve.config import DATA_TYPES, KEPT_VERSIONS
from tome_export.serve.source import inputs_of, outputs_of
from tome_export.serve.spec import ModelFolder, ServeOptions
from tome_export.spec import INPUT_NAME, VIDEO_MASK, BatchRange, Interpolation
from tome_export.video import frames as frames_module

if TYPE_CHECKING:
    from tritonclient.grpc.model_config_pb2 import ModelConfig

    from tome_export.artifact import Artifact

TOP_K = 5
"""Labels per image, where there are as many classes."""

MAX_PIXELS = 64_000_000
"""Larger images are refused from their header: decoding takes 3 bytes for each of these pixels, 15
where there is transparency, and up to four images are decoded at once."""

IMAGE = "image"
"""The input of a model that takes encoded images: BYTES, a JPEG or PNG file."""

VIDEO = "video"
"""The input of a model that takes video files: BYTES."""

ROUTER_INSTANCES = 4
"""An instance of a router answers the requests that it has taken together, and takes no other until
the slowest of them is answered."""

ROUTES = "routes"
"""Parameter of a router's config: names of the models behind it, with commas, for clients."""

_MODELS = Path(__file__).parent / "python_models"


@dataclass(frozen=True)
class Route:
    """A model that a router may choose.

    Attributes:
        model: Its name on the server.
        r: Tokens merged per layer, as asked for; the mean if layers differ.
        ms: Measured latency of one image; None if it was not measured.
        config: The model's own config.
    """

    model: str
    r: float
    ms: float | None
    config: ModelConfig


def pipeline_folders(
    artifact: Artifact, name: str, options: ServeOptions, batch: BatchRange | None = None
) -> list[ModelFolder]:
    """The models that make one of encoded images of a served model of pixels.

    Args:
        artifact: What is served.
        name: Name of its model on the server.
        options: Version and instances; None as version stands for 1.
        batch: Batch sizes of the file that is served; None for the artifact's own.

    Returns:
        ``<name>_preprocess``, ``<name>_postprocess`` (classifiers only) and the ensemble
        ``<name>_pipeline``.

    Raises:
        InputError: if images cannot be given to the model.
    """
    most = (batch or BatchRange.parse(artifact.manifest["batch"])).max
    folders = [_preprocess(artifact, name, options, most)]
    if artifact.manifest["output"]["name"] == "logits":
        folders.append(_postprocess(artifact, name, options, most))
    return [*folders, _pipeline(artifact, folders, name, options)]


def _preprocess(
    artifact: Artifact, name: str, options: ServeOptions, max_batch: int
) -> ModelFolder:
    settings = artifact.manifest["preprocessing"]
    channels = settings["input_size"][0]
    if channels not in (1, 3):
        raise InputError(
            f"the model takes {channels} channels; images can be given to models of 1 or 3, "
            "serve it without preprocessing"
        )
    if settings["interpolation"] not in get_args(Interpolation):
        raise InputError(
            f"{artifact.path} has interpolation {settings['interpolation']!r}; expected one of "
            f"{', '.join(get_args(Interpolation))}, rebuild the artifact"
        )
    config = python_config(f"{name}_preprocess", max_batch, options)
    settings = {**settings, "max_pixels": MAX_PIXELS}
    video = artifact.manifest.get("video")
    given = VIDEO if video else IMAGE
    add_tensor(config.input, given, "TYPE_STRING", [1])
    frames = [video["frames"]] if video else []
    add_tensor(config.output, INPUT_NAME, "TYPE_FP32", [*frames, *settings["input_size"]])
    if not video:
        return python_folder(config, "preprocess", "preprocessing.json", settings, options)
    mask = VIDEO_MASK in {tensor["name"] for tensor in inputs_of(artifact.manifest)}
    if mask:
        add_tensor(config.output, VIDEO_MASK, "TYPE_FP32", frames)
    settings |= {"frames": video["frames"], "mask": mask}
    folder = python_folder(config, "preprocess_video", "preprocessing.json", settings, options)
    version = options.version or 1
    beside = {"preprocess": _MODELS / "preprocess.py", "frames": Path(frames_module.__file__)}
    files = {f"{version}/{name}.py": path for name, path in beside.items()}
    return replace(folder, files={**folder.files, **files})


def _postprocess(
    artifact: Artifact, name: str, options: ServeOptions, max_batch: int
) -> ModelFolder:
    shape = _output_shape(artifact)
    classes = shape[-1]
    labels = artifact.manifest.get("labels") or [str(index) for index in range(classes)]
    if len(shape) != 1 or len(labels) != classes:
        raise InputError(
            f"{artifact.path} has logits {list(shape)} and {len(labels)} labels; expected one "
            "logit per label, serve it without preprocessing or rebuild the artifact"
        )
    k = min(TOP_K, classes)
    config = python_config(f"{name}_postprocess", max_batch, options)
    add_tensor(config.input, "logits", "TYPE_FP32", [classes])
    for tensor, kind in (("label", "STRING"), ("score", "FP32"), ("index", "INT32")):
        add_tensor(config.output, tensor, f"TYPE_{kind}", [k])
    settings = {"k": k, "labels": labels}
    return python_folder(config, "postprocess", "postprocessing.json", settings, options)


def _pipeline(
    artifact: Artifact, folders: Sequence[ModelFolder], name: str, options: ServeOptions
) -> ModelFolder:
    """The ensemble. It has no queue of its own: that of the model limits it."""
    from tritonclient.grpc.model_config_pb2 import ModelConfig

    outputs = outputs_of(artifact.manifest)
    names = [output["name"] for output in outputs]
    first, *last = [folder.config for folder in folders]
    config = ModelConfig(name=f"{name}_pipeline", platform="ensemble")
    config.max_batch_size = first.max_batch_size
    config.version_policy.latest.num_versions = KEPT_VERSIONS
    config.input.add().CopyFrom(first.input[0])
    further = inputs_of(artifact.manifest)[1:]
    made = [tensor.name for tensor in first.output]
    for more in (tensor for tensor in further if tensor["name"] not in made):
        kind = DATA_TYPES[more["dtype"]]
        add_tensor(config.input, more["name"], kind, more["shape"][1:])
    taken = [INPUT_NAME, *(more["name"] for more in further)]
    steps = [(first.name, [first.input[0].name], made), (name, taken, names)]
    if last:
        config.output.extend(last[0].output)
        steps.append((last[0].name, names[:1], [tensor.name for tensor in last[0].output]))
    else:
        add_tensor(config.output, names[0], "TYPE_FP32", _output_shape(artifact))
    for more in outputs[1:]:
        kind = DATA_TYPES[more["dtype"]]
        dims = more["shape"][1:] or [1]  # a number per image, as in ``config``
        add_tensor(config.output, more["name"], kind, dims)
    for model, inputs, outputs in steps:
        config.ensemble_scheduling.step.add(
            model_name=model,
            model_version=-1,  # the latest there is, whichever version of the ensemble is asked
            input_map={tensor: tensor for tensor in inputs},
            output_map={tensor: tensor for tensor in outputs},
        )
    # The server wants a version folder, and a copy of a repository may leave out empty ones.
    return ModelFolder(config.name, config, {f"{options.version or 1}/README": _ENSEMBLE_NOTE})


_ENSEMBLE_NOTE = b"An ensemble has no files: config.pbtxt is all of it.\n"


def router_folder(
    name: str, routes: Sequence[Route], options: ServeOptions | None = None
) -> ModelFolder:
    """A model that hands each request to one of several, by its parameter ``r`` or ``max_ms``.

    The routes may be models of pixels, or the pipelines of such models.

    Args:
        name: Of the router on the server.
        routes: At least one, in any order.
        options: Version and instances of the router.

    Raises:
        InputError: if two routes have the same model or r, or inputs or outputs differ.
    """
    options = options or ServeOptions()
    ordered = sorted(routes, key=lambda route: route.r)
    _check_routes(ordered)
    like = ordered[0].config
    config = python_config(name, min(route.config.max_batch_size for route in ordered), options)
    config.instance_group[0].count = max(ROUTER_INSTANCES, options.instances)
    config.parameters[ROUTES].string_value = ",".join(route.model for route in ordered)
    take_interface(config, like)
    listed = [{"model": route.model, "r": route.r, "ms": route.ms} for route in ordered]
    return python_folder(config, "router", "routes.json", {"routes": listed}, options)


def route_of(artifact: Artifact, model: str, config: ModelConfig, ms: float | None = None) -> Route:
    """The route to an artifact that is served under a name."""
    merge = artifact.manifest["merge"]
    asked = re.match(r"r=(\d+)", merge["schedule"])
    layers = merge["r"]
    mean = sum(layers) / len(layers) if layers else 0
    return Route(model, int(asked[1]) if asked else mean, ms, config)


def routes_from_json(
    text: str,
    config_of: Callable[[str], ModelConfig],
    models: Collection[str],
    where: str = "routes.json",
) -> list[Route]:
    """Read a router's ``routes.json``.

    Args:
        text: Content of the file.
        config_of: Gives the config of a model by its name.
        models: Those there are; routes to others are left out.
        where: What a message calls the file.

    Raises:
        InputError: if the text is not what ``router_folder`` writes.
    """
    try:
        listed = json.loads(text)["routes"]
        plain = [(route["model"], route["r"], route["ms"]) for route in listed]
    except (ValueError, KeyError, TypeError):
        plain = [(None, None, None)]
    number = int | float
    if not all(
        isinstance(model, str) and isinstance(r, number) and (ms is None or isinstance(ms, number))
        for model, r, ms in plain
    ):
        raise InputError(
            f"{where} is not a router's list of models with r and ms; remove the router's folder "
            "and serve its models again"
        )
    return [Route(model, r, ms, config_of(model)) for model, r, ms in plain if model in models]


def _check_routes(routes: Sequence[Route]) -> None:
    if not routes:
        raise InputError("a router is given no models; expected 1 or more")
    first = routes[0]
    for before, route in itertools.pairwise(routes):
        if before.model != route.model and before.r == route.r:
            raise InputError(
                f"models {before.model} and {route.model} both merge r = {route.r:g}; a router "
                "needs one model for each r, give another --name"
            )
        if interface_of(route.config) != interface_of(first.config):
            raise InputError(
                f"models {first.model} and {route.model} have different inputs or outputs; "
                "a router needs artifacts of one model, give another --name"
            )
    names = [route.model for route in routes]
    for model in names:
        if names.count(model) > 1:
            raise InputError(f"model {model} is given twice to a router; give it once")


def of_one_shape(configs: Sequence[ModelConfig]) -> bool:
    """Whether models that are alike in all else also have outputs of one shape.

    The tokens that a vision tower gives are fewer for a larger r, and then no model can stand in
    for another.
    """

    def shape(config: ModelConfig) -> list[tuple[int, ...]]:
        return [tuple(tensor.dims) for tensor in config.output]

    def rest(config: ModelConfig) -> list[tuple[object, ...]]:
        inputs = [(t.name, t.data_type, *t.dims) for t in config.input]
        return [*inputs, *((t.name, t.data_type, len(t.dims)) for t in config.output)]

    first, *others = configs
    return not any(rest(one) == rest(first) and shape(one) != shape(first) for one in others)


def interface_of(config: ModelConfig) -> list[tuple[str, int, tuple[int, ...]]]:
    """Name, type and dims of every input and output."""
    tensors = (*config.input, *config.output)
    return [(tensor.name, tensor.data_type, tuple(tensor.dims)) for tensor in tensors]


def take_interface(config: ModelConfig, like: ModelConfig) -> None:
    """Give a config the inputs and outputs of another."""
    for mine, theirs in ((config.input, like.input), (config.output, like.output)):
        for tensor in theirs:
            mine.add(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)


def _output_shape(artifact: Artifact) -> list[int]:
    """Shape of the output for one image."""
    shape = artifact.manifest["output"].get("shape")
    if isinstance(shape, list) and len(shape) > 1 and all(type(n) is int for n in shape[1:]):
        return shape[1:]
    raise InputError(
        f"{artifact.path} has output shape {shape}; expected the batch, then whole numbers, "
        "rebuild the artifact"
    )


def python_config(name: str, max_batch: int, options: ServeOptions) -> ModelConfig:
    """A model of the python backend on the CPU, batched without waiting.

    Its queue has no limits, whatever the options say: the model of pixels is what is slow, and a
    limit would want more processes (see ``LEAST_WITH_LIMITS``).
    """
    from tritonclient.grpc.model_config_pb2 import ModelConfig, ModelInstanceGroup

    config = ModelConfig(name=name, backend="python", max_batch_size=max_batch)
    config.version_policy.latest.num_versions = KEPT_VERSIONS
    config.instance_group.add(kind=ModelInstanceGroup.KIND_CPU, count=options.instances)
    config.dynamic_batching.SetInParent()
    return config


def add_tensor(tensors: Any, name: str, data_type: str, dims: Sequence[int]) -> None:
    """Add a tensor of a type such as ``TYPE_FP32`` to a config's inputs or outputs."""
    from tritonclient.grpc.model_config_pb2 import DataType

    tensors.add(name=name, data_type=DataType.Value(data_type), dims=dims)


def python_folder(
    config: ModelConfig, source: str, file: str, settings: dict[str, Any], options: ServeOptions
) -> ModelFolder:
    """A model of ``python_models`` with its settings beside it."""
    text = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
    version = options.version or 1
    files: dict[str, Path | bytes] = {
        f"{version}/model.py": _MODELS / f"{source}.py",
        f"{version}/{file}": text.encode(),
    }
    return ModelFolder(config.name, config, files)
