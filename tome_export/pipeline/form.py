"""How the merge is written into the graph, for which batch sizes, and what builds the engine."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from tome_export.engine import Selection, gpu, select
from tome_export.errors import UsageError
from tome_export.pipeline.kernels import capabilities_of, takes_plugins
from tome_export.plugins.choice import LEAK, drawback
from tome_export.spec import BatchRange

if TYPE_CHECKING:
    from tome_export.onnx.functions import Lowering
    from tome_export.patch import MergedModel
    from tome_export.pipeline.build import BuildRequest

USUAL = BatchRange()


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
    batch: BatchRange = USUAL
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
    batch = request.batch or USUAL
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
    if request.batch is None:
        size = USUAL.opt
        if request.plugin_batch_range:
            return USUAL, f"a range of batch sizes, as asked: {LEAK}"
        return BatchRange(size, size, size), f"one batch size, {size} without --batch: {LEAK}"
    if request.batch.is_static:
        return request.batch, ""
    if not request.plugin_batch_range:
        raise UsageError(
            f"--batch is {request.batch} with --merge-op plugin; {LEAK}: give one batch size such "
            f"as --batch {request.batch.opt}, or --plugin-batch-range to build it all the same"
        )
    return request.batch, f"a range of batch sizes, as asked: {LEAK}"


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


def fit_form(form: MergeForm, model: MergedModel) -> MergeForm:
    """What has to change now that the model's token counts are known."""
    if form.capabilities and not form.required:
        tokens = [merge.tokens for merge in merges_of(model)]
        reason = drawback(max(tokens, default=0), gpu.detect().gpus[0].compute_capability)
        if reason:
            form = form.without_plugin(reason)
    return form


@dataclass(frozen=True)
class MergeSize:
    """Sizes of one merge of a model.

    Attributes:
        tokens: N of one sequence.
        r: Tokens removed.
    """

    tokens: int
    r: int


def merges_of(model: MergedModel) -> list[MergeSize]:
    """The sizes of every merge in order, found by running the model without data."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    found: list[MergeSize] = []
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        inputs = {name: torch.zeros(1, *shape) for name, shape in model.extra_inputs.items()}
        model.forward_observed(
            torch.zeros(1, *model.input_size),
            lambda seen: found.append(MergeSize(seen.keys.shape[-2], seen.plan.src.shape[1])),
            inputs=inputs,
        )
    return found
