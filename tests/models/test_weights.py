from __future__ import annotations

import pytest
import torch

from tome_export.errors import InputError
from tome_export.models import RECIPES

TIMM = [name for name, r in RECIPES.items() if r.source.loader.timm_name and name != "vit_l16"]


def test_random_weights_are_seeded_and_leave_the_generator_alone():
    recipe = RECIPES["deit_ti16"]
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    first, again, other = (recipe.load("random", seed=s, depth=1) for s in (5, 5, 6))
    assert torch.equal(torch.rand(3), expected)
    pairs = zip(first.module.parameters(), again.module.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not torch.equal(first.module.head.weight, other.module.head.weight)
    assert (first.weights.kind, first.weights.seed, first.weights.sha256) == ("random", 5, None)
    assert first.weights.source == "random, seed 5"


@pytest.mark.parametrize("name", TIMM)
def test_random_weights_hide_nothing(name):
    recipe = RECIPES[name]
    module = recipe.load("random", depth=2).module
    assert not module.training
    for key, value in module.named_parameters():
        assert value.dtype == torch.float32
        assert not value.requires_grad
        assert value.numel() == 1 or value.max() - value.min() >= 1e-3, key
    gammas = [v for k, v in module.named_parameters() if k.rpartition(".")[2].startswith("gamma")]
    assert all(v.mean() > 0.4 for v in gammas)
    x = torch.randn(2, *recipe.preprocessing.input_size)
    a, b = module(x)
    # Two images give different answers, and every block takes part in them.
    assert (a - b).abs().max() > 1e-3
    # Zeroed, a block passes tokens through unchanged.
    for value in module.blocks[1].parameters():
        value.zero_()
    assert (module(x)[0] - a).abs().max() > 1e-3


def test_depth():
    assert len(RECIPES["vit_b16"].load("random", depth=1).module.blocks) == 1
    with pytest.raises(InputError, match="depth is 0; expected 1 or more blocks"):
        RECIPES["vit_b16"].load("random", depth=0)
    with pytest.raises(InputError, match="depth 2 was asked with pretrained weights"):
        RECIPES["vit_b16"].load(depth=2)


def test_bundled_weights_are_the_pretrained_ones():
    loaded = RECIPES["vit_digits"].load()
    assert loaded.weights.kind == "bundled"
    assert loaded.weights.source == "vit_digits.safetensors"
    assert len(loaded.weights.sha256) == 64
