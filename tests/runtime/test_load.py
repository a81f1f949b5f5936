"""``tome_export.load``: an artifact as a function."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest

import tome_export
from tome_export.artifact import Artifact
from tome_export.artifact.manifest import EngineInfo
from tome_export.build import BuildRequest, build
from tome_export.errors import InputError, MissingComponentError, UsageError
from tome_export.merge.schedule import Schedule
from tome_export.runtime import load, registry
from tome_export.runtime.model import reference_model
from tome_export.spec import BatchRange


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
        found = model(images)
    assert list(found) == ["logits"]
    reference, _ = reference_model(digits)
    with torch.inference_mode():
        expected = reference(torch.from_numpy(images)).numpy()
    np.testing.assert_allclose(found["logits"], expected, atol=1e-4)


def test_a_wrong_shape_is_said(digits):
    with pytest.raises(InputError, match="pixel_values"):
        tome_export.load(str(digits.path))(np.zeros((1, 3, 32, 32), np.float32))


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
        tome_export.load(digits.path)(np.zeros((0, 1, 32, 32), np.float32))


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
    found = tome_export.load(digits.path, backend)(np.zeros((5, 1, 32, 32), np.float32))
    assert (counting.sizes, len(found["logits"])) == ([2, 2, 2], 5)
