"""Compressors through real builds: the manifest, parity in both precisions, an engine, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tome_export.build import BuildRequest, build
from tome_export.errors import InputError
from tome_export.merge.schedule import Schedule
from tome_export.parity.main import CheckRequest, check
from tome_export.runtime.model import reference_model, rescheduled
from tome_export.spec import TowerOptions

RESAMPLER = ("latents=5", "layers=2", "heads=2", "head_width=8")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, make_llava) -> Any:
    pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("compress") / "checkpoint"
    make_llava(folder)
    return folder


@pytest.mark.parametrize(
    ("compress", "options", "tokens", "grid"),
    [("avgpool:5x3", (), 15, [5, 3]), ("resampler", RESAMPLER, 5, None)],
)
@pytest.mark.parametrize(("precision", "engine"), [("fp32", "none"), ("fp16", "tensorrt-rtx")])
def test_a_tower_gives_a_fixed_number_of_tokens(
    checkpoint, tmp_path, compress, options, tokens, grid, precision, engine
):
    if engine != "none":
        pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    artifact = build(
        BuildRequest(
            f"hf:{checkpoint}",
            tmp_path / "built",
            schedule=Schedule(11),
            tower=TowerOptions("llava", projector=True),
            precision=precision,
            entropy=True,
            compress=compress,
            compress_options=options,
            engine=engine,
        )
    )
    manifest = artifact.manifest
    assert manifest.parity.passed
    tower = manifest.tower
    assert (tower.tokens, tower.width, tower.grid) == (tokens, 48, grid and tuple(grid))
    shapes = {o.name: o.shape for o in manifest.outputs}
    assert shapes == {"features": ("batch", tokens, 48), "entropy": ("batch",)}
    for built in manifest.engines.values():
        assert [o.name for o in built.outputs] == ["features", "entropy"]
    assert manifest.compressor.name == compress.partition(":")[0]
    if precision == "fp32":
        assert check(CheckRequest(artifact.path, backends=("ort-cpu",))).passed
        model, _ = reference_model(artifact)
        assert rescheduled(model, Schedule(0)).settings.compressor == model.settings.compressor


def test_macs_are_those_of_torch(checkpoint, tmp_path):
    """As many more than without as torch counts in the compressor alone."""
    from torch.utils.flop_counter import FlopCounterMode

    from tome_export.compressors.base import FinalTokens

    request: dict[str, Any] = {
        "model": f"hf:{checkpoint}",
        "schedule": Schedule(11),
        "tower": TowerOptions("llava"),
        "engine": "none",
        "check": False,
    }
    plain = build(BuildRequest(output=tmp_path / "plain", **request))
    more = {"compress": "resampler", "compress_options": RESAMPLER}
    compressed = build(BuildRequest(output=tmp_path / "compressed", **more, **request))
    model, _ = reference_model(compressed)
    tokens = 64 - 3 * 11
    counter = FlopCounterMode(display=False)
    with counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        x = torch.zeros(1, tokens, model.width, requires_grad=True)
        model.compressor(FinalTokens(x, torch.ones(1, tokens), None, model.patch_grid))
    extra = compressed.manifest.macs.merged - plain.manifest.macs.merged
    assert extra == counter.get_total_flops() // 2 > 0


def test_reducers_that_drop_go_with_a_resampler(checkpoint, tmp_path):
    request: dict[str, Any] = {
        "model": f"hf:{checkpoint}",
        "schedule": Schedule(11),
        "tower": TowerOptions("llava"),
        "reducer": "topk",
        "engine": "none",
    }
    more = {"compress": "resampler", "compress_options": RESAMPLER}
    assert build(BuildRequest(output=tmp_path / "a", **more, **request)).manifest.parity.passed
    with pytest.raises(InputError) as failure:
        build(BuildRequest(output=tmp_path / "b", compress="avgpool:2x2", **request))
    assert str(failure.value) == (
        "reducer topk drops tokens, so not every patch has features for --compress; use a reducer "
        "that merges, such as tome"
    )
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("compress", "options", "dense", "message"),
    [
        (
            "avgpool:4x4",
            (),
            False,
            "compressor avgpool makes tokens for a language model, and this model gives classes; "
            "use --dense for the features of its patches, or a LLaVA tower",
        ),
        (
            "avgpool",
            (),
            True,
            "compressor avgpool is given without its grid; expected it behind a colon, such as "
            "avgpool:12x12",
        ),
        (
            "avgpool:4",
            (),
            True,
            "option grid of compressor avgpool is '4'; expected two numbers such as 12x12",
        ),
        (
            "avgpool:9x4",
            (),
            True,
            "avgpool grid is 9x4; expected 1x1 to 8x8, the grid of the model's patches",
        ),
        ("conv", (), True, "compressor is 'conv'; expected one of avgpool, resampler"),
        (
            None,
            ("latents=4",),
            True,
            "compressor option 'latents=4' is given without --compress; give both",
        ),
        (
            "resampler",
            ("depth=4",),
            True,
            "compressor resampler has no option 'depth'; expected weights, latents, layers, heads, "
            "head_width, seed",
        ),
    ],
)
def test_what_cannot_be_is_refused(tmp_path, compress, options, dense, message):
    request = BuildRequest(
        "vit_digits",
        tmp_path / "x",
        schedule=Schedule(4),
        dense=dense,
        compress=compress,
        compress_options=options,
        engine="none",
    )
    with pytest.raises(InputError) as failure:
        build(request)
    assert str(failure.value) == message
    assert not (tmp_path / "x").exists()


def test_dense_outputs_of_any_model_can_be_pooled(tmp_path):
    request = BuildRequest(
        "vit_digits",
        tmp_path / "x",
        schedule=Schedule(4),
        dense=True,
        compress="avgpool:2x2",
        engine="none",
    )
    manifest = build(request).manifest
    assert manifest.output.shape[1] == 4
    assert manifest.parity.passed
