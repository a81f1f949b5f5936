"""Schedules against the official parse_r, whose values are written out here."""

from __future__ import annotations

import math

import pytest

from tome_export.errors import InputError
from tome_export.merge.schedule import LayerTokens, Schedule
from tome_export.merge.spec import clamp_r

# What the official parse_r returns for these arguments.
PARSED = [
    (16, 12, [16] * 12),
    ((16, 0.0), 3, [16] * 3),
    ((16, -1.0), 12, [32, 29, 26, 23, 20, 17, 14, 11, 8, 5, 2, 0]),
    ((16, 1.0), 12, [0, 2, 5, 8, 11, 14, 17, 20, 23, 26, 29, 32]),
    ((8, -1.0), 12, [16, 14, 13, 11, 10, 8, 7, 5, 4, 2, 1, 0]),
    (
        (7, 1.0),
        24,
        [0, 0, 1, 1, 2, 3, 3, 4, 4, 5, 6, 6, 7, 7, 8, 9, 9, 10, 10, 11, 12, 12, 13, 14],
    ),
    ((13, -0.5), 12, [19, 17, 16, 15, 14, 13, 12, 11, 10, 9, 8, 7]),
    (
        (23, 0.3),
        12,
        [16, 17, 18, 19, 21, 22, 23, 24, 26, 27, 28, 30],
    ),
    ((10, -0.7), 5, [17, 13, 10, 6, 3]),
    ((11, -0.25), 7, [13, 12, 11, 11, 10, 9, 9]),
    ((3, 1.0), 2, [0, 6]),
    ((0, -1.0), 4, [0] * 4),
    ([5, 0, 90], 5, [5, 0, 90, 0, 0]),
]


@pytest.mark.parametrize(("value", "depth", "expected"), PARSED)
def test_resolve_is_the_official_parse_r(value, depth, expected):
    assert list(Schedule.of(value).resolve(depth)) == expected


def test_one_layer():
    assert Schedule(r=7).resolve(1) == (7,)
    assert Schedule(r=7, inflect=-1.0).resolve(1) == (14,)


@pytest.mark.parametrize(
    ("tokens", "r", "prefix", "expected"),
    [
        (197, 16, 1, 16),
        (197, 98, 1, 98),
        (197, 99, 1, 98),
        (198, 500, 2, 98),
        (196, 500, 0, 98),
        (195, 500, 0, 97),
        (201, 500, 5, 98),
        (3, 5, 1, 1),
        (2, 5, 1, 0),
        (5, 5, 5, 0),
        (4, 5, 5, 0),
        (16, 0, 1, 0),
    ],
)
def test_clamp(tokens, r, prefix, expected):
    assert clamp_r(tokens, r, prefix) == expected


def test_token_counts_of_vit_b16():
    layers = Schedule(r=16).tokens(12, 197, 1)
    counts = [181, 165, 149, 133, 117, 101, 85, 69, 53, 37, 21, 11]
    assert [layer.tokens_out for layer in layers] == counts
    assert [layer.r for layer in layers] == [16] * 11 + [10]
    assert layers[0] == LayerTokens(197, 16, 181)
    assert all(layer.tokens_in - layer.r == layer.tokens_out for layer in layers)


def test_token_counts_stop_at_the_prefix():
    layers = Schedule(r=1000).tokens(6, 20, 4)
    assert [layer.tokens_out for layer in layers] == [12, 8, 6, 5, 5, 5]
    assert Schedule().tokens(2, 17, 1) == (LayerTokens(17, 0, 17),) * 2


@pytest.mark.parametrize(
    ("text", "r", "expected"),
    [
        ("constant", 16, Schedule(r=16)),
        ("constant", None, Schedule()),
        ("decreasing", 8, Schedule(r=8, inflect=-1.0)),
        ("increasing", 8, Schedule(r=8, inflect=1.0)),
        ("12,10,8", None, Schedule(per_layer=(12, 10, 8))),
        (" 12 , 0", None, Schedule(per_layer=(12, 0))),
        ("4", None, Schedule(per_layer=(4,))),
    ],
)
def test_parse(text, r, expected):
    assert Schedule.parse(text, r) == expected


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Schedule.of(-1), "r is -1; expected 0 or more"),
        (lambda: Schedule.of([3, -2]), "r is -2; expected 0 or more"),
        (lambda: Schedule.of([3, 1.5]), "r is 1.5; expected a whole number"),
        (lambda: Schedule.of(True), "r is True; expected a whole number"),
        (lambda: Schedule.of((8.5, 0.0)), "r is 8.5; expected a whole number"),
        (lambda: Schedule.of((8, 1.01)), "inflection is 1.01; expected -1"),
        (lambda: Schedule.of((8, math.nan)), "inflection is nan; expected -1"),
        (lambda: Schedule.of((8, "fast")), "inflection is 'fast'; expected"),
        (lambda: Schedule.of((8, 0.0, 1)), r"schedule is \(8, 0.0, 1\); expected r"),
        (lambda: Schedule.of("8"), "schedule is '8'; expected r"),
        (lambda: Schedule.of(2.0), "schedule is 2.0; expected r"),
        (lambda: Schedule.parse("cubic", 8), "schedule is 'cubic'; expected constant, decreasing"),
        (lambda: Schedule.parse("", None), "schedule is ''; expected constant"),
        (lambda: Schedule.parse("1,,2", None), "schedule is '1,,2'; expected constant"),
        (lambda: Schedule.parse("1.5,2", None), "schedule is '1.5,2'; expected constant"),
        (lambda: Schedule.parse("3,-1", None), "r is -1; expected 0 or more"),
        (lambda: Schedule.parse("3,2", 8), "drop --r 8 or the schedule"),
        (lambda: Schedule.of([1] * 13).resolve(12), "13 entries; the model has 12 layers"),
    ],
)
def test_what_is_not_a_schedule_is_refused(make, message):
    with pytest.raises(InputError, match=message) as error:
        make()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (16, "r=16 constant"),
        ((8, -1.0), "r=8 decreasing"),
        ((8, 1.0), "r=8 increasing"),
        ((8, 0.25), "r=8 inflect=0.25"),
        ([3, 0, 2], "3,0,2"),
    ],
)
def test_str(value, text):
    assert str(Schedule.of(value)) == text


def test_a_schedule_is_its_own_form():
    schedule = Schedule(r=3)
    assert Schedule.of(schedule) is schedule
