"""TensorRT-RTX: builds on any x86-64 machine, without a GPU; kernels are finished on first use.

It has no plugin API, no timing cache (its operations do nothing since 1.2) and no
hardware-compatibility level: its engines are portable by default.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

from tome_export.engine import gpu
from tome_export.engine.builder import EngineBuilder, EngineOptions
from tome_export.errors import MissingComponentError, UsageError
from tome_export.spec import BackendName


class TensorRTRTX(EngineBuilder):
    """TensorRT-RTX 1.2 and later."""

    name: BackendName = "tensorrt-rtx"
    title = "TensorRT-RTX"
    file_name = "model.rtx.engine"
    module_name = "tensorrt_rtx"
    minimum = (1, 2)
    install = "pip install tensorrt-rtx"
    gpu_to_build = False

    def configure(self, trt: ModuleType, config: Any, options: EngineOptions) -> list[str]:
        """Targets; and a note for each option without effect."""
        if options.version_compatible:
            raise UsageError(
                "a version-compatible engine was asked for; TensorRT-RTX engines run only with the "
                "version that built them: leave the option out, or use --engine tensorrt"
            )
        known = trt.ComputeCapability
        members = [
            "CURRENT" if capability == "current" else "SM" + capability.replace(".", "")
            for capability in options.compute_capabilities
        ]
        for capability, member in zip(options.compute_capabilities, members, strict=True):
            if not hasattr(known, member):
                names = (name for name in known.__members__ if name.startswith("SM"))
                expected = ", ".join(f"{name[2:-1]}.{name[-1]}" for name in names)
                raise UsageError(
                    f"compute capability is {capability}; TensorRT-RTX {trt.__version__} builds "
                    f"for {expected}"
                )
        report = gpu.detect()
        if "current" in options.compute_capabilities and not report.gpus:
            raise MissingComponentError(
                f"an engine for the current GPU was asked for, but {report.reason}; "
                "name its compute capability instead, such as 8.9"
            )
        if members:
            config.num_compute_capabilities = len(members)
            for index, member in enumerate(members):
                config.set_compute_capability(getattr(known, member), index)
        notes = []
        if options.hardware_compatible and not members:
            notes.append("TensorRT-RTX engines are portable across Ampere and later by default")
        if options.timing_cache is not None:
            notes.append("TensorRT-RTX times no tactics: the timing cache was not used")
        return notes

    def targets(self, options: EngineOptions) -> tuple[str, ...]:
        """As asked for, else NVIDIA's statement about its default."""
        return options.compute_capabilities or ("8.0, 8.6, 8.9, 12.0 and later",)
