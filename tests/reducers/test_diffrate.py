"""DiffRate: prune, then merge, by counts from a file."""

from __future__ import annotations

import json
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reducers import (
    assert_holds,
    assert_parity,
    assert_plans,
    assert_plans_are_the_references,
    digit_images,
    digit_model,
    options_of,
    plain,
    random_layer,
    steps,
)
from references import diffrate as reference

from tome_export.errors import InputError
from tome_export.patch import patch
from tome_export.reducers import reducer_from_text
from tome_export.reducers.base import ModelShape
from tome_export.reducers.diffrate import DiffRate

QUICK = settings(max_examples=40, deadline=None, derandomize=True)

PRUNE, MERGE = (65, 60, 40, 40, 22, 30), (65, 55, 40, 33, 24, 19)
"""Nothing, both, pruning alone, merging alone, pruning below the other, merging alone."""

DEIT = {
    "prune_kept_num": [197, 192, 174, 156, 131, 115, 111, 99, 76, 50, 39, 3],
    "merge_kept_num": [197, 186, 160, 133, 119, 107, 96, 82, 66, 43, 37, 3],
}
"""The counts that the authors publish for DeiT-S at 2.5 GMACs."""


def digits(r=None):
    return digit_model(DiffRate(prune_kept=PRUNE, merge_kept=MERGE), r)


def expected(layer):
    return reference.plan(layer, PRUNE)


def test_plans_are_the_references(tmp_path):
    model = digits()
    assert [layer.r for layer in model.layers] == reference.counts(65, 1, PRUNE, MERGE)
    assert_plans_are_the_references(model, expected, tmp_path)


def test_an_explicit_schedule_is_pruned_as_far_as_the_counts_say(tmp_path):
    model = digits([3, 12, 0, 9])
    assert_plans_are_the_references(model, expected, tmp_path)
    dropped = [(step.plan.dst < 0).sum(dim=1)[0].item() for step in steps(model, digit_images(1))]
    assert dropped == [0, 2, 9]


