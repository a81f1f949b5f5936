"""MACs from token counts against torch's FlopCounterMode on the model that really runs."""

from __future__ import annotations

import pytest
import torch
from timm.models import vision_transformer as vit
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tome_export.merge.macs import BlockCost, total_macs
from tome_export.merge.schedule import LayerTokens
from tome_export.patch import patch

MODELS = {
    "class": ("test_vit", {}),
    "registers, avg": ("test_vit2", {}),
    "map": ("test_vit3", {}),
    "distilled": ("deit_tiny_distilled_patch16_224", {"embed_dim": 64, "depth": 3, "num_heads": 2}),
    "swiglu": ("vit_small_patch14_reg4_dinov2", {"embed_dim": 64, "depth": 3, "num_heads": 2}),
    "parallel things": (
        "vit_small_patch16_18x2_224",
        {"embed_dim": 64, "depth": 3, "num_heads": 2},
    ),
    "parallel scaling": ("test_vit", {"block_fn": vit.ParallelScalingBlock}),
    "differential": ("test_vit", {"attn_layer": "diff"}),
}


def counted(model: torch.nn.Module, images: torch.Tensor) -> float:
    counter = FlopCounterMode(display=False)
    # The fused CPU attention is not among the operators that torch counts.
    with sdpa_kernel(SDPBackend.MATH), counter:
        model(images)
    return counter.get_total_flops() / 2 / len(images)


@pytest.mark.parametrize("case", MODELS)
@pytest.mark.parametrize("r", [0, 5, [9, 0, 4]])
def test_macs_are_what_torch_counts(make_vit, case, r):
    name, kwargs = MODELS[case]
    merged = patch(make_vit(name, **kwargs), r)
    images = torch.zeros(2, *merged.input_size)
    assert merged.macs() == counted(merged, images)
    assert merged.macs(merged=False) == counted(patch(merged, 0), images)


def test_ratio_of_vit_b16():
    """The figure of the paper's setting: r = 16 halves ViT-B/16's work."""
    import timm

    with torch.device("meta"):
        model = patch(timm.create_model("vit_base_patch16_224"), 16)
    # Patch embedding and head, then per block qkv, proj and the two MLP matrices, QK^T and AV.
    fixed = 196 * 16 * 16 * 3 * 768 + 768 * 1000
    block = 197 * 12 * 768 * 768 + 2 * 197 * 197 * 768
    assert model.macs(merged=False) == fixed + 12 * block
    assert model.macs(merged=False) / model.macs() == pytest.approx(2.00, abs=0.005)


def test_formula_by_hand():
    cost = BlockCost(before=10, attention=2, after=100)
    assert cost.macs(LayerTokens(8, 3, 5)) == 8 * 10 + 64 * 2 + 5 * 100
    with pytest.raises(ValueError, match="zip"):
        total_macs([cost], [], 0)
