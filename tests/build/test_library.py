"""A build starts by showing that patching alone changes nothing; parity could not see it."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from whole_models import Head, InPlace, depth_anything, on_dinov2

from tome_export.build import BuildRequest, build, library
from tome_export.build.library import check_library
from tome_export.errors import InputError
from tome_export.patch import patch

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


@pytest.mark.parametrize(("change", "passes"), [(2.0, True), (8.0, False)])
def test_more_than_the_tolerance_is_measured_against_one_rounding_of_the_input(
    monkeypatch: pytest.MonkeyPatch, change: float, passes: bool
) -> None:
    vit = timm.create_model("test_vit").eval()
    merged = patch(vit, 4)
    images = torch.rand(1, *merged.input_size)
    with torch.inference_mode():
        expected = merged.library(images)
        towards = torch.full_like(images, torch.inf)
        towards.view(-1)[1::2] = -torch.inf
        moved = merged.library(torch.nextafter(images, towards)) - expected
        scale = float(moved.abs().max() / expected.abs().max())
    assert 0 < scale < 1e-6
    monkeypatch.setattr(library, "TOLERANCE", scale / 4)  # too little for rounding
    plain, unit = merged.library, scale * expected.abs().max()
    monkeypatch.setattr(merged, "library", lambda pixels: plain(pixels) + change * unit)
    with contextlib.nullcontext() if passes else pytest.raises(InputError, match="differs from"):
        check_library(merged, images.numpy())


def test_no_rounding_excuses_a_difference_beyond_the_limit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    merged = patch(timm.create_model("test_vit").eval(), 4)
    plain = merged.library
    monkeypatch.setattr(library, "ROUNDINGS", 1e9)
    monkeypatch.setattr(merged, "library", lambda pixels: plain(pixels) * (1 + 2 * library.LIMIT))
    with pytest.raises(InputError, match="expected at most"):
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
    weights = artifact.manifest.model.weights
    assert weights.kind == "function"
    assert "own_models:made" in weights.source
    assert json.loads(
        (tmp_path / "out" / "build.json").read_text()
    ) == artifact.manifest.model_dump(mode="json")


class OverBatch(Head):
    """Scales maps by the mean of the batch."""

    def forward(self, pixel_values: torch.Tensor) -> Any:
        found = super().forward(pixel_values)["two"]
        return {"two": found - found.mean(dim=0)}


@pytest.mark.parametrize(
    ("cls", "message"),
    [
        (OverBatch, "two of an image is another when it is in a batch with a second one"),
        (InPlace, "without merging differs from the model's own output"),
    ],
)
def test_a_whole_model_that_cannot_be_trusted_is_refused(cls: type[Head], message: str) -> None:
    merged = patch(on_dinov2(cls), 4)
    images = torch.rand(1, *merged.input_size).numpy()
    with pytest.raises(InputError, match=message):
        check_library(merged, images)


def test_a_map_has_rows_and_no_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    """A column of a depth map that is all but zero is no channel of its own."""
    merged = patch(depth_anything(), 4)
    images = torch.rand(1, *merged.input_size)
    with torch.no_grad():
        depth = merged.library(images)
    depth[..., 0] = 1e-6
    near = depth.clone()
    near[..., 0] += 1e-8
    assert (near - depth).abs().max() < 1e-7 * depth.abs().max()
    monkeypatch.setattr(merged, "library", lambda _: near)
    monkeypatch.setattr(library, "_next", lambda x: x)
    cls = type(merged)
    monkeypatch.setattr(cls, "forward_observed", lambda *_, **__: depth)
    check_library(merged, images.numpy())
