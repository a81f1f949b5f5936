"""Recipes for the user's own models: ``module:function``."""

from __future__ import annotations

import copy
import importlib
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from importlib.machinery import PathFinder
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from tome_export.errors import InputError, exit_text
from tome_export.models.hf_checkpoint import in_words
from tome_export.models.loading import filled, loaded, split_learned
from tome_export.models.recipe import (
    RULE,
    LoadedModel,
    Recipe,
    WeightsInfo,
    recommended_r,
)
from tome_export.spec import Activation, Interpolation, Preprocessing
from tome_export.video import VIDEO_FEATURES
from tome_export.video.options import VideoOptions
from tome_export.weights.files import check_finite, check_stored, read_checkpoint, stored_dtype

if TYPE_CHECKING:
    from torch import nn

    from tome_export.patch import MergedModel

MOST_CROP = 16
"""Above it an image would be resized to nothing."""


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
        module = self.architecture(recipe, own_weights=weights != "pretrained")
        if weights == "pretrained":
            stored = stored_dtype(module.parameters())
            source = f"returned by {recipe.name}"
            return loaded(module, recipe, WeightsInfo("function", source, stored_dtype=stored))
        counts = [k for k, v in module.state_dict().items() if not v.is_floating_point()]
        checkpoint = read_checkpoint(Path(weights), recipe.weights_key, counts)
        state, learned = split_learned(checkpoint.state, recipe)
        return replace(filled(recipe, module, state, checkpoint), learned=learned)

    def architecture(self, recipe: Recipe, *, own_weights: bool = True) -> nn.Module:
        """A copy of the model, which may share its weights, as they may be gigabytes.

        Raises:
            InputError: if it holds what cannot be copied.
        """
        tensors = (*self.module.parameters(), *self.module.buffers())
        shared = {} if own_weights else {id(tensor): tensor for tensor in tensors}
        try:
            return copy.deepcopy(self.module, shared)
        except Exception as error:
            raise InputError(
                f"the model of {recipe.name} cannot be copied ({_line(error)}); expected one that "
                "copy.deepcopy copies: leave locks, open files and tensors with a gradient out"
            ) from error


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
    _check_weights(name, module)
    merged, dense_only = _patched(name, module)
    layers = merged.layers
    source = remark = ""
    if preprocessing is None:
        preprocessing, source = _preprocessing(name, module, merged.image_size)
    _check_images(name, preprocessing, merged.image_size)
    if source:
        remark = f"; preprocessing is {source}: {in_words(preprocessing)}"
    recipe = Recipe(
        name=name,
        family="custom",
        preprocessing=preprocessing,
        recommended_r=recommended_r(layers[0].tokens_in, len(layers)) if layers else 0,
        r_source=RULE,
        activation=_activation(module),
        dense_only=dense_only,
        video=VideoOptions(merged.input_size[0]) if merged.takes_video else None,
        description=f"{type(module).__name__} from {name}{remark}",
        weights_source=f"returned by {name}",
        labels=_labels(module),
        loader=FunctionLoader(module),
    )
    if merged.takes_video:
        return replace(recipe, output_name=VIDEO_FEATURES)
    return recipe.giving(merged.output_choice)


