"""The pictures of the README are those that scripts/gallery.py makes of today's rows and groups."""

from __future__ import annotations

import importlib
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tome_export.merge.schedule import Schedule
from tome_export.models import RECIPES
from tome_export.models.catalog import sizes_from_geometry

ROOT = Path(__file__).parents[1]
STALE = "docs/gallery is stale; run `python scripts/gallery.py`"


@pytest.fixture
def gallery(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    return importlib.import_module("gallery")


@pytest.fixture
def recorded(gallery):
    return json.loads(gallery.RECORD.read_text())


def test_merged_tokens_picture(gallery, recorded):
    with Image.open(gallery.TOKENS) as committed:
        assert gallery.tokens_digest(recorded) in committed.info["comment"].decode(), STALE
        shown = np.asarray(committed.convert("RGB")).astype(int)
    with Image.open(io.BytesIO(gallery.tokens_jpeg(recorded))) as drawn:
        fresh = np.asarray(drawn.convert("RGB")).astype(int)
    assert fresh.shape == shown.shape, STALE
    # Other versions of Pillow round and set type a little differently.
    assert (np.abs(fresh - shown).max(axis=-1) > 32).mean() < 0.01, STALE
    assert gallery.TOKENS.stat().st_size < 400_000


def test_what_is_recorded_is_of_trained_weights(gallery, recorded):
    recipe = RECIPES[recorded["model"]]
    assert (recorded["model"], recorded["r"]) == (gallery.MODEL, gallery.R)
    assert recorded["weights"] == "file"
    for entry in recorded["images"].values():
        counts = Schedule(recorded["r"]).tokens(recorded["depth"], *tokens_of(recipe))
        assert [layer["tokens"] for layer in entry["layers"]] == [
            counts[layer].tokens_out for layer in gallery.LAYERS
        ]


def tokens_of(recipe):
    """Tokens and prefix tokens in front of the first layer."""
    sizes = sizes_from_geometry(recipe)
    return sizes.tokens, sizes.prefix


@pytest.mark.slow
def test_the_trained_model_still_decides_what_is_recorded(gallery, recorded, trained_folder):
    found = gallery.run_models(trained_folder)
    for name, entry in found["images"].items():
        known = recorded["images"][name]
        for layer, old in zip(entry["layers"], known["layers"], strict=True):
            assert layer["tokens"] == old["tokens"]
            # Another processor rounds otherwise, and a near tie goes the other way.
            same = np.equal(layer["ids"], old["ids"]).mean()
            assert same > 0.95, f"{name}: run `python scripts/gallery.py --record OUT`"
        assert entry["difference"] == pytest.approx(known["difference"], abs=0.005)


def test_speed_plot(gallery):
    results = json.loads(gallery.RESULTS.read_text())
    committed, fresh = gallery.SPEED.read_text(), gallery.speed_svg(results)
    assert gallery.speed_digest(results) in committed, STALE
    versions = [re.search(r"Matplotlib v[\d.]+", text) for text in (committed, fresh)]
    if versions[0] and versions[1] and versions[0][0] == versions[1][0]:
        assert fresh == committed, STALE
    assert len(committed) < 300_000


def test_other_rows_make_another_plot(gallery):
    """What the tests above compare does follow the rows."""
    results = json.loads(gallery.RESULTS.read_text())
    before = gallery.speed_svg(results), gallery.speed_digest(results)
    results["rows"][0]["speedup"]["onnxruntime"] += 0.1
    after = gallery.speed_svg(results), gallery.speed_digest(results)
    assert before[0] != after[0]
    assert before[1] != after[1]
    recorded = json.loads(gallery.RECORD.read_text())
    digest = gallery.tokens_digest(recorded)
    next(iter(recorded["images"].values()))["layers"][0]["ids"][0] += 1
    assert gallery.tokens_digest(recorded) != digest
