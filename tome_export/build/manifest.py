"""What ``build.json`` says: everything later commands need, and what a colleague would ask."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tome_export.artifact.environment import versions
from tome_export.artifact.manifest import (
    FORMAT,
    Component,
    Graph,
    Layer,
    Macs,
    Manifest,
    MergeInfo,
    ModelInfo,
    OutputForm,
    PluginInfo,
    Tensor,
    Tower,
    Weights,
)
from tome_export.spec import INPUT_NAME, OutputKind
from tome_export.video.options import VideoOptions

if TYPE_CHECKING:
    from tome_export.models import LoadedModel
    from tome_export.models.facts import ModelOutput
    from tome_export.onnx.export import ExportOptions, OnnxFiles
    from tome_export.patch import MergedModel


@dataclass(frozen=True)
class Notes:
    """Why merge and attention are written so, and which engines can be had here; for people."""

    merge: str
    attention: str
    engine: str


def manifest_of(
    loaded: LoadedModel,
    model: MergedModel,
    options: ExportOptions,
    exported: OnnxFiles,
    plugins: PluginInfo | None,
    notes: Notes,
) -> Manifest:
    """The manifest of a build, before its files, engines and parity are known."""
    recipe = loaded.recipe
    merged, unmerged = model.macs(), model.macs(merged=False)
    batch: int | Literal["batch"] = options.batch.max if options.batch.is_static else "batch"
    pixels = Tensor(
        name=INPUT_NAME,
        dtype=str(model.pixel_dtype).removeprefix("torch."),
        shape=(batch, *model.pixel_shape),
    )
    extra = model.extra_inputs.items()
    inputs = (pixels, *(Tensor(name=n, dtype="float32", shape=(batch, *s)) for n, s in extra))
    outputs = _outputs(recipe.output.name, model, batch)
    shape = tuple(int(size) for size in outputs[0].shape[1:])
    channels, height, width = model.image_size
    compressor, settings = model.settings.compressor, model.settings
    kind: OutputKind = "features" if settings.dense else recipe.output.kind
    classifies = kind == "classes"
    return Manifest(
        format=FORMAT,
        model=model_info(loaded, model),
        merge=merge_info(model, options, notes.merge),
        tokens=tuple(layer.total_out for layer in model.layers),
        tokens_in=model.layers[0].total_in if model.layers else 0,
        patches=model.patch_grid,
        layers=_layers(model),
        video=_video(model),
        macs=Macs(merged=merged, unmerged=unmerged, ratio=unmerged / merged),
        precision=options.precision,
        batch=options.batch,
        input=inputs[0],
        inputs=inputs,
        output=outputs[0],
        outputs=outputs,
        form=OutputForm(
            dense=settings.dense,
            source_map=settings.source_map,
            entropy=settings.entropy,
            kind=kind,
            note="" if settings.dense else recipe.output.note,
        ),
        compressor=None if compressor is None else Component(**compressor.record()),
        tower=_tower(loaded, model, shape),
        preprocessing=replace(recipe.preprocessing, input_size=(channels, height, width)),
        activation=recipe.activation(shape) if classifies else None,
        labels=_labels(recipe.output, kind, shape),
        onnx=Graph(
            opset=options.opset,
            attention=options.attention_form,
            attention_note=notes.attention,
            nodes=exported.nodes,
        ),
        plugins=plugins,
        engine_note=notes.engine,
        versions=versions(),
    )


def _labels(
    output: ModelOutput, kind: OutputKind, shape: tuple[int, ...]
) -> tuple[str, ...] | None:
    """Names of the classes ``[K]``, or of the channels ``[K, H, W]`` of a segmentation."""
    named = kind == "classes" or (kind == "map" and len(shape) == 3)
    return output.label_names(shape[0]) if named else None


def model_info(loaded: LoadedModel, model: MergedModel) -> ModelInfo:
    """What the manifest says of a model and its weights."""
    from tome_export.patch.describe import common_sha256, learned_sha256, state_sha256

    recipe, weights = loaded.recipe, loaded.weights
    return ModelInfo(
        name=recipe.name,
        folder=checkpoint_folder(recipe.name),
        family=recipe.family,
        timm_name=recipe.source.loader.timm_name,
        description=recipe.description,
        weights=Weights(
            **asdict(weights),
            state_sha256=state_sha256(model),
            common_sha256=common_sha256(model),
        ),
        image_size=None if recipe.image_size is None else str(recipe.image_size),
        learned_sha256=learned_sha256(model),
        random_weights=weights.kind == "random",
    )


def merge_info(model: MergedModel, options: ExportOptions, note: str) -> MergeInfo:
    """What the manifest says of how a model merges."""
    reducer = model.settings.reducer
    return MergeInfo(
        reducer=Component(**reducer.record()),
        schedule=str(model.settings.schedule),
        r=tuple(layer.r for layer in model.layers),
        prop_attn=model.settings.prop_attn,
        prefix=model.prefix,
        class_token=model.class_token,
        scored=reducer.scored,
        merge_op="plugin" if options.plugin else options.lowering,
        note=note,
    )


def checkpoint_folder(name: str) -> str | None:
    """Absolute path of the checkpoint of ``hf:<folder>``; None for a model in no folder."""
    kind, _, where = name.partition(":")
    folder = Path(where).expanduser()
    return str(folder.resolve()) if kind == "hf" and where and folder.is_dir() else None


def _tower(loaded: LoadedModel, model: MergedModel, shape: tuple[int, ...]) -> Tower | None:
    """What the side of the language model is to be configured with; None for no tower."""
    tower = loaded.recipe.tower
    if tower is None:
        return None
    grid, compressor = model.patch_grid, model.settings.compressor
    cells = (grid.rows, grid.cols) if grid else None
    if compressor is not None:
        cells = compressor.cells()
    return Tower(**tower.given, tokens=shape[0], width=shape[1], grid=cells)


def _video(model: MergedModel) -> VideoOptions | None:
    if not model.takes_video:
        return None
    return VideoOptions(model.frames, getattr(model.settings.schedule, "frames", None))


def _layers(model: MergedModel) -> tuple[Layer, ...]:
    rows = zip(model.layers, model.unmerged_layers, model.block_costs, strict=True)
    found = []
    for index, (counts, plain, cost) in enumerate(rows):
        layer = Layer(
            tokens_in=counts.tokens_in,
            r=counts.r,
            tokens_out=counts.tokens_out,
            behind_block=counts.behind_block,
            macs=cost.macs(counts),
            macs_unmerged=cost.macs(plain),
        )
        if model.takes_video:
            joining = {"clips": counts.sequences, "joined": counts.joined, "cross": counts.cross}
            layer = layer.model_copy(update={**joining, "prefix": model.prefix_at(index)})
        found.append(layer)
    return tuple(found)


def _outputs(name: str, model: MergedModel, batch: int | Literal["batch"]) -> tuple[Tensor, ...]:
    from tome_export.patch.describe import fake_outputs, output_names

    return tuple(
        Tensor(
            name=output,
            dtype=str(tensor.dtype).removeprefix("torch."),
            shape=(batch, *tensor.shape[1:]),
        )
        for output, tensor in zip(output_names(name, model), fake_outputs(model), strict=True)
    )
