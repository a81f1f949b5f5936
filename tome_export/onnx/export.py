"""From a merged torch module to an ONNX file with static tokens and a dynamic batch.

Traced by torch, match and merge as one node each; their bodies put in place, unless for plugins;
simplified by onnxsim; named, described, written and checked.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx
import torch
from torch import Tensor, nn

from tome_export.errors import ExportError, UsageError
from tome_export.merge import spec
from tome_export.merge.plan import Step, step_name
from tome_export.onnx import files, opset
from tome_export.onnx.emulate import uses_bfloat16
from tome_export.onnx.functions import functions_for, inline
from tome_export.onnx.names import decision_of_tensor, name_by_module, name_by_place
from tome_export.onnx.plugin import read_keys_from_products
from tome_export.onnx.translation import translation_table
from tome_export.onnx.twin import METADATA_PREFIX
from tome_export.patch import MergedModel
from tome_export.patch.precision import copy_with_dtype, floats_to, free_weights
from tome_export.spec import (
    INPUT_NAME,
    OPSETS,
    AttentionForm,
    BatchRange,
    Lowering,
    Precision,
    check_opset,
)

if TYPE_CHECKING:
    import onnx_ir as ir

TORCH_DTYPES: dict[Precision, torch.dtype] = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}

OPSET = OPSETS[-1]
"""First opset with Attention and RMSNormalization."""

FUNCTIONS_IR = 9
"""First version of ONNX's format in which a function declares attributes with defaults."""


@dataclass(frozen=True)
class ExportOptions:
    """How a model becomes ONNX.

    Attributes:
        precision: Type of weights and activations. Matching, sizes, merge sums and layer-norm
            statistics are fp32 in every precision; so are the model's output, and its inputs other
            than pixels in uint8.
        batch: Accepted batch sizes; a static range gives a static batch dimension.
        lowering: Body of ``TomeMerge``: ``matmul`` runs everywhere, ``index_add`` not in TensorRT.
        attention: ``fused`` is the Attention operator, ``fused-fp32`` the same on queries, keys
            and values cast to float32, ``parts`` is MatMul, Add, Softmax, MatMul; ``auto`` is in
            parts for fp32, whose fused form TensorRT has no kernel for. See docs/attention.md.
        opset: Version of the standard operators, 17 to 23; the fused forms need 23, bfloat16 22.
        plugin: Write on every match and merge node which TensorRT plugin may take it. Runtimes
            without plugins run the bodies all the same; needs the ``matmul`` lowering.

    Raises:
        UsageError: if ``plugin`` is asked for with another lowering, or the opset lacks what is
            asked for.
    """

    precision: Precision = "fp32"
    batch: BatchRange = field(default_factory=BatchRange)
    lowering: Lowering = "matmul"
    attention: AttentionForm = "auto"
    opset: int = OPSET
    plugin: bool = False

    def __post_init__(self) -> None:
        check_opset(self.opset, self.precision, self.attention)
        if self.plugin and self.lowering != "matmul":
            raise UsageError(
                f"plugin nodes have the lowering {self.lowering}; expected matmul, which TensorRT "
                "takes where the plugin is missing"
            )

    @property
    def attention_form(self) -> AttentionForm:
        """The form that is written, which is not ``auto``."""
        if self.attention != "auto":
            return self.attention
        return "fused" if self.precision != "fp32" and self.opset >= OPSET else "parts"


@dataclass(frozen=True)
class OnnxFiles:
    """What was written.

    Attributes:
        paths: The model, then its external data if any.
    """

    paths: tuple[Path, ...]
    opset: int
    nodes: int


class PrecisionBoundary(nn.Module):
    """A model in its own precision behind inputs and outputs in float32, or pixels in uint8."""

    def __init__(self, model: MergedModel, dtype: torch.dtype) -> None:
        super().__init__()
        self.model = model
        self.dtype = dtype

    def forward(self, pixel_values: Tensor, *extra: Tensor) -> Tensor | tuple[Tensor, ...]:
        """``pixel_values`` and other inputs -> main output in float32, then the others."""
        output = self.model(*(floats_to(x, self.dtype) for x in (pixel_values, *extra)))
        return (output[0].float(), *output[1:]) if isinstance(output, tuple) else output.float()


