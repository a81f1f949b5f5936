"""Average pooling to a grid: the mean over each cell's patches, and nothing else."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tome_export.compressors.avgpool import AvgPool
from tome_export.compressors.base import FinalTokens
from tome_export.errors import InputError
from tome_export.merge.plan import source_map
from tome_export.patch import patch
from tome_export.spec import PatchGrid


def pooled(features, grid, cells):
    """Cell by cell, patch by patch, in float64."""
    rows, cols = cells
    found = np.zeros((len(features), rows * cols, features.shape[-1]))
    for image, tokens in enumerate(features.astype(np.float64)):
        for row in range(rows):
            for col in range(cols):
                down = range(row * grid[0] // rows, -(-(row + 1) * grid[0] // rows))
                across = range(col * grid[1] // cols, -(-(col + 1) * grid[1] // cols))
                inside = [tokens[y * grid[1] + x] for y in down for x in across]
                found[image, row * cols + col] = sum(inside) / len(inside)
    return found


@pytest.mark.parametrize("grid", [(8, 8), (6, 10), (7, 5)])
@pytest.mark.parametrize("cells", [(1, 1), (2, 2), (3, 2), (4, 5), (5, 3)])
def test_every_cell_is_the_mean_of_its_patches(grid, cells):
    x = np.random.default_rng(0).standard_normal((2, grid[0] * grid[1], 6)).astype(np.float32)
    pool = AvgPool(cells).module(6, PatchGrid(*grid, 4, 4))
    found = pool(FinalTokens(torch.from_numpy(x), None, None, PatchGrid(*grid, 4, 4))).numpy()
    assert np.abs(found - pooled(x, grid, cells)).max() <= 1e-6
    shaped = torch.from_numpy(x).transpose(1, 2).reshape(2, 6, *grid)
    torchs = torch.nn.functional.adaptive_avg_pool2d(shaped, cells).flatten(2).transpose(1, 2)
    assert np.abs(found - torchs.numpy()).max() <= 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_merged_tokens_are_unmerged_first(make_vit, make_images, dtype):
    inner = make_vit(depth=3)
    dense = patch(inner, 9, dense=True, source_map=True).to(dtype)
    images = torch.from_numpy(make_images(dense, 2)).to(dtype)
    with torch.no_grad():
        features, mapping = dense(images)
        found, same = patch(inner, 9, dense=True, source_map=True, compressor=AvgPool((3, 5)))(
            images
        )
    assert torch.equal(mapping, same)
    assert found.dtype == dtype
    assert found.shape == (2, 15, features.shape[-1])
    expected = pooled(features.float().numpy(), (8, 8), (3, 5))
    bound = 1e-6 if dtype == torch.float32 else 1e-3
    assert np.abs(found.float().numpy() - expected).max() <= bound * np.abs(expected).max() + 1e-6


def test_equal_tokens_give_equal_cells():
    plans = [None]
    places = source_map(plans, 1, 16)
    x = torch.ones(1, 16, 3)
    grid = PatchGrid(4, 4, 1, 1)
    found = AvgPool((3, 3)).module(3, grid)(FinalTokens(x, None, places, grid))
    assert torch.allclose(found, torch.ones(1, 9, 3))


@pytest.mark.parametrize("cells", [(9, 8), (0, 3), (3, 9)])
def test_a_grid_that_is_not_smaller_is_refused(cells):
    with pytest.raises(InputError, match="expected 1x1 to 8x8, the grid of the model's patches"):
        AvgPool(cells).module(4, PatchGrid(8, 8, 4, 4))
