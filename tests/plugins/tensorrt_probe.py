"""What TensorRT's Python layer makes of our plugins: ``tensorrt_probe.py <folder> <artifact>``.

Run in a process of its own (see ``tensorrt_shim``), with the Triton interpreter on. For every match
and merge node of the artifact's model it does what the parser and the builder do: read the fields
that the creator declares from the node, create the plugin, ask it for types, shapes, launch and
kernel. Then it runs the kernel under the interpreter with exactly that launch. Prints JSON.
"""

from __future__ import annotations

import json
import os
import sys
import types
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"
sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
import onnx
import tensorrt_shim as shim

CAPABILITY = (9, 0)
SIZES = {"batch": 3}


def main(folder: Path, artifact: Path) -> None:
    trt = shim.load(folder)
    from tome_export.plugins import tensorrt as plugins
    from tome_export.plugins.store import KernelStore

    store = KernelStore.read(artifact / "plugins")
    plugins.register(store, CAPABILITY)
    # A second artifact in the same process: declared once, kernels replaced.
    plugins.register(store, CAPABILITY)
    model = onnx.load(artifact / "model.onnx")
    values = {v.name: v for v in (*model.graph.value_info, *model.graph.input)}
    # The sizes of a fixed batch that has not merged yet are a constant.
    values |= {
        tensor.name: onnx.helper.make_tensor_value_info(
            tensor.name, tensor.data_type, list(tensor.dims)
        )
        for tensor in model.graph.initializer
    }
    nodes = [node for node in model.graph.node if node.domain == "tome_export"]
    ends = {*range(2), len(nodes) - 2, len(nodes) - 1}
    found = [probe(trt, node, values, store, index in ends) for index, node in enumerate(nodes)]
    refused = refusals(trt, plugins, store)
    refused["heads"] = wrong_heads(trt, nodes[0], values, store)
    print(json.dumps({"version": trt.__version__, "nodes": found, "refused": refused}))


def refusals(trt: Any, plugins: Any, store: Any) -> dict[str, str]:
    """Messages of registrations that must fail."""
    from tome_export.errors import TomeExportError

    messages = {}
    old = types.SimpleNamespace(__version__="10.12.0.36")
    for name, module, capability in [("old", old, CAPABILITY), ("turing", trt, (7, 5))]:
        try:
            sys.modules["tensorrt"] = module
            plugins.register(store, capability)
        except TomeExportError as error:  # noqa: PERF203
            messages[name] = f"{type(error).__name__}: {error}"
    sys.modules["tensorrt"] = trt
    return messages


def wrong_heads(trt: Any, match: onnx.NodeProto, values: dict[str, Any], store: Any) -> str:
    """Message about a match with more heads than its input can hold."""
    node = onnx.NodeProto()
    node.CopyFrom(match)
    next(a for a in node.attribute if a.name == "heads").i = 1000
    try:
        probe(trt, node, values, store, started=False)
    except ValueError as error:
        return str(error)
    return ""


def probe(
    trt: Any, node: onnx.NodeProto, values: dict[str, Any], store: Any, started: bool
) -> dict[str, Any]:
    """One node on its way through registry, creator and plugin."""
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    namespace, version = (
        attributes[key].decode() for key in ("plugin_namespace", "plugin_version")
    )
    creator = trt.get_plugin_registry().get_creator(node.op_type, version, namespace)
    fields = [
        # The parser gives every INT attribute as int32.
        trt.PluginField(f.name, np.array([attributes[f.name]], np.int32), f.type)
        for f in creator.field_names
    ]
    request = (
        trt.QuickPluginCreationRequest.STRICT_AOT
        if attributes["aot"]
        else trt.QuickPluginCreationRequest.STRICT_JIT
    )
    plugin = creator.create_plugin(
        node.op_type,
        namespace,
        trt.PluginFieldCollection(fields),
        trt.TensorRTPhase.BUILD,
        request,
    )
    inputs = [described(trt, values[name]) for name in node.input]
    types_out = plugin.get_output_data_types(
        [dtype for dtype, _ in inputs], [len(shape) for _, shape in inputs]
    )
    with shim.symbolic(trt) as builder:
        shapes_in = [[dimension(size) for size in shape] for _, shape in inputs]
        shapes_out = plugin.get_output_shapes(shapes_in, [], builder)
        outputs = [
            (dtype, [d.get_constant_value() if d.constant else -1 for d in shape])
            for dtype, shape in zip(types_out, shapes_out, strict=True)
        ]
        descs = [description(trt, *tensor) for tensor in (*inputs, *outputs)]
        plugin.set_tactic(0)
        launch, extra = types.SimpleNamespace(), shim.ExtraArguments()
        plugin.get_launch_params(shapes_in, descs, len(inputs), launch, extra, builder)
    static = [d.desc for d in descs]
    entry, ptx = plugin.get_kernel(static[: len(inputs)], static[len(inputs) :])
    handed = {name: value.expr.text for name, value in vars(launch).items()}
    grid = [getattr(launch, f"grid_{axis}").expr.value(SIZES) for axis in "xyz"]
    scalars = [argument.expr.value(SIZES) for argument in extra]
    owner = [
        (kernel.variant.name, binary.target)
        for kernel in store.kernels.values()
        for binary in kernel.binaries
        if binary.ptx.encode() == ptx and binary.entry == entry
    ]
    return {
        "op": node.op_type,
        "creator_fields": [f.name for f in creator.field_names],
        "inputs": [(dtype.name, shape) for dtype, shape in inputs],
        "outputs": [
            (dtype.name, [d.text for d in shape])
            for dtype, shape in zip(types_out, shapes_out, strict=True)
        ],
        "attributes": {k: v for k, v in attributes.items() if isinstance(v, int)},
        "kernel": owner,
        "launch": handed,
        "grid": grid,
        "scalars": scalars,
        "scalar_dtypes": [argument.dtype for argument in extra],
        "error": run(node.op_type, store, owner, grid, scalars, inputs, outputs, attributes)
        if started
        else None,
    }


