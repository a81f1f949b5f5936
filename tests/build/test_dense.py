"""Dense outputs and source maps through a real build: exact in ONNX, in engines, and as served."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

from tome_export.build import BuildRequest, build
from tome_export.data.samples import sample_pixels
from tome_export.merge.schedule import Schedule
from tome_export.parity.main import CheckRequest, check
from tome_export.runtime.model import reference_model
from tome_export.serve.main import ServeOptions, ServeRequest, serve
from tome_export.spec import BatchRange

DINOV2 = """
import torch
import timm
from tome_export.models.recipe import wake_constants

def made():
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_small_patch14_reg4_dinov2",
        img_size=56, patch_size=7, embed_dim=64, depth=3, num_heads=2,
    )
    wake_constants(model)
    return model.eval()
"""
R = 9
BATCH = BatchRange(1, 2, 4)


@pytest.fixture(scope="module", params=["DINOv2", "LLaVA"])
def model(request, tmp_path_factory, make_llava) -> Any:
    folder = tmp_path_factory.mktemp("dense")
    if request.param == "LLaVA":
        pytest.importorskip("transformers")
        make_llava(folder / "checkpoint")
        yield folder, f"hf:{folder / 'checkpoint'}"
        return
    name = "dense_models"
    (folder / f"{name}.py").write_text(DINOV2)
    with pytest.MonkeyPatch.context() as patched:
        patched.syspath_prepend(folder)
        yield folder, f"{name}:made"


@pytest.fixture(scope="module")
def built(model) -> Any:
    folder, name = model
    return build(
        BuildRequest(
            name,
            folder / "fp32",
            schedule=Schedule(R),
            dense=True,
            source_map=True,
            engine="none",
            batch=BATCH,
        )
    )


def images_of(artifact: Any, count: int = 3) -> Any:
    shape = artifact.manifest.input.shape[1:]
    return np.random.default_rng(5).standard_normal((count, *shape), dtype=np.float32)


def run_onnx(artifact: Any, images: Any) -> list[Any]:
    session = onnxruntime.InferenceSession(artifact.model_path, providers=["CPUExecutionProvider"])
    return session.run(["features", "source_map"], {"pixel_values": images})


def groups_are_constant(features: Any, mapping: Any) -> bool:
    return all(
        (image[row == group] == image[row == group][0]).all()
        for image, row in zip(features, mapping, strict=True)
        for group in np.unique(row)
    )


def test_the_manifest_describes_both_outputs(built):
    patches = built.manifest.outputs[0].shape[1]
    assert [(o.name, o.dtype, o.shape[0]) for o in built.manifest.outputs] == [
        ("features", "float32", "batch"),
        ("source_map", "int32", "batch"),
    ]
    assert built.manifest.outputs[1].shape == ("batch", patches) == ("batch", 64)
    assert built.manifest.parity.passed


def test_onnx_unmerges_exactly(built):
    images = images_of(built)
    features, mapping = run_onnx(built, images)
    assert mapping.dtype == np.int32
    assert groups_are_constant(features, mapping)
    merged, _ = reference_model(built)
    with torch.no_grad():
        expected, expected_map = merged(torch.from_numpy(images))
    assert np.array_equal(mapping, expected_map.numpy())
    assert np.abs(features - expected.numpy()).max() <= 1e-4 * np.abs(features).max()
    left = merged.layers[-1].tokens_out - merged.prefix
    assert [len(np.unique(row)) for row in mapping] == [left] * len(images)


def test_check_finds_the_same_model(built):
    result = check(CheckRequest(built.path, backends=("ort-cpu",)))
    assert result.passed


def test_r_0_is_the_plain_model(model):
    folder, name = model
    request = BuildRequest(
        name, folder / "plain", schedule=Schedule(0), dense=True, engine="none", check=False
    )
    artifact = build(request)
    images = images_of(artifact)
    merged, _ = reference_model(artifact)
    with torch.no_grad():
        expected = merged.library(torch.from_numpy(images)).numpy()
    session = onnxruntime.InferenceSession(artifact.model_path, providers=["CPUExecutionProvider"])
    (features,) = session.run(["features"], {"pixel_values": images})
    assert np.abs(features - expected).max() <= 1e-5 * np.abs(expected).max()


def test_half_precision_with_an_engine_and_served(model, tmp_path):
    """fp16 passes parity, TensorRT-RTX takes both outputs, and so does a model repository."""
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    _, name = model
    artifact = build(
        BuildRequest(
            name,
            tmp_path / "half",
            schedule=Schedule(R),
            precision="fp16",
            dense=True,
            source_map=True,
            engine="tensorrt-rtx",
            batch=BATCH,
        )
    )
    manifest = artifact.manifest
    assert manifest.parity.passed
    engine = manifest.engines["tensorrt-rtx"]
    assert [(o.name, o.dtype) for o in engine.outputs] == [
        ("features", "float32"),
        ("source_map", "int32"),
    ]
    features, mapping = run_onnx(artifact, images_of(artifact))
    assert groups_are_constant(features, mapping)
    served = serve(ServeRequest((artifact.path,), tmp_path / "repository", ServeOptions()))
    config = tmp_path / "repository" / served.models[0].name / "config.pbtxt"
    text = " ".join(config.read_text().split())
    width = manifest.outputs[0].shape[2]
    assert f'name: "features" data_type: TYPE_FP32 dims: 64 dims: {width} ' in text
    assert 'name: "source_map" data_type: TYPE_INT32 dims: 64 }' in text


def test_sample_images_merge_alike_in_both(built):
    """On images rather than noise the map is that of PyTorch too."""
    merged, recipe = reference_model(built)
    images = sample_pixels(recipe, 2)
    mapping = run_onnx(built, images)[1]
    with torch.no_grad():
        assert np.array_equal(mapping, merged(torch.from_numpy(images))[1].numpy())
