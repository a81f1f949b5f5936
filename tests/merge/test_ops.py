"""The custom operators under torch's own checks: schema, fake kernels, autograd, export."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tome_export.merge.lowering import merge_index_add
from tome_export.merge.ops import match, merge

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def tokens(batch: int, count: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, count, width, generator=torch.Generator().manual_seed(seed)).double()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", [None, 3])
@pytest.mark.parametrize("class_token", [False, True])
def test_match_passes_opcheck(dtype, class_token, heads):
    keys = tokens(2, 13, 8) if heads is None else tokens(2 * heads, 13, 8).view(2, heads, 13, 8)
    torch.library.opcheck(torch.ops.tome_export.match.default, (keys.to(dtype), 4, 2, class_token))


# opcheck itself reads .grad of its own copies, which are not leaves.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_merge_passes_opcheck(dtype):
    plan = match(tokens(2, 13, 8), 4, 1, True)
    x = tokens(2, 13, 5, seed=1).to(dtype).requires_grad_()
    torch.library.opcheck(torch.ops.tome_export.merge.default, (x, torch.ones(2, 13), *plan))


def test_gradient_of_merge():
    plan = match(tokens(2, 12, 8), 4, 0, False)
    size = torch.arange(1.0, 25.0).reshape(2, 12)
    x = tokens(2, 12, 3, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda value: merge(value, size, plan)[0], (x,))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_gradient_in_half_precision_is_that_of_fp32(dtype):
    plan = match(tokens(2, 12, 8), 4, 1, True)
    size = torch.arange(1.0, 25.0).reshape(2, 12)
    gradients = []
    for kind in (dtype, torch.float32):
        x = tokens(2, 12, 3, seed=1).to(dtype).to(kind).requires_grad_()
        merge(x, size, plan)[0].float().pow(2).sum().backward()
        assert x.grad is not None
        assert x.grad.dtype == kind
        gradients.append(x.grad.float())
    scale = gradients[1].abs().max()
    assert (gradients[0] - gradients[1]).abs().max() <= 8 * torch.finfo(dtype).eps * scale


def test_match_lets_no_gradient_through_and_leaves_its_input():
    metric = tokens(1, 9, 4).requires_grad_()
    before = metric.detach().clone()
    match(metric, 2, 1, True)
    assert torch.equal(metric.detach(), before)
    assert metric.grad_fn is None


class Layer(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        plan = match(x, 3, 1, True)
        merged, size = merge(x, torch.ones_like(x[..., 0]), plan)
        return merged * size[..., None]


def test_export_keeps_each_step_one_node_for_any_batch():
    batch = torch.export.Dim("batch", min=1, max=16)
    example = tokens(2, 12, 8).float()
    program = torch.export.export(Layer(), (example,), dynamic_shapes=({0: batch},))
    names = [str(n.target) for n in program.graph.nodes if n.op == "call_function"]
    assert names.count("tome_export.match.default") == 1
    assert names.count("tome_export.merge.default") == 1
    assert not any("scatter" in name or "sort" in name for name in names)
    for size in (1, 5):
        x = tokens(size, 12, 8, seed=size).float()
        assert torch.equal(program.module()(x), Layer()(x))


def test_op_is_the_index_add_lowering():
    plan = match(tokens(2, 12, 8), 4, 1, True)
    x, size = tokens(2, 12, 3, seed=1), torch.full((2, 12), 2.0)
    for ours, lowering in zip(merge(x, size, plan), merge_index_add(x, size, plan), strict=True):
        assert torch.equal(ours, lowering)
