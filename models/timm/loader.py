"""Making timm's models and loading their weights."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tome_export.errors import InputError
from tome_export.models.facts import DATA
from tome_export.models.hub import cached_file, check_hub, check_url, loading_failed
from tome_export.models.positions import Grid, fit_positions, position_grid, resampling
from tome_export.models.recipe import (
    LoadedModel,
    Loader,
    Recipe,
    WeightsInfo,
    filled,
    loaded,
    refuse_depth,
)
from tome_export.spec import ImageSize
from tome_export.weights.files import Checkpoint, read_checkpoint, sha256, shapes_of, stored_dtype

if TYPE_CHECKING:
    from torch import Tensor, nn

    State = dict[str, Tensor]


_POSITIONS = ("pos_embed", "visual.positional_embedding", "visual.trunk.pos_embed")
"""Names of the position embedding in the layouts of timm, OpenAI's CLIP and open_clip."""


@dataclass(frozen=True)
class TimmLoader(Loader):
    """Makes timm's models.

    Attributes:
        timm_name: timm's architecture with the tag of its weights.
        arguments: Arguments of ``timm.create_model`` that differ from its defaults.
        bundled: File name under ``models/data`` of weights that come with the package.
        origin: The loader of the model for its own image size, where another was asked for.
    """

    timm_name: str
    arguments: tuple[tuple[str, Any], ...] = ()
    bundled: str = ""
    origin: TimmLoader | None = None

    def create(self, depth: int | None = None, **more: Any) -> nn.Module:
        """See ``Loader``; ``more`` are arguments of ``timm.create_model``, left out if None."""
        from timm import create_model

        given = {k: v for k, v in {"depth": depth, **more}.items() if v is not None}
        module: nn.Module = create_model(self.timm_name, **{**dict(self.arguments), **given})
        return module

    def at(self, image_size: ImageSize) -> TimmLoader:
        """See ``Loader``: timm makes its models for any size, rotary positions too."""
        given = {**dict(self.arguments), "img_size": (image_size.height, image_size.width)}
        return replace(self, arguments=tuple(given.items()), origin=self.own)

    @property
    def own(self) -> TimmLoader:
        """See ``Loader``."""
        return self.origin or self

    def fitted(self, state: State, module: Any) -> tuple[State, Grid | None]:
        """See ``Loader``."""
        wanted: Grid = module.patch_embed.grid_size
        if module.pos_embed is None:
            return state, None
        own, rows = self._own_grid(module), int(module.pos_embed.shape[1])
        return fit_positions(state, "pos_embed", rows, own, wanted)

    def _own_grid(self, module: Any) -> Grid:
        like: Any = module if self.origin is None else self.origin.architecture()
        grid: Grid = like.patch_embed.grid_size
        return grid

    def described(self, recipe: Recipe, module: nn.Module) -> Recipe:
        """See ``Loader``: a checkpoint may bring a head, or leave it out."""
        from tome_export.patch.timm.vit import output_choice

        return recipe.giving(output_choice(module))

    def from_file(self, recipe: Recipe, checkpoint: Checkpoint, depth: int | None) -> LoadedModel:
        """See ``Loader``."""
        state = checkpoint.state
        classes = _head_classes(state, checkpoint.path)
        # The mean for a norm behind the pooling and none before it: fine-tuned MAE.
        mean = "fc_norm.weight" in state and "norm.weight" not in state
        module: Any = self.create(depth, num_classes=classes, global_pool="avg" if mean else None)
        stored = stored_dtype(state.values())
        fitting, before = self.fitted(state, module)
        if shapes_of(fitting) != shapes_of(module.state_dict()):
            architecture = self.timm_name.partition(".")[0]
            fitting, before = _converted(module, state, architecture, self._own_grid(module))
        remark = resampling(before, module.patch_embed.grid_size)
        return filled(recipe, module, fitting, checkpoint, stored, remark, before)

    def pretrained(self, recipe: Recipe, depth: int | None = None) -> LoadedModel:
        """See ``Loader``."""
        refuse_depth(depth)
        if self.bundled:
            made = self.from_file(recipe, read_checkpoint(DATA / self.bundled), None)
            return replace(made, weights=replace(made.weights, kind="bundled"))
        notes = str(getattr(self._cfg(), "notes", None))
        if "natively QuickGELU" in notes and "_quickgelu" not in self.timm_name:
            raise InputError(
                f"weights of timm's {self.timm_name} were trained with QuickGELU, which this "
                "architecture has not; use timm:"
                + self.timm_name.replace("_clip_", "_clip_quickgelu_", 1)
            )
        overlay = self._overlay(recipe)
        try:
            module: Any = self.create(pretrained=True, pretrained_cfg_overlay=overlay)
        except (OSError, RuntimeError, ValueError) as error:
            raise loading_failed(recipe, error, "a downloaded .safetensors or .pth file") from None
        info = WeightsInfo("pretrained", recipe.source.weights)
        if (path := self.recorded_file()) is not None:
            # timm has widened what the file holds.
            stored = stored_dtype(read_checkpoint(path).state.values())
            info = replace(info, sha256=sha256(path), stored_dtype=stored)
        if module.pos_embed is not None:
            like: Any = self.at(ImageSize(*self._cfg().input_size[-2:])).architecture()
            if (before := like.patch_embed.grid_size) != module.patch_embed.grid_size:
                info = replace(info, resampled_from=before)
        return loaded(module, recipe, info)

    def recorded_file(self) -> Path | None:
        """The weights file in the hub's cache, if it is there."""
        cfg = self._cfg()
        if cfg is None or not cfg.hf_hub_id:
            return None
        return cached_file(str(cfg.hf_hub_id), _file_names(cfg))

    def _cfg(self) -> Any:
        from timm import get_pretrained_cfg

        return get_pretrained_cfg(self.timm_name)

    def _overlay(self, recipe: Recipe) -> dict[str, str] | None:
        """The file in the hub's cache for timm, so that no network is touched; None if absent."""
        if (path := self.recorded_file()) is not None:
            return {"file": str(path)}
        cfg = self._cfg()
        if cfg is None or not cfg.has_weights:
            raise InputError(
                f"timm has no pretrained weights for {recipe.name}; give a .safetensors or .pth "
                "file with --weights PATH, or try the toolchain with --weights random"
            )
        if cfg.hf_hub_id:
            check_hub(recipe, str(cfg.hf_hub_id), _file_names(cfg)[0])
        elif cfg.url:
            check_url(recipe, str(cfg.url))
        return None


