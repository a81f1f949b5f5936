"""Open_clip's image towers: recipes for ``open_clip:<arch>[/<weights>]``, and making the models.

The output is that of ``encode_image(image, normalize=False)``: features not of unit length.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, get_args

from tome_export.errors import InputError, MissingComponentError
from tome_export.models.hf_checkpoint import in_words
from tome_export.models.hub import ask, ask_hub, ask_url, cached_file
from tome_export.models.loading import FileLoader, filled
from tome_export.models.recipe import CLIP_NORM, RULE, Geometry, LoadedModel, Recipe, recommended_r
from tome_export.spec import Interpolation, Preprocessing
from tome_export.weights.files import Checkpoint, first_line

if TYPE_CHECKING:
    from torch import Tensor, nn

_TOWER = "visual."
_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")


@dataclass(frozen=True)
class OpenClipLoader(FileLoader):
    """Makes open_clip's image towers, without the text towers.

    Attributes:
        arch: Open_clip's name, such as ``ViT-B-32``.
        weights: Of its weights, such as ``laion2b_s34b_b79k``; empty if the name had none.
    """

    arch: str
    weights: str = ""

    def create(self, depth: int | None = None) -> nn.Module:
        """See ``FileLoader``."""
        require_open_clip()
        import open_clip

        # Its public functions make the text tower too, whose configuration may be on a hub.
        from open_clip.model import _build_vision_tower

        config: Any = open_clip.get_model_config(self.arch)
        vision = dict(config["vision_cfg"])
        if depth is not None and "timm_model_name" not in vision:
            vision["layers"] = depth
        quick = bool(config.get("quick_gelu", False))
        tower: Any = _build_vision_tower(config["embed_dim"], vision, quick)
        if depth is not None and "timm_model_name" in vision:
            tower.trunk.blocks = tower.trunk.blocks[:depth]
        return cast("nn.Module", tower)

    def from_file(self, recipe: Recipe, checkpoint: Checkpoint, depth: int | None) -> LoadedModel:
        """See ``FileLoader``."""
        return filled(recipe, self.create(depth), _tower(checkpoint.state), checkpoint)

    def download(self, recipe: Recipe) -> Path:
        """See ``FileLoader``."""
        import open_clip

        require_open_clip()
        tags = open_clip.list_pretrained_tags_by_model(self.arch)
        if not self.weights:
            raise InputError(
                f"{recipe.name} names no weights; name those of open_clip:{self.arch}/<weights> "
                f"({', '.join(tags) or 'it has none'}), give a file with --weights PATH, or try "
                "the toolchain with --weights random"
            )
        cfg: Any = open_clip.get_pretrained_cfg(self.arch, self.weights)
        if cfg.get("hf_hub"):
            # ``organisation/model/`` or ``organisation/model/file``.
            repository, _, name = str(cfg["hf_hub"]).rpartition("/")
            names = (name,) if name else _FILES
            if (cached := cached_file(repository, names)) is not None:
                return cached
            ask(recipe, "the hub", lambda: ask_hub(repository, names[0]))
        else:
            ask(recipe, str(cfg["url"]), lambda: ask_url(str(cfg["url"])))
        try:
            return Path(str(open_clip.download_pretrained(cfg)))
        # What the network or the hub does to a download half-way comes as many classes.
        except (OSError, RuntimeError, ValueError) as error:
            raise InputError(
                f"pretrained weights of {recipe.name} could not be loaded "
                f"({first_line(error)}); give a downloaded file with --weights PATH, or try the "
                "toolchain with --weights random"
            ) from None


def _tower(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The image tower's tensors of a whole model; a tower's own state is returned as it is."""
    own = {key: value for key, value in state.items() if key.startswith(_TOWER)}
    return {key.removeprefix(_TOWER): value for key, value in own.items()} or state


def require_open_clip() -> None:
    """Raise a ``MissingComponentError`` with the name of the extra where it is not installed."""
    from importlib.util import find_spec

    if find_spec("open_clip") is None:
        raise MissingComponentError(
            "open_clip is not installed; install the extra: pip install 'tome-export[open_clip]'"
        )


