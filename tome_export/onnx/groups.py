"""Which part of the transformer every node of a graph belongs to: attention, MLP, match, merge.

What a node says itself comes first: its name (``blocks.3.attn.qkv/MatMul``), or the name of a
parameter it takes. A node that says nothing belongs where it stands in the graph: between such
landmarks, in the order in which PyTorch ran. So graphs without meaningful names are read as well.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass

import onnx

from tome_export.merge import spec

ATTENTION, MLP, BOTH = "attention", "mlp", "attention+mlp"
MATCH, MERGE, NORM = "match", "merge", "norm"
EMBEDDING, HEAD, OTHER = "embedding", "head", "other"

GROUPS = (ATTENTION, MLP, BOTH, MATCH, MERGE, NORM, EMBEDDING, HEAD, OTHER)
"""All groups, as they are shown. ``attention+mlp`` is what parallel blocks compute for both in one
matrix product; ``norm`` are the normalisations wherever they are."""

_OWN = re.compile(r"blocks\.(\d+)\..+")
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
    MATCH: MATCH,
    MERGE: MERGE,
}


@dataclass(frozen=True)
class Place:
    """Where a node belongs.

    Attributes:
        layer: Index of the transformer block; None outside the blocks.
        group: One of ``GROUPS``.
    """

    layer: int | None
    group: str


def place_of_scope(scope: str) -> Place | None:
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
            return Place(None, EMBEDDING)
        if root.startswith("head") or root in _HEAD:
            return Place(None, HEAD)
        return Place(None, NORM) if _is_norm(root) else None
    layer, rest = int(found[1]), found[2]
    if rest is None:
        return None
    if _is_norm(rest.rpartition(".")[2]):
        return Place(layer, NORM)
    group = _PARTS.get(rest.partition(".")[0])
    return None if group is None else Place(layer, group)


def _is_norm(name: str) -> bool:
    """``norm1``, ``layer_norm2``, ``layernorm_before``, ``pre_layrnorm``, ``ln_1``."""
    return "norm" in name or name.startswith("ln_")


def places(graph: onnx.GraphProto) -> list[Place]:
    """The place of every node, in the graph's order.

    Requires: nodes in the order in which the model runs, as the exporter and onnxsim leave them.
    """
    parameters = {tensor.name for tensor in graph.initializer}
    nodes = list(graph.node)
    known = [_told(node, parameters) for node in nodes]
    consumers: dict[str, list[int]] = defaultdict(list)
    for index, node in enumerate(nodes):
        for name in node.input:
            consumers[name].append(index)
    aside = _aside(nodes, parameters)
    result: list[Place | None] = _filled(nodes, known, aside, parameters)
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
    return [place or Place(None, OTHER) for place in result]


def _told(node: onnx.NodeProto, parameters: set[str]) -> Place | None:
    """What a node's name or its parameters say."""
    if node.domain == spec.DOMAIN:
        layer = _OWN.fullmatch(node.name)
        group = MERGE if node.op_type == spec.MERGE else MATCH
        return Place(int(layer[1]) if layer else None, group)
    scope = told_scope(node, parameters)
    return None if scope is None else place_of_scope(scope)


def told_scope(node: onnx.NodeProto, parameters: set[str]) -> str | None:
    """The module that a node's name tells, or else that of a parameter it takes; None without."""
    told = [node.name.rpartition("/")[0]]
    for name in node.input:
        bare = re.sub(r"^(model\.)+", "", name)
        if name in parameters and bare != name:
            told += [bare.rpartition(".")[0], bare]
    return next((scope for scope in told if place_of_scope(scope) is not None), None)


def scope_of_place(place: Place) -> str:
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
        if alone:
            light.update(node.output)
        elif node.op_type == spec.MERGE and node.domain == spec.DOMAIN:
            light.add(node.output[1])
    return result


def _filled(
    nodes: list[onnx.NodeProto],
    known: list[Place | None],
    aside: list[bool],
    parameters: set[str],
) -> list[Place | None]:
    """Nodes that say nothing get the place of the landmark they stand behind, or before."""
    following: list[Place | None] = [None] * len(nodes)
    coming: Place | None = None
    for index in reversed(range(len(nodes))):
        following[index] = coming
        place = known[index]
        if place is not None and place.group != NORM:
            coming = place
        elif place is not None and place.layer is None:
            coming = Place(None, HEAD)
    result: list[Place | None] = []
    behind: Place | None = None
    normed: Place | None = None
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
            result.append(following[index] or Place(None, HEAD))
            continue
        if behind.group == BOTH and _is_after_split(nodes, index, known):
            result.append(Place(behind.layer, ATTENTION))
            continue
        result.append(behind)
        if residual and behind.group in (MLP, BOTH):
            behind = None
    return result


def _is_after_split(nodes: list[onnx.NodeProto], index: int, known: list[Place | None]) -> bool:
    """Whether the joint projection of a parallel block has been split into its parts by now."""
    for before in reversed(range(index)):
        if nodes[before].op_type == "Split":
            return True
        if known[before] is not None:
            return False
    return False
