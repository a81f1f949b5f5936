"""Tuning a trained tower, whose features are what users would lose."""

from __future__ import annotations

import numpy as np
import pytest

from tome_export.artifact.goal import Goal
from tome_export.data.preprocess import read_image
from tome_export.data.samples import sample_paths
from tome_export.tune import TuneRequest, tune
from tome_export.tune import images as tune_images
from tome_export.tune import main as tune_main
from tome_export.tune import search as tune_search

CROPS = 16
"""Crops of each of the six photographs."""


@pytest.fixture
def crops(tmp_path):
    """Squares of random size and place out of the photographs that come along."""
    folder = tmp_path / "crops"
    folder.mkdir()
    for index, path in enumerate(sample_paths()):
        image, rng = read_image(path), np.random.default_rng(index)
        for number in range(CROPS):
            side = round(rng.uniform(0.4, 0.8) * min(image.size))
            left, top = (int(rng.integers(length - side + 1)) for length in image.size)
            part = image.crop((left, top, left + side, top + side))
            part.save(folder / f"{index}-{number:02d}.png")
    return folder


@pytest.mark.slow
def test_a_tuned_schedule_keeps_more_than_the_best_constant_r(
    trained_folder, crops, tmp_path, monkeypatch
):
    """At equal MACs, on images that nothing looked at before."""
    monkeypatch.setattr(tune_images, "HOLD_OUT", 90)
    monkeypatch.setattr(tune_main, "FREE", 8)
    monkeypatch.setattr(tune_search, "BASELINES", dict.fromkeys(tune_search.BASELINES, 2))
    request = TuneRequest(
        f"hf:{trained_folder}",
        Goal.target_macs("70%"),
        tmp_path / "schedule.json",
        data=(str(crops),),
        time_limit=3600.0,
    )
    found = tune(request)
    constant, estimate = found.best_constant, found.found.estimate
    assert 0.67 * found.unmerged.macs < constant.macs <= 0.7 * found.unmerged.macs
    assert found.found.macs <= 0.7 * found.unmerged.macs
    assert (estimate.on, estimate.images) == ("held out", found.data.held_out)
    assert estimate.images >= 24
    assert estimate.over_constant.mean > 0
    assert estimate.mean > estimate.best_constant.mean > 0.97
