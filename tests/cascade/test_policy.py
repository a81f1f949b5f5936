"""The policies against slow, obvious forms of their formulas."""

from __future__ import annotations

import ast
import json
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from tome_export.artifact.cascade import ComplexityPolicy, ConfidencePolicy, LearnedPolicy
from tome_export.cascade import policy
from tome_export.data.pixels import normalised
from tome_export.spec import Preprocessing


def images(count=5, shape=(3, 12, 9), seed=0):
    return np.random.default_rng(seed).standard_normal((count, *shape), dtype=np.float32)


def slow_complexity(image):
    c, h, w = image.shape
    x = image.astype(np.float64)
    down = [
        abs(x[k, i + 1, j] - x[k, i, j]) for k in range(c) for i in range(h - 1) for j in range(w)
    ]
    right = [
        abs(x[k, i, j + 1] - x[k, i, j]) for k in range(c) for i in range(h) for j in range(w - 1)
    ]
    return (sum(down) / len(down) + sum(right) / len(right)) / 2


def test_complexity_is_the_mean_difference_of_neighbours():
    pixels = images()
    expected = [slow_complexity(image) for image in pixels]
    np.testing.assert_allclose(policy.complexity(pixels), expected, rtol=1e-12)


def test_complexity_of_known_images():
    flat = np.full((1, 1, 4, 4), 3.0, np.float32)
    stripes = np.tile(np.float32([0, 1]), (1, 1, 4, 2))
    assert policy.complexity(flat).tolist() == [0.0]
    # Every step to the right is 1, every step down 0.
    assert policy.complexity(stripes).tolist() == [0.5]
    assert policy.complexity(np.float32([[[[0, 2, 4]]]])).tolist() == [1.0]


@pytest.mark.parametrize("form", ["uint8", "uint8-nchw"])
def test_uint8_pixels_are_looked_at_as_the_model_sees_them(form):
    """What is served reads its settings from JSON, and decides as the calibration did on floats."""
    preprocessing = Preprocessing(
        (3, 12, 9), (0.4, 0.5, 0.6), (0.2, 0.3, 0.4), 1.0, "bicubic", form=form
    )
    raw = np.random.default_rng(1).integers(0, 256, (9, *preprocessing.pixel_shape), np.uint8)
    floats = normalised(raw, asdict(preprocessing))
    found = policy.normalised(raw, preprocessing)
    np.testing.assert_array_equal(found, floats)
    weights = np.random.default_rng(2).standard_normal((2, 3 * 4 * 3)).tolist()
    learned = {"weights": weights, "bias": [0.0, 0.1], "shares": [0.5, 1.0], "price": 0.01}
    middle = float(np.median(policy.complexity(floats)))
    for settings in (
        {"policy": "complexity", "thresholds": [middle]},
        {"policy": "learned", "patch": [4, 3], **learned},
    ):
        plain, own = (
            policy.settings_from_json(json.dumps({**settings, **more}))
            for more in ({}, {"pixels": asdict(preprocessing)})
        )
        expected = policy.first_budgets(plain, floats)
        assert len(set(expected.tolist())) == 2
        assert policy.first_budgets(own, raw).tolist() == expected.tolist()


def test_complexity_is_the_same_number_in_any_batch():
    pixels = images(7)
    together = policy.complexity(pixels)
    alone = [policy.complexity(pixels[i : i + 1])[0] for i in range(7)]
    spread = policy.complexity(np.asfortranarray(pixels))
    assert together.tolist() == alone == spread.tolist()


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_confidence_is_the_softmax_of_pytorch(dtype):
    logits = (10 * np.random.default_rng(0).standard_normal((40, 7))).astype(dtype)
    best = torch.from_numpy(logits).double().softmax(dim=1).topk(2).values.numpy()
    np.testing.assert_allclose(policy.confidence(logits, "max"), best[:, 0], rtol=1e-12)
    margin = policy.confidence(logits, "margin")
    np.testing.assert_allclose(margin, best[:, 0] - best[:, 1], rtol=1e-9, atol=1e-15)


