"""Making a LLaVA tower: only its tensors and those of its projector are read, never the rest."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tome_export.errors import InputError
from tome_export.models.llava_config import LlavaConfig, kept_layers
from tome_export.models.recipe import LoadedModel, Recipe, WeightsInfo

if TYPE_CHECKING:
    from torch import Tensor, nn

    from tome_export.models.llava import LlavaTower

    State = dict[str, Tensor]

_VISION = re.compile(
    r"(?:model\.)?(?:(?:vision_tower\.){1,2}(?:vision_model\.)?|vision_model\.)(.+)"
    r"|((?:embeddings|pre_layrnorm|encoder)\..+)"
)
_LAYER = re.compile(r"encoder\.layers\.(\d+)\.")
_PROJECTOR = re.compile(r"(?:model\.)?mm_projector\.(.+)")
_OURS = re.compile(r"(?:model\.)?multi_modal_projector\.(.+)")
_LINEAR = re.compile(r"linear_([1-9])\.(.+)")


def tower_key(key: str, layers: int, projector: bool) -> str | None:
    """The tower's name of a checkpoint's tensor; None for what is no part of it.

    What is stored among the tower's tensors has a name here even if the tower has no place for it,
    so that it is not passed over.

    Args:
        key: In LLaVA's own layout, that of Transformers 4 or 5, a CLIP model's, or the tower's.
        layers: How many layers the tower has; those behind are cut off.
        projector: Whether it has the projector.
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
    if projector and (official := _PROJECTOR.fullmatch(key)):
        return f"mm_projector.{official[1]}"
    if projector and (ours := _OURS.fullmatch(key)):
        linear = _LINEAR.fullmatch(ours[1])
        return f"mm_projector.{f'{2 * int(linear[1]) - 2}.{linear[2]}' if linear else ours[1]}"
    return None


@dataclass(frozen=True)
class LlavaLoader:
    """Makes the tower of one checkpoint; see ``Loader``.

    Attributes:
        config: What the checkpoint says, with the tower's options as they are wanted.
        vision: Arguments of ``CLIPVisionConfig`` of the whole vision model.
    """

    config: LlavaConfig
    vision: dict[str, Any]

    @property
    def layers(self) -> int:
        """Layers up to the selected one."""
        select = self.config.options.select_layer
        return kept_layers(-2 if select is None else select, self.vision["num_hidden_layers"])

    def load(self, recipe: Recipe, weights: str, seed: int, depth: int | None) -> LoadedModel:
        """Make the tower; see ``Recipe.load``."""
        import torch

        from tome_export.models.hf_weights import fill
        from tome_export.models.weights import loaded, random_model

        if weights == "random":
            return random_model(recipe, seed, lambda: self._tower(depth))
        if depth is not None:
            raise InputError(
                f"depth {depth} was asked of {recipe.name} with its own weights, which are for "
                "all layers; use random weights or leave the depth"
            )
        with torch.device("meta"):
            module = self._tower()
        state, info = self._from_file(Path(weights)) if weights != "pretrained" else self._state()
        stored = fill(module, state, {key: key for key in module.state_dict()}, info.source)
        module.place_constants()
        return loaded(module, recipe, replace(info, stored_dtype=stored))

    def architecture(self) -> nn.Module:
        """The tower without memory for its weights."""
        import torch

        with torch.device("meta"):
            return self._tower()

    def _tower(self, depth: int | None = None) -> LlavaTower:
        from tome_export.models.llava import LlavaTower
        from tome_export.patch.hf import check_attention

        config = self.config
        attention = config.attention or "sdpa"
        check_attention(attention, config.folder or config.vision_name)
        feature = config.options.select_feature or "patch"
        layers = depth or self.layers
        return LlavaTower(self.vision, layers, feature, projector_of(self), attention)

    def _rename(self, key: str) -> str | None:
        return tower_key(key, self.layers, bool(self.config.options.projector))

    def _from_file(self, path: Path) -> tuple[State, WeightsInfo]:
        from tome_export.weights.files import read_state, sha256

        found = read_state(path)
        state = {new: value for key, value in found.items() if (new := self._rename(key))}
        return state, WeightsInfo("file", path.name, sha256=sha256(path))

    def _state(self) -> tuple[State, WeightsInfo]:
        """The tensors of the checkpoint, and of the CLIP model where it leaves those out."""
        from tome_export.weights.shards import pick

        if self.config.options.projector and not self.config.folder:
            raise InputError(
                f"the projector is not in {self.config.vision_name}, which has the tower only; "
                "name a LLaVA checkpoint (hf:<folder>), or leave --projector out"
            )
        state: State = {}
        sources: list[str] = []
        if self.config.folder:
            folder = Path(self.config.folder)
            state, names = pick(folder, self._rename)
            sources = [f"{folder.name}/{name}" for name in names]
        if not any(key.startswith("vision_model.") for key in state):
            folder = vision_folder(self.config)
            more, names = pick(folder, self._rename)
            state = more | state
            sources += [f"{folder.name}/{name}" for name in names]
        # No digest of the files: they are the whole language model, and the artifact keeps that
        # of the tensors.
        return state, WeightsInfo("pretrained", ", ".join(sources) or str(self.config.folder))


def projector_of(loader: LlavaLoader) -> Any:
    """Shape of the projector (``llava.Projector``) if it is wanted, else None.

    Raises:
        InputError: if it is wanted and the checkpoint has none.
    """
    from tome_export.models.llava import Projector

    config = loader.config
    if not config.options.projector:
        return None
    if config.projector is None or not config.outputs:
        raise InputError(
            f"{config.folder or config.vision_name} has no projector; leave --projector out, or "
            "name a LLaVA checkpoint (hf:<folder>)"
        )
    inputs = loader.vision["hidden_size"]
    return Projector(config.projector, inputs, config.outputs, config.bias, config.bare)


def vision_folder(config: LlavaConfig) -> Path:
    """The folder of the CLIP model that a checkpoint names.

    Raises:
        InputError: if it is no folder, and the hub's cache and the hub do not have it.
    """
    name = config.vision_name
    for folder in (Path(name), Path(config.folder) / name):
        if folder.is_dir():
            return folder
    from tome_export.models.hf_files import snapshot

    return snapshot(name)
