"""TensorRT: builds on the GPU that will run the engine."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from tome_export.engine import gpu
from tome_export.engine.builder import EngineBuilder, EngineOptions, write_engine
from tome_export.errors import InputError, UsageError
from tome_export.spec import BackendName


class TensorRT(EngineBuilder):
    """TensorRT 10.13 and later; ONNX ``Attention`` nodes need 10.14."""

    name: BackendName = "tensorrt"
    title = "TensorRT"
    file_name = "model.engine"
    module_name = "tensorrt"
    minimum = (10, 13)
    install = "pip install tensorrt"
    gpu_to_build = True

    def network_flags(self, trt: ModuleType) -> int:
        """Strongly typed by flag in 10.x, always so from 11.0 on."""
        return 0 if int(trt.__version__.split(".")[0]) >= 11 else super().network_flags(trt)

    def configure(self, trt: ModuleType, config: Any, options: EngineOptions) -> list[str]:
        """Compatibility levels and the timing cache."""
        if options.compute_capabilities not in ((), ("current",)):
            raise UsageError(
                f"compute capabilities are {', '.join(options.compute_capabilities)}; TensorRT "
                "builds for the GPU of this machine: leave them out, or use --engine tensorrt-rtx"
            )
        if options.version_compatible:
            config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
        if options.hardware_compatible:
            config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
        return _read_timing_cache(config, options)

    def after_build(self, config: Any, options: EngineOptions) -> None:
        """Write the timings, those read and those measured."""
        if options.timing_cache is not None:
            write_engine(options.timing_cache, config.get_timing_cache().serialize())

    def targets(self, options: EngineOptions) -> tuple[str, ...]:
        """The first GPU's, and later ones if hardware-compatible."""
        if options.hardware_compatible:
            return ("8.0 and later",)
        return tuple("{}.{}".format(*device.compute_capability) for device in gpu.detect().gpus[:1])


def _read_timing_cache(config: Any, options: EngineOptions) -> list[str]:
    path = options.timing_cache
    if path is None:
        return []
    try:
        content = path.read_bytes() if path.exists() else b""
    except OSError as error:
        raise InputError(f"cannot read timing cache {path}: {error.strerror}") from error
    notes = []
    cache = config.create_timing_cache(content)
    # A cache of another device or TensorRT version is refused here.
    if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
        notes.append(f"timing cache {path} does not fit this GPU and version: started a new one")
        config.set_timing_cache(config.create_timing_cache(b""), ignore_mismatch=False)
    return notes
