"""The server's model config, made from what is served.

Source of the fields: model_config.proto of Triton Inference Server, and the documentation of its
TensorRT and ONNX Runtime backends.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tome_export.engine import TensorInfo
from tome_export.errors import InputError, MissingComponentError, UsageError
from tome_export.serve.source import Source
from tome_export.serve.spec import ModelFolder, ServeOptions
from tome_export.spec import BatchRange

if TYPE_CHECKING:
    from tritonclient.grpc.model_config_pb2 import ModelConfig

HEADER = (
    "# Written by tome-export serve, which replaces this file when it is run again with other\n"
    "# options: to keep changes made by hand, remove these lines.\n"
)
"""First lines of every config: what tells our files from other people's."""

CPU = "cpu"
"""Name of the config for servers without a GPU: ``--model-config-name=cpu``."""

DATA_TYPES = {
    "float32": "TYPE_FP32",
    "float16": "TYPE_FP16",
    "bfloat16": "TYPE_BF16",
    "int64": "TYPE_INT64",
    "int32": "TYPE_INT32",
}

LEAST_WITH_LIMITS = 2
"""Instances that a limited queue takes. With one, the batcher of tritonserver 2.51 leaves a few
requests in a thousand waiting for 500 ms although the instance is free; without limits, or with
two instances, none of thousands did."""

CUDA_OPTIONS = {"use_tf32": "0"}
"""For ONNX Runtime's CUDA provider, which by default rounds the factors of fp32 products to 10 bits
of mantissa: tokens whose scores differ by less would merge otherwise than in the reference. The
backend hands such keys on since release 24.06."""

LABELS = "labels.txt"

KEPT_VERSIONS = 2
"""Versions that are served at once, the latest ones. With one, a client that names the version it
was tested with fails as soon as the next appears; with two it has until the one after that, and
going back is removing a folder."""

VERSION_COMPATIBLE = "version_compatible"
"""File beside an engine that brings a runtime of its own, which a server runs only if it is told to
(see ``launch``): what is true of one version is not of another, and they share one config."""


def check_packages() -> None:
    """Whether the server's schema is installed.

    Raises:
        MissingComponentError: if it is not.
    """
    try:
        import tritonclient.grpc.model_config_pb2  # noqa: F401
    except ImportError as error:
        raise MissingComponentError(
            f"{error.name} is not installed, which serving needs; pip install 'tome-export[serve]'"
        ) from error


def folder_from_source(
    source: Source, name: str, options: ServeOptions, *, behind: bool = False
) -> ModelFolder:
    """The model of a repository that serves a file as it is.

    One of fixed batch takes exactly as many rows: see ``fixed.folders_from_source``.

    Args:
        source: What is served.
        name: Of the model on the server.
        options: How; None as version stands for 1.
        behind: Whether a batching model asks it: that one has the queue and the labels.

    Raises:
        UsageError: if a CUDA graph is asked for that the server cannot record: of an ONNX model,
            or of a model of fixed batch.
    """
    version = options.version or 1
    files = {f"{version}/{file}": path for file, path in source.files.items()}
    more = {} if behind else label_files(source)
    if source.version_compatible:
        more[f"{version}/{VERSION_COMPATIBLE}"] = _COMPATIBLE_NOTE
    if source.platform == "onnxruntime_onnx":
        if options.cuda_graph_batches is not None:
            raise UsageError(
                "CUDA graph batches are given and the ONNX model is served; leave them out, or "
                "serve a TensorRT engine with --format engine"
            )
        cpu = config_text(cpu_config(source, name, options, behind=behind))
        more[f"configs/{CPU}.pbtxt"] = cpu.encode()
    elif options.cuda_graph_batches is not None and source.batch.is_static:
        recorded = (
            "that batch is recorded"
            if source.cuda_graphs
            else "with plugins of a range it is not recorded"
        )
        raise UsageError(
            f"CUDA graph batches are given for a model of fixed batch {source.batch.max}; leave "
            f"them out, {recorded}"
        )
    config = model_config(source, name, options, behind=behind)
    return ModelFolder(name, config, {**files, **more})


