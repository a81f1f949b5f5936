"""LLaVA's tower from the checkpoint to the artifact, and back."""

from __future__ import annotations

import json
import shutil
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

from tome_export.build import BuildRequest, build
from tome_export.errors import InputError
from tome_export.merge.schedule import Schedule
from tome_export.parity.main import CheckRequest, check
from tome_export.runtime.model import reference_model, rescheduled
from tome_export.spec import TowerOptions

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, make_llava) -> Any:
    folder = tmp_path_factory.mktemp("llava") / "checkpoint"
    make_llava(folder)
    return folder


@pytest.fixture(scope="module")
def built(checkpoint) -> Any:
    options = TowerOptions("llava", select_feature="cls_patch", projector=True)
    request = BuildRequest(
        f"hf:{checkpoint}",
        checkpoint.parent / "built",
        schedule=Schedule(11),
        tower=options,
        precision="fp16",
        engine="none",
    )
    return build(request)


def test_the_manifest_tells_the_language_model_what_it_gets(built):
    manifest = built.manifest
    assert manifest.tower.model_dump(mode="json") == {
        "kind": "llava",
        "select_layer": -2,
        "select_feature": "cls_patch",
        "projector": True,
        "tokens": 64 - 3 * 11 + 1,
        "width": 48,
        "grid": [8, 8],
    }
    assert manifest.output.model_dump(mode="json") == {
        "name": "features",
        "dtype": "float32",
        "shape": ["batch", 32, 48],
    }
    assert manifest.parity.passed
    assert manifest.model.family == "llava"


def test_onnx_gives_the_merged_towers_features(built):
    merged, _ = reference_model(built)
    images = np.random.default_rng(3).standard_normal((2, 3, 32, 32), dtype=np.float32)
    session = onnxruntime.InferenceSession(built.model_path, providers=["CPUExecutionProvider"])
    (features,) = session.run(["features"], {"pixel_values": images})
    assert features.shape == (2, 32, 48)
    with torch.no_grad():
        expected = merged.half()(torch.from_numpy(images).half()).float().numpy()
    # Where fp16 decides otherwise, tokens stand elsewhere; the class token is always the first.
    assert np.abs(features[:, 0] - expected[:, 0]).max() <= 0.05 * np.abs(expected).max()


def test_check_makes_the_same_tower_again(built):
    assert check(CheckRequest(built.path, backends=("ort-cpu",))).passed
    merged, recipe = reference_model(built)
    assert recipe.tower == TowerOptions("llava", -2, "cls_patch", True)
    plain = rescheduled(merged, Schedule(0))
    images = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(plain(images), plain.library(images))


def test_another_checkpoint_is_noticed(built, checkpoint, tmp_path):
    kept = tmp_path / "kept"
    shutil.copytree(checkpoint, kept)
    try:
        config = json.loads((checkpoint / "config.json").read_text())
        (checkpoint / "config.json").write_text(json.dumps({**config, "hidden_size": 64}))
        with pytest.raises(InputError, match=r"mm_projector.0.weight: got \[48, 32\]"):
            reference_model(built)
    finally:
        shutil.copytree(kept, checkpoint, dirs_exist_ok=True)


@pytest.mark.parametrize(
    ("layout", "config", "why"),
    [
        ("llava", {"image_aspect_ratio": "anyres"}, "image_aspect_ratio of {} is 'anyres'"),
        ("transformers", {"model_type": "llava_next"}, "model type of {} is llava_next (anyres)"),
    ],
)
def test_a_language_model_that_needs_the_grid_gets_dense_features(
    make_llava, tmp_path, layout, config, why
):
    folder = tmp_path / "checkpoint"
    make_llava(folder, layout, **config)
    request: dict[str, Any] = {
        "model": f"hf:{folder}",
        "schedule": Schedule(11),
        "engine": "none",
        "check": False,
    }
    with pytest.raises(InputError) as failure:
        build(BuildRequest(output=tmp_path / "a", **request))
    assert str(failure.value) == (
        f"{why.format(folder)}: its language model arranges the features of all patches on a "
        "grid, which merged tokens are not; use --dense (merged inside, then unmerged)"
    )
    assert not (tmp_path / "a").exists()
    artifact = build(BuildRequest(output=tmp_path / "b", dense=True, **request))
    assert artifact.manifest.tower.tokens == 64
    assert artifact.manifest.output.shape == ("batch", 64, 32)
