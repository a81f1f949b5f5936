"""Sizes of CLIP's image towers."""

from __future__ import annotations

from dataclasses import dataclass

HEAD_WIDTH = 64
"""Width of one attention head in every CLIP ViT; its public code counts the heads by it."""


@dataclass(frozen=True)
class ClipSizes:
    """Sizes of a CLIP image tower.

    Attributes:
        width: Of a token.
        depth: Number of blocks.
        patch: Side of a patch in pixels.
        image: Side of a frame in pixels.
        features: Width of the output.
    """

    width: int = 768
    depth: int = 12
    patch: int = 32
    image: int = 224
    features: int = 512

    @property
    def side(self) -> int:
        """Patches along one side of a frame."""
        return self.image // self.patch

    @property
    def tokens(self) -> int:
        """Tokens of one frame: its patches and the class token."""
        return self.side**2 + 1

    @property
    def heads(self) -> int:
        """Attention heads of a block."""
        return max(1, self.width // HEAD_WIDTH)
