"""Model configs of the server, and the folders of models, made from what is served.

Source of the fields: model_config.proto of Triton Inference Server, and the documentation of its
TensorRT and ONNX Runtime backends.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tome_export.errors import InputError, MissingComponentError, UsageError
from tome_export.serve.model_file import ModelFile
from tome_export.serve.names import FIXED
from tome_export.spec import TensorInfo

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
    "uint8": "TYPE_UINT8",
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

FRONT_INSTANCES = 4
"""Least instances of a router or a cascade: one answers the requests that it has taken together,
and takes no other until the slowest of them is answered."""

CUDA_OPTIONS = {"use_tf32": "0"}
"""Options of ONNX Runtime's CUDA provider, which otherwise rounds the factors of fp32 products to
10 bits of mantissa: tokens whose scores differ by less would merge otherwise than in the reference.
The backend hands such keys on since release 24.06."""

LABELS = "labels.txt"

KEPT_VERSIONS = 2
"""Versions that are served at once, the latest ones. With one, a client that names the version it
was tested with fails as soon as the next appears; with two it has until the one after that, and
going back is removing a folder."""

VERSION_COMPATIBLE = "version_compatible"
"""File beside an engine that brings a runtime of its own, which a server runs only if it is told to
(see ``server``): what is true of one version is not of another, and they share one config."""

PYTHON_MODELS = Path(__file__).parent / "python_models"

MOST = 2**31 - 1
"""Largest number of the options: most are of 32 bits in the server's schema."""

MOST_DECODERS = 256

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
        scaled_decoding: Decode large JPEG files at a half, quarter or eighth of their size (see
            ``pixels.Settings``): faster, and pixels differ a little.
        dali: Decode on the GPU, by the server's DALI backend.
        decoders: Processes that decode; None for as many as the server's machine has cores.
        instances: Copies of the model per device; a limited queue takes two or more.
        threads: Of each copy of an ONNX model on a CPU; None for as many as there are cores.
        max_queue_delay_us: How long the server may hold a request back to fill a batch.
        max_queue_size: Requests that may wait; further ones are rejected at once.
        timeout_ms: How long a request may wait in the queue before it is rejected.
        cuda_graph_batches: Batch sizes recorded as CUDA graphs (TensorRT plans); None for the
            least, tuned and largest batch of the engine.

    Raises:
        UsageError: if a value is out of its range.
    """

    name: str | None = None
    version: int | None = None
    preprocess: bool = False
    scaled_decoding: bool = False
    dali: bool = False
    decoders: int | None = None
    instances: int = 1
    threads: int | None = None
    max_queue_delay_us: int = 2000
    max_queue_size: int | None = None
    timeout_ms: int | None = None
    cuda_graph_batches: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        ranges = [
            ("version", self.version, 1, MOST_VERSION),
            ("instances", self.instances, 1, MOST),
            ("threads", self.threads, 1, MOST),
            ("decoders", self.decoders, 1, MOST_DECODERS),
            ("queue delay", self.max_queue_delay_us, 0, MOST),
            ("queue size", self.max_queue_size, 1, MOST),
            ("queue timeout", self.timeout_ms, 1, MOST),
            *(("CUDA graph batch", batch, 1, MOST) for batch in self.cuda_graph_batches or ()),
        ]
        for what, value, least, most in ranges:
            if value is not None and not least <= value <= most:
                raise UsageError(f"{what} is {value}; expected {least} to {most}")
        decoding = {"scaled decoding": self.scaled_decoding, "decoders": self.decoders}
        for what, given in {**decoding, "dali": self.dali}.items():
            if given and not self.preprocess:
                raise UsageError(f"{what} is for a server that decodes images; preprocess too")
            if given and self.dali and what in decoding:
                raise UsageError(f"{what} is not for DALI, which decodes on the GPU; give one")

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

    ``config`` becomes ``config.pbtxt``; ``files`` maps a path inside the folder (``1/model.onnx``)
    to the file to copy, or to its content.
    """

    name: str
    config: ModelConfig
    files: Mapping[str, Path | bytes] = field(default_factory=dict)


def check_packages() -> None:
    """Raise ``MissingComponentError`` unless the server's schema is installed."""
    try:
        import tritonclient.grpc.model_config_pb2  # noqa: F401
    except ImportError as error:
        raise MissingComponentError(
            f"{error.name} is not installed, which serving needs; pip install 'tome-export[serve]'"
        ) from error


