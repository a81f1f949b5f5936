"""What a compressor is: it turns the tokens that are left into as many as it is told to."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn

from tome_export.errors import InputError
from tome_export.spec import PatchGrid


class FinalTokens(NamedTuple):
    """The tokens at the end of a tower, as a compressor sees them: prefix tokens left out.

    Attributes:
        x: ``[B, K, C]`` features, projected if the tower projects.
        size: ``[B, K]`` float32, patches that each token stands for; None where nothing merged.
        places: ``[B, N]`` int64, the token of each patch; None where nothing merged, or where the
            compressor does not place patches.
        grid: Where the patches lie.
    """

    x: Tensor
    size: Tensor | None
    places: Tensor | None
    grid: PatchGrid


@dataclass(frozen=True)
class Compressor(ABC):
    """One way to a fixed number of tokens. Its fields are its options.

    Attributes:
        name: On the command line.
        summary: One line for help and tables.
        source: Where the method is published.
        places_patches: Whether it needs the place of every patch; reducers that drop tokens have
            none for some.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    source: ClassVar[str]
    places_patches: ClassVar[bool] = False

    @abstractmethod
    def cells(self) -> tuple[int, int] | None:
        """Rows and columns that its tokens are of, row by row; None if they lie on no grid."""

    @abstractmethod
    def module(self, width: int, grid: PatchGrid) -> nn.Module:
        """What computes it: ``forward(final: FinalTokens) -> [B, tokens, C]``.

        Args:
            width: C of the features.
            grid: Where the patches lie.

        Raises:
            InputError: if the options do not fit, or weights are missing or do not.
        """

    def record(self) -> dict[str, Any]:
        """Name and options, as a manifest records them."""
        return {"name": self.name, "options": asdict(self)}


def check_compressor(
    compressor: Compressor, grid: PatchGrid | None, *, gives_tokens: bool, classifies: bool
) -> PatchGrid:
    """Refuse models whose output a compressor has nothing to do with.

    Args:
        compressor: The compressor.
        grid: Where the model's patches lie; None where they lie on no grid.
        gives_tokens: Whether the output is one feature vector per token.
        classifies: Whether the model's own output is one score per class.

    Returns:
        The grid.

    Raises:
        InputError: if the model gives classes or one vector per image, or has no patch grid.
    """
    if not gives_tokens:
        gives = "classes" if classifies else "one vector per image"
        raise InputError(
            f"compressor {compressor.name} makes tokens for a language model, and this model gives "
            f"{gives}; use --dense for the features of its patches, or a LLaVA tower"
        )
    if grid is None:
        raise InputError(
            f"compressor {compressor.name} needs the grid of patches, and this model's tokens are "
            "not a grid over the image; leave out --compress"
        )
    return grid
