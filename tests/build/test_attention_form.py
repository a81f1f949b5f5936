"""Which form of attention is written for what: the table of ``auto``, and what is refused."""

from __future__ import annotations

from dataclasses import dataclass

import onnxruntime
import pytest

from tome_export.build import BuildRequest, build
from tome_export.build.engine import EngineRequest, add_engine
from tome_export.build.form import attention_form
from tome_export.engine import Availability, Selection
from tome_export.errors import InputError, UsageError


@dataclass(frozen=True)
class Library:
    """As much of a backend as the choice looks at: TensorRT is not on every machine."""

    name: str
    version: str

    def availability(self) -> Availability:
        return Availability(True, self.version, f"{self.name} {self.version}")


RTX = Library("tensorrt-rtx", "1.7.1.116")
OLD, NEW = Library("tensorrt", "10.13.3.9"), Library("tensorrt", "10.14.1.48")
LATEST = Library("tensorrt", "11.3.0.14")
CPU, CUDA = ["CPUExecutionProvider"], ["CUDAExecutionProvider", "CPUExecutionProvider"]

# Precision, backend, lowering, ONNX Runtime's providers: form, and a word of the reason.
AUTO = [
    ("fp32", None, "matmul", CPU, "parts", "fp32"),
    ("fp32", RTX, "matmul", CPU, "parts", "fp32"),
    ("fp32", LATEST, "matmul", CUDA, "parts", "fp32"),
    ("fp16", RTX, "matmul", CPU, "fused", "tensorrt-rtx"),
    ("fp16", RTX, "matmul", CUDA, "fused", "tensorrt-rtx"),
    ("bf16", RTX, "matmul", CPU, "fused", "tensorrt-rtx"),
    ("fp16", NEW, "matmul", CUDA, "fused", "tensorrt"),
    ("bf16", LATEST, "matmul", CPU, "fused", "tensorrt"),
    ("fp16", OLD, "matmul", CPU, "parts", "10.14"),
    ("bf16", OLD, "matmul", CUDA, "parts", "10.14"),
    ("fp16", None, "index_add", CPU, "parts", "index_add"),
    ("bf16", None, "index_add", CUDA, "parts", "index_add"),
    ("fp16", None, "matmul", CUDA, "parts", "CUDA"),
    ("bf16", None, "matmul", CUDA, "parts", "CUDA"),
    ("fp16", None, "matmul", CPU, "fused", "elsewhere"),
    ("bf16", None, "matmul", CPU, "fused", "elsewhere"),
]


@pytest.mark.parametrize(("precision", "backend", "lowering", "providers", "form", "word"), AUTO)
def test_auto(monkeypatch, precision, backend, lowering, providers, form, word):
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: providers)
    decision = attention_form("auto", precision, backend, lowering)
    assert decision.form == form
    assert word in decision.reason


@pytest.mark.parametrize("backend", [None, RTX, NEW, LATEST])
@pytest.mark.parametrize("form", ["fused", "fused-fp32", "parts"])
def test_what_is_asked_for_is_taken(form, backend):
    decision = attention_form(form, "fp16", backend, "matmul")
    assert decision.form == form
    unfused = form == "fused-fp32" and backend is NEW
    note = "as asked; TensorRT older than 11.3 computes it unfused" if unfused else "as asked"
    assert decision.reason == note


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_float32_sums_are_for_fp16(precision, tmp_path):
    with pytest.raises(UsageError, match=f"fused-fp32 was asked for in {precision}; expected fp16"):
        build(
            BuildRequest("no such model", tmp_path / "x", None, precision, attention="fused-fp32")
        )


@pytest.mark.parametrize("form", ["fused", "fused-fp32"])
def test_an_operator_that_tensorrt_does_not_know(form):
    with pytest.raises(UsageError, match=rf"is {form}, .* TensorRT 10\.13 .* --attention parts"):
        attention_form(form, "fp16", OLD, "matmul")
    assert attention_form("parts", "fp16", OLD, "matmul").form == "parts"


@pytest.fixture(scope="module")
def fused(built_artifact):
    return built_artifact(precision="fp16", attention="fused-fp32", check=False)


def test_an_older_tensorrt_refuses_a_fused_artifact(monkeypatch, fused):
    monkeypatch.setattr("tome_export.build.engine.select", lambda _: Selection(OLD, "chosen"))
    with pytest.raises(
        InputError, match=r"the artifact's attention is fused-fp32, .* TensorRT 10\.13"
    ):
        add_engine(EngineRequest(fused.path))


def test_a_variant_has_the_artifacts_form(fused, tmp_path):
    """What bench and tune export again is written as the artifact was."""
    import onnx

    from tome_export.progress import Silent
    from tome_export.runtime.model import export_variant, reference_model

    model, _ = reference_model(fused)
    assert export_variant(fused, model, tmp_path, Silent()) is None
    nodes = onnx.load(tmp_path / "model.onnx").graph.node
    casts = {node.output[0] for node in nodes if node.op_type == "Cast"}
    attentions = [node for node in nodes if node.op_type == "Attention"]
    assert len(attentions) == 6
    assert all(casts.issuperset(node.input[:3]) for node in attentions)
