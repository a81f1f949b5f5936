"""Building engines through TensorRT's Python API, which TensorRT and TensorRT-RTX share.

Everything here runs with both modules; what differs is in ``tensorrt.py`` and ``tensorrt_rtx.py``.
A machine without a GPU thereby exercises, with TensorRT-RTX, nearly all that TensorRT will run.

The parser is driven through TensorRT's own API and not through polygraphy: polygraphy prints the
parser's errors to the terminal where this package must return them, and holds either TensorRT or
TensorRT-RTX per process, chosen when it is first imported.
"""

from __future__ import annotations

import importlib
import json
import re
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from tome_export.engine import gpu
from tome_export.engine.interrupt import run_interruptibly
from tome_export.engine.messages import Messages, collect, monitor_for
from tome_export.errors import ExportError, InputError, MissingComponentError, UsageError
from tome_export.progress import Progress
from tome_export.spec import BackendName, BatchRange, TensorInfo

if TYPE_CHECKING:
    from tome_export.artifact.manifest import EngineInfo

_SHOWN_ERRORS = 3
_DTYPES = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16", "UINT8": "uint8"}
_WAY_OUT = "try --merge-op matmul, or --engine none to keep only the ONNX model"


@dataclass(frozen=True)
class EngineOptions:
    """How an engine is built.

    Attributes:
        batch: Batch sizes of the optimisation profile: least, tuned for, most.
        workspace_bytes: Most scratch memory a tactic may use; None leaves the builder's default.
        optimization_level: 0 (fast build) to 5 (longest search); None leaves the default (3).
        timing_cache: File of tactic timings, read when it exists and written after the build.
        version_compatible: The engine also runs on later TensorRT versions of the same major.
        hardware_compatible: The engine runs on every GPU of the Ampere generation and later.
        strip_weights: Leave the weights out of the engine: it is given those of the ONNX model
            before it runs. Needs a GPU to build.
        compute_capabilities: GPUs a TensorRT-RTX engine is built for, such as ``("8.9", "12.0")``,
            or ``("current",)``; empty for its portable default (Ampere and later). At a build with
            ``--merge-op plugin`` also the GPUs its kernels are compiled for.

    Raises:
        UsageError: if a value is out of its range.
    """

    batch: BatchRange = field(default_factory=BatchRange)
    workspace_bytes: int | None = None
    optimization_level: int | None = None
    timing_cache: Path | None = None
    version_compatible: bool = False
    hardware_compatible: bool = False
    strip_weights: bool = False
    compute_capabilities: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.workspace_bytes is not None and self.workspace_bytes <= 0:
            raise UsageError(f"workspace is {self.workspace_bytes} bytes; expected more than 0")
        level = self.optimization_level
        if level is not None and not 0 <= level <= 5:
            raise UsageError(f"optimisation level is {level}; expected 0 to 5")
        for capability in self.compute_capabilities:
            if capability != "current" and not re.fullmatch(r"[0-9]+\.[0-9]", capability):
                raise UsageError(
                    f"compute capability is {capability!r}; expected one such as 8.9, or current"
                )


@dataclass(frozen=True)
class Availability:
    """Whether a component can be used here, and one line that says what is there or missing."""

    available: bool
    version: str | None
    reason: str


