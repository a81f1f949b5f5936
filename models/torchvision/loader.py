"""Making torchvision's ViTs and loading their weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tome_export.errors import InputError
from tome_export.models.hub import check_url, loading_failed
from tome_export.models.recipe import LoadedModel, Loader, Recipe, filled
from tome_export.weights.files import Checkpoint

if TYPE_CHECKING:
    from torch import nn

_LEGACY = {".mlp.linear_1.": ".mlp.0.", ".mlp.linear_2.": ".mlp.3."}
"""Names of before torchvision 0.14, which its published files still have."""


@dataclass(frozen=True)
class TorchvisionLoader(Loader):
    """Makes torchvision's ViTs.

    Attributes:
        arch: Torchvision's name, such as ``vit_b_16``.
        weights: Torchvision's name of the weights, such as ``IMAGENET1K_V1``.
    """

    arch: str
    weights: str

    @property
    def entry(self) -> Any:
        """Torchvision's entry of the weights; raises an ``InputError`` if there is none."""
        from torchvision.models import get_model_weights

        known: Any = get_model_weights(self.arch)
        if self.weights not in known.__members__:
            raise InputError(
                f"torchvision has no weights {self.weights!r} of {self.arch}; it has "
                f"{', '.join(entry.name for entry in known)}"
            )
        return known[self.weights]

    def create(self, depth: int | None = None, classes: int = 1000) -> nn.Module:
        """See ``Loader``."""
        import torch
        from torchvision.models import get_model
        from torchvision.models.vision_transformer import VisionTransformer

        with torch.device("meta"):
            like: Any = get_model(self.arch, image_size=int(self.entry.meta["min_size"][0]))
        made: nn.Module = VisionTransformer(
            image_size=like.image_size,
            patch_size=like.patch_size,
            num_layers=depth or len(like.encoder.layers),
            num_heads=like.encoder.layers[0].num_heads,
            hidden_dim=like.hidden_dim,
            mlp_dim=like.mlp_dim,
            num_classes=classes,
        )
        return made

    def from_file(self, recipe: Recipe, checkpoint: Checkpoint, depth: int | None) -> LoadedModel:
        """See ``Loader``."""
        state = checkpoint.state
        for old, new in _LEGACY.items():
            state = {key.replace(old, new): value for key, value in state.items()}
        head = state.get("heads.head.weight")
        classes = int(head.shape[0]) if head is not None and head.ndim == 2 else 1000
        return filled(recipe, self.create(depth, classes), state, checkpoint)

    def download(self, recipe: Recipe) -> Path:
        """See ``Loader``."""
        import torch

        url = str(self.entry.url)
        path = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
        if not path.is_file():
            check_url(recipe, url)
            try:
                self.entry.get_state_dict(progress=False, check_hash=True)
            # What happens to a download half-way, or a file of another hash.
            except (OSError, RuntimeError) as error:
                raise loading_failed(recipe, error, "a downloaded .pth file") from None
        return path
