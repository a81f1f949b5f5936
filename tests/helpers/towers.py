"""Small towers with live weights, and what every family's tests ask of them."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tome_export.build import BuildRequest, build
from tome_export.merge import reference
from tome_export.models.facts import MergingAdvice, ModelOutput
from tome_export.models.recipe import LoadedModel, Loader, ModelSource, Recipe, WeightsInfo
from tome_export.patch import patch
from tome_export.spec import Preprocessing


def live(model: Any, seed: int = 0) -> Any:
    """Every parameter drawn anew so that it matters; see ``conftest.small_vit``."""
    with torch.no_grad():
        for name, value in model.named_parameters():
            rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
            mean, std = (0.5, 0.1) if "gamma" in name else (0.0, 0.1)
            if value.ndim > 1:
                flat = value[0].numel() if name.endswith(("weight", "proj")) else 4
                std = flat**-0.5
            elif name.endswith("weight"):
                mean = 1.0
            value.copy_(torch.from_numpy(mean + std * rng.standard_normal(tuple(value.shape))))
    return model.eval()


def images_of(merged: Any, count: int = 2) -> torch.Tensor:
    """Seeded images ``[count, C, H, W]`` of a patched model."""
    generator = torch.Generator().manual_seed(3)
    return torch.randn(count, *merged.input_size, generator=generator)


def assert_r_0_is_the_librarys(model: Any, **settings: Any) -> None:
    """Without merging the output is the library's own, to one part in a million."""
    merged = patch(model, 0, **settings)
    images = images_of(merged)
    with torch.no_grad():
        expected, found = merged.library(images), merged(images)
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()


def assert_plans_are_the_references(model: Any, r: int = 5) -> None:
    """In every layer the plan is what the reference makes of the same keys."""
    merged = patch(model, r)
    with torch.no_grad():
        output, trace = merged.forward_traced(images_of(merged))
    assert output.isfinite().all()
    assert len(trace) == len(merged.layers)
    for step in trace:
        for image in range(len(output)):
            metric = reference.mean_keys(step.keys[image].tolist())
            expected = reference.match(metric, r, merged.prefix, merged.class_token)
            found = [part[image].tolist() for part in step.plan]
            assert found == [expected.keep, expected.src, expected.dst]


def assert_duplicates_count(model: Any, position: torch.Tensor | None) -> None:
    """Merging equal tokens changes nothing: what the sizes in attention and pooling are for."""
    merged = patch(model.double(), 7)
    if position is not None:
        with torch.no_grad():
            position[..., -merged.patch_grid.patches :, :] = position[..., -1:, :]
    images = torch.ones(2, *merged.input_size, dtype=torch.float64)
    images[1] *= -0.5
    with torch.no_grad():
        expected, found = merged.library(images), merged(images)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


class Given(Loader):
    """A loader that hands out one model, for a real build of it."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def create(self, depth: int | None = None) -> Any:  # noqa: ARG002
        return self.model

    def from_file(self, recipe: Recipe, *_how: Any) -> LoadedModel:
        return LoadedModel(self.model, recipe, WeightsInfo("random", "of the test", seed=0))

    def pretrained(self, recipe: Recipe, depth: int | None = None) -> LoadedModel:  # noqa: ARG002
        return self.from_file(recipe)


def built(model: Any, folder: Path, monkeypatch: Any, precision: str, engine: str = "none") -> Any:
    """A real build of a model, parity checked; raises if it does not hold."""
    size = patch(model, 0).input_size
    recipe = Recipe(
        name="given",
        family="given",
        preprocessing=Preprocessing(size, (0.5,) * 3, (0.25,) * 3, 1.0, "bicubic"),
        merging=MergingAdvice(5),
        output=ModelOutput("features"),
        source=ModelSource(Given(model)),
    )
    monkeypatch.setattr("tome_export.models.resolve", lambda *_args, **_options: recipe)
    return build(BuildRequest("given", folder / precision, precision=precision, engine=engine))
