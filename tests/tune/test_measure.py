"""Measures of models without classes, each beside a loop over the images in plain NumPy."""

from __future__ import annotations

import sys
import threading
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import whole_models

from tests.conftest import small_vit
from tome_export.artifact.goal import Goal
from tome_export.artifact.schedule import TuneData
from tome_export.data.metrics import mean_of
from tome_export.data.preprocess import load_images
from tome_export.data.samples import MAX_PHOTOGRAPH_PIXELS, sample_paths, sample_pixels
from tome_export.errors import InputError, UsageError
from tome_export.models import resolve
from tome_export.patch import patch
from tome_export.tune import main as tune_main
from tome_export.tune import search as tune_search
from tome_export.tune.images import TuneImages
from tome_export.tune.main import TuneRequest, estimate, tune
from tome_export.tune.measure import RetrievalMeasure, SimilarityMeasure
from tome_export.tune.score import Scorer

R = (9, 3, 6)
PARTS = ((0, 16), (16, 24), (24, 30))
"""Images to search on, to choose with, and held out."""


@pytest.fixture(scope="module")
def tower():
    return patch(small_vit(depth=3, num_classes=0), 0)


@pytest.fixture(scope="module")
def images(tower):
    pixels = np.random.default_rng(0).standard_normal((30, *tower.input_size), np.float32)
    counts = {"search": 16, "validation": 8, "held_out": 6}
    data = TuneData(source="mine", available=30, unreadable_count=0, notes=(), **counts)
    return TuneImages(pixels, None, data)


def outputs(model, images, r):
    with torch.no_grad():
        return patch(model, list(r))(torch.from_numpy(images.pixels)).double().numpy()


def cosine(a, b):
    return float(np.dot(a, b) / np.sqrt(np.dot(a, a) * np.dot(b, b)))


def neighbours(features):
    """Index of each image's nearest other image."""
    found = []
    for i, one in enumerate(features):
        others = [(cosine(one, two), -j) for j, two in enumerate(features) if j != i]
        found.append(-max(others)[1])
    return found


def parted(scorer):
    scores, each = zip(*(scorer.counted(R, *part) for part in PARTS), strict=True)
    return scores, np.concatenate(each)


def test_features_are_compared_by_their_cosine(tower, images):
    with Scorer(tower, images, SimilarityMeasure()) as scorer:
        scores, each = parted(scorer)
        assert scorer.search(R) == scores[0]
        assert scorer.validation(R) == scores[1]
        whole = scores[0].joined(scores[1])
        assert scorer.unmerged.tolist() == [1.0] * 30
    plain, merged = (outputs(tower, images, r) for r in ((0, 0, 0), R))
    expected = [cosine(a, b) for a, b in zip(plain, merged, strict=True)]
    np.testing.assert_allclose(each, expected, atol=2e-6)
    assert 0.5 < min(expected) < max(expected) < 0.99999
    assert (whole.images, whole.difference) == (24, None)
    assert whole.total == pytest.approx(sum(expected[:24]), abs=1e-4)
    assert 1 - whole.damage == pytest.approx(np.mean(expected[:24]), abs=2e-6)
    for score, (first, last) in zip(scores, PARTS, strict=True):
        assert 1 - score.worst == pytest.approx(min(expected[first:last]), abs=2e-6)
    assert whole.worst == max(scores[0].worst, scores[1].worst)


def test_retrieval_searches_each_part_on_its_own(tower, images):
    with Scorer(tower, images, RetrievalMeasure()) as scorer:
        scores, each = parted(scorer)
        assert scorer.images.data.notes == ()
    plain, merged = (outputs(tower, images, r) for r in ((0, 0, 0), R))
    expected = []
    for a, b in PARTS:
        pairs = zip(neighbours(plain[a:b]), neighbours(merged[a:b]), strict=True)
        expected += [before == after for before, after in pairs]
    assert each.tolist() == expected
    assert {*expected} == {True, False}
    similar = [cosine(a, b) for a, b in zip(plain[:16], merged[:16], strict=True)]
    assert scores[0].total == sum(expected[:16])
    assert 1 - scores[0].damage == pytest.approx(np.mean(similar), abs=2e-6)


def test_maps_are_compared_by_correlation_and_difference():
    rng = np.random.default_rng(1)
    plain = 5 + rng.standard_normal((4, 1, 6, 5))
    merged = 2 * plain + rng.standard_normal(plain.shape)
    measure = SimilarityMeasure(maps=True)
    a, b = (torch.from_numpy(x.astype(np.float32)) for x in (merged, plain))
    damage = measure.damage(a, b)
    for i in range(4):
        expected = np.corrcoef(plain[i].ravel(), merged[i].ravel())[0, 1]
        assert 1 - float(damage[i]) == pytest.approx(expected, abs=1e-6)
        apart = sum(abs(x - y) for x, y in zip(plain[i].ravel(), merged[i].ravel(), strict=True))
        assert float(measure.difference(a, b)[i]) == pytest.approx(apart / 30, rel=1e-6)


