"""``tome-export build``: recipe -> patched model -> ONNX -> parity -> engine -> artifact."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from tome_export.artifact import MODEL, Artifact, Manifest, staged, write_manifest
from tome_export.artifact.environment import versions
from tome_export.artifact.learned import write_learned
from tome_export.artifact.parity import PARITY, ParityFile
from tome_export.artifact.schedule import SCHEDULE, ScheduleFile
from tome_export.artifact.staging import check_artifacts
from tome_export.build.form import GraphForm, attention_form, choose_form, fit_form
from tome_export.build.library import check_library
from tome_export.build.manifest import Notes, manifest_of, merge_info, model_info
from tome_export.build.request import BuildRequest, check_sizes
from tome_export.data.images import BUILD_COUNT, parity_images
from tome_export.engine.build import build_engine, compile_kernels, plugins_of
from tome_export.errors import ExportError, InputError, MissingComponentError
from tome_export.merge.schedule import Schedule
from tome_export.progress import Progress, Silent
from tome_export.spec import ImageSize

if TYPE_CHECKING:
    from tome_export.build.form import AttentionDecision
    from tome_export.compressors.base import Compressor
    from tome_export.engine import EngineBuilder
    from tome_export.models import LoadedModel
    from tome_export.parity.decisions import Array
    from tome_export.patch import MergedModel
    from tome_export.reducers.base import Reducer


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
        manifest = _model_and_engine(folder, request, form, progress)
        progress.stage("Write the artifact")
        manifest = write_manifest(folder, manifest)
    return Artifact(request.output.absolute(), manifest)


def build_sizes(
    requests: Sequence[BuildRequest], progress: Progress | None = None
) -> tuple[Artifact, ...]:
    """Build artifacts of one model at several image sizes: all of them, or none.

    The requests differ in ``image_size``, and in the schedule where r depends on it. Their output
    becomes a folder of artifacts, each called by its size, such as ``448x224``. Weights that all
    have in common are the same file in each; see ``onnx.files.share_weights``.

    Raises:
        UsageError: if a size is missing or given twice.
        InputError: as ``build`` does, like its other errors.
    """
    from tome_export.models import resolve
    from tome_export.onnx.files import share_weights

    progress = progress or Silent()
    first = requests[0]
    form = choose_form(first)
    _attention(first, form)
    check_sizes([request.image_size for request in requests])
    for request in requests:  # what cannot be is refused before the others are built
        resolve(request.model, request.tower, request.video, request.image_size)
        if request.schedule_file is not None and request.image_size is not None:
            ScheduleFile.read(request.schedule_file).check_image_size(request.image_size)
    with staged(first.output, force=first.force, replaceable=check_artifacts) as root:
        folders, manifests = [root / str(one.image_size) for one in requests], []
        for folder, request in zip(folders, requests, strict=True):
            folder.mkdir()
            manifests.append(_model_and_engine(folder, request, form, progress))
            gc.collect()
        progress.stage("Write the artifacts")
        share_weights([folder / MODEL for folder in folders])
        made = [write_manifest(*pair) for pair in zip(folders, manifests, strict=True)]
    output = first.output.absolute()
    return tuple(
        Artifact(output / folder.name, manifest)
        for folder, manifest in zip(folders, made, strict=True)
    )


def _model_and_engine(
    folder: Path, request: BuildRequest, form: GraphForm, progress: Progress
) -> Manifest:
    manifest, form = _export(folder, request, form, progress)
    backend = form.selection.builder
    if backend is not None:
        # The builder needs gigabytes of its own; the torch model is garbage by now.
        gc.collect()
        manifest = _build_engine(folder, request, manifest, backend, progress)
    return manifest


def _attention(request: BuildRequest, form: GraphForm) -> AttentionDecision:
    return attention_form(
        request.attention, request.precision, form.selection.builder, form.lowering, request.opset
    )


def _export(
    folder: Path, request: BuildRequest, form: GraphForm, progress: Progress
) -> tuple[Manifest, GraphForm]:
    """Everything that needs the PyTorch model; the manifest so far, and the form as written."""
    from tome_export.patch.describe import check_memory, state_sha256

    at = "" if request.image_size is None else f" at {request.image_size}"
    progress.stage(f"Load {request.model}{at}")
    loaded, merging = _load(request)
    progress.detail(f"weights: {loaded.weights.kind}, {loaded.weights.source}")
    _check_precision(request, loaded.weights.stored_dtype)
    model = _patch(request, loaded, merging)
    if merging.tuned is not None:
        # What was read, and not the file as it may be by now.
        (folder / SCHEDULE).write_bytes(merging.tuned.json_bytes())
        if note := merging.tuned.note(state_sha256(model)):
            progress.stage(note)
    form = fit_form(form, model, request.engine)
    images = None
    if request.check:
        check_memory(model, min(form.batch.max, max(form.batch.min, BUILD_COUNT)))
        images = parity_images(
            loaded.recipe, model.input_size, request.images, BUILD_COUNT, progress
        )
        check_library(model, images[:1])

    write_learned(model, folder)
    progress.stage(f"Export to ONNX, {request.precision}")
    attention = _attention(request, form)
    progress.detail(f"attention: {attention.form}; {attention.reason}")
    build = _Build(folder, loaded, model, request, attention, progress)
    manifest, form = build.write_graph(form)
    if images is not None:
        manifest = build.check_parity(manifest, images)
    return manifest, form


@dataclass(frozen=True)
class _Merging:
    """What is patched into a model; ``tuned`` is the file that the schedule is from, if any."""

    schedule: Schedule | None
    reducer: Reducer
    compressor: Compressor | None
    tuned: ScheduleFile | None


def _load(request: BuildRequest) -> tuple[LoadedModel, _Merging]:
    from tome_export.compressors import compressor_from_text
    from tome_export.models import resolve
    from tome_export.reducers import reducer_from_text

    recipe = resolve(request.model, request.tower, request.video, request.image_size)
    if recipe.merging.needs_grid and not request.dense:
        raise InputError(
            f"{recipe.merging.needs_grid}: its language model arranges the features of all patches "
            "on a grid, which merged tokens are not; use --dense (merged inside, then unmerged)"
        )
    reducer = reducer_from_text(request.reducer, request.reducer_options)
    compressor = compressor_from_text(request.compress, request.compress_options)
    schedule = request.schedule
    if schedule is None and not reducer.own_counts:
        schedule = Schedule(recipe.merging.r)
    tuned = None if request.schedule_file is None else ScheduleFile.read(request.schedule_file)
    if tuned is not None:
        tuned.check_model(recipe.name)
        tuned.check_reducer(reducer.record())
        tuned.check_image_size(ImageSize(*recipe.preprocessing.input_size[1:]))
        schedule = Schedule(per_layer=tuned.schedule)
    if schedule is not None and recipe.video is not None:
        schedule = recipe.video.schedule(schedule)
    loaded = recipe.load(
        request.weights,
        request.seed,
        weights_key=request.weights_key,
        reducer_keys=reducer.own_keys,
    )
    recipe = loaded.recipe.scored_by(request.activation).fed(request.input)
    loaded = replace(loaded, recipe=recipe)
    return loaded, _Merging(schedule, reducer, compressor, tuned)


def _check_precision(request: BuildRequest, stored: str) -> None:
    """Refuse to widen half-precision weights, which doubles the artifact and adds nothing."""
    short = {"float16": "fp16", "bfloat16": "bf16"}.get(stored)
    if short is not None and request.precision == "fp32":
        raise InputError(
            f"weights of {request.model} are stored as {stored}; {request.precision} would only "
            f"store the same values wider; use --{short}, or a checkpoint in float32"
        )


def _patch(request: BuildRequest, loaded: LoadedModel, merging: _Merging) -> MergedModel:
    from tome_export.patch import patch

    prop_attn = request.prop_attn
    if prop_attn is None:
        prop_attn = merging.reducer.proportional(loaded.recipe.merging.prop_attn)
    tuned = merging.tuned
    if tuned is not None:
        tuned.check_depth(len(patch(loaded.module, 0, dense=request.dense).layers))
    model = patch(
        loaded.module,
        merging.schedule,
        prop_attn=prop_attn,
        reducer=merging.reducer,
        dense=request.dense,
        source_map=request.source_map,
        entropy=request.entropy,
        compressor=merging.compressor,
        learned=loaded.learned,
        preprocessing=loaded.recipe.preprocessing,
    ).eval()
    if tuned is not None:
        tuned.check_tokens(model.layers[0].tokens_in, [layer.r for layer in model.layers])
    return model


@dataclass(frozen=True)
class _Build:
    """One export: the patched model, and where and how it is written."""

    folder: Path
    loaded: LoadedModel
    model: MergedModel
    request: BuildRequest
    attention: AttentionDecision
    progress: Progress

    def write_graph(self, form: GraphForm) -> tuple[Manifest, GraphForm]:
        """Write the ONNX model and its kernels; without a plugin where ``form`` allows that."""
        from tome_export.onnx.export import ExportOptions, onnx_from_model
        from tome_export.onnx.files import load
        from tome_export.onnx.plugin import merging_of
        from tome_export.patch.describe import output_names

        model, request = self.model, self.request
        options = ExportOptions(
            precision=request.precision,
            batch=form.batch,
            lowering=form.lowering,
            attention=self.attention.form,
            opset=request.opset,
            plugin=bool(form.capabilities) and model.merges,
        )
        # Only of merges: a model that makes none has no plugin to speak of.
        notes = Notes(form.note if model.merges else "", self.attention.reason, form.selection.line)
        described = {
            "model": model_info(self.loaded, model).model_dump(mode="json"),
            "merge": merge_info(model, options, notes.merge).model_dump(mode="json"),
            "versions": versions(),
        }
        names = output_names(self.loaded.recipe.output.name, model)
        exported = onnx_from_model(model, self.folder / MODEL, options, names, described)
        plugins = None
        if options.plugin:
            try:
                merging = merging_of(load(self.folder / MODEL, weights=False))
                plugins = compile_kernels(merging, form.capabilities, self.folder, self.progress)
            except (InputError, MissingComponentError, ExportError) as error:
                if form.required:
                    raise
                return self.write_graph(form.without_plugin(str(error)))
        return manifest_of(self.loaded, model, options, exported, plugins, notes), form

    def check_parity(self, manifest: Manifest, images: Array) -> Manifest:
        """Compare the graph with PyTorch, write ``parity.json``, give the manifest the result."""
        from tome_export.parity.compare import ParityFailedError, check_parity

        what = "videos" if self.model.takes_video else "images"
        self.progress.stage(f"Check parity on {len(images)} {what}")
        report = check_parity(
            self.model,
            self.folder / MODEL,
            images,
            manifest.precision,
            manifest.batch,
            activation=manifest.activation,
            progress=self.progress.detail,
        )
        if not report.passed:
            raise ParityFailedError(report)
        (self.folder / PARITY).write_bytes(ParityFile(checks=(report,)).json_bytes())
        return manifest.model_copy(update={"parity": report.summary()})


def _build_engine(
    folder: Path,
    request: BuildRequest,
    manifest: Manifest,
    backend: EngineBuilder,
    progress: Progress,
) -> Manifest:
    progress.stage(f"Build the {backend.name} engine")
    options = replace(request.engine_options, batch=manifest.batch)
    plugins = plugins_of(manifest)
    if plugins and backend.name == "tensorrt":
        # They were for the kernels; a TensorRT engine is for the GPU of this machine.
        options = replace(options, compute_capabilities=())
    info = build_engine(backend, folder, options, progress, plugins=plugins)
    return manifest.model_copy(update={"engines": {info.backend: info}})