class EngineBuilder(ABC):
    """A compiler from ONNX to an engine, by TensorRT's Python API; ``runtime`` runs the engine."""

    name: BackendName
    title: str
    file_name: str
    module_name: str
    minimum: tuple[int, int]
    install: str
    gpu_to_build: bool

    def module(self) -> ModuleType:
        """The imported library."""
        found = self.availability()
        if not found.available:
            raise MissingComponentError(found.reason)
        return importlib.import_module(self.module_name)

    def availability(self) -> Availability:
        """Whether its library is installed and recent enough."""
        try:
            version = str(importlib.import_module(self.module_name).__version__)
        except (ImportError, OSError, RuntimeError, AttributeError) as error:
            if isinstance(error, ModuleNotFoundError) and error.name == self.module_name:
                return Availability(False, None, f"{self.title} is not installed: {self.install}")
            reason = " ".join(str(error).split())
            line = f"{self.title} does not load ({reason}): reinstall it with {self.install}"
            return Availability(False, None, line)
        if tuple(int(part) for part in version.split(".")[:2]) < self.minimum:
            least = ".".join(str(part) for part in self.minimum)
            reason = f"{self.title} {version} is older than {least}: {self.install}"
            return Availability(False, version, reason)
        return Availability(True, version, f"{self.title} {version}")

    def can_build(self) -> Availability:
        """Whether it can build an engine on this machine."""
        return self._with_gpu("build") if self.gpu_to_build else self.availability()

    def can_run(self) -> Availability:
        """Whether this machine can run an engine of it."""
        return self._with_gpu("run")

    def _with_gpu(self, verb: str) -> Availability:
        found, report = self.availability(), gpu.detect()
        if not found.available or report.gpus:
            return found
        reason = f"{found.reason} needs an NVIDIA GPU to {verb} an engine: {report.reason}"
        return Availability(False, found.version, reason)

    def parse(self, onnx_path: Path) -> None:
        """Check that the parser accepts a model, without building it."""
        trt, cancel = self.module(), threading.Event()

        def work() -> None:
            with collect(trt) as (logger, messages):
                self._network_from_onnx(trt, logger, messages, onnx_path)

        run_interruptibly(work, cancel)

    def build(
        self,
        onnx_path: Path,
        options: EngineOptions,
        output_path: Path,
        progress: Progress | None = None,
    ) -> EngineInfo:
        """Build an engine and write it to ``output_path`` in one step.

        Ctrl-C ends the build at the builder's next step; nothing is left behind.

        Raises:
            MissingComponentError: if it cannot build on this machine.
            UsageError: if an option cannot be honoured by this builder.
            ExportError: if the parser or the builder refuses, or the file cannot be written.
        """
        ready = self.can_build()
        if not ready.available:
            raise MissingComponentError(ready.reason)
        if not output_path.parent.is_dir():
            raise ExportError(f"no folder {output_path.parent} for the engine; make it first")
        trt, cancel = self.module(), threading.Event()

        def work() -> tuple[Any, EngineInfo]:
            with collect(trt) as (logger, messages):
                monitor = monitor_for(trt, progress, cancel)
                return self._build(trt, logger, messages, monitor, onnx_path, options, output_path)

        plan, info = run_interruptibly(work, cancel)
        write_engine(output_path, plan)
        return info

    def _build(
        self,
        trt: ModuleType,
        logger: Any,
        messages: Messages,
        monitor: Any,
        onnx_path: Path,
        options: EngineOptions,
        output_path: Path,
    ) -> tuple[Any, EngineInfo]:
        started = time.monotonic()
        report = gpu.detect()
        if options.strip_weights and not report.gpus:
            # Tried with TensorRT-RTX 1.7, for named GPUs as well: CUDA fails within its compiler.
            raise MissingComponentError(
                f"an engine without weights was asked for, which {self.title} builds only where "
                f"there is a GPU: {report.reason}; leave --strip-weights out"
            )
        # The parser owns weights the network refers to: it must live until the build is over.
        builder, net, parser = self._network_from_onnx(trt, logger, messages, onnx_path)
        config = builder.create_builder_config()
        config.progress_monitor = monitor
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        # TF32 has 10 bits of mantissa: an fp32 graph must compute in fp32 to match the reference.
        config.clear_flag(trt.BuilderFlag.TF32)
        if options.workspace_bytes is not None:
            config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_bytes)
        if options.optimization_level is not None:
            config.builder_optimization_level = options.optimization_level
        _add_profile(builder, config, net, options.batch)
        notes = self.configure(trt, config, options)
        if options.strip_weights:
            config.set_flag(trt.BuilderFlag.STRIP_PLAN)
        attentions = _allow_attention_fallback(trt, net)
        if attentions:
            notes.append(f"attention layers: {attentions}, fused where the library has a kernel")
        plan = builder.build_serialized_network(net, config)
        if monitor.failure is not None:
            raise monitor.failure
        if plan is None:
            raise ExportError(
                f"{self.title} could not build {onnx_path.name}: {messages.first_errors()}; "
                "use --engine none to keep only the ONNX model"
            )
        self.after_build(config, options)
        layers = self._layers(trt, logger, plan, options)
        if layers is None:
            notes.append("the engine's layers were not recorded: reading them needs a GPU")
        del parser
        from tome_export.artifact.manifest import EngineInfo

        info = EngineInfo(
            backend=self.name,
            version=str(trt.__version__),
            file=output_path.name,
            size_bytes=int(plan.nbytes),
            build_seconds=round(time.monotonic() - started, 3),
            batch=options.batch,
            inputs=_tensors(net.num_inputs, net.get_input),
            outputs=_tensors(net.num_outputs, net.get_output),
            targets=self.targets(options),
            network_layers=int(net.num_layers),
            plugin_layers=_plugin_layers(trt, net),
            version_compatible=options.version_compatible,
            stripped=options.strip_weights,
            layers=layers,
            notes=tuple(notes + messages.warnings),
        )
        return plan, info

    def _network_from_onnx(
        self, trt: ModuleType, logger: Any, messages: Messages, onnx_path: Path
    ) -> tuple[Any, Any, Any]:
        """The builder, the network and its parser; the path lets external data be found."""
        try:
            builder = trt.Builder(logger)
        except TypeError as error:  # pybind11: the library's factory returned null
            reason = messages.first_errors()
            raise MissingComponentError(f"{self.title} does not start here: {reason}") from error
        if not onnx_path.is_file():
            raise InputError(f"no ONNX model at {onnx_path}; build one with tome-export build")
        network = builder.create_network(self.network_flags(trt))
        parser = trt.OnnxParser(network, logger)
        if not parser.parse_from_file(str(onnx_path)):
            raise ExportError(f"{onnx_path.name}: {_parser_errors(parser, messages)}")
        if network.num_inputs == 0 or network.num_outputs == 0:
            # The parser reads a file of noise as an empty model and reports success.
            raise InputError(f"{onnx_path} holds no graph with inputs and outputs; build it again")
        return builder, network, parser

    def _layers(
        self, trt: ModuleType, logger: Any, plan: Any, options: EngineOptions
    ) -> tuple[Any, ...] | None:
        if not gpu.detect().gpus:
            return None  # even reading an engine allocates on a GPU
        runtime = runtime_for(trt, logger, version_compatible=options.version_compatible)
        engine = runtime.deserialize_cuda_engine(plan)
        if engine is None:
            return None
        inspector = engine.create_engine_inspector()
        text = inspector.get_engine_information(trt.LayerInformationFormat.JSON)
        return tuple(json.loads(text).get("Layers", ()))

    def network_flags(self, trt: ModuleType) -> int:
        """Flags of ``create_network``: the network must be strongly typed."""
        return 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)

    @abstractmethod
    def configure(self, trt: ModuleType, config: Any, options: EngineOptions) -> list[str]:
        """Apply the options that the two libraries treat differently; returns notes."""

    def after_build(self, config: Any, options: EngineOptions) -> None:  # noqa: B027
        """Keep what the build learned."""

    @abstractmethod
    def targets(self, options: EngineOptions) -> tuple[str, ...]:
        """Compute capabilities the engine is built for."""


