"""ONNX file to TensorRT network: parsing, input profile, attention fall-back.

The parser is driven through TensorRT's own Python API and not through polygraphy: polygraphy
prints the parser's errors to the terminal where this package must return them, and holds either
TensorRT or TensorRT-RTX per process, chosen when it is first imported.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

from tome_export.engine.messages import Messages
from tome_export.errors import ExportError, InputError
from tome_export.spec import BatchRange, TensorInfo

_SHOWN_ERRORS = 3
_DTYPES = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16"}
_WAY_OUT = "try --merge-op matmul, or --engine none to keep only the ONNX model"


def network_from_onnx(
    trt: ModuleType, builder: Any, logger: Any, messages: Messages, onnx_path: Path, flags: int
) -> tuple[Any, Any]:
    """Parse a model from its path, so that external data beside it is found.

    Returns:
        The network and its parser, which owns the weights: keep both until the build is over.

    Raises:
        InputError: if the file is missing or holds no graph.
        ExportError: with node, operator and reason for what the parser refuses.
    """
    if not onnx_path.is_file():
        raise InputError(f"no ONNX model at {onnx_path}; build one with tome-export build")
    network = builder.create_network(flags)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(onnx_path)):
        raise ExportError(f"{onnx_path.name}: {_parser_errors(parser, messages)}")
    if network.num_inputs == 0 or network.num_outputs == 0:
        # The parser reads a file of noise as an empty model and reports success.
        raise InputError(f"{onnx_path} holds no graph with inputs and outputs; build it again")
    return network, parser


def _parser_errors(parser: Any, messages: Messages) -> str:
    errors = [parser.get_error(index) for index in range(parser.num_errors)]
    lines = []
    for error in errors[:_SHOWN_ERRORS]:
        description = " ".join(error.desc().split())
        if error.node_operator():
            where = f"{error.node_name() or error.node()} [{error.node_operator()}]"
        else:  # some importers return an error without filling in its node
            where = messages.parsing
        if where:
            lines.append(f"node {where}: {description}")
    if not lines:  # the file itself, or its external data: only the log has the reason
        return f"the parser cannot read the model: {messages.first_errors(1)}; build it again"
    if len(errors) > _SHOWN_ERRORS:
        lines.append(f"and {len(errors) - _SHOWN_ERRORS} more")
    return f"the parser refuses {'; '.join(dict.fromkeys(lines))}; {_WAY_OUT}"


def tensors(network: Any, *, outputs: bool) -> tuple[TensorInfo, ...]:
    """The network's inputs or outputs."""
    count, get = (
        (network.num_outputs, network.get_output)
        if outputs
        else (network.num_inputs, network.get_input)
    )
    found = [get(index) for index in range(count)]
    return tuple(
        TensorInfo(t.name, tuple(t.shape), _DTYPES.get(t.dtype.name, t.dtype.name.lower()))
        for t in found
    )


def add_profile(builder: Any, config: Any, network: Any, batch: BatchRange) -> None:
    """One optimisation profile, with the first dimension of every input as the batch.

    Raises:
        InputError: if the graph's batch is fixed to another size than asked for.
        ExportError: if another dimension than the first is dynamic.
    """
    profile = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        fixed, *rest = tuple(tensor.shape)
        if -1 in rest:
            raise ExportError(
                f"input {tensor.name!r} has shape {tuple(tensor.shape)}; expected only the first "
                "dimension to be dynamic: export with a fixed image size"
            )
        if fixed not in (-1, batch.min) or (fixed != -1 and not batch.is_static):
            raise InputError(
                f"input {tensor.name!r} has a fixed batch of {fixed}, but the batch range is "
                f"{batch}; use --batch {fixed} or export with a dynamic batch"
            )
        sizes = (batch.min, batch.opt, batch.max)
        profile.set_shape(tensor.name, *((size, *rest) for size in sizes))
    config.add_optimization_profile(profile)


def allow_attention_fallback(trt: ModuleType, network: Any) -> int:
    """Let the builder take attention apart where it has no fused kernel; returns how many.

    An ONNX ``Attention`` node becomes an attention layer that must run fused unless it is marked
    decomposable; there is no fused fp32 kernel. The parser reads the mark from an attribute
    ``TRT_decomposable`` of the node, which onnx.checker and ONNX Runtime refuse as unknown: it is
    set on the parsed network instead, so that one ONNX file serves every runtime. A fused kernel
    is still taken where there is one.
    """
    kind = getattr(trt.LayerType, "ATTENTION_INPUT", None)
    if kind is None:
        return 0
    count = 0
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type == kind:
            # The binding returns the base class; this is its documented way to the derived one.
            layer.__class__ = trt.IAttentionInputLayer
            layer.attention.decomposable = True
            count += 1
    return count


def plugin_layers(trt: ModuleType, network: Any) -> int:
    """Layers of the parsed network that a plugin computes."""
    kind = getattr(trt.LayerType, "PLUGIN_V3", None)
    return sum(network.get_layer(index).type == kind for index in range(network.num_layers))
