"""PyTorch, on the GPU where there is one, else on the CPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from tome_export.errors import InputError
from tome_export.runtime.runner import Arrays, Backend, Runnable, Runner
from tome_export.spec import INPUT_NAME

if TYPE_CHECKING:
    import numpy as np
    from torch import nn


class Torch(Backend):
    """Runs the model itself, in its precision, without any export."""

    name = "torch"
    title = "PyTorch"
    opens = "module"

    def missing(self) -> str | None:
        """See ``Backend.missing``."""
        return None

    @contextlib.contextmanager
    def open(self, runnable: Runnable) -> Iterator[Runner]:
        """See ``Backend.open``."""
        from tome_export.onnx.export import in_precision

        if runnable.module is None:
            raise InputError(f"{runnable.label} has no PyTorch model; choose another backend")
        module = in_precision(runnable.module, runnable.precision)
        with TorchRunner(module, runnable.output_name) as runner:
            yield runner

    def on_gpu(self) -> bool:
        """See ``Backend.on_gpu``."""
        import torch

        return torch.cuda.is_available()


@contextlib.contextmanager
def convolutions_without_tf32() -> Iterator[None]:
    """Let cuDNN convolve float32 in float32; a switch of the whole process.

    By default PyTorch lets it round the factors to the 10 bits of TF32, in convolutions but not in
    matrix products (``torch.backends.cudnn.allow_tf32``).
    """
    from torch.backends import cudnn

    with cudnn.flags(
        enabled=cudnn.enabled,
        benchmark=cudnn.benchmark,
        benchmark_limit=cudnn.benchmark_limit,
        deterministic=cudnn.deterministic,
        allow_tf32=False,
    ):
        yield


class TorchRunner:
    """A torch module in eval mode behind arrays; it runs in the dtype of its weights.

    Args:
        module: Takes ``pixel_values``, and what its ``extra_inputs`` names if it has any, and gives
            one tensor, or that first; not changed, copied if it has to move.
        output_name: Name of that tensor.
    """

    def __init__(self, module: nn.Module, output_name: str) -> None:
        import copy

        import torch

        parameter = next(module.parameters())
        self._dtype = parameter.dtype
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        if parameter.device.type != self.device:
            module = copy.deepcopy(module).to(self.device)
        self._module = module.eval()
        self._output_name = output_name

    def __enter__(self) -> TorchRunner:
        return self

    def __exit__(self, *_: object) -> None:
        del self._module

    def infer(self, inputs: Arrays) -> dict[str, np.ndarray[Any, Any]]:
        """Run one batch; the result is on the host when this returns."""
        import torch

        from tome_export.patch.precision import floats_to

        names = (INPUT_NAME, *getattr(self._module, "extra_inputs", ()))
        with torch.inference_mode(), convolutions_without_tf32():
            given = (torch.from_numpy(inputs[name]).to(self.device) for name in names)
            output = self._module(*(floats_to(x, self._dtype) for x in given))
        # A source map, where there is one, comes second and is not the model's own output.
        main = output[0] if isinstance(output, tuple) else output
        return {self._output_name: main.float().cpu().numpy()}
