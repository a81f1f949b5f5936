"""``tome-export models``: the recipes and what merging does to each, without torch for the list."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from tome_export.merge.macs import BlockCost, SharedCost, total_macs
from tome_export.merge.schedule import LayerTokens, Schedule
from tome_export.models.registry import RECIPES, resolve
from tome_export.video.options import video_token_counts, without_last_merge

if TYPE_CHECKING:
    from tome_export.models.recipe import Recipe
    from tome_export.spec import ImageSize, OutputKind, Preprocessing

_DETAILS = (
    "aliases",
    "prop_attn",
    "recommended_r_source",
    "layers",
    "preprocessing",
    "weights",
    "licence",
)


@dataclass(frozen=True)
class Sizes:
    """Token counts and MACs of a model.

    Attributes:
        tokens: Tokens that enter the first block, prefix tokens included.
        prefix: Class, distillation and register tokens.
        macs: Multiply-accumulates per image, unmerged.
        macs_merged: The same with the recommended r.
        layers: Token counts with the recommended r.
    """

    tokens: int
    prefix: int
    depth: int
    macs: int
    macs_merged: int
    layers: tuple[LayerTokens, ...]


@dataclass(frozen=True)
class ModelDetails:
    """All about one model; the attributes are the keys of the JSON output."""

    name: str
    timm_name: str
    input_size: tuple[int, int, int]
    tokens: int
    prefix: int
    depth: int
    macs: int
    recommended_r: int
    macs_merged: int
    macs_ratio: float
    output: str
    output_kind: OutputKind
    family: str
    description: str
    aliases: tuple[str, ...]
    prop_attn: bool
    recommended_r_source: str
    layers: tuple[LayerTokens, ...]
    preprocessing: Preprocessing
    weights: str
    licence: str

    def row(self) -> dict[str, Any]:
        """What the list says of it."""
        return {key: value for key, value in asdict(self).items() if key not in _DETAILS}

    def document(self) -> dict[str, Any]:
        """All of it; the layers of a model of videos with their clips."""
        prefix, rows = self.prefix, []
        for counts in self.layers:
            row = asdict(counts)
            clips = {"clips": row.pop("sequences"), "joined": row.pop("joined")}
            clips["cross"] = row.pop("cross")
            prefix *= counts.joined
            video = self.layers[0].sequences * self.layers[0].joined > 1
            rows.append({**row, **clips, "prefix": prefix} if video else row)
        return {**asdict(self), "layers": rows}


def catalog() -> list[ModelDetails]:
    """Every recipe, in the order to show them."""
    return [_details(recipe, sizes_from_geometry(recipe)) for recipe in RECIPES.values()]


def details(name: str, image_size: ImageSize | None = None) -> ModelDetails:
    """All about one model; one without a recipe is built, without weights, to be counted."""
    recipe = resolve(name, image_size=image_size)
    known = recipe.name in RECIPES and recipe.geometry is not None
    return _details(recipe, sizes_from_geometry(recipe) if known else sizes_from_model(recipe))


def _details(recipe: Recipe, sizes: Sizes) -> ModelDetails:
    return ModelDetails(
        name=recipe.name,
        timm_name=recipe.source.loader.timm_name,
        input_size=recipe.preprocessing.input_size,
        recommended_r=recipe.merging.r,
        macs_ratio=sizes.macs / sizes.macs_merged,
        output=recipe.output.name,
        output_kind=recipe.output.kind,
        family=recipe.family,
        description=recipe.description,
        aliases=recipe.aliases,
        prop_attn=recipe.merging.prop_attn,
        recommended_r_source=recipe.merging.source,
        preprocessing=recipe.preprocessing,
        weights=recipe.source.weights,
        licence=recipe.source.licence,
        **vars(sizes),
    )


def sizes_from_geometry(recipe: Recipe) -> Sizes:
    """Sizes of a recipe that states its geometry: needs neither torch nor the model's library."""
    geometry = recipe.geometry
    if geometry is None:
        raise ValueError(f"recipe {recipe.name} states no geometry")
    channels, height, image_width = recipe.preprocessing.input_size
    width, depth, patch = geometry.width, geometry.depth, geometry.patch
    grid = (height // patch) * (image_width // patch)
    fixed = grid * width * channels * patch**2 + geometry.head_macs
    # Projections of q, k, v and output; scores and values; an MLP of two matrices.
    costs = 4 * width**2, 2 * width, 2 * width * geometry.mlp
    each: list[BlockCost] = [BlockCost(*costs)] * depth
    if geometry.shared:
        shared = SharedCost(*costs, geometry.shared)
        each = [*[shared] * (depth - 1), replace(shared, last=True)]
    tokens = grid + geometry.prefix
    schedule = Schedule(recipe.merging.r)
    layers: tuple[LayerTokens, ...] = schedule.tokens(depth, tokens, geometry.prefix)
    plain: tuple[LayerTokens, ...] = (LayerTokens(tokens, 0, tokens),) * depth
    if recipe.video is not None and recipe.video.frames is not None:
        frames, merging = recipe.video.frames, recipe.video.merging
        counts = schedule.resolve(depth)
        clips = video_token_counts(counts, merging, frames, tokens, geometry.prefix)
        layers = without_last_merge(clips) if geometry.shared else clips
        plain = video_token_counts((0,) * depth, None, frames, tokens, geometry.prefix)
        fixed = frames * fixed + geometry.video_macs

    def total(counted: tuple[LayerTokens, ...]) -> int:
        last = counted[-1].tokens_out * geometry.token_macs
        return total_macs(each, counted, fixed + last)

    return Sizes(plain[0].total_in, geometry.prefix, depth, total(plain), total(layers), layers)


def sizes_from_model(recipe: Recipe) -> Sizes:
    """Sizes of any model, counted on its architecture without memory for its weights."""
    from tome_export.patch import patch

    dense = recipe.output.dense_only
    model = patch(recipe.architecture(), Schedule(recipe.merging.r), dense=dense)
    layers = model.layers
    tokens = layers[0].total_in if layers else model.prefix
    macs = model.macs(merged=False)
    return Sizes(tokens, model.prefix, len(layers), macs, model.macs(), layers)
