"""Schedules of other reducers: searched within their own limits, and built with them only."""

from __future__ import annotations

import pytest
from safetensors.torch import save_file

from tome_export.artifact.goal import Goal
from tome_export.build import BuildRequest, build
from tome_export.errors import InputError
from tome_export.models import resolve
from tome_export.tune.main import TuneRequest, tune


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    path = tmp_path_factory.mktemp("tuned") / "schedule.json"
    goal = Goal.target_macs("50%")
    request = TuneRequest("vit_digits", goal, path, limit=40, time_limit=3.0, reducer="topk")
    return path, tune(request)


def test_macs_are_those_of_the_build(tuned, tmp_path):
    path, found = tuned
    assert found.reducer.name == "topk"
    # More than half of the tokens of a layer: what bipartite matching could not remove.
    most = min(found.front, key=lambda row: row.macs)
    assert most.schedule[0] > (found.tokens_in - 1) // 2
    request = BuildRequest(
        "vit_digits", tmp_path / "x", reducer="topk", schedule_file=path, engine="none"
    )
    built = build(request).manifest
    assert built.merge.r == found.schedule
    assert built.macs.merged == found.found.macs


def test_another_reducer_is_refused(tuned, tmp_path):
    request = BuildRequest("vit_digits", tmp_path / "x", schedule_file=tuned[0], engine="none")
    with pytest.raises(InputError, match=r"is for --reducer topk with options .*; give the same"):
        build(request)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("given", ["random", "no predictors", "predictors in the model's file"])
def test_a_reducer_of_few_layers_is_not_searched(given, tmp_path):
    goal = Goal.target_macs("50%")
    options = ("weights=random",) if given == "random" else ()
    weights = "pretrained"
    if given.startswith("predictors"):
        state = resolve("vit_digits").load(weights="random", seed=0).module.state_dict()
        weights = str(tmp_path / "both.safetensors")
        save_file(
            {**state, "score_predictor.0.in_conv.1.bias": state["norm.bias"].clone()}, weights
        )
    request = TuneRequest(
        "vit_digits",
        goal,
        tmp_path / "x.json",
        weights=weights,
        reducer="dynamicvit",
        reducer_options=options,
    )
    with pytest.raises(InputError) as failure:
        tune(request)
    assert str(failure.value) == (
        "reducer dynamicvit removes tokens in layers 0,2,3 only; tune gives every layer an r of "
        "its own, use another reducer"
    )