def model_folders(
    file: ModelFile, name: str, options: ServeOptions, *, asked_by_models: bool = True
) -> list[ModelFolder]:
    """The model with the file, and last what users call: the same one, or a batching model.

    A batch size of 1 leaves nothing to fill up: users call the file itself, and the wire is spared
    a copy through another process. Pipelines, routers and cascades cannot: the server batches
    them, and lets them ask only models that it batches as well.
    """
    batch = file.batch
    if not batch.is_static or (batch.max == 1 and not asked_by_models):
        return [file_folder(file, name, options)]
    model = file_folder(file, f"{name}{FIXED}", options, behind=True)
    # It collects requests, fills them up to the batch, and asks the model. The queue is its own:
    # the model is given one full batch after the other.
    config = python_config(
        name,
        batch.max,
        # One process more than instances of the model: it collects the next batch while they run.
        count=options.instances + 1,
        input=_tensor_values(file.inputs, batched=True),
        output=_tensor_values(file.outputs, batched=True, labels=bool(file.labels)),
        dynamic_batching=_batching(batch.max, options),
    )
    folder = python_folder(config, "fixed", "fixed.json", {"model": model.name}, options)
    return [model, ModelFolder(name, config, {**folder.files, **_label_files(file)})]


def file_folder(
    file: ModelFile, name: str, options: ServeOptions, *, behind: bool = False
) -> ModelFolder:
    """The model that serves a file as it is; one of fixed batch takes exactly as many rows.

    Behind a batching model it has no queue and no labels of its own.
    """
    files: dict[str, Path | bytes] = {
        f"{options.folder}/{name}": path for name, path in file.files.items()
    }
    files |= {} if behind else _label_files(file)
    if options.threads is not None and file.platform != "onnxruntime_onnx":
        raise UsageError(
            "threads are given and a TensorRT engine is served; leave them out, or serve the ONNX "
            "model with --format onnx"
        )
    if file.version_compatible:
        note = b"Servers load it with --backend-config=tensorrt,version-compatible=true only.\n"
        files[f"{options.folder}/{VERSION_COMPATIBLE}"] = note
    asked = options.cuda_graph_batches is not None
    if file.platform == "onnxruntime_onnx":
        if asked:
            raise UsageError(
                "CUDA graph batches are given and the ONNX model is served; leave them out, or "
                "serve a TensorRT engine with --format engine"
            )
        cpu = model_config(file, name, options, behind=behind, gpu=False)
        files[f"configs/{CPU}.pbtxt"] = config_text(cpu).encode()
    elif asked and file.batch.is_static:
        recorded = (
            "that batch is recorded"
            if file.cuda_graphs
            else "with plugins of a range it is not recorded"
        )
        raise UsageError(
            f"CUDA graph batches are given for a model of fixed batch {file.batch.max}; leave "
            f"them out, {recorded}"
        )
    return ModelFolder(name, model_config(file, name, options, behind=behind), files)


def _label_files(file: ModelFile) -> dict[str, bytes]:
    """The file of class names, one a line; none if there are none."""
    text = "".join(f"{label}\n" for label in file.labels)
    return {LABELS: text.encode()} if text else {}


def model_config(
    file: ModelFile, name: str, options: ServeOptions, *, behind: bool = False, gpu: bool = True
) -> ModelConfig:
    """The config for servers with a GPU, or of an ONNX model for those without."""
    # A model of fixed batch is one whose tensors have that many rows: the server cannot fill
    # a batch up, so it must not make any.
    most = 0 if file.batch.is_static else file.batch.max
    inputs = _tensor_values(file.inputs, batched=most > 0)
    # Zeros: tokens still differ by their positions, so merging has what to decide.
    zeros = {
        t["name"]: {"data_type": t["data_type"], "dims": t["dims"], "zero_data": True}
        for t in inputs
    }
    count = options.instances
    if options.limits_queue and not behind:
        count = max(count, LEAST_WITH_LIMITS)
    labels = bool(file.labels) and not behind
    # One thread an instance waits for no other, and so never spins, which would take the core that
    # decodes the next image.
    threads = {"intra_op_thread_count": {"string_value": str(options.threads)}}
    return config_from_values(
        name=name,
        platform=file.platform,
        max_batch_size=most,
        input=inputs,
        output=_tensor_values(file.outputs, batched=most > 0, labels=labels),
        instance_group=[{"kind": "KIND_GPU" if gpu else "KIND_CPU", "count": count}],
        model_warmup=[
            {"name": f"batch_{rows}", "batch_size": rows, "count": 1, "inputs": zeros}
            for rows in sorted({1, most or 1})
        ],
        optimization=_gpu_optimization(file, name, options, inputs) if gpu else None,
        parameters=threads if options.threads is not None and not gpu else None,
        dynamic_batching=None if behind else _batching(most, options),
    )


