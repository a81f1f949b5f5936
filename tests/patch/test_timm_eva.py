"""Timm's Eva: rotary positions follow the tokens that are kept."""

from __future__ import annotations

import pytest
import torch
from timm.models.eva import Eva, EvaBlock
from towers import (
    assert_duplicates_count,
    assert_plans_are_the_references,
    assert_r_0_is_the_librarys,
    built,
    images_of,
    live,
)

from tome_export.errors import InputError
from tome_export.patch import patch

SMALL = {
    "img_size": 64,
    "patch_size": 8,
    "embed_dim": 64,
    "depth": 3,
    "num_heads": 2,
    "num_classes": 10,
}
ROPE = {"use_rot_pos_emb": True, "use_abs_pos_emb": False}
STRUCTURES = {
    "no rope": {},
    "rope": ROPE,
    "EVA-02": ROPE
    | {"swiglu_mlp": True, "scale_mlp": True, "qkv_fused": False, "init_values": 0.1},
    "post-norm": {"use_post_norm": True, "global_pool": "token"},
    "DINOv3": ROPE
    | {
        "attn_type": "rope",
        "rope_type": "dinov3",
        "rope_rotate_half": True,
        "num_reg_tokens": 4,
        "no_embed_class": True,
        "global_pool": "token",
        "use_fc_norm": False,
    },
    "rope per layer and head": ROPE | {"attn_type": "rope", "rope_type": "mixed"},
    "grouped queries": ROPE | {"attn_type": "rope", "qkv_fused": False, "num_kv_heads": 1},
    "map": ROPE | {"attn_type": "rope", "global_pool": "map"},
    "average and largest": ROPE | {"global_pool": "avgmax"},
    "any image size": ROPE | {"dynamic_img_size": True},
    "q/k norm": ROPE | {"qk_norm": True, "scale_attn_inner": True},
    "no class token": ROPE | {"class_token": False},
}


def make(structure):
    return live(Eva(**SMALL | STRUCTURES[structure]))


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_r_0_is_timms_own_output(structure, dense):
    assert_r_0_is_the_librarys(make(structure), dense=dense)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_plans_are_the_references(structure):
    assert_plans_are_the_references(make(structure))


@pytest.mark.parametrize("structure", ["no rope", "post-norm"])
def test_duplicates_count(structure):
    model = make(structure)
    assert_duplicates_count(model, model.pos_embed)


@pytest.mark.parametrize("structure", ["rope", "DINOv3", "rope per layer and head"])
def test_a_kept_token_keeps_its_own_place(structure):
    """The next layer's keys are turned as at the places that the plans so far have kept."""
    model = make(structure)
    merged, seen = patch(model, 5), []
    images = images_of(merged)
    for block in model.blocks:
        block.attn.k_norm.register_forward_hook(lambda _m, _a, out: seen.append(out))
    with torch.no_grad():
        _, trace = merged.forward_traced(images)
        table = model._pos_embed(model.patch_embed(images))[1]
    prefix = merged.prefix
    for image in range(len(images)):
        places = list(range(merged.patch_grid.patches))
        for layer, step in enumerate(trace):
            plain = seen[layer][image][:, prefix:]
            turns = table[layer] if model.rope_mixed else table.expand(2, -1, -1)
            for token, place in enumerate(places):
                half = turns[:, place].chunk(2, -1)
                expected = turned(plain[:, token], *half, model.blocks[0].attn.rotate_half)
                torch.testing.assert_close(step.keys[image][:, prefix + token], expected)
            kept = step.plan.keep[image][prefix:].tolist()
            places = [places[token - prefix] for token in kept]


def turned(x, sine, cosine, halves):
    """One token's heads ``[H, D]``, every pair of channels turned by its angle."""
    first, second = x.chunk(2, -1) if halves else (x[:, ::2], x[:, 1::2])
    pair = torch.stack([-second, first], dim=1 if halves else 2).flatten(1)
    return x * cosine + pair * sine


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("structure", ["DINOv3", "rope per layer and head"])
def test_a_real_build_keeps_parity(tmp_path, monkeypatch, structure, precision):
    parity = built(make(structure), tmp_path, monkeypatch, precision).manifest.parity
    assert parity.passed
    if precision == "fp32":
        assert parity.disagreements == 0


def test_tensorrt_rtx_takes_it(tmp_path, monkeypatch):
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    made = built(make("EVA-02"), tmp_path, monkeypatch, "fp16", "tensorrt-rtx")
    assert made.manifest.engines["tensorrt-rtx"].size_bytes > 50_000


def test_other_blocks_are_named():
    class MyBlock(EvaBlock):
        pass

    model = make("rope")
    model.blocks[1].__class__ = MyBlock
    with pytest.raises(InputError, match="block class MyBlock of model Eva is not supported"):
        patch(model, 2)