def _patched(name: str, module: nn.Module) -> tuple[MergedModel, bool]:
    """The model without merging, as its family reads it, and whether only patches have features."""
    from tome_export.patch import MergedModel, NoImageOutputError, UnknownModelError, patch

    if isinstance(module, MergedModel):
        raise InputError(
            f"{name} returned a model that is patched already; return the library's own model, "
            "and say with --r or --schedule how it merges"
        )
    try:
        try:
            return patch(module, 0), False
        except NoImageOutputError:
            return patch(module, 0, dense=True), True
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
    with _users_code():
        function = getattr(_import(name, where), what, None) if what else None
        if not callable(function):
            raise InputError(
                f"model {name!r}: module {where!r} has no function {what!r}; expected "
                "module:function"
            )
        try:
            made = function()
        except BaseException as error:
            if _is_own(error):
                raise
            raise InputError(
                f"model {name!r}: the function {_what_happened(error)}; expected it to return an "
                "nn.Module when called without arguments"
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


@contextmanager
def _users_code() -> Iterator[None]:
    """The current folder is looked at first, and what is printed is no result of the command."""
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        if here in sys.path:
            sys.path.remove(here)


_imported: dict[str, str] = {}
"""Files in the current folder of then that modules of users were imported from."""


def _import(name: str, where: str) -> Any:
    top = where.partition(".")[0]
    own = PathFinder.find_spec(top, sys.path[:1])
    origin = None if own is None else own.origin
    if _imported.get(top, origin) != origin:  # by us, from another folder
        for old in [m for m in sys.modules if m.partition(".")[0] == top]:
            del sys.modules[old]
    try:
        module = importlib.import_module(where)
    except ModuleNotFoundError as error:
        hint = "; name it without .py" if where.endswith(".py") else ""
        raise InputError(
            f"model {name!r}: no module {error.name!r} on the Python path or in the current "
            f"folder{hint}; expected a recipe, timm:<name>, or module:function"
        ) from None
    except BaseException as error:
        if _is_own(error):
            raise
        raise InputError(f"model {name!r}: importing {where!r} {_what_happened(error)}") from error
    loaded = getattr(sys.modules.get(top), "__file__", None)
    if origin is not None and loaded != origin:
        raise InputError(
            f"model {name!r}: {origin} has the name of a module that is loaded already "
            f"({loaded or 'part of Python'}); give your file another name"
        )
    if origin is not None:
        _imported[top] = origin
    return module


def _is_own(error: BaseException) -> bool:
    """Whether Ctrl-C or this package raised it, and not the user's code."""
    package = __name__.partition(".")[0]
    return isinstance(error, KeyboardInterrupt) or type(error).__module__.startswith(f"{package}.")


def _what_happened(error: BaseException) -> str:
    if not isinstance(error, SystemExit):
        return f"failed with {type(error).__name__}: {_line(error)}"
    return f"ended with {exit_text(error)}"


def _check_weights(name: str, module: nn.Module) -> None:
    """Refuse a model whose weights are no plain tensors of finite floating-point numbers."""
    import torch

    for key, value in module.state_dict().items():
        if not isinstance(value, torch.Tensor):
            raise InputError(
                f"{name} returned a model with a {type(value).__name__} as {key}, so it is "
                "quantised or keeps other things than tensors; expected weights of floating-point "
                "numbers"
            )
    parameters, buffers = dict(module.named_parameters()), dict(module.named_buffers())
    counts = [key for key, value in buffers.items() if not value.is_floating_point()]
    check_stored({**buffers, **parameters}, f"weights of {name}", counts)
    # A mask may be infinite.
    check_finite(parameters, f"{name} returned a model that has")


def _check_images(name: str, found: Preprocessing, expected: tuple[int, ...]) -> None:
    """Refuse preprocessing that makes no images, or others than the model takes."""
    channels = expected[0]
    for key, values in (("mean", found.mean), ("std", found.std)):
        numbers = isinstance(values, tuple | list) and all(map(_is_number, values))
        if not numbers or len(values) != channels or (key == "std" and min(values) <= 0):
            above = " above 0" * (key == "std")
            raise InputError(
                f"preprocessing of {name} has {key} {values!r}; expected {channels} finite "
                f"numbers{above}"
            )
    if not _is_number(found.crop_pct) or not 0 < found.crop_pct <= MOST_CROP:
        raise InputError(
            f"preprocessing of {name} has crop_pct {found.crop_pct!r}; expected a number above 0, "
            f"at most {MOST_CROP}"
        )
    if found.interpolation not in get_args(Interpolation):
        raise InputError(
            f"preprocessing of {name} has interpolation {found.interpolation!r}; expected "
            f"{', '.join(get_args(Interpolation))}"
        )
    if not isinstance(found.input_size, tuple | list) or tuple(found.input_size) != expected:
        raise InputError(
            f"preprocessing of {name} has input_size {found.input_size!r}; expected that of the "
            f"model, {expected}"
        )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _preprocessing(
    name: str, model: Any, input_size: tuple[int, int, int]
) -> tuple[Preprocessing, str]:
    """As the model's own library would treat its images, and what says so."""
    attribute = "preprocess_cfg" if type(model).__module__.startswith("open_clip.") else None
    attribute = attribute or "pretrained_cfg"
    cfg = getattr(model, attribute, None) or {}
    config = _hf_config(model)
    source = f"that of its {attribute}" if cfg and config is None else "its family's"
    try:
        given = dict(cfg) if isinstance(cfg, dict) else cfg.to_dict()
        return _from_cfg(attribute, given, config, input_size), source
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{name} returned a model whose {attribute} is none ({_line(error)}); return "
            "(nn.Module, Preprocessing), or leave it out"
        ) from None


def _from_cfg(
    attribute: str, given: dict[str, Any], config: Any, input_size: tuple[int, int, int]
) -> Preprocessing:
    if attribute == "preprocess_cfg":
        from tome_export.models.open_clip_models import preprocessing_of

        return preprocessing_of(input_size[1:], given)
    if config is not None:
        from tome_export.models.hf import norm_of

        mean, std = norm_of(config.model_type)
        given = {"mean": mean, "std": std, "crop_pct": 1.0}
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


def _activation(model: Any) -> Activation | None:
    """What a classifier of Transformers says of its scores; None for others."""
    if _hf_config(model) is None:
        return None
    from tome_export.models.hf import activation_of

    return activation_of(model.config)


def _labels(model: Any) -> tuple[str, ...] | None:
    """Class names that a model of Transformers or timm carries; None without."""
    if _hf_config(model) is None:
        from tome_export.patch.checks import pretrained_configuration

        names = pretrained_configuration(model).get("label_names")
        return tuple(map(str, names)) if names else None
    from tome_export.models.hf import labels_of

    return labels_of(model.config)


def _line(error: BaseException) -> str:
    try:
        return next(iter(str(error).splitlines()), "") or "no message"
    except Exception:
        return "no message"
