"""Building through TensorRT's Python API, which TensorRT and TensorRT-RTX share.

Everything here runs with both modules; what differs is in ``tensorrt.py`` and ``tensorrt_rtx.py``.
A machine without a GPU thereby exercises, with TensorRT-RTX, nearly all that TensorRT will run.
"""

from __future__ import annotations

import importlib
import json
import threading
import time
from abc import ABC, abstractmethod
from pathlib import Path
from types import ModuleType
from typing import Any

from tome_export.artifact.manifest import BackendName, EngineInfo
from tome_export.engine import gpu, network
from tome_export.engine.base import Availability, EngineOptions
from tome_export.engine.files import write_atomically
from tome_export.engine.interrupt import run_interruptibly
from tome_export.engine.messages import Messages, collect, monitor_for
from tome_export.errors import ExportError, MissingComponentError
from tome_export.progress import Progress


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
        """The imported library.

        Raises:
            MissingComponentError: if it is not installed, broken or too old.
        """
        found = self.availability()
        if not found.available:
            raise MissingComponentError(found.reason)
        return importlib.import_module(self.module_name)

    def availability(self) -> Availability:
        """Whether its library is installed and recent enough."""
        try:
            version = str(importlib.import_module(self.module_name).__version__)
        except ModuleNotFoundError as error:
            if error.name == self.module_name:
                return Availability(False, None, f"{self.title} is not installed: {self.install}")
            return self._broken(error)
        except (ImportError, OSError, RuntimeError, AttributeError) as error:
            return self._broken(error)
        if tuple(int(part) for part in version.split(".")[:2]) < self.minimum:
            least = ".".join(str(part) for part in self.minimum)
            reason = f"{self.title} {version} is older than {least}: {self.install}"
            return Availability(False, version, reason)
        return Availability(True, version, f"{self.title} {version}")

    def _broken(self, error: Exception) -> Availability:
        reason = " ".join(str(error).split())
        line = f"{self.title} does not load ({reason}): reinstall it with {self.install}"
        return Availability(False, None, line)

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
        """Check that the parser accepts a model, without building it.

        Raises:
            MissingComponentError: if the library is not here.
            ExportError: with the parser's errors: node, operator, reason.
        """
        trt, cancel = self.module(), threading.Event()

        def work() -> None:
            with collect(trt) as (logger, messages):
                builder = self._builder(trt, logger, messages)
                flags = self.network_flags(trt)
                network.network_from_onnx(trt, builder, logger, messages, onnx_path, flags)

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

        Args:
            onnx_path: The model; external data is looked up beside it.
            options: How to build.
            output_path: The engine file; its folder must exist.
            progress: Told of the builder's phases and their steps, from another thread.

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
        write_atomically(output_path, plan)
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
        builder = self._builder(trt, logger, messages)
        flags = self.network_flags(trt)
        # The parser owns weights the network refers to: it must live until the build is over.
        net, parser = network.network_from_onnx(trt, builder, logger, messages, onnx_path, flags)
        config = builder.create_builder_config()
        config.progress_monitor = monitor
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        # TF32 has 10 bits of mantissa: an fp32 graph must compute in fp32 to match the reference.
        config.clear_flag(trt.BuilderFlag.TF32)
        if options.workspace_bytes is not None:
            config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_bytes)
        if options.optimization_level is not None:
            config.builder_optimization_level = options.optimization_level
        network.add_profile(builder, config, net, options.batch)
        notes = self.configure(trt, config, options)
        attentions = network.allow_attention_fallback(trt, net)
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
        notes += self.after_build(trt, config, options)
        layers = self._layers(trt, logger, plan, options)
        if layers is None:
            notes.append("the engine's layers were not recorded: reading them needs a GPU")
        del parser
        info = EngineInfo(
            backend=self.name,
            version=str(trt.__version__),
            file=output_path.name,
            size_bytes=int(plan.nbytes),
            build_seconds=round(time.monotonic() - started, 3),
            batch=options.batch,
            inputs=network.tensors(net, outputs=False),
            outputs=network.tensors(net, outputs=True),
            targets=self.targets(options),
            network_layers=int(net.num_layers),
            plugin_layers=network.plugin_layers(trt, net),
            version_compatible=options.version_compatible,
            layers=layers,
            notes=tuple(notes + messages.warnings),
        )
        return plan, info

    def _builder(self, trt: ModuleType, logger: Any, messages: Messages) -> Any:
        try:
            builder = trt.Builder(logger)
        except TypeError as error:  # pybind11: the library's factory returned null
            reason = messages.first_errors()
            raise MissingComponentError(f"{self.title} does not start here: {reason}") from error
        return builder

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

    @abstractmethod
    def network_flags(self, trt: ModuleType) -> int:
        """Flags of ``create_network``: the network must be strongly typed."""

    @abstractmethod
    def configure(self, trt: ModuleType, config: Any, options: EngineOptions) -> list[str]:
        """Apply the options that the two libraries treat differently; returns notes."""

    @abstractmethod
    def after_build(self, trt: ModuleType, config: Any, options: EngineOptions) -> list[str]:
        """Keep what the build learned; returns notes."""

    @abstractmethod
    def targets(self, options: EngineOptions) -> tuple[str, ...]:
        """Compute capabilities the engine is built for."""


def runtime_for(trt: ModuleType, logger: Any, *, version_compatible: bool) -> Any:
    """TensorRT's runtime, which runs code out of an engine only if it is known to hold such.

    Args:
        trt: The library's module.
        logger: From ``messages.collect``.
        version_compatible: Whether the engine was built so: it then brings the runtime of the
            TensorRT that built it. The default refuses it, as an engine may come from anywhere.
    """
    runtime = trt.Runtime(logger)
    if version_compatible:
        runtime.engine_host_code_allowed = True
    return runtime
