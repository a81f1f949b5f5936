"""What every reducer must show: a reference's plans, in PyTorch and in the exported graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import onnx
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tome_export.data.samples import sample_pixels
from tome_export.models import RECIPES
from tome_export.onnx.export import ExportOptions, onnx_from_model
from tome_export.onnx.twin import LEAD, twin_from_model
from tome_export.parity.compare import check_parity, inputs_of
from tome_export.patch import MergedModel, patch
from tome_export.reducers.base import AttentionInputs, LayerContext, Reducer
from tome_export.runtime.ort import OrtRunner
from tome_export.runtime.runner import infer_in_batches
from tome_export.spec import BatchRange, Precision

BATCH = BatchRange(1, 2, 4)

_EXPORTED: dict[Path, MergedModel] = {}

Plan = tuple[list[int], list[int], list[int]]
Reference = Callable[[SimpleNamespace], Plan]
"""Plans one image in one layer: ``plain`` lists in, ``keep``, ``src`` and ``dst`` out."""


class Step(NamedTuple):
    """One layer as a reducer had it, its plan, and the tokens and sizes that came of it."""

    layer: LayerContext
    plan: Plan
    x: torch.Tensor
    size: torch.Tensor


def digit_model(reducer: Reducer, r: Any = 6) -> MergedModel:
    """The trained vit_digits, 64 patches and a class token, with a reducer."""
    return patch(RECIPES["vit_digits"].load().module, r, reducer=reducer).eval()


def digit_images(count: int = 6) -> np.ndarray[Any, Any]:
    """Real test images of vit_digits, ``[count, 1, 32, 32]``."""
    return sample_pixels(RECIPES["vit_digits"], count)


def steps(model: MergedModel, images: np.ndarray[Any, Any]) -> list[Step]:
    """Every layer that removes tokens, as PyTorch ran it in fp32."""
    found: list[Step] = []
    reducer = model.settings.reducer
    apply = type(reducer).apply

    def watched(self: Reducer, layer: LayerContext, plan: Any) -> Any:
        x, size = apply(self, layer, plan)
        found.append(Step(layer, plan, x, size))
        return x, size

    inputs = {
        name: torch.from_numpy(value) for name, value in inputs_of(model, len(images)).items()
    }
    try:
        type(reducer).apply = watched  # type: ignore[method-assign]
        with torch.inference_mode():
            model.forward_observed(torch.from_numpy(images), lambda _: None, inputs=inputs)
    finally:
        type(reducer).apply = apply  # type: ignore[method-assign]
    return found


def plain(layer: LayerContext, image: int) -> SimpleNamespace:
    """One image of a layer as lists of floats, for references.

    Fields: ``x [N][C]``, ``size [N]``, ``keys`` and ``queries [H][N][D]``, ``scale``, ``bias [N]``
    of the class token's row or None, ``tokens [N][C]`` that attention read or None, ``layer``,
    ``r``, ``prefix``, ``class_token``, ``depth``, ``inputs`` by name.
    """
    keys, queries, scale, bias, tokens = layer.attention
    return SimpleNamespace(
        x=layer.x[image].tolist(),
        size=layer.size[image].tolist(),
        keys=keys[image].tolist(),
        queries=None if queries is None else queries[image].tolist(),
        scale=keys.shape[-1] ** -0.5 if scale is None else scale,
        bias=None if bias is None else bias[image, 0, 0].tolist(),
        tokens=None if tokens is None else tokens[image].tolist(),
        layer=layer.index,
        r=layer.r,
        prefix=layer.prefix,
        class_token=layer.class_token,
        depth=layer.depth,
        inputs={name: value[image].tolist() for name, value in layer.inputs.items()},
    )


def assert_plans_are_the_references(
    model: MergedModel, reference: Reference, folder: Path, count: int = 6
) -> None:
    """On real images: PyTorch's plans, and those of the graph on ORT CPU, are the reference's."""
    images = digit_images(count)
    found = steps(model, images)
    reduced = [index for index, layer in enumerate(model.layers) if layer.r]
    assert [step.layer.index for step in found] == reduced
    onnx_plans = ort_plans(model, images, folder)
    for step in found:
        assert_is_plan(step.plan, step.layer.tokens, step.layer.prefix)
        for plan in (step.plan, onnx_plans[step.layer.index]):
            assert_plans(plan, step.layer, reference)


def assert_plans(plan: Any, layer: LayerContext, reference: Reference) -> None:
    """The plan of every image of a layer is the reference's."""
    for image in range(len(layer.x)):
        expected = [list(part) for part in reference(plain(layer, image))]
        assert [part[image].tolist() for part in plan] == expected


