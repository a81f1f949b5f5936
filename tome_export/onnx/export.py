"""From a merged torch module to an ONNX model with static tokens and a dynamic batch."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tome_export.errors import ExportError, UsageError
from tome_export.merge import spec
from tome_export.merge.plan import Step, step_name
from tome_export.onnx.functions import Lowering
from tome_export.onnx.names import name_by_module
from tome_export.onnx.translation import translation_table
from tome_export.patch import MergedModel
from tome_export.spec import INPUT_NAME, AttentionForm, BatchRange, Precision

if TYPE_CHECKING:
    import onnx_ir as ir

TORCH_DTYPES: dict[Precision, torch.dtype] = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}

OPSET = 23
"""First opset with Attention and RMSNormalization."""


@dataclass(frozen=True)
class ExportOptions:
    """How a model becomes ONNX.

    Attributes:
        precision: Of weights and activations. Matching, sizes, merge sums and layer-norm
            statistics are fp32 in every precision; so are the model's input and output.
        batch: Accepted batch sizes; a static range gives a static batch dimension.
        lowering: Body of ``TomeMerge``: ``matmul`` runs everywhere, ``index_add`` not in TensorRT.
        attention: ``fused`` is the Attention operator, ``fused-fp32`` the same on queries, keys
            and values cast to float32, ``parts`` is MatMul, Add, Softmax, MatMul; ``auto`` is in
            parts for fp32, whose fused form TensorRT has no kernel for. See docs/attention.md.
        opset: Of the standard operators; the fused forms need 23.
        plugin: Write on every match and merge node which TensorRT plugin may take it. Runtimes
            without plugins run the bodies all the same; needs the ``matmul`` lowering.

    Raises:
        UsageError: if ``plugin`` is asked for with another lowering.
    """

    precision: Precision = "fp32"
    batch: BatchRange = field(default_factory=BatchRange)
    lowering: Lowering = "matmul"
    attention: AttentionForm = "auto"
    opset: int = OPSET
    plugin: bool = False

    def __post_init__(self) -> None:
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


class PrecisionBoundary(nn.Module):
    """A model in its own precision behind float32 inputs and outputs."""

    def __init__(self, model: MergedModel, dtype: torch.dtype) -> None:
        super().__init__()
        self.model = model
        self.dtype = dtype

    def forward(self, pixel_values: Tensor, *extra: Tensor) -> Tensor | tuple[Tensor, ...]:
        """``pixel_values [B, C, H, W]`` float32 -> main output in float32, then the others."""
        output = self.model(pixel_values.to(self.dtype), *(x.to(self.dtype) for x in extra))
        return (output[0].float(), *output[1:]) if isinstance(output, tuple) else output.float()


def in_precision(model: MergedModel, precision: Precision) -> MergedModel:
    """A copy of the model in another precision; the model itself for fp32."""
    if precision == "fp32":
        return model
    return copy.deepcopy(model).to(TORCH_DTYPES[precision])


def ir_from_model(
    model: MergedModel, options: ExportOptions, output_names: Sequence[str]
) -> ir.Model:
    """Trace a merged model into an ONNX graph whose match and merge are one node each.

    Nodes of merging layer i are named ``blocks.i.match`` and ``blocks.i.merge``; the match's
    input and outputs ``blocks.i.keys``, ``.keep``, ``.src`` and ``.dst``. Of a reducer that decides
    by scores, ``blocks.i.plan`` has those outputs, and ``blocks.i.signal.j`` gives score j. Of the
    merge across clips ahead of layer i, ``blocks.i.across`` stands for ``blocks.i``.

    Args:
        model: In eval mode, fp32 weights.
        options: Precision, batch range, operator forms.
        output_names: ``logits`` or ``features``, then ``source_map`` and ``entropy`` if the model
            gives them.

    Raises:
        ExportError: if torch cannot trace or translate the model.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel

    dtype = TORCH_DTYPES[options.precision]
    module = PrecisionBoundary(in_precision(model, options.precision), dtype).eval()
    # A traced batch of 1 would be specialised to the constant 1.
    size = options.batch.opt if options.batch.is_static else max(2, options.batch.min)
    inputs = {INPUT_NAME: model.input_size, **model.extra_inputs}
    examples = tuple(torch.zeros(size, *shape) for shape in inputs.values())
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
                opset_version=options.opset,
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
    _finish_merge_nodes(program.model, model.steps, options.plugin)
    return program.model


def _finish_merge_nodes(model: ir.Model, merging: Sequence[Step], plugin: bool) -> None:
    """Names of nodes by module, stable ones for what the parity check reads, no other traces.

    For plugins the nodes also get the attributes that TensorRT finds a plugin by.
    """
    name_by_module(model)
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
    matches = [node for node in model.graph if node.op_type in (spec.MATCH, spec.PLAN)]
    if len(matches) != len(merging):
        raise ExportError(
            f"the exported graph has {len(matches)} match or plan nodes; expected {len(merging)}, "
            "one per merge"
        )
    place_of: dict[Any, str] = {}
    for place, node in zip(map(step_name, merging), matches, strict=True):
        node.name = f"{place}.{spec.SUFFIXES[node.op_type]}"
        if node.op_type == spec.MATCH:
            for given, name in zip(node.inputs, spec.MATCH_INPUTS, strict=True):
                _value(given).name = f"{place}.{name}"
        for value, name in zip(node.outputs, spec.MATCH_OUTPUTS, strict=True):
            value.name = f"{place}.{name}"
            place_of[value] = place
    for node in model.graph:
        if node.op_type == spec.MERGE:
            place = place_of[node.inputs[2]]
            node.name = f"{place}.{spec.SUFFIXES[spec.MERGE]}"
            node.outputs[1].name = f"{place}.size"
        if node.op_type == spec.SIGNAL:
            layer, index = (node.attributes[name].as_int() for name in ("layer", "index"))
            node.name = node.outputs[0].name = f"blocks.{layer}.signal.{index}"
        if plugin and node.op_type in (spec.MATCH, spec.MERGE):
            node.attributes.update(_plugin_attributes())
    model.producer_name = "tome-export"
    model.graph.name = "tome_export"


def _plugin_attributes() -> dict[str, ir.Attr]:
    import onnx_ir as ir

    attributes = ir.convenience.convert_attributes(dict(spec.PLUGIN_ATTRIBUTES))
    return {attribute.name: attribute for attribute in attributes}


def _value(value: Any) -> Any:
    if value is None:
        raise ExportError("a match node in the exported graph has no input; expected the keys")
    return value


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
