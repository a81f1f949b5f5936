"""The serving benchmark, as far as it needs no server: the load tool, its report, the rows."""

from __future__ import annotations

import base64
import io
import json

import numpy as np
import pytest
from PIL import Image

from tome_export.errors import ExportError, MissingComponentError

REPORT = """Concurrency,Inferences/Second,Client Send,Server Queue,p50 latency,p90 latency,\
p95 latency,p99 latency
4,40.5,37,2500,99000,110000,122000,130000

"""

FAILING = "#!/bin/sh\necho 'libb64.so.0d: cannot open shared object file' >&2\nexit 127\n"


@pytest.fixture
def tool(bench):
    return bench("perf_analyzer")


def executable(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def test_report_of_one_concurrency_is_read(tool):
    load = tool.load_from_report(REPORT)
    assert load.images_per_second == 40.5
    assert load.latency_ms == {"p50": 99.0, "p95": 122.0, "p99": 130.0}
    assert load.queue_ms == 2.5


@pytest.mark.parametrize("text", ["", "no,report\n1,2\n", REPORT.strip() + "\n8,1,1,1,1,1,1,1\n"])
def test_another_report_is_an_error(tool, text):
    with pytest.raises(ExportError, match="report of another form"):
        tool.load_from_report(text)


def test_images_go_in_as_they_are(tool):
    images = np.random.default_rng(0).standard_normal((2, 3, 4, 5), dtype=np.float32)
    data = json.loads(tool.input_data(images))["data"]
    assert [entry["pixel_values"]["shape"] for entry in data] == [[3, 4, 5]] * 2
    decoded = [
        np.frombuffer(base64.b64decode(entry["pixel_values"]["b64"]), np.float32) for entry in data
    ]
    assert np.array_equal(np.stack(decoded).reshape(images.shape), images)


def test_tool_is_found_by_file_by_folder_and_on_path(tool, tmp_path, monkeypatch):
    binary = executable(tmp_path / "bin" / tool.NAME, "#!/bin/sh\n")
    library = tmp_path / "nvidia" / "cuda_runtime" / "lib"
    library.mkdir(parents=True)
    assert tool.find(binary) == tool.find(tmp_path) == binary
    assert tool.library_folders(binary) == [library]
    monkeypatch.setenv("PATH", str(binary.parent))
    assert tool.find(None) == binary


def test_missing_tool_says_how_to_get_it(tool, tmp_path, monkeypatch):
    with pytest.raises(MissingComponentError, match=r"perf_analyzer is not at .*; 'pip install"):
        tool.find(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingComponentError, match="perf_analyzer is not on PATH; 'pip install"):
        tool.find(None)


def test_tool_without_its_libraries_says_which(tool, tmp_path):
    binary = executable(tmp_path / "tools" / tool.NAME, FAILING)
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(MissingComponentError, match=r"does not start \(libb64.so.0d: cannot open"):
        tool.PerfAnalyzer(binary, folder)


def test_ratios_are_medians_of_the_rounds(bench, tool):
    """A round in which the machine was slow throughout changes nothing."""
    serving = bench("serving")

    def load(rate):
        return tool.Load(rate, {"p50": 1.0, "p95": 2.0, "p99": 3.0}, 0.5)

    served, alone = [], []
    for speed in (1.0, 0.5, 1.0):
        served.append({})
        alone.append({})
        for concurrency, batch in serving.BATCH_OF.items():
            for kind, rate, own in (("merged", 18.0, 20.0), ("unmerged", 10.0, 10.0)):
                served[-1][concurrency, kind] = load(rate * speed)
                alone[-1][batch, kind] = own * speed
    rows = serving.rows_of(served, alone)
    assert [row["concurrency"] for row in rows] == [1, 4, 16]
    for row in rows:
        assert row["speedup"] == pytest.approx(1.8)
        assert row["speedup_alone"] == pytest.approx(2.0)
        assert row["share_of_speedup_alone"] == pytest.approx(0.9)
        assert row["served_over_alone"] == pytest.approx({"merged": 0.9, "unmerged": 1.0})
        assert row["latency_ms"]["merged"] == {"p50": 1.0, "p95": 2.0, "p99": 3.0}


def test_pipelines_are_held_against_the_first_in_each_round(bench):
    """A round in which the machine was slow throughout changes no ratio."""
    pipeline = bench("serving_pipeline")

    def measured(rate):
        load = pipeline.Load(1, 10, rate, {"p50": 1.0, "p95": 2.0, "p99": 3.0}, 0.1)
        return pipeline.Measured(load, dict.fromkeys(pipeline.STAGES, 5.0), 0.25)

    keys = [(size, at) for size in pipeline.SIZES for at in pipeline.CONCURRENCY]
    rounds = [
        {(*key, name): measured(rate * speed) for key in keys for name, rate in rates.items()}
        for speed in (1.0, 0.5, 1.0)
        for rates in [{"before": 10.0, "after": 15.0}]
    ]
    rows = pipeline.rows_of(rounds, ["before", "after"])
    assert [(row["photographs"], row["concurrency"]) for row in rows] == keys
    for row in rows:
        assert row["ratio"] == {"after": pytest.approx(1.5)}
        assert row["images_per_second"] == {"before": 10.0, "after": 15.0}
        assert row["preprocess_share"]["after"] == 0.25
        assert row["latency_ms"]["after"] == {"p50": 1.0, "p99": 3.0}
        assert row["cpu_ms"]["before"]["decoder"] == 5.0


def test_photographs_are_as_large_as_asked_for(bench):
    found = bench("serving_pipeline").photographs((320, 200))
    assert len(found) > 3
    for request in found:
        assert request.shape == (1, 1)
        assert Image.open(io.BytesIO(request.item())).size == (320, 200)
