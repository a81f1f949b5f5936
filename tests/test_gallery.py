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

ROOT = Path(__file__).parents[1]
STALE = "docs/gallery is stale; run `python scripts/gallery.py`"


@pytest.fixture
def gallery(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    return importlib.import_module("gallery")


def test_merged_tokens_picture(gallery):
    examples = json.loads(gallery.GROUPS.read_text())
    with Image.open(gallery.TOKENS) as committed:
        assert committed.text[gallery.DIGEST] == gallery.tokens_digest(examples), STALE
        shown = np.asarray(committed.convert("RGB")).astype(int)
    with Image.open(io.BytesIO(gallery.tokens_png(examples))) as drawn:
        fresh = np.asarray(drawn.convert("RGB")).astype(int)
    assert fresh.shape == shown.shape, STALE
    # Other versions of Pillow round and set type a little differently.
    assert (np.abs(fresh - shown).max(axis=-1) > 32).mean() < 0.01, STALE
    assert gallery.TOKENS.stat().st_size < 300_000


def test_random_weights_are_said(gallery):
    said = {
        example["model"]: example["weights"] for example in json.loads(gallery.GROUPS.read_text())
    }
    assert said == {"vit_digits": "trained weights", "vit_b16": "random weights"}


def test_groups_of_the_trained_model_are_those_of_its_artifact(gallery, built_artifact):
    (example,) = (e for e in gallery.EXAMPLES if e.model == "vit_digits")
    artifact = built_artifact(example.model, schedule=Schedule(example.r), check=False)
    found = gallery.groups_of(example, artifact)
    (recorded,) = (e for e in json.loads(gallery.GROUPS.read_text()) if e["model"] == example.model)
    assert found == recorded, "run `python scripts/gallery.py --groups`"


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
    examples = json.loads(gallery.GROUPS.read_text())
    digest = gallery.tokens_digest(examples)
    ids = next(iter(examples[0]["images"].values()))[0]["ids"]
    ids[0] += 1
    assert gallery.tokens_digest(examples) != digest
