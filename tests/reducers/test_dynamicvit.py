"""DynamicViT: predictors score the tokens; their weights come as the authors publish them."""

from __future__ import annotations

import re

import pytest
import torch
from reducers import (
    assert_macs,
    digit_model,
    options_of,
)
from references import dynamicvit as reference
from safetensors.torch import save_file

from tome_export.build import BuildRequest, build
from tome_export.errors import InputError
from tome_export.models import RECIPES
from tome_export.reducers import reducer_from_text
from tome_export.reducers.base import ModelShape
from tome_export.reducers.dynamicvit import DynamicViT, Predictors
from tome_export.runtime.model import reference_model

RANDOM = DynamicViT(weights="random")


def predictors(width=64, count=3, seed=1):
    """Weights in the layout of the public checkpoints, every one of them live."""
    generator = torch.Generator().manual_seed(seed)
    like = Predictors(width, count).state_dict()
    return {key: torch.randn(v.shape, generator=generator) / 8 for key, v in like.items()}


@pytest.mark.parametrize(
    ("depth", "patches", "keep", "at", "rates", "stages"),
    [
        (12, 196, "0.7", "", (0.7, 0.7**2, 0.7**3), (3, 6, 9)),
        (16, 196, "0.5", "", (0.5, 0.25, 0.125), (4, 8, 12)),
        (12, 196, "0.9,0.5,0.3", "", (0.9, 0.5, 0.3), (3, 6, 9)),
        (6, 3, "0.1", "2,5", (0.1, 0.01), (2, 5)),
    ],
)
def test_counts_are_the_papers(depth, patches, keep, at, rates, stages):
    options = [f"keep={keep}", *([f"at={at}"] if at else [])]
    reducer, tower = reducer_from_text("dynamicvit", options), ModelShape(32, depth, patches + 1, 1)
    expected = reference.counts(depth, patches, rates, stages)
    assert list(reducer.counts(tower).per_layer) == expected
    layers = reducer.layers(reducer.counts(tower), tower)
    assert [layer.r for layer in layers] == expected
    assert all(layer.behind_block for layer in layers)


def test_deit_has_the_tokens_of_the_paper():
    """Of 196 patches 137, 96 and 67 are left, and the class token."""
    tower = ModelShape(384, 12, 197, 1)
    layers = DynamicViT().layers(DynamicViT().counts(tower), tower)
    assert [(i, layer.tokens_out) for i, layer in enumerate(layers) if layer.r] == [
        (2, 138),
        (5, 97),
        (8, 68),
    ]


def test_r_goes_where_predictors_are_and_is_clamped_and_counted():
    assert [layer.r for layer in digit_model(RANDOM, 5).layers] == [5, 0, 5, 5, 0, 0]
    assert [layer.r for layer in digit_model(RANDOM, 1000).layers] == [63, 0, 0, 0, 0, 0]
    assert not digit_model(DynamicViT(), 0).merges
    assert_macs(digit_model(RANDOM, None))


def test_one_file_has_the_model_and_its_predictors(tmp_path):
    """The layout of the public checkpoints: ``--weights FILE --reducer dynamicvit`` is all."""
    vit = RECIPES["vit_digits"].load().module
    own = predictors()
    file = tmp_path / "dynamicvit.pth"
    torch.save({"model": {**vit.state_dict(), **own}}, file)
    artifact = build(
        BuildRequest(
            "vit_digits", tmp_path / "a", weights=str(file), reducer="dynamicvit", engine="none"
        )
    )
    assert artifact.manifest.merge.reducer.options["weights"] is None
    model, _ = reference_model(artifact, str(file))
    for key, value in own.items():
        assert torch.equal(model.reducer.state_dict()[key], value)
    assert_is_learned(model)
    other = tmp_path / "other.pth"
    torch.save({**vit.state_dict(), **predictors(seed=2)}, other)
    model, _ = reference_model(artifact, str(other))
    for key, value in own.items():  # those of the build, not the other file's
        assert torch.equal(model.reducer.state_dict()[key], value)


def assert_is_learned(model):
    names = [name for name in model.state_dict() if name.startswith("reducer.score_predictor.")]
    assert len(names) == len(predictors())


def test_a_file_of_their_own(tmp_path):
    file = tmp_path / "predictors.safetensors"
    vit = RECIPES["vit_digits"].load().module
    save_file({**vit.state_dict(), **predictors()}, file)
    reducer = reducer_from_text("dynamicvit", [f"weights={file}"])
    assert options_of(reducer)["weights"] == str(file)
    assert_is_learned(digit_model(reducer, None))


@pytest.mark.parametrize(
    ("state", "options", "message"),
    [
        (None, ["weights=no.pth"], "weights file {folder}/no.pth does not exist; expected "
         "'pretrained', 'random', or a file ending in .safetensors, .pth, .pt, .bin, "
         ".ckpt, .tar"),
        (None, [], "the file of the model's weights has no score_predictor.*, the predictors of "
         "reducer dynamicvit; give a DynamicViT checkpoint with --weights PATH or "
         "--reducer-option weights=PATH, or try the toolchain with --reducer-option "
         "weights=random"),
        (predictors(count=2), ["weights={file}"], "weights file {file} does not fit reducer "
         "dynamicvit on this model: score_predictor.2.in_conv.0.bias is missing; expected [64]"),
        (predictors(count=3), ["weights={file}", "at=2,4"], "weights file {file} does not fit "
         "reducer dynamicvit on this model: score_predictor.2.in_conv.0.bias is [64]; expected "
         "nothing of that name"),
        (predictors(width=32), ["weights={file}"], "weights file {file} does not fit reducer "
         "dynamicvit on this model: score_predictor.0.in_conv.0.bias is [32]; expected [64]"),
        (None, ["at=0,3"], "option at of reducer dynamicvit has layer 0; expected layers from 1, "
         "because tokens go in front of them"),
    ],
)  # fmt: skip
def test_bad_weights_and_options(tmp_path, monkeypatch, state, options, message):
    monkeypatch.chdir(tmp_path)
    names = {"folder": tmp_path, "file": tmp_path / "p.safetensors"}
    if state is not None:
        save_file(state, names["file"])
    with pytest.raises(InputError, match=f"^{re.escape(message.format(**names))}$"):
        digit_model(reducer_from_text("dynamicvit", [o.format(**names) for o in options]), None)
