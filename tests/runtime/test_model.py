"""An artifact finds the model it was built from again, from any current folder."""

from __future__ import annotations

import shutil

import pytest
import torch
from hf_models import make

from tome_export.build import BuildRequest, build
from tome_export.errors import InputError
from tome_export.merge.schedule import Schedule
from tome_export.models import RECIPES
from tome_export.runtime.model import reference_model


def test_the_same_weights_of_a_trainers_file_are_taken_again(tmp_path, monkeypatch):
    """Also where the rule of a later file would be another."""
    from tome_export.report.commands import reproducing_commands

    monkeypatch.chdir(tmp_path)
    state = dict(RECIPES["vit_digits"].load().module.state_dict())
    averaged = {key: value + 1e-3 for key, value in state.items()}
    file = tmp_path / "run.ckpt"
    torch.save({"model": state, "model_ema": averaged}, file)
    request = BuildRequest(
        "vit_digits", tmp_path / "out", weights=str(file), engine="none", check=False
    )
    artifact = build(request)
    weights = artifact.manifest.model.weights
    assert (weights.key, weights.source) == ("model_ema", "run.ckpt; its model_ema, not model")
    built = reproducing_commands(artifact.manifest, None, None, "out")[0]
    assert "--weights run.ckpt --weights-key model_ema" in built
    torch.save({"model_ema": averaged, "state_dict_ema": state}, file)
    model, _ = reference_model(artifact)
    assert torch.equal(model.model.head.weight, averaged["head.weight"])
    torch.save({"model": averaged}, file)
    with pytest.raises(InputError, match=r"run\.ckpt has no 'model_ema'; it has model"):
        reference_model(artifact)


def test_a_relative_checkpoint_folder_is_found_from_elsewhere(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
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
