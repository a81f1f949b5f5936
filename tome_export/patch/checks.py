"""What every family refuses, and how models are named in messages."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from tome_export.errors import InputError

Zeros = Callable[..., Tensor]


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


def require(module: nn.Module, known: set[type], role: str, model_name: str) -> None:
    """Refuse a module by name unless its class is one of those understood, not a subclass.

    Raises:
        InputError: naming the class and the classes that are supported.
    """
    if type(module) not in known:
        names = ", ".join(sorted(cls.__name__ for cls in known))
        raise InputError(
            f"{role} class {type(module).__name__} of model {model_name} is not supported; "
            f"supported: {names}"
        )


def counted_macs(model: nn.Module, run: Callable[[Zeros], None]) -> int:
    """MACs of some modules of a model, as torch counts them, without computing anything.

    Args:
        model: Has the parameters, of whichever device and dtype.
        run: Calls the modules; is given a function that makes their inputs, tensors of zeros of a
            shape.
    """
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
    cfg = getattr(model, "pretrained_cfg", None) or {}
    return str(cfg.get("architecture") or type(model).__name__)
