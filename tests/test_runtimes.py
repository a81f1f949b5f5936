"""Every runtime that docs/runtimes.md names takes the exported graphs and decides as PyTorch."""

from __future__ import annotations

import importlib
from pathlib import Path

import onnx
import pytest

ROOT = Path(__file__).parents[1]
STALE = "docs/runtimes.md is stale; run `python scripts/runtimes.py`"


@pytest.fixture(scope="module")
def runtimes():
    with pytest.MonkeyPatch.context() as patched:
        patched.syspath_prepend(ROOT / "scripts")
        return importlib.import_module("runtimes")


@pytest.fixture(scope="module")
def made(runtimes):
    with runtimes.cases() as cases:
        yield cases


@pytest.fixture(scope="module")
def page_rows(runtimes):
    text = runtimes.PAGE.read_text(encoding="utf-8")
    begin, end = (text.index(mark) for mark in runtimes.TABLE)
    lines = [line for line in text[begin:end].splitlines() if line.startswith("| ")]
    header, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    assert header == ["runtime", "version", *runtimes.PRECISIONS], STALE
    return {name: dict(zip(header[1:], cells, strict=True)) for name, *cells in rows}


def test_the_page_has_every_runtime_with_a_version(runtimes, page_rows):
    assert list(page_rows) == [runtime.name for runtime in runtimes.RUNTIMES], STALE
    assert all(row["version"][0].isdigit() for row in page_rows.values()), STALE


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("index", range(5), ids=["ort", "reference", "openvino", "web", "rtx"])
def test_a_runtime_does_what_the_page_says(runtimes, made, page_rows, index, precision):
    runtime = runtimes.RUNTIMES[index]
    if reason := runtime.missing():
        pytest.skip(reason)
    verdict = runtimes.verdict(runtime, made[precision])
    assert verdict == page_rows[runtime.name][precision], STALE
    assert "same plans, within" in verdict or (runtime.run is None and "builds" in verdict)


def test_other_plans_and_numbers_are_told_apart(runtimes, made):
    """The verdict is not always the same: a graph with another layer's r, or another weight."""
    case, ort = made["fp32"], runtimes.RUNTIMES[0]
    graph = onnx.load(case.twin)
    bias = next(w for w in graph.graph.initializer if w.name.endswith("head.bias"))
    bias.raw_data = b"\x00\x00\x80\x3f" * bias.dims[0]
    onnx.save(graph, case.twin.with_name("bias.onnx"))
    (log,) = (n for n in graph.graph.node if n.op_type == "Log" and n.input[0] == "blocks.0.size")
    log.op_type = "Sub"
    log.input.append(log.input[0])
    onnx.save(graph, case.twin.with_name("sizes.onnx"))

    def verdict(name):
        path = case.twin.with_name(name)
        broken = runtimes.Runtime(
            ort.name,
            ort.version,
            ort.missing,
            lambda _, __, precision: ort.run(path, case.twin_inputs, precision),
        )
        return runtimes.verdict(broken, case)

    assert verdict("bias.onnx").startswith("same plans, off by ")
    assert verdict("sizes.onnx").startswith("other plans: source_map, blocks.")