def runtime_for(trt: ModuleType, logger: Any, *, version_compatible: bool) -> Any:
    """TensorRT's runtime, which runs code out of an engine only if it is known to hold such.

    A version-compatible engine brings the runtime of the TensorRT that built it. The default
    refuses that, as an engine may come from anywhere.
    """
    runtime = trt.Runtime(logger)
    if version_compatible:
        runtime.engine_host_code_allowed = True
    return runtime


def write_engine(path: Path, content: Any) -> None:
    """Write bytes (any buffer) in one step."""
    from tome_export.artifact.files import write_whole

    try:
        write_whole(path, content)
    except OSError as error:
        reason = error.strerror or error
        raise ExportError(
            f"cannot write {path}: {reason}; free space or choose another folder"
        ) from error


def _parser_errors(parser: Any, messages: Messages) -> str:
    errors = [parser.get_error(index) for index in range(parser.num_errors)]
    lines = []
    for error in errors[:_SHOWN_ERRORS]:
        description = " ".join(error.desc().split())
        if error.node_operator():
            where = f"{error.node_name() or error.node()} [{error.node_operator()}]"
        else:  # some importers return an error without filling in its node
            where = messages.parsing
        if where:
            lines.append(f"node {where}: {description}")
    if not lines:  # the file itself, or its external data: only the log has the reason
        return f"the parser cannot read the model: {messages.first_errors(1)}; build it again"
    if len(errors) > _SHOWN_ERRORS:
        lines.append(f"and {len(errors) - _SHOWN_ERRORS} more")
    return f"the parser refuses {'; '.join(dict.fromkeys(lines))}; {_WAY_OUT}"


def _tensors(count: int, get: Callable[[int], Any]) -> tuple[TensorInfo, ...]:
    """Inputs or outputs of a network, by their number and what gives one."""
    return tuple(
        TensorInfo(t.name, tuple(t.shape), _DTYPES.get(t.dtype.name, t.dtype.name.lower()))
        for t in map(get, range(count))
    )


def _add_profile(builder: Any, config: Any, network: Any, batch: BatchRange) -> None:
    """One optimisation profile, with the first dimension of every input as the batch."""
    profile = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        fixed, *rest = tuple(tensor.shape)
        if -1 in rest:
            raise ExportError(
                f"input {tensor.name!r} has shape {tuple(tensor.shape)}; expected only the first "
                "dimension to be dynamic: export with a fixed image size"
            )
        if fixed not in (-1, batch.min) or (fixed != -1 and not batch.is_static):
            raise InputError(
                f"input {tensor.name!r} has a fixed batch of {fixed}, but the batch range is "
                f"{batch}; use --batch {fixed} or export with a dynamic batch"
            )
        sizes = (batch.min, batch.opt, batch.max)
        profile.set_shape(tensor.name, *((size, *rest) for size in sizes))
    config.add_optimization_profile(profile)


def _allow_attention_fallback(trt: ModuleType, network: Any) -> int:
    """Let the builder take attention apart where it has no fused kernel; returns how many.

    An ONNX ``Attention`` node becomes an attention layer that must run fused unless it is marked
    decomposable; there is no fused fp32 kernel. The parser reads the mark from an attribute
    ``TRT_decomposable`` of the node, which onnx.checker and ONNX Runtime refuse as unknown: it is
    set on the parsed network instead, so that one ONNX file serves every runtime. A fused kernel
    is still taken where there is one.
    """
    kind = getattr(trt.LayerType, "ATTENTION_INPUT", None)
    if kind is None:
        return 0
    count = 0
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type == kind:
            # The binding returns the base class; this is its documented way to the derived one.
            layer.__class__ = trt.IAttentionInputLayer
            layer.attention.decomposable = True
            count += 1
    return count


def _plugin_layers(trt: ModuleType, network: Any) -> int:
    kind = getattr(trt.LayerType, "PLUGIN_V3", None)
    return sum(network.get_layer(index).type == kind for index in range(network.num_layers))