def ort_plans(
    model: MergedModel, images: np.ndarray[Any, Any], folder: Path
) -> dict[int, tuple[np.ndarray[Any, Any], ...]]:
    """The plans that the exported fp32 graph decides on, by layer."""
    twin = twin_from_model(exported(model, folder))
    inputs: dict[str, Any] = {"pixel_values": images, **inputs_of(model, len(images))}
    for value in twin.model.graph.input:
        if value.name.endswith(".given"):
            length = value.type.tensor_type.shape.dim[1].dim_value
            inputs[value.name] = np.zeros((len(images), length), np.int32)
    inputs[LEAD] = np.zeros((len(images), 1), bool)
    with OrtRunner(twin.model) as runner:
        results = infer_in_batches(runner, inputs, len(images), BATCH.max)
    return {layer.layer: tuple(results[name] for name in layer.chosen) for layer in twin.layers}


def exported(model: MergedModel, folder: Path, precision: Precision = "fp32") -> onnx.ModelProto:
    """The exported graph; its file is ``folder/<precision>.onnx``, of one model in a folder."""
    path = folder / f"{precision}.onnx"
    known = _EXPORTED.setdefault(path, model)
    assert known is model, f"{path} is the graph of another model"
    if not path.exists():
        onnx_from_model(model, path, ExportOptions(precision=precision, batch=BATCH), "logits")
    return onnx.load(path)


def assert_parity(model: MergedModel, folder: Path, precision: Precision) -> Any:
    """The whole parity check passes; in fp32 without a single disagreement."""
    report = check_parity(
        model, exported(model, folder, precision), digit_images(8), precision, BATCH
    )
    assert report.passed, report.failures
    assert sum(layer.decisions for layer in report.layers) > 0
    if precision == "fp32":
        assert sum(layer.disagreements for layer in report.layers) == 0
    return report


def assert_is_plan(plan: Any, tokens: int, prefix: int) -> None:
    """The invariant of every plan: each token once, prefix first, destinations in range."""
    for keep, src, dst in zip(*(part.tolist() for part in plan), strict=True):
        assert sorted(keep + src) == list(range(tokens))
        assert keep[:prefix] == list(range(prefix))
        assert len(src) == len(dst)
        assert all(-1 <= place < len(keep) for place in dst)
        assert all(place < 0 or place >= prefix for place in dst)


def random_layer(
    tokens: int,
    r: int,
    prefix: int = 1,
    batch: int = 2,
    seed: int = 0,
    *,
    duplicates: bool = False,
    width: int = 16,
    heads: int = 2,
    **more: Any,
) -> LayerContext:
    """A layer of random tokens, for property tests.

    Args:
        tokens: N.
        r: Tokens to remove.
        prefix: Protected tokens.
        batch: B.
        seed: Of the numbers.
        duplicates: Let many tokens be equal, of numbers whose products are exact, so that ties are.
        width: C, and D of each head.
        heads: H.
        more: Other fields of ``LayerContext``.
    """
    rng = np.random.default_rng(seed)

    def drawn(*shape: int) -> torch.Tensor:
        if duplicates:
            pool = rng.choice([-1.0, 1.0], (*shape[:-2], 3, shape[-1]))
            index = rng.integers(0, 3, shape[-2])
            return torch.from_numpy(pool[..., index, :]).float()
        return torch.from_numpy(rng.standard_normal(shape)).float()

    size = torch.from_numpy(rng.integers(1, 9, (batch, tokens))).float()
    size[:, :prefix] = 1  # protected tokens never grow
    keys, queries = drawn(batch, heads, tokens, width), drawn(batch, heads, tokens, width)
    attention = AttentionInputs(keys, queries, tokens=drawn(batch, tokens, width))
    values = {
        "index": 1,
        "class_token": prefix > 0,
        "depth": 4,
        "x": drawn(batch, tokens, width),
        "size": size,
        "attention": attention,
        "module": None,
        "inputs": {},
    }
    return LayerContext(r=r, prefix=prefix, tokens=tokens, **{**values, **more})


