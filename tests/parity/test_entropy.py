"""The entropy guard through real builds: in ``check`` and ``tune``, in engines, and as served."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from tome_export.artifact.goal import Goal
from tome_export.build import BuildRequest, build
from tome_export.errors import UsageError
from tome_export.merge.schedule import Schedule
from tome_export.parity.main import CheckRequest, OverMergedError, check
from tome_export.serve.main import ServeOptions, ServeRequest, serve
from tome_export.tune.main import TuneRequest, tune


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Any:
    folder = tmp_path_factory.mktemp("entropy") / "plain"
    return build(BuildRequest("vit_digits", folder, schedule=Schedule(8), engine="none"))


@pytest.fixture(scope="module")
def checked(plain) -> Any:
    return check(CheckRequest(plain.path)).entropy


def test_check_counts_it_of_any_artifact(plain, checked):
    found = checked
    assert found.patches == 64
    assert 0 < found.least <= found.p5 <= found.median < np.log(16) / np.log(64)
    assert (found.asked, found.under) == (None, ())
    assert 1 < found.tokens(found.least) < 16
    listed = json.loads((plain.path / "parity.json").read_text())["checks"][0]
    assert min(listed["entropy"]) == found.least
    assert listed["entropy_defects"] is None


def test_images_under_the_threshold_are_named(plain, checked):
    found = checked
    result = check(CheckRequest(plain.path, min_entropy=found.median))
    assert not result.passed
    assert all(report.passed for report in result.reports)
    under = result.entropy.under
    assert [value for _, value in under] == sorted(value for _, value in under)
    assert len(under) == 12  # of 24, as the median says
    assert under[0][1] == found.least
    name = under[0][0]
    error = OverMergedError(result.entropy, 24)
    assert error.exit_code == 5
    assert str(error) == (
        f"over-merged: 12 of 24 images have a token-size entropy under {found.median:g} "
        f"({found.tokens(found.median):.1f} effective tokens of 64), the least {found.least:.4f} "
        f"({found.tokens(found.least):.1f}, {name}); merge less, or ask for no more"
    )


@pytest.mark.parametrize("value", [-0.1, 1.5, float("nan")])
def test_a_threshold_that_is_none_is_refused(plain, value):
    with pytest.raises(UsageError, match=r"--min-entropy is .*; expected 0 to 1, such as 0.8"):
        check(CheckRequest(plain.path, min_entropy=value))


def test_half_precision_with_an_engine_and_served(tmp_path):
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    artifact = build(
        BuildRequest(
            "vit_digits",
            tmp_path / "half",
            schedule=Schedule(8),
            precision="fp16",
            source_map=True,
            entropy=True,
            engine="tensorrt-rtx",
        )
    )
    manifest = artifact.manifest
    assert manifest.parity.passed
    form = manifest.form
    assert (form.dense, form.source_map, form.entropy) == (False, True, True)
    outputs = [(o.name, o.dtype) for o in manifest.engines["tensorrt-rtx"].outputs]
    assert outputs == [("logits", "float32"), ("source_map", "int32"), ("entropy", "float32")]
    served = serve(ServeRequest((artifact.path,), tmp_path / "repository", ServeOptions()))
    config = tmp_path / "repository" / served.models[0].name / "config.pbtxt"
    text = " ".join(config.read_text().split())
    assert 'name: "entropy" data_type: TYPE_FP32 dims: 1 reshape { } }' in text


def test_tune_leaves_out_what_merges_too_much(tmp_path):
    goal = Goal.target_macs("75%")
    request: dict[str, Any] = {"model": "vit_digits", "goal": goal, "limit": 40, "time_limit": 4.0}
    free = tune(TuneRequest(output=tmp_path / "free.json", **request))
    assert (free.search.min_entropy, free.search.over_merged) == (None, 0)
    assert min(row.entropy for row in free.front) < 0.7
    guarded = tune(TuneRequest(output=tmp_path / "even.json", min_entropy=0.7, **request))
    assert guarded.search.over_merged > 0
    assert min(row.entropy for row in [*guarded.front, guarded.found]) >= 0.7