def _file_names(cfg: Any) -> tuple[str, ...]:
    named = cfg.hf_hub_filename
    return (str(named),) if named else ("model.safetensors", "pytorch_model.bin")


def _head_classes(state: State, path: Path) -> int | None:
    """Classes of the checkpoint's own head; None if it has none, and the recipe's count holds.

    Fine-tuned models are what people ship, so their number of classes is the file's to say.
    """
    heads = {
        key: int(state[key].shape[0])
        for key in ("head.weight", "head_dist.weight")
        if key in state and state[key].ndim == 2
    }
    if len(set(heads.values())) > 1:
        counts = ", ".join(f"{key} {count}" for key, count in heads.items())
        raise InputError(
            f"weights file {path} has heads with different numbers of classes ({counts}); "
            "expected the same"
        )
    return next(iter(heads.values()), None)


def _converted(
    module: Any, state: State, architecture: str, own: Grid
) -> tuple[State, Grid | None]:
    """The state brought into the form of the module, where timm can.

    Timm's own filter for the architecture converts original checkpoints (DeiT, DeiT III, DINOv2 and
    others) and resamples the position embedding; also given is the grid that it was resampled
    from, if it was. What timm cannot make fit is what is nearest, for a message. ``own`` is the
    grid of the model's own image size.
    """
    shapes, found = shapes_of(module.state_dict()), shapes_of(state)
    converted = _timm_filter(module, state, architecture)
    if converted is None:
        return state, None
    if shapes_of(converted) != shapes:
        nearer = len(converted.keys() ^ shapes) < len(found.keys() ^ shapes)
        return converted if nearer else state, None
    side = shapes.get("patch_embed.proj.weight", ())
    # timm would also resample the patches' kernel, which makes another model of it.
    if found.get("patch_embed.proj.weight", side)[2:] != side[2:]:
        return state, None
    key = next((key for key in _POSITIONS if key in found), "")
    if not key or "pos_embed" not in shapes:
        return converted, None
    grid: Grid = module.patch_embed.grid_size
    prefix = shapes["pos_embed"][1] - grid[0] * grid[1]
    # The class token's position is another one where models with registers store it apart.
    counts = (found[key][-2] - prefix, found[key][-2] - prefix - 1)
    before = next(filter(None, (position_grid(count, own, grid) for count in counts)), None)
    return converted, None if before == grid else before


def _timm_filter(module: nn.Module, state: State, architecture: str) -> State | None:
    """The state after timm's filter; None if there is none or it cannot make sense of it."""
    from timm.models import deit, model_entrypoint, vision_transformer

    source = model_entrypoint(architecture).__module__
    if source == deit.__name__:
        convert: Any = partial(vision_transformer.checkpoint_filter_fn, adapt_layer_scale=True)
    elif source == vision_transformer.__name__:
        convert = vision_transformer.checkpoint_filter_fn
    else:
        return None
    try:
        converted: State = convert(dict(state), module)
    # A filter meets foreign files here; its failure means only that it cannot help, and the
    # difference of the file itself is what the user is told.
    except (KeyError, RuntimeError, AttributeError, ValueError, IndexError, AssertionError):
        return None
    return converted
