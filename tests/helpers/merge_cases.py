"""What a merge is tested on and held to, whatever runs it."""

from __future__ import annotations

import numpy as np
import torch

from tome_export.merge import reference
from tome_export.merge.lowering import merge_index_add
from tome_export.merge.plan import MergePlan

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

ULPS = 2
"""Units in the last place of the largest value, allowed beside twice the eager error."""


def normal(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape)).float()


def sizes(batch, tokens, seed=0):
    """Whole numbers of patches, as earlier layers leave them."""
    rng = np.random.default_rng([seed, 1])
    return torch.from_numpy(rng.integers(1, 40, (batch, tokens))).float()


def random_plan(batch, tokens, r, seed=0):
    """Any plan of the invariant, not only one that matching can make: int32 on the CPU."""
    rng = np.random.default_rng([seed, tokens, r])
    order = np.stack([rng.permutation(tokens) for _ in range(batch)])
    dst = rng.integers(0, max(1, tokens - r), (batch, r))
    return tuple(
        torch.from_numpy(part.astype(np.int32)) for part in (order[:, r:], order[:, :r], dst)
    )


def exact(x, size, plan):
    """The reference's ``x' [B, K, C]`` and ``size' [B, K]`` in float64."""
    rows, totals = [], []
    for image in range(len(x)):
        own = reference.ReferencePlan(*(part[image].tolist() for part in plan))
        row, total = reference.merge(x[image].double().tolist(), size[image].tolist(), own)
        rows.append(row)
        totals.append(total)
    return torch.tensor(rows, dtype=torch.float64), torch.tensor(totals, dtype=torch.float64)


def assert_as_good_as_eager(result, x, size, plan):
    """Error against the exact result at most twice that of PyTorch in the same dtype."""
    merged, total = (part.cpu() for part in result)
    assert merged.dtype == x.dtype
    assert total.dtype == torch.float32
    expected, expected_total = exact(x, size, plan)
    assert torch.equal(total.double(), expected_total)
    eager = merge_index_add(x, size, MergePlan(*plan))[0].double()
    allowed = 2 * (eager - expected).abs().max()
    allowed += ULPS * torch.finfo(x.dtype).eps * expected.abs().max()
    assert (merged.double() - expected).abs().max() <= allowed
