"""A KServe manifest for a repository.

Source of the fields: the InferenceService definition of KServe, ``serving.kserve.io/v1beta1``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tome_export.errors import UsageError
from tome_export.serve.server import ServerOptions

SCHEMES = ("gs", "s3", "hdfs", "webhdfs", "pvc", "http", "https", "hf", "oci")
"""Where KServe's storage initializer takes a repository from."""

NOTE = """\
# The whole repository is served: storageUri is its root, as the server sees it at /mnt/models.
# Nodes without a GPU: remove the GPU limit and add --model-config-name=cpu to args (ONNX models).
# Scaling: what says that replicas are short is the queue. The server counts it at :8002/metrics as
# nv_inference_pending_request_count (requests that wait, per model) and
# nv_inference_queue_duration_us (its rate over that of nv_inference_request_success is the mean
# wait). Neither is known to a HorizontalPodAutoscaler by itself: bring it in through a metrics
# adapter or KEDA. Until then, replicas follow the CPU, which a busy GPU leaves idle.
"""


@dataclass(frozen=True)
class KServeOptions:
    """What a manifest cannot know from the repository.

    Attributes:
        storage_uri: Where the cluster finds the repository; None for a volume claim of its name.
        min_replicas: Replicas that are always there.
        max_replicas: Replicas under the highest load.

    Raises:
        UsageError: if the URI is none that KServe takes.
    """

    storage_uri: str | None = None
    min_replicas: int = 1
    max_replicas: int = 4

    def __post_init__(self) -> None:
        uri = self.storage_uri
        if uri is not None and not re.fullmatch(rf"({'|'.join(SCHEMES)})://\S+", uri):
            raise UsageError(
                f"storage URI is {uri!r}; expected one such as s3://bucket/models or "
                "pvc://claim/models"
            )


def kserve_manifest(
    model: str, options: KServeOptions, server: ServerOptions | None = None, *, gpu: bool = True
) -> dict[str, Any]:
    """The InferenceService as data.

    Args:
        model: The model that it is named after.
        options: See there.
        server: What the models of the repository want a server to be started with.
        gpu: Whether it asks for a GPU.
    """
    name = service_name(model)
    limits: dict[str, str] = {"cpu": "4", "memory": "8Gi"}
    if gpu:
        limits["nvidia.com/gpu"] = "1"
    arguments = ["--disable-auto-complete-config", "--strict-readiness=true"]
    if not gpu:
        arguments.append("--model-config-name=cpu")
    server = server or ServerOptions()
    arguments += server.arguments
    variables = [{"name": name, "value": value} for name, value in server.environment.items()]
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
                "minReplicas": options.min_replicas,
                "maxReplicas": options.max_replicas,
                "scaleMetric": "cpu",
                "scaleTarget": 80,
                "model": {
                    "modelFormat": {"name": "triton"},
                    "protocolVersion": "v2",
                    "storageUri": options.storage_uri or f"pvc://{name}",
                    "args": arguments,
                    **({"env": variables} if variables else {}),
                    "resources": {"requests": {"cpu": "1", "memory": "2Gi"}, "limits": limits},
                },
            }
        },
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

    return NOTE + str(yaml.safe_dump(manifest, sort_keys=False, allow_unicode=True, width=100))
