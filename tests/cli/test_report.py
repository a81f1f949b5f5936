"""``tome-export report``: what it prints, writes and refuses."""

from __future__ import annotations

import json

import pytest

from tome_export.artifact import Artifact, write_json
from tome_export.models.recipe import DATA


def test_it_goes_into_the_artifact(run, artifact):
    ran = run("report", artifact, DATA / "digit.png", "--samples", "1")
    assert ran.code == 0, ran.err
    assert ran.err == "Verify the artifact\nFind the merged tokens\nWrite the page\n"
    assert ran.out.splitlines()[:-1] == [
        "Not in it yet: Latency and throughput; tome-export bench artifact",
        "Not in it yet: Accuracy; tome-export eval artifact --data FOLDER",
        "Not in it yet: Pareto front; tome-export tune vit_digits",
    ]
    assert ran.out.splitlines()[-1].startswith(f"Report: {artifact / 'report.html'}, ")
    text = (artifact / "report.html").read_text()
    assert "digit.png" in text
    before = Artifact.open(artifact).manifest["files"]["report.html"]
    assert run("report", artifact, DATA / "digit.png", "--samples", "1").code == 0
    assert Artifact.open(artifact).manifest["files"]["report.html"] == before


def test_elsewhere_it_leaves_the_artifact_as_it_is(run, artifact, tmp_path):
    before = (artifact / "build.json").read_bytes()
    found = run("report", artifact, "-o", "page.html", "--json").json
    assert found["report"] == str(tmp_path / "page.html")
    assert found["bytes"] == (tmp_path / "page.html").stat().st_size
    assert len(found["pictures"]) == 4
    assert found["note"] is None
    assert found["random_weights"] is False
    assert (artifact / "build.json").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["artifact", "page.html"]


def test_random_weights_are_said(run, built_random):
    ran = run("report", built_random, "-o", "page.html", "--samples", "0")
    assert ran.out.startswith("RANDOM WEIGHTS: ")


BAD = {
    "negative": (("--samples", "-1"), 2, "samples are -1; expected 0 or more"),
    "too many": (
        ("--samples", "13"),
        2,
        "13 images were asked for; a page shows at most 12, give fewer or lower --samples",
    ),
    "no such image": (
        ("none.png",),
        3,
        "image none.png does not exist; expected an image file",
    ),
    "a folder": (
        ("-o", "."),
        3,
        ". is a folder; give a file for the page, such as report.html",
    ),
    "no such folder": (
        ("-o", "none/page.html"),
        3,
        "none does not exist; make it, or give another file",
    ),
    "over the model": (
        ("-o", "artifact/model.onnx"),
        3,
        "artifact/model.onnx is inside the artifact, where the page is called report.html; leave "
        "out --output, or give a file elsewhere",
    ),
}


@pytest.mark.parametrize(("options", "code", "message"), BAD.values(), ids=BAD)
def test_what_is_refused(run, artifact, options, code, message):
    before = (artifact / "model.onnx").read_bytes()
    ran = run("report", artifact, *options)
    assert (ran.code, ran.error) == (code, message)
    assert (artifact / "model.onnx").read_bytes() == before
    assert not (artifact / "report.html").exists()


def test_a_report_that_cannot_be_read_is_one_line(run, artifact):
    draft = artifact / ".bench.json.partial"
    write_json(draft, {"rows": []})
    Artifact.open(artifact).with_files({}, {"bench.json": draft})
    ran = run("report", artifact, "--json")
    assert ran.code == 3
    assert ran.json["error"]["message"] == (
        f"{artifact / 'bench.json'} has no against; run 'tome-export bench' of this version again"
    )
    assert json.loads((artifact / "build.json").read_text())["files"].keys() == {
        "bench.json",
        "model.onnx",
        "parity.json",
    }
