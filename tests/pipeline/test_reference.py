"""An artifact finds the model it was built from again, from any current folder."""

from __future__ import annotations

import shutil

import pytest
from hf_models import make

from tome_export.errors import InputError
from tome_export.merge.schedule import Schedule
from tome_export.pipeline import BuildRequest, build
from tome_export.pipeline.reference import reference_model

pytest.importorskip("transformers")


def test_a_relative_checkpoint_folder_is_found_from_elsewhere(tmp_path, monkeypatch):
    checkpoint = tmp_path / "here" / "models" / "m"
    make("CLIP").save_pretrained(checkpoint)
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    request = BuildRequest(
        "hf:models/m", tmp_path / "out", schedule=Schedule(3), engine="none", check=False
    )
    artifact = build(request)
    model = artifact.manifest.model
    assert (model.name, model.folder) == ("hf:models/m", str(checkpoint))

    # Were it asked for by name, the hub would be.
    monkeypatch.chdir(tmp_path / "there")
    _, recipe = reference_model(artifact)
    assert recipe.name == "hf:models/m"

    moved = shutil.move(checkpoint, tmp_path / "there" / "moved")
    with pytest.raises(InputError) as refused:
        reference_model(artifact)
    assert str(refused.value) == (
        f"the artifact was built from the checkpoint folder {checkpoint}, which is not there; put "
        "it back, or give its path with --weights"
    )
    assert moved
    reference_model(artifact, "moved")

    make("CLIP").save_pretrained(tmp_path / "there" / "other")
    (tmp_path / "there" / "other" / "model.safetensors").unlink()
    with pytest.raises(InputError, match="folder other has no weights"):
        reference_model(artifact, "other")
