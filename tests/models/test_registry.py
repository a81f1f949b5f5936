from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import timm

from tome_export.errors import InputError
from tome_export.models import RECIPES, resolve
from tome_export.models.facts import (
    DINOV2_FEATURES,
    DINOV2_LEAST,
    DINOV2_MAPS,
    RULE,
    MergingAdvice,
    dinov2_advice,
    recommended_r,
)
from tome_export.models.timm.recipes import preprocessing_from_cfg

TRAINED = Path(__file__).parents[2] / "benchmarks" / "results" / "trained.json"
TIMM = [r for r in RECIPES.values() if r.source.loader.timm_name and r.name != "vit_digits"]


@pytest.mark.parametrize("recipe", TIMM, ids=lambda recipe: recipe.name)
def test_preprocessing_is_that_of_the_weights(recipe):
    cfg = timm.get_pretrained_cfg(recipe.source.loader.timm_name)
    ours = recipe.preprocessing
    assert f"{cfg.architecture}.{cfg.tag}" == recipe.source.loader.timm_name
    assert (ours.mean, ours.std) == (cfg.mean, cfg.std)
    assert (ours.crop_pct, ours.interpolation) == (cfg.crop_pct, cfg.interpolation)
    assert cfg.crop_mode == "center"
    assert cfg.license == recipe.source.licence
    if recipe.name.startswith("dinov2"):
        # 224 on purpose, see registry._dinov2.
        assert (ours.input_size, cfg.input_size) == ((3, 224, 224), (3, 518, 518))
    else:
        assert ours.input_size == cfg.input_size
    # timm keeps the projection of CLIP's towers as their head.
    embeds = "_clip_" in recipe.source.loader.timm_name or not cfg.num_classes
    assert recipe.output.name == ("features" if embeds else "logits")


def test_recommended_r_rule_never_exceeds_what_the_authors_publish():
    published = {(197, 12): 13, (197, 24): 7, (577, 24): 23, (577, 12): 45, (1025, 24): 40}
    assert recommended_r(197, 12) == 13
    assert recommended_r(65, 6) == 8
    assert all(recommended_r(*shape) <= r for shape, r in published.items())
    assert recommended_r(197, 0) == 0


@pytest.mark.parametrize(
    ("known", "measure"),
    [
        (DINOV2_FEATURES, lambda row: row["cosine"]["mean"]),
        (DINOV2_MAPS, lambda row: row["map"]["correlation"]["mean"]),
    ],
)
def test_measured_r_is_the_largest_of_the_rows_that_keeps_to_the_bound(known, measure):
    found = {}
    for row in json.loads(TRAINED.read_text())["rows"]:
        if (row["part"], row.get("reducer")) == ("quality", "tome") and measure(
            row
        ) >= DINOV2_LEAST:
            tokens = (row["size"] // 14) ** 2 + 1
            found[tokens] = max(found.get(tokens, 0), row["tome_r"])
    assert found == known


def test_dinov2_has_the_share_of_tokens_that_was_measured():
    assert [dinov2_advice(tokens, 12).r for tokens in (257, 261, 1370, 1374)] == [
        *[DINOV2_FEATURES[257]] * 2,
        *[DINOV2_FEATURES[1370]] * 2,
    ]
    assert dinov2_advice(257, 24).r == DINOV2_FEATURES[257] // 2
    # What is smaller than anything that was measured, and a model without blocks.
    assert dinov2_advice(65, 12) == MergingAdvice(recommended_r(65, 12), RULE)
    assert dinov2_advice(257, 0).r == 0
    measured = [recipe for name, recipe in RECIPES.items() if name.startswith("dinov2")]
    assert len(measured) == 6
    assert all("benchmarks/results/trained.json" in recipe.merging.source for recipe in measured)


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=lambda recipe: recipe.name)
def test_every_recipe_tells_what_it_is(recipe):
    assert recipe.description
    assert recipe.merging.source
    assert recipe.source.weights
    assert recipe.merging.r > 0
    assert resolve(recipe.name) is recipe


def test_timm_architecture_is_an_alias():
    assert resolve("vit_base_patch16_224") is RECIPES["vit_b16"]


def test_timm_name_agrees_with_the_recipe():
    ours, theirs = RECIPES["vit_b16_384"], resolve("timm:vit_base_patch16_384")
    assert theirs.source.loader.timm_name == ours.source.loader.timm_name
    assert theirs.preprocessing == ours.preprocessing
    assert theirs.merging.r == recommended_r(577, 12) == 38
    assert theirs.output.label_set == "imagenet-1k"


def test_timm_tag_chooses_the_weights():
    mae = resolve("timm:vit_base_patch16_224.mae")
    assert mae.output.name == "features"
    assert mae.preprocessing.mean == (0.485, 0.456, 0.406)
    assert mae.merging.prop_attn is False
    assert resolve("timm:vit_base_patch16_224").merging.prop_attn is True


def test_timms_crop_modes_are_followed():
    names = timm.list_models("vit*", module="vision_transformer")
    cfgs = {name: cfg for name in names if (cfg := timm.get_pretrained_cfg(name))}
    modes = {(cfg.crop_mode or "center"): name for name, cfg in cfgs.items()}
    assert resolve(f"timm:{modes['squash']}").preprocessing.resize == "squash"
    assert resolve(f"timm:{modes['center']}").preprocessing.resize == "crop"
    found = preprocessing_from_cfg({"crop_mode": "border", "mean": (0.485, 0.456, 0.406)})
    assert (found.resize, found.fill) == ("letterbox", (124, 116, 104))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vitb16", "unknown model 'vitb16'; did you mean vit_b16, "),
        ("vit_base_patch8_224", "did you mean timm:vit_base_patch8_224?"),
        ("zzzz", "unknown model 'zzzz'; expected a recipe that `tome-export models` "),
        ("timm:vit_base_patch16_24", "timm has no model 'vit_base_patch16_24'; did you mean timm:"),
        ("timm:qqqqqq", "timm has no model 'qqqqqq'; see timm.list_models()"),
        ("timm:vit_base_patch16_224.nope", "timm has no weights 'nope' of vit_base_patch16_224; "),
        ("timm:resnet18", "is a ResNet, which has no sequence of tokens to merge"),
        ("hf:./nothing", "folder ./nothing does not exist; expected a checkpoint folder"),
    ],
)
def test_bad_names(name, message):
    with pytest.raises(InputError) as caught:
        resolve(name)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 3
    assert type(caught.value) is InputError  # its name is in what --json prints


def test_labels_are_loaded_lazily():
    labels = RECIPES["vit_b16"].output.label_names(1000)
    assert labels is not None
    assert labels[0].startswith("tench")
    assert len(labels) == 1000
    assert RECIPES["vit_b16"].output.label_names(37) is None
    assert RECIPES["dinov2_s14"].output.label_names(384) is None
    assert RECIPES["vit_digits"].output.label_names(10) == tuple("0123456789")


def test_recipes_import_neither_torch_nor_timm_nor_scikit_learn():
    code = (
        "import sys, tome_export.models as m; m.resolve('vit_b16'); "
        "import tome_export.data.samples, tome_export.data.preprocess; "
        "bad = {'torch', 'timm', 'sklearn', 'skimage'} & set(sys.modules); "
        "sys.exit(f'imported {bad}' if bad else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_timms_models_need_no_other_library(monkeypatch):
    for name in ("transformers", "open_clip"):
        monkeypatch.setitem(sys.modules, name, None)
    assert RECIPES["vit_digits"].load().weights.kind == "bundled"
    assert resolve("timm:vit_tiny_patch16_224").load("random", depth=1).weights.kind == "random"
