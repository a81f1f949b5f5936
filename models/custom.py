"""Recipes for the user's own models: ``module:function``."""

from __future__ import annotations

import copy
import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from importlib.machinery import PathFinder
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from tome_export.errors import InputError, exit_text
from tome_export.models.facts import ModelOutput
from tome_export.models.hf.recipes import norm_of, output_from_config
from tome_export.models.preprocessing import are_numbers, in_words, is_number
from tome_export.models.recipe import (
    LoadedModel,
    Loader,
    ModelSource,
    Recipe,
    WeightsInfo,
    filled,
    loaded,
    recipe_from_model,
    unmerged,
)
from tome_export.spec import CropOffset, ImageSize, Interpolation, Preprocessing, Resize, is_fill
from tome_export.weights.files import Checkpoint, check_finite, check_stored, stored_dtype

if TYPE_CHECKING:
    from torch import nn


MOST_CROP = 16
"""Above it an image would be resized to nothing."""


@dataclass(frozen=True)
class FunctionLoader(Loader):
    """Hands out copies of the model that a function has made."""

    module: nn.Module
    name: str

    def create(self, depth: int | None = None) -> nn.Module:
        """See ``Loader``: a copy of the model with weights of its own."""
        self._refuse_depth(depth)
        return self._copy(copy.deepcopy)

    def architecture(self) -> nn.Module:
        """See ``Loader``."""
        return self.create()

    def at(self, image_size: ImageSize) -> Loader:
        """Refused: the function makes the model for the size that it likes."""
        raise InputError(
            f"image size {image_size} was asked for {self.name}, whose function makes the model "
            "for another; make it for that size there, as with img_size of timm.create_model, and "
            "leave --image-size out"
        )

    def random(self, recipe: Recipe, seed: int, depth: int | None = None) -> LoadedModel:  # noqa: ARG002
        """Refused: the function makes its own weights."""
        raise InputError(
            f"random weights were asked for {recipe.name}, whose function makes its own; "
            "leave --weights out"
        )

    def pretrained(self, recipe: Recipe, depth: int | None = None) -> LoadedModel:
        """The model with the weights that the function gave it."""
        self._refuse_depth(depth)
        from tome_export.patch.precision import copy_sharing_weights

        # As they may be gigabytes.
        module = self._copy(copy_sharing_weights)
        stored = stored_dtype(module.parameters())
        source = f"returned by {recipe.name}"
        return loaded(module, recipe, WeightsInfo("function", source, stored_dtype=stored))

    def from_file(self, recipe: Recipe, checkpoint: Checkpoint, depth: int | None) -> LoadedModel:
        """See ``Loader``."""
        return filled(recipe, self.create(depth), checkpoint.state, checkpoint)

    def counts(self) -> list[str]:
        """See ``Loader``."""
        state = self.module.state_dict()
        return [key for key, value in state.items() if not value.is_floating_point()]

    def _refuse_depth(self, depth: int | None) -> None:
        if depth is not None:
            raise InputError(
                f"depth {depth} was asked for {self.name}, whose function makes the model; "
                "leave the depth"
            )

    def _copy(self, copied: Callable[[nn.Module], nn.Module]) -> nn.Module:
        from tome_export.patch.checks import COPYABLE

        try:
            return copied(self.module)
        except Exception as error:
            raise InputError(
                f"the model of {self.name} cannot be copied ({_line(error)}); {COPYABLE}"
            ) from error


def recipe_from_function(name: str) -> Recipe:
    """Call ``module:function``, which returns an ``nn.Module`` or (module, ``Preprocessing``).

    The module is looked for on the Python path and in the current folder. The model may be of any
    family that can be patched, or have a head of its own on a backbone (``patch.whole``); its
    tokens, layers, image size and kind of output are those of the patched model. Without a
    ``Preprocessing``, what the model itself says of its images is used (the configuration of timm
    or open_clip), else its family's mean and standard deviation.
    """
    from tome_export.patch import MergedModel, UnknownModelError

    module, preprocessing = _call(name)
    _check_weights(name, module)
    if isinstance(module, MergedModel):
        raise InputError(
            f"{name} returned a model that is patched already; return the library's own model, "
            "and say with --r or --schedule how it merges"
        )
    try:
        patched = unmerged(f"{name} returned", module)
    except InputError as error:
        if isinstance(error.__cause__, UnknownModelError):
            raise
        raise InputError(f"{name} returned a model that cannot be merged: {error}") from None
    image_size = patched[0].image_size
    source = remark = ""
    if preprocessing is None:
        # A model around a backbone of the library may say nothing of its images itself.
        own = _hf_config(module) is not None or hasattr(module, "pretrained_cfg")
        described = module if own else patched[0].backbone
        preprocessing, source = _own_preprocessing(name, described, image_size)
    _check_images(name, preprocessing, image_size)
    if source:
        remark = f"; preprocessing is {source}: {in_words(preprocessing)}"
    return recipe_from_model(
        name,
        ModelSource(FunctionLoader(module, name), f"returned by {name}"),
        preprocessing,
        patched,
        family="custom",
        description=f"{type(module).__name__} from {name}{remark}",
        output=_output(module),
    )


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
        expected = "; expected it to return an nn.Module when called without arguments"
        with _failures_of(f"model {name!r}: the function", expected):
            made = function()
    parts = made if isinstance(made, tuple) else (made, None)
    if len(parts) == 2:
        module, preprocessing = parts
        if isinstance(module, nn.Module) and isinstance(preprocessing, Preprocessing | None):
            return module, preprocessing
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
    with _failures_of(f"model {name!r}: importing {where!r}"):
        try:
            module = importlib.import_module(where)
        except ModuleNotFoundError as error:
            hint = "; name it without .py" if where.endswith(".py") else ""
            raise InputError(
                f"model {name!r}: no module {error.name!r} on the Python path or in the current "
                f"folder{hint}; expected a recipe, timm:<name>, or module:function"
            ) from None
    if origin is not None:
        taken = getattr(sys.modules.get(top), "__file__", None)
        if taken != origin:
            raise InputError(
                f"model {name!r}: {origin} has the name of a module that is loaded already "
                f"({taken or 'part of Python'}); give your file another name"
            )
        _imported[top] = origin
    return module


