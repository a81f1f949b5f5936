"""Disagreements between hand-made plans: each found, of the right kind, with the right margin."""

from __future__ import annotations

import numpy as np
import pytest

from tome_export.artifact.parity import Disagreement
from tome_export.merge import reference
from tome_export.parity.decisions import Plan, cosine_scores, disagreements

# 10 tokens, one class token: set A is 0 (protected), 2, 4, 6, 8; set B is 1, 3, 5, 7, 9.
# Row maxima: token 2 0.9 (to 3), token 4 0.8 (to 5), token 6 0.7 (to 1), token 8 0.6 (to 9).
SCORES = np.full((5, 5), 0.1)
SCORES[0] = -np.inf
SCORES[1, 1], SCORES[1, 0] = 0.9, 0.88
SCORES[2, 2], SCORES[3, 0], SCORES[4, 4] = 0.8, 0.7, 0.6


def plan(stay, pairs, prefix=1):
    """From the even tokens that stay, in order, and (token, into) pairs."""
    odd = [token for token in range(1, 10, 2) if token >= prefix]
    keep = [*range(prefix), *stay, *odd]
    return Plan(
        np.array(keep), np.array([a for a, _ in pairs]), np.array([keep.index(b) for _, b in pairs])
    )


REFERENCE = plan([6, 8], [(2, 3), (4, 5)])


def compare(candidate, *, class_token=True, expected=REFERENCE):
    return disagreements(expected, candidate, SCORES, 1, class_token, image=7)


def same(found, wanted):
    assert [(d.token, d.kind) for d in found] == [(t, k) for t, k, _ in wanted]
    assert [d.margin for d in found] == pytest.approx([m for _, _, m in wanted])
    assert all(d.image == 7 for d in found)


def test_equal_plans_agree():
    same(compare(REFERENCE), [])
    # The order in which pairs are listed decides nothing.
    same(compare(plan([6, 8], [(4, 5), (2, 3)])), [])


def test_another_selection_names_both_tokens_and_their_distance_to_the_cut():
    same(
        compare(plan([4, 8], [(2, 3), (6, 1)])),
        [(4, "selection", 0.8 - 0.7), (6, "selection", 0.8 - 0.7)],
    )


def test_far_selections_have_large_margins():
    same(
        compare(plan([2, 4], [(6, 1), (8, 9)])),
        [
            (2, "selection", 0.9 - 0.7),
            (4, "selection", 0.8 - 0.7),
            (6, "selection", 0.8 - 0.7),
            (8, "selection", 0.8 - 0.6),
        ],
    )


def test_another_destination():
    same(compare(plan([6, 8], [(2, 1), (4, 5)])), [(2, "destination", 0.9 - 0.88)])
    same(compare(plan([6, 8], [(2, 9), (4, 5)])), [(2, "destination", 0.9 - 0.1)])


def test_order_counts_only_without_a_class_token():
    by_rank = plan([6, 8], [(2, 3), (4, 5)])
    swapped = plan([8, 6], [(2, 3), (4, 5)])
    same(compare(swapped, class_token=False, expected=by_rank), [(8, "order", 0.7 - 0.6)])
    same(compare(by_rank, class_token=False, expected=by_rank), [])


def unsound():
    shifted_prefix = plan([6, 8], [(2, 3), (4, 5)])
    shifted_prefix.keep[[0, 1]] = shifted_prefix.keep[[1, 0]]
    twice = plan([6, 8], [(2, 3), (4, 5)])
    twice.src[1] = 2
    into_even = plan([6, 8], [(2, 3), (4, 5)])
    into_even.dst[0] = 1
    into_class = plan([6, 8], [(2, 3), (4, 5)])
    into_class.dst[0] = 0
    outside = plan([6, 8], [(2, 3), (4, 5)])
    outside.dst[0] = 8
    odd_order = plan([6, 8], [(2, 3), (4, 5)])
    odd_order.keep[-2:] = odd_order.keep[[-1, -2]]
    return {
        "prefix moved": shifted_prefix,
        "token lost": twice,
        "into set A": into_even,
        "into the class token": into_class,
        "dst out of range": outside,
        "set B out of order": odd_order,
        "unsorted with class token": plan([8, 6], [(2, 3), (4, 5)]),
        "class token merged": Plan(
            np.array([6, 8, 2, 1, 3, 5, 7, 9]), np.array([0, 4]), np.array([3, 5])
        ),
    }


@pytest.mark.parametrize("case", unsound())
def test_what_no_rounding_can_do_is_structure(case):
    assert compare(unsound()[case]) == [
        Disagreement(image=7, token=-1, kind="structure", margin=np.inf)
    ]


@pytest.mark.parametrize("prefix", [0, 1, 2, 5])
@pytest.mark.parametrize("tokens", [10, 11])
def test_scores_are_the_references(prefix, tokens):
    metric = np.random.default_rng(prefix).standard_normal((tokens, 6)).astype(np.float32)
    scores = cosine_scores(metric, prefix)
    expected = reference.cosine_scores(metric.astype(float).tolist(), prefix)
    assert {
        (2 * a, 2 * b + 1)
        for a, b in zip(*(i.tolist() for i in np.nonzero(np.isfinite(scores))), strict=True)
    } == set(expected)
    for (a, b), score in expected.items():
        assert scores[a // 2, b // 2] == pytest.approx(score, abs=1e-14)


def test_targets():
    assert REFERENCE.targets == {2: 3, 4: 5}
