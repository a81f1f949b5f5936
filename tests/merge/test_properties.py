"""What always holds, whatever the tokens: hypothesis looks for the exception."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tome_export.merge.lowering import merge_index_add, merge_matmul
from tome_export.merge.ops import match, merge
from tome_export.merge.plan import token_map, unmerge
from tome_export.merge.spec import clamp_r

QUICK = settings(max_examples=60, deadline=None, derandomize=True)


@st.composite
def cases(draw):
    """Tokens, sizes, and what to merge.

    Either all tokens differ, or many are duplicates and hold +-1, 16 wide: then every score is
    exact, and a tie is a tie whatever the matrix product's order of summation.
    """
    tokens = draw(st.integers(2, 26))
    prefix = draw(st.integers(0, 5))
    r = clamp_r(tokens, draw(st.integers(1, 20)), prefix)
    assume(r > 0)
    batch = draw(st.integers(1, 3))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    if draw(st.booleans()):
        pool = rng.choice([-1.0, 1.0], (draw(st.integers(1, tokens)), 16))
        metric = torch.from_numpy(pool[rng.integers(0, len(pool), (batch, tokens))])
    else:
        metric = torch.from_numpy(rng.standard_normal((batch, tokens, 6)))
    x = torch.from_numpy(rng.standard_normal((batch, tokens, 4)))
    size = torch.from_numpy(rng.integers(1, 50, (batch, tokens))).float()
    return metric.to(draw(st.sampled_from([torch.float32, torch.float64]))), x, size, r, prefix


@QUICK
@given(cases(), st.booleans())
def test_plan_names_every_token_once_and_protects_the_prefix(case, class_token):
    metric, _, _, r, prefix = case
    batch, tokens, _ = metric.shape
    plan = match(metric, r, prefix, class_token)
    assert plan.keep.shape == (batch, tokens - r)
    assert plan.src.shape == plan.dst.shape == (batch, r)
    for keep, src, dst in zip(
        plan.keep.tolist(), plan.src.tolist(), plan.dst.tolist(), strict=True
    ):
        assert sorted(keep + src) == list(range(tokens))
        assert keep[:prefix] == list(range(prefix))
        assert all(token % 2 == 0 and token >= prefix for token in src)
        assert all(keep[place] % 2 == 1 and keep[place] >= prefix for place in dst)
        body = keep[prefix:]
        stay, odd = [t for t in body if t % 2 == 0], [t for t in body if t % 2]
        assert body == stay + odd == stay + sorted(odd)
        assert not class_token or stay == sorted(stay)


@QUICK
@given(cases(), st.booleans(), st.data())
def test_plan_is_well_formed_whatever_the_keys_hold(case, class_token, data):
    metric, _, _, r, prefix = case
    batch, tokens, _ = metric.shape
    keys = metric[:, None].repeat(1, 2, 1, 1)
    for bad in data.draw(st.lists(st.sampled_from([torch.nan, torch.inf, -torch.inf, 3e38]))):
        place = data.draw(st.integers(0, keys.numel() - 1))
        keys.view(-1)[place] = bad
    plan = match(keys, r, prefix, class_token)
    for keep, src, dst in zip(
        plan.keep.tolist(), plan.src.tolist(), plan.dst.tolist(), strict=True
    ):
        assert sorted(keep + src) == list(range(tokens))
        assert keep[:prefix] == list(range(prefix))
        assert all(token % 2 == 0 and token >= prefix for token in src)
        assert all(keep[place] % 2 == 1 and keep[place] >= prefix for place in dst)
    assert plan.keep.shape == (batch, tokens - r)


@QUICK
@given(cases())
def test_total_size_and_total_content_are_preserved(case):
    metric, x, size, r, prefix = case
    plan = match(metric, r, prefix, True)
    for lowering in (merge, merge_index_add, merge_matmul):
        merged, sizes = lowering(x, size, plan)
        assert torch.equal(sizes.sum(1), size.sum(1))
        assert torch.equal(sizes[:, :prefix], size[:, :prefix])
        before = (x * size[..., None]).sum(1)
        torch.testing.assert_close((merged * sizes[..., None]).sum(1), before)


@QUICK
@given(cases())
def test_equal_tokens_keep_their_value(case):
    metric, x, size, r, prefix = case
    same = x[:, :1].expand_as(x)
    merged, _ = merge(same, size, match(metric, r, prefix, False))
    torch.testing.assert_close(merged, same[:, : merged.shape[1]])


@QUICK
@given(cases(), st.booleans())
def test_images_of_a_batch_do_not_touch_each_other(case, class_token):
    metric, x, size, r, prefix = case
    plan = match(metric, r, prefix, class_token)
    merged, sizes = merge(x, size, plan)
    for image in range(len(metric)):
        alone = slice(image, image + 1)
        single = match(metric[alone].clone(), r, prefix, class_token)
        value, total = merge(
            x[alone],
            size[alone],
            plan._replace(**{name: part[alone] for name, part in plan._asdict().items()}),
        )
        assert torch.equal(value, merged[alone])
        assert torch.equal(total, sizes[alone])
        for ours, batched in zip(single, plan, strict=True):
            assert torch.equal(ours, batched[alone])


@QUICK
@given(cases())
def test_unmerge_after_merge_is_constant_on_groups_and_keeps_means(case):
    metric, x, size, r, prefix = case
    plan = match(metric, r, prefix, True)
    merged, _ = merge(x, size, plan)
    groups = token_map(plan)
    spread = unmerge(merged, groups)
    assert spread.shape == x.shape
    for image in range(len(x)):
        for group in groups[image].unique():
            rows = spread[image, groups[image] == group]
            assert (rows == rows[0]).all()
        lone = plan.keep[image].long()[:prefix]
        torch.testing.assert_close(spread[image, lone], x[image, lone])
    # Merging the spread tokens again changes nothing.
    torch.testing.assert_close(merge(spread, size, plan)[0], merged)


@QUICK
@given(cases())
def test_the_r_best_pairs_merge(case):
    metric, _, _, r, prefix = case
    plan = match(metric.double(), r, prefix, True)
    unit = torch.nn.functional.normalize(metric.double(), dim=-1)
    scores = unit @ unit.transpose(1, 2)
    for image in range(len(metric)):
        src = plan.src[image].tolist()
        target = plan.keep[image][plan.dst[image].long()].tolist()
        tokens = range(prefix, metric.shape[1])
        best = {
            a: scores[image, a, [b for b in tokens if b % 2]].max() for a in tokens if a % 2 == 0
        }
        for a, b in zip(src, target, strict=True):
            assert scores[image, a, b] >= best[a] - 1e-12
        worst = min(best[a] for a in src)
        assert all(best[a] <= worst + 1e-12 for a in best if a not in src)
