"""Names of a graph's nodes and tensors, and what they say: which part of the model a node is of.

The convention of every exported graph, which onnxsim and a runtime's fusions leave legible:

- a node is named ``<module>/<operator>``, such as ``blocks.3.attn.qkv/MatMul``, after the library's
  module that made it. One of no module takes the place where it stands: ``blocks.3.mlp/Add``.
- a node of a merge is ``<step>.<part>/<what it computes>``, such as ``blocks.3.match/scores`` or
  ``blocks.8.across.merge/mean``. In a graph for the TensorRT plugin the part is one node, named
  ``blocks.3.match``.
- what a merge decides, and by what, are tensors ``<step>.<name>``: ``blocks.3.metric``, ``.keep``,
  ``.src``, ``.dst`` and ``.size``; ``blocks.3.signal.0`` is the first score of other reducers.
- any other tensor between nodes is named after the node that makes it; ``.1`` is its second output.

Profiles are read by the groups, the instrumented twin is made by the tensors' names.
"""

from __future__ import annotations

import ast
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import onnx

if TYPE_CHECKING:
    import onnx_ir as ir

ATTENTION, MLP, BOTH = "attention", "mlp", "attention+mlp"
MATCH, MERGE, NORM = "match", "merge", "norm"
EMBEDDING, HEAD, OTHER = "embedding", "head", "other"

GROUPS = (ATTENTION, MLP, BOTH, MATCH, MERGE, NORM, EMBEDDING, HEAD, OTHER)
"""All groups, as they are shown. ``attention+mlp`` is what parallel blocks compute for both in one
matrix product; ``norm`` are the normalisations wherever they are."""

_DECISION = re.compile(r"(blocks\.\d+(?:\.across)?)\.(metric|keep|src|dst|size|signal\.\d+)")
# Lists of blocks as the libraries call them: timm, Transformers, open_clip, torchvision.
_BLOCK = re.compile(r"(?:\D*\.)?(?:blocks|layers?|resblocks)\.(?:encoder_layer_)?(\d+)(?:\.(.+))?")
_WRAPPERS = {"vision_model", "visual", "trunk", "vit", "deit", "encoder"}
_WRAPPERS |= {"dinov2", "dinov2_with_registers"}
_EMBEDDING = {"patch_embed", "cls_token", "dist_token", "reg_token", "pos_embed", EMBEDDING}
_EMBEDDING |= {"embeddings", "conv1", "conv_proj", "class_embedding", "positional_embedding"}
_EMBEDDING |= {"class_token", "pos_embedding", "patch_dropout", "patch_drop"}
_HEAD = {"attn_pool", "heads", "classifier", "visual_projection", "proj", "pooler", "mm_projector"}
_HEAD |= {"cls_classifier", "distillation_classifier"}
# Second part of a block's name -> group; numbered branches (``attns.0.attn``) by their first part.
_PARTS = {
    **dict.fromkeys(("attn", "attns", "ls1", "drop_path1", "attn_out_proj"), ATTENTION),
    **dict.fromkeys(("self_attn", "attention", "self_attention", "layer_scale1"), ATTENTION),
    **dict.fromkeys(("ls_1", "gamma_1"), ATTENTION),
    **dict.fromkeys(("mlp", "ffns", "ls2", "drop_path2"), MLP),
    **dict.fromkeys(("mlp_act", "mlp_drop", "mlp_bias", "mlp_out_proj"), MLP),
    **dict.fromkeys(("intermediate", "output", "layer_scale2", "ls_2", "gamma_2"), MLP),
    **dict.fromkeys(("in_proj", "out_proj", "ls", "drop_path", "parallel"), BOTH),
    **dict.fromkeys((MATCH, "plan", "signal"), MATCH),
    MERGE: MERGE,
}
_SCOPES = "pkg.torch.onnx.name_scopes"
_MODEL = "model.model."


@dataclass(frozen=True)
class NodePlace:
    """Where a node belongs.

    Attributes:
        layer: Index of the transformer block; None outside the blocks.
        group: One of ``GROUPS``.
    """

    layer: int | None
    group: str