def in_precision(model: MergedModel, precision: Precision) -> MergedModel:
    """A copy of the model in another precision; the model itself for fp32."""
    if precision == "fp32":
        return model
    return copy_with_dtype(model, TORCH_DTYPES[precision])


def onnx_from_model(
    model: MergedModel,
    path: Path,
    options: ExportOptions,
    output_names: str | Sequence[str],
    metadata: Mapping[str, object] | None = None,
    *,
    external_data_bytes: int = files.EXTERNAL_DATA_BYTES,
) -> OnnxFiles:
    """Export a merged model, in eval mode with fp32 weights, to the ``.onnx`` file ``path``.

    ``output_names`` are ``logits`` or ``features``, then ``source_map`` and ``entropy`` if the
    model gives them. ``metadata`` goes to the model's metadata_props as JSON, keys prefixed
    ``tome_export.``. Weights above ``external_data_bytes`` go to a file of their own, beside it.
    """
    names = [output_names] if isinstance(output_names, str) else output_names
    proto = _proto_from_model(model, options, names)
    traced = max(options.opset, opset.TRACED)
    functions = functions_for(proto.graph.node, options.lowering, traced, plugin=options.plugin)
    proto.functions.extend(functions)
    inline(proto, (spec.PLAN, spec.SIGNAL) if options.plugin else tuple(spec.SUFFIXES))
    proto = _simplified(proto)
    if options.plugin:
        read_keys_from_products(proto, traced)
    if options.opset < traced:
        opset.lower(proto)
    proto.ir_version = _ir_version(proto)
    name_by_place(proto.graph)
    _name_by_content(proto)
    counts = {step_name(step): model.sequences_at(step) for step in model.steps}
    several = {name: count for name, count in counts.items() if count > 1}
    described = {**(metadata or {}), **({spec.SEQUENCES: several} if several else {})}
    props = {METADATA_PREFIX + key: json.dumps(value) for key, value in described.items()}
    onnx.helper.set_model_props(proto, props)
    proto.doc_string = f"Vision transformer with token merging, operators v{spec.VERSION}"
    nodes = len(proto.graph.node)
    written = files.save(proto, path, threshold=external_data_bytes)
    files.check(path, proto)
    return OnnxFiles(tuple(written), options.opset, nodes)


def _proto_from_model(
    model: MergedModel, options: ExportOptions, output_names: Sequence[str]
) -> onnx.ModelProto:
    """The traced graph as a message, the only thing left that holds weights besides the model.

    ONNX Script's rules of rewriting, which live as long as the process, keep the last graph that
    they saw, and with it its weights.
    """
    from onnx_ir import serde

    exported = in_precision(model, options.precision)
    graph = _ir_from_model(exported, options, output_names)
    proto = serde.serialize_model(graph)
    for weight in graph.graph.initializers.values():
        weight.const_value = None
    if exported is not model:
        free_weights(exported)
    return proto


