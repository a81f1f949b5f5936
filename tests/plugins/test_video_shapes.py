"""Match and merge at TempMe's shapes: many protected tokens, hidden states as the metric."""

from __future__ import annotations

import pytest
import torch
from video_reference import Clip, average, soft_matching
from video_towers import groups

from tome_export.merge.ops import match, merge
from tome_export.video.options import FrameMerging, video_token_counts

LAYERS = video_token_counts([2] * 12, FrameMerging(), 12, 50, 1)
CASES = {
    f"{index}_{'across' if across else 'inside'}": (
        layer.tokens_in * layer.joined if across else layer.attended,
        layer.cross if across else layer.r,
        12 // layer.sequences,
    )
    for index, layer in enumerate(LAYERS)
    for across in (True, False)
    if index > 6 and (layer.cross if across else layer.r)
}
CASES |= {"stop": (3 * 41, 20, 15), "all_protected_but_four": (20, 2, 16)}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("width", [32, 130], ids=["keys", "hidden_states"])
def test_operator_and_kernel_give_the_oracles_groups(interpreter, case, width):
    tokens, r, prefix = CASES[case]
    generator = torch.Generator().manual_seed(tokens)
    metric = torch.randn(2, tokens, width, generator=generator)
    expected = [soft_matching(one.double(), r, prefix) for one in metric]
    kernel = interpreter("match", metric, r, prefix, True)
    for plan in (match(metric, r, prefix, True), kernel):
        assert [groups(plan, row) for row in range(2)] == expected
    size = torch.randint(1, 9, (2, tokens), generator=generator).float()
    size[:, :prefix] = 1
    x, merged = merge(metric, size, match(metric, r, prefix, True))
    for row in range(2):
        clip = average(Clip(metric[row].double(), size[row].double(), prefix), expected[row])
        assert torch.allclose(x[row].double(), clip.x, atol=1e-5)
        assert torch.equal(merged[row].double(), clip.size)
    assert torch.equal(x[:, :prefix], metric[:, :prefix])
