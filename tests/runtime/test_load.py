"""``tome_export.load``: an artifact as a function."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
from PIL import Image

import tome_export
from tome_export.artifact import Artifact
from tome_export.artifact.manifest import EngineInfo
from tome_export.build import BuildRequest, build
from tome_export.errors import ExportError, InputError, MissingComponentError, UsageError
from tome_export.merge.schedule import Schedule
from tome_export.models import RECIPES
from tome_export.models.facts import DATA
from tome_export.runtime import load, registry
from tome_export.runtime.model import reference_model
from tome_export.spec import BatchRange

DIGIT = DATA / "digit.png"


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    request = BuildRequest(
        "vit_digits",
        tmp_path_factory.mktemp("load") / "digits",
        schedule=Schedule(8),
        batch=BatchRange(1, 2, 4),
        engine="none",
        check=False,
    )
    return build(request)


@pytest.mark.parametrize("count", [1, 3, 4, 9])
def test_it_gives_what_pytorch_gives(digits, count):
    import torch

    images = np.random.default_rng(0).standard_normal((count, 1, 32, 32), dtype=np.float32)
    with tome_export.load(digits.path) as model:
        found = model.run(images)
    assert list(found) == ["logits"]
    reference, _ = reference_model(digits)
    with torch.inference_mode():
        expected = reference(torch.from_numpy(images)).numpy()
    np.testing.assert_allclose(found["logits"], expected, atol=1e-4)


def test_a_wrong_shape_is_said(digits):
    with pytest.raises(InputError, match="pixel_values"):
        tome_export.load(str(digits.path)).run(np.zeros((1, 3, 32, 32), np.float32))


@pytest.mark.parametrize("backend", ["torch", "abacus"])
def test_what_runs_no_artifact_is_refused(digits, backend):
    with pytest.raises(UsageError, match=backend):
        tome_export.load(digits.path, backend)


def test_a_backend_that_is_missing_is_said(digits, monkeypatch):
    monkeypatch.setattr(type(registry.backend_of("ort-cuda")), "missing", lambda _: "no GPU here")
    with pytest.raises(MissingComponentError, match="no GPU here"):
        tome_export.load(digits.path, "ort-cuda")


def test_no_artifact_is_said(tmp_path):
    with pytest.raises(InputError, match="is not an artifact"):
        tome_export.load(tmp_path)


def test_no_image_is_said(digits):
    with pytest.raises(InputError, match="holds no image"):
        tome_export.load(digits.path).run(np.zeros((0, 1, 32, 32), np.float32))


@pytest.fixture(scope="module")
def expected(digits):
    """Logits ``[1, 10]`` of the digit that comes along, by timm's transform and PyTorch."""
    import torch
    from timm.data import create_transform

    recipe = RECIPES["vit_digits"].preprocessing
    transform = create_transform(
        recipe.input_size,
        mean=recipe.mean,
        std=recipe.std,
        crop_pct=recipe.crop_pct,
        interpolation=recipe.interpolation,
    )
    model, _ = reference_model(digits)
    with Image.open(DIGIT) as image, torch.inference_mode():
        return model(transform(image.convert("L"))[None]).numpy()


@pytest.mark.parametrize("backend", ["ort-cpu", "openvino"])
def test_images_of_every_kind_give_what_timm_and_pytorch_give(digits, expected, backend):
    if (reason := registry.backend_of(backend).missing()) is not None:
        pytest.skip(reason)
    with Image.open(DIGIT) as opened:
        image = opened.convert("L")
    given = [DIGIT, str(DIGIT), image, np.asarray(image), np.asarray(image.convert("RGB"))]
    with tome_export.load(digits.path, backend) as model:
        found = model(given, top=3)
        alone = [model(one) for one in given]
    assert found.kind == "classes"
    np.testing.assert_allclose(found.values, np.repeat(expected, 5, axis=0), atol=1e-4)
    probabilities = np.exp(expected[0]) / np.exp(expected[0]).sum()
    best = np.argsort(-probabilities)
    for labels in (*found.labels, *(one.labels[0] for one in alone)):
        count = len(labels)
        assert [label.index for label in labels] == best[:count].tolist()
        assert [label.label for label in labels] == [str(index) for index in best[:count]]
        np.testing.assert_allclose(
            [x.score for x in labels], probabilities[best[:count]], atol=1e-5
        )
    assert [len(one.labels[0]) for one in alone] == [5] * 5
    with pytest.raises(UsageError, match=r"gives logits, no features; read \.labels or \.values"):
        _ = found.features


