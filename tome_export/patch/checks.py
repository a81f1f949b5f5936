"""What every family refuses, and how models are named in messages."""

from __future__ import annotations

from torch import nn

from tome_export.errors import InputError


def check_plain(model: nn.Module, name: str) -> None:
    """Refuse what patching would bypass: hooks, and ``forward`` methods put on single modules."""
    for where, module in model.named_modules():
        hooks = len(module._forward_hooks) + len(module._forward_pre_hooks)
        if hooks or "forward" in vars(module):
            what = "a forward hook" if hooks else "a forward method of its own"
            raise InputError(
                f"module {where or '(the model)'} of model {name} has {what}, which patching would "
                "bypass; remove it (a model placed by accelerate or a device map: patch it before)"
            )


def model_name(model: nn.Module) -> str:
    """Timm's name of the model if it has one, else its class."""
    cfg = getattr(model, "pretrained_cfg", None) or {}
    return str(cfg.get("architecture") or type(model).__name__)
