"""``build`` of several image sizes: what is asked for, said and refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from tome_export import build as build_package
from tome_export.artifact import Artifact


@pytest.fixture
def asked(monkeypatch, built):
    """Requests that would have been built; each gives the same artifact."""
    requests = []

    def build_sizes(given, _progress):
        requests.extend(given)
        return tuple(Artifact.open(built) for _ in given)

    monkeypatch.setattr(build_package, "build_sizes", build_sizes)
    return requests


def test_each_size_has_the_r_of_its_tokens(run, asked):
    ran = run("build", "vit_digits", "--image-size", "32,24x48,16")
    assert ran.code == 0
    assert [str(one.image_size) for one in asked] == ["32x32", "24x48", "16x16"]
    # Four fifths of the tokens over six layers; the first is measured.
    assert [str(one.schedule) for one in asked] == [f"r={r} constant" for r in (8, 9, 2)]
    assert {one.output for one in asked} == {Path("vit_digits-32x32-24x48-16x16-fp32")}


def test_one_r_is_for_all(run, asked):
    ran = run("build", "vit_digits", "--image-size", "32,16", "--r", "3", "--fp16")
    assert ran.code == 0
    assert [str(one.schedule) for one in asked] == ["r=3 constant"] * 2
    assert {one.output for one in asked} == {Path("vit_digits-32x32-16x16-r3-fp16")}


def test_result(run, asked, built):
    ran = run("build", "vit_digits", "--image-size", "32,16", "-o", "out", "--json")
    assert [one["artifact"] for one in ran.json["artifacts"]] == [str(built)] * 2
    assert ran.json["shared_bytes"] == 0
    assert ran.json["artifacts"][0]["manifest"]["model"]["name"] == "vit_digits"
    ran = run("build", "vit_digits", "--image-size", "32,16", "-o", "out")
    assert ran.out.count("Artifact: ") == 2
    assert ran.out.splitlines()[-1] == "Weights of all 2 sizes in one file: 0 bytes"
    assert len(asked) == 4


@pytest.mark.parametrize(
    ("sizes", "code", "error"),
    [
        ("32,32x32", 2, "image size 32x32 is given twice; give each size once"),
        ("32,", 3, "image size is ''; expected HEIGHTxWIDTH in pixels, such as 448x224, or one n"),
        ("32;16", 3, "image size is '32;16'; expected HEIGHTxWIDTH in pixels"),
    ],
)
def test_sizes_that_are_none(run, tmp_path, sizes, code, error):
    ran = run("build", "vit_digits", "--image-size", sizes, "--engine", "none", "-o", "out")
    assert (ran.code, ran.out) == (code, "")
    assert ran.error.startswith(error)
    assert not [*tmp_path.glob("*out*")]


def test_an_artifact_that_is_there_is_not_replaced(run, artifact):
    ran = run("build", "vit_digits", "--image-size", "32,16", "--engine", "none", "-o", artifact)
    assert (ran.code, ran.out) == (3, "")
    assert ran.error == f"{artifact} exists; give another directory, or --force to replace it"
    assert Artifact.open(artifact)
