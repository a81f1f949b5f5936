"""Making LLaVA's vision towers and loading their weights. Imports no torch by itself.

Of the weights only the tower's and its projector's tensors are read, never the language model's.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tome_export.errors import InputError
from tome_export.models.hf.loader import resampled_positions
from tome_export.models.llava.config import LlavaConfig
from tome_export.models.positions import Grid, resampling
from tome_export.models.recipe import LoadedModel, Loader, Recipe, WeightsInfo, loaded, refuse_depth
from tome_export.spec import ImageSize
from tome_export.weights.files import (
    Checkpoint,
    check_finite,
    check_fit,
    check_stored,
    sha256,
    stored_dtype,
)
from tome_export.weights.shards import tensors_from_folder

if TYPE_CHECKING:
    from torch import Tensor, nn

    State = dict[str, Tensor]

_VISION = re.compile(
    r"(?:model\.)?(?:(?:vision_tower\.){1,2}(?:vision_model\.)?|vision_model\.)(.+)"
    r"|((?:embeddings|pre_layrnorm|encoder)\..+)"
)
_LAYER = re.compile(r"encoder\.layers\.(\d+)\.")
_PROJECTOR = re.compile(r"(?:model\.)?(?:mm|multi_modal)_projector\.(.+)")
_POSITIONS = "vision_model.embeddings.position_embedding.weight"
_LINEAR = re.compile(r"linear_([1-9])\.(.+)")


def tower_key(key: str, layers: int, projector: bool) -> str | None:
    """The tower's name of a checkpoint's tensor, in any layout; None for what is no part of it.

    What is stored among the tower's tensors has a name here even if the tower has no place for it,
    so that it is not passed over. Layers behind the first ``layers`` are cut off.
    """
    if vision := _VISION.fullmatch(key):
        name = vision[1] or vision[2]
        layer = _LAYER.match(name)
        behind = name.startswith("post_layernorm.") or (
            layer is not None and int(layer[1]) >= layers
        )
        # A buffer that older versions of the library saved.
        skip = behind or name == "embeddings.position_ids"
        return None if skip else f"vision_model.{name}"
    if projector and (found := _PROJECTOR.fullmatch(key)):
        linear = _LINEAR.fullmatch(found[1])
        return f"mm_projector.{f'{2 * int(linear[1]) - 2}.{linear[2]}' if linear else found[1]}"
    return None


@dataclass(frozen=True)
class LlavaLoader(Loader):
    """Makes the tower of one checkpoint.

    Attributes:
        image_size: Height and width of the images; None for the checkpoint's own.
    """

    config: LlavaConfig
    image_size: Grid | None = None

    def create(self, depth: int | None = None) -> nn.Module:
        """See ``Loader``."""
        tower = self._made(depth)
        if self.image_size is not None:
            from tome_export.patch.hf.positions import resample

            resample(tower.vision_model, self.image_size)
        made: nn.Module = tower
        return made

    def at(self, image_size: ImageSize) -> LlavaLoader:
        """See ``Loader``."""
        return replace(self, image_size=(image_size.height, image_size.width))

    def _made(self, depth: int | None = None) -> Any:
        from tome_export.models.llava.tower import LlavaTower
        from tome_export.patch.hf.base import check_attention

        config = self.config
        name = config.folder or config.vision_name
        check_attention(config.attention, name)
        return LlavaTower(
            config.vision,
            depth or config.layers,
            config.options.select_feature or "patch",
            config.wanted_projector(name),
            config.attention,
        )

    def from_file(self, recipe: Recipe, checkpoint: Checkpoint, depth: int | None) -> LoadedModel:
        """See ``Loader``."""
        refuse_depth(depth)
        state = {new: v for key, v in checkpoint.state.items() if (new := self._own(key))}
        info = WeightsInfo("file", checkpoint.source, sha256(checkpoint.path), key=checkpoint.key)
        return self._filled(recipe, state, info)

    def pretrained(self, recipe: Recipe, depth: int | None = None) -> LoadedModel:
        """The tensors of the checkpoint, and of the CLIP model where it leaves those out."""
        refuse_depth(depth)
        config = self.config
        if config.options.projector and not config.folder:
            raise InputError(
                f"the projector is not in {config.vision_name}, which has the tower only; "
                "name a LLaVA checkpoint (hf:<folder>), or leave --projector out"
            )
        state: State = {}
        sources: list[str] = []
        if config.folder:
            folder = Path(config.folder)
            state, names = tensors_from_folder(folder, self._own)
            sources = [f"{folder.name}/{name}" for name in names]
        if not any(key.startswith("vision_model.") for key in state):
            folder = config.vision_folder
            more, names = tensors_from_folder(folder, self._own)
            state = more | state
            sources += [f"{folder.name}/{name}" for name in names]
        # No digest of the files: they are the whole language model, and the artifact keeps that
        # of the tensors.
        info = WeightsInfo("pretrained", ", ".join(sources) or config.folder)
        return self._filled(recipe, state, info)

    def _own(self, key: str) -> str | None:
        return tower_key(key, self.config.layers, bool(self.config.options.projector))

    @property
    def own(self) -> LlavaLoader:
        """See ``Loader``."""
        return self if self.image_size is None else replace(self, image_size=None)

    def fitted(self, state: State, module: nn.Module) -> tuple[State, Grid | None]:  # noqa: ARG002
        """See ``Loader``."""
        if self.image_size is None or _POSITIONS not in state:
            return state, None
        vision = self._made(depth=1).vision_model
        found, before = resampled_positions(vision, state[_POSITIONS], self.image_size)
        return state if found is None else {**state, _POSITIONS: found}, before

    def _filled(self, recipe: Recipe, state: State, info: WeightsInfo) -> LoadedModel:
        module: Any = self.architecture()
        who = f"weights of {info.source}"
        check_stored(state, who)
        stored = stored_dtype(state.values())
        state, before = self.fitted(state, module)
        check_fit(
            state,
            module.state_dict(),
            f"{who} do not fit its config.json",
            "the whole checkpoint of this architecture",
        )
        check_finite(state, f"{who} have")
        # One tensor at a time, so that no more than one is there in both types.
        ready = {key: state.pop(key).float() for key in list(state)}
        module.load_state_dict(ready, strict=True, assign=True)
        module.place_constants()
        if before is not None:
            from tome_export.patch.hf.positions import grid_of

            source = info.source + resampling(before, grid_of(module.vision_model))
            info = replace(info, source=source, resampled_from=before)
        return loaded(module, recipe, replace(info, stored_dtype=stored))
