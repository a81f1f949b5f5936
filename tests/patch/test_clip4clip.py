"""TempMe on CLIP4Clip's tower, against the independent reading of the paper."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from video_reference import Merging, tempme
from video_towers import MERGING, clip4clip, groups, schedule, videos

from tome_export.errors import InputError
from tome_export.merge.ops import merge
from tome_export.merge.schedule import Schedule
from tome_export.patch import patch
from tome_export.reducers import reducer_class
from tome_export.video.options import ClipSizes, FrameMerging, VideoSchedule
from tome_export.video.tower import joined, joined_places


def assert_same_plans(trace, records, clips_of):
    """Every merge of every clip is the reference's, token for token."""
    assert [(t.layer, t.across) for t in trace] == [(r.layer, r.cross) for r in records]
    for step, record in zip(trace, records, strict=True):
        each = clips_of(step.step)
        for video, of_video in enumerate(record.groups):
            assert len(of_video) == each
            for clip, expected in enumerate(of_video):
                assert groups(step.plan, video * each + clip) == expected


@pytest.mark.parametrize(
    ("r", "changes", "prop_attn"),
    [
        (3, {}, True),
        (0, {}, True),
        (20, {"proportions": (100, 100)}, True),
        (3, {"proportions": (0, 10)}, True),
        (3, {"proportions": (30, 0)}, True),
        (3, {"position": False}, True),
        (3, {}, False),
        (2, {"layers": (0, 3), "frames": (4, 2), "position": False}, True),
        (1, {"layers": (3,), "frames": (8,), "position": False}, True),
    ],
)
def test_plans_and_features_are_the_references(r, changes, prop_attn):
    pixels, mask = videos()
    tower = clip4clip().double()
    model = patch(tower, schedule(r, **changes), prop_attn=prop_attn)
    found, trace = model.forward_traced(pixels.double(), inputs={"video_mask": mask.double()})
    chosen = replace(MERGING, **changes)
    inter, intra = (p / 100 for p in chosen.proportions)
    m = Merging(r, chosen.layers, chosen.frames, inter, intra, chosen.position, prop_attn)
    expected, records = tempme(tower.state_dict(), pixels, mask, m)
    assert_same_plans(trace, records, model.sequences_at)
    # The logarithm of sizes is taken in float32.
    assert (found - expected).abs().max() <= 1e-8 * expected.abs().max()


def test_fp32_makes_the_same_plans_and_features():
    pixels, mask = videos()
    tower = clip4clip()
    model = patch(tower, schedule())
    found, trace = model.forward_traced(pixels, inputs={"video_mask": mask})
    expected, records = tempme(tower.state_dict(), pixels, mask, Merging(3, (1, 2), (2, 2)))
    assert_same_plans(trace, records, model.sequences_at)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_without_merging_it_is_the_tower():
    pixels, mask = videos()
    tower = clip4clip()
    for model in (patch(tower, 0), patch(tower, Schedule(0))):
        assert torch.equal(model(pixels, mask), tower(pixels, mask))
    assert patch(tower, 0).macs() == patch(tower, 0).macs(merged=False)


def test_joining_alone_widens_attention_and_merges_nothing():
    model = patch(clip4clip(), VideoSchedule(0, frames=FrameMerging((1,), (8,), (0, 0), False)))
    assert model.steps == ()
    assert [layer.total_out for layer in model.layers] == [136] * 4
    assert [layer.attended for layer in model.layers] == [17, 136, 136, 136]
    pixels, mask = videos()
    assert not torch.allclose(model(pixels, mask), model.model(pixels, mask), atol=1e-4)


def test_macs_are_those_of_the_clips():
    model = patch(clip4clip(), schedule())
    tokens = [(8, 17, 14), (4, 20, 18), (2, 26, 24), (2, 24, 22)]
    blocks = sum(c * (n * 4 * 64**2 + n * n * 2 * 64 + k * 8 * 64**2) for c, n, k in tokens)
    patches, head = 8 * 16 * 64 * 3 * 8**2, 8 * 64 * 24
    assert model.macs() == blocks + patches + head


def test_masked_frames_do_not_count_and_a_batch_is_no_company():
    pixels, mask = videos(3)
    model = patch(clip4clip(), schedule())
    both = model(pixels, mask)
    for video in range(3):
        alone = model(pixels[video : video + 1], mask[video : video + 1])
        assert torch.allclose(alone[0], both[video], atol=1e-6)
    half = torch.ones(3, 8)
    half[:, 4:] = 0
    assert torch.allclose(model(pixels, half) * 4, _sum_of_frames(model, pixels, half), atol=1e-5)


def _sum_of_frames(model, pixels, mask):
    """Features of single frames, summed: what the mask's denominator is."""
    total = 0
    for frame in range(8):
        if mask[0, frame]:
            one = torch.zeros(3, 8)
            one[:, frame] = 1
            total = total + model(pixels, one)
    return total


@pytest.mark.parametrize("merging", [None, MERGING, replace(MERGING, frames=(4, 2))])
def test_the_source_map_says_where_every_patch_went(merging):
    pixels, mask = videos()
    model = patch(
        clip4clip(), VideoSchedule(3, frames=merging and replace(merging, position=False))
    )
    shown = patch(model, model.settings.schedule, source_map=True)
    features, found = shown(pixels, mask)
    assert torch.equal(features, model(pixels, mask))
    final = model.layers[-1]
    patches = final.sequences * final.tokens_out - 8
    assert found.shape == (2, 8 * 16)
    assert sorted(set(found[0].tolist())) == list(range(patches))
    _, trace = model.forward_traced(pixels, inputs={"video_mask": mask})
    plans = {step.step: step.plan for step in trace}
    assert torch.equal(shown.source_map_of(plans, 2), found)


