"""Models of one logit and of numbers, from a function through build, eval, tune and serve."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import small_vit
from tome_export.artifact.goal import Goal
from tome_export.build import BuildRequest, build
from tome_export.cascade.main import members_of
from tome_export.errors import InputError
from tome_export.evaluate.main import EvalRequest, evaluate
from tome_export.merge.schedule import Schedule
from tome_export.serve.config import ServeOptions
from tome_export.serve.ensemble import pipeline_folders
from tome_export.tune.main import TuneRequest, tune


@pytest.fixture
def images(tmp_path):
    """Twelve noisy images in two class folders, dark and bright."""
    random = np.random.default_rng(0)
    for number in range(12):
        level = 60 + 130 * (number % 2)
        folder = tmp_path / "images" / ("bright" if number % 2 else "a_dark")
        folder.mkdir(parents=True, exist_ok=True)
        pixels = random.integers(level - 50, level + 50, (32, 32, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return tmp_path / "images"


@pytest.fixture
def function(monkeypatch):
    def named(**more):
        monkeypatch.setitem(
            sys.modules, "own_scores", SimpleNamespace(make=lambda: small_vit(depth=2, **more))
        )
        return "own_scores:make"

    return named


def built(folder, name, r=3, **more):
    request = {"model": name, "engine": "none", "schedule": Schedule(r), "check": False, **more}
    return build(BuildRequest(output=folder, **request))


def test_one_logit_from_build_to_serve(tmp_path, function, images, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    name = function(num_classes=1)
    artifact = built(tmp_path / "one", name)
    manifest = artifact.manifest
    assert (manifest.output.shape, manifest.activation) == (("batch", 1), "sigmoid")
    assert manifest.form.note == "the model has a head of 1 output"
    found = evaluate(EvalRequest(artifact.path, (str(images),), against=("unmerged",))).evaluation
    model = small_vit(depth=2, num_classes=1)
    from tome_export.data.preprocess import load_images

    paths = sorted(images.rglob("*.png"))
    with torch.no_grad():
        logits = model(torch.from_numpy(load_images(paths, manifest.preprocessing)))[:, 0]
    labels = np.array([path.parent.name == "bright" for path in paths])
    rows = {row.name: row for row in found.candidates}
    assert found.classes == 2
    apart = rows["merged"].deviation_from_unmerged
    assert apart.spread == pytest.approx(float(logits.double().sigmoid().std(correction=0)), 1e-4)
    assert 0 < apart.mean < apart.max
    assert rows["unmerged"].top1.correct == int(((logits > 0).numpy() == labels).sum())
    folders = pipeline_folders(artifact, "one", ServeOptions())
    settings = json.loads(folders[1].files["1/postprocessing.json"])
    assert settings == {"k": 1, "labels": ["0"], "activation": "sigmoid"}


def test_what_has_no_one_class_makes_no_cascade(tmp_path, function):
    name = function(num_classes=3)
    paths = [built(tmp_path / str(r), name, r).path for r in (1, 3)]
    assert len(members_of(paths)) == 2
    manifest = paths[0] / "build.json"
    text = manifest.read_text()
    for activation, message in (
        ("none", "gives a regression's numbers, and a cascade is calibrated by"),
        ("sigmoid", "gives a yes or no for each of several classes"),
    ):
        changed = text.replace('"activation": "softmax"', f'"activation": "{activation}"')
        assert changed != text
        manifest.write_text(changed)
        with pytest.raises(InputError, match=message):
            members_of(paths)


def test_numbers_are_compared_by_how_far_they_are(tmp_path, function, images, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    name = function(num_classes=2)
    artifact = built(tmp_path / "numbers", name, activation="none")
    assert artifact.manifest.form.note == "--activation none"
    found = evaluate(EvalRequest(artifact.path, (str(images),))).evaluation
    assert (found.classes, found.data.labelled) == (None, False)
    assert any("labels are not used" in note for note in found.data.notes)
    rows = {row.name: row for row in found.candidates}
    far, same = rows["merged"], rows["torch"]
    assert 0 < far.deviation_from_unmerged.mean <= far.deviation_from_unmerged.max
    assert far.deviation_from_unmerged.max == pytest.approx(
        same.deviation_from_unmerged.max, rel=1e-2
    )
    assert far.top1 is far.agreement_with_unmerged is far.cosine_to_unmerged is None
    request = TuneRequest(name, Goal.target_macs("90%"), tmp_path / "s.json", activation="none")
    with pytest.raises(InputError, match=r"gives numbers \(a regression\), not classes to count"):
        tune(request)


def test_tokens_without_pooling_are_compared_patch_by_patch_only(tmp_path, function, images):
    artifact = built(tmp_path / "tokens", function(global_pool=""))
    assert (artifact.manifest.output.name, artifact.manifest.activation) == ("features", None)
    with pytest.raises(InputError, match="do not compare; build it with --dense"):
        evaluate(EvalRequest(artifact.path, (str(images),)))
