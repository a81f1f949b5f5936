"""Torchvision's ViTs: recipes for ``torchvision:<name>[.<weights>]``, and making the models."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from tome_export.errors import InputError
from tome_export.models.hub import ask, ask_url
from tome_export.models.loading import FileLoader, filled
from tome_export.models.recipe import (
    IMAGENET_NORM,
    RULE,
    Geometry,
    LoadedModel,
    Recipe,
    recommended_r,
)
from tome_export.spec import Interpolation, Preprocessing
from tome_export.weights.files import Checkpoint, first_line

if TYPE_CHECKING:
    from torch import Tensor, nn

SWAG_LICENCE, UNSTATED = "cc-by-nc-4.0", "not stated by torchvision"
_LEGACY = {".mlp.linear_1.": ".mlp.0.", ".mlp.linear_2.": ".mlp.3."}
"""Names of before torchvision 0.14, which its published files still have."""


@dataclass(frozen=True)
class TorchvisionLoader(FileLoader):
    """Makes torchvision's ViTs.

    Attributes:
        arch: Torchvision's name, such as ``vit_b_16``.
        weights: Of its weights, such as ``IMAGENET1K_V1``.
    """

    arch: str
    weights: str

    def create(self, depth: int | None = None, classes: int = 1000) -> nn.Module:
        """See ``FileLoader``."""
        import torch
        from torchvision.models import get_model, get_weight
        from torchvision.models.vision_transformer import VisionTransformer

        entry: Any = get_weight(weights_enum(self.arch, self.weights))
        with torch.device("meta"):
            like: Any = get_model(self.arch, image_size=int(entry.meta["min_size"][0]))
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
        """See ``FileLoader``."""
        state = _current(checkpoint.state)
        head = state.get("heads.head.weight")
        classes = int(head.shape[0]) if head is not None and head.ndim == 2 else 1000
        module = self.create(depth, classes)
        return filled(recipe, module, state, checkpoint)

    def download(self, recipe: Recipe) -> Path:
        """See ``FileLoader``."""
        import torch
        from torchvision.models import get_weight

        entry: Any = get_weight(weights_enum(self.arch, self.weights))
        path = Path(torch.hub.get_dir()) / "checkpoints" / str(entry.url).rpartition("/")[2]
        if not path.is_file():
            ask(recipe, str(entry.url), lambda: ask_url(str(entry.url)))
            try:
                entry.get_state_dict(progress=False, check_hash=True)
            # What happens to a download half-way, or a file of another hash.
            except (OSError, RuntimeError) as error:
                raise InputError(
                    f"pretrained weights of {recipe.name} could not be loaded "
                    f"({first_line(error)}); give a downloaded .pth file with --weights PATH, or "
                    "try the toolchain with --weights random"
                ) from None
        return path


def _current(state: dict[str, Tensor]) -> dict[str, Tensor]:
    def renamed(key: str) -> str:
        for old, new in _LEGACY.items():
            key = key.replace(old, new)
        return key

    return {renamed(key): value for key, value in state.items()}


def weights_enum(arch: str, weights: str) -> str:
    """Torchvision's full name of weights, such as ``ViT_B_16_Weights.IMAGENET1K_V1``.

    Raises:
        InputError: if there are none of that name.
    """
    from torchvision.models import get_model_weights

    known: Any = get_model_weights(arch)
    if weights not in known.__members__:
        raise InputError(
            f"torchvision has no weights {weights!r} of {arch}; it has "
            f"{', '.join(entry.name for entry in known)}"
        )
    return f"{known.__name__}.{known[weights].name}"


def recipe_from_torchvision(name: str) -> Recipe:
    """A recipe for ``torchvision:<name>``, its facts from torchvision's table of weights.

    The name may carry the name of weights (``vit_b_16.IMAGENET1K_SWAG_E2E_V1``); without, those
    that torchvision calls its default.

    Raises:
        InputError: if torchvision has no such ViT or weights.
    """
    import torch
    from torchvision.models import get_weight, list_models

    arch, _, tag = name.partition(".")
    known = [model for model in list_models() if model.startswith("vit_")]
    if arch not in known:
        close = difflib.get_close_matches(arch, known, n=3)
        hint = f"did you mean torchvision:{close[0]}?" if close else f"it has {', '.join(known)}"
        raise InputError(f"torchvision has no ViT {arch!r}; {hint}")
    entry: Any = get_weight(weights_enum(arch, tag or "DEFAULT"))
    loader = TorchvisionLoader(arch, str(entry.name))
    with torch.device("meta"):
        model: Any = loader.create()
    tokens, depth = int(model.seq_length), len(model.encoder.layers)
    return Recipe(
        name=f"torchvision:{arch}.{entry.name}",
        family="torchvision_vit",
        preprocessing=preprocessing_of(entry.transforms()),
        recommended_r=recommended_r(tokens, depth),
        r_source=RULE,
        description=f"torchvision's {arch}",
        weights_source=str(entry.url),
        licence=licence_of(entry.meta),
        labels=tuple(entry.meta["categories"]),
        loader=loader,
    )


def licence_of(meta: dict[str, Any]) -> str:
    """Licence of weights by torchvision's table, which gives the address of SWAG's and no other."""
    found = str(meta.get("license") or "")
    return SWAG_LICENCE if "/SWAG/" in found else found or UNSTATED


def preprocessing_of(transforms: Any) -> Preprocessing:
    """Preprocessing from torchvision's ``ImageClassification`` transforms."""
    side, resized = int(transforms.crop_size[0]), int(transforms.resize_size[0])
    return Preprocessing(
        input_size=(3, side, side),
        mean=tuple(transforms.mean),
        std=tuple(transforms.std),
        crop_pct=side / resized,
        interpolation=cast(Interpolation, transforms.interpolation.value),
    )


