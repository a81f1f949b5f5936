"""Documents with something changed in them: read, or refused in one line; never anything else."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from manifests import engine_values, manifest_values
from onnx import TensorProto, helper
from results import REPORTS, tower_report

from tome_export.artifact.bench import Bench
from tome_export.artifact.document import Document
from tome_export.artifact.evaluation import Evaluation
from tome_export.artifact.manifest import Manifest
from tome_export.artifact.parity import Comparison, LayerParity, OutputParity, ParityFile
from tome_export.artifact.schedule import ScheduleFile, TunedSchedule, read_search
from tome_export.errors import TomeExportError
from tome_export.evaluate.journal import Journal
from tome_export.evaluate.records import Record
from tome_export.serve.main import ServeOptions, ServeRequest, serve
from tome_export.serve.router import RouteList

few = settings(max_examples=60, derandomize=True, deadline=None, database=None)


def model() -> bytes:
    """``logits = pixel_values [B, 1, 8, 8] @ weights``, as ``manifest_values`` has it."""
    graph = helper.make_graph(
        [
            helper.make_node("Flatten", ["pixel_values"], ["flat"]),
            helper.make_node("MatMul", ["flat", "weights"], ["logits"]),
        ],
        "small",
        [helper.make_tensor_value_info("pixel_values", TensorProto.FLOAT, ["batch", 1, 8, 8])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 10])],
        [onnx.numpy_helper.from_array(np.ones((64, 10), np.float32), "weights")],
    )
    opset = helper.make_opsetid("", 17)
    return helper.make_model(graph, opset_imports=[opset], ir_version=8).SerializeToString()


def parity() -> dict[str, Any]:
    layer = LayerParity(
        layer=0,
        decisions=8,
        disagreements=0,
        defects=0,
        largest_margin=0.0,
        margin_bound=1e-6,
        score_error=1e-7,
        score_error_allowed=1e-6,
        op_defects=0,
        images_diverged=0,
    )
    output = OutputParity(max_abs=1e-6, relative=1e-7, cosine=1.0, top1_agreement=1.0)
    found = Comparison(
        candidate="onnx",
        precision="fp32",
        images=1,
        k=2.0,
        layers=(layer,),
        output=output,
        led_output=output,
        led_allowed=1e-5,
        twin_difference=0.0,
        twin_allowed=0.0,
    )
    values: dict[str, Any] = json.loads(ParityFile(checks=(found.judged(),)).json_bytes())
    return values


def build() -> dict[str, Any]:
    content = model()
    files = {
        "model.onnx": (len(content), hashlib.sha256(content).hexdigest()),
        "model.engine": (0, hashlib.sha256(b"").hexdigest()),
    }
    return manifest_values(
        engines={"tensorrt": engine_values("model.engine")},
        compressor={"name": "avgpool", "options": {"grid": [2, 2]}},
        tower={"kind": "llava", "tokens": 4, "width": 8, "grid": [2, 2]},
        labels=[str(n) for n in range(10)],
        files={name: {"bytes": size, "sha256": sha} for name, (size, sha) in files.items()},
    )


ROUTES = {"routes": [{"model": "a_r8", "r": 8, "ms": 1.5}, {"model": "a_r0", "r": 0, "ms": None}]}

DOCUMENTS: dict[str, tuple[Callable[[], dict[str, Any]], type[Document]]] = {
    "build.json": (build, Manifest),
    "parity.json": (parity, ParityFile),
    "bench.json": (REPORTS["bench.json"], Bench),
    "eval.json": (REPORTS["eval.json"], Evaluation),
    "schedule.json": (REPORTS["schedule.json"], ScheduleFile),
    "search": (REPORTS["schedule.json"], TunedSchedule),
    "search of a tower": (tower_report, TunedSchedule),
    "routes.json": (lambda: ROUTES, RouteList),
}

ODD: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 0.5, -0.5, 1e-300, 1e300, 2**31, 2**63, 10**12, 10**30,
    float("nan"), float("inf"), "", "x", "..", "/etc/passwd", "x" * 5000, "a\0b", "a\nb", "\ud800",
    "٣", "1:8:999999999999", "8", [], [None], [[]], [0], [-1], [1e9, 16], ["x"], {}, {"": None},
    {"x" * 5000: 1},
)  # fmt: skip


def places(values: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where something may be changed: every entry, in every depth."""
    inside = values.items() if isinstance(values, dict) else enumerate(values)
    for key, value in inside:
        yield (*path, key)
        if isinstance(value, dict | list):
            yield from places(value, (*path, key))