@contextmanager
def _failures_of(what: str, expected: str = "") -> Iterator[None]:
    """What the user's code raises becomes an ``InputError``; Ctrl-C and our own errors do not."""
    try:
        yield
    except BaseException as error:
        own = type(error).__module__.startswith(f"{__name__.partition('.')[0]}.")
        if own or isinstance(error, KeyboardInterrupt):
            raise
        happened = f"failed with {type(error).__name__}: {_line(error)}"
        if isinstance(error, SystemExit):
            happened = f"ended with {exit_text(error)}"
        raise InputError(f"{what} {happened}{expected}") from error


def _line(error: BaseException) -> str:
    try:
        return next(iter(str(error).splitlines()), "") or "no message"
    except Exception:
        return "no message"


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

    def require(ok: bool, key: str, wanted: str) -> None:
        if not ok:
            raise InputError(
                f"preprocessing of {name} has {key} {getattr(found, key)!r}; expected {wanted}"
            )

    channels, known = expected[0], get_args(Interpolation)
    require(are_numbers(found.mean, channels), "mean", f"{channels} finite numbers")
    positive = are_numbers(found.std, channels) and min(found.std) > 0
    require(positive, "std", f"{channels} finite numbers above 0")
    crop_ok = is_number(found.crop_pct) and 0 < found.crop_pct <= MOST_CROP
    require(crop_ok, "crop_pct", f"a number above 0, at most {MOST_CROP}")
    require(found.interpolation in known, "interpolation", ", ".join(known))
    rules, offsets = get_args(Resize), get_args(CropOffset)
    require(found.resize in rules, "resize", ", ".join(rules))
    require(found.crop_offset in offsets, "crop_offset", ", ".join(offsets))
    levels = is_fill(found.fill, channels)
    require(levels, "fill", f"nothing, or {channels} levels from 0 to 255")
    same = isinstance(found.input_size, tuple | list) and tuple(found.input_size) == expected
    require(same, "input_size", f"that of the model, {expected}")


def _own_preprocessing(
    name: str, model: Any, input_size: tuple[int, int, int]
) -> tuple[Preprocessing, str]:
    """As the model's own library would treat its images, and what says so."""
    is_open_clip = type(model).__module__.startswith("open_clip.")
    attribute = "preprocess_cfg" if is_open_clip else "pretrained_cfg"
    cfg = getattr(model, attribute, None) or {}
    config = _hf_config(model)
    source = f"that of its {attribute}" if cfg and config is None else "its family's"
    try:
        given = dict(cfg) if isinstance(cfg, dict) else cfg.to_dict()
        if is_open_clip:
            from tome_export.models.open_clip.recipes import preprocessing_of

            return preprocessing_of(input_size[1:], given), source
        if config is not None:
            mean, std = norm_of(config.model_type)
            given = {"mean": mean, "std": std, "crop_pct": 1.0}
        for key in ("mean", "std"):
            count = len(given.get(key) or ())
            # The defaults are for three channels.
            if count != input_size[0] and (count, input_size[0]) != (0, 3):
                given[key] = (0.5,) * input_size[0]
        from tome_export.models.timm.recipes import preprocessing_from_cfg

        return preprocessing_from_cfg({**given, "input_size": input_size}), source
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{name} returned a model whose {attribute} is none ({_line(error)}); return "
            "(nn.Module, Preprocessing), or leave it out"
        ) from None


def _hf_config(model: Any) -> Any:
    """Transformers' configuration of the transformer; None for models of other libraries."""
    config = getattr(getattr(model, "vision_model", model), "config", None)
    return config if hasattr(config, "model_type") else None


def _output(model: Any) -> ModelOutput:
    """Class names, and what makes scores, that a model of Transformers or timm carries."""
    if _hf_config(model) is not None:
        return output_from_config(model.config)
    from tome_export.patch.checks import pretrained_configuration

    names = pretrained_configuration(model).get("label_names")
    return ModelOutput(labels=tuple(map(str, names)) if names else None)
