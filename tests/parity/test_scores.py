"""The judge of scored reducers: rounding explains a plan, and nothing else does."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reducers import digit_images, digit_model

from tome_export.parity.compare import K
from tome_export.parity.reference import LayerRecord, Pass, run_reference, run_yardstick
from tome_export.parity.scores import judge_scores
from tome_export.reducers.base import LayerSpec
from tome_export.reducers.pitome import PiToMe
from tome_export.reducers.topk import TopK

LAYER = 1
IMAGES = 8
STEADY = np.full(IMAGES, -1)
QUICK = settings(max_examples=25, deadline=None, derandomize=True)
REDUCERS = [TopK(), PiToMe()]


@pytest.fixture(scope="module", params=REDUCERS, ids=[reducer.name for reducer in REDUCERS])
def case(request):
    """Model, and real passes over digits: fp32 reference, fp16 and fp64 yardsticks."""
    model = digit_model(request.param, [9, 9])
    images = digit_images(IMAGES)
    reference = run_reference(model, images)
    return model, reference, {p: run_yardstick(model, images, p, reference) for p in PRECISIONS}


PRECISIONS = ("fp16", "bf16", "fp32")


def decided(model, signals, layer=LAYER):
    """What these scores lead to."""
    signals = tuple(np.asarray(signal, np.float32) for signal in signals)
    counts = model.layers[layer]
    place = LayerSpec(
        layer, counts.r, model.prefix, model.class_token, len(model.layers), counts.tokens_in
    )
    plan = model.settings.reducer.plan(tuple(map(torch.from_numpy, signals)), place)
    return LayerRecord(signals, *(part.numpy() for part in plan))


def judged(model, reference, yardstick, record, k=K):
    led = Pass(reference.output, {LAYER: record})
    return judge_scores(model, LAYER, reference, yardstick, led, STEADY, k)


def test_the_reference_itself_passes(case):
    model, reference, yardsticks = case
    for yardstick in yardsticks.values():
        found = judged(model, reference, yardstick, reference.layers[LAYER])
        assert found.passed
        assert (found.disagreements, found.score_error) == (0, 0)
        assert 0 < found.score_error_allowed < 0.2


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_flips_of_a_precision_are_explained(case, precision):
    model, reference, yardsticks = case
    record = yardsticks[precision].layers[LAYER]
    found = judged(model, reference, yardsticks[precision], record)
    assert found.passed
    assert found.defects == found.op_defects == 0
    assert found.largest_margin <= found.score_error <= found.score_error_allowed
    if precision == "bf16":
        assert found.disagreements > 0
        assert len(found.examples) > 0


@QUICK
@given(seed=st.integers(0, 2**31), share=st.floats(0.1, 0.95))
def test_noise_of_the_size_of_the_yardsticks_is_explained(case, seed, share):
    """Any runtime whose scores are as far off as PyTorch's, group by group, passes."""
    model, reference, yardsticks = case
    rng = np.random.default_rng(seed)
    ours, own = reference.layers[LAYER], yardsticks["fp16"].layers[LAYER]
    signs = [rng.choice([-1.0, 1.0], s.shape) for s in ours.signals]
    signals = [
        s + K * share * sign * (o - s)
        for s, o, sign in zip(ours.signals, own.signals, signs, strict=True)
    ]
    found = judged(model, reference, yardsticks["fp16"], decided(model, signals))
    assert found.passed
    assert found.defects == found.op_defects == 0


@QUICK
@given(seed=st.integers(0, 2**31), kind=st.integers(0, 1))
def test_one_wrong_score_is_found(case, seed, kind):
    """Twice what any score is allowed, in one place, whether or not it changes the plan."""
    model, reference, yardsticks = case
    rng = np.random.default_rng(seed)
    ours = reference.layers[LAYER]
    signals = [signal.copy() for signal in ours.signals]
    changed = signals[kind % len(signals)]
    bound = judged(model, reference, yardsticks["fp16"], ours).score_error_allowed
    place = tuple(rng.integers(0, length) for length in changed.shape)
    changed[place] += 2 * bound * np.abs(changed).max() * rng.choice([-1, 1])
    found = judged(model, reference, yardsticks["fp16"], decided(model, signals))
    assert not found.passed
    assert found.op_defects == 0
    assert found.score_error > found.score_error_allowed
    assert found.defects == found.disagreements