def place_of_scope(scope: str) -> NodePlace | None:
    """The place of a module or parameter by its name in the model, such as ``blocks.3.mlp.fc1``.

    None for a name that tells nothing.
    """
    found = _BLOCK.fullmatch(scope)
    if found is None:
        parts = scope.split(".")
        while len(parts) > 1 and parts[0] in _WRAPPERS:
            del parts[0]
        root = parts[0]
        if root in _EMBEDDING:
            return NodePlace(None, EMBEDDING)
        if root.startswith("head") or root in _HEAD:
            return NodePlace(None, HEAD)
        return NodePlace(None, NORM) if _is_norm(root) else None
    layer, rest = int(found[1]), found[2]
    if rest is None:
        return None
    if _is_norm(rest.rpartition(".")[2]):
        return NodePlace(layer, NORM)
    group = _PARTS.get(rest.removeprefix("across.").partition(".")[0])
    return None if group is None else NodePlace(layer, group)


def _is_norm(name: str) -> bool:
    """``norm1``, ``layer_norm2``, ``layernorm_before``, ``pre_layrnorm``, ``ln_1``."""
    return "norm" in name or name.startswith("ln_")


def places(graph: onnx.GraphProto) -> list[NodePlace]:
    """The place of every node, in the graph's order.

    Requires: nodes in the order in which the model runs, as the exporter and onnxsim leave them.
    """
    parameters = {tensor.name for tensor in graph.initializer}
    nodes = list(graph.node)
    scopes = [_scope_of_node(node, parameters) for node in nodes]
    known = [None if scope is None else place_of_scope(scope) for scope in scopes]
    consumers: dict[str, list[int]] = defaultdict(list)
    for index, node in enumerate(nodes):
        for name in node.input:
            consumers[name].append(index)
    aside = _aside(nodes, parameters)
    result: list[NodePlace | None] = _filled(nodes, known, aside, parameters)
    for index in reversed(range(len(nodes))):
        if known[index] is not None:
            continue
        users = [u for name in nodes[index].output for u in consumers[name]]
        first = result[users[0]] if users else None
        served = {result[user] for user in users}
        only_match = len(served) == 1 and first is not None and first.group == MATCH
        # Sizes and shapes belong to whom they are for, and so do keys that only match reads.
        if first is not None and (aside[index] or only_match):
            result[index] = first
    return [place or NodePlace(None, OTHER) for place in result]


def _scope_of_node(node: onnx.NodeProto, parameters: set[str]) -> str | None:
    """The module that a node's name tells, or else that of a parameter it takes; None without."""
    scopes = [node.name if node.domain else node.name.rpartition("/")[0]]
    for name in node.input:
        bare = re.sub(r"^(model\.)+", "", name)
        if name in parameters and bare != name:
            scopes += [bare.rpartition(".")[0], bare]
    return next((scope for scope in scopes if place_of_scope(scope) is not None), None)


def _scope_of_place(place: NodePlace) -> str:
    """A name that ``place_of_scope`` reads as that place."""
    if place.layer is None:
        return place.group
    parts = {ATTENTION: "attn", BOTH: "parallel"}
    return f"blocks.{place.layer}.{parts.get(place.group, place.group)}"


def _aside(nodes: list[onnx.NodeProto], parameters: set[str]) -> list[bool]:
    """Whether a node computes from shapes, constants and token sizes only."""
    light = set(parameters)
    result = []
    for node in nodes:
        alone = node.op_type in ("Shape", "Size") or all(i in light for i in node.input if i)
        result.append(alone)
        # A merge's sizes, though they hang on the tokens.
        light.update(n for n in node.output if alone or n.endswith(".size"))
    return result