def _tensor_values(
    tensors: Sequence[TensorInfo], *, batched: bool, labels: bool = False
) -> list[dict[str, Any]]:
    """Inputs or outputs, without the batch if the server batches; the first one has the labels."""
    values = []
    for tensor in tensors:
        dims = tensor.shape[1:] if batched else tensor.shape
        values.append(tensor_values(tensor.name, tensor.dtype, dims))
        if not dims:  # the file's is ``[batch]``
            values[-1]["reshape"] = {}
    if labels:
        values[0]["label_filename"] = LABELS
    return values


def tensor_values(name: str, dtype: str, dims: Sequence[int]) -> dict[str, Any]:
    """An input or output of a type such as ``float32``, as a config has it.

    The server has no tensors without dims: a number per image is ``[1]``.
    """
    if dtype not in DATA_TYPES:
        raise InputError(
            f"tensor {name} is {dtype}; expected one of {', '.join(DATA_TYPES)}, rebuild the "
            "artifact"
        )
    return {"name": name, "data_type": DATA_TYPES[dtype], "dims": [*dims] or [1]}


def _batching(max_batch: int, options: ServeOptions) -> dict[str, Any]:
    """How long requests wait for a batch to fill, and how many may wait."""
    # No preferred_batch_size: the batcher then takes what is waiting, up to the largest batch.
    batching: dict[str, Any] = {}
    if max_batch > 1:  # of one image, there is nothing to wait for
        batching["max_queue_delay_microseconds"] = options.max_queue_delay_us
    if options.limits_queue:
        batching["default_queue_policy"] = {  # its timeout_action is REJECT if none is given
            "max_queue_size": options.max_queue_size or 0,  # 0 is the server's «no limit»
            "default_timeout_microseconds": (options.timeout_ms or 0) * 1000,
            "allow_timeout_override": True,  # clients may ask for less
        }
    return batching


def _gpu_optimization(
    file: ModelFile, name: str, options: ServeOptions, inputs: Sequence[Mapping[str, Any]]
) -> dict[str, Any] | None:
    """CUDA graphs of an engine; of an ONNX model, ONNX Runtime's providers."""
    batch = file.batch
    if file.platform == "tensorrt_plan":
        if not file.cuda_graphs:
            return None
        sizes = options.cuda_graph_batches or sorted({1, batch.opt, batch.max})
        for size, count in Counter(sizes).items():
            graph = f"config.pbtxt of model {name} has {{}} for batch {size}; expected {{}}"
            if size > batch.max:
                what = f"1 to max_batch_size, {batch.max}"
                raise InputError(graph.format("a CUDA graph", what))
            if count > 1:
                raise InputError(graph.format(f"{count} CUDA graphs", "one"))
        if batch.is_static:
            sizes = (0,)  # as the server wants it where it does not batch
        dims = {tensor["name"]: {"dim": tensor["dims"]} for tensor in inputs}
        graphs = [{"batch_size": rows, "input": dims} for rows in sorted(sizes)]
        return {"cuda": {"graphs": True, "graph_spec": graphs}}
    accelerators = [{"name": "cuda", "parameters": CUDA_OPTIONS}]
    # TensorRT's parser refuses scatter-add: the accelerator would cut the graph into pieces, and
    # ONNX Runtime's own CUDA kernels run such a model whole.
    if not file.scatters:
        least = batch.max if batch.is_static else 1
        # No precision_mode, for any precision: it lets TensorRT choose types by itself. Without it
        # the network is strongly typed, and computes in the types that the ONNX model has.
        parameters = {
            "trt_engine_cache_enable": "1",
            # Of the server's machine. The repository may be read-only, and a server that runs as
            # another user cannot write where it was started.
            "trt_engine_cache_path": f"/tmp/tome_export_{name}",  # noqa: S108
        }
        for which, rows in (("min", least), ("opt", batch.opt), ("max", batch.max)):
            shapes = (f"{t.name}:{'x'.join(map(str, (rows, *t.shape[1:])))}" for t in file.inputs)
            parameters[f"trt_profile_{which}_shapes"] = ",".join(shapes)
        accelerators.insert(0, {"name": "tensorrt", "parameters": parameters})
    return {"execution_accelerators": {"gpu_execution_accelerator": accelerators}}