@pytest.mark.parametrize("other", [0.5, np.nan, np.inf])
def test_a_map_without_a_correlation_counts_as_unlike(other):
    plain, measure = torch.rand(2, 3, 3), SimilarityMeasure(maps=True)
    merged = plain.clone()
    merged[1] = other
    assert measure.damage(merged, plain).tolist() == pytest.approx([0.0, 1.0], abs=1e-9)
    assert measure.defined(merged).tolist() == [True, False]
    # Rounding of equal numbers is no structure.
    merged[1] = 1000.0
    merged[1, 0, 0] += 1e-4
    assert measure.defined(merged).tolist() == [True, False]
    assert measure.defined(plain * 1e-20).tolist() == [True, True]


def test_images_that_compare_with_nothing_are_left_out(tower, images):
    blind = [3, 17, 29]
    pixels = images.pixels.copy()
    pixels[blind] = np.nan
    left = np.delete(np.arange(30), blind)
    with Scorer(tower, replace(images, pixels=pixels), SimilarityMeasure()) as scorer:
        data = scorer.images.data
        _, each = scorer.counted(R, 15, 22)
    assert (data.search, data.validation, data.held_out) == (15, 7, 5)
    assert data.notes == (
        "the unmerged model's output is constant or not finite for 3 of 30 images, so nothing "
        "can be similar to it: they are left out",
    )
    with Scorer(tower, images, SimilarityMeasure()) as scorer:
        expected = parted(scorer)[1]
    np.testing.assert_allclose(each, expected[left[15:22]], atol=2e-6)
    pixels[:16] = np.nan
    before = threading.active_count()
    with pytest.raises(InputError, match=r"for 18 of 30 images, .*; give other images with --data"):
        Scorer(tower, replace(images, pixels=pixels), SimilarityMeasure())
    assert threading.active_count() == before


def test_retrieval_needs_images_to_tell_apart(tower, images):
    few = images.where(np.arange(30) < 18)
    message = r"among 2 images; expected 3 or more, give more images with --data$"
    with pytest.raises(InputError, match=message):
        Scorer(tower, few, RetrievalMeasure())
    pixels = images.pixels.copy()
    pixels[[4, 9]] = pixels[2]
    pixels[20] = pixels[16]
    with Scorer(tower, replace(images, pixels=pixels), RetrievalMeasure()) as scorer:
        assert scorer.images.data.notes == (
            "5 of 30 images have another with the same features, which stays their nearest "
            "neighbour however many tokens merge: retrieval flatters",
        )
        each = parted(scorer)[1]
    # Which of two copies is the nearest is no difference.
    assert each[[2, 4, 9, 16, 20]].all()


@pytest.mark.parametrize("parts", [(16, 24), (16, 30), (30, 30)])
@pytest.mark.parametrize("measure", [SimilarityMeasure(), RetrievalMeasure()])
def test_the_estimate_has_the_best_constant_beside_it(tower, images, parts, measure):
    search, chosen_on = parts
    counts = {"search": search, "validation": chosen_on - search, "held_out": 30 - chosen_on}
    parted_images = replace(images, data=images.data.model_copy(update=counts))
    constant = (6, 6, 6)
    with Scorer(tower, parted_images, measure) as scorer:
        found = estimate(R, constant, scorer, measure.metric)
        if search == 30:
            assert found is None
            return
        first, last = (search, 30) if chosen_on == 30 else (chosen_on, 30)
        (score, own), (_, other) = (scorer.counted(r, first, last) for r in (R, constant))
    assert (found.on, found.images) == (
        "validation" if chosen_on == 30 else "held out",
        last - first,
    )
    if measure.metric == "retrieval":
        assert (found.correct, found.best_constant.correct) == (own.sum(), other.sum())
        assert found.over_constant.share == pytest.approx(own.mean() - other.mean())
        return
    assert found.mean == pytest.approx(own.mean())
    assert found.low < found.mean < found.high <= 1
    assert found.lowest == pytest.approx(own.min()) == pytest.approx(1 - score.worst)
    assert found.best_constant.mean == pytest.approx(other.mean())
    assert found.over_constant.mean == pytest.approx(own.mean() - other.mean())


def test_the_interval_of_a_mean():
    """That of another bootstrap, of equal values none, and never above what values can be."""
    rng = np.random.default_rng(2)
    values = 1 - rng.exponential(0.02, 200)
    found = mean_of(values)
    assert found == mean_of(values)
    means = np.array([rng.choice(values, len(values)).mean() for _ in range(4000)])
    low, high = np.quantile(means, [0.025, 0.975])
    width = high - low
    assert found.low == pytest.approx(low, abs=0.15 * width)
    assert found.high == pytest.approx(high, abs=0.15 * width)
    skewed = mean_of(np.array([1.0] * 20 + [0.5]))
    assert skewed.low < skewed.mean < skewed.high <= 1
    flat = mean_of(np.full(5, 0.7))
    assert flat.low == flat.mean == flat.high