def recipe_from_open_clip(name: str) -> Recipe:
    """A recipe for ``open_clip:<arch>[/<weights>]``, its facts from open_clip's tables.

    Raises:
        InputError: if open_clip has no such model or weights, or it is no ViT.
        MissingComponentError: if open_clip is not installed.
    """
    require_open_clip()
    import open_clip
    import torch

    arch, _, tag = name.partition("/")
    if arch not in open_clip.list_models():
        close = difflib.get_close_matches(arch, open_clip.list_models(), n=3)
        hint = f"did you mean open_clip:{close[0]}?" if close else "see open_clip.list_models()"
        raise InputError(f"open_clip has no model {arch!r}; {hint}")
    tags = open_clip.list_pretrained_tags_by_model(arch)
    if tag and tag not in tags:
        raise InputError(
            f"open_clip has no weights {tag!r} of {arch}; it has {', '.join(tags) or 'none'}"
        )
    cfg: dict[str, Any] = open_clip.get_pretrained_cfg(arch, tag) if tag else {}
    quick = bool((open_clip.get_model_config(arch) or {}).get("quick_gelu", False))
    if tag and bool(cfg.get("quick_gelu", False)) != quick:
        other = f"{arch}-quickgelu" if not quick else arch.removesuffix("-quickgelu")
        raise InputError(
            f"weights {tag!r} of open_clip's {arch} were trained with another activation; use "
            f"open_clip:{other}/{tag}"
        )
    loader = OpenClipLoader(arch, tag)
    with torch.device("meta"):
        tower: Any = loader.create()
    tokens, depth = _shape(tower, arch)
    mode = cfg.get("resize_mode", "shortest")
    preprocessing = preprocessing_of(tower.image_size, cfg)
    said = in_words(preprocessing)
    squash = "" if mode == "shortest" else f"; open_clip resizes by {mode!r}, here images are "
    return Recipe(
        name=f"open_clip:{name}",
        family="open_clip_vit",
        preprocessing=preprocessing,
        recommended_r=recommended_r(tokens, depth),
        r_source=RULE,
        output_name="features",
        description=f"open_clip's {arch}, image features not of unit length"
        + (squash and f"{squash}centre-cropped")
        + ("" if cfg else f"; no weights are named, preprocessing is open_clip's default: {said}"),
        weights_source=str(cfg.get("hf_hub") or cfg.get("url") or "none named"),
        licence="not stated by open_clip",
        loader=loader,
    )


def _shape(tower: Any, arch: str) -> tuple[int, int]:
    """Tokens and blocks of a tower."""
    trunk: Any = getattr(tower, "trunk", None)
    patches = getattr(getattr(trunk, "patch_embed", None), "num_patches", None)
    if patches is not None and hasattr(trunk, "blocks"):
        return int(patches) + int(getattr(trunk, "num_prefix_tokens", 0)), len(trunk.blocks)
    if hasattr(tower, "transformer"):
        return int(tower.positional_embedding.shape[0]), len(tower.transformer.resblocks)
    raise InputError(
        f"open_clip's {arch} has an image tower of class {type(trunk or tower).__name__}, which "
        "has no sequence of tokens to merge; expected a ViT"
    )


def preprocessing_of(image_size: Any, cfg: dict[str, Any]) -> Preprocessing:
    """Preprocessing from open_clip's table; its own defaults where that is silent."""
    from open_clip.transform import PreprocessCfg

    default = PreprocessCfg()
    height, width = image_size if isinstance(image_size, tuple | list) else (image_size,) * 2
    interpolation = cfg.get("interpolation", default.interpolation)
    if interpolation not in get_args(Interpolation):
        raise InputError(
            f"open_clip resizes images for this model with {interpolation!r}; "
            f"supported: {', '.join(get_args(Interpolation))}"
        )
    return Preprocessing(
        input_size=(3, int(height), int(width)),
        mean=tuple(cfg.get("mean", default.mean)),
        std=tuple(cfg.get("std", default.std)),
        crop_pct=1.0,
        interpolation=cast(Interpolation, interpolation),
    )


def _named(
    name: str, arch: str, tag: str, hub: str, width: int, depth: int, patch: int, features: int
) -> Recipe:
    tokens = (224 // patch) ** 2 + 1
    return Recipe(
        name=name,
        family="open_clip_vit",
        preprocessing=Preprocessing((3, 224, 224), *CLIP_NORM, 1.0, "bicubic"),
        recommended_r=recommended_r(tokens, depth),
        r_source=RULE,
        output_name="features",
        description=f"OpenCLIP {arch}, {tag}; image features not of unit length",
        weights_source=f"laion/CLIP-{arch}-{hub}/",
        licence="not stated by open_clip",
        loader=OpenClipLoader(arch, tag),
        geometry=Geometry(width, depth, 4 * width, patch, head_macs=width * features),
    )


_DATACOMP = "datacomp_xl_s13b_b90k", "DataComp.XL-s13B-b90K"

OPEN_CLIP = (
    _named("openclip_b32", "ViT-B-32", "laion2b_s34b_b79k", "laion2B-s34B-b79K", 768, 12, 32, 512),
    _named("openclip_b16", "ViT-B-16", *_DATACOMP, 768, 12, 16, 512),
    _named("openclip_l14", "ViT-L-14", *_DATACOMP, 1024, 24, 14, 768),
    _named(
        "openclip_h14", "ViT-H-14", "laion2b_s32b_b79k", "laion2B-s32B-b79K", 1280, 32, 14, 1024
    ),
)
"""Recipes with a name."""