_COMPATIBLE_NOTE = b"""\
The engine beside this file is version-compatible: it brings a runtime of its own. Servers load it
with --backend-config=tensorrt,version-compatible=true only.
"""


def label_files(source: Source) -> dict[str, bytes]:
    """The file of class names, one a line; none if there are none."""
    if not source.labels:
        return {}
    return {LABELS: "".join(f"{label}\n" for label in source.labels).encode()}


def model_config(
    source: Source, name: str, options: ServeOptions, *, behind: bool = False
) -> ModelConfig:
    """The config for servers with a GPU."""
    from tritonclient.grpc.model_config_pb2 import ModelInstanceGroup

    config = _common(source, name, options, behind=behind)
    count = _instances(options, behind=behind)
    config.instance_group.add(kind=ModelInstanceGroup.KIND_GPU, count=count)
    if source.platform == "tensorrt_plan":
        if source.cuda_graphs:
            _add_cuda_graphs(config, source.batch, options)
        return config
    if not source.scatters:
        _add_tensorrt_accelerator(config, source)
    # TensorRT's parser refuses scatter-add: the accelerator would cut the graph into pieces, and
    # ONNX Runtime's own CUDA kernels run such a model whole.
    cuda = config.optimization.execution_accelerators.gpu_execution_accelerator.add(name="cuda")
    for key, value in CUDA_OPTIONS.items():
        cuda.parameters[key] = value
    return config


def cpu_config(
    source: Source, name: str, options: ServeOptions, *, behind: bool = False
) -> ModelConfig:
    """The config of an ONNX model for servers without a GPU."""
    from tritonclient.grpc.model_config_pb2 import ModelInstanceGroup

    config = _common(source, name, options, behind=behind)
    count = _instances(options, behind=behind)
    config.instance_group.add(kind=ModelInstanceGroup.KIND_CPU, count=count)
    return config


def config_text(config: ModelConfig) -> str:
    """The content of ``config.pbtxt``."""
    from google.protobuf import text_format  # type: ignore[import-untyped]

    return HEADER + str(text_format.MessageToString(config, as_utf8=True))


def config_from_text(text: str, where: str) -> ModelConfig:
    """Read a ``config.pbtxt`` with the server's own schema.

    Args:
        text: Content of the file.
        where: What a message calls it.

    Raises:
        InputError: if the text has an unknown field, a value of the wrong kind, or no syntax.
    """
    from google.protobuf import text_format
    from tritonclient.grpc.model_config_pb2 import ModelConfig

    try:
        return text_format.Parse(text, ModelConfig())
    except text_format.ParseError as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"{where} is not a model config ({reason}); correct or remove it"
        ) from error


def _common(source: Source, name: str, options: ServeOptions, *, behind: bool) -> ModelConfig:
    from tritonclient.grpc.model_config_pb2 import ModelConfig

    batch = source.batch
    config = ModelConfig(name=name, platform=source.platform)
    # A model of fixed batch is one whose tensors have that many rows: the server cannot fill
    # a batch up, so it must not make any.
    config.max_batch_size = 0 if batch.is_static else batch.max
    add_interface(config, source, batched=not batch.is_static, labelled=not behind)
    if not behind:
        add_batching(config, options)
    config.version_policy.latest.num_versions = KEPT_VERSIONS
    for rows in sorted({1, config.max_batch_size or 1}):
        warmup = config.model_warmup.add(name=f"batch_{rows}", batch_size=rows, count=1)
        for tensor in config.input:
            # Zeros: tokens still differ by their positions, so merging has what to decide.
            warmup.inputs[tensor.name].CopyFrom(
                type(warmup).Input(data_type=tensor.data_type, dims=tensor.dims, zero_data=True)
            )
    return config


