"""Recipes for the user's own models: ``module:function``."""

from __future__ import annotations

import copy
import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tome_export.errors import InputError, TomeExportError
from tome_export.models.recipe import RULE, Recipe, recommended_r
from tome_export.spec import Preprocessing

if TYPE_CHECKING:
    from torch import nn


def recipe_from_function(name: str) -> Recipe:
    """Call ``module:function``, which returns an ``nn.Module`` or (module, ``Preprocessing``).

    The module is looked for on the Python path and in the current folder. Without a
    ``Preprocessing``, the model's own timm configuration is used, else the image size of its patch
    embedding with ImageNet's mean and standard deviation.

    Args:
        name: Such as ``mymodels:vit``.

    Raises:
        InputError: if there is no such function, it fails, or returns something else.
    """
    module, preprocessing = _call(name)
    model: Any = module
    embed = getattr(model, "patch_embed", None)
    patches = getattr(embed, "num_patches", None)
    blocks = getattr(model, "blocks", None)
    if patches is None or blocks is None:
        raise InputError(
            f"{name} returned a {type(module).__name__}, which has no sequence of tokens to merge; "
            "expected a timm VisionTransformer"
        )
    if preprocessing is None:
        preprocessing = _preprocessing(model)
    tokens = int(patches) + int(getattr(model, "num_prefix_tokens", 0))
    return Recipe(
        name=name,
        family="custom",
        preprocessing=preprocessing,
        recommended_r=recommended_r(tokens, len(blocks)),
        r_source=RULE,
        output_name="logits" if getattr(model, "num_classes", 0) else "features",
        description=f"{type(module).__name__} from {name}",
        weights_source=f"returned by {name}",
        factory=lambda: copy.deepcopy(module),
    )


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


def _preprocessing(model: Any) -> Preprocessing:
    from tome_export.models.timm_names import preprocessing_from_cfg

    cfg = getattr(model, "pretrained_cfg", None) or {}
    values = dict(cfg) if isinstance(cfg, dict) else cfg.to_dict()
    size = getattr(model.patch_embed, "img_size", None)
    if size is None:
        raise InputError(
            f"the image size of {type(model).__name__} is not known; "
            "return (module, Preprocessing) from the function"
        )
    channels = int(getattr(model, "in_chans", 3))
    values["input_size"] = (channels, int(size[0]), int(size[1]))
    for key in ("mean", "std"):
        given = len(values.get(key) or ())
        if given != channels and (given, channels) != (0, 3):
            values[key] = (0.5,) * channels
    return preprocessing_from_cfg(values)


def _line(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else "no message"
