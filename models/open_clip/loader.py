"""Making open_clip's image towers and loading their weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from tome_export.errors import InputError, MissingComponentError
from tome_export.models.hub import cached_file, check_hub, check_url, loading_failed
from tome_export.models.recipe import LoadedModel, Loader, Recipe, filled
from tome_export.weights.files import Checkpoint

if TYPE_CHECKING:
    from torch import nn

_TOWER = "visual."
_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")


@dataclass(frozen=True)
class OpenClipLoader(Loader):
    """Makes open_clip's image towers, without the text towers.

    Attributes:
        arch: Open_clip's name, such as ``ViT-B-32``.
        weights: Open_clip's name of the weights; empty if the model's name had none.
    """

    arch: str
    weights: str = ""

    def create(self, depth: int | None = None) -> nn.Module:
        """See ``Loader``."""
        open_clip = library()

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
        """See ``Loader``; of a whole model's tensors only the image tower's are taken."""
        state = checkpoint.state
        own = {k.removeprefix(_TOWER): v for k, v in state.items() if k.startswith(_TOWER)}
        return filled(recipe, self.create(depth), own or state, checkpoint)

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


def library() -> Any:
    """open_clip; raises a ``MissingComponentError`` with the extra's name if it is missing."""
    from importlib.util import find_spec

    if find_spec("open_clip") is None:
        raise MissingComponentError(
            "open_clip is not installed; install the extra: pip install 'tome-export[open_clip]'"
        )
    import open_clip

    return open_clip