def test_huge_logits_are_no_overflow():
    logits = np.float32([[3e38, 0, 0], [-3e38, -3e38, -3e38]])
    np.testing.assert_allclose(policy.confidence(logits, "max"), [1, 1 / 3])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_unsure(bad):
    sure = policy.confidence(np.float32([[bad, 1], [9, 0]]), "max")
    assert np.isnan(sure[0])
    assert policy.is_unsure(sure, 0.0).tolist() == [True, False]


def test_thresholds_are_reached_at_their_value():
    scores = np.array([0.9, 1.0, 1.5, 2.0, np.nan])
    assert policy.by_thresholds(scores, [1.0, 2.0]).tolist() == [0, 1, 1, 2, 2]


def test_prices_make_the_large_members_dearer():
    scores = np.array([[0.0, 0.4, 1.0], [1.0, 0.0, 0.0], [np.nan, 0.0, 0.0]])
    shares = [0.4, 0.6, 1.0]
    assert policy.by_price(scores, shares, 0.0).tolist() == [2, 0, 2]
    assert policy.by_price(scores, shares, 1.9).tolist() == [1, 0, 2]
    assert policy.by_price(scores, shares, 50.0).tolist() == [0, 0, 2]


def test_the_folded_head_is_the_head_on_the_pooled_embedding():
    """Also for images that patches do not fill."""
    rng = np.random.default_rng(0)
    pixels = images(4, (3, 13, 11))
    kernels, offset = rng.standard_normal((8, 3, 4, 3)), rng.standard_normal(8)
    head, bias = rng.standard_normal((2, 8)), rng.standard_normal(2)
    embedded = functional.conv2d(
        torch.from_numpy(pixels).double(),
        torch.from_numpy(kernels),
        torch.from_numpy(offset),
        stride=(4, 3),
    )
    expected = embedded.mean(dim=(2, 3)).numpy() @ head.T + bias
    folded = head @ kernels.reshape(8, -1)
    found = policy.head_scores(policy.mean_patch(pixels, (4, 3)), folded, bias + head @ offset)
    np.testing.assert_allclose(found, expected, rtol=1e-10)


def test_settings_that_went_through_json_choose_the_same():
    pixels = images(30)
    patches = policy.mean_patch(pixels, (4, 3))
    weights = np.random.default_rng(1).standard_normal((2, patches.shape[1]))
    cut = float(np.median(policy.complexity(pixels)))
    cases = [
        ComplexityPolicy(thresholds=(cut,)),
        LearnedPolicy(
            patch=(4, 3), weights=weights.tolist(), bias=(0.1, 0.2), shares=(0.3, 1.0), price=1 / 3
        ),
    ]
    for settings in cases:
        direct = policy.first_budgets(settings, pixels)
        again = policy.first_budgets(policy.settings_from_json(settings.model_dump_json()), pixels)
        assert direct.tolist() == again.tolist()
        assert {*direct.tolist()} == {0, 1}
        assert not policy.goes_on(settings, 0, np.zeros((3, 2))).any()


def test_confidence_begins_low_and_ends_at_the_last():
    settings = ConfidencePolicy(measure="max", thresholds=(0.6, 0.9))
    assert policy.first_budgets(settings, images(3)).tolist() == [0, 0, 0]
    logits = np.log([[0.55, 0.45], [0.7, 0.3], [0.95, 0.05]])
    assert policy.goes_on(settings, 0, logits).tolist() == [True, False, False]
    assert policy.goes_on(settings, 1, logits).tolist() == [True, True, False]
    assert policy.goes_on(settings, 2, logits).tolist() == [False, False, False]


def test_the_file_that_the_server_gets_needs_numpy_only():
    tree = ast.parse(Path(policy.__file__).read_text())
    names = {
        alias.name if isinstance(node, ast.Import) else node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    assert {name.split(".")[0] for name in names} <= {*sys.stdlib_module_names, "numpy"}
