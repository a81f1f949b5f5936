"""Dense features and source maps of images that are not square, from a checkpoint to pictures."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("transformers", reason="Transformers is not installed")

import hf_models

from tome_export.artifact import Artifact
from tome_export.build import BuildRequest, build
from tome_export.errors import InputError
from tome_export.merge.schedule import Schedule
from tome_export.models.facts import DATA
from tome_export.report.commands import reproducing_commands
from tome_export.runtime.merge_maps import merge_maps
from tome_export.runtime.model import reference_model, rescheduled
from tome_export.spec import ImageSize
from tome_export.visualize.main import InspectRequest, inspect

SIZE, ROWS, COLUMNS = ImageSize(48, 24), 12, 6
PHOTOGRAPH = DATA / "astronaut.jpg"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sized")
    model = hf_models.make("registers")
    model.save_pretrained(folder / "checkpoint")
    request = BuildRequest(
        f"hf:{folder / 'checkpoint'}",
        folder / "artifact",
        schedule=Schedule(7),
        image_size=SIZE,
        dense=True,
        source_map=True,
        engine="none",
    )
    return model, build(request)


def test_build_json_says_the_size_and_what_was_resampled(made):
    manifest = Artifact.open(made[1].path).manifest
    assert manifest.model.image_size == "48x24"
    assert manifest.model.weights.resampled_from == (8, 8)
    assert "resampled 8x8 -> 12x6 patches" in manifest.model.weights.source
    assert manifest.preprocessing.input_size == (3, 48, 24)
    assert (manifest.patches.rows, manifest.patches.cols) == (ROWS, COLUMNS)
    assert [output.shape[1:] for output in manifest.outputs] == [(72, 32), (72,)]
    assert manifest.parity.passed
    assert "--image-size 48x24" in reproducing_commands(manifest, None, None, "x")[0]


def test_the_model_is_found_again_and_is_the_librarys(made):
    model, artifact = made
    merged, recipe = reference_model(artifact)
    assert recipe.preprocessing.input_size == (3, 48, 24)
    images = torch.randn(2, 3, 48, 24, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        # The class token and two registers stand in front.
        expected = model(images).last_hidden_state[:, 3:]
        found = rescheduled(merged, Schedule(0))(images)[0]
    assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()


def test_pictures_have_its_grid(made, tmp_path):
    _, artifact = made
    (maps,) = merge_maps(artifact, [PHOTOGRAPH])
    groups = maps.layers[-1]
    assert (maps.image.shape, groups.ids.shape) == ((48, 24, 3), (ROWS, COLUMNS))
    assert len(np.unique(groups.ids)) == groups.tokens - 3
    result = inspect(InspectRequest(artifact.path, (PHOTOGRAPH,), output=tmp_path / "pictures"))
    with Image.open(tmp_path / "pictures" / result.pictures[0].file) as picture:
        assert picture.height == 2 * picture.width


def test_a_schedule_file_is_for_its_image_size(made, tmp_path):
    name = made[1].manifest.model.name
    content = {"format": 1, "model": name, "schedule": [3, 2, 1], "image_size": "24x48"}
    (tmp_path / "schedule.json").write_text(json.dumps(content))
    request = BuildRequest(
        name, tmp_path / "x", image_size=SIZE, schedule_file=tmp_path / "schedule.json"
    )
    with pytest.raises(InputError, match=r"is for images of 24x48, and hf:.* takes 48x24 here"):
        build(request)
