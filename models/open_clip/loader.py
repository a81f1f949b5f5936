"""Making open_clip's image towers and loading their weights."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from tome_export.errors import InputError, MissingComponentError
from tome_export.models.hub import cached_file, check_hub, check_url, loading_failed
from tome_export.models.positions import Grid, fit_positions, resampling
from tome_export.models.recipe import LoadedModel, Loader, Recipe, filled
from tome_export.spec import ImageSize
from tome_export.weights.files import Checkpoint

if TYPE_CHECKING:
    from torch import Tensor, nn

    State = dict[str, Tensor]

_TOWER = "visual."
_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")


@dataclass(frozen=True)
class OpenClipLoader(Loader):
    """Makes open_clip's image towers, without the text towers.

    Attributes:
        arch: Open_clip's name, such as ``ViT-B-32``.
        weights: Open_clip's name of the weights; empty if the model's name had none.
        image_size: Height and width of the images; None for the model's own.
    """

    arch: str
    weights: str = ""
    image_size: tuple[int, int] | None = None

    def create(self, depth: int | None = None) -> nn.Module:
        """See ``Loader``."""
        open_clip = library()

        # Its public functions make the text tower too, whose configuration may be on a hub.
        from open_clip.model import _build_vision_tower

        config: Any = open_clip.get_model_config(self.arch)
        vision = dict(config["vision_cfg"])
        if depth is not None and "timm_model_name" not in vision:
            vision["layers"] = depth
        # As its argument force_image_size.
        vision["image_size"] = self.image_size or vision["image_size"]
        quick = bool(config.get("quick_gelu", False))
        tower: Any = _build_vision_tower(config["embed_dim"], vision, quick)
        if depth is not None and "timm_model_name" in vision:
            tower.trunk.blocks = tower.trunk.blocks[:depth]
        if self.image_size is not None and "timm_model_name" in vision:
            tower.set_input_size(self.image_size)
        return cast("nn.Module", tower)

    def at(self, image_size: ImageSize) -> OpenClipLoader:
        """See ``Loader``."""
        return replace(self, image_size=(image_size.height, image_size.width))

    @property
    def own(self) -> OpenClipLoader:
        """See ``Loader``."""
        return self if self.image_size is None else replace(self, image_size=None)

    def fitted(self, state: State, module: nn.Module) -> tuple[State, Grid | None]:
        """See ``Loader``."""
        key, wanted = _positions(module)
        if self.image_size is None or not key:
            return state, None
        own = _positions(self.own.architecture())[1]
        return fit_positions(state, key, module.state_dict()[key].shape[-2], own, wanted)

    def from_file(self, recipe: Recipe, checkpoint: Checkpoint, depth: int | None) -> LoadedModel:
        """See ``Loader``; of a whole model's tensors only the image tower's are taken."""
        tower = {
            key.removeprefix(_TOWER): value
            for key, value in checkpoint.state.items()
            if key.startswith(_TOWER)
        }
        module = self.create(depth)
        state, before = self.fitted(tower or checkpoint.state, module)
        remark = resampling(before, _positions(module)[1])
        return filled(recipe, module, state, checkpoint, remark=remark, resampled_from=before)

    def download(self, recipe: Recipe) -> Path:
        """See ``Loader``."""
        open_clip = library()
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
            check_hub(recipe, repository, names[0])
        else:
            check_url(recipe, str(cfg["url"]))
        try:
            return Path(str(open_clip.download_pretrained(cfg)))
        except (OSError, RuntimeError, ValueError) as error:
            raise loading_failed(recipe, error, "a downloaded file") from None


def _positions(tower: Any) -> tuple[str, Grid]:
    """Name of a tower's position embedding, empty without one, and the grid that it is for."""
    trunk = getattr(tower, "trunk", None)
    if trunk is None:
        return "positional_embedding", tower.grid_size
    return "trunk.pos_embed" if trunk.pos_embed is not None else "", trunk.patch_embed.grid_size


def library() -> Any:
    """open_clip; raises a ``MissingComponentError`` with the extra's name if it is missing."""
    from importlib.util import find_spec

    if find_spec("open_clip") is None:
        raise MissingComponentError(
            "open_clip is not installed; install the extra: pip install 'tome-export[open_clip]'"
        )
    import open_clip

    return open_clip
