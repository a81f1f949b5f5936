"""``tome-export build``: recipe -> patched model -> ONNX -> parity -> engine -> artifact."""

from __future__ import annotations

import gc
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tome_export.artifact import MODEL, Artifact, Manifest, staged, write_manifest
from tome_export.artifact.environment import versions
from tome_export.artifact.learned import write_learned
from tome_export.artifact.parity import PARITY, ParityFile, ParityReport
from tome_export.artifact.schedule import SCHEDULE, ScheduleFile
from tome_export.build.engine import attention_form
from tome_export.build.library import check_library
from tome_export.build.manifest import manifest_of, merge_info, model_info
from tome_export.data.images import BUILD_COUNT, parity_images
from tome_export.engine import EngineOptions, Selection, gpu, limits, select
from tome_export.engine.build import (
    build_engine,
    capabilities_of,
    compile_kernels,
    plugins_of,
    takes_plugins,
)
from tome_export.errors import (
    ExportError,
    InputError,
    MissingComponentError,
    ParityError,
    UsageError,
)
from tome_export.merge.schedule import Schedule, VideoOptions
from tome_export.patch.describe import output_names, state_sha256
from tome_export.plugins.choice import LEAK, drawback
from tome_export.progress import Progress, Silent
from tome_export.reducers import DEFAULT
from tome_export.spec import (
    OPSETS,
    Activation,
    AttentionForm,
    BatchRange,
    MergeOp,
    Precision,
    TowerOptions,
    check_opset,
)

if TYPE_CHECKING:
    from tome_export.build.engine import AttentionDecision
    from tome_export.models import LoadedModel
    from tome_export.onnx.export import ExportOptions
    from tome_export.onnx.functions import Lowering
    from tome_export.patch import MergedModel

DEFAULT_BATCH = BatchRange()


@dataclass(frozen=True)
class BuildRequest:
    """What to build.

    Attributes:
        model: Recipe name, ``timm:<name>`` or ``module:function``.
        output: The artifact directory.
        schedule: Tokens to remove per layer; None for what the reducer's options say, or else the
            recipe's recommended r.
        precision: Of weights and activations.
        weights: ``pretrained``, ``random`` or the path of a checkpoint.
        weights_key: Where in that file they are; see ``weights.files.read_checkpoint``.
        seed: Of random weights.
        activation: What makes scores of the output; None for what the model says.
        prop_attn: Proportional attention; None for the recipe's and the reducer's own setting.
        reducer: Name of the reducer.
        reducer_options: Its options, each ``key=value``.
        dense: Give the features of every patch in place of the model's own output.
        source_map: Give also which final token each patch went into.
        entropy: Give also the token-size entropy of each image.
        compress: Last stage of a tower, such as ``avgpool:12x12``; None for none.
        compress_options: Its options, each ``key=value``.
        tower: Options of a vision tower; none for any other model.
        video: Frames of one video and how they are joined; none for a model of images.
        merge_op: How the merge is written into the graph.
        attention: How attention is written into the graph; see docs/attention.md.
        opset: Of the ONNX model; an older runtime needs a lower one, see docs/runtimes.md.
        engine: ``auto``, ``tensorrt``, ``tensorrt-rtx`` or ``none``.
        engine_options: Engine settings, without a batch range.
        batch: Batch sizes the model takes; None for 1:8:32, and for 8 alone with ``plugin``.
        plugin_batch_range: Let ``plugin`` take more than one batch size, whose price is memory.
        images: Folder of images for the parity check; None for those that come along.
        check: Whether to check parity; without it the artifact says that it was not checked.
        force: Replace an existing artifact.
        schedule_file: What ``tune`` wrote; it then gives the schedule, and goes into the artifact.

    Raises:
        UsageError: if the batch range stands in the engine options, or options exclude each other.
    """

    model: str
    output: Path
    schedule: Schedule | None = None
    precision: Precision = "fp32"
    weights: str = "pretrained"
    weights_key: str = ""
    seed: int = 0
    activation: Activation | None = None
    prop_attn: bool | None = None
    reducer: str = DEFAULT
    reducer_options: tuple[str, ...] = ()
    dense: bool = False
    source_map: bool = False
    entropy: bool = False
    compress: str | None = None
    compress_options: tuple[str, ...] = ()
    tower: TowerOptions = field(default_factory=TowerOptions)
    video: VideoOptions = field(default_factory=VideoOptions)
    merge_op: MergeOp = "auto"
    attention: AttentionForm = "auto"
    opset: int = OPSETS[-1]
    engine: str = "auto"
    engine_options: EngineOptions = field(default_factory=EngineOptions)
    batch: BatchRange | None = None
    plugin_batch_range: bool = False
    images: Path | None = None
    check: bool = True
    force: bool = False
    schedule_file: Path | None = None

    def __post_init__(self) -> None:
        check_opset(self.opset, self.precision, self.attention)
        if self.activation is not None and self.dense:
            raise UsageError(
                f"--activation {self.activation} is for class scores, and --dense gives features; "
                "leave one of them out"
            )
        given = self.engine_options.batch
        if given != BatchRange():
            raise UsageError(
                f"engine options have the batch range {given}; give the request's own batch, which "
                "the model and its engine share"
            )


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
        capabilities = capabilities_of(asked, selection.builder)
        return MergeForm(selection, batch, capabilities=capabilities, required=True, note=note)
    form = MergeForm(selection, batch)
    if request.merge_op == "auto" and takes_plugins(selection.builder):
        if not batch.is_static:
            return form.without_plugin(
                f"the batch is {batch} and {LEAK}; with one batch size, such as --batch "
                f"{batch.opt}, it is taken"
            )
        return replace(form, capabilities=capabilities_of(asked, selection.builder))
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
    if selection.builder is not None:
        line = f"no engine is built: {reason} of --merge-op index_add; use matmul for an engine"
        selection = replace(selection, builder=None, line=line)
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


