"""Recipes for the user's own models: ``module:function``."""

from __future__ import annotations

import copy
import importlib
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tome_export.errors import InputError, TomeExportError
from tome_export.merge.schedule import VideoOptions
from tome_export.models.loading import filled, loaded, split_learned
from tome_export.models.recipe import (
    RULE,
    LoadedModel,
    OutputName,
    Recipe,
    WeightsInfo,
    recommended_r,
)
from tome_export.spec import VIDEO_FEATURES, Preprocessing
from tome_export.weights.files import read_state, stored_dtype

if TYPE_CHECKING:
    from torch import nn

    from tome_export.patch import MergedModel


@dataclass(frozen=True)
class FunctionLoader:
    """Hands out copies of the model that a function has made; see ``Loader``."""

    module: nn.Module

    def load(self, recipe: Recipe, weights: str, seed: int, depth: int | None) -> LoadedModel:  # noqa: ARG002
        """The model with its own weights or those of a file; see ``Recipe.load``."""
        if weights == "random":
            raise InputError(
                f"random weights were asked for {recipe.name}, whose function makes its own; "
                "leave --weights out"
            )
        if depth is not None:
            raise InputError(
                f"depth {depth} was asked for {recipe.name}, whose function makes the model; "
                "leave the depth"
            )
        module = copy.deepcopy(self.module)
        if weights == "pretrained":
            stored = stored_dtype(module.parameters())
            source = f"returned by {recipe.name}"
            return loaded(module, recipe, WeightsInfo("function", source, stored_dtype=stored))
        state, learned = split_learned(read_state(Path(weights)), recipe)
        return replace(filled(recipe, module, state, Path(weights)), learned=learned)

    def architecture(self, recipe: Recipe) -> nn.Module:  # noqa: ARG002
        """A copy of the model."""
        return copy.deepcopy(self.module)


def recipe_from_function(name: str) -> Recipe:
    """Call ``module:function``, which returns an ``nn.Module`` or (module, ``Preprocessing``).

    The module is looked for on the Python path and in the current folder. The model may be of any
    family that can be patched; its tokens, layers, image size and kind of output are those of the
    patched model. Without a ``Preprocessing``, what the model itself says of its images is used
    (the configuration of timm or open_clip), else its family's mean and standard deviation.

    Args:
        name: Such as ``mymodels:vit``.

    Raises:
        InputError: if there is no such function, it fails, or returns something else.
    """
    module, preprocessing = _call(name)
    merged = _patched(name, module)
    layers = merged.layers
    return Recipe(
        name=name,
        family="custom",
        preprocessing=preprocessing or _preprocessing(module, merged.image_size),
        recommended_r=recommended_r(layers[0].tokens_in, len(layers)) if layers else 0,
        r_source=RULE,
        output_name=_output_name(merged),
        video=VideoOptions(merged.input_size[0]) if merged.takes_video else None,
        description=f"{type(module).__name__} from {name}",
        weights_source=f"returned by {name}",
        labels=_labels(module),
        loader=FunctionLoader(module),
    )


def _output_name(merged: MergedModel) -> OutputName:
    if merged.takes_video:
        return VIDEO_FEATURES
    return "logits" if merged.classifies else "features"


def _patched(name: str, module: nn.Module) -> MergedModel:
    """The model without merging, which is how its family reads it."""
    from tome_export.patch import MergedModel, UnknownModelError, patch

    if isinstance(module, MergedModel):
        raise InputError(
            f"{name} returned a model that is patched already; return the library's own model, "
            "and say with --r or --schedule how it merges"
        )
    try:
        return patch(module, 0)
    except UnknownModelError as error:
        raise InputError(
            f"{name} returned a {type(module).__name__}, which has no sequence of tokens to merge "
            f"that is known here: {error}"
        ) from None
    except InputError as error:
        raise InputError(f"{name} returned a model that cannot be merged: {error}") from None


def _call(name: str) -> tuple[nn.Module, Preprocessing | None]:
    from torch import nn

    where, _, what = name.partition(":")
    if not where:
        raise InputError(f"model {name!r} names no module; expected module:function")
    function = getattr(_import(name, where), what, None) if what else None
    if not callable(function):
        raise InputError(
            f"model {name!r}: module {where!r} has no function {what!r}; expected module:function"
        )
    try:
        made = function()
    except TomeExportError:
        raise
    except Exception as error:
        raise InputError(
            f"model {name!r}: the function failed with {type(error).__name__}: {_line(error)}; "
            "expected it to return an nn.Module when called without arguments"
        ) from error
    parts = made if isinstance(made, tuple) else (made, None)
    if (
        len(parts) == 2
        and isinstance(parts[0], nn.Module)
        and (parts[1] is None or isinstance(parts[1], Preprocessing))
    ):
        return parts
    kinds = ", ".join(type(part).__name__ for part in parts if part is not None)
    raise InputError(
        f"model {name!r}: the function returned {kinds or 'None'}; "
        "expected an nn.Module, or (nn.Module, Preprocessing)"
    )


def _import(name: str, where: str) -> Any:
    # A console script, unlike `python -m`, does not look in the current folder.
    here = str(Path.cwd())
    added = here not in sys.path
    if added:
        sys.path.append(here)
    try:
        return importlib.import_module(where)
    except ModuleNotFoundError as error:
        raise InputError(
            f"model {name!r}: no module {error.name!r} on the Python path or in the current "
            "folder; expected a recipe, timm:<name>, or module:function"
        ) from None
    except Exception as error:
        raise InputError(
            f"model {name!r}: importing {where!r} failed with {type(error).__name__}: "
            f"{_line(error)}"
        ) from error
    finally:
        if added:
            sys.path.remove(here)


def _preprocessing(model: Any, input_size: tuple[int, int, int]) -> Preprocessing:
    """As the model's own library would treat its images, as far as the model says."""
    library = type(model).__module__.partition(".")[0]
    if library == "open_clip":
        from tome_export.models.open_clip_models import preprocessing_of

        return preprocessing_of(input_size[1:], getattr(model, "preprocess_cfg", None) or {})
    config = _hf_config(model)
    if config is not None:
        from tome_export.models.hf import norm_of

        mean, std = norm_of(config.model_type)
        given: dict[str, Any] = {"mean": mean, "std": std, "crop_pct": 1.0}
    else:
        cfg = getattr(model, "pretrained_cfg", None) or {}
        given = dict(cfg) if isinstance(cfg, dict) else cfg.to_dict()
    for key in ("mean", "std"):
        values = given.get(key) or ()
        if (len(values), input_size[0]) not in ((input_size[0], input_size[0]), (0, 3)):
            given[key] = (0.5,) * input_size[0]
    from tome_export.models.timm_models import preprocessing_from_cfg

    return preprocessing_from_cfg({**given, "input_size": input_size})


def _hf_config(model: Any) -> Any:
    """Transformers' configuration of the transformer; None for models of other libraries."""
    config = getattr(getattr(model, "vision_model", model), "config", None)
    return config if hasattr(config, "model_type") else None


def _labels(model: Any) -> tuple[str, ...] | None:
    """Class names that a model of Transformers carries; None without."""
    config = _hf_config(model)
    if config is None:
        return None
    from tome_export.models.hf import labels_of

    return labels_of(type(model).__name__, config)


def _line(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else "no message"
