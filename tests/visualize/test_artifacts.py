"""What an artifact's graph decides, against PyTorch's own decisions in fp32."""

from __future__ import annotations

import json
import shutil
import sys

import numpy as np
import pytest
import torch

from tome_export.artifact import Artifact
from tome_export.build import BuildRequest, build
from tome_export.data.samples import digits_test
from tome_export.engine import EngineOptions
from tome_export.errors import InputError, UsageError
from tome_export.merge.plan import source_map
from tome_export.merge.schedule import Schedule
from tome_export.models.facts import DATA
from tome_export.runtime.merge_maps import merge_maps
from tome_export.runtime.model import reference_model
from tome_export.spec import BatchRange, PatchGrid
from tome_export.visualize.main import layers_from_text

SOURCE = """
import timm, torch

SMALL = dict(depth=3, num_classes=5, patch_size=8)

def made(name, **kwargs):
    torch.manual_seed(0)
    return timm.create_model(name, **SMALL, **kwargs).eval()

def distilled():
    return made("deit_tiny_distilled_patch16_224", img_size=64, embed_dim=48)

def no_class_token():
    return made("test_vit", img_size=(40, 64), class_token=False, global_pool="avg")

def registers():
    return made("test_vit", img_size=64, reg_tokens=4)

def border():
    return made("vit_tiny_patch16_224", img_size=(37, 45), embed_dim=48)
"""


@pytest.fixture
def models(tmp_path, monkeypatch):
    """Models of the user's own, in the current folder."""
    (tmp_path / "mymodels_inspect.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("mymodels_inspect", None)


def built(model, output, schedule, **options) -> Artifact:
    schedule = Schedule(per_layer=schedule)
    request = BuildRequest(
        model, output, schedule=schedule, **{"engine": "none", "check": False, **options}
    )
    return build(request)


def groups_of_torch(artifact, pixels):
    """``[B, depth, patches]`` int64, of PyTorch with the artifact's weights and schedule."""
    model, _ = reference_model(artifact)
    with torch.inference_mode():
        _, trace = model.forward_traced(torch.from_numpy(pixels))
    plans = {step.layer: step.plan for step in trace}
    tokens = model.layers[0].tokens_in
    by_layer = [
        source_map([plans.get(i) for i in range(layer + 1)], len(pixels), tokens)
        for layer in range(len(model.layers))
    ]
    return torch.stack(by_layer, dim=1)[:, :, model.prefix :].numpy()


def check_against_torch(artifact, pixels):
    maps = merge_maps(artifact, pixels)
    found = np.stack([[layer.ids.ravel() for layer in one.layers] for one in maps])
    np.testing.assert_array_equal(found, groups_of_torch(artifact, pixels))
    prefix = artifact.manifest.merge.prefix
    for one in maps:
        for layer, tokens in zip(one.layers, artifact.manifest.tokens, strict=True):
            assert layer.patches_in_prefix == 0
            assert layer.tokens == tokens == len(np.unique(layer.ids)) + prefix
    return maps


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Artifact:
    """vit_digits, fp32; the second layer and the last two do not merge."""
    return built("vit_digits", tmp_path_factory.mktemp("built") / "digits", (8, 0, 8, 12))


def test_vit_digits(digits):
    artifact = digits
    assert artifact.manifest.patches == PatchGrid(8, 8, 4, 4)
    pixels = digits_test()[0][:40]  # more than one batch, the last not full
    maps = check_against_torch(artifact, pixels)
    assert maps[0].grid == PatchGrid(8, 8, 4, 4)
    assert [len(np.unique(layer.ids)) for layer in maps[0].layers] == [56, 56, 48, 36, 36, 36]


@pytest.mark.parametrize(
    ("name", "grid", "prefix"),
    [
        ("distilled", PatchGrid(8, 8, 8, 8), 2),
        ("no_class_token", PatchGrid(5, 8, 8, 8), 0),
        ("registers", PatchGrid(8, 8, 8, 8), 5),
        ("border", PatchGrid(4, 5, 8, 8), 1),
    ],
)
def test_models_of_the_users(models, name, grid, prefix):
    options = {"batch": BatchRange(2, 2, 2)}
    artifact = built(f"mymodels_inspect:{name}", models / "out", (6, 0, 5), **options)
    assert artifact.manifest.merge.prefix == prefix
    size = artifact.manifest.preprocessing.input_size
    pixels = np.random.default_rng(0).standard_normal((3, *size)).astype(np.float32)
    maps = check_against_torch(artifact, pixels)
    assert maps[0].grid == grid
    assert maps[0].image.shape == (*size[1:], 3)


def test_bfloat16_with_the_plugin(models):
    pytest.importorskip("triton", reason="compiles the plugin's kernels")
    artifact = built(
        "mymodels_inspect:no_class_token",
        models / "out",
        (8, 4, 2),
        precision="bf16",
        merge_op="plugin",
        engine_options=EngineOptions(compute_capabilities=("9.0",)),
    )
    pixels = np.random.default_rng(0).standard_normal((3, 3, 40, 64)).astype(np.float32)
    maps = merge_maps(artifact, pixels)
    for one, expected in zip(maps, groups_of_torch(artifact, pixels), strict=True):
        assert [len(np.unique(layer.ids)) for layer in one.layers] == [32, 28, 26]
        # Rounding may flip a near tie; most pairs of patches are together, or not, all the same.
        ours, theirs = one.layers[0].ids.ravel(), expected[0]
        same = (ours[:, None] == ours) == (theirs[:, None] == theirs)
        assert same.mean() > 0.95


def test_a_manifest_of_another_schedule(digits, tmp_path):
    old = shutil.copytree(digits.path, tmp_path / "old")
    values = json.loads((old / "build.json").read_text())
    last = max(layer for layer, r in enumerate(values["merge"]["r"]) if r)
    values["layers"][last]["r"] -= 1
    values["merge"]["r"][last] -= 1
    for layer in range(last, len(values["layers"])):
        values["layers"][layer]["tokens_out"] += 1
        values["layers"][layer]["tokens_in"] += layer > last
        values["tokens"][layer] += 1
    (old / "build.json").write_text(json.dumps(values))
    with pytest.raises(InputError) as caught:
        merge_maps(Artifact.open(old), [DATA / "digit.png"])
    assert str(caught.value) == (
        f"model.onnx of {old} merges other tokens than its build.json says; rebuild the artifact"
    )


@pytest.mark.parametrize(
    ("text", "layers"), [("last", (5,)), ("all", (0, 1, 2, 3, 4, 5)), ("0", (0,)), ("5", (5,))]
)
def test_layers(text, layers):
    assert layers_from_text(text, 6) == layers


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("6", InputError, "layer is 6; the model has 6 layers, give 0 to 5, all or last"),
        ("-1", InputError, "layer is -1; the model has 6 layers, give 0 to 5, all or last"),
        ("first", UsageError, "layer is 'first'; expected a number, all or last"),
        ("", UsageError, "layer is ''; expected a number, all or last"),
    ],
)
def test_layers_that_are_not_there(text, error, message):
    with pytest.raises(error) as caught:
        layers_from_text(text, 6)
    assert str(caught.value) == message
