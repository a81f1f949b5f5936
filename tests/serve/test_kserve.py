"""The KServe manifest, against the part of the published schema that it uses."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from tome_export.errors import UsageError
from tome_export.serve import probe
from tome_export.serve.kserve import KServeOptions, manifest_text, service_name
from tome_export.serve.server import ServerOptions

# From the CustomResourceDefinition inferenceservices.serving.kserve.io, version v1beta1, of KServe
# 0.15 to 0.17: type, or {field: type}; a list is one of its words. Fields that are not here are
# not known to the schema as we use it, and so an error.
QUANTITY = re.compile(r"^\d+(\.\d+)?([KMGTPE]i|[numkMGTPE])?$")
PROBE = {
    "httpGet": {"path": str, "port": int},
    "exec": {"command": [str]},
    "periodSeconds": int,
    "timeoutSeconds": int,
    "failureThreshold": int,
}
SCHEMA = {
    "apiVersion": ["serving.kserve.io/v1beta1"],
    "kind": ["InferenceService"],
    # As the admission webhook has it.
    "metadata": {"name": re.compile(r"^[a-z]([-a-z0-9]*[a-z0-9])?$"), "annotations": str},
    "spec": {
        "predictor": {
            "minReplicas": int,
            "maxReplicas": int,
            "scaleMetric": ["cpu", "memory", "concurrency", "rps"],
            "scaleTarget": int,
            "model": {
                "modelFormat": {"name": ["triton"], "version": str},
                "protocolVersion": ["v1", "v2", "grpc-v1", "grpc-v2"],
                "storageUri": str,
                "args": [str],
                "resources": {"requests": QUANTITY, "limits": QUANTITY},
                "env": [dict],
                **dict.fromkeys(("startupProbe", "readinessProbe", "livenessProbe"), PROBE),
            },
        }
    },
}
FREE = ("annotations", "requests", "limits")
"""Objects whose fields have any name."""


def wrong(value, schema, where=""):
    name = where.rpartition(".")[2]
    if name in FREE:
        for inner in value.values():
            yield from wrong(inner, schema, f"{where}[]")
    elif isinstance(schema, dict):
        for key in value:
            if key not in schema:
                yield f"{where}.{key} is unknown"
            else:
                yield from wrong(value[key], schema[key], f"{where}.{key}")
    elif schema in ([str], [dict]):
        if not (isinstance(value, list) and all(isinstance(item, *schema) for item in value)):
            yield f"{where} is {value!r}"
    elif isinstance(schema, list):
        if value not in schema:
            yield f"{where} is {value!r}"
    elif isinstance(schema, re.Pattern):
        if not (isinstance(value, str) and schema.match(value)):
            yield f"{where} is {value!r}"
    elif not isinstance(value, schema) or isinstance(value, bool):
        yield f"{where} is {value!r}"


WORDS = ["http://127.0.0.1:8080", "m", '{"inputs": ["y: z # no"]}', "", "x"]


def text_of(model, storage_uri=None):
    return manifest_text(model, KServeOptions(storage_uri), ServerOptions(), WORDS)


def manifest_of(*given):
    return yaml.safe_load(text_of(*given))


@pytest.mark.parametrize("model", ["vit_b16_r8", "8-BIT.model_", "timm_vit_x_y_r0-inflect_0.5"])
def test_manifest_follows_the_schema(model):
    manifest = manifest_of(model, "s3://bucket/models")
    assert [*wrong(manifest, SCHEMA)] == []
    predictor = manifest["spec"]["predictor"]
    assert predictor["model"]["storageUri"] == "s3://bucket/models"
    assert "nvidia.com/gpu" in predictor["model"]["resources"]["limits"]


def test_the_check_finds_what_is_wrong():
    manifest = manifest_of("m")
    manifest["spec"]["predictor"]["modle"] = {}
    manifest["spec"]["predictor"]["minReplicas"] = "1"
    manifest["metadata"]["name"] = "M_1"
    assert [*wrong(manifest, SCHEMA)] == [
        ".metadata.name is 'M_1'",
        ".spec.predictor.minReplicas is '1'",
        ".spec.predictor.modle is unknown",
    ]


def test_the_probe_is_the_program_and_its_words():
    model = manifest_of("vit_b16_r8")["spec"]["predictor"]["model"]
    program = Path(probe.__file__).read_text()
    assert model["readinessProbe"]["exec"]["command"] == ["python3", "-c", program, *WORDS]


def test_options_of_the_server_are_in_the_manifest():
    server = ServerOptions(("--x=y: z # no",), {"A": "1", "B": "ü\n"})
    text = manifest_text("m", KServeOptions(), server, WORDS)
    model = yaml.safe_load(text)["spec"]["predictor"]["model"]
    assert model["args"][-1] == "--x=y: z # no"
    assert model["env"] == [{"name": "A", "value": "1"}, {"name": "B", "value": "ü\n"}]


def test_the_text_says_what_to_scale_by():
    text = text_of("vit_b16_r8")
    assert "nv_inference_pending_request_count" in text
    assert all(len(line) <= 120 for line in text.splitlines())


@pytest.mark.parametrize(
    ("model", "name"),
    [("vit_digits_r8", "vit-digits-r8"), ("8b", "model-8b"), ("__", "model"), ("A.B", "a-b")],
)
def test_service_name(model, name):
    assert service_name(model) == name


def test_storage_uri():
    assert manifest_of("m")["spec"]["predictor"]["model"]["storageUri"] == "pvc://m"
    for uri in ("models", "ftp://x", "s3://", "s3://a b"):
        with pytest.raises(UsageError, match="storage URI is"):
            KServeOptions(uri)
