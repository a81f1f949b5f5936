"""Names of nodes that say which part of the model they are of: ``blocks.3.attn.qkv/MatMul``."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING

import onnx

from tome_export.merge import spec
from tome_export.onnx.groups import places, scope_of_place, told_scope

if TYPE_CHECKING:
    import onnx_ir as ir

_SCOPES = "pkg.torch.onnx.name_scopes"
_MODEL = "model.model."


def name_by_module(model: ir.Model) -> None:
    """Name nodes after the module of the library's model that made them, where torch tells it.

    Requires: the exporter's metadata, of a model within ``PrecisionBoundary``.
    """
    for node in model.graph.all_nodes():
        scope = _module(node.metadata_props)
        if scope:
            node.name = f"{scope}/{node.op_type}"


def name_by_place(graph: onnx.GraphProto) -> None:
    """Name all nodes, those of no module by where they stand; every name once.

    Names of match and merge nodes stay as they are.
    """
    parameters = {tensor.name for tensor in graph.initializer}
    used: Counter[str] = Counter()
    for node, place in zip(graph.node, places(graph), strict=True):
        if node.domain == spec.DOMAIN:
            continue
        name = f"{told_scope(node, parameters) or scope_of_place(place)}/{node.op_type}"
        used[name] += 1
        node.name = name if used[name] == 1 else f"{name}_{used[name] - 1}"


def _module(metadata: Mapping[str, str]) -> str | None:
    """The innermost module in the exporter's list of scopes, which ends with the operation."""
    scopes = ast.literal_eval(metadata.get(_SCOPES, "[]"))
    inside = [scope.removeprefix(_MODEL) for scope in scopes[:-1] if scope.startswith(_MODEL)]
    return inside[-1] if inside else None