def build(request: BuildRequest, progress: Progress | None = None) -> Artifact:
    """Build an artifact; nothing is left behind unless it is complete and its parity holds.

    Raises:
        InputError: if model, weights, schedule, images or output are not usable.
        MissingComponentError: if an engine or plugin was asked for that cannot be had here.
        ParityError: if the exported graph does not compute what PyTorch computes.
        ExportError: if the export or the engine build fails.
    """
    progress = progress or Silent()
    form = choose_form(request)
    _attention(request, form)  # refuses here what is asked for in vain, before any work
    with staged(request.output, force=request.force) as folder:
        manifest = _build_into(folder, request, form, progress)
    return Artifact(request.output.absolute(), manifest)


def _attention(request: BuildRequest, form: MergeForm) -> AttentionDecision:
    """The form of attention for what runs the graph in the end."""
    backend = form.selection.builder
    return attention_form(
        request.attention, request.precision, backend, form.lowering, request.opset
    )


def _build_into(
    folder: Path,
    request: BuildRequest,
    form: MergeForm,
    progress: Progress,
) -> Manifest:
    manifest, form = _export_and_check(folder, request, form, progress)
    selection = form.selection
    if selection.builder is not None:
        # The builder needs gigabytes of its own; the torch model is garbage by now.
        gc.collect()
        progress.stage(f"Build the {selection.builder.name} engine")
        options = replace(request.engine_options, batch=form.batch)
        plugins = plugins_of(manifest)
        if plugins and selection.builder.name == "tensorrt":
            # They were for the kernels; a TensorRT engine is for the GPU of this machine.
            options = replace(options, compute_capabilities=())
        info = build_engine(selection.builder, folder, options, progress, plugins=plugins)
        manifest = manifest.model_copy(update={"engines": {info.backend: info}})
    progress.stage("Write the artifact")
    return write_manifest(folder, manifest)


def _export_and_check(
    folder: Path,
    request: BuildRequest,
    form: MergeForm,
    progress: Progress,
) -> tuple[Manifest, MergeForm]:
    """The manifest so far, and the form as it was written."""
    from tome_export.compressors import compressor_from_text
    from tome_export.models import resolve
    from tome_export.onnx.export import ExportOptions
    from tome_export.patch import patch
    from tome_export.reducers import reducer_from_text

    progress.stage(f"Load {request.model}")
    recipe = resolve(request.model, request.tower, request.video)
    if recipe.needs_grid and not request.dense:
        raise InputError(
            f"{recipe.needs_grid}: its language model arranges the features of all patches on a "
            "grid, which merged tokens are not; use --dense (merged inside, then unmerged)"
        )
    reducer = reducer_from_text(request.reducer, request.reducer_options)
    compressor = compressor_from_text(request.compress, request.compress_options)
    schedule = request.schedule
    if schedule is None and not reducer.own_counts:
        schedule = Schedule(recipe.recommended_r)
    given = None if request.schedule_file is None else ScheduleFile.read(request.schedule_file)
    if given is not None:
        given.check_model(recipe.name)
        given.check_reducer(reducer.record())
        schedule = Schedule(per_layer=given.schedule)
    if schedule is not None and recipe.video is not None:
        schedule = replace(schedule, frames=recipe.video.merging)
    recipe = replace(recipe, reducer_keys=reducer.own_keys, weights_key=request.weights_key)
    loaded = recipe.load(weights=request.weights, seed=request.seed)
    loaded = replace(loaded, recipe=loaded.recipe.scored_by(request.activation))
    progress.detail(f"weights: {loaded.weights.kind}, {loaded.weights.source}")
    _check_precision(request, loaded.weights.stored_dtype)
    prop_attn = reducer.proportional(recipe.prop_attn)
    if request.prop_attn is not None:
        prop_attn = request.prop_attn
    if given is not None:
        given.check_depth(len(patch(loaded.module, 0, dense=request.dense).layers))
        # What was read, and not the file as it may be by now.
        (folder / SCHEDULE).write_bytes(given.json_bytes())
    model = patch(
        loaded.module,
        schedule,
        prop_attn=prop_attn,
        reducer=reducer,
        dense=request.dense,
        source_map=request.source_map,
        entropy=request.entropy,
        compressor=compressor,
        learned=loaded.learned,
    ).eval()
    if given is not None:
        given.check_tokens(model.layers[0].tokens_in, [layer.r for layer in model.layers])
        if note := given.note(state_sha256(model)):
            progress.stage(note)
    form = fit_form(form, model, request.engine)
    images = None
    if request.check:
        images = parity_images(
            loaded.recipe, model.input_size, request.images, BUILD_COUNT, progress
        )
        check_library(model, images[:1])

    write_learned(model, folder)
    progress.stage(f"Export to ONNX, {request.precision}")
    attention = _attention(request, form)
    progress.detail(f"attention: {attention.form}; {attention.reason}")
    options = ExportOptions(
        precision=request.precision,
        batch=form.batch,
        lowering=form.lowering,
        attention=attention.form,
        opset=request.opset,
        plugin=bool(form.capabilities) and model.merges,
    )
    manifest, form = _exported(folder, loaded, model, options, form, attention.reason, progress)
    options = replace(options, plugin=manifest.plugins is not None)

    if images is not None:
        what = "videos" if model.takes_video else "images"
        progress.stage(f"Check parity on {len(images)} {what}")
        report = _parity(folder, model, images, options, manifest.activation, progress)
        manifest = manifest.model_copy(update={"parity": report.summary()})
        (folder / PARITY).write_bytes(ParityFile(checks=(report,)).json_bytes())
    return manifest, form


