"""What a model gives, and what makes scores of it: by its heads and configuration, not its name."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pytest
import timm
import torch
from torch import nn

from tests.conftest import small_vit
from tome_export.errors import InputError
from tome_export.models import resolve
from tome_export.patch import patch
from tome_export.patch.merger import Tokens
from tome_export.patch.timm.vit import output_choice

transformers = pytest.importorskip("transformers")

VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 64,
    "patch_size": 16,
}
TEXT = {**VISION, "vocab_size": 50, "num_hidden_layers": 1}
FAMILIES = ("vision_transformer", "eva", "deit", "vision_transformer_hybrid")


@pytest.fixture
def function(monkeypatch):
    """Makes ``module:function`` of a model."""

    def named(model: nn.Module) -> str:
        monkeypatch.setitem(sys.modules, "own_model", SimpleNamespace(make=lambda: model))
        return "own_model:make"

    return named


def pretrained():
    for name in timm.list_pretrained():
        source = timm.model_entrypoint(name.partition(".")[0]).__module__
        if source.rpartition(".")[2] in FAMILIES:
            yield name, timm.get_pretrained_cfg(name).to_dict()


def test_every_pretrained_head_of_timm_is_taken_for_what_it_is():
    count = {True: 0, False: 0}
    for name, cfg in pretrained():
        classes = cfg["num_classes"]
        head = nn.Linear(8, classes, device="meta") if classes else nn.Identity()
        model = SimpleNamespace(head=head, global_pool="avg", pretrained_cfg=cfg)
        # Of people, who know these names: what contrasts images and texts, not trained on.
        contrasts = any(word in name for word in ("clip", "pe_core", "_mci_"))
        trained = any(word in name.partition(".")[2] for word in ("_ft_", "ft_in"))
        expected = bool(classes) and (trained or not contrasts)
        assert output_choice(model).classifies == expected, name
        count[expected] += 1
    assert min(count.values()) > 100


def with_head(model: nn.Module, head: nn.Module) -> nn.Module:
    model.head = head
    return model


def made(name: str, **more: object) -> nn.Module:
    with torch.device("meta"):
        return timm.create_model(name, depth=1, **more)


CLIP = "vit_base_patch32_clip_224.openai"
EVA = "eva02_base_patch16_clip_224.merged2b"
PLAIN = "vit_tiny_patch16_224"


@pytest.mark.parametrize(
    ("model", "classifies", "why"),
    [
        (lambda: made(CLIP), False, "projection to image features"),
        (lambda: made(EVA), False, "projection to image features"),
        (lambda: made("vit_pe_core_tiny_patch16_384"), False, "projection to image features"),
        (lambda: made(CLIP, num_classes=6), True, "6 outputs, not the 512"),
        (lambda: with_head(made(CLIP), nn.Linear(768, 6)), True, "6 outputs, not the 512"),
        (lambda: with_head(made(EVA), nn.Linear(768, 1)), True, "1 output, not the 512"),
        (lambda: with_head(made(EVA), nn.Identity()), False, "no head"),
        (lambda: made(PLAIN), True, "a head of 1000 outputs"),
        (lambda: made(PLAIN, num_classes=512), True, "a head of 512 outputs"),
        (lambda: made(PLAIN, num_classes=0), False, "no head"),
        (lambda: with_head(made(PLAIN), nn.Identity()), False, "no head"),
        (lambda: with_head(made(PLAIN, num_classes=0), nn.Linear(192, 6)), True, "6 outputs"),
        (
            lambda: with_head(
                made(PLAIN, num_classes=0), nn.Sequential(nn.Linear(192, 9), nn.Linear(9, 2))
            ),
            True,
            "2 outputs",
        ),
        (lambda: made("vit_base_patch16_siglip_224", num_classes=5), True, "5 outputs"),
        (lambda: made("vit_small_patch16_dinov3", num_classes=4), True, "4 outputs"),
        (lambda: made(PLAIN, global_pool=""), False, "without pooling"),
        (lambda: made("deit_tiny_distilled_patch16_224"), True, "1000 outputs"),
    ],
)
def test_what_a_timm_model_gives_is_read_from_its_head(model, classifies, why):
    choice = patch(model(), 0).output_choice
    assert choice.classifies == classifies
    assert why in choice.why


def test_a_recipe_of_timm_says_what_it_takes():
    recipe = resolve("timm:vit_pe_core_tiny_patch16_384")
    assert recipe.output.name == "features"
    assert "projection" in recipe.output.note


@pytest.mark.parametrize(
    ("heads", "classifies"),
    [
        (nn.Sequential(nn.Linear(32, 1)), True),
        (nn.Linear(32, 5), True),
        (nn.Sequential(nn.Linear(32, 5), nn.Dropout()), True),
        (nn.Identity(), False),
        (nn.Sequential(), False),
    ],
)
def test_torchvision_heads(heads, classifies):
    from torchvision.models import VisionTransformer

    model = VisionTransformer(
        image_size=32, patch_size=16, num_layers=1, num_heads=2, hidden_dim=32, mlp_dim=32
    )
    model.heads = heads
    assert patch(model, 0).output_choice.classifies == classifies


def contrastive(cls: str, **more: object) -> nn.Module:
    torch.manual_seed(0)
    config = getattr(transformers, cls.replace("ForImageClassification", "Config"))
    values = config(vision_config=VISION, text_config=TEXT, **more)
    return getattr(transformers, cls)(values).eval()


@pytest.mark.parametrize("cls", ["CLIPForImageClassification", "SiglipForImageClassification"])
def test_classifiers_of_clip_and_siglip(tmp_path, cls):
    model = contrastive(cls, num_labels=3, id2label={0: "a", 1: "b", 2: "c"})
    model.save_pretrained(tmp_path)
    recipe = resolve(f"hf:{tmp_path}")
    assert (recipe.output.name, recipe.output.labels) == ("logits", ("a", "b", "c"))
    assert cls in recipe.description
    images = torch.rand(2, 3, 64, 64)
    loaded = recipe.load()
    with torch.no_grad():
        expected = model(images).logits
        merged = patch(loaded.module, 0)
        assert torch.allclose(merged(images), expected, atol=1e-6)
        assert torch.equal(merged.library(images), loaded.module(images).logits)
        # A token that stands for three patches counts three times.
        x = torch.rand(2, merged.prefix + 3, 32)
        size = torch.tensor([1.0] * merged.prefix + [3.0, 1.0, 2.0]).expand(2, -1)
        last = x[:, merged.prefix :]
        every = last[:, [0, 0, 0, 1, 2, 2]].mean(dim=1)
        found = merged.head(Tokens(x, size))
        assert torch.allclose(found, loaded.module.classifier(every), atol=1e-6)
        assert patch(loaded.module, 0, dense=True)(images).shape == (2, 16, 32)
        assert patch(loaded.module, 4)(images).shape == (2, 3)


def vit(**more: object) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.ViTConfig(**VISION, **more)
    return transformers.ViTForImageClassification(config).eval()


@pytest.mark.parametrize(
    ("more", "activation"),
    [
        ({"num_labels": 1}, "sigmoid"),
        ({"num_labels": 1, "problem_type": "regression"}, "none"),
        ({"num_labels": 3, "problem_type": "regression"}, "none"),
        ({"num_labels": 4, "problem_type": "multi_label_classification"}, "sigmoid"),
        ({"num_labels": 4, "problem_type": "single_label_classification"}, "softmax"),
        ({"num_labels": 4}, "softmax"),
    ],
)
def test_problem_type_says_what_makes_scores(tmp_path, function, more, activation):
    model = vit(**more)
    model.save_pretrained(tmp_path)
    for name in (f"hf:{tmp_path}", function(model)):
        recipe = resolve(name)
        assert recipe.output.name == "logits"
        assert recipe.activation((more["num_labels"],)) == activation


def test_a_classifier_that_a_bare_model_leaves_out_is_named(tmp_path):
    vit(num_labels=4).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["ViTModel"]}))
    loaded = resolve(f"hf:{tmp_path}").load()
    assert loaded.recipe.output.name == "features"
    assert loaded.weights.source.endswith("; its classifier left out, as ViTModel has none")


def test_a_classifier_that_was_taken_off_leaves_features(function):
    assert resolve(function(vit(num_labels=0))).output.name == "features"


def test_a_head_of_a_transformers_model_may_be_any_module(function):
    model = vit(num_labels=4)
    model.classifier = nn.Sequential(nn.Linear(32, 16), nn.SELU(), nn.Linear(16, 5)).eval()
    recipe = resolve(function(model))
    assert (recipe.output.name, recipe.output.note) == (
        "logits",
        "the model has a head of 5 outputs",
    )
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.allclose(patch(model, 0)(images), model(images).logits, atol=1e-6)


def test_a_foreign_module_in_a_layer_is_not_called_a_quantised_one():
    model = vit(num_labels=4)
    model.vit.layernorm = nn.Sequential(model.vit.layernorm)
    with pytest.raises(InputError, match=r"library's own modules everywhere but in the class"):
        patch(model, 0)


def test_a_siglip_without_a_head_gives_dense_outputs_also_from_a_function(function):
    config = transformers.SiglipVisionConfig(**VISION, vision_use_head=False)
    name = function(transformers.SiglipVisionModel(config))
    recipe = resolve(name)
    assert (recipe.output.name, recipe.output.dense_only) == ("features", True)
    with pytest.raises(InputError, match=r"use dense outputs$"):
        patch(recipe.load().module, 0)


def test_a_user_may_say_what_makes_scores(function):
    recipe = resolve(function(small_vit(depth=1, num_classes=0)))
    said = recipe.scored_by("sigmoid")
    assert (recipe.output.name, said.output.name) == ("features", "logits")
    assert said.activation((64,)) == "sigmoid"
    assert recipe.scored_by(None) is recipe


@pytest.mark.parametrize(
    ("shape", "message"),
    [((1,), "one logit, whose softmax is 1 for every image"), ((7, 10), r"gives \[7, 10\]")],
)
def test_scores_that_say_nothing_are_refused(shape, message):
    recipe = resolve("vit_digits").scored_by("softmax")
    with pytest.raises(InputError, match=message):
        recipe.activation(shape)


def test_a_tower_takes_no_activation(tmp_path):
    config = {"model_type": "clip_vision_model", **VISION}
    (tmp_path / "config.json").write_text(json.dumps(config))
    from tome_export.spec import TowerOptions

    recipe = resolve(f"hf:{tmp_path}", TowerOptions(kind="llava"))
    with pytest.raises(InputError, match="leave --activation out"):
        recipe.scored_by("softmax")