_WIDTH_DEPTH = {"b": (768, 12), "l": (1024, 24), "h": (1280, 32)}


def _named(
    name: str,
    arch: str,
    tag: str,
    file: str,
    *,
    size: int = 224,
    resize: int | None = None,
    swag_r: int | None = None,
) -> Recipe:
    _, letter, pixels = arch.split("_")
    width, depth = _WIDTH_DEPTH[letter]
    patch, resize = int(pixels), resize or size
    tokens = (size // patch) ** 2 + 1
    swag = swag_r is not None
    what = "SWAG, fine-tuned on ImageNet-1k" if swag else "torchvision's weights, ImageNet-1k"
    return Recipe(
        name=name,
        family="torchvision_vit",
        preprocessing=Preprocessing(
            (3, size, size), *IMAGENET_NORM, size / resize, "bicubic" if swag else "bilinear"
        ),
        recommended_r=swag_r if swag_r is not None else recommended_r(tokens, depth),
        r_source=f"ToMe README, SWAG ViT-{letter.upper()} @ {size}" if swag else RULE,
        description=f"ViT-{letter.upper()}/{patch} at {size} pixels, {what}",
        weights_source=f"https://download.pytorch.org/models/{file}",
        licence=SWAG_LICENCE if swag else UNSTATED,
        label_set="imagenet-1k",
        loader=TorchvisionLoader(arch, tag),
        geometry=Geometry(width, depth, 4 * width, patch, head_macs=1000 * width),
    )


_PLAIN, _SWAG = "IMAGENET1K_V1", "IMAGENET1K_SWAG_E2E_V1"

TORCHVISION = (
    _named("torchvision_b16", "vit_b_16", _PLAIN, "vit_b_16-c867db91.pth", resize=256),
    _named("torchvision_b32", "vit_b_32", _PLAIN, "vit_b_32-d86f8d99.pth", resize=256),
    _named("torchvision_l16", "vit_l_16", _PLAIN, "vit_l_16-852ce7e3.pth", resize=242),
    _named("swag_b16_384", "vit_b_16", _SWAG, "vit_b_16_swag-9ac1b537.pth", size=384, swag_r=45),
    _named("swag_l16_512", "vit_l_16", _SWAG, "vit_l_16_swag-4f3808c9.pth", size=512, swag_r=40),
    _named("swag_h14_518", "vit_h_14", _SWAG, "vit_h_14_swag-80465313.pth", size=518, swag_r=40),
)
"""Recipes with a name, SWAG's among them."""
