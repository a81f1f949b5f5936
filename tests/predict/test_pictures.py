"""Pictures of dense outputs: grey maps by their own range, classes by a palette."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from tome_export.predict.pictures import class_map, is_picture, palette, picture_of


@pytest.mark.parametrize("shape", [(2, 8), (1, 2, 8)])
def test_a_map_goes_from_black_to_white(shape):
    values = np.linspace(-3.0, 1.0, 16, dtype=np.float32).reshape(shape)
    picture = picture_of(values)
    assert (picture.mode, picture.size) == ("L", (8, 2))
    assert np.asarray(picture).reshape(-1).tolist() == [*range(0, 256, 17)]
    assert class_map(values) is None


def test_a_flat_map_is_black():
    assert not np.asarray(picture_of(np.full((3, 3), 7, np.float16))).any()


def test_the_range_of_a_half_precision_map_does_not_overflow():
    found = np.asarray(picture_of(np.array([[-6e4, 0, 6e4]], np.float16)))
    assert found.tolist() == [[0, 128, 255]]


def test_channels_become_classes(tmp_path):
    values = np.random.default_rng(0).standard_normal((21, 6, 4))
    values[:, 0, 0] = 1.0  # of equal ones the lowest
    picture_of(values).save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as picture:
        assert (picture.mode, picture.size) == ("P", (4, 6))
        classes, colours = np.asarray(picture), np.asarray(picture.convert("RGB"))
    assert classes.tolist() == values.argmax(axis=0).tolist()
    assert classes[0, 0] == 0
    assert (colours == palette()[classes]).all()


def test_many_channels_keep_their_numbers(tmp_path):
    values = np.zeros((300, 1, 2))
    values[[7, 299], 0, [0, 1]] = 1
    picture_of(values).save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as picture:
        assert np.asarray(picture).tolist() == [[7, 299]]


def test_the_palette_is_that_of_pascal_voc():
    """Its first colours as published: background, aeroplane, bicycle, …, and that of the void."""
    known = {0: (0, 0, 0), 1: (128, 0, 0), 2: (0, 128, 0), 3: (128, 128, 0), 4: (0, 0, 128)}
    known |= {8: (64, 0, 0), 15: (192, 128, 128), 20: (0, 64, 128), 255: (224, 224, 192)}
    assert {index: tuple(palette()[index].tolist()) for index in known} == known
    assert len(np.unique(palette(), axis=0)) == 256


@pytest.mark.parametrize(
    ("shape", "drawn"), [((3, 4), True), ((9, 3, 4), True), ((5,), False), ((1, 2, 3, 4), False)]
)
def test_what_can_be_drawn(shape, drawn):
    assert is_picture(shape) is drawn
