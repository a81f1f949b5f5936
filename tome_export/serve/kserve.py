"""A KServe manifest for a repository.

Source of the fields: the InferenceService definition of KServe, ``serving.kserve.io/v1beta1``.
"""

from __future__ import annotations

import base64
import json
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

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

MANIFEST = """\
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
apiVersion: serving.kserve.io/v1beta1
kind: InferenceService
metadata:
  name: {name}
  annotations:  # a plain Deployment, which is what a HorizontalPodAutoscaler scales
    serving.kserve.io/deploymentMode: RawDeployment
    serving.kserve.io/autoscalerClass: hpa
spec:
  predictor:
    minReplicas: 1
    maxReplicas: 4
    scaleMetric: cpu
    scaleTarget: 80
    model:
      modelFormat:
        name: triton
      protocolVersion: v2
      storageUri: {storage_uri}
      args: {arguments}
      env: {environment}
      resources:
        requests: {{cpu: "1", memory: 2Gi}}
        limits: {{cpu: "4", memory: 8Gi, nvidia.com/gpu: "1"}}
      startupProbe:  # the first start on a GPU may build engines, for minutes
        httpGet: {{path: /v2/health/ready, port: {port}}}
        periodSeconds: 5
        failureThreshold: 240
      readinessProbe:
        exec: &probe
          command:
          - python3
          - -c
          - |
{program}
{words}
        timeoutSeconds: 60
        failureThreshold: 3
        periodSeconds: 10
      livenessProbe:
        exec: *probe
        timeoutSeconds: 60
        failureThreshold: 3
        periodSeconds: 30
"""


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
    """Write the manifest of models that are written together; one that is the same stays.

    The service is named after the model ``entry``, and the probe asks it.
    """
    text = manifest_text(entry, options, server, probe_words(folders, entry)).encode()
    if not path.is_file() or path.read_bytes() != text:
        with writing_to(path, "file"):
            write_whole(path, text)


def manifest_text(
    model: str, options: KServeOptions, server: ServerOptions, words: Sequence[str]
) -> str:
    """The manifest as YAML, named after a model; ``words`` are from ``probe_words``."""
    name = service_name(model)
    arguments = ["--disable-auto-complete-config", "--strict-readiness=true", *server.arguments]
    variables = [{"name": key, "value": value} for key, value in server.environment.items()]
    return MANIFEST.format(
        name=name,
        storage_uri=json.dumps(options.storage_uri or f"pvc://{name}"),
        arguments=json.dumps(arguments),
        environment=json.dumps(variables),
        port=HTTP_PORT,
        program=textwrap.indent(Path(probe.__file__).read_text(), " " * 12).rstrip(),
        words="\n".join(f"          - {json.dumps(word)}" for word in words),
    )


def probe_words(folders: Sequence[ModelFolder], entry: str) -> list[str]:
    """What the program ``probe`` is given, to find out whether the server beside it answers.

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
    others = [folder.name for folder in folders if folder is not asked]
    return [f"http://127.0.0.1:{HTTP_PORT}", asked.name, header, beginning, *others]


def service_name(model: str) -> str:
    """A name that a Kubernetes service may have: ``vit_digits_r8`` -> ``vit-digits-r8``."""
    name = re.sub(r"[^a-z0-9]+", "-", model.lower()).strip("-")
    if not name[:1].isalpha():
        name = f"model-{name}"
    return name[:50].rstrip("-")