def one_image(layer: LayerContext, image: int) -> LayerContext:
    """The same layer of one image alone."""
    alone = slice(image, image + 1)
    attention = AttentionInputs(
        *(part[alone] if isinstance(part, torch.Tensor) else part for part in layer.attention)
    )
    return replace(
        layer,
        x=layer.x[alone],
        size=layer.size[alone],
        attention=attention,
        inputs={name: value[alone] for name, value in layer.inputs.items()},
    )


def assert_holds(
    reducer: Reducer, layer: LayerContext, *, alone: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """What holds for every reducer and every layer: the invariant, shapes, batch independence.

    Args:
        reducer: The reducer.
        layer: A layer of several images.
        alone: Whether each image has the same plan alone; not where rounding decides ties.

    Returns:
        Tokens and sizes behind the plan.
    """
    plan = reducer.decide(layer).plan
    kept = layer.tokens - layer.r
    assert plan.keep.shape == (len(layer.x), kept)
    assert {part.dtype for part in plan} == {torch.int32}
    assert_is_plan(plan, layer.tokens, layer.prefix)
    assert reducer.drops or (plan.dst >= 0).all()
    x, size = reducer.apply(layer, plan)
    assert (x.shape, x.dtype) == ((len(layer.x), kept, layer.x.shape[-1]), layer.x.dtype)
    assert (size.shape, size.dtype) == ((len(layer.x), kept), torch.float32)
    assert x.isfinite().all()
    assert (size > 0).all()
    assert torch.equal(x[:, : layer.prefix], layer.x[:, : layer.prefix])
    for image in range(len(layer.x)) if alone else ():
        own = one_image(layer, image)
        single = reducer.decide(own).plan
        for part, whole in zip(single, plan, strict=True):
            assert torch.equal(part[0], whole[image])
        torch.testing.assert_close(reducer.apply(own, single)[0][0], x[image])
    return x, size


def assert_nothing_lost(layer: LayerContext, x: torch.Tensor, size: torch.Tensor) -> None:
    """Sizes add up as before, and so do tokens weighed by them: every one is a mean."""
    torch.testing.assert_close(size.sum(1), layer.size.sum(1))
    total = (layer.x * layer.size[..., None]).sum(1)
    torch.testing.assert_close((x * size[..., None]).sum(1), total, rtol=1e-4, atol=1e-4)


def assert_macs(model: MergedModel, overhead: float = 0.02) -> None:
    """MACs are what torch counts, but for the comparing of tokens, a small share that is left out.

    Args:
        model: With a reducer.
        overhead: Most that the comparisons may cost, as a share of the MACs.
    """
    images = torch.zeros(2, *model.input_size)
    extra = [torch.zeros(2, *shape) for shape in model.extra_inputs.values()]
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        model(images, *extra)
    counted = counter.get_total_flops() / 2 / len(images)
    assert model.macs() <= counted <= model.macs() * (1 + overhead)


def assert_engine_builds(model: MergedModel, folder: Path, precision: Precision = "fp16") -> None:
    """TensorRT-RTX's parser and builder take the graph; they need no GPU."""
    from tome_export.engine import EngineOptions, select

    exported(model, folder, precision)
    backend = select("tensorrt-rtx").builder
    assert backend is not None
    info = backend.build(
        folder / f"{precision}.onnx", EngineOptions(batch=BATCH), folder / "model.rtx.engine"
    )
    assert info.size_bytes > 50_000


def options_of(reducer: Reducer) -> Mapping[str, Any]:
    """Its options after a round trip through the manifest's JSON."""

    from tome_export.artifact.manifest import Component
    from tome_export.reducers import reducer_class

    entry = Component.model_validate(reducer.record())
    again = entry.made(reducer_class(entry.name))
    assert again == reducer
    return again.record()["options"]
