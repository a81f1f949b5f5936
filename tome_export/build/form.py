"""The form in which a model is written: batch sizes, merge, attention, and the engine it is for."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from tome_export.engine import Selection, gpu, limits, select
from tome_export.engine.build import capabilities_of, takes_plugins
from tome_export.errors import InputError, UsageError
from tome_export.plugins.choice import LEAK, drawback
from tome_export.spec import OPSETS, AttentionForm, BatchRange, Lowering, Precision, lowering_of

if TYPE_CHECKING:
    from tome_export.build.request import BuildRequest
    from tome_export.engine import EngineBuilder
    from tome_export.patch import MergedModel

ATTENTION_SINCE = (10, 14)
"""First TensorRT whose parser knows ONNX's Attention operator."""

FP32_SUMS_SINCE = (11, 3)
"""First TensorRT that fuses half-precision attention cast up to float32 (its release notes)."""


@dataclass(frozen=True)
class GraphForm:
    """What is written, and what builds an engine from it.

    Attributes:
        selection: The backend that builds the engine, or None, and why.
        capabilities: GPUs to compile the plugin's kernels for; empty without the plugin.
        required: Whether to fail where there can be no kernels, and not do without.
        note: What a user should know of the choice; empty if nothing.
    """

    selection: Selection
    batch: BatchRange = field(default_factory=BatchRange)
    lowering: Lowering = "matmul"
    capabilities: tuple[tuple[int, int], ...] = ()
    required: bool = False
    note: str = ""

    def without_plugin(self, reason: str) -> GraphForm:
        """The same with plain operators."""
        return replace(self, capabilities=(), note=f"no plugin: {reason}")


def choose_form(request: BuildRequest) -> GraphForm:
    """What can be said before the model is there.

    A plugin is built for one batch size unless a range is asked for in so many words, because
    TensorRT keeps memory at every change of it; ``auto`` takes none for a range.
    """
    selection = select(request.engine)
    asked = request.engine_options.compute_capabilities
    batch = request.batch or BatchRange()
    if request.plugin_batch_range and request.merge_op != "plugin":
        raise UsageError(
            f"--plugin-batch-range goes with --merge-op plugin, and --merge-op is "
            f"{request.merge_op}; leave it out"
        )
    if request.merge_op == "plugin":
        from tome_export.plugins.aot import require_compiler

        require_compiler()
        batch, note = _plugin_batch(request)
        capabilities = capabilities_of(asked, selection.builder)
        return GraphForm(selection, batch, capabilities=capabilities, required=True, note=note)
    form = GraphForm(selection, batch)
    if request.merge_op == "auto" and takes_plugins(selection.builder):
        if not batch.is_static:
            return form.without_plugin(
                f"the batch is {batch} and {LEAK}; with one batch size, such as --batch "
                f"{batch.opt}, it is taken"
            )
        return replace(form, capabilities=capabilities_of(asked, selection.builder))
    if request.merge_op == "index_add":
        return _scattering(request, form)
    return replace(form, lowering=lowering_of(request.merge_op))


def _plugin_batch(request: BuildRequest) -> tuple[BatchRange, str]:
    """The batch sizes of a model with plugins, and what to say of them."""
    batch, ranged = request.batch or BatchRange(), request.plugin_batch_range
    if request.batch is None and not ranged:
        size = batch.opt
        note = f"the batch is fixed at {size}, another with --batch: {LEAK}"
        return BatchRange(size, size, size), note
    if batch.is_static and ranged:
        raise UsageError(
            f"--plugin-batch-range is given and --batch is {batch}, one batch size; leave one of "
            "them out"
        )
    if batch.is_static:
        return batch, ""
    if not ranged:
        raise UsageError(
            f"--batch is {batch} with --merge-op plugin; {LEAK}: give one batch size such as "
            f"--batch {batch.opt}, or --plugin-batch-range to build it all the same"
        )
    return batch, f"a range of batch sizes, as asked: {LEAK}"


