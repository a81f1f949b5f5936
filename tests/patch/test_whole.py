"""Whole models: the backbone merges, the head reads every patch, all else is the library's own."""

from __future__ import annotations

import copy
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import nn
from towers import images_of, live
from whole_models import (
    DEPTH,
    GRID,
    SIZE,
    WIDTH,
    Head,
    HiddenStates,
    InPlace,
    TimmMaps,
    backbone_config,
    depth_anything,
    on_dinov2,
    on_registers,
    on_timm,
    on_vit,
    tokens_of,
    upernet,
)

from tome_export.errors import InputError
from tome_export.merge.plan import source_map
from tome_export.merge.reference import match
from tome_export.merge.schedule import Schedule
from tome_export.patch import UnknownModelError, patch
from tome_export.patch.describe import output_shape
from tome_export.patch.precision import copy_with_dtype
from tome_export.reducers import reducer_from_text

MODELS: dict[str, tuple[Any, str, tuple[int, ...]]] = {
    "Depth Anything": (depth_anything, "predicted_depth", (SIZE, SIZE)),
    "UperNet": (upernet, "logits", (7, SIZE, SIZE)),
    "own head": (on_dinov2, "two", (2, GRID, GRID)),
    "hidden states": (lambda: on_dinov2(HiddenStates), "map", (2, GRID, GRID)),
    "registers": (on_registers, "two", (2, GRID, GRID)),
    "ViT": (on_vit, "two", (2, 8, 8)),
    "ViT, hidden states": (lambda: on_vit(HiddenStates), "map", (2, 8, 8)),
    "timm": (on_timm, "map", (2, 10, 10)),
}
R = 9


@pytest.fixture(params=MODELS)
def case(request) -> tuple[Any, str, tuple[int, ...]]:
    make, name, shape = MODELS[request.param]
    return make(), name, shape


def test_without_merging_it_is_the_librarys(case):
    model, name, shape = case
    merged = patch(model, 0)
    images = images_of(merged)
    with torch.no_grad():
        found, expected = merged(images), model(images)
    expected = expected[0] if isinstance(expected, tuple) else expected
    expected = expected if isinstance(expected, torch.Tensor) else expected[name]
    assert merged.map_name == name
    assert found.shape == (2, *shape)
    assert expected.abs().max() > 0.1
    assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()
    assert torch.equal(merged.library(images), expected)


def test_plans_are_the_references(case):
    model, *_ = case
    merged = patch(model, R)
    images = images_of(merged)
    with torch.no_grad():
        output, trace = merged.forward_traced(images)
        plain = merged.library(images)
    assert [step.layer for step in trace] == list(range(len(merged.layers)))
    for step in trace:
        for image, metric in enumerate(step.metric.double().tolist()):
            plan = match(metric, R, merged.prefix, class_token=True)
            assert step.plan.keep[image].tolist() == plan.keep
            assert step.plan.src[image].tolist() == plan.src
            assert step.plan.dst[image].tolist() == plan.dst
    # Merging shows, and is not everything.
    assert 1e-4 * plain.abs().max() < (output - plain).abs().max()


def merged_state(model: Any, merged: Any, trace: list[Any], stage: int) -> torch.Tensor:
    """Features ``[B, N, C]`` behind some layers, unmerged by the composition of the plans so far.

    They are those of a backbone of that many layers, which knows nothing of heads, ``--dense``.
    """
    import transformers

    short = transformers.Dinov2Model(backbone_config(stage))
    short.load_state_dict(
        {k: v for k, v in model.backbone.state_dict().items() if k in short.state_dict()}
    )
    alone = patch(short.eval(), Schedule(per_layer=(R,) * stage))
    tokens = alone.encode(images_of(merged), alone.merger())
    plans = [step.plan for step in trace[:stage]]
    places = source_map(plans, len(tokens.x), merged.layers[0].tokens_in)
    return torch.stack([row[place] for row, place in zip(tokens.x, places, strict=True)])


@pytest.mark.parametrize("name", ["Depth Anything", "UperNet"])
def test_a_head_reads_unmerged_intermediate_layers(name):
    """The library's own head, on features made another way."""
    model = MODELS[name][0]()
    merged = patch(model, R)
    with torch.no_grad():
        found, trace = merged.forward_traced(images_of(merged))
        states = [merged_state(model, merged, trace, stage) for stage in range(1, DEPTH + 1)]
        if name == "UperNet":
            maps = [x[:, 1:].transpose(1, 2).unflatten(2, (GRID, GRID)) for x in states]
            logits = model.decode_head(maps)
            expected = nn.functional.interpolate(logits, size=(SIZE, SIZE), mode="bilinear")
        else:
            expected = model.head(model.neck(states, GRID, GRID), GRID, GRID)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_the_model_is_left_as_it_is(case):
    model, *_ = case
    before = [(name, id(part), part.forward.__func__) for name, part in model.named_modules()]
    values = {key: value.clone() for key, value in model.state_dict().items()}
    hooks = [len(part._forward_hooks) for part in model.modules()]
    merged = patch(model, R)
    with torch.no_grad():
        merged(images_of(merged))
    after = [(name, id(part), part.forward.__func__) for name, part in model.named_modules()]
    assert before == after
    # Backbones of Transformers have hooks of the library's from the start, and no more now.
    assert [len(part._forward_hooks) for part in model.modules()] == hooks
    assert merged.state_dict().keys() == values.keys()
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in values.items())
    assert all(merged.get_parameter(f"model.{k}") is p for k, p in model.named_parameters())


