"""Open_clip's image towers: its own ViT in every configuration, timm's inside it."""

from __future__ import annotations

from functools import partial

import pytest
import timm
import torch
from towers import (
    assert_duplicates_count,
    assert_plans_are_the_references,
    assert_r_0_is_the_librarys,
    built,
    images_of,
    live,
)

open_clip = pytest.importorskip("open_clip", reason="open_clip is not installed")

from open_clip.timm_model import TimmModel  # noqa: E402
from open_clip.transformer import LayerNormFp32, QuickGELU, VisionTransformer  # noqa: E402

from tome_export.errors import InputError  # noqa: E402
from tome_export.patch import patch  # noqa: E402

SMALL = {
    "image_size": 64,
    "patch_size": 8,
    "width": 64,
    "layers": 3,
    "heads": 2,
    "mlp_ratio": 2,
    "output_dim": 32,
}
STRUCTURES = {
    "class token": {},
    "average": {"pool_type": "avg"},
    "average, norm behind it": {
        "pool_type": "avg",
        "no_ln_pre": True,
        "final_ln_after_pool": True,
    },
    "QuickGELU": {"act_layer": QuickGELU},
    "LayerScale": {"ls_init_value": 0.1},
    "attentional pooler": {
        "attentional_pool": True,
        "attn_pooler_queries": 8,
        "attn_pooler_heads": 4,
        "output_tokens": True,
    },
    "custom block": {
        "qk_norm": True,
        "scale_heads": True,
        "scale_attn_inner": True,
        "scale_attn": True,
        "scale_fc": True,
    },
    "fixed positions": {"pos_embed_type": "sin_cos_2d"},
    "patch dropout": {"patch_dropout": 0.5},
    "not square": {"image_size": (48, 80)},
}
TRUNK = {"img_size": 64, "patch_size": 8, "embed_dim": 64, "depth": 3, "num_heads": 2}
TRUNKS = {
    "SigLIP": ("vit_base_patch16_siglip_224", "map", "none"),
    "EVA-CLIP": ("eva02_base_patch16_clip_224", "token", None),
    "projected": ("vit_base_patch16_224", "avg", "linear"),
}


def make(structure):
    return live(VisionTransformer(**SMALL | STRUCTURES[structure]))


def make_timm(monkeypatch, name, pool, proj):
    create = timm.create_model
    with monkeypatch.context() as context:
        context.setattr(timm, "create_model", lambda n, **given: create(n, **given | TRUNK))
        return live(TimmModel(name, 32, image_size=64, pool=pool, proj=proj))


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_r_0_is_open_clips_own_output(structure, dense):
    assert_r_0_is_the_librarys(make(structure), dense=dense)


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("trunk", TRUNKS)
def test_r_0_of_timms_trunks(monkeypatch, trunk, dense):
    assert_r_0_is_the_librarys(make_timm(monkeypatch, *TRUNKS[trunk]), dense=dense)


@pytest.mark.parametrize("structure", ["class token", "attentional pooler", "custom block"])
def test_plans_are_the_references(structure):
    assert_plans_are_the_references(make(structure))


@pytest.mark.parametrize("trunk", TRUNKS)
def test_plans_of_timms_trunks(monkeypatch, trunk):
    assert_plans_are_the_references(make_timm(monkeypatch, *TRUNKS[trunk]))


@pytest.mark.parametrize("structure", STRUCTURES)
def test_duplicates_count(structure):
    model = make(structure)
    assert_duplicates_count(model, model.positional_embedding)


def test_it_is_encode_image_of_the_whole_model():
    clip = open_clip.CLIP(
        32,
        {"image_size": 64, "patch_size": 8, "width": 64, "layers": 2, "head_width": 32},
        {"context_length": 8, "vocab_size": 16, "width": 32, "heads": 2, "layers": 1},
    ).eval()
    merged = patch(clip.visual, 0)
    images = images_of(merged)
    with torch.no_grad():
        expected = clip.encode_image(images, normalize=False)
        torch.testing.assert_close(merged(images), expected)
    with pytest.raises(InputError, match=r"CLIP is a whole open_clip model; patch its image tower"):
        patch(clip, 2)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("structure", ["attentional pooler", "custom block"])
def test_a_real_build_keeps_parity(tmp_path, monkeypatch, structure, precision):
    parity = built(make(structure), tmp_path, monkeypatch, precision).manifest.parity
    assert parity.passed
    if precision == "fp32":
        assert parity.disagreements == 0


def test_a_real_build_of_a_timm_trunk(tmp_path, monkeypatch):
    model = make_timm(monkeypatch, *TRUNKS["EVA-CLIP"])
    assert built(model, tmp_path, monkeypatch, "fp32").manifest.parity.passed


def test_tensorrt_rtx_takes_it(tmp_path, monkeypatch):
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    made = built(make("class token"), tmp_path, monkeypatch, "fp16", "tensorrt-rtx")
    assert made.manifest.engines["tensorrt-rtx"].size_bytes > 50_000


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"pool_type": "none"}, "pool type 'none' of open_clip VisionTransformer hands on every"),
        ({"attentional_pool": "parallel"}, "attention pooling 'parallel' of open_clip .* two pool"),
        ({"scaled_cosine_attn": True}, "is scaled cosine attention, which open_clip itself cannot"),
        ({"norm_layer": LayerNormFp32}, "normalisation class LayerNormFp32 of model open_clip"),
        ({"act_layer": partial(torch.nn.Softmax, dim=1)}, "MLP part class Softmax of model open_"),
    ],
)
def test_what_is_not_understood_is_named(kwargs, message):
    with pytest.raises(InputError, match=message) as caught:
        patch(VisionTransformer(**SMALL | kwargs).eval(), 2)
    assert "\n" not in str(caught.value)


def test_a_trunk_that_is_no_vit_is_named():
    model = TimmModel("resnet18", 32, image_size=64)
    with pytest.raises(InputError, match="trunk class ResNet of open_clip TimmModel is not suppor"):
        patch(model.eval(), 2)