def _scattering(request: BuildRequest, form: GraphForm) -> GraphForm:
    """Scatter-add, which no engine takes."""
    reason = "TensorRT's parser refuses scatter-add"
    if request.engine not in ("auto", "none"):
        raise UsageError(
            f"--merge-op index_add cannot go into a {request.engine} engine ({reason}); use "
            "--merge-op matmul, or --engine none"
        )
    selection = form.selection
    if selection.builder is not None:
        line = f"no engine is built: {reason} of --merge-op index_add; use matmul for an engine"
        selection = replace(selection, builder=None, line=line)
    return replace(form, selection=selection, lowering="index_add")


def fit_form(form: GraphForm, model: MergedModel, engine: str) -> GraphForm:
    """What has to change now that the model's token counts are known."""
    merges = limits.merges_of(model.layers, model.prefix)
    if form.capabilities and not form.required:
        tokens = max((merge.tokens for merge in merges), default=0)
        reason = drawback(tokens, gpu.detect().gpus[0].compute_capability)
        if reason:
            form = form.without_plugin(reason)
    backend = form.selection.builder
    if backend is None:
        return form
    refused = limits.refusal(
        backend.name,
        merges,
        class_token=model.class_token,
        scored=model.settings.reducer.scored,
        plugin=bool(form.capabilities),
    )
    if refused is None:
        return form
    if engine != "auto":
        raise InputError(refused)
    line = f"no engine is built: {refused}"
    return replace(form, selection=replace(form.selection, builder=None, line=line))


@dataclass(frozen=True)
class AttentionDecision:
    """How attention is written into the graph, and one line that says why."""

    form: AttentionForm
    reason: str


def attention_form(
    asked: AttentionForm,
    precision: Precision,
    backend: EngineBuilder | None,
    lowering: Lowering,
    opset: int = OPSETS[-1],
) -> AttentionDecision:
    """The form of attention for what will run the graph; docs/attention.md says why."""
    if asked == "fused-fp32" and precision != "fp16":
        raise UsageError(
            f"--attention fused-fp32 was asked for in {precision}; expected fp16, the precision "
            "in which fused attention may sum in less than float32: use --attention auto"
        )
    if asked != "auto":
        if refusal := attention_refusal(asked, backend):
            raise UsageError(refusal)
        reason, version = "as asked", _tensorrt_version(backend)
        if asked == "fused-fp32" and version is not None and version < FP32_SUMS_SINCE:
            reason += f"; TensorRT older than {_text(FP32_SUMS_SINCE)} computes it unfused"
        return AttentionDecision(asked, reason)
    if precision == "fp32":
        return AttentionDecision("parts", "TensorRT has no fused kernel in fp32")
    if opset < OPSETS[-1]:
        return AttentionDecision("parts", f"opset {opset} has no operator for it")
    if backend is not None:
        if attention_refusal("fused", backend):
            least = _text(ATTENTION_SINCE)
            return AttentionDecision("parts", f"TensorRT older than {least} has no such operator")
        return AttentionDecision("fused", f"{backend.name} has a fused kernel for it")
    if lowering == "index_add":
        return AttentionDecision("parts", "only ONNX Runtime takes a graph with index_add")
    from tome_export.runtime.ort import missing

    if missing("cuda") is None:
        return AttentionDecision(
            "parts", "ONNX Runtime's CUDA provider is here, where parts run in every version"
        )
    return AttentionDecision("fused", "engines can be built from it elsewhere")


def attention_refusal(form: AttentionForm, backend: EngineBuilder | None) -> str | None:
    """Why a backend's parser does not take a form of attention; None if it does."""
    version = _tensorrt_version(backend)
    if form == "parts" or version is None or version >= ATTENTION_SINCE:
        return None
    return (
        f"attention is {form}, an operator that TensorRT {_text(version)} does not know (expected "
        f"{_text(ATTENTION_SINCE)} or later); build with --attention parts"
    )


def _tensorrt_version(backend: EngineBuilder | None) -> tuple[int, ...] | None:
    """Major and minor version of TensorRT; None for another backend or none."""
    if backend is None or backend.name != "tensorrt":
        return None
    return tuple(int(part) for part in (backend.availability().version or "0.0").split(".")[:2])


def _text(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
