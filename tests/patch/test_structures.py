"""Every structure of timm's ViTs: r = 0 is timm's own output, r > 0 is what the parts say.

The sweep over timm's whole registry is ``benchmarks/registry.py``; here stands one model per
structure, on every run.
"""

from __future__ import annotations

import importlib
from functools import partial
from pathlib import Path

import pytest
import torch
from timm.layers import GluMlp, LayerNorm, SwiGLU, SwiGLUPacked
from timm.models import vision_transformer as vit
from timm.models.vitamin import GeGluMlp

from tome_export.patch import patch


def gate_attention(model):
    """timm's ViT has no argument for its attention's gate."""
    for block in model.blocks:
        block.attn = vit.Attention(64, num_heads=2, qkv_bias=True, gated=True)


NARROW = {"embed_dim": 64, "depth": 3, "num_heads": 2}
STRUCTURES = {
    "class token": ("test_vit", {}),
    "class and register tokens": ("test_vit", {"reg_tokens": 4}),
    "position embedding of patches only": ("test_vit", {"no_embed_class": True, "reg_tokens": 2}),
    "no position embedding": ("test_vit", {"pos_embed": "none"}),
    "no qkv bias, no proj bias": ("test_vit", {"qkv_bias": False, "proj_bias": False}),
    "register tokens, LayerScale, avg": ("test_vit2", {}),
    "no prefix, avg": ("test_vit", {"class_token": False, "global_pool": "avg"}),
    "map": ("test_vit3", {}),
    "map without prefix": ("test_vit3", {"pool_include_prefix": False}),
    "RMSNorm": ("test_vit4", {}),
    "avg with prefix": ("test_vit2", {"pool_include_prefix": True}),
    "avgmax": ("test_vit2", {"global_pool": "avgmax"}),
    "max": ("test_vit2", {"global_pool": "max"}),
    "no pooling": ("test_vit", {"global_pool": ""}),
    "no pooling, no head": ("test_vit2", {"global_pool": "", "num_classes": 0}),
    "features": ("test_vit", {"num_classes": 0}),
    "avg with class token and fc_norm": ("test_vit", {"global_pool": "avg"}),
    "avg, norm before pooling": ("test_vit", {"global_pool": "avg", "fc_norm": False}),
    "norm before the blocks": ("test_vit", {"pre_norm": True}),
    "no final norm": ("test_vit", {"final_norm": False}),
    "q/k norm": ("test_vit", {"qk_norm": True}),
    "norms inside attention and MLP": (
        "test_vit",
        {"scale_attn_norm": True, "scale_mlp_norm": True},
    ),
    "gated attention": ("test_vit", {"edit": gate_attention}),
    "GluMlp": ("test_vit", {"mlp_layer": GluMlp}),
    "SwiGLU": ("test_vit", {"mlp_layer": SwiGLU}),
    "packed SwiGLU": ("test_vit", {"mlp_layer": SwiGLUPacked}),
    "GeGluMlp": ("test_vit", {"mlp_layer": GeGluMlp}),
    "post-norm block": ("test_vit", {"block_fn": vit.ResPostBlock, "init_values": 0.1}),
    "parallel scaling block": ("test_vit", {"block_fn": vit.ParallelScalingBlock}),
    "parallel scaling block, fused output": (
        "test_vit",
        {"block_fn": partial(vit.ParallelScalingBlock, fuse_out_proj=True)},
    ),
    "parallel scaling block, q/k norm": (
        "test_vit",
        {"block_fn": vit.ParallelScalingBlock, "qk_norm": True, "init_values": 0.1},
    ),
    "parallel things block": ("test_vit", {"block_fn": vit.ParallelThingsBlock}),
    "differential attention": ("test_vit", {"attn_layer": "diff"}),
    "differential parallel block": ("test_vit", {"block_fn": vit.DiffParallelScalingBlock}),
    "distilled": ("deit_tiny_distilled_patch16_224", NARROW),
    "DINOv2 with registers": ("vit_small_patch14_reg4_dinov2", NARROW),
    "convolutional stem": (
        "vit_tiny_r_s16_p8_224",
        NARROW | {"img_size": 64, "patch_size": 1, "num_classes": 10},
    ),
    "not square": ("test_vit", {"img_size": (48, 80)}),
    "one channel": ("test_vit", {"in_chans": 1}),
    "one wide norm": ("test_vit", {"norm_layer": partial(LayerNorm, eps=1e-2)}),
}


def make(make_vit, structure, **more):
    name, kwargs = STRUCTURES[structure]
    small = "dinov2" not in name and structure != "convolutional stem"
    size = {"img_size": 56, "patch_size": 7, "num_classes": 10} if "dinov2" in name else {}
    return make_vit(name, small=small, **{**size, **kwargs, **more})


@pytest.mark.parametrize("structure", STRUCTURES)
def test_r_0_is_timms_own_output(make_vit, make_images, structure):
    model = make(make_vit, structure)
    merged = patch(model, 0)
    images = torch.from_numpy(make_images(merged))
    with torch.no_grad():
        expected, output = model(images), merged(images)
    assert output.shape == expected.shape
    assert (output - expected).abs().max() <= 1e-6 * expected.abs().max()
    assert not merged.merges


