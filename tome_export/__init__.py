"""Token Merging (ToMe) for deployment: patch, export to ONNX and TensorRT, prove parity."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tome_export.runtime.load import LoadedArtifact

__version__ = "0.1.0"

TELEMETRY_OFF = {
    "ORT_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_UPDATE_DOWNLOAD_COUNTS": "0",
    "DISABLE_SAFETENSORS_CONVERSION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}
"""Variables that keep libraries from reporting to their makers; see docs/privacy.md.

The libraries read them when they are imported, and processes that are started inherit them.
"""

for _name, _value in TELEMETRY_OFF.items():
    # Whoever wants a report says so with a value of their own.
    os.environ[_name] = os.environ.get(_name) or _value


def load(path: str | os.PathLike[str], backend: str = "ort-cpu") -> LoadedArtifact:
    """Load an artifact's model, to be called with images.

    Args:
        path: The artifact directory.
        backend: What runs it, as ``--backend`` takes it; not ``torch``.

    Raises:
        InputError: if it is no artifact, damaged, or has no engine for a backend that needs one.
        UsageError: if the backend is unknown.
        MissingComponentError: if the backend cannot run here.
    """
    from tome_export.runtime.load import loaded_artifact

    return loaded_artifact(path, backend)