def test_means_and_sizes_are_the_authors():
    for step in steps(digits(), digit_images(2)):
        for image in range(2):
            x, size = reference.tokens(plain(step.layer, image), PRUNE)
            torch.testing.assert_close(step.x[image], torch.tensor(x), rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(step.size[image], torch.tensor(size))


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_parity(tmp_path, precision):
    assert_parity(digits(), tmp_path, precision)


@QUICK
@given(
    st.integers(2, 24),
    st.integers(1, 4),
    st.integers(1, 12),
    st.integers(0, 12),
    st.integers(0, 2**31),
    st.booleans(),
)
def test_what_always_holds(patches, prefix, r, pruned, seed, duplicates):
    tokens = patches + prefix
    kept = (max(1, tokens - pruned),) * 4
    reducer = DiffRate(prune_kept=kept, merge_kept=kept)
    r = min(r, reducer.limit(tokens, prefix))
    layer = random_layer(tokens, r, prefix, batch=3, seed=seed, duplicates=duplicates)
    _, size = assert_holds(reducer, layer)
    assert (size.sum(1) <= layer.size.sum(1) + 1e-3).all()
    plan = reducer.decide(layer).plan
    assert ((plan.dst < 0).sum(1) == min(r, pruned)).all()
    if not duplicates:  # the reference's rounding decides ties otherwise
        assert_plans(plan, layer, lambda one: reference.plan(one, kept))


def test_ties_go_to_the_lowest_position():
    layer = random_layer(8, 3, 2)
    alike = layer.attention._replace(keys=torch.ones_like(layer.attention.keys))
    object.__setattr__(layer, "attention", alike)
    object.__setattr__(layer, "x", torch.ones_like(layer.x))
    plan = DiffRate(prune_kept=(8, 7), merge_kept=(8, 5)).decide(layer).plan
    assert [part[0].tolist() for part in plan] == [[0, 1, 2, 3, 4], [5, 6, 7], [2, 2, -1]]


def test_tokens_of_opposite_direction_leave_a_size_above_zero():
    layer = random_layer(4, 2, 1)
    sign = torch.tensor([1.0, 1.0, -1.0, -1.0])[:, None]
    object.__setattr__(layer, "x", sign * torch.ones_like(layer.x))
    assert_holds(DiffRate(), layer)


def test_the_authors_file(tmp_path):
    """Its lists are text inside JSON; the manifest holds the numbers and no path."""
    file = tmp_path / "rates.json"
    as_text = {key: str(value).replace(" ", "") for key, value in DEIT.items()}
    file.write_text(json.dumps({"ViT-S-DeiT": {"2.5": as_text}}))
    reducer = reducer_from_text("diffrate", [f"file={file}", "entry=ViT-S-DeiT/2.5"])
    prune, merge = map(tuple, DEIT.values())
    assert options_of(reducer) == {
        "file": None,
        "entry": None,
        "prune_kept": prune,
        "merge_kept": merge,
    }
    tower = ModelShape(384, 12, 197, 1)
    assert list(reducer.counts(tower).per_layer) == reference.counts(197, 1, prune, merge)
    file.write_text(json.dumps(DEIT))
    assert reducer_from_text("diffrate", [f"file={file}"]) == reducer


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (None, [], "counts file {} of reducer diffrate cannot be read (No such file or directory); "
         "give the path of a JSON file"),
        ("prune", [], "counts file {} of reducer diffrate is not JSON"),
        ('{"a": {"b": 1}}', [], "counts file {} has a; expected prune_kept_num and merge_kept_num, "
         "or say with --reducer-option entry=NAME/NAME where they are"),
        ('{"a": {"b": 1}}', ["entry=a/c"], "counts file {} has no entry a/c; expected one of a/b"),
        ("[1]", ["entry=a"], "counts file {} has no entry a; expected one of none"),
        ('{"prune_kept_num": "None", "merge_kept_num": [1]}', [], "counts file {} has 'None' as "
         "prune_kept_num; expected a list of whole numbers, one per layer"),
        ('{"prune_kept_num": [2, 2], "merge_kept_num": [1]}', [], "reducer diffrate has 2 of "
         "prune_kept and 1 of merge_kept; expected one of each per layer"),
        ('{"prune_kept_num": [0], "merge_kept_num": [1]}', [], "reducer diffrate has 0 in "
         "prune_kept; expected 1 or more tokens"),
        ('{"prune_kept_num": [9], "merge_kept_num": [9]}', [], "reducer diffrate has counts of 1 "
         "layers; the model has 6: give counts that were found for it"),
        ('{"prune_kept_num": [9], "merge_kept_num": [9]}', ["prune_kept=9"], "reducer diffrate has "
         "counts from file and as options; give one"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("r", [None, 2])
def test_bad_files(tmp_path, content, options, message, r):
    file = tmp_path / "counts.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(InputError, match=f"^{re.escape(message.format(file))}$"):
        digit_model(reducer_from_text("diffrate", [f"file={file}", *options]), r)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "reducer diffrate has no counts; give --reducer-option file=FILE, a JSON file with "
         "prune_kept_num and merge_kept_num, or --r N to merge N tokens per layer"),
        (["entry=a"], "option entry of reducer diffrate is 'a' of no file; give also file=FILE"),
    ],
)  # fmt: skip
def test_bad_options(options, message):
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        digit_model(reducer_from_text("diffrate", options), None)


def test_sizes_are_no_numbers_of_patches(make_vit):
    with pytest.raises(InputError, match="reducer diffrate weighs the size of a token by simi"):
        patch(make_vit("test_vit"), 2, reducer=DiffRate(), entropy=True)


def test_attention_is_proportional_in_models_of_mae_too():
    """The authors run MAE with sizes; of ToMe and its like the model's own setting counts."""
    from tome_export.reducers.dtem import DTEM
    from tome_export.reducers.tome import ToMe

    assert DiffRate().proportional(model=False)
    for reducer in (ToMe(), DTEM("random")):
        assert [reducer.proportional(model) for model in (True, False)] == [True, False]
