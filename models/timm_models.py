"""timm's models: recipes for ``timm:<name>``, and making the models of every timm recipe."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, get_args

from tome_export.errors import InputError
from tome_export.models.hf_checkpoint import in_words
from tome_export.models.hub import pretrained_overlay, recorded_file
from tome_export.models.loading import (
    filled,
    loaded,
    random_model,
    refuse_depth,
    split_learned,
)
from tome_export.models.recipe import (
    DATA,
    IMAGENET_NORM,
    RULE,
    LoadedModel,
    Recipe,
    WeightsInfo,
    WeightsKind,
    recommended_r,
)
from tome_export.spec import Interpolation, Preprocessing
from tome_export.weights.files import (
    Checkpoint,
    first_line,
    read_checkpoint,
    sha256,
    shapes_of,
    stored_dtype,
)

if TYPE_CHECKING:
    from torch import Tensor, nn

    State = dict[str, Tensor]

_LABEL_SETS = {1000: "imagenet-1k", 21843: "imagenet-21k-goog", 11821: "imagenet-12k"}


def close_timm_names(name: str) -> list[str]:
    """Up to three timm architectures whose names are close, or that start or end like it."""
    from timm import list_models

    names = list_models()
    arch = name.partition(".")[0].lower()
    if arch in names:
        return [arch]
    close = difflib.get_close_matches(arch, names, n=3, cutoff=0.75)
    return close or [match for match in names if len(arch) > 4 and match.startswith(arch)][:3]


def recipe_from_timm(name: str) -> Recipe:
    """A recipe for ``timm:<name>``, its facts from timm's pretrained configuration.

    The name may carry a tag of weights (``vit_base_patch16_224.mae``). r is ``recommended_r``;
    proportional attention is on except for MAE weights, as the ToMe authors advise.

    Raises:
        InputError: if timm has no such name, or the model has no tokens to merge.
    """
    from timm import get_pretrained_cfg, is_model, list_pretrained

    from tome_export.patch.timm.vit import output_choice

    arch, _, tag = name.partition(".")
    if not is_model(arch):
        close = [f"timm:{match}" for match in close_timm_names(name)]
        hint = f"did you mean {', '.join(close)}?" if close else "see timm.list_models()"
        raise InputError(f"timm has no model {arch!r}; {hint}")
    cfg: Any = get_pretrained_cfg(arch)
    if tag:
        tags = [m.partition(".")[2] for m in list_pretrained(f"{arch}.*")]
        if tag not in tags:
            raise InputError(
                f"timm has no weights {tag!r} of {arch}; it has {', '.join(tags) or 'none'}"
            )
        cfg = get_pretrained_cfg(name)
    if cfg is not None and cfg.tag:
        name = f"{arch}.{cfg.tag}"
    tokens, depth, model = _shape(name)
    values: dict[str, Any] = cfg.to_dict() if cfg is not None else {}
    words = set(str(values.get("tag") or "").split("_"))
    recipe = Recipe(
        name=f"timm:{name}",
        timm_name=name,
        preprocessing=preprocessing_from_cfg(values),
        recommended_r=recommended_r(tokens, depth),
        loader=TimmLoader(),
        r_source=RULE,
        prop_attn="mae" not in words,
        description=_description(arch, values),
        weights_source=str(values.get("hf_hub_id") or values.get("url") or "none"),
        licence=str(values.get("license") or "not stated by timm"),
        label_set=_LABEL_SETS.get(int(model.num_classes)),
    )
    return recipe.giving(output_choice(model))


def preprocessing_from_cfg(cfg: dict[str, Any]) -> Preprocessing:
    """Preprocessing from a timm pretrained configuration; ImageNet's where it is silent."""
    channels, height, width = cfg.get("input_size") or (3, 224, 224)
    interpolation = cfg.get("interpolation") or "bicubic"
    if interpolation not in get_args(Interpolation):
        raise InputError(
            f"timm resizes images for this model with {interpolation!r}; "
            f"supported: {', '.join(get_args(Interpolation))}"
        )
    return Preprocessing(
        input_size=(channels, height, width),
        mean=tuple(cfg.get("mean") or IMAGENET_NORM[0]),
        std=tuple(cfg.get("std") or IMAGENET_NORM[1]),
        crop_pct=float(cfg.get("crop_pct") or 0.875),
        interpolation=cast(Interpolation, interpolation),
    )


def _description(arch: str, cfg: dict[str, Any]) -> str:
    if not cfg:
        said = in_words(preprocessing_from_cfg(cfg))
        return f"timm's {arch}; timm says nothing of its images, ImageNet's are taken: {said}"
    mode = cfg.get("crop_mode") or "center"
    if mode == "center":
        return f"timm's {arch}"
    # Preprocessing has the centre crop only, so the difference is told instead of hidden.
    return (
        f"timm's {arch}; timm's evaluation uses crop mode {mode!r}, here images are centre-cropped"
    )


