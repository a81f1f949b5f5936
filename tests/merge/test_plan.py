"""Composing plans: source map and unmerge."""

from __future__ import annotations

import torch

from tome_export.merge.ops import match, merge
from tome_export.merge.plan import MergePlan, source_map, token_map, unmerge


def plan(keep, src, dst) -> MergePlan:
    return MergePlan(*(torch.tensor([part], dtype=torch.int32) for part in (keep, src, dst)))


def test_token_map_by_hand():
    # Tokens 2 and 4 of 6 fold into token 3, which stands at output position 2.
    by_hand = plan([0, 1, 3, 5], [4, 2], [2, 2])
    assert token_map(by_hand).tolist() == [[0, 1, 2, 2, 2, 3]]
    assert token_map(by_hand).dtype == torch.int64


def test_source_map_follows_tokens_through_all_layers():
    first = plan([0, 1, 3, 5], [4, 2], [2, 2])
    second = plan([0, 1, 3], [2], [1])
    # Position 2 of the first layer's output (tokens 2, 3, 4) joins token 1.
    assert source_map([first, None, second], 1, 6).tolist() == [[0, 1, 1, 1, 1, 2]]
    assert source_map([None, None], 2, 3).tolist() == [[0, 1, 2], [0, 1, 2]]


def test_source_map_of_random_layers_says_where_content_went():
    generator = torch.Generator().manual_seed(0)
    tokens, plans = 33, []
    x = torch.eye(tokens, dtype=torch.float64).expand(2, tokens, tokens)
    size = torch.ones(2, tokens)
    for r in (7, 0, 5, 4):
        if r == 0:
            plans.append(None)
            continue
        metric = torch.randn(2, x.shape[1], 8, generator=generator)
        plans.append(match(metric, r, 1, True))
        x, size = merge(x, size, plans[-1])
    mapping = source_map(plans, 2, tokens)
    # Merged rows of the identity hold 1/size at the tokens that went into them.
    membership = torch.nn.functional.one_hot(mapping, x.shape[1]).transpose(1, 2)
    assert torch.equal((x > 0).long(), membership)
    assert torch.equal(membership.sum(2).float(), size)
    torch.testing.assert_close(x * size[..., None], membership.double())


def test_unmerge_gives_every_token_its_groups_value():
    by_hand = plan([0, 1, 3, 5], [4, 2], [2, 2])
    merged = torch.tensor([[[10.0], [11.0], [12.0], [13.0]]])
    out = unmerge(merged, token_map(by_hand))
    assert out[0, :, 0].tolist() == [10.0, 11.0, 12.0, 12.0, 12.0, 13.0]
