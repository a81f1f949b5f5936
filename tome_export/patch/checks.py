"""What every family refuses, and how models are named in messages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tome_export.errors import InputError

MakeZeros = Callable[..., Tensor]

COPYABLE = (
    "expected one that copy.deepcopy copies: leave locks, open files and tensors with a gradient "
    "out"
)
"""What a model of a user's has to be, for messages."""

_COLLECTING = "transformers.utils.output_capturing"

ONE_DEVICE = (
    "a merged model runs on one device: load the model without device_map or offload, patch it, "
    "and move the patched model with .to(device)"
)


def check_unhooked(model: nn.Module, name: str) -> None:
    """Refuse what patching would bypass: hooks, and ``forward`` methods put on single modules."""
    for where, module in model.named_modules():
        # Those by which Transformers collects hidden states are put in place by a forward pass.
        own = [h for h in module._forward_hooks.values() if h.__module__ == _COLLECTING]
        hooks = len(module._forward_hooks) + len(module._forward_pre_hooks) - len(own)
        if hooks or "forward" in vars(module):
            what = "a forward hook" if hooks else "a forward method of its own"
            raise InputError(
                f"module {where or '(the model)'} of model {name} has {what}, which patching would "
                "bypass; remove it (of a model that accelerate or a device map has placed: "
                f"{ONE_DEVICE})"
            )


def check_undispatched(model: nn.Module) -> None:
    """Refuse a patched model whose inner modules accelerate has given hooks since.

    Its hooks move each module's weights when the module is called, and merging calls the parts of
    layers, not the layers. Not looked at while a graph is traced.
    """
    if torch.compiler.is_compiling():
        return
    # Not by modules(), which takes five times as long, and this is done at every forward pass.
    left, hooked = [model], False
    while left and not hooked:
        attributes = vars(left.pop())
        hooked = "_hf_hook" in attributes
        left += [part for part in attributes["_modules"].values() if part is not None]
    if not hooked:
        return
    where = next(name for name, part in model.named_modules() if "_hf_hook" in vars(part))
    raise InputError(
        f"module {where or '(the model)'} of patched model {model_name(model)} has a hook of "
        "accelerate, which moves tensors where merging would not see it (dispatched or offloaded "
        f"after patching); {ONE_DEVICE}"
    )


def require(module: nn.Module, known: set[type], role: str, model_name: str) -> None:
    """Refuse a module by name unless its class is one of those understood, not a subclass."""
    if type(module) not in known:
        names = ", ".join(sorted(cls.__name__ for cls in known))
        raise InputError(
            f"{role} class {type(module).__name__} of model {model_name} is not supported; "
            f"supported: {names}"
        )


def count_macs(model: nn.Module, run: Callable[[MakeZeros], None]) -> int:
    """MACs of some modules of a model, as torch counts them, without computing anything."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    counter = FlopCounterMode(display=False)
    # The counter follows parameters by their gradient functions, and knows no fused attention
    # of the CPU.
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake, torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        parameter = next(model.parameters())
        run(lambda *shape: torch.zeros(shape, dtype=parameter.dtype, device=parameter.device))
    return int(counter.get_total_flops()) // 2


def model_name(model: nn.Module) -> str:
    """Timm's name of the model if it has one, else its class."""
    return str(pretrained_configuration(model).get("architecture") or type(model).__name__)


def pretrained_configuration(model: nn.Module) -> dict[str, Any]:
    """What timm says of a model's pretrained weights; empty if it says nothing."""
    cfg: Any = getattr(model, "pretrained_cfg", None) or {}
    cfg = cfg.to_dict() if hasattr(cfg, "to_dict") else cfg
    if not isinstance(cfg, dict):
        raise InputError(
            f"pretrained_cfg of the {type(model).__name__} is a {type(cfg).__name__}; expected "
            "timm's dictionary: leave it as timm made it"
        )
    return cfg