def _shape(name: str) -> tuple[int, int, Any]:
    """Tokens, blocks and the architecture itself: no memory, no weights."""
    import torch
    from timm import create_model

    with torch.device("meta"):
        model: Any = create_model(name)
    patches = getattr(getattr(model, "patch_embed", None), "num_patches", None)
    blocks = getattr(model, "blocks", None)
    if patches is None or blocks is None:
        raise InputError(
            f"timm model {name} (class {type(model).__name__}) has no sequence of tokens to "
            "merge; expected a VisionTransformer"
        )
    prefix = int(getattr(model, "num_prefix_tokens", 0))
    return int(patches) + prefix, len(blocks), model


@dataclass(frozen=True)
class TimmLoader:
    """Makes timm's models; see ``Loader``."""

    def load(self, recipe: Recipe, weights: str, seed: int, depth: int | None) -> LoadedModel:
        """Make the model; see ``Recipe.load``."""
        from tome_export.patch.timm.vit import output_choice

        made = self._load(recipe, weights, seed, depth)
        return replace(made, recipe=made.recipe.giving(output_choice(made.module)))

    def _load(self, recipe: Recipe, weights: str, seed: int, depth: int | None) -> LoadedModel:
        if weights == "random":
            return random_model(recipe, seed, lambda: _create(recipe, depth=depth))
        if weights != "pretrained":
            checkpoint = read_checkpoint(Path(weights), recipe.weights_key)
            return _from_file(recipe, checkpoint, "file", depth)
        refuse_depth(depth)
        if recipe.bundled is not None:
            return _from_file(recipe, read_checkpoint(DATA / recipe.bundled), "bundled", None)
        return _pretrained(recipe)

    def architecture(self, recipe: Recipe) -> nn.Module:
        """The model without memory for its weights."""
        import torch

        with torch.device("meta"):
            return _create(recipe)


def _create(recipe: Recipe, **arguments: Any) -> nn.Module:
    from timm import create_model

    given = {key: value for key, value in arguments.items() if value is not None}
    module: nn.Module = create_model(recipe.timm_name, **{**dict(recipe.timm_kwargs), **given})
    return module


def _pretrained(recipe: Recipe) -> LoadedModel:
    from timm import get_pretrained_cfg

    notes = str(getattr(get_pretrained_cfg(recipe.timm_name), "notes", None))
    if "natively QuickGELU" in notes and "_quickgelu" not in recipe.timm_name:
        raise InputError(
            f"weights of timm's {recipe.timm_name} were trained with QuickGELU, which this "
            "architecture has not; use timm:"
            + recipe.timm_name.replace("_clip_", "_clip_quickgelu_", 1)
        )
    overlay = pretrained_overlay(recipe)
    try:
        module = _create(recipe, pretrained=True, pretrained_cfg_overlay=overlay)
    # What the network or the hub does to a download half-way comes as many classes, most of them
    # OSError or RuntimeError; the cause is in the message.
    except (OSError, RuntimeError, ValueError) as error:
        raise InputError(
            f"pretrained weights of {recipe.name} could not be loaded ({first_line(error)}); give "
            "a downloaded .safetensors or .pth file with --weights PATH, or try the toolchain "
            "with --weights random"
        ) from None
    path = recorded_file(recipe)
    info = WeightsInfo("pretrained", recipe.weights_source)
    if path is not None:
        # timm has in_float64 what the file holds.
        stored = stored_dtype(read_checkpoint(path).state.values())
        info = replace(info, sha256=sha256(path), stored_dtype=stored)
    return loaded(module, recipe, info)


def _from_file(
    recipe: Recipe, checkpoint: Checkpoint, kind: WeightsKind, depth: int | None
) -> LoadedModel:
    state, learned = split_learned(checkpoint.state, recipe)
    classes = _head_classes(state, checkpoint.path)
    # The mean for a norm behind the pooling and none before it: fine-tuned MAE.
    mean = "fc_norm.weight" in state and "norm.weight" not in state
    module = _create(recipe, depth=depth, num_classes=classes, global_pool="avg" if mean else None)
    stored = stored_dtype(state.values())
    state, remark = _converted(module, state, recipe.timm_name.partition(".")[0])
    made = filled(recipe, module, state, checkpoint, stored, remark and f"; {remark}")
    return replace(made, learned=learned, weights=replace(made.weights, kind=kind))


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


def _converted(module: nn.Module, state: State, architecture: str) -> tuple[State, str]:
    """The state brought into the form of the module, where timm can, and a remark on it.

    If the keys or shapes differ, timm's own filter for the architecture converts original
    checkpoints (DeiT, DeiT III, DINOv2 and others) and resamples the position embedding. What it
    cannot make fit is what is nearest, for a message.
    """
    shapes, found = shapes_of(module.state_dict()), shapes_of(state)
    converted = _timm_filter(module, state, architecture) if found != shapes else None
    if converted is None:
        return state, ""
    if shapes_of(converted) != shapes:
        nearer = len(converted.keys() ^ shapes) < len(found.keys() ^ shapes)
        return converted if nearer else state, ""
    side = shapes.get("patch_embed.proj.weight", ())
    # timm would also resample the patches' kernel, which makes another model of it.
    if found.get("patch_embed.proj.weight", side)[2:] != side[2:]:
        return state, ""
    before, after = found.get("pos_embed"), shapes.get("pos_embed")
    # One token of difference is the class token, stored apart by models with registers.
    same = not before or not after or before[1] - after[1] in (0, 1)
    return converted, "" if same else f"position embedding resampled {before} -> {after}"


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
