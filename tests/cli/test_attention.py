"""``--attention`` from the command line to the graph and what the artifact says of it."""

from __future__ import annotations

import json
from collections import Counter

import onnx
import pytest

BUILD = ("build", "vit_digits", "--r", "8", "--engine", "none", "-o", "out")


@pytest.mark.parametrize(("form", "attentions", "casts"), [("parts", 0, 0), ("fused-fp32", 6, 24)])
def test_a_form_is_built_and_checked(run, tmp_path, form, attentions, casts):
    ran = run(*BUILD, "--fp16", "--attention", form, "-v")
    assert ran.code == 0, ran.err
    assert f"Export to ONNX, fp16\n  attention: {form}; as asked\n" in ran.err
    assert "Parity passed: onnx on ONNX Runtime CPU, fp16, " in ran.out
    about = json.loads((tmp_path / "out" / "build.json").read_text())["onnx"]
    assert (about["attention"], about["attention_note"]) == (form, "as asked")
    graph = onnx.load(tmp_path / "out" / "model.onnx").graph
    assert Counter(node.op_type for node in graph.node)["Attention"] == attentions
    makers = {node.output[0]: node for node in graph.node}
    around = [
        node
        for attention in graph.node
        if attention.op_type == "Attention"
        for node in (*(makers[name] for name in attention.input[:3]), _reader(graph, attention))
    ]
    assert sum(node.op_type == "Cast" for node in around) == casts


def _reader(graph, node):
    return next(other for other in graph.node if node.output[0] in other.input)


@pytest.mark.parametrize("precision", ["--fp32", "--bf16"])
def test_float32_sums_of_another_precision_are_refused_at_once(run, tmp_path, precision):
    ran = run(*BUILD, precision, "--attention", "fused-fp32")
    assert ran.code == 2
    assert ran.error.startswith(
        f"--attention fused-fp32 was asked for in {precision[2:]}; expected"
    )
    assert "Load" not in ran.err
    assert not list(tmp_path.iterdir())


def test_an_unknown_form_is_refused(run):
    ran = run(*BUILD, "--attention", "decomposed")
    assert ran.code == 2
    assert "'decomposed' is not one of 'auto', 'fused', 'fused-fp32', 'parts'" in ran.err
