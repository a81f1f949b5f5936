# Annotations are read as objects by TensorRT, so this module cannot postpone their evaluation.
"""The operators as TensorRT's quickly deployable plugins, with kernels compiled ahead of time.

Registration is needed while an engine is built. The kernels are inside the engine, which runs in
any process of TensorRT, without Python, this package or a plugin library.
"""

from types import ModuleType
from typing import Any

from tome_export.errors import InputError, MissingComponentError
from tome_export.merge import spec
from tome_export.plugins.match import contract as match_contract
from tome_export.plugins.merge import contract as merge_contract
from tome_export.plugins.store import Binary, KernelStore
from tome_export.plugins.variants import Launch, Variant

MINIMUM = (10, 13)
"""First TensorRT whose parser and Python API are known to take ahead-of-time plugins."""


_MATCH_ID = f"{spec.PLUGIN_NAMESPACE}::{spec.MATCH}"
_MERGE_ID = f"{spec.PLUGIN_NAMESPACE}::{spec.MERGE}"


class _Registration:
    """The kernels of the artifact that is being built, and the GPU it is built for."""

    def __init__(self) -> None:
        self.store: KernelStore | None = None
        self.capability = (0, 0)
        self.declared: ModuleType | None = None

    def binary(self, variant: Variant) -> Binary:
        if self.store is None:
            raise InputError(
                "no kernels are registered; call tome_export.plugins.tensorrt.register"
            )
        return self.store.kernel(variant).binary_for(self.capability)


_registration = _Registration()


def register(store: KernelStore, capability: tuple[int, int]) -> None:
    """Declare both operators to TensorRT, with the kernels of one artifact for one GPU.

    May be called again with other kernels; the latest call counts for engines built from then on.
    """
    import tensorrt as trt

    version = tuple(int(part) for part in trt.__version__.split(".")[:2])
    if version < MINIMUM:
        raise MissingComponentError(
            f"TensorRT {trt.__version__} is installed; the plugins of this artifact need "
            f"{'.'.join(map(str, MINIMUM))} or later: pip install --upgrade tensorrt, or rebuild "
            "the artifact with --merge-op matmul"
        )
    store.check(capability)
    if _registration.declared is not trt:
        _declare(trt)
        _registration.declared = trt
    _registration.store, _registration.capability = store, capability


def _declare(trt: ModuleType) -> None:
    """Register descriptors and implementations; TensorRT knows them for the life of the process."""
    import numpy as np
    import tensorrt.plugin as trtp
    from tensorrt.plugin import TensorDesc

    Result = tuple[str, str, trtp.KernelLaunchParams, trtp.SymIntExprs]
    # Not int, whose conversion fails under NumPy 2.4 before TensorRT 11.4, and not NDArray, which
    # NumPy 2.5 makes an alias that TensorRT's checks before 11.4 do not take for a type.
    Attribute = np.ndarray[Any, np.dtype[np.int32]]

    @trtp.register(_MATCH_ID)
    def describe_match(
        keys: TensorDesc,
        r: Attribute,
        prefix: Attribute,
        class_token: Attribute,
        heads: Attribute,
        width: Attribute,
        offset: Attribute,
    ) -> tuple[TensorDesc, TensorDesc, TensorDesc]:
        # In every form of the input the tokens are the last dimension but one.
        batch, tokens = keys.shape_expr[0], keys.shape_expr[keys.ndim - 2]
        merged = int(r[0])
        lengths = (tokens - merged, merged, merged)
        keep, src, dst = (trtp.from_shape_expr((batch, n), trt.int32) for n in lengths)
        return keep, src, dst

    @trtp.aot_impl(_MATCH_ID)
    def start_match(
        keys: TensorDesc,
        r: Attribute,
        prefix: Attribute,
        class_token: Attribute,
        heads: Attribute,
        width: Attribute,
        offset: Attribute,
        outputs: tuple[TensorDesc],
        tactic: int,
    ) -> Result:
        lengths = _static_lengths(keys, "keys")
        view = spec.keys_view(lengths, int(heads[0]), int(width[0]), int(offset[0]))
        shape = (view.tokens, view.width, _name(trt, keys), view.strides, view.offset)
        reason = match_contract.refusal(*shape)
        if reason:
            raise InputError(f"{reason}; rebuild the artifact with --merge-op matmul")
        launch = match_contract.launch(
            keys.shape_expr[0],
            view.heads,
            view.tokens,
            view.width,
            int(r[0]),
            int(prefix[0]),
            bool(class_token[0]),
            view.strides,
            view.offset,
        )
        return _start(trtp, match_contract.variant(*shape), launch)

    @trtp.register(_MERGE_ID)
    def describe_merge(
        x: TensorDesc, size: TensorDesc, keep: TensorDesc, src: TensorDesc, dst: TensorDesc
    ) -> tuple[TensorDesc, TensorDesc]:
        batch, kept = keep.shape_expr
        x_out = trtp.from_shape_expr((batch, kept, x.shape_expr[2]), x.dtype)
        return x_out, trtp.from_shape_expr((batch, kept), trt.float32)

    @trtp.aot_impl(_MERGE_ID)
    def start_merge(
        x: TensorDesc,
        size: TensorDesc,
        keep: TensorDesc,
        src: TensorDesc,
        dst: TensorDesc,
        outputs: tuple[TensorDesc],
        tactic: int,
    ) -> Result:
        tokens, width = _static_lengths(x, "x")
        (r,) = _static_lengths(src, "src")
        launch = merge_contract.launch(x.shape_expr[0], tokens, r)
        return _start(trtp, merge_contract.variant(width, _name(trt, x)), launch)


def _static_lengths(tensor: Any, name: str) -> list[int]:
    """All lengths but the batch's; they are baked into the launch."""
    lengths = [int(tensor.shape[index]) for index in range(1, tensor.ndim)]
    if min(lengths) < 0:
        raise InputError(f"{name} has a dynamic dimension besides the batch; expected none")
    return lengths


def _name(trt: ModuleType, tensor: Any) -> str:
    names = {trt.float32: "float32", trt.float16: "float16", trt.bfloat16: "bfloat16"}
    return names.get(tensor.dtype, str(tensor.dtype))


def _start(trtp: Any, variant: Variant, launch: Launch) -> tuple[str, str, Any, Any]:
    """What TensorRT stores in the engine: name, PTX, grid, block, shared memory, scalars."""
    binary = _registration.binary(variant)
    parameters = trtp.KernelLaunchParams()
    parameters.grid_x, parameters.grid_y, parameters.grid_z = launch.grid
    parameters.block_x = binary.threads
    parameters.shared_mem = binary.shared_bytes
    scalars = trtp.SymIntExprs(len(launch.scalars))
    for index, value in enumerate(launch.scalars):
        scalars[index] = trtp.SymInt32(value)
    return binary.entry, binary.ptx, parameters, scalars
