"""``tome-export inspect``: what it prints, what it writes, and what it refuses."""

from __future__ import annotations

import json
import re
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from tome_export.models.facts import DATA

DIGIT = DATA / "digit.png"


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def pixels(file):
    with Image.open(file) as image:
        return np.asarray(image)


def test_the_last_layer_by_default(run, built, tmp_path):
    ran = run("inspect", built, DIGIT)
    assert ran.code == 0
    output = tmp_path / "digits-inspect"
    assert names(tmp_path) == ["digits-inspect"]
    assert names(output) == ["digit-layer05.png", "inspect.json"]
    header, row, *rest = ran.out.splitlines()
    assert header.split() == ["file", "layer", "tokens", "groups", "largest", "group"]
    assert re.fullmatch(r"digit-layer05\.png      5      17 +\d+ +\d+", row)
    assert rest == [
        "Patches: 8 x 8, of 4 x 4 pixels each; a group is a token of more than one",
        "Prefix tokens (class, distillation, registers) are not in the image: 1 of the tokens, "
        "with no patches merged into them",
        f"Pictures: {output}",
    ]
    assert pixels(output / "digit-layer05.png").shape == (448, 448, 3)
    assert ran.err.splitlines() == ["Verify the artifact", "Run vit_digits on 1 image", "Draw"]


def test_all_layers_as_svg_and_json(run, built_random, tmp_path):
    other = tmp_path / "b" / "digit.png"
    other.parent.mkdir()
    Image.fromarray(np.full((40, 60), 90, np.uint8)).save(other)
    options = ["--layer", "all", "--format", "svg", "-o", "out", "--size", "100", "--json"]
    ran = run("inspect", built_random, DIGIT, other, *options)
    assert ran.code == 0
    values = ran.json
    output = tmp_path / "out"
    files = [f"{stem}-layer{i:02d}.svg" for stem in ("digit", "digit-2") for i in range(6)]
    assert [picture["file"] for picture in values["pictures"]] == files
    assert names(output) == sorted([*files, "inspect.json"])
    assert [picture["layer"] for picture in values["pictures"]] == [*range(6)] * 2
    assert [picture["tokens"] for picture in values["pictures"]] == [57, 49, 41, 33, 25, 17] * 2
    assert {picture["patches_in_prefix"] for picture in values["pictures"]} == {0}
    assert values["random_weights"]
    assert values["patches"] == {"rows": 8, "cols": 8, "height": 4, "width": 4}
    for picture in values["pictures"]:
        root = ElementTree.fromstring((output / picture["file"]).read_text())  # noqa: S314
        assert len(root.findall(".//{*}path")) == picture["groups"]
        assert root.get("width") == "128"
    where = {"artifact": str(built_random), "output": str(output)}
    assert values == where | json.loads((output / "inspect.json").read_text())


def test_random_weights_are_said(run, built_random):
    assert run("inspect", built_random, DIGIT).out.startswith("RANDOM WEIGHTS: ")


def test_force_replaces_its_own_pictures_only(run, built, tmp_path):
    assert run("inspect", built, DIGIT, "-o", "out", "--layer", "all").code == 0
    output = tmp_path / "out"
    before = names(output)
    ran = run("inspect", built, DIGIT, "-o", "out")
    assert ran.code == 3
    assert ran.error == f"{output} exists; give another directory, or --force to replace it"
    assert names(output) == before
    assert run("inspect", built, DIGIT, "-o", "out", "--layer", "2", "--force").code == 0
    assert names(output) == ["digit-layer02.png", "inspect.json"]
    (output / "thesis.txt").write_text("years of work")
    ran = run("inspect", built, DIGIT, "-o", "out", "--force")
    assert ran.code == 3
    assert ran.error == (
        f"{output} holds what 'tome-export inspect' did not write (thesis.txt), which --force "
        "would delete; give another directory"
    )
    ran = run("inspect", built, DIGIT, "-o", output / "thesis.txt", "--force")
    assert ran.code == 3
    assert (output / "thesis.txt").read_text() == "years of work"
    assert names(tmp_path) == ["out"]


def test_an_artifact_that_merges_nothing(run, tmp_path):
    build = ["build", "vit_digits", "--r", "0", "--engine", "none", "--no-check", "-o", "plain"]
    assert run(*build).code == 0
    ran = run("inspect", "plain", DIGIT)
    assert ran.code == 0
    assert re.search(r"^digit-layer05\.png +5 +65 +0 +1$", ran.out, re.MULTILINE)
    assert "No layer merges: every patch is a token." in ran.out.splitlines()
    shown = pixels(tmp_path / "plain-inspect" / "digit-layer05.png")
    assert len(np.unique(shown.reshape(-1, 3), axis=0)) > 20
    assert (shown == shown[..., :1]).all()  # grey as the image is, without one outline


CASES = {
    "no image": (
        (),
        2,
        "Missing argument 'IMAGE...'; see 'tome-export inspect --help'",
    ),
    "image missing": (
        ("none.jpg",),
        3,
        "image none.jpg does not exist; expected an image file",
    ),
    "a folder": ((".",), 3, "image . is a folder; expected an image file"),
    "no image at all": (
        ("notes.jpg",),
        3,
        "image notes.jpg is not a JPEG, PNG, WEBP, GIF, BMP, PPM or TIFF file (it begins with "
        "b'not an i'); give one whole",
    ),
    "layer out of range": (
        (DIGIT, "--layer", "6"),
        3,
        "layer is 6; the model has 6 layers, give 0 to 5, all or last",
    ),
    "layer no number": (
        (DIGIT, "--layer", "first"),
        2,
        "layer is 'first'; expected a number, all or last",
    ),
    "size": ((DIGIT, "--size", "0"), 2, "size is 0; expected 1 to 8192 pixels"),
    "size too large": ((DIGIT, "--size", "9000"), 2, "size is 9000; expected 1 to 8192 pixels"),
    "format": (
        (DIGIT, "--format", "gif"),
        2,
        "Invalid value for '--format': 'gif' is not one of 'png', 'svg'; see 'tome-export inspect "
        "--help'",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input(case, run, built, tmp_path):
    arguments, code, message = CASES[case]
    (tmp_path / "notes.jpg").write_text("not an image")
    ran = run("inspect", built, *arguments)
    assert (ran.code, ran.out, ran.error) == (code, "", message)
    assert names(tmp_path) == ["notes.jpg"]


def test_no_artifact(run, tmp_path):
    ran = run("inspect", "nowhere", DIGIT)
    assert ran.code == 3
    assert ran.error == (
        f"{tmp_path / 'nowhere'} is not an artifact: it has no build.json; give the directory that "
        "'tome-export build' wrote"
    )


def test_damaged_artifact(run, artifact):
    model = artifact / "model.onnx"
    content = bytearray(model.read_bytes())
    content[1000] ^= 1
    model.write_bytes(content)
    ran = run("inspect", artifact, DIGIT)
    assert ran.code == 3
    assert ran.error == (
        f"{model} does not match the sha256 in build.json: the file is corrupted or was changed, "
        "rebuild the artifact or copy it again"
    )
