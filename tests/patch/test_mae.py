"""MAE off the shelf and fine-tuned; timm's CLIP and SigLIP towers, which are plain ViTs."""

from __future__ import annotations

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from towers import assert_plans_are_the_references, assert_r_0_is_the_librarys, images_of, live

from tome_export.models import RECIPES, resolve
from tome_export.models.timm.recipes import TIMM
from tome_export.patch import patch

MAE = [recipe for recipe in TIMM if recipe.name.startswith("mae_")]
TOWERS = [
    recipe
    for recipe in TIMM
    if recipe.output.name == "features" and not recipe.name.startswith(("mae_", "dinov2_"))
]
SMALL = {"img_size": 64, "patch_size": 8, "embed_dim": 64, "depth": 3, "num_heads": 2}


@pytest.mark.parametrize("recipe", MAE, ids=lambda recipe: recipe.name)
def test_mae_merges_without_proportional_attention(recipe):
    assert recipe.merging.prop_attn is False
    assert recipe.output.name == "features"


def test_r_of_mae_large_is_the_trained_one():
    assert (RECIPES["mae_l16"].merging.r, RECIPES["mae_l16"].merging.source) == (
        8,
        "ToMe README, MAE ViT-L/16 trained",
    )
    assert all(r.merging.source.startswith("rule") for r in MAE if r.name != "mae_l16")


@pytest.fixture
def narrow(monkeypatch):
    """timm's models, narrow and shallow."""
    create = timm.create_model
    small = SMALL | {"embed_dim": 48, "depth": 2}
    monkeypatch.setattr(timm, "create_model", lambda name, **given: create(name, **given | small))


def fine_tuned(classes):
    """A classifier in the layout of MAE's authors: ``fc_norm`` in place of ``norm``."""
    model = live(
        VisionTransformer(
            **SMALL | {"embed_dim": 48, "depth": 2}, num_classes=classes, global_pool="avg"
        )
    )
    state = model.state_dict()
    assert "fc_norm.weight" in state
    assert "norm.weight" not in state
    return model, state


@pytest.mark.usefixtures("narrow")
def test_a_fine_tuned_classifier_pools_the_mean_of_all_patches(tmp_path):
    model, state = fine_tuned(7)
    torch.save({"model": state}, tmp_path / "mae_finetuned.pth")
    made = RECIPES["mae_b16"].load(str(tmp_path / "mae_finetuned.pth"))
    assert made.recipe.output.name == "logits"
    assert made.module.global_pool == "avg"
    merged = patch(made.module, 5, prop_attn=made.recipe.merging.prop_attn)
    images = images_of(merged)
    with torch.no_grad():
        torch.testing.assert_close(made.module(images), model(images))
        tokens = merged.encode(images, merged.merger())
        weight = tokens.size[:, 1:] / merged.patch_grid.patches
        pooled = (tokens.x[:, 1:] * weight[..., None]).sum(1)
        torch.testing.assert_close(merged(images), model.head(model.fc_norm(pooled)))
    assert tokens.size[:, 1:].max() > 1


@pytest.mark.usefixtures("narrow")
def test_pretrained_layout_gives_features(tmp_path):
    model = live(VisionTransformer(**SMALL | {"embed_dim": 48, "depth": 2}, num_classes=0))
    torch.save({"model": model.state_dict()}, tmp_path / "mae_pretrain.pth")
    made = RECIPES["mae_b16"].load(str(tmp_path / "mae_pretrain.pth"))
    assert made.recipe.output.name == "features"
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(made.module(images), model(images))


@pytest.mark.parametrize("recipe", TOWERS, ids=lambda recipe: recipe.name)
def test_timms_towers(recipe):
    model = live(timm.create_model(recipe.source.loader.timm_name, **SMALL))
    assert_r_0_is_the_librarys(model)
    assert_plans_are_the_references(model)


@pytest.mark.usefixtures("narrow")
def test_the_projection_of_a_clip_tower_is_no_classifier(tmp_path):
    assert resolve("timm:vit_base_patch16_clip_224.openai").output.name == "features"
    assert resolve("timm:vit_base_patch16_clip_224.openai_ft_in1k").output.name == "logits"
    recipe = RECIPES["clip_b16"]
    for classes, output in ((512, "features"), (5, "logits")):
        module = timm.create_model(recipe.source.loader.timm_name, num_classes=classes)
        path = tmp_path / f"{classes}.pth"
        torch.save(module.state_dict(), path)
        assert recipe.load(str(path)).recipe.output.name == output