@st.composite
def changed(draw: st.DrawFn, values: Any) -> bytes:
    """A document's content with one to three things changed, or its bytes."""
    values = json.loads(json.dumps(values))
    for _ in range(draw(st.integers(1, 3))):
        *path, last = draw(st.sampled_from([*places(values)] or [("x",)]))
        inner = values
        for key in path:
            inner = inner[key]
        edit = draw(st.sampled_from(["set", "set", "set", "drop", "deep", "double"]))
        if edit == "drop":
            inner.pop(last, None) if isinstance(inner, dict) else inner.pop(last)
        elif edit == "double" and isinstance(inner, list):
            inner.append(copy.deepcopy(inner[last]))
        elif edit == "deep":
            inner[last] = "DEEP"
        else:
            inner[last] = copy.deepcopy(draw(st.sampled_from(ODD)))
    depth = draw(st.sampled_from([70, 200, 5000]))
    content = json.dumps(values).replace('"DEEP"', "[" * depth + "]" * depth).encode()
    if draw(st.integers(0, 9)) == 0:
        cut = draw(st.integers(0, len(content)))
        content = content[:cut] + draw(st.binary(max_size=3)) + content[cut + 1 :]
    return content


@pytest.mark.parametrize("name", DOCUMENTS)
@few
@given(data=st.data())
def test_a_document_is_read_or_refused(name, data):
    make, kind = DOCUMENTS[name]
    content = data.draw(changed(make()))
    with refused_in_one_line():
        found = kind.parse(content, Path(name))
        again = kind.parse(found.json_bytes(), Path(name))
        assert again.json_bytes() == found.json_bytes()


@contextlib.contextmanager
def refused_in_one_line() -> Iterator[None]:
    """Errors of ours may be raised, in a line that a terminal holds."""
    try:
        yield
    except TomeExportError as error:
        text = str(error)
    else:
        return
    assert "\n" not in text
    assert text.isprintable()
    assert len(text) < 1000


@few
@given(data=st.data())
def test_a_schedule_is_read_as_written_by_hand_or_by_tune(tmp_path_factory, data):
    file = tmp_path_factory.getbasetemp() / "schedule.json"
    file.write_bytes(data.draw(changed(REPORTS["schedule.json"]())))
    with refused_in_one_line():
        read_search(file)


@few
@given(data=st.data())
def test_what_is_served_can_be(tmp_path_factory, data):
    """What a manifest that is not refused leads to, before anything is written."""
    folder = tmp_path_factory.mktemp("served")
    artifact = folder / "artifact"
    artifact.mkdir()
    (artifact / "model.onnx").write_bytes(model())
    (artifact / "model.engine").write_bytes(b"")
    (artifact / "build.json").write_bytes(data.draw(changed(build())))
    options = ServeOptions(preprocess=True, name="m")
    repository = folder / "models"
    with refused_in_one_line():
        try:
            serve(ServeRequest((artifact,), repository, options, format="onnx"))
        except TomeExportError:
            assert not repository.exists()
            raise


LINES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=12,
).map(json.dumps)
RECORD = Record(3, ((1, "a.png", "damaged"),), {"merged": np.zeros((2, 5), np.int32)})


@few
@given(line=LINES | st.binary(max_size=9) | changed(json.loads(RECORD.to_json())))
def test_a_damaged_line_of_a_journal(tmp_path_factory, line):
    file = tmp_path_factory.mktemp("journal") / "j.jsonl"
    with contextlib.closing(Journal(file)) as journal:
        journal.append(RECORD)
        (before,) = journal.records()
        assert before.to_json() == RECORD.to_json()
    file.write_bytes(line if isinstance(line, bytes) else line.encode())
    with contextlib.closing(Journal(file)) as journal:
        found = journal.records()
        assert all(array.ndim == 2 for one in found for array in one.values.values())


def test_a_journal_line_of_brackets(tmp_path):
    with contextlib.closing(Journal(tmp_path / "j.jsonl")) as journal:
        journal.append(RECORD)
        journal._stream.write("\n" + "[" * 5000)
        (found,) = journal.records()
        assert found.to_json() == RECORD.to_json()