def test_an_image_in_memory_is_held_as_its_file_is(digits, tmp_path):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 64), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(tmp_path / "turned.png", exif=exif)
    with tome_export.load(digits.path) as model, Image.open(tmp_path / "turned.png") as opened:
        found = model([tmp_path / "turned.png", opened, picture.transpose(Image.ROTATE_270)]).values
        assert not np.allclose(found[0], model(picture).values[0], atol=1e-3)
    np.testing.assert_array_equal(found[1:], found[[0, 0]])


EXPECTED = (
    "expected a path, a PIL image, or uint8 [H, W, 3] or [H, W], each image by itself; "
    "preprocessed pixels are for run()"
)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (np.zeros((1, 32, 32), np.float32), f"image 1 is an array float32 [1, 32, 32]; {EXPECTED}"),
        (
            [DIGIT, np.zeros((9, 9, 4), np.uint8)],
            f"image 2 is an array uint8 [9, 9, 4]; {EXPECTED}",
        ),
        (b"bytes", f"image 1 is of type bytes; {EXPECTED}"),
        (None, f"image 1 is of type NoneType; {EXPECTED}"),
        (np.zeros((0, 5), np.uint8), "image 1 has no pixels; expected one or more each way"),
        ([], "no images given; expected one or more"),
        ("nowhere.png", "image nowhere.png does not exist; expected an image file"),
    ],
)
def test_what_is_no_image_is_refused(digits, given, message):
    with tome_export.load(digits.path) as model, pytest.raises(InputError) as caught:
        model(given)
    assert str(caught.value) == message


def test_logits_that_are_not_finite_have_no_labels(digits):
    logits = np.zeros((3, 10), np.float32)
    logits[1, 4] = np.inf
    found = load.Predictions(digits.manifest, {"logits": logits}, 5)
    with pytest.raises(ExportError, match=r"^the model's logits of image 2 are not finite; build"):
        _ = found.labels
    with tome_export.load(digits.path) as model, pytest.raises(UsageError, match=r"^top is 0; "):
        model(DIGIT, top=0)


class Counting:
    """A runner that remembers the sizes of its batches."""

    def __init__(self):
        self.sizes = []

    def infer(self, inputs):
        self.sizes.append(len(inputs["pixel_values"]))
        return {"logits": inputs["pixel_values"][:, 0, 0, :10]}


def test_engines_are_asked_in_batches_that_they_take(digits, monkeypatch):
    """An engine may take fewer sizes than the model that it is built from."""
    backend = "tensorrt-rtx"
    monkeypatch.setattr(type(registry.backend_of(backend)), "missing", lambda _: None)
    with pytest.raises(InputError, match=f"has no {backend} engine; build one with"):
        tome_export.load(digits.path, backend)
    two = BatchRange(2, 2, 2)
    engine = EngineInfo.model_construct(file="e", version_compatible=False, batch=two)
    manifest = digits.manifest.model_copy(update={"engines": {backend: engine}})
    assert manifest.batch_on(backend) == two
    assert manifest.batch_on("ort-cpu") == BatchRange(1, 2, 4)
    counting = Counting()
    monkeypatch.setattr(Artifact, "open", lambda path: Artifact(path, manifest))
    monkeypatch.setattr(load, "open_runner", lambda *_: contextlib.nullcontext(counting))
    found = tome_export.load(digits.path, backend).run(np.zeros((5, 1, 32, 32), np.float32))
    assert (counting.sizes, len(found["logits"])) == ([2, 2, 2], 5)
