"""Dense outputs: every patch has its merged token's features, and the source map says which."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tome_export.merge.plan import source_map
from tome_export.patch import patch

NARROW = {"embed_dim": 64, "depth": 3, "num_heads": 2}
DINOV2 = ("vit_small_patch14_reg4_dinov2", NARROW | {"img_size": 56, "patch_size": 7})
TIMM = {
    "DINOv2 with registers": DINOV2,
    "no class token": ("test_vit", {"class_token": False, "global_pool": "avg"}),
    "distilled": ("deit_tiny_distilled_patch16_224", NARROW),
    "not square": ("test_vit", {"img_size": (48, 80)}),
    "no prefix, attention pooling": ("test_vit3", {}),
    "norm after pooling": ("test_vit", {"global_pool": "avg"}),
}
LLAVA = {"LLaVA": "patch", "LLaVA with class token": "cls_patch"}
MODELS = (*TIMM, *LLAVA)
R = 9


@pytest.fixture
def model(request, make_vit, make_tower) -> Any:
    name = request.param
    if name in LLAVA:
        return make_tower(select_feature=LLAVA[name], projector=True)
    timm_name, options = TIMM[name]
    return make_vit(timm_name, small="dinov2" not in timm_name, **options)


def plain_features(model: Any, images: torch.Tensor) -> torch.Tensor:
    """The library's own features of every patch, by its own forward."""
    if hasattr(model, "forward_features"):
        return model.forward_features(images)[:, model.num_prefix_tokens :]
    output = model(images)
    return output[:, 1:] if model.select_feature == "cls_patch" else output


def traced(merged: Any, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Final tokens ``[B, K, C]`` and where each patch went, both from the layers' own plans."""
    trace: list[Any] = []
    with torch.no_grad():
        tokens = merged.encode(images, merged.merger(observe=trace.append))
        features = merged.token_features(tokens)
    plans = {step.layer: step.plan for step in trace}
    count = merged.layers[0].tokens_in
    layers = [plans.get(layer) for layer in range(len(merged.layers))]
    return features, source_map(layers, len(images), count)[:, merged.prefix :]


@pytest.mark.parametrize("model", MODELS, indirect=True)
def test_r_0_is_the_plain_models_patch_features(model, make_images):
    merged = patch(model, 0, dense=True, source_map=True)
    images = torch.from_numpy(make_images(merged))
    with torch.no_grad():
        output, mapping = merged(images)
        expected = plain_features(model, images)
        assert (merged.library(images) == expected).all()
    assert output.shape == expected.shape
    assert (output - expected).abs().max() <= 1e-6 * expected.abs().max()
    assert (mapping == torch.arange(expected.shape[1])).all()
    assert mapping.dtype == torch.int32


@pytest.mark.parametrize("model", MODELS, indirect=True)
def test_every_patch_has_its_groups_token_bit_for_bit(model, make_images):
    merged = patch(model, R, dense=True, source_map=True)
    images = torch.from_numpy(make_images(merged))
    with torch.no_grad():
        output, mapping = merged(images)
    tokens, went = traced(merged, images)
    # The map of the output counts behind the prefix tokens; it is the composition of the plans.
    assert torch.equal(mapping.long(), went - merged.prefix)
    assert mapping.min() >= 0
    grid = merged.patch_grid
    assert output.shape == (len(images), grid.patches, tokens.shape[2])
    for image in range(len(images)):
        for group in mapping[image].unique():
            members = output[image, mapping[image] == group]
            assert (members == tokens[image, merged.prefix + group]).all()
    # Groups are the merged ones, and all of them: neither one token nor a grid without merging.
    patches = tokens.shape[1] - merged.prefix
    assert all(len(row.unique()) == patches for row in mapping)
    assert patches == merged.layers[-1].tokens_out - merged.prefix < grid.patches
    distinct = [len(torch.unique(row, dim=0)) for row in output]
    assert distinct == [patches] * len(images)


@pytest.mark.parametrize("model", LLAVA, indirect=True)
def test_tokens_and_map_together_give_the_dense_output(model, make_images):
    """Without ``dense`` the map alone lets a user unmerge, on his side, what the model gives."""
    merged = patch(model, R, source_map=True)
    dense = patch(model, R, dense=True)
    images = torch.from_numpy(make_images(merged))
    with torch.no_grad():
        output, mapping = merged(images)
        expected = dense(images)
    patches = output[:, 1:] if model.select_feature == "cls_patch" else output
    index = mapping.long()[..., None].expand(-1, -1, patches.shape[2])
    assert torch.equal(patches.gather(1, index), expected)


@pytest.mark.parametrize("model", ["DINOv2 with registers", "LLaVA"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_groups_are_constant_in_every_precision(model, make_images, dtype):
    merged = patch(model.to(dtype), R, dense=True, source_map=True)
    images = torch.from_numpy(make_images(merged)).to(dtype)
    with torch.no_grad():
        output, mapping = merged(images)
    assert output.dtype == dtype
    for image, row in zip(output, mapping, strict=True):
        for group in row.unique():
            members = image[row == group]
            assert (members == members[0]).all()


@pytest.mark.parametrize("model", ["DINOv2 with registers", "LLaVA"], indirect=True)
def test_layers_that_do_not_merge_leave_the_map(model, make_images):
    merged = patch(model, [0, R, 0], dense=True, source_map=True)
    images = torch.from_numpy(make_images(merged))
    with torch.no_grad():
        output, mapping = merged(images)
    tokens, went = traced(merged, images)
    assert torch.equal(mapping.long(), went - merged.prefix)
    assert torch.equal(output[0], tokens[0][went[0]])


def test_dense_costs_no_head(make_vit):
    model = make_vit("test_vit")
    head = model.head.weight.numel()
    assert patch(model, R).macs() - patch(model, R, dense=True).macs() == head
