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
    r"(?:model\.)?(?:vision_tower\.){0,2}(?:vision_model\.)?"
    r"((?:embeddings|pre_layrnorm|encoder)\..+)"
)
_LAYER = re.compile(r"encoder\.layers\.(\d+)\.")
_PROJECTOR = re.compile(r"(?:model\.)?mm_projector\.(.+)")
_LINEAR = re.compile(r"(?:model\.)?multi_modal_projector\.linear_(\d+)\.(.+)")


def tower_key(key: str, layers: int, projector: bool) -> str | None:
    """The tower's name of a checkpoint's tensor; None for what is no part of it.

    Args:
        key: In LLaVA's own layout, that of Transformers 4 or 5, a CLIP model's, or the tower's.
        layers: How many layers the tower has; those behind are cut off.
        projector: Whether it has the projector.
    """
    if vision := _VISION.fullmatch(key):
        name = vision[1]
        layer = _LAYER.match(name)
        # A buffer that older versions of the library saved.
        skip = name.endswith("position_ids") or (layer is not None and int(layer[1]) >= layers)
        return None if skip else f"vision_model.{name}"
    if projector and (official := _PROJECTOR.fullmatch(key)):
        return f"mm_projector.{official[1]}"
    if projector and (linear := _LINEAR.fullmatch(key)):
        return f"mm_projector.{2 * int(linear[1]) - 2}.{linear[2]}"
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

        from tome_export.models.weights import loaded, wake_constants

        if weights == "random":
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                module = self._tower(depth)
                wake_constants(module)
            return loaded(module, recipe, WeightsInfo("random", f"random, seed {seed}", seed=seed))
        if depth is not None:
            raise InputError(
                f"depth {depth} was asked of {recipe.name} with its own weights, which are for "
                "all layers; use random weights or leave the depth"
            )
        with torch.device("meta"):
            module = self._tower()
        state, info = self._from_file(Path(weights)) if weights != "pretrained" else self._state()
        stored = _fill(module, state, info.source)
        return loaded(module, recipe, replace(info, stored_dtype=stored))

    def architecture(self) -> nn.Module:
        """The tower without memory for its weights."""
        import torch

        with torch.device("meta"):
            return self._tower()

    def _tower(self, depth: int | None = None) -> LlavaTower:
        from tome_export.models.llava import LlavaTower

        feature = self.config.options.select_feature or "patch"
        return LlavaTower(self.vision, depth or self.layers, feature, projector_of(self))

    def _rename(self, key: str) -> str | None:
        return tower_key(key, self.layers, bool(self.config.options.projector))

    def _from_file(self, path: Path) -> tuple[State, WeightsInfo]:
        from tome_export.models.checkpoint import read_state, sha256

        found = read_state(path)
        state = {new: value for key, value in found.items() if (new := self._rename(key))}
        return state, WeightsInfo("file", path.name, sha256=sha256(path))

    def _state(self) -> tuple[State, WeightsInfo]:
        """The tensors of the checkpoint, and of the CLIP model where it leaves those out."""
        from tome_export.models.shards import pick

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
    return Projector(config.projector, loader.vision["hidden_size"], config.outputs, config.bias)


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


def _fill(module: LlavaTower, state: State, source: str) -> str:
    """Put tensors in place of a module's that has no memory yet; gives the type they came in."""
    wanted = module.state_dict()
    missing = [key for key in wanted if key not in state]
    if missing:
        what = "vision tower" if missing[0].startswith("vision_model.") else "projector"
        raise InputError(
            f"weights {source}: {len(missing)} of the {len(wanted)} tensors of the tower are not "
            f"there ({missing[0]}, …); expected a checkpoint with the {what} that its config.json "
            "describes"
        )
    wrong = [key for key in wanted if state[key].shape != wanted[key].shape]
    if wrong:
        key = wrong[0]
        raise InputError(
            f"weights {source}: {key} has shape {list(state[key].shape)}; expected "
            f"{list(wanted[key].shape)} by config.json"
        )
    broken = [key for key in wanted if not state[key].isfinite().all()]
    if broken:
        raise InputError(
            f"weights {source} have NaN or infinite values in {broken[0]}; expected finite weights"
        )
    types = {str(state[key].dtype).removeprefix("torch.") for key in wanted}
    # In float32 before they are in place: one tensor at a time, and each original is freed.
    ready = {key: state.pop(key).float() for key in wanted}
    module.load_state_dict(ready, strict=True, assign=True)
    module.place_constants()
    return next((name for name in ("float32", "bfloat16", "float16") if name in types), "float32")
