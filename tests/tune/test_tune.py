"""The images of a search and how schedules are scored on them."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from tome_export.artifact.schedule import TuneData
from tome_export.data.labels import Classes
from tome_export.errors import UsageError
from tome_export.models import resolve
from tome_export.patch import patch
from tome_export.progress import Silent
from tome_export.tune import images as images_module
from tome_export.tune.images import FEWEST, TuneImages
from tome_export.tune.main import estimate as estimate_of
from tome_export.tune.measure import ClassMeasure
from tome_export.tune.score import Scorer

R = (5, 0, 4)


@pytest.fixture(scope="module")
def small():
    from tests.conftest import small_vit

    return patch(small_vit(depth=3), 0)


def images_of(model, count=30, search=16, chosen_on=24):
    pixels = np.random.default_rng(0).standard_normal((count, *model.input_size), np.float32)
    data = TuneData(
        source="mine",
        available=count,
        search=search,
        validation=chosen_on - search,
        held_out=count - chosen_on,
        unreadable_count=0,
        notes=(),
    )
    return TuneImages(pixels, None, data)


def digits(limit, **more):
    recipe = resolve("vit_digits")
    source = images_module.tuning_source(
        recipe, Classes(10, recipe.output.labels), ("samples",), None
    )
    return images_module.read_images(
        source, recipe.preprocessing, 10**6, limit, 0, Silent(), **more
    )


def test_scores_are_those_of_the_patched_model(small):
    images = images_of(small)
    threads = torch.get_num_threads()
    with Scorer(small, images, ClassMeasure()) as scorer:
        parts = [scorer.search(R), scorer.validation(R)]
        again = Scorer.search(scorer, R)
        parted = [scorer.counted(R, a, b)[1] for a, b in ((0, 16), (16, 24), (24, 30))]
    with torch.no_grad():
        merged = patch(small, list(R))(torch.from_numpy(images.pixels))
        plain = small(torch.from_numpy(images.pixels))
    expected = (merged.argmax(1) == plain.argmax(1)).numpy()
    np.testing.assert_array_equal(np.concatenate(parted), expected)
    assert [part.images for part in parts] == [16, 8]
    assert sum(part.total for part in parts) == expected[:24].sum()
    reference, logits = (x[:24].double().log_softmax(1) for x in (plain, merged))
    damage = (reference.exp() * (reference - logits)).sum(1).mean()
    whole = sum(part.damage * part.images for part in parts) / 24
    assert whole == pytest.approx(float(damage), rel=1e-4)
    assert again == parts[0]
    # Neither this thread nor later ones are left with fewer cores.
    assert torch.get_num_threads() == threads
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(torch.get_num_threads).result() == threads


def test_a_bad_schedule_is_left_early(small):
    with Scorer(small, images_of(small), ClassMeasure()) as scorer:
        whole = scorer.search((32, 16, 8))
        left = scorer.search((32, 16, 8), bound=whole.damage / 1000)
        assert whole.complete
        assert (left.complete, left.images) == (False, 4)
        assert scorer.search((32, 16, 8)) == whole


def test_no_thread_is_left(small):
    before = threading.active_count()
    with Scorer(small, images_of(small), ClassMeasure()) as scorer:
        scorer.search(R)
        assert threading.active_count() > before
    assert threading.active_count() == before


@pytest.mark.parametrize(
    ("parts", "on", "count"),
    [((16, 24), "held out", 6), ((16, 30), "validation", 14), ((30, 30), None, 0)],
)
def test_the_estimate_is_of_images_that_the_search_did_not_see(small, parts, on, count):
    images = images_of(small, 30, *parts)
    with Scorer(small, images, ClassMeasure()) as scorer:
        estimate = estimate_of(R, None, scorer, "agreement")
        if on is None:
            assert estimate is None
            return
        right = scorer.counted(R, 30 - count, 30)[1]
    assert (estimate.on, estimate.images) == (on, count)
    assert estimate.correct == right.sum()
    assert estimate.low <= estimate.share <= estimate.high
    assert estimate.unmerged.share == 1.0  # agreement with itself
    assert estimate.change.share == pytest.approx(right.mean() - 1)


@pytest.mark.parametrize(
    ("limit", "parts"), [(40, (40, 40)), (64, (32, 64)), (299, (149, 299)), (300, (150, 225))]
)
def test_how_images_are_split(limit, parts):
    found = digits(limit)
    assert len(found.pixels) == limit
    assert (found.data.search, found.chosen_on) == parts
    assert found.data.held_out == limit - found.chosen_on


def test_more_images_than_memory_should_hold(monkeypatch):
    monkeypatch.setattr(images_module, "MOST_BYTES", 1 << 20)
    with pytest.raises(UsageError, match=r"--limit is 400; 400 images of 1x32x32 numbers take mor"):
        digits(400)


def test_late_steps_take_what_they_cannot_do_without(small):
    assert len(digits(400).pixels) == 400
    images = digits(400, until=0.0)
    assert len(images.pixels) == FEWEST
    note = f"{FEWEST} of 450 images are used; --limit and --time-limit set how many"
    assert note in images.data.notes
    with Scorer(small, images_of(small, 100, 50, 75), ClassMeasure(), until=0.0) as scorer:
        images = scorer.images
        assert FEWEST <= len(images.pixels) < 100
        assert len(scorer.unmerged) == len(images.pixels)
        assert 0 < images.data.search < images.chosen_on < len(images.pixels)
        assert images.data.held_out == len(images.pixels) - images.chosen_on
        assert scorer.search(R).images == images.data.search
        assert images.data.notes[-1].endswith(
            " of 100 images are used: the time limit leaves no more"
        )
