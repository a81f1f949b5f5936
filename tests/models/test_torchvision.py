"""Torchvision's ViTs as recipes: facts, weights in every layout, and what is refused."""

from __future__ import annotations

import socket
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.models import get_model_weights, get_weight

from tome_export.data.preprocess import pixels_from_image
from tome_export.errors import InputError
from tome_export.models import RECIPES, hub, resolve
from tome_export.models.torchvision.loader import TorchvisionLoader
from tome_export.models.torchvision.recipes import TORCHVISION, preprocessing_of

VITS = ("vit_b_16", "vit_b_32", "vit_l_16", "vit_l_32", "vit_h_14")


@pytest.mark.parametrize("recipe", TORCHVISION, ids=lambda recipe: recipe.name)
def test_recipes_have_the_facts_of_torchvisions_table(recipe):
    entry = recipe.source.loader.entry
    assert recipe.preprocessing == preprocessing_of(entry.transforms())
    assert recipe.source.weights == entry.url
    assert ("SWAG" in str(entry.meta.get("license"))) == (recipe.source.licence == "cc-by-nc-4.0")
    full = resolve(f"torchvision:{recipe.source.loader.arch}.{recipe.source.loader.weights}")
    assert full.preprocessing == recipe.preprocessing
    assert full.source.licence == recipe.source.licence
    assert full.merging.r <= recipe.merging.r
    mine = recipe.output.label_names(1000)
    # timm words some classes at greater length, in the same order.
    same = [a in b or b in a for a, b in zip(full.output.labels, mine, strict=True)]
    assert sum(same) > 900


def test_swag_recipes_take_the_published_r():
    assert {r.name: r.merging.r for r in TORCHVISION if r.name.startswith("swag")} == {
        "swag_b16_384": 45,
        "swag_l16_512": 40,
        "swag_h14_518": 40,
    }


@pytest.mark.parametrize("arch", VITS)
def test_preprocessing_is_that_of_the_transforms(arch):
    rng = np.random.default_rng(0)
    images = [
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8))
        for size in ((300, 451), (640, 333))
    ]
    for entry in get_model_weights(arch):
        transforms = entry.transforms()
        for image in images:
            ours = pixels_from_image(image, preprocessing_of(transforms))
            torch.testing.assert_close(torch.from_numpy(ours), transforms(image))


def test_the_default_weights_are_torchvisions():
    assert resolve("torchvision:vit_b_16").name == "torchvision:vit_b_16.IMAGENET1K_V1"
    assert resolve("torchvision:vit_h_14").name == "torchvision:vit_h_14.IMAGENET1K_SWAG_E2E_V1"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("torchvision:vit_b_15", "torchvision has no ViT 'vit_b_15'; did you mean torchvision:vit"),
        ("torchvision:resnet50", "torchvision has no ViT 'resnet50'; it has vit_b_16, "),
        ("torchvision:vit_b_32.SWAG", "no weights 'SWAG' of vit_b_32; it has IMAGENET1K_V1"),
    ],
)
def test_bad_names(name, message):
    with pytest.raises(InputError) as caught:
        resolve(name)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.fixture
def small(monkeypatch):
    """A recipe whose model has one narrow block."""
    from torchvision.models.vision_transformer import VisionTransformer

    def create(_self, depth=None, classes=1000):
        return VisionTransformer(32, 8, depth or 2, 2, 16, 32, num_classes=classes)

    monkeypatch.setattr(TorchvisionLoader, "create", create)
    return RECIPES["torchvision_b16"]


def test_random_weights_hang_on_the_seed_and_matter(small):
    first, same, other = (small.load("random", seed=s).module.state_dict() for s in (1, 1, 2))
    assert all(torch.equal(first[key], same[key]) for key in first)
    assert not torch.equal(first["conv_proj.weight"], other["conv_proj.weight"])
    assert first["heads.head.weight"].abs().max() > 0


def test_depth_makes_a_smaller_model():
    model = resolve("torchvision:vit_b_32").load("random", depth=1).module
    assert (len(model.encoder.layers), model.hidden_dim, model.image_size) == (1, 768, 224)


@pytest.mark.parametrize("legacy", [False, True])
def test_weights_of_a_file_bring_their_own_classes(small, tmp_path, legacy):
    module = small.source.loader.create(classes=7)
    torch.nn.init.normal_(module.heads.head.weight)
    state = module.state_dict()
    if legacy:
        state = {
            key.replace(".mlp.0.", ".mlp.linear_1.").replace(".mlp.3.", ".mlp.linear_2."): value
            for key, value in state.items()
        }
    torch.save(state, tmp_path / "mine.pth")
    made = small.load(str(tmp_path / "mine.pth"))
    assert made.weights.kind == "file"
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(made.module(images), module.eval()(images))


def test_weights_that_do_not_fit_are_refused(small, tmp_path):
    torch.save({"conv_proj.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(InputError, match=r"does not fit the model: keys .* missing"):
        small.load(str(tmp_path / "other.pth"))
    with pytest.raises(InputError, match="depth 1 was asked with pretrained weights"):
        small.load("pretrained", depth=1)


def test_cached_weights_need_no_network(small, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    state = small.source.loader.create().state_dict()
    torch.save(state, tmp_path / "checkpoints" / "vit_b_16-c867db91.pth")
    made = small.load()
    assert made.weights.kind == "pretrained"
    assert made.weights.sha256 is not None


def test_no_network_is_told_within_the_bound(small, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(hub, "ANSWER_S", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}/vit.pth"
        entry = get_weight("ViT_B_16_Weights.IMAGENET1K_V1")
        monkeypatch.setattr(entry.value, "url", url, raising=False)
        with pytest.raises(InputError) as caught:
            small.load()
    text = str(caught.value)
    assert text.startswith(f"pretrained weights of torchvision_b16 cannot be had from {url} (")
    assert text.endswith("or try the toolchain with --weights random")


def test_recipes_need_no_torchvision():
    code = (
        "import sys, tome_export.models as m; m.resolve('swag_b16_384'); "
        "sys.exit('torchvision' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
