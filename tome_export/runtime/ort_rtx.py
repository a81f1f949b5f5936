"""ONNX Runtime on an NVIDIA RTX GPU, by TensorRT-RTX's plugin provider, a package of its own.

The package brings the provider as a library that any ONNX Runtime registers while it runs
(``onnxruntime.register_execution_provider_library``), and with it TensorRT-RTX. Importing it loads
that library; it does not load the CUDA runtime which comes beside it.
"""

from __future__ import annotations

import ctypes
import importlib.util
from functools import lru_cache
from pathlib import Path
from typing import Any

from tome_export.engine import gpu
from tome_export.errors import MissingComponentError
from tome_export.runtime import ort
from tome_export.runtime.runner import Backend, Runnable

PACKAGE = "onnxruntime_ep_nv_tensorrt_rtx"
DISTRIBUTION = "onnxruntime-ep-nv-tensorrt-rtx"


class OrtRtx(Backend):
    """TensorRT-RTX compiles the graph when it is loaded; what it does not take runs on the CPU."""

    name = "ort-rtx"
    title = "ONNX Runtime TensorRT-RTX"

    def missing(self) -> str | None:
        """See ``Backend.missing``."""
        if importlib.util.find_spec(PACKAGE) is None:
            return (
                f"{DISTRIBUTION} is not installed; install tome-export[cpu,ort-rtx] on a machine "
                "with an NVIDIA RTX GPU"
            )
        try:
            import onnxruntime
        except ImportError:
            return ort.NOT_INSTALLED
        if not hasattr(onnxruntime, "register_execution_provider_library"):
            return f"onnxruntime {onnxruntime.__version__} takes no plugin providers; update it"
        report = gpu.detect()
        if not report.gpus:
            return f"{DISTRIBUTION} needs an NVIDIA RTX GPU: {report.reason}"
        try:
            devices()
        except MissingComponentError as error:
            return str(error)
        return None

    def open(self, runnable: Runnable) -> ort.OrtRunner:
        """See ``Backend.open``."""
        reason = self.missing()
        if reason is not None:
            raise MissingComponentError(reason)
        return ort.OrtRunner(ort.graph_of(runnable), "rtx", devices=devices())


@lru_cache(maxsize=1)
def devices() -> list[Any]:
    """The GPUs of the provider, at least one; it is registered for the rest of the process."""
    import onnxruntime

    package: Any = importlib.import_module(PACKAGE)
    version, name = package.__version__, package.get_ep_name()
    try:
        for library in Path(package.__file__).parent.glob("libcudart.so.*"):
            ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
        onnxruntime.register_execution_provider_library(name, package.get_library_path())
    except Exception as error:
        reason = " ".join(str(error).split())
        raise MissingComponentError(
            f"onnxruntime {onnxruntime.__version__} cannot load {DISTRIBUTION} {version} "
            f"({reason}); check that the NVIDIA driver fits it ('tome-export doctor')"
        ) from error
    found = [device for device in onnxruntime.get_ep_devices() if device.ep_name == name]
    if not found:
        raise MissingComponentError(
            f"{DISTRIBUTION} {version} takes none of the GPUs here; expected an NVIDIA RTX GPU of "
            "the Ampere generation or later"
        )
    return found[:1]
