"""How the merge is written into the graph, for which batch sizes, and what builds the engine."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from tome_export.engine import Selection, gpu, limits, select
from tome_export.errors import InputError, UsageError
from tome_export.pipeline.kernels import capabilities_of, takes_plugins
from tome_export.plugins.choice import LEAK, drawback
from tome_export.spec import BatchRange

if TYPE_CHECKING:
    from tome_export.onnx.functions import Lowering
    from tome_export.patch import MergedModel
    from tome_export.pipeline.build import BuildRequest

DEFAULT_BATCH = BatchRange()


@dataclass(frozen=True)
class MergeForm:
    """What is written, and what builds an engine from it.

    Attributes:
        selection: The backend that builds the engine, or None, and why.
        batch: Batch sizes the model takes.
        lowering: Body of the merge function.
        capabilities: GPUs to compile the plugin's kernels for; empty without the plugin.
        required: Whether to fail where there can be no kernels, and not do without.
        note: What a user should know of the choice; empty if nothing.
    """

    selection: Selection
    batch: BatchRange = DEFAULT_BATCH
    lowering: Lowering = "matmul"
    capabilities: tuple[tuple[int, int], ...] = ()
    required: bool = False
    note: str = ""

    def without_plugin(self, reason: str) -> MergeForm:
        """The same with plain operators."""
        return replace(self, capabilities=(), note=f"no plugin: {reason}")


def choose_form(request: BuildRequest) -> MergeForm:
    """What can be said before the model is there.

    A plugin is built for one batch size unless a range is asked for in so many words, because
    TensorRT keeps memory at every change of it; ``auto`` takes none for a range.

    Raises:
        UsageError: if options exclude each other.
        MissingComponentError: if the engine, or the plugin's compiler, was asked for and is not
            here.
    """
    selection = select(request.engine)
    asked = request.engine_options.compute_capabilities
    batch = request.batch or DEFAULT_BATCH
    if request.plugin_batch_range and request.merge_op != "plugin":
        raise UsageError(
            f"--plugin-batch-range goes with --merge-op plugin, and --merge-op is "
            f"{request.merge_op}; leave it out"
        )
    if request.merge_op == "plugin":
        from tome_export.plugins.aot import require_compiler

        require_compiler()
        batch, note = _plugin_batch(request)
        capabilities = capabilities_of(asked, selection.backend)
        return MergeForm(selection, batch, capabilities=capabilities, required=True, note=note)
    form = MergeForm(selection, batch)
    if request.merge_op == "auto" and takes_plugins(selection.backend):
        if not batch.is_static:
            return form.without_plugin(
                f"the batch is {batch} and {LEAK}; with one batch size, such as --batch "
                f"{batch.opt}, it is taken"
            )
        return replace(form, capabilities=capabilities_of(asked, selection.backend))
    if request.merge_op == "index_add":
        return _scattering(request, form)
    return form


def _plugin_batch(request: BuildRequest) -> tuple[BatchRange, str]:
    """The batch sizes of a model with plugins, and what to say of them."""
    batch, ranged = request.batch or DEFAULT_BATCH, request.plugin_batch_range
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


def _scattering(request: BuildRequest, form: MergeForm) -> MergeForm:
    """Scatter-add, which no engine takes."""
    reason = "TensorRT's parser refuses scatter-add"
    if request.engine not in ("auto", "none"):
        raise UsageError(
            f"--merge-op index_add cannot go into a {request.engine} engine ({reason}); use "
            "--merge-op matmul, or --engine none"
        )
    selection = form.selection
    if selection.backend is not None:
        line = f"no engine is built: {reason} of --merge-op index_add; use matmul for an engine"
        selection = replace(selection, backend=None, line=line)
    return replace(form, selection=selection, lowering="index_add")


def fit_form(form: MergeForm, model: MergedModel, engine: str) -> MergeForm:
    """What has to change now that the model's token counts are known.

    Args:
        form: From ``choose_form``.
        model: The patched model.
        engine: As it was asked for; ``auto`` does without one that cannot take the model.

    Raises:
        InputError: if an engine that was asked for cannot take the model.
    """
    merges = limits.merges_of(model.layers, model.prefix)
    if form.capabilities and not form.required:
        tokens = max((merge.tokens for merge in merges), default=0)
        reason = drawback(tokens, gpu.detect().gpus[0].compute_capability)
        if reason:
            form = form.without_plugin(reason)
    backend = form.selection.backend
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
    return replace(form, selection=replace(form.selection, backend=None, line=line))