def _filled(
    nodes: list[onnx.NodeProto],
    known: list[NodePlace | None],
    aside: list[bool],
    parameters: set[str],
) -> list[NodePlace | None]:
    """Nodes that say nothing get the place of the landmark they stand behind, or before."""
    following: list[NodePlace | None] = [None] * len(nodes)
    coming: NodePlace | None = None
    for index in reversed(range(len(nodes))):
        following[index] = coming
        place = known[index]
        if place is not None and place.group != NORM:
            coming = place
        elif place is not None and place.layer is None:
            coming = NodePlace(None, HEAD)
    result: list[NodePlace | None] = []
    behind: NodePlace | None = None
    normed: NodePlace | None = None
    for index, node in enumerate(nodes):
        place = known[index]
        if place is not None:
            # A normalisation belongs to what follows, but for the sum of a block that ends with it.
            ends = place.group == NORM and behind is not None and behind.layer is not None
            normed = behind if ends else None
            behind = None if place.group == NORM else place
            result.append(place)
            continue
        if aside[index]:
            result.append(None)
            continue
        residual = node.op_type == "Add" and not any(name in parameters for name in node.input)
        if residual and behind is None and normed is not None:
            behind = normed
        if behind is None or behind.group in (MATCH, MERGE):
            result.append(following[index] or NodePlace(None, HEAD))
            continue
        if behind.group == BOTH and _is_after_split(nodes, index, known):
            result.append(NodePlace(behind.layer, ATTENTION))
            continue
        result.append(behind)
        if residual and behind.group in (MLP, BOTH):
            behind = None
    return result


def _is_after_split(nodes: list[onnx.NodeProto], index: int, known: list[NodePlace | None]) -> bool:
    """Whether the joint projection of a parallel block has been split into its parts by now."""
    for before in reversed(range(index)):
        if nodes[before].op_type == "Split":
            return True
        if known[before] is not None:
            return False
    return False


def name_by_module(model: ir.Model) -> None:
    """Name nodes after the module of the library's model that made them, where torch tells it.

    Requires: the exporter's metadata, of a model within ``PrecisionBoundary``.
    """
    for node in model.graph.all_nodes():
        scope = _module(node.metadata_props)
        if scope:
            node.name = f"{scope}/{node.op_type}"


def _module(metadata: Mapping[str, str]) -> str | None:
    """The innermost module in the exporter's list of scopes, which ends with the operation."""
    scopes = ast.literal_eval(metadata.get(_SCOPES, "[]"))
    inside = [scope.removeprefix(_MODEL) for scope in scopes[:-1] if scope.startswith(_MODEL)]
    return inside[-1] if inside else None


def decision_of_tensor(name: str) -> tuple[str, str] | None:
    """Step and part of a tensor that a merge decides, such as ``("blocks.3", "keep")``; or None."""
    found = _DECISION.fullmatch(name)
    return None if found is None else (found[1], found[2])


def name_by_place(graph: onnx.GraphProto) -> None:
    """Name all nodes and the tensors between them by the convention; every name once.

    Names of the nodes of a merge stay as they are, and those of decisions, inputs and outputs.
    """
    parameters = {tensor.name for tensor in graph.initializer}
    used: Counter[str] = Counter()
    fixed = {value.name for value in graph.output}
    tensors: dict[str, str] = {}
    for node, place in zip(graph.node, places(graph), strict=True):
        scope = _scope_of_node(node, parameters) or _scope_of_place(place)
        if not node.domain and not (place.group in (MATCH, MERGE) and node.name.startswith(scope)):
            node.name = f"{scope}/{node.op_type}"
        used[node.name] += 1
        if used[node.name] > 1:
            node.name = f"{node.name}_{used[node.name] - 1}"
        for index, name in enumerate(node.output):
            if name and name not in fixed and decision_of_tensor(name) is None:
                tensors[name] = f"{node.name}.{index}" if index else node.name
    for node in graph.node:
        node.input[:] = [tensors.get(name, name) for name in node.input]
        node.output[:] = [tensors.get(name, name) for name in node.output]
    for value in graph.value_info:
        value.name = tensors.get(value.name, value.name)


def place_finder(graph: onnx.GraphProto) -> Callable[[str], NodePlace | None]:
    """What finds the place of a node that a runtime made of a graph's nodes, by its name.

    Runtimes fuse nodes and insert new ones, and call what results after the nodes and tensors it
    comes from: ``blocks.0.norm1/LayerNormalization/LayerNormFusion/``, or after a weight, which is
    where it is first used. None without such a name.
    """
    weights = {tensor.name for tensor in graph.initializer}
    known: dict[str, NodePlace] = {}
    for node, place in zip(graph.node, places(graph), strict=True):
        known |= dict.fromkeys((node.name, *node.output), place)
        known = dict.fromkeys(weights.intersection(node.input), place) | known
    names = sorted(filter(None, known), key=len, reverse=True)

    @cache
    def find(text: str) -> NodePlace | None:
        return next((known[name] for name in names if name in text), None)

    return find
