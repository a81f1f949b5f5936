"""Artifacts of one model at several image sizes: all or none, and their weights stored once."""

from __future__ import annotations

import json
import shutil

import numpy as np
import onnx
import onnxruntime
import pytest

from tome_export.artifact import Artifact
from tome_export.build import BuildRequest, build, build_sizes
from tome_export.build import main as build_main
from tome_export.errors import InputError, UsageError
from tome_export.merge.schedule import Schedule
from tome_export.onnx.files import load
from tome_export.parity.main import CheckRequest, check
from tome_export.spec import BatchRange, ImageSize

SIZES = ("32", "24x40", "16")


def requests(output, *sizes, **options):
    common = {"engine": "none", "batch": BatchRange(1, 2, 4), "schedule": Schedule(4), **options}
    return [
        BuildRequest("vit_digits", output, image_size=size and ImageSize.parse(size), **common)
        for size in sizes
    ]


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    return tmp_path_factory.mktemp("sizes") / "digits"


@pytest.fixture(scope="module")
def built(output):
    return build_sizes(requests(output, *SIZES))


def test_each_is_an_artifact_by_itself(built, output):
    assert sorted(path.name for path in output.iterdir()) == ["16x16", "24x40", "32x32"]
    assert [path.name for path in output.parent.iterdir()] == [output.name]
    for artifact, size in zip(built, SIZES, strict=True):
        opened = Artifact.open(artifact.path)
        assert opened.manifest == artifact.manifest
        assert opened.manifest.preprocessing.image_size == ImageSize.parse(size)
        assert opened.manifest.parity.passed


def test_weights_are_stored_once_and_positions_in_each_model(built):
    data = [artifact.path / "model.onnx.data" for artifact in built]
    assert len({path.stat().st_ino for path in data}) == 1
    stored = data[0].stat().st_size
    weights = {}
    for artifact in built:
        own = {t.name: t for t in load(artifact.model_path, weights=False).graph.initializer}
        inside = {t.name for t in own.values() if t.data_location != onnx.TensorProto.EXTERNAL}
        large = [name for name in inside if own[name].ByteSize() > 1024]
        # The embeddings of positions, and the class token's, which timm adds to its own.
        assert len(large) <= 2, large
        assert artifact.model_path.stat().st_size < stored / 2
        weights[artifact.path.name] = artifact.manifest.model.weights
    assert len({one.state_sha256 for one in weights.values()}) == len(SIZES)
    assert len({one.common_sha256 for one in weights.values()}) == 1


def test_a_copy_of_one_and_one_built_alone_compute_the_same(built, tmp_path):
    (alone,) = requests(tmp_path / "alone", "24x40", check=False)
    build(alone)
    shutil.copytree(built[1].path, tmp_path / "copy")
    pixels = np.random.default_rng(0).standard_normal((3, 1, 24, 40), dtype=np.float32)
    answers = [
        onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"]).run(
            None, {"pixel_values": pixels}
        )[0]
        for folder in (built[1].path, tmp_path / "copy", tmp_path / "alone")
    ]
    np.testing.assert_array_equal(answers[0], answers[1])
    np.testing.assert_array_equal(answers[0], answers[2])
    # A file of one name is what ONNX's own tools take.
    onnx.checker.check_model(tmp_path / "copy" / "model.onnx", full_check=True)


def test_it_can_be_checked_again(built):
    assert check(CheckRequest(built[1].path, backends=("ort-cpu",))).passed


@pytest.mark.parametrize(
    ("sizes", "error", "message"),
    [
        (("32", "24x40", "32x32"), UsageError, "image size 32x32 is given twice"),
        (("32", None), UsageError, "no image size is given; expected one or more, such as"),
        (("32", "33"), InputError, "33x33"),
    ],
)
def test_sizes_that_cannot_be_are_refused_before_anything_is_built(
    sizes, error, message, tmp_path, monkeypatch
):
    monkeypatch.setattr(build_main, "_model_and_engine", None)
    with pytest.raises(error, match=message):
        build_sizes(requests(tmp_path / "out", *sizes))
    assert [*tmp_path.iterdir()] == []


def test_a_schedule_file_is_for_one_size_and_that_is_said_before_anything_is_built(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(build_main, "_model_and_engine", None)
    file = tmp_path / "tuned.json"
    values = {"format": 1, "model": "vit_digits", "schedule": [4] * 6, "image_size": "32x32"}
    file.write_text(json.dumps(values))
    given = requests(tmp_path / "out", "32", "16", schedule=None, schedule_file=file)
    with pytest.raises(InputError, match=r"is for images of 32x32, and vit_digits takes 16x16"):
        build_sizes(given)


def test_one_that_fails_leaves_nothing_of_the_others(built, tmp_path, monkeypatch):
    def made(folder, *_):
        if folder.name != "32x32":
            raise InputError("the second cannot be built")
        shutil.copytree(built[0].path, folder, dirs_exist_ok=True)
        return built[0].manifest

    monkeypatch.setattr(build_main, "_model_and_engine", made)
    with pytest.raises(InputError, match="the second cannot be built"):
        build_sizes(requests(tmp_path / "out", "32", "24x40"))
    assert [*tmp_path.iterdir()] == []


def test_what_is_there_is_replaced_only_if_it_is_ours(built, tmp_path, monkeypatch):
    by_size = {artifact.path.name: artifact for artifact in built}

    def made(folder, *_):
        shutil.copytree(by_size[folder.name].path, folder, dirs_exist_ok=True)
        return by_size[folder.name].manifest

    monkeypatch.setattr(build_main, "_model_and_engine", made)
    out = tmp_path / "out"

    def put(*sizes, **options):
        build_sizes(requests(out, *sizes, **options))
        return sorted(path.name for path in out.iterdir())

    shutil.copytree(built[0].path, out)
    with pytest.raises(InputError, match="exists; give another directory, or --force"):
        put("32", "16")
    assert put("32", "16", force=True) == ["16x16", "32x32"]
    assert put("24x40", "16", force=True) == ["16x16", "24x40"]
    (single,) = requests(out, "16", force=True)
    with pytest.raises(InputError, match=r"image sizes \(16x16, 24x40\), which a single one would"):
        build(single)
    (out / "16x16" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"holds what is not of the artifact \(notes.txt\)"):
        put("32", "16", force=True)
    (out / "16x16" / "notes.txt").rename(out / "notes.txt")
    with pytest.raises(InputError, match="is not an artifact"):
        put("32", "16", force=True)
    assert (out / "notes.txt").read_text() == "mine"
    assert Artifact.open(out / "24x40").manifest.parity.passed


@pytest.mark.usefixtures("built")
def test_the_folder_of_sizes_is_no_artifact_and_that_is_said(output):
    with pytest.raises(InputError, match=r"give one of .*16x16, .*24x40, .*32x32 that 'tome-exp"):
        Artifact.open(output)
