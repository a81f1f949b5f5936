"""How torch operators become ONNX nodes where the exporter's own choice does not serve us."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, NamedTuple

import onnx
import torch

from tome_export.merge import spec
from tome_export.spec import AttentionForm


class _Signature(NamedTuple):
    """Attributes, and inputs and outputs with the letters of ``_TYPES`` for their types."""

    attributes: tuple[str, ...]
    inputs: Mapping[str, str]
    outputs: Mapping[str, str]


_TYPES = {
    "T": [f"tensor({name})" for name in ("float", "float16", "bfloat16", "double")],
    "S": ["tensor(float)"],
    "I": ["tensor(int32)"],
}
_PLAN = dict.fromkeys(spec.MATCH_OUTPUTS, "I")
_SIGNATURES = {
    spec.MATCH: _Signature(("r", "prefix", "class_token"), {spec.MATCH_INPUTS[0]: "T"}, _PLAN),
    spec.MERGE: _Signature(
        (),
        dict(zip(spec.MERGE_INPUTS, "TSIII", strict=True)),
        {"x_out": "T", "size_out": "S"},
    ),
    spec.PLAN: _Signature(("layer",), _PLAN, {f"{name}_out": "I" for name in _PLAN}),
    spec.SIGNAL: _Signature(("layer", "index"), {"x": "T"}, {"x_out": "T"}),
}


@cache
def _operator(name: str) -> Any:
    """An onnxscript operator for this package's, callable while exporting."""
    from onnxscript.values import Op, Opset

    schema, signature = onnx.defs.OpSchema, _SIGNATURES[name]
    used = {*signature.inputs.values(), *signature.outputs.values()}
    operator = schema(
        name,
        spec.DOMAIN,
        spec.VERSION,
        inputs=[schema.FormalParameter(*item) for item in signature.inputs.items()],
        outputs=[schema.FormalParameter(*item) for item in signature.outputs.items()],
        type_constraints=[(kind, _TYPES[kind], "") for kind in sorted(used)],
        attributes=[schema.Attribute(a, schema.AttrType.INT, "") for a in signature.attributes],
    )
    return Op(Opset(spec.DOMAIN, spec.VERSION), name, operator)


def _match(keys: Any, r: int, prefix: int, class_token: bool) -> Any:
    return _operator(spec.MATCH)(keys, r=r, prefix=prefix, class_token=int(class_token))


def _plan(keep: Any, src: Any, dst: Any, layer: int) -> Any:
    return _operator(spec.PLAN)(keep, src, dst, layer=layer)


def _signal(x: Any, layer: int, index: int) -> Any:
    return _operator(spec.SIGNAL)(x, layer=layer, index=index)


def _rank(values: Any, stable: bool | None = None, dim: int = -1, descending: bool = False) -> Any:  # noqa: ARG001
    """A full sort as TopK, whose ties go to the lowest index."""
    from onnxscript import opset23

    op: Any = opset23
    count = op.Constant(value_ints=[values.shape[dim]])
    return op.TopK(values, count, axis=dim, largest=int(descending), sorted=1)


def _merge(x: Any, size: Any, keep: Any, src: Any, dst: Any) -> Any:
    return _operator(spec.MERGE)(x, size, keep, src, dst)


FUSED_HEAD_DIMS = range(16, 257, 8)
"""Head widths that TensorRT has dedicated attention kernels for (tried with TensorRT-RTX 1.7)."""