def add_interface(config: ModelConfig, source: Source, *, batched: bool, labelled: bool) -> None:
    """Inputs and outputs, without the batch if the server batches; with labels if users call it."""
    for tensors, found in ((config.input, source.inputs), (config.output, source.outputs)):
        for tensor in found:
            _add_tensor(tensors, tensor, tensor.shape[1:] if batched else tensor.shape)
    if source.labels and labelled:
        config.output[0].label_filename = LABELS


def add_batching(config: ModelConfig, options: ServeOptions) -> None:
    """How long requests wait for a batch to fill, and how many may wait."""
    # No preferred_batch_size: the batcher then takes what is waiting, up to the largest batch.
    batching = config.dynamic_batching
    batching.SetInParent()
    if config.max_batch_size > 1:  # of one image, there is nothing to wait for
        batching.max_queue_delay_microseconds = options.max_queue_delay_us
    if options.limits_queue:
        queue = batching.default_queue_policy  # its timeout_action is REJECT if none is given
        queue.max_queue_size = options.max_queue_size or 0  # 0 is the server's «no limit»
        queue.default_timeout_microseconds = (options.timeout_ms or 0) * 1000
        queue.allow_timeout_override = True  # clients may ask for less


def _instances(options: ServeOptions, *, behind: bool) -> int:
    limited = options.limits_queue and not behind
    return max(options.instances, LEAST_WITH_LIMITS) if limited else options.instances


def _add_tensor(tensors: Any, tensor: TensorInfo, dims: Sequence[int]) -> None:
    from tritonclient.grpc.model_config_pb2 import DataType

    if tensor.dtype not in DATA_TYPES:
        raise InputError(
            f"tensor {tensor.name} is {tensor.dtype}; expected one of {', '.join(DATA_TYPES)}, "
            "rebuild the artifact"
        )
    data_type = DataType.Value(DATA_TYPES[tensor.dtype])
    if dims:
        tensors.add(name=tensor.name, data_type=data_type, dims=dims)
        return
    # A number per image, ``[batch]`` in the file: the server has no tensors without dims, and takes
    # it as ``[batch, 1]`` if it is told that the file's is another shape.
    tensors.add(name=tensor.name, data_type=data_type, dims=[1]).reshape.SetInParent()


def _add_cuda_graphs(config: ModelConfig, batch: BatchRange, options: ServeOptions) -> None:
    """One graph per chosen batch size; other sizes run without."""
    config.optimization.cuda.graphs = True
    if batch.is_static:
        chosen: Sequence[int] = (0,)  # as the server wants it where it does not batch
    elif options.cuda_graph_batches is None:
        chosen = sorted({1, batch.opt, batch.max})
    else:
        chosen = sorted(options.cuda_graph_batches)
    for rows in chosen:
        spec = config.optimization.cuda.graph_spec.add(batch_size=rows)
        for tensor in config.input:
            spec.input[tensor.name].dim.extend(tensor.dims)


def _add_tensorrt_accelerator(config: ModelConfig, source: Source) -> None:
    """ONNX Runtime's TensorRT provider, which builds its engine when the model is first loaded."""
    accelerator = config.optimization.execution_accelerators.gpu_execution_accelerator.add()
    accelerator.name = "tensorrt"
    batch = source.batch
    parameters = {
        "trt_engine_cache_enable": "1",
        # Of the server's machine. The repository may be read-only, and a server that runs as
        # another user cannot write where it was started.
        "trt_engine_cache_path": f"/tmp/tome_export_{config.name}",  # noqa: S108
        "trt_profile_min_shapes": _shapes(source, batch.max if batch.is_static else 1),
        "trt_profile_opt_shapes": _shapes(source, batch.opt),
        "trt_profile_max_shapes": _shapes(source, batch.max),
    }
    # No precision_mode, for any precision: it lets TensorRT choose types by itself. Without it the
    # network is strongly typed, and computes in the types that the ONNX model has.
    for key, value in parameters.items():
        accelerator.parameters[key] = value


def _shapes(source: Source, rows: int) -> str:
    return ",".join(
        f"{tensor.name}:{'x'.join(map(str, (rows, *tensor.shape[1:])))}" for tensor in source.inputs
    )
