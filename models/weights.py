"""Making a recipe's model with pretrained, random or the user's own weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tome_export.errors import InputError
from tome_export.models.checkpoint import fit
from tome_export.models.hub import pretrained_overlay, recorded_file
from tome_export.models.recipe import DATA, LoadedModel, Recipe, WeightsInfo
from tome_export.weights.files import read_state, sha256, stored_dtype

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn


def load(recipe: Recipe, weights: str, seed: int, depth: int | None) -> LoadedModel:
    """Make a recipe's model; see ``Recipe.load``."""
    if depth is not None and depth < 1:
        raise InputError(f"depth is {depth}; expected 1 or more blocks")
    if recipe.loader is not None:
        return recipe.loader.load(recipe, weights, seed, depth)
    if weights == "random":
        return _random(recipe, seed, depth)
    if weights != "pretrained":
        return _from_file(recipe, Path(weights), "file", depth)
    if depth is not None:
        raise InputError(
            f"depth {depth} was asked with pretrained weights, which are for all blocks; "
            "use random weights or leave the depth"
        )
    if recipe.factory is not None:
        module = recipe.factory()
        source, stored = f"returned by {recipe.name}", stored_dtype(module.parameters())
        return loaded(module, recipe, WeightsInfo("function", source, stored_dtype=stored))
    if recipe.bundled is not None:
        return _from_file(recipe, DATA / recipe.bundled, "bundled", None)
    return _pretrained(recipe)


def architecture(recipe: Recipe) -> nn.Module:
    """The recipe's model without memory for its weights, to be counted and looked at."""
    import torch

    if recipe.loader is not None:
        return recipe.loader.architecture().eval()
    if recipe.factory is not None:
        return recipe.factory().eval()
    with torch.device("meta"):
        return _create(recipe).eval()


def _random(recipe: Recipe, seed: int, depth: int | None) -> LoadedModel:
    if recipe.factory is not None:
        raise InputError(
            f"random weights were asked for {recipe.name}, whose function makes its own; "
            "leave --weights out"
        )
    return random_model(recipe, seed, lambda: _create(recipe, depth=depth))


def random_model(recipe: Recipe, seed: int, create: Callable[[], nn.Module]) -> LoadedModel:
    """A model of random weights that all matter; torch's generator is left as it was.

    Args:
        recipe: What is made.
        seed: Of the weights.
        create: Makes the module, freshly initialised.
    """
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = create()
        wake_constants(module)
    return loaded(module, recipe, WeightsInfo("random", f"random, seed {seed}", seed=seed))


def wake_constants(module: nn.Module) -> None:
    """Give parameters that start out constant values that matter. Uses torch's global generator.

    A fresh model hides mistakes: a zero head answers zero whatever comes in, LayerScale at 1e-5
    switches every block off, class and register tokens are all but zero, and norm weights of one
    and biases of zero could be dropped unnoticed. So each parameter whose values lie within 1e-3
    of each other gets normal noise of standard deviation 0.02, and a LayerScale (``gamma``) is
    first set to 0.5, so that the blocks act on the tokens.

    Args:
        module: A freshly initialised model; changed in place.
    """
    import torch

    with torch.no_grad():
        for name, value in module.named_parameters():
            if value.numel() > 1 and value.max() - value.min() < 1e-3:
                if name.rpartition(".")[2].startswith("gamma"):
                    value.fill_(0.5)
                value.add_(torch.randn(value.shape) * 0.02)


def _from_file(recipe: Recipe, path: Path, kind: Any, depth: int | None) -> LoadedModel:
    whole = read_state(path)
    learned = {key: v for key, v in whole.items() if key.startswith(recipe.reducer_keys)}
    state = {key: value for key, value in whole.items() if key not in learned}
    if recipe.factory is not None:
        if depth is not None:
            raise InputError(
                f"depth {depth} was asked for {recipe.name}, whose function makes the model; "
                "leave the depth"
            )
        module, changed = recipe.factory(), recipe
    else:
        classes = _head_classes(state, path)
        module = _create(recipe, depth=depth, num_classes=classes, global_pool=_pooling(state))
        logits = classes and classes != _embedding(recipe)
        changed = replace(recipe, output_name="logits") if logits else recipe
    stored = stored_dtype(state.values())
    state, remark = fit(module, state, path, recipe.timm_name.partition(".")[0])
    module.load_state_dict(state, strict=True)
    source = f"{path.name}; {remark}" if remark else path.name
    info = WeightsInfo(kind, source, sha256(path), stored_dtype=stored)
    return replace(loaded(module, changed, info), learned=learned)


def _head_classes(state: dict[str, Tensor], path: Path) -> int | None:
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


def _pooling(state: dict[str, Tensor]) -> str | None:
    """The mean for a norm behind the pooling and none before it: fine-tuned MAE; else None."""
    return "avg" if "fc_norm.weight" in state and "norm.weight" not in state else None


def _embedding(recipe: Recipe) -> int | None:
    """Width of the image features that timm keeps as the head of CLIP's towers; else None."""
    from timm import get_pretrained_cfg

    cfg = get_pretrained_cfg(recipe.timm_name) if recipe.output_name == "features" else None
    return int(cfg.num_classes) if cfg is not None else None


def _pretrained(recipe: Recipe) -> LoadedModel:
    overlay = pretrained_overlay(recipe)
    try:
        module = _create(recipe, pretrained=True, pretrained_cfg_overlay=overlay)
    # What the network or the hub does to a download half-way comes as many classes, most of them
    # OSError or RuntimeError; the cause is in the message.
    except (OSError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"pretrained weights of {recipe.name} could not be loaded ({reason}); give a "
            "downloaded .safetensors or .pth file with --weights PATH, or try the toolchain "
            "with --weights random"
        ) from None
    path = recorded_file(recipe)
    info = WeightsInfo("pretrained", recipe.weights_source)
    if path is not None:
        info = replace(info, sha256=sha256(path), stored_dtype=_stored_in(path))
    return loaded(module, recipe, info)


def _stored_in(path: Path) -> str:
    """The type that a weights file of the hub's cache holds, which timm has widened."""
    from safetensors import safe_open

    if path.suffix != ".safetensors":
        return stored_dtype(read_state(path).values())
    with safe_open(path, framework="pt") as opened:
        return stored_dtype(opened.get_tensor(name) for name in opened.keys())  # noqa: SIM118


def _create(recipe: Recipe, **arguments: Any) -> nn.Module:
    from timm import create_model

    given = {key: value for key, value in arguments.items() if value is not None}
    module: nn.Module = create_model(recipe.timm_name, **{**dict(recipe.timm_kwargs), **given})
    return module


def loaded(module: nn.Module, recipe: Recipe, weights: WeightsInfo) -> LoadedModel:
    """The model as every later stage expects it: eval mode, float32, without gradients."""
    return LoadedModel(module.eval().float().cpu().requires_grad_(False), recipe, weights)