@pytest.mark.parametrize("structure", STRUCTURES)
def test_merging_changes_the_output_and_counts_its_tokens(make_vit, make_images, structure):
    model = make(make_vit, structure)
    merged = patch(model, 5)
    images = torch.from_numpy(make_images(merged))
    with torch.no_grad():
        output, trace = merged.forward_traced(images)
        unmerged = model(images)
    assert len(trace) == len(merged.layers)
    prefix = model.num_prefix_tokens
    for step, layer in zip(trace, merged.layers, strict=True):
        assert step.metric.shape[1] == layer.tokens_in
        assert step.plan.keep.shape[1] == layer.tokens_out == layer.tokens_in - 5
        assert (step.plan.keep[:, :prefix] == torch.arange(prefix)).all()
    if model.global_pool == "":
        # Every token that is left, prefix tokens included.
        assert output.shape[1] == unmerged.shape[1] - 5 * len(merged.layers)
    else:
        assert output.shape == unmerged.shape
        # It merges, and yet does much the same.
        assert 1e-4 < (output - unmerged).abs().max() / unmerged.abs().max() < 2
    assert output.isfinite().all()


@pytest.mark.parametrize("structure", ["class token", "map", "differential attention", "distilled"])
def test_layers_after_a_pause_still_weigh_tokens_by_size(make_vit, make_images, structure):
    """Layers that do not merge come after one that does: the bias stays on."""
    model = make(make_vit, structure)
    merged, off = patch(model, [20]), patch(model, [20], prop_attn=False)
    images = torch.from_numpy(make_images(merged))
    with torch.no_grad():
        assert (merged(images) - off(images)).abs().max() > 1e-3


@pytest.mark.parametrize("structure", STRUCTURES)
def test_size_weighting_makes_duplicates_count(make_vit, structure):
    """Merging exact duplicates changes nothing: what the sizes are for.

    An image of equal patches without position embedding has equal tokens; merged by size-weighted
    mean, with log(size) in attention and pooling, the model cannot tell the difference.
    """
    model = make(make_vit, structure)
    if structure == "convolutional stem":
        pytest.skip("patches at the border of a padded convolution differ")
    with torch.no_grad():
        if model.pos_embed is not None:
            patches = model.patch_embed.num_patches
            model.pos_embed[:, -patches:] = model.pos_embed[:, -1:]
    merged = patch(model.double(), 7)
    images = torch.ones(2, *merged.input_size, dtype=torch.float64)
    images[1] *= -0.5
    with torch.no_grad():
        expected, output = model(images), merged(images)
    if model.global_pool == "":
        expected, output = expected[:, -1], output[:, -1]
    assert (output - expected).abs().max() <= 1e-5 * expected.abs().max()


# Where the heads stand in what the key norm hands on.
KEYS = [
    ("test_vit", {"qk_norm": True}, lambda block: block.attn.k_norm, 1),
    ("test_vit", {"qk_norm": True, "attn_layer": "diff"}, lambda block: block.attn.k_norm, 1),
    (
        "test_vit",
        {"qk_norm": True, "block_fn": vit.ParallelScalingBlock},
        lambda block: block.k_norm,
        2,
    ),
]


@pytest.mark.parametrize(("name", "kwargs", "key_norm", "heads"), KEYS)
def test_metric_is_the_mean_of_the_keys_that_attend(
    make_vit, make_images, name, kwargs, key_norm, heads
):
    """Behind the key norm where there is one: those are the keys that attention compares."""
    model = make_vit(name, **kwargs)
    merged, seen = patch(model, 5), []
    for block in model.blocks:
        key_norm(block).register_forward_hook(lambda _m, _a, out: seen.append(out))
    with torch.no_grad():
        _, trace = merged.forward_traced(torch.from_numpy(make_images(merged)))
    assert len(seen) == len(trace) == len(model.blocks)
    for keys, step in zip(seen, trace, strict=True):
        torch.testing.assert_close(step.metric, keys.mean(heads))
        torch.testing.assert_close(step.keys, keys if heads == 1 else keys.transpose(1, 2))


def test_parallel_branches_give_all_their_heads(make_vit, make_images):
    model = make_vit("test_vit", block_fn=vit.ParallelThingsBlock, qk_norm=True)
    merged, seen = patch(model, 5), []
    for block in model.blocks:
        for branch in block.attns:
            branch.attn.k_norm.register_forward_hook(lambda _m, _a, out: seen.append(out))
    with torch.no_grad():
        _, trace = merged.forward_traced(torch.from_numpy(make_images(merged)))
    assert len(seen) == 2 * len(trace)
    for step, first, second in zip(trace, seen[::2], seen[1::2], strict=True):
        assert torch.equal(step.keys, torch.cat([first, second], dim=1))
        torch.testing.assert_close(step.metric, (first.mean(1) + second.mean(1)) / 2)


@pytest.mark.slow
def test_whole_registry(monkeypatch):
    """Every plain ViT of timm: r = 0 is its own output, or it is refused by name."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2])
    registry = importlib.import_module("benchmarks.registry")
    rows = registry.sweep()
    assert len(rows) >= 150
    assert [row for row in rows if row.verdict == "WRONG"] == []
    assert [
        row for row in rows if row.verdict == "refused" and "not supported" not in row.reason
    ] == []