def dimension(size: int) -> Any:
    return shim.Dimension.named("batch") if size < 0 else shim.Dimension.of(size)


def described(trt: Any, value: Any) -> tuple[Any, list[int]]:
    """Type and shape of a tensor of the model, the batch as -1."""
    tensor = value.type.tensor_type
    names = {1: trt.float32, 6: trt.int32, 10: trt.float16, 16: trt.bfloat16}
    return names[tensor.elem_type], [d.dim_value or -1 for d in tensor.shape.dim]


def description(trt: Any, dtype: Any, shape: list[int]) -> Any:
    """A builder's description of one tensor."""
    desc = trt.DynamicPluginTensorDesc()
    desc.desc.dims, desc.desc.type = tuple(shape), dtype
    desc.desc.format = trt.TensorFormat.LINEAR
    desc.min = desc.opt = desc.max = tuple(SIZES["batch"] if s < 0 else s for s in shape)
    return desc


def run(
    op: str,
    store: Any,
    owner: list[tuple[str, str]],
    grid: list[int],
    scalars: list[int],
    inputs: Any,
    outputs: Any,
    attributes: dict[str, Any],
) -> float:
    """Start the kernel as TensorRT would, on random tensors; returns how far from the reference."""
    import torch

    from tome_export.merge import reference
    from tome_export.plugins.match.kernel import match_kernel
    from tome_export.plugins.merge.kernel import merge_kernel

    dtypes = {
        "FLOAT": torch.float32,
        "HALF": torch.float16,
        "BF16": torch.bfloat16,
        "INT32": torch.int32,
    }

    def empty(tensor: tuple[Any, list[int]]) -> Any:
        dtype, shape = tensor
        sizes = [SIZES["batch"] if s < 0 else s for s in shape]
        return torch.full(sizes, -7, dtype=dtypes[dtype.name])

    generator = torch.Generator().manual_seed(0)
    given, written = [empty(tensor) for tensor in inputs], [empty(tensor) for tensor in outputs]
    batch = len(given[0])
    given[0].copy_(torch.randn(given[0].shape, generator=generator))
    heads, offset = (attributes.get(name, 0) for name in ("heads", "offset"))
    if op == "TomeMerge":
        x, size, keep, src, dst = given
        size.copy_(torch.randint(1, 5, size.shape, generator=generator))
        for image in range(batch):
            order = torch.randperm(x.shape[1], generator=generator)
            keep[image], src[image] = order[: keep.shape[1]], order[keep.shape[1] :]
        dst.copy_(torch.randint(0, keep.shape[1], dst.shape, generator=generator))
    ((name, _),) = owner
    variant = store.kernels[name].variant
    kernel = match_kernel if op == "TomeMatch" else merge_kernel
    kernel[tuple(grid)](*given, *scalars, *written, **variant.constants)
    error = 0.0
    for image in range(batch):
        if op == "TomeMatch":
            keys = given[0][image].double()
            if heads:
                columns = keys[:, offset : offset + heads * attributes["width"]]
                keys = columns.unflatten(1, (heads, -1)).transpose(0, 1)
            plan = reference.match(
                keys.mean(0).tolist(),
                attributes["r"],
                attributes["prefix"],
                bool(attributes["class_token"]),
            )
            same = [plan.keep, plan.src, plan.dst] == [w[image].tolist() for w in written]
            error = max(error, 0.0 if same else 1.0)
        else:
            plan = reference.ReferencePlan(*(g[image].tolist() for g in given[2:]))
            rows, sizes = reference.merge(given[0][image].tolist(), given[1][image].tolist(), plan)
            wanted, total = torch.tensor(rows, dtype=torch.float64), torch.tensor(sizes)
            error = max(error, float((wanted - written[0][image].double()).abs().max()))
            error = max(error, float((total - written[1][image]).abs().max()))
    return error


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
