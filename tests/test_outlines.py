"""Outline and fill colours."""

from __future__ import annotations

import numpy as np
import pytest

from tome_export.outlines import PALETTE, hex_colour, mean_colours, outline_colours
from tome_export.spec import PatchGrid


def touching(ids):
    rows, cols = ids.shape
    for y in range(rows):
        for x in range(cols):
            for down, right in ((0, 1), (1, 0), (1, 1), (1, -1)):
                if y + down < rows and 0 <= x + right < cols:
                    yield int(ids[y, x]), int(ids[y + down, x + right])


@pytest.mark.parametrize("shape", [(14, 14), (6, 20), (24, 24)])
def test_groups_that_touch_have_different_outlines(shape):
    rows, cols = np.indices(shape)
    ids = (rows // 2) * 100 + cols // 2
    colours = outline_colours(ids)
    assert colours.keys() == {*np.unique(ids).tolist()}
    assert all(colours[a] != colours[b] for a, b in touching(ids) if a != b)


def test_tokens_of_one_patch_have_no_outline():
    ids = np.array([[0, 0, 1], [2, 3, 3]])
    assert outline_colours(ids).keys() == {0, 3}
    assert outline_colours(np.arange(6).reshape(2, 3)) == {}


def test_more_neighbours_than_colours_still_gives_every_group_one():
    """Ten groups in pieces, each of which touches all others."""
    ids = np.array([[a, b] for a in range(10) for b in range(10) if a != b]).reshape(-1, 6)
    colours = outline_colours(ids)
    assert len(colours) == 10
    assert {*colours.values()} == {*PALETTE}


def test_the_same_groups_have_the_same_colours():
    ids = np.random.default_rng(0).integers(0, 9, (8, 8))
    assert outline_colours(ids) == outline_colours(ids.copy())


def test_mean_colours_leave_out_what_is_of_no_patch():
    image = np.full((5, 9, 3), 255, np.uint8)
    image[:4, :4] = (10, 20, 30)
    image[:4, 4:8] = (20, 20, 31)
    grid = PatchGrid(1, 2, 4, 4)
    assert mean_colours(image, grid, np.array([[0, 1]])) == {0: (10, 20, 30), 1: (20, 20, 31)}
    # Rounded half to even.
    assert mean_colours(image, grid, np.array([[7, 7]])) == {7: (15, 20, 30)}


def test_hex_colours():
    assert [hex_colour(c) for c in PALETTE[:2]] == ["#e69f00", "#56b4e9"]