def _ir_from_model(
    model: MergedModel, options: ExportOptions, output_names: Sequence[str]
) -> ir.Model:
    """Trace a merged model into an ONNX graph whose match and merge are one node each.

    Nodes of merging layer i are named ``blocks.i.match`` and ``blocks.i.merge``; the match's
    input and outputs ``blocks.i.keys``, ``.keep``, ``.src`` and ``.dst``. Of a reducer that decides
    by scores, ``blocks.i.plan`` has those outputs, and ``blocks.i.signal.j`` gives score j. Of the
    merge across clips ahead of layer i, ``blocks.i.across`` stands for ``blocks.i``.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel

    dtype = TORCH_DTYPES[options.precision]
    module = PrecisionBoundary(model, dtype).eval()
    # A traced batch of 1 would be specialised to the constant 1.
    size = options.batch.opt if options.batch.is_static else max(2, options.batch.min)
    inputs = {INPUT_NAME: model.pixel_shape, **model.extra_inputs}
    pixels = torch.zeros(size, *model.pixel_shape, dtype=model.pixel_dtype)
    extra = (torch.zeros(size, *shape) for shape in model.extra_inputs.values())
    examples = (pixels, *extra)
    shapes: Any = None
    if not options.batch.is_static:
        batch = torch.export.Dim("batch", min=options.batch.min, max=options.batch.max)
        shapes = {INPUT_NAME: {0: batch}}
        if len(examples) > 1:
            shapes["extra"] = tuple({0: batch} for _ in examples[1:])
    try:
        # The CPU's fused attention has an output layout that tracing cannot carry over.
        with torch.no_grad(), _quiet(), sdpa_kernel(SDPBackend.MATH):
            program = torch.onnx.export(
                module,
                examples,
                dynamo=True,
                opset_version=max(options.opset, opset.TRACED),
                input_names=list(inputs),
                output_names=list(output_names),
                dynamic_shapes=shapes,
                custom_translation_table=translation_table(options.attention_form),
                verbose=False,
            )
    except Exception as error:
        root: BaseException = error
        while root.__cause__ is not None:
            root = root.__cause__
        reason = (str(root).strip().splitlines() or [""])[0]
        raise ExportError(
            f"torch could not export the model to ONNX ({type(root).__name__}: {reason}); "
            "check that the model runs under torch.export"
        ) from error
    if program is None:
        raise ExportError("torch returned no ONNX program; expected a traced model")
    _retype_folded_weights(program.model)
    _finish_merge_nodes(program.model, model.steps, options.plugin)
    return program.model


def _retype_folded_weights(model: ir.Model) -> None:
    """Give weights of convolutions and products the type of what they are applied to.

    ONNX Script folds batch norms into them, and of bfloat16 NumPy's arithmetic makes float32.
    """
    import onnx_ir as ir

    for node in model.graph.all_nodes():
        if node.op_type not in ("Conv", "ConvTranspose", "Gemm"):
            continue
        x, *weights = node.inputs
        for weight in weights:
            if weight is None or weight.const_value is None or x is None or x.dtype is None:
                continue
            if weight.dtype != x.dtype:
                array = weight.const_value.numpy().astype(x.dtype.numpy())
                weight.const_value = ir.tensor(array, dtype=x.dtype, name=weight.name)
                weight.dtype = x.dtype


def _finish_merge_nodes(model: ir.Model, merging: Sequence[Step], plugin: bool) -> None:
    """Names of nodes by module, stable ones for what the parity check reads, no other traces.

    For plugins the nodes also get the attributes that TensorRT finds a plugin by.
    """
    import onnx_ir as ir

    name_by_module(model)
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
    matches = [node for node in model.graph if node.op_type in (spec.MATCH, spec.PLAN)]
    if len(matches) != len(merging):
        raise ExportError(
            f"the exported graph has {len(matches)} match or plan nodes; expected {len(merging)}, "
            "one per merge"
        )
    step_of: dict[Any, str] = {}
    for step, node in zip(map(step_name, merging), matches, strict=True):
        node.name = f"{step}.{spec.SUFFIXES[node.op_type]}"
        if node.op_type == spec.MATCH:
            (keys,) = node.inputs
            if keys is None:
                raise ExportError("a match node in the exported graph has no input")
            keys.name = f"{step}.{spec.MATCH_INPUTS[0]}"
        for value, name in zip(node.outputs, spec.MATCH_OUTPUTS, strict=True):
            value.name = f"{step}.{name}"
            step_of[value] = step
    for node in model.graph:
        if node.op_type == spec.MERGE:
            step = step_of[node.inputs[2]]
            node.name = f"{step}.{spec.SUFFIXES[spec.MERGE]}"
            node.outputs[1].name = f"{step}.size"
        if node.op_type == spec.SIGNAL:
            layer, index = (node.attributes[name].as_int() for name in ("layer", "index"))
            node.name = node.outputs[0].name = f"blocks.{layer}.signal.{index}"
        if plugin and node.op_type in (spec.MATCH, spec.MERGE):
            marks = ir.convenience.convert_attributes(dict(spec.PLUGIN_ATTRIBUTES))
            node.attributes.update({mark.name: mark for mark in marks})
    model.producer_name = "tome-export"
    model.graph.name = "tome_export"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's progress lines and internal deprecations off the user's terminal."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _simplified(model: onnx.ModelProto) -> onnx.ModelProto:
    """Fold constants and drop dead nodes.

    Requires functions attached for the nodes that call them.
    Ensures the same inputs and outputs; every tensor that is a merge's decision under its name
    (``onnx.names``), with its shape; and every node for plugins still in place with its attributes.

    """
    import onnxsim

    shown, before = _show_decisions(model.graph), _interface(model)
    large = files.weight_bytes(model) > files.LARGE_BYTES
    # It joins the weights of queries, keys and values, and cannot fold that in bfloat16: they would
    # be joined anew at every run. It computes with ONNX Runtime, whose CPU has no such type.
    skipped = ["fuse_qkv"] if uses_bfloat16(model) else None
    result, valid = (
        _simplified_light(model) if large else onnxsim.simplify(model, skipped_optimizers=skipped)
    )
    if not valid:
        raise ExportError(
            "onnxsim could not validate its own result; expected an equal graph, try another "
            "version of onnxsim"
        )
    after = _interface(result)
    if before != after:
        changed = sorted(str(part) for part in before ^ after)
        raise ExportError(
            f"onnxsim changed {', '.join(changed[:4])}; expected the same inputs, outputs and "
            "nodes for plugins, try another version of onnxsim"
        )
    result.graph.value_info.extend(v for v in result.graph.output if v.name in shown)
    outputs = [value for value in result.graph.output if value.name not in shown]
    del result.graph.output[:]
    result.graph.output.extend(outputs)
    return result


def _show_decisions(graph: onnx.GraphProto) -> set[str]:
    """Make outputs of a graph's decisions for the time being, whose names then stay."""
    values = {value.name: value for value in (*graph.value_info, *graph.output)}
    names = [name for node in graph.node for name in node.output if decision_of_tensor(name)]
    shown = [name for name in names if name not in {value.name for value in graph.output}]
    graph.output.extend(values[name] for name in shown)
    return set(shown)