def _fused_attention(*, fp32_sums: bool) -> Callable[..., Any]:
    """``scaled_dot_product_attention`` as the Attention operator where TensorRT can fuse it.

    That is self-attention with one width for keys and values; attention pooling (one query) and
    differential attention (values twice as wide) are written in their parts.

    With ``fp32_sums`` queries, keys and values are cast to float32 and the result back, which
    TensorRT reads as «half precision with float32 sums» (release notes of 11.3). The mask stays in
    half precision: TensorRT-RTX 1.7 fuses that, and cannot build a graph whose mask is cast too.
    """

    def attention(  # the exporter binds arguments by this signature
        q: Any,
        k: Any,
        v: Any,
        attn_mask: Any = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Any:
        from onnxscript import opset23

        op: Any = opset23
        one_width = tuple(q.shape[1:]) == tuple(k.shape[1:]) == tuple(v.shape[1:])
        if not one_width or q.shape[-1] not in FUSED_HEAD_DIMS or is_causal or enable_gqa:
            return _attention_in_parts(q, k, v, attn_mask, dropout_p, is_causal, scale, enable_gqa)
        factor = q.shape[-1] ** -0.5 if scale is None else scale
        mask = () if attn_mask is None else (attn_mask,)
        if not fp32_sums:
            return op.Attention(q, k, v, *mask, scale=factor)[0]
        # The match casts the keys too. Were it the same cast, TensorRT-RTX would not find the
        # pattern.
        exact = 2.0 ** min(math.floor(math.log2(factor)), -1)
        k = op.Mul(k, op.CastLike(op.Constant(value_float=exact), k))
        wide = (op.Cast(x, to=onnx.TensorProto.FLOAT) for x in (q, k, v))
        return op.Cast(op.Attention(*wide, *mask, scale=factor / exact)[0], to=int(q.dtype))

    return attention


def _attention_in_parts(
    q: Any,
    k: Any,
    v: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,  # noqa: ARG001
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """``scaled_dot_product_attention`` as MatMul, Add, Softmax, MatMul.

    In float32 a bias that all queries share is a channel of queries and keys: an Add would read and
    write all of ``[B, H, N, N]`` once more. In half precision a channel would round the bias, and
    TensorRT fuses the Add (docs/attention.md).
    """
    from onnxscript import opset18

    # The operators' type hints know no symbolic values.
    op: Any = opset18

    if is_causal or enable_gqa:
        raise NotImplementedError("causal and grouped-query attention have no translation")
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    keys = op.Transpose(k, perm=[0, 1, 3, 2])
    shared = _shared_bias(attn_mask) if q.dtype == onnx.TensorProto.FLOAT else None
    if shared is not None:
        # The scale comes behind: ONNX Runtime takes it into the matrix product.
        q = op.Pad(q, op.Constant(value_ints=[0] * 7 + [1]), op.Constant(value_float=1 / factor))
        heads = op.Constant(value_ints=[1, k.shape[1], 1, 1])
        keys = op.Concat(keys, op.Expand(shared, heads), axis=2)
        attn_mask = None
    scores = op.MatMul(op.Mul(q, op.CastLike(op.Constant(value_float=factor), q)), keys)
    if attn_mask is not None:
        scores = op.Add(scores, attn_mask)
    return op.MatMul(op.Softmax(scores, axis=-1), v)


def _shared_bias(mask: Any) -> Any | None:
    """The bias ``[B, 1, 1, N]`` that a mask repeats for every query; None of another mask."""
    maker = None if mask is None else mask.producer()
    if maker is None or maker.op_type != "Expand":
        return None
    bias = maker.inputs[0]
    known = bias.shape is not None and len(bias.shape) == 4
    return bias if known and tuple(bias.shape[1:3]) == (1, 1) else None


_ATTENTION: dict[AttentionForm, Callable[..., Any]] = {
    "fused": _fused_attention(fp32_sums=False),
    "fused-fp32": _fused_attention(fp32_sums=True),
    "parts": _attention_in_parts,
}


def translation_table(attention: AttentionForm) -> dict[Any, Callable[..., Any]]:
    """Custom translations for ``torch.onnx.export``, with attention in a form but ``auto``."""
    # Importing the operators registers them with torch.
    import tome_export.merge.ops  # noqa: F401

    ops = torch.ops.tome_export
    return {
        ops.match.default: _match,
        ops.merge.default: _merge,
        ops.plan.default: _plan,
        ops.signal.default: _signal,
        torch.ops.aten.sort.stable: _rank,
        torch.ops.aten.scaled_dot_product_attention.default: _ATTENTION[attention],
    }
