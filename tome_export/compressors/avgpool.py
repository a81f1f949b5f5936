"""Average pooling of the patch grid to a smaller one (adaptive, as torch's adaptive_avg_pool2d)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tome_export.compressors.base import Compressor, FinalTokens
from tome_export.errors import InputError
from tome_export.merge.lowering import accumulate_dtype
from tome_export.merge.plan import unmerge
from tome_export.spec import PatchGrid


@dataclass(frozen=True)
class AvgPool(Compressor):
    """Every cell of a grid is the mean over its patches; a merged token gives each of its own.

    Cell i of n over L rows is of rows ``floor(i L / n)`` to ``ceil((i + 1) L / n) - 1``, as torch's
    ``adaptive_avg_pool2d`` has it. Tokens are unmerged first (ToMe, section 3.2), so a cell is
    exactly the mean over its patches' features. The mean is of what the tower gives, behind a
    projector if that is fused, which is not the projection of the mean.

    Attributes:
        grid: Rows and columns of the cells.
    """

    grid: tuple[int, int]

    name = "avgpool"
    summary = "average the patch grid to a smaller grid"
    source = "DeCo: Decoupling Token Compression from Semantic Abstraction, arXiv 2405.20985"
    places_patches = True

    def cells(self) -> tuple[int, int]:
        """The grid."""
        return self.grid

    def module(self, width: int, grid: PatchGrid) -> nn.Module:  # noqa: ARG002
        """The pooling, which has no parameters."""
        rows, cols = self.grid
        if not (1 <= rows <= grid.rows and 1 <= cols <= grid.cols):
            raise InputError(
                f"avgpool grid is {rows}x{cols}; expected 1x1 to {grid.rows}x{grid.cols}, the grid "
                "of the model's patches"
            )
        return GridPool((grid.rows, grid.cols), self.grid)


class GridPool(nn.Module):
    """Adaptive average pooling of unmerged tokens, one product with a matrix for each side."""

    def __init__(self, patches: tuple[int, int], cells: tuple[int, int]) -> None:
        super().__init__()
        self.patches = patches
        self._rows, self._cols = map(averaging, patches, cells)

    def forward(self, final: FinalTokens) -> Tensor:
        """``[B, K, C] -> [B, rows * cols, C]``; sums are fp32."""
        x = final.x if final.places is None else unmerge(final.x, final.places)
        dtype = accumulate_dtype(x)
        # Constants and not buffers, which a model in half precision would round.
        rows = torch.tensor(self._rows, dtype=dtype, device=x.device)
        cols = torch.tensor(self._cols, dtype=dtype, device=x.device)
        height, width, channels = *self.patches, x.shape[-1]
        wide = rows @ x.to(dtype).reshape(-1, height, width * channels)
        wide = cols @ wide.reshape(-1, len(self._rows), width, channels)
        return wide.flatten(1, 2).to(x.dtype)


def averaging(length: int, count: int) -> list[list[float]]:
    """What each of ``count`` cells takes of ``length`` rows: ``[count][length]``."""
    matrix = []
    for cell in range(count):
        first, last = cell * length // count, -(-(cell + 1) * length // count)
        matrix.append([1 / (last - first) if first <= i < last else 0.0 for i in range(length)])
    return matrix