def python_config(name: str, max_batch: int, *, count: int, **fields: Any) -> ModelConfig:
    """A model of the python backend on the CPU, batched without waiting.

    Its queue has no limits, whatever the options say: the model of pixels is what is slow, and a
    limit would want more processes (see ``LEAST_WITH_LIMITS``).
    """
    instances = [{"kind": "KIND_CPU", "count": count}]
    common: dict[str, Any] = {"instance_group": instances, "dynamic_batching": {}}
    common |= fields
    return config_from_values(name=name, backend="python", max_batch_size=max_batch, **common)


def front_config(
    kind: str,
    name: str,
    models: Mapping[str, ModelConfig],
    options: ServeOptions,
    outputs: Sequence[Mapping[str, Any]] = (),
    *,
    sizes: Mapping[str, str] | None = None,
    **fields: Any,
) -> ModelConfig:
    """A router or cascade in front of models of one interface, with ``outputs`` of its own.

    Models of different image sizes, where ``sizes`` names them, may have different dims: those are
    -1 in front.
    """
    of_size: dict[str, str] = {}
    for model in models:
        peer = of_size.setdefault((sizes or {}).get(model, ""), model)
        for other, compare in ((peer, interface_of), (next(iter(models)), _interface_without_dims)):
            if compare(models[model]) != compare(models[other]):
                raise InputError(
                    f"models {other} and {model} have different inputs or outputs; a {kind} needs "
                    "artifacts of one model, give another --name"
                )
    one_each = [models[model] for model in of_size.values()]
    return python_config(
        name,
        min(config.max_batch_size for config in models.values()),
        count=max(FRONT_INSTANCES, options.instances),
        input=_joint_values([config.input for config in one_each]),
        output=[*_joint_values([config.output for config in one_each]), *outputs],
        **fields,
    )


def _joint_values(interfaces: Sequence[Sequence[Any]]) -> list[dict[str, Any]]:
    """Inputs or outputs of several models as those of one: dims that differ are -1."""
    return [
        {
            **values[0],
            "dims": [
                sizes[0] if len({*sizes}) == 1 else -1
                for sizes in zip(*(value["dims"] for value in values), strict=True)
            ],
        }
        for values in zip(*map(interface_values, interfaces), strict=True)
    ]


def _interface_without_dims(config: ModelConfig) -> list[dict[str, Any]]:
    """Name, type and number of dims of every input and output."""
    return [{**tensor, "dims": len(tensor["dims"])} for tensor in interface_of(config)]


def python_folder(
    config: ModelConfig,
    source: str,
    file: str,
    settings: Mapping[str, Any],
    options: ServeOptions,
    modules: Sequence[Path] = (),
) -> ModelFolder:
    """A model of ``python_models`` with its settings, and modules that it loads, beside it."""
    text = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
    files: dict[str, Path | bytes] = {
        f"{options.folder}/model.py": PYTHON_MODELS / f"{source}.py",
        f"{options.folder}/{file}": text.encode(),
        **{f"{options.folder}/{path.name}": path for path in modules},
    }
    return ModelFolder(config.name, config, files)


def interface_values(tensors: Sequence[Any]) -> list[dict[str, Any]]:
    """Name, type and dims of the inputs or outputs of a config, for another one."""
    return [{"name": t.name, "data_type": t.data_type, "dims": [*t.dims]} for t in tensors]


def interface_of(config: ModelConfig) -> list[dict[str, Any]]:
    """Name, type and dims of every input and output."""
    return interface_values([*config.input, *config.output])


def config_from_values(**fields: Any) -> ModelConfig:
    """A config of our version policy, from fields as JSON has them; those that are None go."""
    from google.protobuf import json_format
    from tritonclient.grpc.model_config_pb2 import ModelConfig

    versions = {"latest": {"num_versions": KEPT_VERSIONS}}
    return json_format.ParseDict({"version_policy": versions, **fields}, ModelConfig())


def config_text(config: ModelConfig) -> str:
    """The content of ``config.pbtxt``."""
    from google.protobuf import text_format

    return HEADER + str(text_format.MessageToString(config, as_utf8=True))


def config_from_text(text: str, where: str) -> ModelConfig:
    """Read a ``config.pbtxt``, which a message calls ``where``, with the server's own schema."""
    from google.protobuf import text_format
    from tritonclient.grpc.model_config_pb2 import ModelConfig

    try:
        return text_format.Parse(text, ModelConfig())
    except text_format.ParseError as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"{where} is not a model config ({reason}); correct or remove it"
        ) from error
