"""An artifact opened again: its PyTorch model, that model at other schedules, and its runners."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tome_export.artifact import MODEL, Artifact
from tome_export.artifact.learned import COMPRESSOR, REDUCER, with_own_weights
from tome_export.artifact.manifest import PluginInfo
from tome_export.engine import EngineOptions
from tome_export.engine.build import (
    Plugins,
    build_engine,
    capabilities_of,
    compile_kernels,
    plugins_of,
)
from tome_export.errors import InputError
from tome_export.merge.schedule import Schedule
from tome_export.progress import Progress
from tome_export.runtime.inputs import extra_inputs
from tome_export.runtime.registry import backend_of
from tome_export.runtime.runner import EngineFile, Runnable, Runner
from tome_export.spec import BatchRange, ImageSize, TowerOptions, lowering_of
from tome_export.video.options import VideoOptions
from tome_export.weights.files import sha256

if TYPE_CHECKING:
    from tome_export.patch import MergedModel


def reference_model(artifact: Artifact, weights: str | None = None) -> tuple[MergedModel, Any]:
    """The model of an artifact with the same weights and schedule, in fp32, and its recipe.

    ``weights`` says where they are now, if not where they were at the build.
    """
    from tome_export.compressors import compressor_class
    from tome_export.models import resolve
    from tome_export.patch import patch
    from tome_export.patch.describe import learned_sha256, state_sha256
    from tome_export.reducers import reducer_class

    manifest = artifact.manifest
    recorded = manifest.model.weights
    kind, source = recorded.kind, recorded.source
    name = manifest.model.resolvable_name(weights)
    if manifest.model.folder and weights is not None and Path(weights).is_dir():
        weights = None  # that of the checkpoint, which is in the name now
    key = recorded.key
    if key and weights is not None:
        given = Path(weights)
        if not given.is_file() or sha256(given) != recorded.sha256:
            key = ""  # it says nothing of another file
    if weights is None and kind == "file":
        weights = source.partition(";")[0]
        if not Path(weights).is_file():
            raise InputError(
                f"the artifact was built from the weights file {weights}, which is not in the "
                "current folder; give its path with --weights"
            )
    if weights is None:
        weights = "random" if kind == "random" else "pretrained"
    video = manifest.video or VideoOptions()
    tower = TowerOptions() if manifest.tower is None else manifest.tower.options
    size = manifest.model.image_size
    recipe = resolve(name, tower, video, None if size is None else ImageSize.parse(size))
    merge = manifest.merge
    reducer = merge.reducer.made(reducer_class(merge.reducer.name))
    reducer = with_own_weights(reducer, artifact, REDUCER)
    compressor = None
    if (entry := manifest.compressor) is not None:
        compressor = entry.made(compressor_class(entry.name))
        compressor = with_own_weights(compressor, artifact, COMPRESSOR)
    recipe = replace(recipe, name=manifest.model.name)
    loaded = recipe.load(
        weights, recorded.seed or 0, weights_key=key, reducer_keys=reducer.own_keys
    )
    # Behind the first layer that joins frames, proportions say how many tokens merge.
    own = merge.r if video.merging is None else merge.r[: video.merging.layers[0]]
    schedule = video.schedule(Schedule(per_layer=own))
    model = patch(
        loaded.module,
        schedule,
        prop_attn=merge.prop_attn,
        reducer=reducer,
        compressor=compressor,
        learned=loaded.learned,
        dense=manifest.form.dense,
        source_map=manifest.form.source_map,
        entropy=manifest.form.entropy,
        preprocessing=manifest.preprocessing,
    ).eval()
    if state_sha256(model) != recorded.state_sha256:
        raise InputError(
            f"the weights found now ({loaded.weights.source}) are not those of the build "
            f"({kind}: {source}); give the same ones with --weights"
        )
    if learned_sha256(model) != manifest.model.learned_sha256:
        raise InputError(
            f"the learned weights of reducer {reducer.name} or of the compressor are not those of "
            "the build; rebuild the artifact"
        )
    return model, loaded.recipe


def rescheduled(model: MergedModel, schedule: Schedule) -> MergedModel:
    """The same model, weights shared, at another schedule."""
    from tome_export.patch import patch_with_settings

    return patch_with_settings(model, replace(model.settings, schedule=schedule)).eval()


def export_variant(
    artifact: Artifact, model: MergedModel, folder: Path, progress: Progress
) -> PluginInfo | None:
    """Export a model as the artifact's was: same precision, batch, operators, merge op.

    Returns what the manifest would say of the kernels; None without any.
    """
    from tome_export.onnx.export import ExportOptions, onnx_from_model
    from tome_export.onnx.files import load
    from tome_export.onnx.plugin import merging_of
    from tome_export.patch.describe import output_names
    from tome_export.plugins.aot import require_compiler

    manifest = artifact.manifest
    plugin = manifest.merge.merge_op == "plugin" and model.merges
    options = ExportOptions(
        precision=manifest.precision,
        batch=manifest.batch,
        lowering=lowering_of(manifest.merge.merge_op),
        attention=manifest.onnx.attention,
        opset=manifest.onnx.opset,
        plugin=plugin,
    )
    names = output_names(manifest.output.name, model)
    onnx_from_model(model, folder / MODEL, options, names)
    if not plugin or manifest.plugins is None:
        return None
    require_compiler()
    capabilities = capabilities_of(manifest.plugins.compute_capabilities, None)
    merging = merging_of(load(folder / MODEL, weights=False))
    return compile_kernels(merging, capabilities, folder, progress)


@dataclass(frozen=True, kw_only=True)
class ArtifactModel(Runnable):
    """A model with all that is needed to build an engine of it and to feed it.

    Attributes:
        folder: Folder with ``model.onnx`` and, with the plugin, its kernels.
        plugins: Plugins of the model; None if it has none.
        extra_inputs: Inputs besides the images: shape of each without the batch.
    """

    folder: Path
    batch: BatchRange
    plugins: Plugins | None = None
    extra_inputs: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


def check_engine(artifact: Artifact, backend: str) -> None:
    """Refuse a backend that loads engines, and the artifact has none for it."""
    if backend_of(backend).opens == "engine" and backend not in artifact.manifest.engines:
        raise InputError(
            f"the artifact has no {backend} engine; build one with 'tome-export engine "
            f"{artifact.path} --engine {backend}'"
        )


def model_from_artifact(
    artifact: Artifact, label: str, module: MergedModel | None = None
) -> ArtifactModel:
    """What an artifact holds, and its model in PyTorch if there is need of it."""
    from tome_export.onnx.files import check_memory

    check_memory(artifact.model_path)
    manifest = artifact.manifest
    return ArtifactModel(
        label=label,
        folder=artifact.path,
        graph=artifact.model_path,
        precision=manifest.precision,
        output_name=manifest.output.name,
        batch=manifest.batch,
        engines={
            name: EngineFile(
                artifact.path / engine.file,
                engine.version_compatible,
                artifact.model_path if engine.stripped else None,
            )
            for name, engine in manifest.engines.items()
        },
        plugins=plugins_of(manifest),
        module=module,
        extra_inputs=extra_inputs(manifest),
    )


@contextlib.contextmanager
def exported_variant(
    artifact: Artifact, label: str, module: MergedModel, progress: Progress
) -> Iterator[ArtifactModel]:
    """A model from ``rescheduled``, exported as the artifact's was into a temporary folder."""
    with tempfile.TemporaryDirectory(prefix="tome-export-") as name:
        folder = Path(name)
        kernels = export_variant(artifact, module, folder, progress)
        yield replace(
            model_from_artifact(artifact, label, module),
            folder=folder,
            graph=folder / MODEL,
            engines={},
            plugins=None if kernels is None else Plugins(2 * len(module.steps), kernels.kernels),
            extra_inputs=module.extra_inputs,
        )


def with_engine(name: str, model: ArtifactModel, folder: Path, progress: Progress) -> ArtifactModel:
    """The model with an engine for a backend, built into a folder if it has none and needs one."""
    builder = backend_of(name).builder
    if builder is None or name in model.engines or model.graph is None:
        return model
    progress.detail(f"building a {name} engine of {model.label}")
    graph = model.graph
    if not isinstance(graph, Path):
        from tome_export.onnx.files import save

        graph = save(graph, folder / MODEL)[0]
    options = EngineOptions(batch=model.batch)
    build_engine(
        builder, model.folder, options, progress, folder, plugins=model.plugins, model=graph
    )
    engine = EngineFile(folder / builder.file_name)
    return replace(model, engines={**model.engines, name: engine})


@contextlib.contextmanager
def open_runner(name: str, model: ArtifactModel, progress: Progress) -> Iterator[Runner]:
    """Load a model on a backend; where it has no engine for one, that is built first."""
    with tempfile.TemporaryDirectory(prefix="tome-export-") as folder:
        ready = with_engine(name, model, Path(folder), progress)
        with backend_of(name).open(ready) as runner:
            yield runner
