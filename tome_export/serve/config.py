"""The server's model config and files of a model, made from what is served.

Source of the fields: model_config.proto of Triton Inference Server, and the documentation of its
TensorRT and ONNX Runtime backends.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tome_export.errors import InputError, MissingComponentError, UsageError
from tome_export.serve.source import FIXED, Source
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
    "bytes": "TYPE_STRING",
}
"""Type of a tensor -> what the server calls it."""

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
(see ``server``): what is true of one version is not of another, and they share one config."""

PYTHON_MODELS = Path(__file__).parent / "python_models"
"""Models of the python backend, as they are copied into a repository."""

MOST = 2**31 - 1
"""Largest number of the options: most are of 32 bits in the server's schema."""

MOST_VERSION = 2**63 - 1
"""Largest version: the server reads the name of a version folder as a signed 64-bit number."""


def is_version(folder: str) -> bool:
    """Whether the server takes a folder of that name for a version."""
    return re.fullmatch(r"[1-9][0-9]{0,18}", folder) is not None and int(folder) <= MOST_VERSION


@dataclass(frozen=True)
class ServeOptions:
    """How an artifact is served.

    Attributes:
        name: Name of the model in the repository; None for the artifact's model and r.
        version: Version folder, at least 1; None for 1, or the version that already has the same
            files.
        preprocess: Also write the models that take encoded images and give labels or features.
        instances: Copies of the model per device; a limited queue takes two or more.
        max_queue_delay_us: How long the server may hold a request back to fill a batch.
        max_queue_size: Requests that may wait; further ones are rejected at once. None sets no
            limit.
        timeout_ms: How long a request may wait in the queue before it is rejected; None for any
            time.
        cuda_graph_batches: Batch sizes recorded as CUDA graphs (TensorRT plans); None for the
            least, tuned and largest batch of the engine.

    Raises:
        UsageError: if a value is out of its range.
    """

    name: str | None = None
    version: int | None = None
    preprocess: bool = False
    instances: int = 1
    max_queue_delay_us: int = 2000
    max_queue_size: int | None = None
    timeout_ms: int | None = None
    cuda_graph_batches: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        ranges = [
            ("version", self.version, 1, MOST_VERSION),
            ("instances", self.instances, 1, MOST),
            ("queue delay", self.max_queue_delay_us, 0, MOST),
            ("queue size", self.max_queue_size, 1, MOST),
            ("queue timeout", self.timeout_ms, 1, MOST),
            *(("CUDA graph batch", batch, 1, MOST) for batch in self.cuda_graph_batches or ()),
        ]
        for what, value, least, most in ranges:
            if value is not None and not least <= value <= most:
                raise UsageError(f"{what} is {value}; expected {least} to {most}")

    @property
    def folder(self) -> str:
        """Name of the version folder; 1 where no version was chosen."""
        return str(self.version or 1)

    @property
    def limits_queue(self) -> bool:
        """Whether requests may be rejected instead of waiting."""
        return self.max_queue_size is not None or self.timeout_ms is not None


@dataclass(frozen=True)
class ModelFolder:
    """A model of a repository, before it is written.

    Attributes:
        name: Its folder, and its name on the server.
        config: What becomes ``config.pbtxt``.
        files: Path inside the folder (``1/model.onnx``, ``labels.txt``) -> the file to copy, or
            its content.
    """

    name: str
    config: ModelConfig
    files: Mapping[str, Path | bytes] = field(default_factory=dict)


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


def folders_from_source(
    source: Source, name: str, options: ServeOptions, *, asked_by_models: bool = True
) -> list[ModelFolder]:
    """The model with the file, and last what users call: the same one, or a batching model.

    A batch size of 1 leaves nothing to fill up: users call the file itself, and the wire is spared
    a copy through another process. Pipelines, routers and cascades cannot: the server batches
    them, and lets them ask only models that it batches as well.

    Args:
        source: What is served.
        name: What users call.
        options: How.
        asked_by_models: Whether a pipeline, router or cascade may ask it.

    Raises:
        UsageError: if a CUDA graph is asked for that the server cannot record: of an ONNX model,
            or of a model of fixed batch.
    """
    batch = source.batch
    if not batch.is_static or (batch.max == 1 and not asked_by_models):
        return [folder_from_source(source, name, options)]
    model = folder_from_source(source, f"{name}{FIXED}", options, behind=True)
    # It collects requests, fills them up to the batch, and asks the model. The queue is its own:
    # the model is given one full batch after the other.
    config = python_config(name, batch.max, options)
    # One process more than instances of the model: it collects the next batch while they run.
    config.instance_group[0].count = options.instances + 1
    _add_interface(config, source, batched=True, labelled=True)
    _add_batching(config, options)
    folder = python_folder(config, "fixed", "fixed.json", {"model": model.name}, options)
    return [model, ModelFolder(name, config, {**folder.files, **_label_files(source)})]


