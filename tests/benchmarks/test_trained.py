"""The benchmarks of trained weights: their measures by hand, equal MACs, what they run."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tome_export.models.hf.saliency import SaliencyDecoder, SaliencyModel
from tome_export.patch import patch


@pytest.fixture
def trained(bench: Any) -> Any:
    return bench("trained")


@pytest.fixture(scope="module")
def saliency() -> SaliencyModel:
    """A tiny model of 1 + 36 tokens with random weights."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.Dinov2Config(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=2, image_size=24, patch_size=4
    )
    backbone = transformers.Dinov2Model(config)
    return SaliencyModel(backbone, SaliencyDecoder(32, (8, 4, 2))).eval()


def test_recall_counts_the_nearest_other_image(trained):
    # Angles of 0, 10, 90, 95 and 40 degrees: the nearest of the last is the second, of label 0.
    angles = np.deg2rad([0, 10, 90, 95, 40])
    features = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    assert trained.recall(features, np.array([0, 0, 1, 1, 1])) == 4
    assert trained.recall(5 * features, np.array([0, 0, 1, 1, 0])) == 5
    assert trained.recall(features, np.array([0, 1, 0, 1, 2])) == 0


def test_map_measures_by_hand(trained):
    unmerged = np.array([[0.0, 1.0, 2.0], [0.0, 0.0, 3.0]])
    maps = np.array([[1.0, 3.0, 5.0], [3.0, 0.0, 0.0]])
    # (-1, -1, 2) and (2, -1, -1): -3 of 6.
    found = trained.map_measures(maps, unmerged)
    assert found["correlation"] == pytest.approx({"mean": 0.25, "lowest": -0.5})
    assert found["mean_absolute_error"] == pytest.approx((1 + 2 + 3 + 3 + 0 + 3) / 6)


def test_tokens_are_spread_from_the_first_layer_on(trained):
    assert trained.spread(26, 12) == [3, 3, *[2] * 10]
    assert trained.spread(3, 4) == [1, 1, 1, 0]


@pytest.mark.parametrize("name", ["tome", "pitome", "kth", "evit", "topk", "diffrate"])
def test_nearest_has_the_macs_or_the_next_to_them(trained, saliency, name):
    tower = saliency.backbone
    wanted = patch(tower, 6).macs()
    found = trained.nearest(name, tower, wanted)
    assert found.settings.reducer.name == name
    removed = [layer.r for layer in found.layers]
    assert sum(removed) == 18
    assert max(removed) - min(removed) <= 1
    assert found.macs() == wanted
    # Between two whole numbers the nearer one: one more token in the first layer, or none.
    one_more = patch(tower, [7, 6, 6]).macs()
    assert trained.nearest("tome", tower, wanted - (wanted - one_more) // 3).macs() == wanted
    between = trained.nearest("tome", tower, one_more + (wanted - one_more) // 3)
    assert [layer.r for layer in between.layers] == [7, 6, 6]


@pytest.mark.parametrize("name", ["tome", "evit", "topk"])
def test_whole_model_and_tower_are_the_same_run(trained, saliency, name):
    tower = trained.nearest(name, saliency.backbone, patch(saliency.backbone, 6).macs())
    images = torch.randn(9, 3, 24, 24, generator=torch.Generator().manual_seed(1))
    seen = trained.outputs_of(tower, saliency, images)
    with torch.inference_mode():
        np.testing.assert_allclose(seen.features, tower(images).numpy(), rtol=1e-5, atol=1e-5)
        if name == "topk":  # what it drops has no place on a map
            assert seen.maps is None
            return
        whole = patch(saliency, [6, 6, 6], reducer=tower.settings.reducer)
        np.testing.assert_allclose(seen.maps, whole(images).numpy(), rtol=1e-5, atol=1e-5)
    assert not saliency.backbone.layernorm._forward_hooks


def test_crops_are_squares_of_different_photographs(trained):
    recipe = SimpleNamespace(preprocessing=trained.resolve("dinov2_s14_saliency").preprocessing)
    found = trained.crops(SimpleNamespace(recipe=recipe), 2, 5)
    assert found.labels.tolist() == [0, 0, 5, 5, 10, 10, 15, 15, 20, 20]
    assert found.pixels.shape == (10, 3, 224, 224)
    flat = found.pixels.flatten(1)
    assert (torch.cdist(flat, flat) > 1).sum() == 90  # no two are alike
    again = trained.crops(SimpleNamespace(recipe=recipe), 1, 5)
    assert torch.equal(again.pixels, found.pixels[::2])


def test_rows_go_on_where_they_were_left(trained, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("benchmarks.harness.RESULTS", tmp_path)
    monkeypatch.setattr(trained, "RESULTS", tmp_path)
    first = {"part": "quality", "size": 224, "reducer": "tofu", "tome_r": 8, "weights": "a"}
    rows = trained.Rows(write=True, again=False)
    assert not rows.has(first)
    rows.add({**first, "recall": 1})
    rows.add({**first, "reducer": "tome", "recall": 2})
    rows = trained.Rows(write=True, again=False)
    assert rows.has(first)
    assert not rows.has({**first, "weights": "b"})
    assert not trained.Rows(write=True, again=True).has(first)
    rows.add({**first, "weights": "b", "recall": 3})
    written = json.loads((tmp_path / "trained.json").read_text())["rows"]
    assert [(row["reducer"], row["recall"]) for row in written] == [("tome", 2), ("tofu", 3)]
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_largest_activation_of_each_block(bench, saliency):
    model = patch(saliency.backbone, 0)
    block: Any = model.blocks[1]
    before = block.norm2.bias.data.clone()
    try:
        block.norm2.bias.data[3] = 700.0
        found = bench("half").largest_by_block(model, torch.zeros(1, 3, 24, 24))
    finally:
        block.norm2.bias.data.copy_(before)
    assert [layer for layer, (value, _) in enumerate(found) if value > 600] == [1]
    assert found[1] == (pytest.approx(700, abs=5), "norm2")
    assert not block.norm2._forward_hooks
