"""The PyTorch model that an artifact was built from, and the same model at other schedules."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tome_export.artifact import MODEL, Artifact
from tome_export.artifact.learned import COMPRESSOR, REDUCER, with_own_weights
from tome_export.artifact.manifest import PluginInfo
from tome_export.engine.build import capabilities_of, compile_kernels
from tome_export.errors import InputError
from tome_export.merge.schedule import Schedule, VideoOptions
from tome_export.patch.describe import learned_sha256, output_names, state_sha256
from tome_export.progress import Progress
from tome_export.spec import TowerOptions
from tome_export.weights.files import sha256

if TYPE_CHECKING:
    from tome_export.patch import MergedModel


def reference_model(artifact: Artifact, weights: str | None = None) -> tuple[MergedModel, Any]:
    """The model of an artifact with the same weights and schedule, in fp32, and its recipe.

    Args:
        artifact: The artifact.
        weights: Where the weights are now, if not where they were at the build: a file, or the
            folder of a checkpoint that was one.

    Raises:
        InputError: if the weights cannot be found, or are others than at the build.
    """
    from tome_export.compressors import compressor_class
    from tome_export.models import resolve
    from tome_export.patch import patch
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
    recipe = resolve(name, tower, video)
    merge = manifest.merge
    reducer = merge.reducer.made(reducer_class(merge.reducer.name))
    reducer = with_own_weights(reducer, artifact, REDUCER)
    compressor = None
    if (entry := manifest.compressor) is not None:
        compressor = entry.made(compressor_class(entry.name))
        compressor = with_own_weights(compressor, artifact, COMPRESSOR)
    recipe = replace(
        recipe,
        name=manifest.model.name,
        reducer_keys=reducer.own_keys,
        weights_key=key,
    )
    loaded = recipe.load(weights=weights, seed=recorded.seed or 0)
    # Behind the first layer that joins frames, proportions say how many tokens merge.
    own = merge.r if video.merging is None else merge.r[: video.merging.layers[0]]
    schedule = Schedule(per_layer=own, frames=video.merging)
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
    """The same model, weights shared, at another schedule.

    Raises:
        InputError: if the schedule does not fit the model.
    """
    from tome_export.patch import patched

    return patched(model, replace(model.settings, schedule=schedule)).eval()


def export_variant(
    artifact: Artifact, model: MergedModel, folder: Path, progress: Progress
) -> PluginInfo | None:
    """Export a model as the artifact's was: same precision, batch, operators, merge op.

    Args:
        artifact: Whose build to repeat.
        model: From ``reference_model`` or ``rescheduled``.
        folder: Where ``model.onnx`` goes, and the plugin's kernels if the artifact has them.
        progress: Told about the kernels.

    Returns:
        What the manifest would say of the kernels; None without any.

    Raises:
        ExportError: if the export fails.
        MissingComponentError: if kernels are needed that cannot be compiled here.
    """
    from tome_export.onnx.export import ExportOptions, onnx_from_model
    from tome_export.onnx.files import load
    from tome_export.onnx.plugin import merging_of

    manifest = artifact.manifest
    plugin = manifest.merge.merge_op == "plugin" and model.merges
    options = ExportOptions(
        precision=manifest.precision,
        batch=manifest.batch,
        lowering="index_add" if manifest.merge.merge_op == "index_add" else "matmul",
        attention=manifest.onnx.attention,
        opset=manifest.onnx.opset,
        plugin=plugin,
    )
    names = output_names(manifest.output.name, model)
    onnx_from_model(model, folder / MODEL, options, names)
    if not plugin or manifest.plugins is None:
        return None
    from tome_export.plugins.aot import require_compiler

    require_compiler()
    capabilities = capabilities_of(manifest.plugins.compute_capabilities, None)
    merging = merging_of(load(folder / MODEL, weights=False))
    return compile_kernels(merging, capabilities, folder, progress)
