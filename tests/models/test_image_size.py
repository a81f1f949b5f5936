"""Images of another size than the model's own: the library's own output, plans, and refusals."""

from __future__ import annotations

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from sized import MODELS
from towers import assert_plans_are_the_references, images_of

from tome_export.errors import InputError
from tome_export.models import RECIPES, resolve
from tome_export.models.catalog import details
from tome_export.models.facts import RULE, recommended_r
from tome_export.models.positions import fit_positions, position_grid
from tome_export.patch import patch
from tome_export.patch.describe import check_memory
from tome_export.spec import ImageSize

CASES = [
    # One that is not square for every family; the others are for `make test-slow`.
    pytest.param(name, size, marks=[] if index == 1 else pytest.mark.slow, id=f"{name}-{size}")
    for name, (_, sizes) in MODELS.items()
    for index, size in enumerate(sizes)
]


def errors(name, size, folder):
    """Patched model of a file at a size, and its largest difference from the library's output."""
    made = MODELS[name][0](folder)
    recipe = made.recipe.at(ImageSize(*size))
    assert recipe.preprocessing.input_size[1:] == size
    loaded = recipe.load(made.weights, depth=made.depth)
    merged = patch(loaded.module, 0)
    images = images_of(merged)
    with torch.no_grad():
        expected, found = made.library(size)(images), merged(images)
    assert found.shape == expected.shape
    return loaded, float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize(("name", "size"), CASES)
def test_r_0_is_the_librarys_and_plans_are_the_references(name, size, tmp_path):
    loaded, error = errors(name, size, tmp_path)
    assert error <= 1e-6
    assert_plans_are_the_references(loaded.module)


def positions(module):
    """Name and value of the position embedding."""
    return next((k, v) for k, v in module.state_dict().items() if "pos" in k and v.ndim > 1)


KINDS = ["timm ViT/16", "timm EVA-02 (rotary)", "hf CLIP", "hf ViT", "hf DINOv2 registers"]
KINDS += ["hf LLaVA tower", "open_clip ViT", "open_clip TimmModel"]


@pytest.mark.parametrize("name", KINDS)
def test_a_file_saved_at_that_size_is_read_as_it_is(name, tmp_path):
    make, sizes = MODELS[name]
    made, size = make(tmp_path), ImageSize(*sizes[1])
    recipe = made.recipe.at(size)
    resampled = recipe.load(made.weights)
    before = resampled.weights.resampled_from
    assert patch(resampled.module, 0).image_size[1:] == sizes[1]
    assert f"{before[0]}x{before[1]} -> " in resampled.weights.source
    state = {key: value.contiguous() + 0.5 for key, value in resampled.module.state_dict().items()}
    save_file(state, tmp_path / "tuned.safetensors")
    again = recipe.load(str(tmp_path / "tuned.safetensors"))
    assert again.weights.resampled_from is None
    key, found = positions(again.module)
    assert torch.equal(found, state[key])


@pytest.mark.parametrize("name", [*KINDS, "timm DINOv3 (rotary)", "hf SigLIP", "hf DeiT"])
def test_a_seed_gives_the_same_weights_at_every_size(name, tmp_path):
    make, sizes = MODELS[name]
    recipe = make(tmp_path).recipe
    own, other = (
        one.load("random", seed=3).module.state_dict()
        for one in (recipe, recipe.at(ImageSize(*sizes[1])))
    )
    differ = [key for key in own if not torch.equal(own[key], other[key])]
    assert own.keys() == other.keys()
    assert all("pos" in key for key in differ)
    assert len(differ) == ("DINOv3" not in name)


@pytest.mark.parametrize(
    ("text", "size"), [("448x224", (448, 224)), (" 384 ", (384, 384)), ("16X32", (16, 32))]
)
def test_sizes_are_read(text, size):
    found = ImageSize.parse(text)
    assert (found.height, found.width) == size
    assert ImageSize.parse(str(found)) == found