def test_macs_are_those_of_blocks_and_head(case):
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    model, *_ = case
    merged = patch(model, R)
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH):
        model(images_of(merged, 1))
    assert merged.macs(merged=False) == counter.get_total_flops() // 2
    assert merged.macs() < merged.macs(merged=False)


def test_hidden_states_that_were_asked_for_before_are_no_obstacle():
    """Transformers then has hooks of its own in every layer, which do nothing when not asked."""
    model = on_dinov2()
    images = torch.randn(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.backbone(images, output_hidden_states=True)
        assert (patch(model, 0)(images) - model(images)["two"]).abs().max() <= 1e-6
        alone = patch(model.backbone, 0)
        assert torch.equal(alone(images), alone.library(images))


class Grid(nn.Module):
    """Makes positions at its first pass and keeps them."""

    places: Any = None

    def forward(self, x: Any) -> Any:
        if self.places is None:
            self.places = torch.linspace(0, 1, GRID)
        return x + self.places


class Caching(Head):
    def __init__(self, backbone: nn.Module) -> None:
        super().__init__(backbone)
        self.grid = Grid()

    def forward(self, x: Any) -> Any:
        return {"two": self.grid(super().forward(x)["two"])}


def test_what_a_head_keeps_is_real():
    """Looking at shapes runs the head without data: nothing of that may stay in it."""
    model = on_dinov2(Caching)
    merged = patch(model, R)
    images = images_of(merged)
    assert output_shape(merged) == (2, GRID, GRID)
    assert model.grid.places is None
    with torch.no_grad():
        merged(images)
        assert model.grid.places.tolist() == torch.linspace(0, 1, GRID).tolist()
        assert (patch(model, 0)(images) - model(images)["two"]).abs().max() <= 1e-6


def test_a_model_in_training_stays_in_training():
    """Norms over a batch of one image could not be trained."""
    model = upernet().train()
    assert patch(model, R).map_name == "logits"
    assert all(part.training for part in model.modules())


def test_a_users_hook_is_refused():
    model = on_dinov2()
    model.head.register_forward_hook(lambda *_: None)
    with pytest.raises(InputError, match="module head of model Head has a forward hook"):
        patch(model, 0)


def test_passes_side_by_side_do_not_mix():
    merged = patch(on_dinov2(), R)
    images = images_of(merged, 8)

    def run(row: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            return merged(row[None])[0]

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(run, images.repeat(4, 1, 1, 1)))
    alone = [run(row) for row in images]
    for index, output in enumerate(found):
        torch.testing.assert_close(output, alone[index % 8], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_copies_and_other_precisions(case, dtype):
    model, *_ = case
    merged = patch(model, R)
    images = images_of(merged)
    with torch.no_grad():
        expected, trace = merged.forward_traced(images)
        plans = {step.layer: step.plan for step in trace}
        copied = copy_with_dtype(merged, dtype)
        found = copied.forward_observed(images.to(dtype), lambda _: None, plans)
        assert found.dtype == dtype
        allowed = 1e-5 if dtype == torch.float64 else 0.1
        assert (found - expected).abs().max() <= allowed * expected.abs().max()
        # A copy shares nothing.
        other = copy.deepcopy(merged)
        for value in other.parameters():
            value.zero_()
        assert torch.equal(merged(images), expected)


def test_source_map_and_entropy_come_along():
    merged = patch(on_dinov2(), R, source_map=True, entropy=True)
    images = images_of(merged)
    with torch.no_grad():
        output, places, entropy = merged(images)
        assert torch.equal(output, patch(on_dinov2(), R)(images))
        tokens = patch(on_dinov2().backbone, R, source_map=True, entropy=True)(images)
    assert torch.equal(places, tokens[1])
    assert torch.equal(entropy, tokens[2])


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = on_dinov2().backbone, on_dinov2().backbone

    def forward(self, x: Any) -> Any:
        return self.left(x).last_hidden_state + self.right(x).last_hidden_state


class Twice(Head):
    def forward(self, x: Any) -> Any:
        super().forward(x)
        return super().forward(x)


class Between(Head):
    """Changes tokens between two blocks of its backbone."""

    def forward(self, x: Any) -> Any:
        tokens = self.backbone.embeddings(x)
        for block in self.backbone.encoder.layer:
            tokens = tokens_of(block(tokens)) + 1
        return tokens[:, 1:].transpose(1, 2).unflatten(2, (GRID, GRID))


class Tokens(Head):
    def forward(self, x: Any) -> Any:
        return self.backbone(x).last_hidden_state


class Masked(TimmMaps):
    def forward(self, x: Any) -> Any:
        tokens = self.trunk._pos_embed(self.trunk.patch_embed(x))
        for block in self.trunk.blocks:
            tokens = block(tokens, attn_mask=torch.zeros(1, 1, 101, 101))
        return self.head(tokens[:, 1:].transpose(1, 2).unflatten(2, (10, 10)))


class Alias(TimmMaps):
    """Knows its blocks by two names, and runs them by the shorter one."""

    def __init__(self, backbone: Any) -> None:
        super().__init__(backbone)
        self.blocks = backbone.blocks

    def forward(self, x: Any) -> Any:
        tokens = self.trunk._pos_embed(self.trunk.patch_embed(x))
        for block in self.blocks:
            tokens = block(tokens)
        return self.head(tokens[:, 1:].transpose(1, 2).unflatten(2, (10, 10)))


class Few(Head):
    def forward(self, x: Any) -> Any:
        tokens = self.backbone.encoder.layer[0](self.backbone.embeddings(x))
        return tokens_of(tokens).unsqueeze(1)


class Smaller(Head):
    def forward(self, x: Any) -> Any:
        return super().forward(x[:, :, :56, :56])


class Gives(Head):
    """Gives something else, by the attribute ``what``."""

    def forward(self, x: Any) -> Any:
        found = super().forward(x)["two"]
        return {
            "vector": lambda: {"logits": found.mean(dim=(2, 3))},
            "two tensors": lambda: {"a": found, "b": found},
            "nothing": lambda: None,
            "a nest": lambda: {"a": (found,)},
            "a name": lambda: {"source_map": found},
            "no name": lambda: {"a b": found},
            "classes": lambda: found.argmax(dim=1),
            "a mask": lambda: found > 0,
            "one map for all": lambda: found.flatten(0, 1),
            "a failure": lambda: found[:, 5],
            "a decision": lambda: found if found.sum() > 0 else -found,
        }[self.what]()


def gives(what: str) -> Any:
    model = on_dinov2(Gives)
    model.what = what
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Pair, "Pair has 2 backbones (left, right); expected one"),
        (lambda: on_dinov2(Twice), "Twice runs block 0 of its backbone where block 4 is expected"),
        (lambda: on_dinov2(Between), "Between changes tokens ahead of block 1 of its backbone"),
        (lambda: on_dinov2(InPlace), "InPlace changes tokens ahead of block 1 of its backbone"),
        (lambda: on_dinov2(Few), "Few runs 1 of the 4 blocks of its backbone; expected all"),
        (lambda: on_dinov2(Smaller), "Smaller gives its backbone's blocks [17] tokens of an image"),
        (lambda: gives("vector"), "gives logits [2] for an image; of a model with a head"),
        (lambda: gives("two tensors"), "gives a (a tensor), b (a tensor); expected one tensor"),
        (lambda: gives("nothing"), "gives map (NoneType); expected one tensor"),
        (lambda: gives("a nest"), "gives a (tuple); expected one tensor"),
        (lambda: gives("a name"), "calls its output 'source_map'; expected a name"),
        (
            lambda: gives("classes"),
            "gives map of int64; expected floating-point numbers: of classes",
        ),
        (lambda: gives("a mask"), "gives map of bool; expected floating-point numbers"),
        (lambda: on_dinov2(Tokens), "gives map [65, 48] for an image; of a model with a head"),
        (lambda: on_timm(Masked), "Masked gives its backbone's blocks a mask or another tensor"),
        (lambda: gives("one map for all"), "gives map [4, 8, 8] for 2 images; expected one map"),
        (lambda: gives("a failure"), "Gives cannot be traced: its forward fails with IndexError"),
        (lambda: gives("a decision"), "Gives cannot be traced: its forward fails with"),
        (lambda: gives("no name"), "calls its output 'a b'; expected a name"),
    ],
)
def test_what_is_refused(make, message):
    def run() -> None:
        merged = patch(make(), 2)
        merged(images_of(merged))

    with pytest.raises(InputError) as error:
        run()
    assert message in str(error.value)
    assert not isinstance(error.value, UnknownModelError)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dense": True}, "--dense is for features, and model Head gives a map by a head"),
        ({"reducer": reducer_from_text("topk")}, "drops tokens, so not every patch has features"),
    ],
)
def test_forms_without_sense_are_refused(options, message):
    with pytest.raises(InputError) as error:
        patch(on_dinov2(), 2, **options)
    assert message in str(error.value)


def test_a_model_that_cannot_be_copied_is_one_clear_line():
    model = on_dinov2()
    model.head.lock = threading.Lock()
    with pytest.raises(InputError, match=r"model Head cannot be copied \(cannot pickle .*lock"):
        patch(model, 2)


def test_a_model_without_a_known_backbone_is_of_no_family():
    with pytest.raises(UnknownModelError, match=r"Sequential is not supported; .* on VisionTrans"):
        patch(nn.Sequential(live(nn.Conv2d(3, WIDTH, 14))), 2)
