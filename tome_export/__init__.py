"""Token Merging (ToMe) for deployment: patch, export to ONNX and TensorRT, prove parity."""

import os

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