@pytest.fixture
def model(monkeypatch):
    """``model(**more)``: the name of a function that makes a small timm model without a head."""

    def named(**more):
        made = {"depth": 3, "num_classes": 0, **more}
        module = SimpleNamespace(make=lambda: small_vit(**made))
        monkeypatch.setitem(sys.modules, "own_tower", module)
        return "own_tower:make"

    return named


def test_tokens_are_compared_patch_by_patch(model, tmp_path):
    """Merging changes how many there are; costs are those of the tokens all the same."""
    name = model(global_pool="")
    request = TuneRequest(name, Goal.target_macs("80%"), tmp_path / "s.json", time_limit=2.0)
    found = tune(request)
    tokens = small_vit(depth=3, num_classes=0, global_pool="")
    merged = patch(tokens, list(found.schedule))
    assert found.found.macs == merged.macs()
    paths, preprocessing = sample_paths(), resolve(name).preprocessing
    pixels = torch.from_numpy(load_images(paths, preprocessing))
    with torch.no_grad():
        a, b = (patch(tokens, list(r), dense=True)(pixels) for r in ((0, 0, 0), found.schedule))
    similar = [np.mean([cosine(*two) for two in zip(*one, strict=True)]) for one in zip(
        a.double().numpy(), b.double().numpy(), strict=True
    )]  # fmt: skip
    # The six photographs are among the 24 samples.
    assert found.found.similarity.lowest <= min(similar) + 1e-6
    assert abs(found.found.similarity.mean - np.mean(similar)) < 0.05
    for measure, reducer, message in (
        (
            "retrieval",
            "tome",
            r"--measure retrieval compares one vector .* gives \[64, 64\]; leave",
        ),
        (
            None,
            "topk",
            "gives a sequence of tokens, .* and reducer topk drops patches; use a reduc",
        ),
    ):
        with pytest.raises((InputError, UsageError), match=message):
            tune(replace(request, measure=measure, reducer=reducer, force=True))


@pytest.mark.parametrize("make", [whole_models.upernet, whole_models.depth_anything])
def test_whole_models_are_tuned_by_their_maps(make, monkeypatch, tmp_path):
    """Nothing is kept from so few samples, so the schedule's figures are over all of them."""
    monkeypatch.setitem(sys.modules, "own_maps", SimpleNamespace(make=make))
    monkeypatch.setattr(tune_main, "FREE", 4)
    monkeypatch.setattr(tune_search, "BASELINES", dict.fromkeys(tune_search.BASELINES, 3))
    request = TuneRequest("own_maps:make", Goal.target_macs("95%"), tmp_path / "s.json", limit=12)
    found = tune(request)
    library, recipe = make().eval(), resolve("own_maps:make")
    merged = patch(library, list(found.schedule))
    assert found.found.macs == merged.macs() <= 0.95 * found.unmerged.macs
    order = np.random.default_rng(0).permutation(MAX_PHOTOGRAPH_PIXELS)[:12]
    pixels = torch.from_numpy(sample_pixels(recipe, MAX_PHOTOGRAPH_PIXELS)[order])
    with torch.no_grad():
        theirs = library(pixels)
        plain = (theirs["logits"] if "logits" in theirs else theirs["predicted_depth"]).numpy()
        own = merged(pixels).numpy()
    pairs = list(zip(plain.astype(float), own.astype(float), strict=True))
    similar = [np.corrcoef(a.ravel(), b.ravel())[0, 1] for a, b in pairs]
    alike = found.found.similarity
    assert alike.mean == pytest.approx(np.mean(similar), abs=1e-4)
    assert alike.lowest == pytest.approx(min(similar), abs=1e-4)
    apart = np.mean([np.abs(a - b).mean() for a, b in pairs])
    assert alike.mean_absolute_difference == pytest.approx(apart, rel=1e-3)
    assert alike.mean >= found.best_constant.similarity.mean
    for more, message in (
        ({"goal": Goal.min_accuracy("-1")}, r"gives a map, which is neither right nor wrong; give"),
        ({"measure": "retrieval"}, r"compares one vector of features per image, and own_maps:make"),
    ):
        with pytest.raises(UsageError, match=message):
            tune(replace(request, force=True, **more))


def test_the_unmerged_model_is_run_once(tower, images, monkeypatch):
    with Scorer(tower, images, SimilarityMeasure()) as scorer:
        monkeypatch.setattr(type(tower), "run", None)
        score, each = scorer.counted((0, 0, 0), 16, 24)
        assert (score.damage, score.worst) == pytest.approx((0, 0), abs=1e-12)
        assert (score.images, score.entropy) == (8, 1.0)
        assert each.tolist() == pytest.approx([1.0] * 8)
