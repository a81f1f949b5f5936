"""Match and merge by kernels that were compiled elsewhere, started by the CUDA driver.

The same PTX with the same launch parameters as in a TensorRT engine with the plugins.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from benchmarks.gpu.driver import Driver, Loaded, parameters
from tome_export.merge import ops
from tome_export.plugins.match import contract as match_contract
from tome_export.plugins.merge import contract as merge_contract
from tome_export.plugins.store import Binary, KernelStore
from tome_export.plugins.variants import Launch, Variant

ALIGNMENT = 16
"""Bytes; what the kernels are compiled to expect of every pointer."""


def current_stream() -> int:
    """Handle of torch's current stream."""
    return int(torch.cuda.current_stream().cuda_stream)


class PrecompiledKernels:
    """Kernels of a store on one GPU.

    Args:
        store: What was compiled.
        driver: Starts them.
        capability: Compute capability of the GPU.
        stream: Gives the handle of the stream to start them on.
    """

    def __init__(
        self,
        store: KernelStore,
        driver: Driver,
        capability: tuple[int, int],
        stream: Callable[[], int] = current_stream,
    ) -> None:
        self._store, self._driver, self._stream = store, driver, stream
        self._capability = capability
        self._loaded = functools.cache(self._load)

    def binaries(self, variant: Variant) -> list[Binary]:
        """Code of a variant that this GPU runs; what a TensorRT engine would take comes first."""
        kernel = self._store.kernel(variant)
        best = kernel.binary_for(self._capability)
        runs = [binary for binary in kernel.binaries if binary.runs_on(self._capability)]
        return sorted(runs, key=lambda binary: binary != best)

    def loaded(self, binary: Binary) -> Loaded:
        """A kernel on the GPU, loaded at its first use."""
        return self._loaded(binary)

    def _load(self, binary: Binary) -> Loaded:
        return self._driver.load(binary.ptx, binary.entry)

    def start(
        self,
        binary: Binary,
        launch: Launch,
        inputs: Sequence[Tensor],
        outputs: Sequence[Tensor],
    ) -> None:
        """Start a kernel as TensorRT does: inputs, scalars, outputs.

        Raises:
            ValueError: if a tensor does not lie where the kernel was compiled to expect it.
        """
        for tensor in (*inputs, *outputs):
            if tensor.data_ptr() % ALIGNMENT:
                raise ValueError(
                    f"a tensor begins at {tensor.data_ptr():#x}; expected a multiple of {ALIGNMENT}"
                )
        self._driver.start(
            self._loaded(binary),
            launch.grid,
            binary.threads,
            binary.shared_bytes,
            self._stream(),
            parameters(
                [tensor.data_ptr() for tensor in inputs],
                launch.scalars,
                [tensor.data_ptr() for tensor in outputs],
            ),
        )

    def match(
        self, keys: Tensor, r: int, prefix: int, class_token: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """``tome_export::match``: keys ``[B, H, N, D]`` or ``[B, N, D]``, dense in D."""
        keys = keys if keys.ndim == 4 else keys.unsqueeze(1)
        batch, heads, tokens, width = keys.shape
        strides = keys.stride()[:3]
        variant = match_contract.variant(tokens, width, dtype_of(keys), strides)
        launch = match_contract.launch(batch, heads, tokens, width, r, prefix, class_token, strides)
        keep, src, dst = (
            torch.empty((batch, count), dtype=torch.int32, device=keys.device)
            for count in (tokens - r, r, r)
        )
        self.start(self.binaries(variant)[0], launch, (keys,), (keep, src, dst))
        return keep, src, dst

    def merge(
        self, x: Tensor, size: Tensor, keep: Tensor, src: Tensor, dst: Tensor
    ) -> tuple[Tensor, Tensor]:
        """``tome_export::merge``."""
        batch, tokens, width = x.shape
        inputs = [tensor.contiguous() for tensor in (x, size, keep, src, dst)]
        outputs = x.new_empty((batch, keep.shape[1], width)), size.new_empty(keep.shape)
        binary = self.binaries(merge_contract.variant(width, dtype_of(x)))[0]
        self.start(binary, merge_contract.launch(batch, tokens, src.shape[1]), inputs, outputs)
        return outputs


def dtype_of(tensor: Tensor) -> str:
    """Such as ``float16``."""
    return str(tensor.dtype).removeprefix("torch.")


_switch: dict[str, PrecompiledKernels | None] = {"kernels": None}


@functools.cache
def _register(device: str) -> None:
    def match(
        keys: Tensor, r: int, prefix: int, class_token: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        chosen = _switch["kernels"]
        return (chosen.match if chosen else ops.eager_match)(keys, r, prefix, class_token)

    def merge(
        x: Tensor, size: Tensor, keep: Tensor, src: Tensor, dst: Tensor
    ) -> tuple[Tensor, Tensor]:
        chosen = _switch["kernels"]
        return (chosen.merge if chosen else ops.eager_merge)(x, size, keep, src, dst)

    torch.library.register_kernel("tome_export::match", device, match)
    torch.library.register_kernel("tome_export::merge", device, merge)


@contextlib.contextmanager
def use_kernels(kernels: PrecompiledKernels | None, device: str = "cuda") -> Iterator[None]:
    """Inside, the custom operators run these kernels; None: PyTorch's own operations.

    The switch is the whole process's.
    """
    _register(device)
    before = _switch["kernels"]
    _switch["kernels"] = kernels
    try:
        yield
    finally:
        _switch["kernels"] = before
