"""A build starts by showing that patching alone changes nothing; parity could not see it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch

from tome_export.errors import InputError
from tome_export.patch import patch
from tome_export.pipeline import BuildRequest, build
from tome_export.pipeline.build import check_library

MODULE = """
import timm
import torch

def made():
    torch.manual_seed(0)
    return timm.create_model("test_vit", num_classes=7).eval()
"""


def test_plain_model_passes() -> None:
    model = patch(timm.create_model("test_vit").eval(), 4)
    check_library(model, torch.rand(1, *model.input_size).numpy())


def test_bypassed_change_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A class changed at run time is the same class by name, and computes something else."""
    model = timm.create_model("test_vit").eval()
    block = type(model.blocks[0])
    plain = block.forward
    monkeypatch.setattr(block, "forward", lambda self, x: plain(self, x) * 1.5)
    merged = patch(model, 4)
    with pytest.raises(InputError, match="without merging differs from the model's own output"):
        check_library(merged, torch.rand(1, *merged.input_size).numpy())


def test_a_small_channel_beside_a_large_one_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few channels of dense features are often far larger than all others."""
    vit = timm.create_model("test_vit").eval()
    merged = patch(vit, 4, dense=True)
    with torch.no_grad():
        vit.norm.weight[0] *= 1e4
    images = torch.rand(1, *merged.input_size).numpy()
    check_library(merged, images)
    plain = merged.library
    factor = torch.ones(vit.embed_dim)
    factor[1] = 1 + 1e-3
    monkeypatch.setattr(merged, "library", lambda pixels: plain(pixels) * factor)
    with pytest.raises(InputError, match="without merging differs from the model's own output"):
        check_library(merged, images)


def test_weights_of_a_function_are_called_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They may be trained or random: nobody but the function knows."""
    (tmp_path / "own_models.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    request = BuildRequest("own_models:made", tmp_path / "out", engine="none", check=False)
    artifact = build(request)
    weights = artifact.manifest["model"]["weights"]
    assert weights["kind"] == "function"
    assert "own_models:made" in weights["source"]
    assert json.loads((tmp_path / "out" / "build.json").read_text()) == artifact.manifest