def _check_precision(request: BuildRequest, stored: str) -> None:
    """Refuse to widen half-precision weights, which doubles the artifact and adds nothing.

    Raises:
        InputError: if the weights are stored in half precision and fp32 is asked for.
    """
    short = {"float16": "fp16", "bfloat16": "bf16"}.get(stored)
    if short is not None and request.precision == "fp32":
        raise InputError(
            f"weights of {request.model} are stored as {stored}; {request.precision} would only "
            f"store the same values wider; use --{short}, or a checkpoint in float32"
        )


def _exported(
    folder: Path,
    loaded: LoadedModel,
    model: MergedModel,
    options: ExportOptions,
    form: MergeForm,
    attention_note: str,
    progress: Progress,
) -> tuple[Manifest, MergeForm]:
    """Write the ONNX model and its kernels; returns the manifest so far, and the form it has."""
    from tome_export.onnx.export import onnx_from_model
    from tome_export.onnx.files import load
    from tome_export.onnx.plugin import merging_of

    # Only of merges: a model that makes none has no plugin to speak of.
    merge_note = form.note if model.merges else ""
    described = {
        "model": model_info(loaded, model).model_dump(mode="json"),
        "merge": merge_info(model, options, merge_note).model_dump(mode="json"),
        "versions": versions(),
    }
    names = output_names(loaded.recipe.output_name, model)
    exported = onnx_from_model(model, folder / MODEL, options, names, described)
    plugins = None
    if options.plugin:
        try:
            merging = merging_of(load(folder / MODEL, weights=False))
            plugins = compile_kernels(merging, form.capabilities, folder, progress)
        except (InputError, MissingComponentError, ExportError) as error:
            if form.required:
                raise
            form, options = form.without_plugin(str(error)), replace(options, plugin=False)
            return _exported(folder, loaded, model, options, form, attention_note, progress)
    manifest = manifest_of(
        loaded,
        model,
        options,
        exported,
        plugins=plugins,
        merge_note=merge_note,
        attention_note=attention_note,
        engine_note=form.selection.line,
    )
    return manifest, form


def _parity(
    folder: Path,
    model: Any,
    images: Any,
    options: Any,
    activation: Activation | None,
    progress: Progress,
) -> ParityReport:
    from tome_export.parity.compare import check_parity

    report = check_parity(
        model,
        folder / MODEL,
        images,
        options.precision,
        options.batch,
        activation=activation,
        progress=progress.detail,
    )
    if not report.passed:
        raise ParityFailedError(report)
    return report


class ParityFailedError(ParityError):
    """Parity failed; ``report`` says where.

    Attributes:
        report: The whole report.
    """

    def __init__(self, report: ParityReport) -> None:
        first, more = report.failures[0], len(report.failures) - 1
        also = f" (and {more} more findings)" if more else ""
        super().__init__(
            f"parity failed for {report.candidate} in {report.precision}: {first}{also}; expected "
            "PyTorch's results as far as rounding allows"
        )
        self.report = report
