"""What the families of Hugging Face Transformers share: attention, checks, and their layout."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tome_export.errors import InputError
from tome_export.merge.macs import BlockCost
from tome_export.patch.base import ModelLayout
from tome_export.patch.checks import ONE_DEVICE, check_unhooked
from tome_export.reducers.base import AttentionInputs
from tome_export.spec import PatchGrid

ATTENTIONS = ("sdpa", "eager")
"""Attention implementations that take an additive bias; flash kernels take none."""

PLAIN = (nn.Conv2d, nn.Embedding, nn.LayerNorm, nn.Linear, nn.Dropout, nn.Identity, nn.ModuleList)
_FITTED = "tome_export.patch.hf.positions"
QUANTISED = ("torch.ao.", "torchao.", "bitsandbytes.", "peft.", "gptqmodel.", "awq.", "optimum.")
"""Packages whose modules compute with codes, or add to another module's output."""

ACTIVATIONS = (nn.GELU, nn.ReLU, nn.ReLU6, nn.SiLU, nn.Sigmoid, nn.Tanh, nn.LeakyReLU, nn.Mish)


def class_names(model: str, *names: str) -> tuple[str, ...]:
    """Full names of the library's classes of one of its models, such as ``clip``."""
    return tuple(f"transformers.models.{model}.modeling_{model}.{name}" for name in names)


def attention(
    module: Any,
    projections: Sequence[nn.Module],
    x: Tensor,
    bias: Tensor | None,
    head_width: int,
    scaling: float,
    dropout: float,
) -> tuple[Tensor, AttentionInputs]:
    """Attention by the library's own interface, with proportional attention as an additive mask.

    The module's configuration names the implementation; ``projections`` are its linear layers of
    queries, keys and values. ``x [B, N, C]``, already normalised, and ``bias [B, 1, N, N]`` or
    None, to ``[B, N, H * D]`` ahead of the output projection, and what was compared.
    """
    q, k, v = (part(x).view(*x.shape[:-1], -1, head_width).transpose(1, 2) for part in projections)
    dropout = dropout if module.training else 0.0
    if module.config._attn_implementation == "eager":
        out = _eager(q, k, v, bias, scaling, dropout)
    else:
        # Not at the top: the library is optional.
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        out, _ = ALL_ATTENTION_FUNCTIONS["sdpa"](
            module, q, k, v, bias, scaling=scaling, dropout=dropout, is_causal=False
        )
    return out.flatten(2), AttentionInputs(k, q, scaling, bias, x)


def _eager(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scaling: float, dropout: float
) -> Tensor:
    """The library's eager attention, ``[B, N, H, D]``.

    Written out because the library keeps it apart from its interface, and because that of ViT,
    DeiT and DINOv2 in transformers 4 multiplies by the mask, which is a head mask there.
    """
    logits = torch.matmul(q, k.transpose(-1, -2)) * scaling
    if bias is not None:
        logits = logits + bias
    # The library's is float32 always, which would round the float64 pass that errors are
    # measured with.
    wide = torch.promote_types(q.dtype, torch.float32)
    weights = functional.softmax(logits, dim=-1, dtype=wide).to(q.dtype)
    weights = functional.dropout(weights, p=dropout)
    return torch.matmul(weights, v).transpose(1, 2)


def check_attention(found: object, name: str) -> None:
    """Refuse an implementation of attention, by the library's name, that takes no additive bias."""
    if found not in ATTENTIONS:
        raise InputError(
            f"attention implementation {found!r} of model {name} takes no additive bias, which "
            f"token merging needs; load it with attn_implementation={ATTENTIONS[0]!r} or "
            f"{ATTENTIONS[1]!r}"
        )


def check_placed(model: nn.Module, name: str) -> None:
    """Refuse a model that a device map has spread, sharded or offloaded.

    A model that is on the meta device as a whole is only looked at, and passes.
    """
    hooked = next((where for where, m in model.named_modules() if hasattr(m, "_hf_hook")), None)
    devices = sorted({str(parameter.device) for parameter in model.parameters()})
    if hooked is None and len(devices) <= 1:
        return
    what = f"is on {', '.join(devices)}" if len(devices) > 1 else "has accelerate's hooks"
    raise InputError(
        f"model {name} {what}: a device map has placed it, and its hooks move tensors that "
        f"merging would not see; {ONE_DEVICE}"
    )


def classifiers_of(model: nn.Module) -> dict[str, nn.Module]:
    """The classifiers of a model by name, whatever modules they are; none of a bare model."""
    names = ("classifier", "cls_classifier", "distillation_classifier")
    found = {name: getattr(model, name, None) for name in names}
    return {name: head for name, head in found.items() if isinstance(head, nn.Module)}


def is_fitted(part: nn.Module) -> bool:
    """Whether it is one of ``patch.hf.positions``, which is not imported where none is."""
    return type(part).__module__ == _FITTED


def check_modules(module: nn.Module, name: str) -> None:
    """Refuse modules that are not the library's own, such as quantised layers.

    A classifier may be any module: it sees what is left of an image, whose tokens are merged.
    """
    home = type(module).__module__
    inside = {id(part) for head in classifiers_of(module).values() for part in head.modules()}
    for where, part in module.named_modules():
        cls = type(part)
        if id(part) in inside and not cls.__module__.startswith(QUANTISED):
            continue
        known = (home, "transformers.activations", _FITTED)
        if cls.__module__ in known or cls in PLAIN + ACTIVATIONS:
            continue
        if cls is nn.MultiheadAttention or cls.__name__ == "NonDynamicallyQuantizableLinear":
            continue
        of = cls.__module__.partition(".")[0]
        fix = "expected the library's own modules everywhere but in the classifier"
        if cls.__module__.startswith(QUANTISED):
            fix = "load the model without quantisation or adapters"
        raise InputError(
            f"module {where} of model {name} is a {of} {cls.__name__}, which is not supported; "
            f"{fix}"
        )


def grid_from_config(config: Any, name: str) -> PatchGrid:
    """How images are cut, from the configuration of a model."""
    height, width = pair(config.image_size)
    tall, wide = pair(config.patch_size)
    if height % tall or width % wide:
        raise InputError(
            f"model {name} has an image size of {height} x {width}, which is not a multiple of "
            f"its patch size of {tall} x {wide}; correct its configuration"
        )
    return PatchGrid(height // tall, width // wide, tall, wide)


def pair(size: Any) -> tuple[int, int]:
    """Height and width of a configuration's size."""
    height, width = size if isinstance(size, Iterable) else (size, size)
    return int(height), int(width)


def library_layout(
    model: Any, layers: Sequence[nn.Module], prefix: int, cost: Callable[[Any], BlockCost]
) -> ModelLayout:
    """Check a model of the library and say what merging needs to know of it."""
    name = type(model).__name__
    check_placed(model, name)
    check_unhooked(model, name)
    check_modules(model, name)
    config = getattr(model.config, "vision_config", model.config)
    check_attention(config._attn_implementation, name)
    grid = grid_from_config(config, name)
    return ModelLayout(
        blocks=layers,
        costs=[cost(layer) for layer in layers],
        width=int(config.hidden_size),
        input_size=(int(config.num_channels), *pair(config.image_size)),
        tokens=grid.patches + prefix,
        prefix=prefix,
        class_token=prefix > 0,
        grid=grid,
    )
