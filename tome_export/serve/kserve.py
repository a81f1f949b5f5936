"""A KServe manifest for a repository.

Source of the fields: the InferenceService definition of KServe, ``serving.kserve.io/v1beta1``.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tome_export.artifact import writing_to
from tome_export.artifact.files import write_whole
from tome_export.errors import UsageError
from tome_export.serve import probe
from tome_export.serve.config import ModelFolder
from tome_export.serve.self_test import sample_request
from tome_export.serve.server import ServerOptions

SCHEMES = ("gs", "s3", "hdfs", "webhdfs", "pvc", "http", "https", "hf", "oci")
"""Where KServe's storage initializer takes a repository from."""

HTTP_PORT = 8080
"""Where KServe's runtime for this server lets it listen."""

NOTE = """\
# The whole repository is served: storageUri is its root, as the server sees it at /mnt/models.
# Nodes without a GPU: remove the GPU limit and add --model-config-name=cpu to args (ONNX models).
# Scaling: what says that replicas are short is the queue. The server counts it at :8002/metrics as
# nv_inference_pending_request_count (requests that wait, per model) and
# nv_inference_queue_duration_us (its rate over that of nv_inference_request_success is the mean
# wait). Neither is known to a HorizontalPodAutoscaler by itself: bring it in through a metrics
# adapter or KEDA. Until then, replicas follow the CPU, which a busy GPU leaves idle.
# Probes: /v2/health/ready goes on answering 200 when the process of a python model (decoding,
# labels, router) has died, and every request fails. So a program looks at these processes and sends
# a request; where it fails, the replica gets no requests and is then started again.
"""


MIN_REPLICAS, MAX_REPLICAS = 1, 4
"""Replicas that are always there, and under the highest load."""


@dataclass(frozen=True)
class KServeOptions:
    """Where the cluster finds the repository; None for a volume claim of its name.

    Raises:
        UsageError: if the URI is none that KServe takes.
    """

    storage_uri: str | None = None

    def __post_init__(self) -> None:
        uri = self.storage_uri
        if uri is not None and not re.fullmatch(rf"({'|'.join(SCHEMES)})://\S+", uri):
            raise UsageError(
                f"storage URI is {uri!r}; expected one such as s3://bucket/models or "
                "pvc://claim/models"
            )


def write_manifest(
    path: Path,
    folders: Sequence[ModelFolder],
    entry: str,
    options: KServeOptions,
    server: ServerOptions,
) -> None:
    """Write the manifest of models that are written together; one that is the same stays."""
    manifest = kserve_manifest(entry, options, server, probe_command(folders, entry))
    text = kserve_text(manifest).encode()
    if not path.is_file() or path.read_bytes() != text:
        with writing_to(path, "file"):
            write_whole(path, text)


def probe_command(folders: Sequence[ModelFolder], entry: str) -> list[str]:
    """What a container runs to find out whether the server in it answers; see ``probe``.

    The model ``entry`` is asked. Where it takes videos, and none can be made here for want of PyAV,
    the first one is asked instead.
    """
    from tritonclient.utils import np_to_triton_dtype, serialize_byte_tensor

    asked = next(folder for folder in folders if folder.name == entry)
    try:
        request = sample_request(folders, asked.config)
    except ImportError:
        asked = folders[0]
        request = sample_request(folders, asked.config)
    inputs, content = [], b""
    for name, array in request.items():
        binary = array.dtype.hasobject
        data: bytes = serialize_byte_tensor(array).item() if binary else array.tobytes()
        inputs.append(
            {
                "name": name,
                "shape": list(array.shape),
                "datatype": np_to_triton_dtype(array.dtype),
                "parameters": {"binary_data_size": len(data)},
            }
        )
        content += data
    header = json.dumps({"inputs": inputs, "parameters": {"binary_data_output": True}})
    beginning = base64.b64encode(content.rstrip(b"\0")).decode()
    program = Path(probe.__file__).read_text()
    words = [f"http://127.0.0.1:{HTTP_PORT}", asked.name, header, beginning]
    others = [folder.name for folder in folders if folder is not asked]
    return ["python3", "-c", program, *words, *others]


def kserve_manifest(
    model: str, options: KServeOptions, server: ServerOptions, probe: Sequence[str]
) -> dict[str, Any]:
    """The InferenceService as data, named after a model; ``probe`` is from ``probe_command``."""
    name = service_name(model)
    arguments = ["--disable-auto-complete-config", "--strict-readiness=true", *server.arguments]
    variables = [{"name": name, "value": value} for name, value in server.environment.items()]
    limits = {"cpu": "4", "memory": "8Gi", "nvidia.com/gpu": "1"}
    return {
        "apiVersion": "serving.kserve.io/v1beta1",
        "kind": "InferenceService",
        "metadata": {
            "name": name,
            # A plain Deployment, which is what a HorizontalPodAutoscaler scales.
            "annotations": {
                "serving.kserve.io/deploymentMode": "RawDeployment",
                "serving.kserve.io/autoscalerClass": "hpa",
            },
        },
        "spec": {
            "predictor": {
                "minReplicas": MIN_REPLICAS,
                "maxReplicas": MAX_REPLICAS,
                "scaleMetric": "cpu",
                "scaleTarget": 80,
                "model": {
                    "modelFormat": {"name": "triton"},
                    "protocolVersion": "v2",
                    "storageUri": options.storage_uri or f"pvc://{name}",
                    "args": arguments,
                    **({"env": variables} if variables else {}),
                    **_probes(probe),
                    "resources": {"requests": {"cpu": "1", "memory": "2Gi"}, "limits": limits},
                },
            }
        },
    }


def _probes(command: Sequence[str]) -> dict[str, Any]:
    """When a replica is started, gets requests, and is started again."""
    loaded = {"path": "/v2/health/ready", "port": HTTP_PORT}
    answers = {"exec": {"command": [*command]}, "timeoutSeconds": 60, "failureThreshold": 3}
    return {
        # The first start on a GPU may build engines, for minutes.
        "startupProbe": {"httpGet": loaded, "periodSeconds": 5, "failureThreshold": 240},
        "readinessProbe": {**answers, "periodSeconds": 10},
        "livenessProbe": {**answers, "periodSeconds": 30},
    }


def service_name(model: str) -> str:
    """A name that a Kubernetes service may have: ``vit_digits_r8`` -> ``vit-digits-r8``."""
    name = re.sub(r"[^a-z0-9]+", "-", model.lower()).strip("-")
    if not name[:1].isalpha():
        name = f"model-{name}"
    return name[:50].rstrip("-")


def kserve_text(manifest: Mapping[str, Any]) -> str:
    """The manifest as YAML, with what to know of scaling."""
    import yaml

    class Dumper(yaml.SafeDumper):  # type: ignore[misc,unused-ignore]
        """Writes a text of several lines as such."""

    def represented(dumper: Any, text: str) -> Any:
        style = "|" if "\n" in text else None
        return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)

    Dumper.add_representer(str, represented)
    written = yaml.dump(manifest, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=100)
    return NOTE + str(written)