@pytest.mark.parametrize("text", ["", "x", "224x", "224x224x3", "2e2", "٢٢٤", "9" * 30, "224,448"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(InputError, match="expected HEIGHTxWIDTH in pixels, such as 448x224"):
        ImageSize.parse(text)


@pytest.mark.parametrize("text", ["0", "-16", "224x0", "16385x16"])
def test_sizes_out_of_range_are_refused(text):
    with pytest.raises(InputError, match="expected sides of 1 to 16384 pixels"):
        ImageSize.parse(text)


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("timm:test_vit", "230x224", "expected a height of 224 or 240"),
        ("timm:test_vit", "224x250", "expected a width of 240 or 256"),
        ("timm:test_vit", "8", "expected a height of 16 and a width of 16"),
        ("hf_clip_b32", "224x250", "expected a width of 224 or 256"),
        ("dinov2_s14_saliency", "100x224", "expected a height of 98 or 112"),
        ("openclip_b16", "100x100", "expected a height of 96 or 112 and a width of 96 or 112"),
    ],
)
def test_a_size_that_patches_do_not_divide_is_refused_with_the_nearest(name, text, expected):
    with pytest.raises(InputError) as refused:
        resolve(name, image_size=ImageSize.parse(text))
    assert expected in str(refused.value)
    assert "\n" not in str(refused.value)


def test_models_that_are_made_for_one_size_are_refused(tmp_path, monkeypatch):
    (tmp_path / "own_size.py").write_text(
        "import timm\ndef make():\n    return timm.create_model('test_vit')\n"
    )
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="whose function makes the model for another; make it for"):
        resolve("own_size:make", image_size=ImageSize(320, 160))
    own = resolve("own_size:make", image_size=ImageSize(160, 160))
    assert own.preprocessing.input_size == (3, 160, 160)
    with pytest.raises(InputError, match="video tower of frames of 224x224, whose public code"):
        resolve("clip4clip_b32", image_size=ImageSize(448, 448))


def test_transformers_resamples_positions_of_squares_only(tmp_path):
    from hf_models import make

    make("ViT", image_size=[32, 16]).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="those of 8x4 patches, and Transformers resamples"):
        resolve(f"hf:{tmp_path}", image_size=ImageSize(32, 32))


def test_the_advice_is_the_rules_at_another_size():
    at_448x224 = RECIPES["vit_l16"].at(ImageSize(448, 224))
    assert (at_448x224.merging.r, at_448x224.merging.source) == (recommended_r(393, 24), RULE)
    assert "measured" in RECIPES["dinov2_s14"].at(ImageSize(518, 518)).merging.source
    assert RECIPES["dinov2_s14"].at(ImageSize(448, 448)).merging.source == RULE
    assert RECIPES["dinov2_s14"].at(ImageSize(112, 448)).merging.source == RULE
    # Needs the grid, whatever the size.
    assert not RECIPES["mae_b16"].at(ImageSize(448, 224)).merging.prop_attn


def test_models_describes_another_size():
    found = details("vit_s16", ImageSize(448, 224))
    assert found.input_size == (3, 448, 224)
    assert found.tokens == 1 + 28 * 14
    assert found.description.endswith("; here for images of 448x224")


def test_positions_of_as_many_patches_are_those_of_the_models_own_grid():
    """16 x 4 patches are as many as 8 x 8: by their number nothing tells them apart."""
    assert position_grid(64, (8, 8), (16, 4)) == (8, 8)
    assert position_grid(64, (7, 7), (16, 4)) == (16, 4)
    assert position_grid(63, (7, 7), (16, 4)) is None
    table = torch.randn(65, 3)
    state, before = fit_positions({"pos": table}, "pos", 65, (8, 8), (16, 4))
    square = table[1:].T.reshape(1, 3, 8, 8)
    expected = torch.nn.functional.interpolate(square, (16, 4), mode="bicubic", antialias=True)
    assert before == (8, 8)
    assert torch.equal(state["pos"][0], table[0])
    assert torch.allclose(state["pos"][1:], expected.reshape(3, -1).T, atol=1e-6)


def test_attention_that_memory_cannot_hold_is_refused(monkeypatch):
    model = patch(resolve("timm:test_vit", image_size=ImageSize(320, 160)).architecture(), 5)
    tokens, heads = 1 + 20 * 10, 2
    needed = 4 * 8 * (2 * heads + 3) * tokens**2

    def with_free(size):
        memory = type("Memory", (), {"available": size})
        monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
        check_memory(model, 8)

    with_free(needed)
    with pytest.raises(InputError, match="images of 320x160 have 201 tokens, whose attention"):
        with_free(needed - 1)


def test_the_file_on_disk_is_not_changed(tmp_path):
    made = MODELS["timm ViT/16"][0](tmp_path)
    stored = load_file(made.weights)["pos_embed"]
    made.recipe.at(ImageSize(64, 64)).load(made.weights)
    assert torch.equal(load_file(made.weights)["pos_embed"], stored)
