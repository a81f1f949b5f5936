"""Token counts of video towers: against the issue's figures and the independent reading."""

from __future__ import annotations

from pathlib import Path

import pytest
from manifests import manifest
from video_reference import Merging, token_counts

from tome_export.artifact import Manifest
from tome_export.errors import InputError
from tome_export.merge.macs import BlockCost, total_macs
from tome_export.video.options import FrameMerging, VideoOptions, video_token_counts

B32 = [(12, 50 - 2 * i, 48 - 2 * i) for i in range(8)]
B32 += [(6, 48, 44), (3, 62, 56), (1, 118, 107), (1, 107, 97)]
B16 = [(12, 197 - 2 * i, 195 - 2 * i) for i in range(8)]
B16 += [(6, 254, 229), (3, 321, 289), (1, 607, 547), (1, 547, 493)]


@pytest.mark.parametrize(("tokens", "expected"), [(50, B32), (197, B16)], ids=["b32", "b16"])
def test_counts_are_those_of_tempme(tokens, expected):
    layers = video_token_counts([2] * 12, FrameMerging(), 12, tokens, 1)
    assert [(layer.sequences, layer.attended, layer.tokens_out) for layer in layers] == expected
    assert token_counts(tokens, 12, 12, Merging()) == expected
    assert layers[0].sequences * layers[0].tokens_in == 12 * tokens


@pytest.mark.parametrize("inter", [0, 7, 30, 50, 100])
@pytest.mark.parametrize("intra", [0, 10, 33, 100])
@pytest.mark.parametrize("protected", [1, 5])
def test_counts_follow_the_formulas_at_any_proportion(inter, intra, protected):
    merging = FrameMerging((1, 3), (2, 3), (inter, intra))
    layers = video_token_counts([3] * 5, merging, 6, 17 + protected, protected)
    m = Merging(3, (1, 3), (2, 3), inter / 100, intra / 100)
    expected = token_counts(17 + protected, 6, 5, m, protected)
    assert [(layer.sequences, layer.attended, layer.tokens_out) for layer in layers] == expected
    for layer in layers:
        assert layer.joined * layer.tokens_in - layer.cross - layer.r == layer.tokens_out
        assert layer.tokens_out >= protected * 6 // layer.sequences


def test_without_joining_every_frame_is_an_image():
    layers = video_token_counts([20, 20, 20], None, 4, 50, 1)
    assert [layer.tokens_out for layer in layers] == [30, 16, 9]
    assert {(layer.sequences, layer.joined, layer.cross) for layer in layers} == {(4, 1, 0)}


def test_macs_count_every_clip():
    cost = BlockCost(before=3, attention=2, after=5)
    (layer,) = video_token_counts([0], FrameMerging((0,), (2,), (50, 10)), 4, 10, 1)
    # 2 clips of 20 tokens; 9 merge across (half of the 18 that may), then 1 of 11 inside.
    assert (layer.sequences, layer.attended, layer.tokens_out) == (2, 11, 10)
    assert total_macs([cost], [layer], 7) == 7 + 2 * (11 * 3 + 11 * 11 * 2 + 10 * 5)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (
            lambda: FrameMerging((9, 8), (2, 2)),
            "layers that join frames are 9,8; expected them in rising order, counted from 0, such "
            "as 8,9,10",
        ),
        (
            lambda: FrameMerging((8, 9), (2, 2, 3)),
            "2 layers (8,9) join 3 numbers of frames (2,2,3); expected one number per layer",
        ),
        (
            lambda: FrameMerging((8,), (1,)),
            "clips to join are 1; expected 2 or more for every layer, such as 2,2,3",
        ),
        (
            lambda: FrameMerging((8,), (2,), (130, 10)),
            "proportions are 130,10; expected two percentages from 0 to 100, across frames and "
            "inside them, such as 30,10",
        ),
        (
            lambda: FrameMerging.parse("8;9", "2,2", "30,10", True),
            "layers that join frames are '8;9'; expected numbers such as 8,9,10",
        ),
        (
            lambda: FrameMerging.parse("8", "2", "30", True),
            "proportions are '30'; expected two percentages, across frames and inside them, such "
            "as 30,10",
        ),
        (
            lambda: FrameMerging().check(6, 12),
            "layer 10 is to join frames; the model has layers 0 to 5",
        ),
        (
            lambda: FrameMerging().check(12, 8),
            "8 frames cannot be joined 2,2,3 at a time; expected a multiple of 12",
        ),
        (lambda: VideoOptions(0), "0 frames were asked for; expected 1 or more"),
    ],
)
def test_what_does_not_fit_is_one_clear_line(made, message):
    with pytest.raises(InputError) as caught:
        made()
    assert str(caught.value) == message


def test_options_survive_the_manifest():
    for options in (VideoOptions(), VideoOptions(8, FrameMerging((1,), (4,), (12.5, 0), False))):
        pixels = {"name": "pixel_values", "dtype": "float32"}
        pixels["shape"] = ["batch", options.frames or 1, 1, 8, 8]
        entry = manifest(video=options, input=pixels, inputs=[pixels]).json_bytes()
        assert Manifest.parse(entry, Path("build.json")).video == options
    assert str(FrameMerging()) == "layers 8,9,10 join 2,2,3 clips, 30,10 %"
