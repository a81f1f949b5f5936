"""Runs the plugin kernels on the CPU, in a process whose Triton interpreter is on.

The interpreter replaces the compiler when ``triton`` is imported, and other tests compile for real,
so it gets a process of its own: ``conftest.py`` starts this file and sends it cases over a pipe.
"""

from __future__ import annotations

import pickle
import sys
from typing import Any

import torch
from torch import Tensor

from tome_export.merge import spec
from tome_export.plugins import torch_ops
from tome_export.plugins.match import contract as match_contract
from tome_export.plugins.merge import contract as merge_contract

GUARD = 1000
"""Elements before and after a guarded buffer."""

GUARD_INDEX = -77_777


def guarded(tensor: Tensor, value: float) -> tuple[Tensor, Tensor]:
    """The tensor inside a larger buffer full of ``value``: (the view, the whole buffer)."""
    whole = torch.full((tensor.numel() + 2 * GUARD,), value, dtype=tensor.dtype)
    view = whole[GUARD : GUARD + tensor.numel()].view(tensor.shape)
    view.copy_(tensor)
    return view, whole


def match_guarded(
    keys: Tensor, r: int, prefix: int, class_token: bool, **where: int
) -> tuple[tuple[Tensor, Tensor, Tensor], bool]:
    """TomeMatch with NaN around the keys and known values in and around the outputs.

    It is started as TensorRT starts it: ``where`` are the attributes of keys in a product.

    Returns:
        The plan, and whether all that surrounds it is untouched.
    """
    from tome_export.plugins.match.kernel import match_kernel

    batch = len(keys)
    heads, tokens, width, *lie = spec.keys_view(keys.shape[1:], **where)
    view, _ = guarded(keys, float("nan"))
    shapes = ((batch, tokens - r), (batch, r), (batch, r))
    outputs = [
        guarded(torch.full(shape, GUARD_INDEX, dtype=torch.int32), GUARD_INDEX) for shape in shapes
    ]
    variant = match_contract.variant(tokens, width, torch_ops._name(keys), *lie)
    launch = match_contract.launch(batch, heads, tokens, width, r, prefix, class_token, *lie)
    torch_ops._start(match_kernel, variant, launch, (view,), [out for out, _ in outputs])
    keep, src, dst = (out for out, _ in outputs)
    return (keep, src, dst), _untouched(outputs, GUARD_INDEX)


def keys_loaded(keys: Tensor) -> int:
    """How many numbers TomeMatch loads, each as often as it is loaded."""
    from triton.runtime.interpreter import InterpreterBuilder

    load, count = InterpreterBuilder.create_masked_load, 0

    def counted(self: Any, ptrs: Any, mask: Any, *rest: Any) -> Any:
        nonlocal count
        count += int(mask.data.sum())
        return load(self, ptrs, mask, *rest)

    InterpreterBuilder.create_masked_load = counted
    try:
        torch_ops.match(keys, 1, 0, False)
    finally:
        InterpreterBuilder.create_masked_load = load
    return count


def merge_guarded(
    x: Tensor, size: Tensor, keep: Tensor, src: Tensor, dst: Tensor
) -> tuple[Tensor, Tensor, bool]:
    """TomeMerge with NaN around x and size, and known values around the outputs."""
    from tome_export.plugins.merge.kernel import merge_kernel

    (batch, tokens, width), kept, r = x.shape, keep.shape[1], src.shape[1]
    inputs = [guarded(tensor, float("nan"))[0] for tensor in (x, size)]
    inputs += [guarded(tensor, 0)[0] for tensor in (keep, src, dst)]
    outputs = [
        guarded(torch.full((batch, kept, width), 3.0, dtype=x.dtype), 3.0),
        guarded(torch.full((batch, kept), 3.0), 3.0),
    ]
    variant = merge_contract.variant(width, torch_ops._name(x))
    launch = merge_contract.launch(batch, tokens, r)
    torch_ops._start(merge_kernel, variant, launch, inputs, [out for out, _ in outputs])
    return outputs[0][0], outputs[1][0], _untouched(outputs, 3.0)


def _untouched(outputs: list[tuple[Tensor, Tensor]], value: float) -> bool:
    ends = [end for _, whole in outputs for end in (whole[:GUARD], whole[-GUARD:])]
    return all(bool((end == value).all()) for end in ends)


def dispatched() -> dict[str, str]:
    """What the functions that ``install`` registers for CUDA run, on CPU tensors: by case."""
    from tome_export.merge import ops

    ran: list[str] = []

    def eager_match(keys: Tensor, r: int, prefix: int, class_token: bool) -> Any:
        ran.append("eager")
        return ops.eager_match(keys, r, prefix, class_token)

    def eager_merge(*inputs: Tensor) -> Any:
        ran.append("eager")
        return ops.eager_merge(*inputs)

    def outcome(function: Any, expected: Any, *arguments: Any) -> str:
        ran.clear()
        same = zip(function(*arguments), expected(*arguments), strict=True)
        assert all(torch.allclose(a, b) and a.dtype == b.dtype for a, b in same)
        return ran[0] if ran else "kernel"

    # The trial launch needs a GPU; under the interpreter the kernels run on the CPU.
    torch_ops._works_on = lambda _: True  # type: ignore[assignment]
    assert torch_ops.install(eager_match, eager_merge)
    assert torch_ops.install(eager_match, eager_merge), "a second call installs nothing new"
    match, merge = (op._backend_fns["cuda"] for op in (ops._match, ops._merge))
    keys, x, size = torch.randn(1, 2, 9, 8), torch.randn(1, 9, 4), torch.ones(1, 9)
    plan = ops.match(keys, 3, 1, True)

    def matched(keys: Tensor) -> str:
        return outcome(match, ops.eager_match, keys, 3, 1, True)

    def merged(x: Tensor, size: Tensor) -> str:
        return outcome(merge, ops.eager_merge, x, size, *plan)

    found = {
        "match float32": matched(keys),
        "match a metric": matched(keys[:, 0]),
        "match float64": matched(keys.double()),
        "match wide heads": matched(torch.randn(1, 1, 9, 1025)),
        "merge float32": merged(x, size),
        "merge float64": merged(x.double(), size.double()),
        "merge float64 size": merged(x, size.double()),
        "merge wide tokens": merged(torch.randn(1, 9, 8193), size),
    }
    with torch_ops.eager():
        found |= {"match in eager()": matched(keys), "merge in eager()": merged(x, size)}
        with torch_ops.eager():
            pass
        found["match after an inner eager()"] = matched(keys)
    found["match after eager()"] = matched(keys)
    try:
        with torch_ops.eager():
            raise KeyError
    except KeyError:
        found["merge after eager() failed"] = merged(x, size)
    return found


def main() -> None:
    """Answer requests on standard input until it closes: function, arguments, named ones."""
    functions = {
        "match": torch_ops.match,
        "merge": torch_ops.merge,
        "match_guarded": match_guarded,
        "keys_loaded": keys_loaded,
        "merge_guarded": merge_guarded,
        "dispatched": dispatched,
    }
    torch.set_num_threads(1)
    answers, sys.stdout = sys.stdout.buffer, sys.stderr
    while True:
        try:
            name, arguments, options = pickle.load(sys.stdin.buffer)  # noqa: S301 - from our own parent
        except EOFError:
            return
        answer: tuple[bool, Any]
        try:
            answer = True, functions[name](*arguments, **options)
        except Exception as error:
            answer = False, (type(error).__name__, str(error))
        pickle.dump(answer, answers)
        answers.flush()


if __name__ == "__main__":
    main()
