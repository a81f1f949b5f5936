"""Whole models through a real build: one fp16 graph with the head's own output, and an engine."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
import whole_models
from PIL import Image

import tome_export
from tome_export.artifact import Artifact
from tome_export.build import BuildRequest, build
from tome_export.build.engine import EngineRequest, add_engine
from tome_export.data.preprocess import load_images
from tome_export.engine import EngineOptions
from tome_export.errors import InputError
from tome_export.evaluate.main import EvalRequest, evaluate
from tome_export.merge.schedule import Schedule
from tome_export.models import resolve
from tome_export.parity.main import CheckRequest, check
from tome_export.patch import patch
from tome_export.runtime.model import reference_model
from tome_export.spec import BatchRange

SIZE, GRID = whole_models.SIZE, whole_models.GRID
OUTPUTS = {
    "depth_anything": ("predicted_depth", (SIZE, SIZE)),
    "upernet": ("logits", (7, SIZE, SIZE)),
    "on_dinov2": ("two", (2, GRID, GRID)),
}
R = 9


@pytest.fixture(scope="module", params=OUTPUTS)
def artifact(request, tmp_path_factory) -> Artifact:
    return build(
        BuildRequest(
            f"whole_models:{request.param}",
            tmp_path_factory.mktemp("whole") / "out",
            schedule=Schedule(R),
            precision="fp16",
            engine="none",
            batch=BatchRange(1, 2, 4),
        )
    )


def test_the_output_is_the_heads_own(artifact):
    manifest = artifact.manifest
    name, shape = OUTPUTS[manifest.model.name.partition(":")[2]]
    assert manifest.output_kind == "map"
    assert (manifest.output.name, manifest.output.shape) == (name, ("batch", *shape))
    assert manifest.activation is None
    assert manifest.labels == (
        tuple(f"class {index}" for index in range(7)) if name == "logits" else None
    )
    assert manifest.form.note.endswith(f"own head makes {name} of the features of all patches")
    assert manifest.parity is not None
    assert manifest.parity.passed
    assert manifest.parity.defects == 0


def test_its_numbers_are_pytorchs(artifact, make_images):
    """Against the merged model in float32, on images on which fp16 decides as float32 does."""
    model, _ = reference_model(artifact)
    images = make_images(model, 3)
    with tome_export.load(artifact.path) as loaded:
        found = loaded.run(images)[artifact.manifest.output.name]
    with torch.no_grad():
        merged = model(torch.from_numpy(images)).numpy()
        plain = model.library(torch.from_numpy(images)).numpy()
    assert found.dtype == np.float32
    assert found.shape == merged.shape == plain.shape
    error, change = np.abs(found - merged).max(), np.abs(plain - merged).max()
    assert error < change / 4
    assert error < 2e-2 * np.abs(merged).max()


def test_check_again_on_other_runtimes(artifact):
    found = check(CheckRequest(artifact.path, backends=("ort-cpu", "openvino")))
    assert [report.passed for report in found.reports] == [True, True]
    assert all(report.output.top1_agreement is None for report in found.reports)


def test_eval_tells_the_correlation_with_the_unmerged_map(artifact, make_images, tmp_path):
    """By NumPy's own, on PyTorch's maps in float32."""
    model, _ = reference_model(artifact)
    pixels = make_images(model, 4)
    for index, image in enumerate(((pixels - pixels.min()) / np.ptp(pixels) * 255).astype("uint8")):
        Image.fromarray(image.transpose(1, 2, 0)).save(tmp_path / f"{index}.png")
    found = evaluate(EvalRequest(artifact.path, (str(tmp_path),), batch=2)).evaluation
    rows = {row.name: row for row in found.candidates}
    images = load_images(sorted(tmp_path.iterdir()), artifact.manifest.preprocessing)
    with torch.no_grad():
        maps = [run(torch.from_numpy(images)).numpy() for run in (model, model.library)]
    expected = [np.corrcoef(a.ravel(), b.ravel())[0, 1] for a, b in zip(*maps, strict=True)]
    assert rows["merged"].cosine_to_unmerged is None
    shown = rows["torch"].correlation_to_unmerged
    assert (shown.mean, shown.min) == pytest.approx((np.mean(expected), np.min(expected)), abs=2e-3)


def test_an_engine_is_built(artifact):
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    name, shape = OUTPUTS[artifact.manifest.model.name.partition(":")[2]]
    request = EngineRequest(artifact.path, "tensorrt-rtx", EngineOptions(), artifact.manifest.batch)
    engine = add_engine(request).manifest.engines["tensorrt-rtx"]
    assert [(one.name, one.shape) for one in engine.outputs] == [(name, (-1, *shape))]


def test_batch_norms_of_a_head_are_folded_in_bfloat16(tmp_path):
    """In float32 the weights of their convolutions would not fit what they are applied to."""
    request = BuildRequest(
        "whole_models:upernet",
        tmp_path / "out",
        schedule=Schedule(R),
        precision="bf16",
        engine="none",
    )
    graph = onnx.load(build(request).model_path).graph
    types = {one.name: one.data_type for one in graph.initializer}
    convolutions = [node for node in graph.node if node.op_type == "Conv"]
    assert not [node for node in graph.node if node.op_type == "BatchNormalization"]
    assert len(convolutions) > 5
    assert {types[name] for node in convolutions for name in node.input[1:]} == {
        onnx.TensorProto.BFLOAT16
    }


def test_a_backbone_alone_says_how_images_are_scaled():
    """The model around it is a plain module, which says nothing of its images."""
    vit, dino = (resolve(f"whole_models:{name}").preprocessing for name in ("on_vit", "on_dinov2"))
    assert vit.mean == vit.std == (0.5, 0.5, 0.5)
    assert dino.mean == (0.485, 0.456, 0.406)
    assert (vit.input_size, dino.input_size) == ((3, 64, 64), (3, SIZE, SIZE))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"activation": "softmax"},
            "activation softmax was asked for .*, which gives a map",
        ),
        ({"dense": True}, "--dense is for features, and model Head gives a map by a head"),
        ({"compress": "avgpool:2x2"}, "--compress is for features, and model Head gives a map"),
        ({"reducer": "topk"}, "reducer topk drops tokens, so not every patch has features for the"),
    ],
)
def test_what_makes_no_sense_is_refused(tmp_path, options, message):
    request = BuildRequest("whole_models:on_dinov2", tmp_path / "out", engine="none", **options)
    with pytest.raises(InputError, match=message):
        build(request)
    assert not list(tmp_path.iterdir())


def test_a_single_number_per_pixel_has_no_labels():
    recipe = resolve("whole_models:depth_anything")
    assert (recipe.output.name, recipe.output.kind) == ("predicted_depth", "map")
    assert patch(recipe.load().module, 0).map_name == "predicted_depth"
