"""The whole ONNX stage: trace, attach the merge functions, simplify, describe, write, check."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx

from tome_export.merge import spec
from tome_export.merge.plan import step_name
from tome_export.onnx import files
from tome_export.onnx.export import ExportOptions, ir_from_model
from tome_export.onnx.functions import functions_for, inline
from tome_export.onnx.names import name_by_place
from tome_export.onnx.product import read_keys_from_products
from tome_export.onnx.simplify import simplified
from tome_export.onnx.twin import METADATA_PREFIX
from tome_export.patch import MergedModel


@dataclass(frozen=True)
class OnnxFiles:
    """What was written.

    Attributes:
        paths: The model, then its external data if any.
        opset: Of the standard operators.
        nodes: Nodes in the main graph.
    """

    paths: tuple[Path, ...]
    opset: int
    nodes: int
    simplified: bool = True


def onnx_from_model(
    model: MergedModel,
    path: Path,
    options: ExportOptions,
    output_names: str | Sequence[str],
    metadata: Mapping[str, object] | None = None,
    *,
    external_data_bytes: int = files.EXTERNAL_DATA_BYTES,
) -> OnnxFiles:
    """Export a merged model to ``path``.

    Args:
        model: In eval mode, fp32 weights.
        path: Of the ``.onnx`` file; external data goes beside it.
        options: Precision, batch range, operator forms.
        output_names: ``logits`` or ``features``, then ``source_map`` and ``entropy`` if the model
            gives them.
        metadata: Written to the model's metadata_props as JSON, keys prefixed ``tome_export.``.
        external_data_bytes: Weights above this go to a file of their own.

    Raises:
        ExportError: if the model cannot be traced, or the result is not valid ONNX with a known
            shape for every tensor.
    """
    from onnx_ir import serde

    names = [output_names] if isinstance(output_names, str) else output_names
    proto = serde.serialize_model(ir_from_model(model, options, names))
    functions = functions_for(
        proto.graph.node, options.lowering, options.opset, plugin=options.plugin
    )
    proto.functions.extend(functions)
    inline(proto, (spec.PLAN, spec.SIGNAL) if options.plugin else tuple(spec.SUFFIXES))
    proto = simplified(proto)
    if options.plugin:
        read_keys_from_products(proto, options.opset)
    name_by_place(proto.graph)
    name_by_content(proto)
    described = {**(metadata or {}), **_sequences(model)}
    props = {METADATA_PREFIX + key: json.dumps(value) for key, value in described.items()}
    onnx.helper.set_model_props(proto, props)
    proto.doc_string = f"Vision transformer with token merging, operators v{spec.VERSION}"
    nodes = len(proto.graph.node)
    written = files.save(proto, path, threshold=external_data_bytes)
    files.check(path)
    return OnnxFiles(tuple(written), options.opset, nodes)


def _sequences(model: MergedModel) -> dict[str, dict[str, int]]:
    """What the twin has to know of merges that work on several sequences of one input."""
    counts = {step_name(step): model.sequences_at(step) for step in model.steps}
    several = {name: count for name, count in counts.items() if count > 1}
    return {spec.SEQUENCES: several} if several else {}


def name_by_content(model: onnx.ModelProto) -> None:
    """Put a digest of graph and weights into the name of the first output of a node with inputs.

    ONNX Runtime's cache of TensorRT engines tells models apart by the names of their tensors and
    not by their weights: two builds of one model would take each other's engines.
    """
    graph = model.graph
    digest = hashlib.sha256()
    for part in (*graph.initializer, *graph.node):
        digest.update(part.SerializeToString(deterministic=True))
    for function in model.functions:
        digest.update(function.SerializeToString(deterministic=True))
    outputs = {value.name for value in graph.output}
    old = next((n.output[0] for n in graph.node if n.input and n.output[0] not in outputs), None)
    if old is None:
        return
    new = f"{old}.{digest.hexdigest()[:16]}"
    for node in graph.node:
        node.input[:] = [new if name == old else name for name in node.input]
        node.output[:] = [new if name == old else name for name in node.output]
    for value in graph.value_info:
        if value.name == old:
            value.name = new
