"""The kernels behind ``tome_export::match`` and ``tome_export::merge`` on CUDA tensors."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from tome_export.merge import spec
from tome_export.plugins.aot import PTX_VERSIONS
from tome_export.plugins.match import contract as match_contract
from tome_export.plugins.merge import contract as merge_contract

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    Plan = tuple[Tensor, Tensor, Tensor]
    Match = Callable[[Tensor, int, int, bool], Plan]
    Merge = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def match(keys: Tensor, r: int, prefix: int, class_token: bool) -> Plan:
    """Run the TomeMatch kernel.

    Args and returns: as ``merge.ops.match``. Keys are float32, float16 or bfloat16 on CUDA (on the
    CPU where the Triton interpreter is on); r may be 0.

    Raises:
        ValueError: if the kernel cannot take the keys, or r or prefix is out of range.
    """
    import torch

    from tome_export.plugins.match.kernel import match_kernel

    if keys.ndim == 3:
        keys = keys.unsqueeze(1)
    # The kernel counts the elements up to a token in 32 bits.
    if keys.stride(-1) != 1 or keys.stride(2) * keys.shape[2] >= 1 << 31:
        keys = keys.contiguous()
    batch, heads, tokens, width = keys.shape
    dtype = _name(keys)
    limit = spec.clamp_r(tokens, tokens, prefix)
    reason = match_contract.refusal(tokens, width, dtype)
    if reason:
        raise ValueError(reason)
    if not 0 <= prefix <= tokens:
        raise ValueError(f"prefix is {prefix}; expected 0 to {tokens} for {tokens} tokens")
    if not 0 <= r <= limit:
        raise ValueError(f"r is {r}; expected 0 to {limit} for {tokens} tokens")
    strides = keys.stride()[:3]
    variant = match_contract.variant(tokens, width, dtype, strides)
    launch = match_contract.launch(batch, heads, tokens, width, r, prefix, class_token, strides)
    shapes = ((batch, tokens - r), (batch, r), (batch, r))
    outputs = [torch.empty(shape, dtype=torch.int32, device=keys.device) for shape in shapes]
    if batch:
        _start(match_kernel, variant, launch, (keys,), outputs)
    keep, src, dst = outputs
    return keep, src, dst


def merge(x: Tensor, size: Tensor, keep: Tensor, src: Tensor, dst: Tensor) -> tuple[Tensor, Tensor]:
    """Run the TomeMerge kernel.

    Args and returns: as ``merge.ops.merge``. x is float32, float16 or bfloat16 on CUDA (on the CPU
    where the Triton interpreter is on).

    Raises:
        ValueError: if the kernel cannot take x.
    """
    from tome_export.plugins.merge.kernel import merge_kernel

    batch, tokens, width = x.shape
    dtype = _name(x)
    reason = merge_contract.refusal(width, dtype)
    if reason:
        raise ValueError(reason)
    inputs = [tensor.contiguous() for tensor in (x, size, keep, src, dst)]
    kept, r = keep.shape[1], src.shape[1]
    outputs = [x.new_empty((batch, kept, width)), size.new_empty((batch, kept))]
    if batch and kept:
        launch = merge_contract.launch(batch, tokens, r)
        _start(merge_kernel, merge_contract.variant(width, dtype), launch, inputs, outputs)
    return outputs[0], outputs[1]


def _start(kernel: Any, variant: Any, launch: Any, inputs: Any, outputs: Any) -> None:
    import torch

    # A launch goes to the current GPU, which need not be that of the tensors.
    with torch.cuda.device(inputs[0].get_device()):
        kernel[launch.grid](
            *inputs,
            *launch.scalars,
            *outputs,
            **variant.constants,
            num_warps=variant.num_warps,
            num_stages=1,
            maxnreg=variant.max_registers,
        )


def _name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


_state = {"installed": False, "enabled": True}


def install(eager_match: Match, eager_merge: Merge) -> bool:
    """Make the custom operators run the kernels on CUDA tensors, once per process.

    What the kernels cannot take (float64, very wide tokens) still runs the eager functions, and so
    does a GPU on which a trial launch fails, as where the Triton language finds no C compiler; a
    warning then gives the reason. Returns whether the kernels are installed, which takes the Triton
    language.
    """
    import torch

    if _state["installed"] or importlib.util.find_spec("triton") is None:
        return _state["installed"]

    def match_cuda(keys: Tensor, r: int, prefix: int, class_token: bool) -> Plan:
        refused = match_contract.refusal(keys.shape[-2], keys.shape[-1], _name(keys))
        chosen = match if not refused and _use(keys.device) else eager_match
        return chosen(keys, r, prefix, class_token)

    def merge_cuda(
        x: Tensor, size: Tensor, keep: Tensor, src: Tensor, dst: Tensor
    ) -> tuple[Tensor, Tensor]:
        refused = merge_contract.refusal(x.shape[-1], _name(x)) or size.dtype != torch.float32
        chosen = merge if not refused and _use(x.device) else eager_merge
        return chosen(x, size, keep, src, dst)

    torch.library.register_kernel("tome_export::match", "cuda", match_cuda)
    torch.library.register_kernel("tome_export::merge", "cuda", merge_cuda)
    _state["installed"] = True
    return True


def _use(device: torch.device) -> bool:
    return _state["enabled"] and _works_on(device)


@functools.cache
def _works_on(device: torch.device) -> bool:
    """Whether the kernels start on a GPU; if not, a warning says why."""
    import torch

    try:
        if torch.cuda.get_device_capability(device) < min(PTX_VERSIONS):
            return False
        plan = match(torch.zeros(1, 1, 4, 16, device=device), 1, 0, False)
        merge(torch.zeros(1, 4, 16, device=device), torch.ones(1, 4, device=device), *plan)
    # The compiler, the C compiler it calls and the driver fail with any class.
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        warnings.warn(
            f"match and merge run PyTorch's own operations on {device}, which is slower: their "
            f"kernels do not start ({reason})",
            RuntimeWarning,
            stacklevel=2,
        )
        return False
    return True


@contextlib.contextmanager
def eager() -> Iterator[None]:
    """Run the eager operations on CUDA inside this context, to compare with the kernels.

    The switch is the whole process's, not the thread's.
    """
    before = _state["enabled"]
    _state["enabled"] = False
    try:
        yield
    finally:
        _state["enabled"] = before