@QUICK
@given(seed=st.integers(0, 2**31))
def test_a_plan_that_the_scores_do_not_lead_to_is_found(case, seed):
    model, reference, yardsticks = case
    rng = np.random.default_rng(seed)
    ours = reference.layers[LAYER]
    keep, src = ours.keep.copy(), ours.src.copy()
    image, kept, gone = rng.integers(0, IMAGES), rng.integers(1, keep.shape[1]), 0
    keep[image, kept], src[image, gone] = src[image, gone], keep[image, kept]
    found = judged(model, reference, yardsticks["bf16"], replace(ours, keep=keep, src=src))
    assert not found.passed
    assert found.op_defects == 1
    assert found.disagreements > 0
    # The scores are the reference's, so the plan is the only defect.
    assert found.score_error == 0


def broken(ours, name):
    keep, src, dst = ours.keep.copy(), ours.src.copy(), ours.dst.copy()
    if name == "twice":
        src[0, 0] = keep[0, 3]
    elif name == "beyond":
        dst[0, 0] = keep.shape[1]
    elif name == "below":
        dst[0, 0] = -2
    elif name == "dropped":
        dst[0, 0] = -1 if dst[0, 0] >= 0 else 3
    elif name == "prefix":
        keep[0, [0, 1]] = keep[0, [1, 0]]
    elif name == "order":
        keep[0, [3, 4]] = keep[0, [4, 3]]
    return replace(ours, keep=keep, src=src, dst=dst)


@pytest.mark.parametrize("name", ["twice", "beyond", "below", "dropped", "prefix", "order"])
def test_what_is_no_plan_or_another_is_found_and_not_stumbled_over(case, name):
    model, reference, yardsticks = case
    found = judged(model, reference, yardsticks["bf16"], broken(reference.layers[LAYER], name))
    assert not found.passed
    assert found.op_defects == 1
    if name in ("twice", "beyond", "below", "prefix"):
        assert [example.kind for example in found.examples] == ["structure"]
        assert found.defects == 1
    else:
        assert found.disagreements >= 1


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_scores_that_are_no_numbers_are_found(case, bad):
    model, reference, yardsticks = case
    ours = reference.layers[LAYER]
    signals = [signal.copy() for signal in ours.signals]
    signals[0][0, 5] = bad
    with np.errstate(invalid="ignore"):
        found = judged(model, reference, yardsticks["bf16"], replace(ours, signals=tuple(signals)))
    assert not found.passed


def test_each_kind_of_scores_has_its_own_allowance(case):
    """A rough kind does not excuse an exact one."""
    model, reference, yardsticks = case
    if len(reference.layers[LAYER].signals) < 2:
        pytest.skip("one kind of scores only")
    ours, own = reference.layers[LAYER], yardsticks["fp16"].layers[LAYER]
    energies, cosines = ours.signals
    rough = Pass(reference.output, {LAYER: replace(own, signals=(energies * 0.9, own.signals[1]))})
    found = judged(model, reference, rough, decided(model, (energies, cosines + 0.05)))
    assert not found.passed
    assert judged(model, reference, rough, decided(model, (energies * 0.8, cosines))).passed


def heavy(model, seed=0):
    """A reference of one large score and many small ones, and the error that fp16 makes."""
    rng = np.random.default_rng(seed)
    count = model.layers[LAYER].tokens_in - model.prefix
    logits = rng.normal(-8, 2, (IMAGES, count))
    logits[:, 0] = 0
    scores = np.exp(logits)
    own = scores * (1 + 2.0**-10 * rng.standard_normal(scores.shape))
    output = np.zeros((IMAGES, 10))
    reference = Pass(output, {LAYER: decided(model, (scores,))})
    return reference, Pass(output, {LAYER: decided(model, (own,))})


def test_small_scores_are_not_excused_by_the_error_of_large_ones():
    """In absolute terms all the small ones lie within the error of the large one."""
    model = digit_model(TopK(), [9, 9])
    reference, yardstick = heavy(model)
    (scores,) = reference.layers[LAYER].signals
    allowed = K * np.abs(yardstick.layers[LAYER].signals[0] - scores).max()
    assert (np.median(scores) < allowed).all()
    lowest = np.where(scores < allowed / 2, scores[:, ::-1].min(axis=1, keepdims=True), scores)
    found = judged(model, reference, yardstick, decided(model, (lowest,)))
    assert np.abs(lowest - scores).max() < allowed
    assert found.disagreements > 0
    assert not found.passed
    own = judged(model, reference, yardstick, yardstick.layers[LAYER])
    assert own.passed


def test_a_yardstick_that_is_off_by_everything_proves_nothing():
    """As where fp16 overflows and scores fall back to 0."""
    model = digit_model(TopK(), [9, 9])
    reference, yardstick = heavy(model)
    own = yardstick.layers[LAYER].signals[0].copy()
    own[3] = 0
    blind = Pass(reference.output, {LAYER: decided(model, (own,))})
    found = judged(model, reference, blind, reference.layers[LAYER])
    assert not found.passed
    assert not np.isfinite(found.score_error_allowed)
