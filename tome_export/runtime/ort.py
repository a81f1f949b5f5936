"""ONNX Runtime on the CPU and on NVIDIA GPUs, and what ``ort_rtx`` shares with them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tome_export.errors import ExportError, InputError, MissingComponentError
from tome_export.runtime.runner import Arrays, Backend, Runnable
from tome_export.spec import Precision

if TYPE_CHECKING:
    import numpy as np
    import onnx

Provider = Literal["cpu", "cuda", "rtx"]

_NAMES: dict[Provider, str] = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "rtx": "NvTensorRTRTXExecutionProvider",
}

CUDA_OPTIONS = {"use_tf32": "0"}
"""TF32, which the CUDA provider uses by default, rounds the factors of fp32 products to 10 bits of
mantissa: an fp32 graph must compute in fp32 to match the reference."""

NOT_INSTALLED = "onnxruntime is not installed; install tome-export[cpu] or tome-export[gpu]"


def providers(provider: Provider) -> list[tuple[str, dict[str, str]]]:
    """What a session is given: providers with their options, the one asked for first."""
    cpu = (_NAMES["cpu"], dict[str, str]())
    return [cpu] if provider == "cpu" else [(_NAMES["cuda"], dict(CUDA_OPTIONS)), cpu]


def missing(provider: Provider) -> str | None:
    """Why ONNX Runtime cannot run on one of its own providers here, and what to do; else None."""
    try:
        import onnxruntime
    except ImportError:
        return NOT_INSTALLED
    found = onnxruntime.get_available_providers()
    if _NAMES[provider] in found:
        return None
    return (
        f"onnxruntime {onnxruntime.__version__} has no {_NAMES[provider]} (it has "
        f"{', '.join(found)}); install onnxruntime-gpu on a machine with an NVIDIA GPU"
    )


def graph_of(runnable: Runnable) -> onnx.ModelProto | Path:
    """The graph of a runnable."""
    if runnable.graph is None:
        raise InputError(f"{runnable.label} has no ONNX graph; choose another backend")
    return runnable.graph


@contextlib.contextmanager
def _loadable(model: onnx.ModelProto | Path, provider: Provider) -> Iterator[bytes | str]:
    """What a session is made from; a file needs none of the packages that edit graphs."""
    if isinstance(model, Path):
        yield str(model)
        return
    from tome_export.onnx.emulate import emulate_bfloat16, uses_bfloat16
    from tome_export.onnx.files import serialized

    if provider == "cpu" and uses_bfloat16(model):
        model = emulate_bfloat16(model)
    with serialized(model) as loadable:
        yield loadable


class OrtRunner:
    """A loaded ONNX model; bfloat16 models run emulated on the CPU (see ``onnx.emulate``).

    Args:
        model: The model, or its file, which takes less memory; bfloat16 cannot be emulated then.
        provider: Where it runs.
        profile: Prefix of a file for the runtime's own profile, written by ``end_profiling``.
        devices: Devices of a provider that was registered, as ONNX Runtime lists them.
    """

    def __init__(
        self,
        model: onnx.ModelProto | Path,
        provider: Provider = "cpu",
        *,
        profile: Path | None = None,
        devices: Sequence[Any] = (),
    ) -> None:
        reason = None if devices else missing(provider)
        if reason is not None:
            raise MissingComponentError(reason)
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        if profile is not None:
            options.enable_profiling = True
            options.profile_file_prefix = str(profile)
        if devices:
            options.add_provider_for_devices(devices, {})
        try:
            with _loadable(model, provider) as loadable:
                self._session = onnxruntime.InferenceSession(
                    loadable, options, providers=None if devices else providers(provider)
                )
        except Exception as error:
            raise ExportError(
                f"onnxruntime {onnxruntime.__version__} cannot load the model: {error}"
            ) from error
        # It falls back to the CPU by itself where a provider fails to load.
        if self._session.get_providers()[0] != _NAMES[provider]:
            raise MissingComponentError(
                f"onnxruntime {onnxruntime.__version__} could not start {_NAMES[provider]}; "
                "check that the NVIDIA driver, CUDA and cuDNN fit it ('tome-export doctor')"
            )
        self.output_names: list[str] = [value.name for value in self._session.get_outputs()]

    def __enter__(self) -> OrtRunner:
        return self

    def __exit__(self, *_: object) -> None:
        del self._session

    def infer(self, inputs: Arrays) -> dict[str, np.ndarray[Any, Any]]:
        """See ``Runner.infer``."""
        from onnxruntime.capi.onnxruntime_pybind11_state import InvalidArgument

        try:
            results = self._session.run(None, dict(inputs))
        # The second is of an input that is missing.
        except (InvalidArgument, ValueError) as error:
            reason = " ".join(str(error).split())
            raise InputError(f"inputs do not fit the model: {reason}") from error
        # It has as many further classes of error as there are faults.
        except Exception as error:
            reason = " ".join(str(error).split())
            raise ExportError(f"onnxruntime failed to run the model: {reason}") from error
        return dict(zip(self.output_names, results, strict=True))

    def end_profiling(self) -> Path:
        """Write the profile; returns its file."""
        return Path(self._session.end_profiling())


class OrtCpu(Backend):
    """ONNX Runtime on the CPU. It takes no bfloat16, which is computed in float32 and rounded."""

    name = "ort-cpu"
    title = "ONNX Runtime CPU"

    def missing(self) -> str | None:
        """See ``Backend.missing``."""
        return missing("cpu")

    def open(self, runnable: Runnable) -> OrtRunner:
        """See ``Backend.open``."""
        graph = graph_of(runnable)
        if runnable.precision == "bf16" and isinstance(graph, Path):
            from tome_export.onnx.files import load

            graph = load(graph)
        return OrtRunner(graph)

    def computes(self, precision: Precision) -> Precision:
        """See ``Backend.computes``."""
        return "fp32" if precision == "bf16" else precision

    def on_gpu(self) -> bool:
        """See ``Backend.on_gpu``."""
        return False


class OrtCuda(Backend):
    """ONNX Runtime with the CUDA provider of onnxruntime-gpu; fp32 is computed without TF32."""

    name = "ort-cuda"
    title = "ONNX Runtime CUDA"

    def missing(self) -> str | None:
        """See ``Backend.missing``."""
        return missing("cuda")

    def open(self, runnable: Runnable) -> OrtRunner:
        """See ``Backend.open``."""
        return OrtRunner(graph_of(runnable), "cuda")
