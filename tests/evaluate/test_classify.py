"""What is kept of outputs."""

from __future__ import annotations

import numpy as np
import pytest

from tome_export.data.decode import Decoded
from tome_export.errors import ExportError
from tome_export.evaluate.records import UNDEFINED, Classifier, best, cosine

PIXELS = np.arange(3, dtype=np.float32).reshape(3, 1, 1, 1)


class Doubling:
    """Gives its input, and keeps the sizes of its batches."""

    def __init__(self):
        self.sizes = []

    def infer(self, inputs):
        x = inputs["pixel_values"].reshape(-1, 1)
        self.sizes.append(len(x))
        return {"y": np.concatenate([x, 1 - x], axis=1)}


class Broken:
    def infer(self, _inputs):
        raise RuntimeError("out of memory")


def test_best_classes_are_in_order_and_of_equal_ones_the_first():
    logits = np.array([[0, 5, 5, 1, 2, 9, 0], [1, 1, 1, 1, 1, 1, 1]], np.float32)
    assert best(logits).tolist() == [[5, 1, 2, 4, 3], [0, 1, 2, 3, 4]]


def test_few_classes_and_outputs_that_are_not_finite():
    logits = np.array([[0, 1], [np.nan, 1], [np.inf, 0]], np.float32)
    assert best(logits).tolist() == [[1, 0, -1, -1, -1], [-1] * 5, [-1] * 5]


def test_cosine_is_of_each_image_over_all_else():
    a = np.array([[[1, 0], [0, 1]], [[1, 1], [0, 0]], [[0, 0], [0, 0]]], np.float32)
    b = np.array([[[2, 0], [0, 2]], [[1, -1], [0, 0]], [[1, 0], [0, 0]]], np.float32)
    found = cosine(a, b)[:, 0]
    assert found[:2] == pytest.approx([1, 0])
    assert np.isnan(found[2])


def test_every_batch_is_full_and_each_image_is_there_once():
    runner = Doubling()
    record = Classifier(8, "y", "softmax", "").record(
        Decoded(4, PIXELS, ((1, "x", "spoilt"),)), {"m": runner}
    )
    assert runner.sizes == [8]
    assert record.chunk == 4
    assert record.values["m"][:, :2].tolist() == [[1, 0], [0, 1], [0, 1]]
    assert record.unreadable == ((1, "x", "spoilt"),)


def test_features_are_compared_with_the_baseline():
    runners = {"a": Doubling(), "b": Doubling()}
    record = Classifier(4, "y", None, "b").record(Decoded(0, PIXELS, ()), runners)
    assert record.values["a"][:, 0] == pytest.approx([1, 1, 1])


class Maps:
    """Gives the same maps whatever its input is."""

    def __init__(self, *maps):
        self.maps = np.array(maps, np.float32)

    def infer(self, _inputs):
        return {"y": self.maps}


def test_maps_that_are_constant_or_not_finite():
    """Nothing correlates with a constant map; a constant one correlates with no other."""
    ramp, flat, broken = [[0, 1], [2, 3]], [[5, 5], [5, 5]], [[0, np.inf], [1, 2]]
    pixels = np.zeros((4, 1, 1, 1), np.float32)
    runners = {"b": Maps(ramp, ramp, flat, ramp), "a": Maps(ramp[::-1], flat, ramp, broken)}
    record = Classifier(4, "y", None, "b", "map").record(Decoded(0, pixels, ()), runners)
    reversed_ramp = np.corrcoef([0, 1, 2, 3], [2, 3, 0, 1])[0, 1]
    found = record.values["a"][:, 0]
    assert found[:3] == pytest.approx([reversed_ramp, 0, UNDEFINED])
    assert np.isnan(found[3])
    assert record.values["b"][:, 0] == pytest.approx([1, 1, UNDEFINED, 1])


def test_a_chunk_without_a_readable_image_runs_nothing():
    empty = Decoded(0, np.zeros((0, 1, 1, 1), np.float32), ((0, "x", "spoilt"),))
    assert Classifier(4, "y", "softmax", "").record(empty, {"m": Broken()}).values == {}


def test_a_runner_that_fails():
    with pytest.raises(ExportError) as caught:
        Classifier(4, "y", "softmax", "").record(Decoded(0, PIXELS, ()), {"m": Broken()})
    assert str(caught.value) == (
        "m failed on a batch of 4: out of memory; try a smaller --batch or another --backend"
    )
