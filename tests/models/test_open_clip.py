"""Open_clip's image towers as recipes: facts, weights in every layout, and what is refused."""

from __future__ import annotations

import socket
import subprocess
import sys
import zipfile

import pytest
import torch
from huggingface_hub import constants, file_download
from safetensors.torch import save_file

open_clip = pytest.importorskip("open_clip", reason="open_clip is not installed")

from tome_export.errors import InputError, MissingComponentError  # noqa: E402
from tome_export.models import RECIPES, hub, resolve  # noqa: E402
from tome_export.models.open_clip.loader import OpenClipLoader  # noqa: E402
from tome_export.models.open_clip.recipes import OPEN_CLIP, preprocessing_of  # noqa: E402

TINY = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 64, "layers": 2, "head_width": 32},
    "text_cfg": {"context_length": 8, "vocab_size": 16, "width": 32, "heads": 2, "layers": 1},
}


@pytest.fixture
def tiny(monkeypatch):
    """ViT-B-32 by name, small in truth; returns its recipe and a whole model of it."""
    monkeypatch.setattr(open_clip, "get_model_config", lambda _name: TINY)
    whole = open_clip.CLIP(32, TINY["vision_cfg"], TINY["text_cfg"])
    return RECIPES["openclip_b32"], whole.eval()


@pytest.mark.parametrize("recipe", OPEN_CLIP, ids=lambda recipe: recipe.name)
def test_recipes_have_the_facts_of_open_clips_table(recipe):
    full = resolve(f"open_clip:{recipe.source.loader.arch}/{recipe.source.loader.weights}")
    assert full.preprocessing == recipe.preprocessing
    assert full.source.weights == recipe.source.weights
    assert full.merging.r == recipe.merging.r
    assert full.source.loader == recipe.source.loader
    assert full.output.name == recipe.output.name == "features"


@pytest.mark.parametrize(
    ("given", "resize", "fill"),
    [
        ({}, "crop", ()),
        ({"resize_mode": "squash"}, "squash", ()),
        ({"resize_mode": "longest"}, "letterbox", (0, 0, 0)),
        ({"resize_mode": "longest", "fill_color": 127}, "letterbox", (127, 127, 127)),
    ],
)
def test_its_rules_of_resizing_are_followed(given, resize, fill):
    found = preprocessing_of(16, given)
    assert (found.resize, found.fill) == (resize, fill)


def test_siglip_is_squashed():
    assert resolve("open_clip:ViT-B-16-SigLIP/webli").preprocessing.resize == "squash"


@pytest.mark.parametrize("layout", ["whole", "tower", "trained by others"])
def test_weights_of_a_file(tiny, tmp_path, layout):
    recipe, whole = tiny
    state = (whole.visual if layout == "tower" else whole).state_dict()
    if layout == "trained by others":
        state = {"state_dict": {f"module.{key}": value.half() for key, value in state.items()}}
        torch.save(state, tmp_path / "mine.pt")
    else:
        save_file(state, tmp_path / "mine.pt.safetensors")
    (path,) = tmp_path.iterdir()
    made = recipe.load(str(path))
    assert made.weights.kind == "file"
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = whole.encode_image(images, normalize=False)
        torch.testing.assert_close(made.module(images), expected, rtol=1e-2, atol=1e-2)


def test_weights_that_cannot_be_used_are_refused(tiny, tmp_path):
    recipe, _ = tiny
    torch.save({"visual.proj": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(InputError, match=r"does not fit the model: keys .* missing"):
        recipe.load(str(tmp_path / "other.pth"))
    with zipfile.ZipFile(tmp_path / "script.pt", "w") as archive:
        archive.writestr("script/constants.pkl", b"")
    with pytest.raises(InputError, match="is a TorchScript archive, which holds code"):
        recipe.load(str(tmp_path / "script.pt"))
    with pytest.raises(InputError, match="depth 1 was asked with pretrained weights"):
        recipe.load("pretrained", depth=1)


def test_random_weights_hang_on_the_seed_and_depth(tiny):
    recipe, _ = tiny
    first, same, other = (recipe.load("random", seed=s).module.state_dict() for s in (1, 1, 2))
    assert all(torch.equal(first[key], same[key]) for key in first)
    assert not torch.equal(first["proj"], other["proj"])
    assert len(recipe.load("random", depth=1).module.transformer.resblocks) == 1


def test_no_network_is_told_within_the_bound(tiny, tmp_path, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        template = address + "/{repo_id}/resolve/{revision}/{filename}"
        for module in (constants, file_download):
            monkeypatch.setattr(module, "ENDPOINT", address, raising=False)
            monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
            monkeypatch.setattr(module, "HF_HUB_CACHE", str(tmp_path), raising=False)
        monkeypatch.setattr(hub, "ANSWER_S", 0.5)
        with pytest.raises(InputError) as caught:
            tiny[0].load()
    text = str(caught.value)
    assert text.startswith("pretrained weights of openclip_b32 cannot be had from the hub (")
    assert text.endswith("or try the toolchain with --weights random")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("open_clip:ViT-B-33", "open_clip has no model 'ViT-B-33'; did you mean open_clip:ViT-"),
        ("open_clip:qqqqqq", "open_clip has no model 'qqqqqq'; see open_clip.list_models()"),
        ("open_clip:ViT-B-32/nope", "open_clip has no weights 'nope' of ViT-B-32; it has openai, "),
        ("open_clip:ViT-B-32/openai", "another activation; use open_clip:ViT-B-32-quickgelu/open"),
        (
            "open_clip:RN50",
            "is a ModifiedResNet, which has no sequence of tokens to merge",
        ),
    ],
)
def test_bad_names(name, message):
    with pytest.raises(InputError) as caught:
        resolve(name)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_name_without_weights_lists_them():
    with pytest.raises(InputError, match=r"names no weights; .*open_clip:ViT-H-16/<weights>"):
        OpenClipLoader("ViT-H-16").pretrained(resolve("open_clip:ViT-H-16"))


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    with pytest.raises(MissingComponentError, match=r"pip install 'tome-export\[open_clip\]'"):
        resolve("open_clip:ViT-B-32")


def test_recipes_need_no_open_clip():
    code = (
        "import sys, tome_export.models as m; m.resolve('openclip_b32'); "
        "sys.exit('open_clip' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