def _simplified_light(model: onnx.ModelProto) -> tuple[onnx.ModelProto, bool]:
    """As onnxsim does it, in place, with the large weights out of its hands: it copies them.

    They are inputs for the time being, so that what is computed of them alone stays in the graph.
    """
    import onnxsim

    light = files.without_weights(model)
    heavy = {t.name: t for t in model.graph.initializer if len(t.raw_data) > files.HEAVY_BYTES}
    light.graph.initializer.extend(t for t in model.graph.initializer if t.name not in heavy)
    light.graph.input.extend(
        onnx.helper.make_tensor_value_info(name, tensor.data_type, tensor.dims)
        for name, tensor in heavy.items()
    )
    result: onnx.ModelProto
    result, valid = onnxsim.simplify(light)
    inputs = [value for value in result.graph.input if value.name not in heavy]
    del result.graph.input[:]
    result.graph.input.extend(inputs)
    # The heavy weights stay where they are: another model could only have copies of them.
    used = {name for node in result.graph.node for name in node.input}
    weights, small = model.graph.initializer, list(result.graph.initializer)
    for index in reversed(range(len(weights))):
        if weights[index].name not in heavy or weights[index].name not in used:
            del weights[index]
    weights.extend(small)
    rest = files.without_weights(result)
    for part in ("node", "input", "output", "value_info"):
        model.graph.ClearField(part)
        getattr(model.graph, part).extend(getattr(rest.graph, part))
    return model, valid


def _ir_version(model: onnx.ModelProto) -> int:
    """The lowest version of the format for a model's opset, so that old runtimes read it."""
    needed: int = onnx.helper.find_min_ir_version_for(model.opset_import, ignore_unknown=True)
    needed = max(needed, FUNCTIONS_IR) if model.functions else needed
    return min(model.ir_version, needed)


def _interface(model: onnx.ModelProto) -> set[tuple[str, ...]]:
    """Inputs, outputs, and the nodes for plugins with their attributes."""
    graph = model.graph
    found = {("input", value.name) for value in graph.input}
    found |= {("output", value.name) for value in graph.output}
    return found | {
        (node.op_type, node.name, *sorted(map(str, node.attribute)))
        for node in graph.node
        if node.domain == spec.DOMAIN
    }


def _name_by_content(model: onnx.ModelProto) -> None:
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
