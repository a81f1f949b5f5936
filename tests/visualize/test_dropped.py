"""Dropped patches: of no token, dark and hatched in every form of picture."""

from __future__ import annotations

import base64
from xml.etree import ElementTree

import numpy as np
import torch
from layers import layers_of

from tome_export.merge.plan import MergePlan, source_map
from tome_export.outlines import DARK, HATCH, hex_colour, outline_colours
from tome_export.report.gallery import DROPPED_GROUP, gallery_from_maps
from tome_export.runtime.merge_maps import (
    DROPPED,
    LayerGroups,
    MergeMap,
    Plans,
    groups_by_layer,
    layers_from_positions,
)
from tome_export.spec import PatchGrid
from tome_export.visualize.draw import NAMESPACE, draw_svg, pixels_from_map

GRID = PatchGrid(3, 4, 4, 5)
IDS = np.array([[0, 1, 1, DROPPED], [DROPPED, DROPPED, 2, 2], [3, 4, DROPPED, 4]])


def merge_map(ids=IDS):
    image = np.random.default_rng(0).integers(120, 256, (12, 20, 3)).astype(np.uint8)
    return MergeMap(image, GRID, (LayerGroups(0, 6, ids, 0),))


def test_plans_that_drop_are_composed_as_the_source_map():
    """Layer 0 drops tokens 5 and 2 and merges 3 into output 1; layer 1 drops what holds 4."""
    first = Plans(np.array([[0, 1, 4]]), np.array([[5, 3, 2]]), np.array([[-1, 1, -1]]))
    second = Plans(np.array([[0, 1]]), np.array([[2]]), np.array([[-1]]))
    found = groups_by_layer({0: first, 1: second}, layers_of((6, 3, 2)), 1)[:, :, 0]
    assert found[0].tolist() == [[0, 1, -1, 1, 2, -1], [0, 1, -1, 1, -1, -1]]
    plans = [MergePlan(*map(torch.from_numpy, plan)) for plan in (first, second)]
    for layer in range(2):
        expected = source_map(plans[: layer + 1], 1, 6)
        assert found[:, layer].tolist() == expected.tolist()
    groups = layers_from_positions(found[0][:, None], (3, 2), 2, PatchGrid(2, 2, 4, 4))[1]
    assert groups.ids.tolist() == [[-1, 1], [-1, -1]]
    assert (groups.dropped, groups.merged, groups.largest) == (3, {}, 1)
    assert groups.patches_in_prefix == 1  # token 3 went into a prefix token


def test_dropped_patches_are_no_group():
    groups = merge_map().layers[0]
    assert groups.merged == {1: 2, 2: 2, 4: 2}
    assert (groups.largest, groups.dropped) == (2, 4)
    assert DROPPED not in outline_colours(IDS)
    nothing = LayerGroups(0, 1, np.full((3, 4), DROPPED), 0)
    assert (nothing.largest, nothing.dropped) == (0, 12)


def test_their_pixels_are_dark_and_hatched_and_no_others():
    picture = pixels_from_map(merge_map(), 0, 80)
    scale = picture.shape[0] // 12
    for row in range(3):
        for col in range(4):
            down, across = slice(row * 4 * scale, (row + 1) * 4 * scale), col * 5 * scale
            patch = picture[down, across : across + 5 * scale].reshape(-1, 3)
            colours = {tuple(pixel) for pixel in patch.tolist()}
            if IDS[row, col] == DROPPED:
                assert colours == {DARK, HATCH}
            else:
                assert not colours & {DARK, HATCH}


def test_the_svg_says_it():
    root = ElementTree.fromstring(draw_svg(merge_map(), 0))  # noqa: S314 (ours)
    titles = [title.text for title in root.iter(f"{{{NAMESPACE}}}title")]
    assert titles[0] == "dropped: 4 patches"
    assert len(titles) == 4
    (pattern,) = root.iter(f"{{{NAMESPACE}}}pattern")
    fills = [path.get("fill") for path in root.iter(f"{{{NAMESPACE}}}path")]
    assert fills.count(f"url(#{pattern.get('id')})") == 1
    assert hex_colour(DARK) in ElementTree.tostring(pattern).decode()
    whole = draw_svg(merge_map(np.arange(12).reshape(3, 4)), 0)
    assert "dropped" not in whole


def test_the_report_hands_them_to_its_script():
    gallery = gallery_from_maps([merge_map(), merge_map()], ["a", "b"], (13, 6))
    assert gallery["drops"]
    assert gallery["data"]["dropped"][0] == DROPPED_GROUP
    text, _, largest, dropped = gallery["data"]["images"][0]["layers"][0]
    groups = np.frombuffer(base64.b64decode(text), "<u2").reshape(3, 4)
    assert (groups == DROPPED_GROUP).tolist() == (IDS == DROPPED).tolist()
    assert groups[0].tolist() == [0, 1, 1, DROPPED_GROUP]
    assert (largest, dropped) == (2, 4)
    one, other = gallery["pictures"]
    assert (one["groups"].largest, one["groups"].dropped) == (2, 4)
    # Ids are of the whole page.
    assert 'id="dropped-0"' in one["dropped"]
    assert 'id="dropped-1"' in other["dropped"]
    whole = gallery_from_maps([merge_map(np.arange(12).reshape(3, 4))], ["a"], (13, 6))
    assert not whole["drops"]
    assert whole["pictures"][0]["dropped"] == ""