def folder_from_source(
    source: Source, name: str, options: ServeOptions, *, behind: bool = False
) -> ModelFolder:
    """The model that serves a file as it is; one of fixed batch takes exactly as many rows.

    Args:
        source: What is served.
        name: Of the model on the server.
        options: How.
        behind: Whether a batching model asks it: that one has the queue and the labels.

    Raises:
        UsageError: as ``folders_from_source``.
    """
    files: dict[str, Path | bytes] = {
        f"{options.folder}/{file}": path for file, path in source.files.items()
    }
    files |= {} if behind else _label_files(source)
    if source.version_compatible:
        files[f"{options.folder}/{VERSION_COMPATIBLE}"] = _COMPATIBLE_NOTE
    config = model_config(source, name, options, behind=behind)
    asked = options.cuda_graph_batches is not None
    if source.platform == "onnxruntime_onnx":
        if asked:
            raise UsageError(
                "CUDA graph batches are given and the ONNX model is served; leave them out, or "
                "serve a TensorRT engine with --format engine"
            )
        cpu = model_config(source, name, options, behind=behind, gpu=False)
        files[f"configs/{CPU}.pbtxt"] = config_text(cpu).encode()
    elif asked and source.batch.is_static:
        recorded = (
            "that batch is recorded"
            if source.cuda_graphs
            else "with plugins of a range it is not recorded"
        )
        raise UsageError(
            f"CUDA graph batches are given for a model of fixed batch {source.batch.max}; leave "
            f"them out, {recorded}"
        )
    return ModelFolder(name, config, files)


_COMPATIBLE_NOTE = b"""\
The engine beside this file is version-compatible: it brings a runtime of its own. Servers load it
with --backend-config=tensorrt,version-compatible=true only.
"""


def _label_files(source: Source) -> dict[str, bytes]:
    """The file of class names, one a line; none if there are none."""
    text = "".join(f"{label}\n" for label in source.labels).encode()
    return {LABELS: text} if text else {}


def model_config(
    source: Source, name: str, options: ServeOptions, *, behind: bool = False, gpu: bool = True
) -> ModelConfig:
    """The config for servers with a GPU, or of an ONNX model for those without."""
    from tritonclient.grpc.model_config_pb2 import ModelConfig, ModelInstanceGroup

    batch = source.batch
    config = ModelConfig(name=name, platform=source.platform)
    # A model of fixed batch is one whose tensors have that many rows: the server cannot fill
    # a batch up, so it must not make any.
    config.max_batch_size = 0 if batch.is_static else batch.max
    _add_interface(config, source, batched=not batch.is_static, labelled=not behind)
    count = options.instances
    if not behind:
        _add_batching(config, options)
        count = max(count, LEAST_WITH_LIMITS) if options.limits_queue else count
    config.version_policy.latest.num_versions = KEPT_VERSIONS
    for rows in sorted({1, config.max_batch_size or 1}):
        warmup = config.model_warmup.add(name=f"batch_{rows}", batch_size=rows, count=1)
        for tensor in config.input:
            # Zeros: tokens still differ by their positions, so merging has what to decide.
            warmup.inputs[tensor.name].CopyFrom(
                type(warmup).Input(data_type=tensor.data_type, dims=tensor.dims, zero_data=True)
            )
    kind = ModelInstanceGroup.KIND_GPU if gpu else ModelInstanceGroup.KIND_CPU
    config.instance_group.add(kind=kind, count=count)
    if not gpu:
        return config
    if source.platform == "tensorrt_plan":
        if source.cuda_graphs:
            _add_cuda_graphs(config, batch, options)
        return config
    # TensorRT's parser refuses scatter-add: the accelerator would cut the graph into pieces, and
    # ONNX Runtime's own CUDA kernels run such a model whole.
    if not source.scatters:
        _add_tensorrt_accelerator(config, source)
    cuda = config.optimization.execution_accelerators.gpu_execution_accelerator.add(name="cuda")
    for key, value in CUDA_OPTIONS.items():
        cuda.parameters[key] = value
    return config


def config_text(config: ModelConfig) -> str:
    """The content of ``config.pbtxt``."""
    from google.protobuf import text_format

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


def _add_interface(config: ModelConfig, source: Source, *, batched: bool, labelled: bool) -> None:
    """Inputs and outputs, without the batch if the server batches; with labels if users call it."""
    for tensors, found in ((config.input, source.inputs), (config.output, source.outputs)):
        for tensor in found:
            dims = tensor.shape[1:] if batched else tensor.shape
            add_tensor(tensors, tensor.name, tensor.dtype, dims)
            if not dims:  # the file's is ``[batch]``
                tensors[-1].reshape.SetInParent()
    if source.labels and labelled:
        config.output[0].label_filename = LABELS


def add_tensor(tensors: Any, name: str, dtype: str, dims: Sequence[int]) -> None:
    """Add a tensor of a type such as ``float32`` to a config's inputs or outputs.

    The server has no tensors without dims: a number per image is ``[1]``.
    """
    from tritonclient.grpc.model_config_pb2 import DataType

    if dtype not in DATA_TYPES:
        raise InputError(
            f"tensor {name} is {dtype}; expected one of {', '.join(DATA_TYPES)}, rebuild the "
            "artifact"
        )
    tensors.add(name=name, data_type=DataType.Value(DATA_TYPES[dtype]), dims=dims or [1])


def _add_batching(config: ModelConfig, options: ServeOptions) -> None:
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


def python_folder(
    config: ModelConfig, source: str, file: str, settings: dict[str, Any], options: ServeOptions
) -> ModelFolder:
    """A model of ``python_models`` with its settings beside it."""
    text = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
    files: dict[str, Path | bytes] = {
        f"{options.folder}/model.py": PYTHON_MODELS / f"{source}.py",
        f"{options.folder}/{file}": text.encode(),
    }
    return ModelFolder(config.name, config, files)


def interface_of(config: ModelConfig) -> list[tuple[str, int, tuple[int, ...]]]:
    """Name, type and dims of every input and output."""
    tensors = (*config.input, *config.output)
    return [(tensor.name, tensor.data_type, tuple(tensor.dims)) for tensor in tensors]


def take_interface(config: ModelConfig, like: ModelConfig) -> None:
    """Give a config the inputs and outputs of another."""
    for mine, theirs in ((config.input, like.input), (config.output, like.output)):
        for tensor in theirs:
            mine.add(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