def test_the_source_map_of_no_merging_is_where_the_features_are():
    model = patch(clip4clip().to("meta"), 0, source_map=True)
    features, found = model(*(given.to("meta") for given in videos()))
    assert found.device == features.device


def test_merging_across_copies_of_a_frame_keeps_what_is_in_it():
    # A still video: with all sizes right, merging equal tokens changes nothing. An odd number of
    # patches puts copies of a patch into both sets.
    tower = clip4clip(sizes=ClipSizes(64, 4, 8, 24, 8)).double()
    frame = torch.randn(1, 1, 3, 24, 24, generator=torch.Generator().manual_seed(2)).double()
    still = frame.expand(-1, 8, -1, -1, -1)
    joins = VideoSchedule(0, frames=FrameMerging((0,), (8,), (0, 0), False))
    merges = VideoSchedule(0, frames=FrameMerging((0,), (8,), (40, 0), False))
    ones = torch.ones(1, 8, dtype=torch.float64)
    expected, found = (patch(tower, s)(still, ones) for s in (joins, merges))
    assert (found - expected).abs().max() <= 1e-7


def test_joined_puts_protected_tokens_first_in_order():
    x = torch.arange(4 * 5).reshape(4, 5, 1).float()
    found = joined(x, 2, 2)[..., 0]
    assert found[0].tolist() == [0, 1, 5, 6, 2, 3, 4, 7, 8, 9]
    assert found[1].tolist() == [10, 11, 15, 16, 12, 13, 14, 17, 18, 19]
    places = joined_places(torch.arange(5).expand(4, 5), 5, 2, 2)
    for clip in range(2):
        assert found[clip][places[clip]].tolist() == x[2 * clip : 2 * clip + 2].flatten().tolist()


def test_class_tokens_are_never_merged():
    model = patch(clip4clip(), schedule(20, proportions=(100, 100)))
    pixels, mask = videos()
    _, trace = model.forward_traced(pixels, inputs={"video_mask": mask})
    for step in trace:
        protected = model.prefix_at(step.step)
        assert protected == {0: 1, 1: 2, 2: 4, 3: 4}[step.layer]
        assert (step.plan.keep[:, :protected] == torch.arange(protected)).all()
        assert (step.plan.dst >= protected).all()
        _, size = merge(step.keys.flatten(1, -2) if step.keys.ndim > 3 else step.keys, *_ones(step))
        assert (size[:, :protected] == 1).all()


def _ones(step):
    return torch.ones(
        step.keys.shape[0], step.plan.keep.shape[1] + step.plan.src.shape[1]
    ), step.plan


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: patch(clip4clip(), schedule(layers=(1, 9))),
            "layer 9 is to join frames; the model has layers 0 to 3",
        ),
        (
            lambda: patch(clip4clip(), schedule(frames=(2, 3))),
            "8 frames cannot be joined 2,3 at a time; expected a multiple of 6",
        ),
        (
            lambda: patch(clip4clip(), schedule(layers=(1, 3))),
            "layer 3 joins 4 clips with a frame position, and the tower has none for it; make it "
            "for these layers, or use --no-frame-position",
        ),
        (
            lambda: patch(clip4clip(), schedule(frames=(4, 2))),
            "layer 2 joins 2 clips with a frame position, and the tower has one of 4 clips for "
            "it; make it for these layers, or use --no-frame-position",
        ),
        (
            lambda: patch(clip4clip(), VideoSchedule(per_layer=(1, 2), frames=MERGING)),
            "schedule 1,2; layers 1,2 join 2,2 clips, 30,10 % has numbers behind layer 0; from "
            "layer 1 on, the first that joins frames, the proportions say how many tokens merge: "
            "give 1 numbers",
        ),
        (
            lambda: patch(clip4clip(), 1, dense=True),
            "a video tower gives one feature for all its frames, so there are no dense outputs; "
            "leave --dense out",
        ),
        (
            lambda: patch(clip4clip(), 1, reducer=reducer_class("topk")()),
            "reducer topk is for images; video towers merge with tome",
        ),
        (
            lambda: patch(clip4clip(), 1)(torch.zeros(1, 8, 3, 16, 16), torch.ones(1, 8)),
            "video shape is (8, 3, 16, 16); this model's token counts are fixed for (8, 3, 32, "
            "32) (frames, channels, height, width)",
        ),
    ],
)
def test_what_does_not_fit_is_one_clear_line(make, message):
    with pytest.raises(InputError) as caught:
        make()
    assert str(caught.value) == message


def test_images_are_not_joined(make_vit):
    with pytest.raises(InputError) as caught:
        patch(make_vit(), VideoSchedule(2, frames=MERGING))
    assert str(caught.value) == (
        "layers 1,2 join 2,2 clips, 30,10 %: that is for video towers, and this model takes images"
    )


def test_an_odd_side_and_one_head_are_fine():
    sizes = ClipSizes(32, 4, 8, 24, 8)
    tower = clip4clip(sizes=sizes).double()
    pixels = torch.randn(1, 8, 3, 24, 24, generator=torch.Generator().manual_seed(1)).double()
    ones = torch.ones(1, 8).double()
    found = patch(tower, schedule(1))(pixels, ones)
    expected, _ = tempme(tower.state_dict(), pixels, ones, Merging(1, (1, 2), (2, 2)))
    assert (found - expected).abs().max() <= 1e-8
