"""Every backend by its name. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from tome_export.errors import MissingComponentError, UsageError
from tome_export.runtime.openvino import OpenVino
from tome_export.runtime.ort import OrtCpu, OrtCuda
from tome_export.runtime.ort_rtx import OrtRtx
from tome_export.runtime.runner import Backend
from tome_export.runtime.tensorrt import TensorRT, TensorRTRTX
from tome_export.runtime.torch import Torch

# In the order in which they are shown.
_ALL: tuple[Backend, ...] = (
    OrtCpu(),
    OrtCuda(),
    OrtRtx(),
    OpenVino(),
    TensorRT(),
    TensorRTRTX(),
    Torch(),
)

BACKENDS = {one.name: one for one in _ALL}

ORT_CPU, TORCH = OrtCpu.name, Torch.name


def backend_of(name: str, but: str | None = None) -> Backend:
    """The backend of a name."""
    if name not in BACKENDS:
        known = ", ".join(one for one in BACKENDS if one != but)
        raise UsageError(f"backend is {name!r}; expected one of {known}")
    return BACKENDS[name]


def require(names: Sequence[str], but: str | None = None) -> None:
    """Check that backends exist and can run here, before any work is done."""
    for name in names:
        backend = backend_of(name, but)
        if names.count(name) > 1:
            raise UsageError(f"backend {name} is named twice; name each once")
        reason = backend.missing()
        if reason is not None:
            raise MissingComponentError(reason)


def usual_backends(engines: Collection[str]) -> tuple[tuple[str, ...], dict[str, str]]:
    """What runs an artifact with these engines by default, and why other backends cannot here."""
    reasons = {name: one.missing() for name, one in BACKENDS.items() if name in engines}
    able = [name for name, reason in reasons.items() if reason is None]
    return (ORT_CPU, *able), {name: why for name, why in reasons.items() if why is not None}
