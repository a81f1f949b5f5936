"""DTEM: ToMe by a learned metric, with the weights of the authors' layout."""

from __future__ import annotations

import re

import pytest
import torch
from reducers import (
    assert_macs,
    assert_plans,
    digit_images,
    digit_model,
    options_of,
    steps,
)
from references import dtem as reference
from safetensors.torch import save_file

from tome_export.errors import InputError
from tome_export.patch import patch
from tome_export.reducers import reducer_from_text
from tome_export.reducers.base import ModelShape
from tome_export.reducers.dtem import DTEM

RANDOM = DTEM(weights="random", features=8)


def lists(state):
    return {key: value.tolist() for key, value in state.items()}


def state_of(width, depth, features=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for layer in range(depth):
        key = f"blocks.{layer}.attn.qkv.metric_layer."
        state[key + "weight"] = torch.randn(features, width, generator=generator)
        state[key + "bias"] = torch.randn(features, generator=generator)
    return state


@pytest.mark.parametrize("layout", ["alone", "authors"])
def test_weights_of_a_file(tmp_path, layout):
    plain_model = digit_model(RANDOM, [5])
    width, depth = plain_model.tower.width, plain_model.tower.depth
    state = state_of(width, depth)
    if layout == "alone":
        path = tmp_path / "metric.safetensors"
        save_file(state, path)
    else:
        path = tmp_path / "name.pth"
        rest = {
            f"blocks.{n}.attn.qkv.weight": torch.zeros(3 * width + 8, width) for n in range(depth)
        }
        kept = {f"module.{key}": value for key, value in {**state, **rest}.items()}
        torch.save({"epoch": 3, "best_acc": 0.5, "state_dict": kept, "optimizer": {}}, path)
    model = digit_model(DTEM(str(path), 8), [5, 5])
    assert set(lists(state)) == set(model.reducer.state_dict())
    for step in steps(model, digit_images(2)):
        assert_plans(step.plan, step.layer, lambda one: reference.plan(one, lists(state)))
    assert {key for key in model.state_dict() if key.startswith("reducer.")} == {
        f"reducer.{key}" for key in state
    }


def test_blocks_beyond_a_cut_are_left_alone(tmp_path):
    path = tmp_path / "metric.safetensors"
    save_file(state_of(16, 12), path)
    found = DTEM(str(path), 8).module(ModelShape(16, 11, 65, 1)).state_dict()
    assert max(int(key.split(".")[1]) for key in found) == 10


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (
            {"blocks.0.attn.qkv.weight": torch.zeros(2, 2)},
            "has no blocks.*.attn.qkv.metric_layer.*, the metric of reducer dtem; expected a "
            "checkpoint of the authors' code, or its metric layers alone",
        ),
        (
            state_of(16, 2, features=4),
            "does not fit reducer dtem on this model: blocks.0.attn.qkv.metric_layer.bias is [4]; "
            "expected [8]",
        ),
        (
            state_of(16, 1),
            "does not fit reducer dtem on this model: blocks.1.attn.qkv.metric_layer.bias is "
            "missing; expected [8]",
        ),
    ],
    ids=["none", "features", "blocks"],
)
def test_files_that_do_not_fit(tmp_path, state, message):
    path = tmp_path / "metric.safetensors"
    save_file(state, path)
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        DTEM(str(path), 8).module(ModelShape(16, 2, 65, 1))
    assert str(caught.value) == f"weights file {path} {message}"


def test_without_weights():
    with pytest.raises(InputError) as caught:
        digit_model(DTEM(), 5)
    assert str(caught.value) == (
        "reducer dtem has no weights; give a DTEM checkpoint with --reducer-option weights=PATH, "
        "or try the toolchain with --reducer-option weights=random"
    )
    assert digit_model(DTEM(), 0).merges is False  # without merging it needs none


@pytest.mark.parametrize("name", ["Block", "ResPostBlock", "ParallelScalingBlock"])
def test_the_metric_reads_what_the_keys_read(make_vit, make_images, name):
    from timm.models import vision_transformer

    block = getattr(vision_transformer, name)
    model = patch(make_vit("test_vit", block_fn=block), [5], reducer=RANDOM)
    (step,) = steps(model, make_images(model, 2))
    attended, first = step.layer.attention, model.model.blocks[0]
    with torch.no_grad():
        if name == "ParallelScalingBlock":
            k = first.in_proj(attended.tokens).split(first.in_split, dim=-1)[2]
        else:
            k = first.attn.qkv(attended.tokens).chunk(3, dim=-1)[1]
    keys = attended.keys.transpose(1, 2).flatten(-2)
    torch.testing.assert_close(k, keys)


def test_attentions_side_by_side_are_refused(make_vit):
    from timm.models.vision_transformer import ParallelThingsBlock

    model = patch(make_vit("test_vit", block_fn=ParallelThingsBlock), 5, reducer=RANDOM)
    with pytest.raises(InputError, match="attentions side by side"):
        model(torch.zeros(1, *model.input_size))


def test_macs():
    assert_macs(digit_model(RANDOM, [7, 0, 7]))
    wide = digit_model(DTEM("random", 64), [7])
    assert wide.macs() - digit_model(DTEM("random", 1), [7]).macs() == 65 * wide.tower.width * 63


def test_options():
    reducer = reducer_from_text("dtem", ["weights=random", "features=128"])
    assert options_of(reducer) == {"weights": "random", "features": 128}
    with pytest.raises(InputError) as caught:
        reducer_from_text("dtem", ["features=0"])
    assert str(caught.value) == "features of reducer dtem is 0; expected 1 or more"
