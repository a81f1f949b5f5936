"""Making torchvision's ViTs and loading their weights."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from tome_export.errors import InputError
from tome_export.models.hub import check_url, loading_failed
from tome_export.models.positions import Grid, fit_positions, resampling
from tome_export.models.recipe import LoadedModel, Loader, Recipe, filled
from tome_export.spec import ImageSize
from tome_export.weights.files import Checkpoint

if TYPE_CHECKING:
    from torch import Tensor, nn

    State = dict[str, Tensor]

_LEGACY = {".mlp.linear_1.": ".mlp.0.", ".mlp.linear_2.": ".mlp.3."}
"""Names of before torchvision 0.14, which its published files still have."""


@dataclass(frozen=True)
class TorchvisionLoader(Loader):
    """Makes torchvision's ViTs.

    Attributes:
        arch: Torchvision's name, such as ``vit_b_16``.
        weights: Torchvision's name of the weights, such as ``IMAGENET1K_V1``.
        image_size: Height and width of the images; None for the weights' own.
    """

    arch: str
    weights: str
    image_size: tuple[int, int] | None = None

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
        height, width = self.image_size or (like.image_size,) * 2
        made: Any = VisionTransformer(
            image_size=height,
            patch_size=like.patch_size,
            num_layers=depth or len(like.encoder.layers),
            num_heads=like.encoder.layers[0].num_heads,
            hidden_dim=like.hidden_dim,
            mlp_dim=like.mlp_dim,
            num_classes=classes,
        )
        if height != width:
            # Its classes take squares only, and look at this where they say so.
            made.image_size = (height, width)
            rows = _grid(made)[0] * _grid(made)[1] + 1
            positions = torch.empty(1, rows, like.hidden_dim).normal_(std=0.02)
            made.encoder.pos_embedding = torch.nn.Parameter(positions)
        return cast("nn.Module", made)

    def at(self, image_size: ImageSize) -> TorchvisionLoader:
        """See ``Loader``."""
        return replace(self, image_size=(image_size.height, image_size.width))

    @property
    def own(self) -> TorchvisionLoader:
        """See ``Loader``."""
        return self if self.image_size is None else replace(self, image_size=None)

    def fitted(self, state: State, module: Any) -> tuple[State, Grid | None]:
        """See ``Loader``: as its ``interpolate_embeddings``, for what is not square too."""
        if self.image_size is None:
            return state, None
        own, wanted = _grid(self.own.architecture()), _grid(module)
        key, rows = "encoder.pos_embedding", module.encoder.pos_embedding.shape[1]
        how = {"antialias": False, "align_corners": True}
        return fit_positions(state, key, rows, own, wanted, **how)

    def from_file(self, recipe: Recipe, checkpoint: Checkpoint, depth: int | None) -> LoadedModel:
        """See ``Loader``."""
        state = checkpoint.state
        for old, new in _LEGACY.items():
            state = {key.replace(old, new): value for key, value in state.items()}
        head = state.get("heads.head.weight")
        classes = int(head.shape[0]) if head is not None and head.ndim == 2 else 1000
        module = self.create(depth, classes)
        state, before = self.fitted(state, module)
        remark = resampling(before, _grid(module))
        return filled(recipe, module, state, checkpoint, remark=remark, resampled_from=before)

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


def _grid(module: Any) -> Grid:
    size, patch = module.image_size, module.patch_size
    height, width = size if isinstance(size, tuple) else (size, size)
    return height // patch, width // patch
