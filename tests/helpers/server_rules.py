"""What Triton Inference Server refuses or loads and gets wrong, for the configs that we write.

A server without a GPU cannot load those of TensorRT engines; these rules are its stand-in.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from tome_export.serve.config import MOST_VERSION, ModelFolder, is_version

if TYPE_CHECKING:
    from tritonclient.grpc.model_config_pb2 import ModelConfig

FILES = {"tensorrt_plan": "model.plan", "onnxruntime_onnx": "model.onnx"}
"""What a version folder of each platform must hold."""


def problems(
    config: ModelConfig,
    folder: ModelFolder,
    models: Collection[str] = (),
) -> Iterator[str]:
    """What is wrong with a config, each with what is expected."""
    if config.name != folder.name:
        yield f"has the name {config.name!r}; expected that of its folder"
    if config.max_batch_size < 0:
        yield f"has max_batch_size {config.max_batch_size}; expected 0 or more"
    yield from _tensors(config.input, "input")
    yield from _tensors(config.output, "output")
    yield from _batching(config)
    yield from _warmup(config)
    yield from _instances(config)
    yield from _files(config, folder)
    if config.platform == "ensemble":
        yield from _ensemble(config, {*models})


def _tensors(tensors: Sequence[Any], kind: str) -> Iterator[str]:
    if not tensors:
        yield f"has no {kind}; expected one or more"
    for name, count in Counter(tensor.name for tensor in tensors).items():
        if not name:
            yield f"has an {kind} without a name"
        if count > 1:
            yield f"has the {kind} {name} {count} times; expected each once"
    for tensor in tensors:
        if not tensor.data_type:
            yield f"has no data type for {kind} {tensor.name}"
        if not tensor.dims or any(size == 0 or size < -1 for size in tensor.dims):
            yield f"has dims {list(tensor.dims)} for {kind} {tensor.name}; expected sizes, or -1"


def _batching(config: ModelConfig) -> Iterator[str]:
    most = config.max_batch_size
    for size in config.dynamic_batching.preferred_batch_size:
        if not 1 <= size <= most:
            yield f"has preferred_batch_size {size}; expected 1 to max_batch_size, {most}"
    dims = {tensor.name: list(tensor.dims) for tensor in config.input}
    for spec in config.optimization.cuda.graph_spec:
        for name, shape in spec.input.items():
            if list(shape.dim) != dims.get(name):
                yield f"has a CUDA graph with {name} {list(shape.dim)}; expected {dims.get(name)}"


def _warmup(config: ModelConfig) -> Iterator[str]:
    tensors = {tensor.name: tensor for tensor in config.input}
    for sample in config.model_warmup:
        most = config.max_batch_size or 1
        if not 1 <= sample.batch_size <= most:
            yield f"has a warmup of batch {sample.batch_size}; expected 1 to {most}"
        if {*sample.inputs} != {*tensors}:
            yield (
                f"has a warmup with the inputs {sorted(sample.inputs)}; expected {sorted(tensors)}"
            )
        for name in {*sample.inputs} & {*tensors}:
            given, tensor = sample.inputs[name], tensors[name]
            if given.data_type != tensor.data_type:
                yield f"has a warmup whose {name} is of another data type than the input"
            sizes = list(given.dims)
            fits = len(sizes) == len(tensor.dims) and all(
                size > 0 and expected in (-1, size)
                for size, expected in zip(sizes, tensor.dims, strict=True)
            )
            if not fits:
                yield f"has a warmup with {name} {sizes}; expected {list(tensor.dims)}"
            if given.WhichOneof("input_data_type") is None:
                yield f"has a warmup without data for {name}"


def _instances(config: ModelConfig) -> Iterator[str]:
    from tritonclient.grpc.model_config_pb2 import ModelInstanceGroup

    for group in config.instance_group:
        if group.count < 1:
            yield f"has an instance group of {group.count}; expected 1 or more"
        if config.platform == "tensorrt_plan" and group.kind == ModelInstanceGroup.KIND_CPU:
            yield "puts a TensorRT engine on the CPU; expected KIND_GPU"


def _files(config: ModelConfig, folder: ModelFolder) -> Iterator[str]:
    for tensor in config.output:
        name = tensor.label_filename
        if name and name not in folder.files:
            yield f"names the labels {name}, which are not there"
    versions: dict[str, set[str]] = {}
    for path in folder.files:
        first, *rest = PurePosixPath(path).parts
        if rest and first != "configs":
            versions.setdefault(first, set()).add(rest[0])
    for version, names in versions.items():
        if not is_version(version):
            yield (
                f"comes with the version folder {version!r}; expected a number, 1 to {MOST_VERSION}"
            )
        expected = FILES.get(config.platform)
        if expected and expected not in names:
            yield f"is for {config.platform}, and version {version} has no {expected}"
    if not versions:
        yield "comes without a version folder"


def _ensemble(config: ModelConfig, models: set[str]) -> Iterator[str]:
    known = {tensor.name for tensor in config.input}
    for step in config.ensemble_scheduling.step:
        if step.model_name not in models:
            yield f"has a step {step.model_name}, which is not a model of the repository"
        for name in sorted({*step.input_map.values()} - known):
            yield f"has a step {step.model_name} that takes {name}, which nothing before it gives"
        known |= {*step.output_map.values()}
    for name in sorted({tensor.name for tensor in config.output} - known):
        yield f"has the output {name}, which no step gives"
