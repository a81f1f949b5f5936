"""The perceiver resampler against a reference in numpy, weights in OpenFlamingo's layout."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tome_export.compressors.base import FinalTokens
from tome_export.compressors.resampler import Resampler
from tome_export.errors import InputError
from tome_export.patch import patch
from tome_export.spec import PatchGrid

WIDTH, GRID = 12, PatchGrid(3, 3, 4, 4)


def state(latents=3, layers=2, heads=2, head_width=4, width=WIDTH, inner=20):
    """Random weights under the names of the public implementation."""
    rng = np.random.default_rng(1)
    shapes = {"latents": (latents, width), "norm.weight": (width,), "norm.bias": (width,)}
    for layer in range(layers):
        attend, feed = f"layers.{layer}.0", f"layers.{layer}.1"
        for name in (f"{attend}.norm_media", f"{attend}.norm_latents", f"{feed}.0"):
            shapes |= {f"{name}.weight": (width,), f"{name}.bias": (width,)}
        shapes[f"{attend}.to_q.weight"] = (heads * head_width, width)
        shapes[f"{attend}.to_kv.weight"] = (2 * heads * head_width, width)
        shapes[f"{attend}.to_out.weight"] = (width, heads * head_width)
        shapes[f"{feed}.1.weight"], shapes[f"{feed}.3.weight"] = (inner, width), (width, inner)
    return {
        name: torch.from_numpy(rng.standard_normal(shape).astype(np.float32) * 0.4)
        for name, shape in shapes.items()
    }


def reference(weights, x, heads):
    """One image ``[N, C]`` without sizes, by the formulas, in float64."""
    w = {name: tensor.double().numpy() for name, tensor in weights.items()}

    def norm(v, name):
        centred = v - v.mean(-1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
        return scaled * w[f"{name}.weight"] + w[f"{name}.bias"]

    z = w["latents"]
    for layer in range(len({name.split(".")[1] for name in w if name.startswith("layers.")})):
        attend, feed = f"layers.{layer}.0", f"layers.{layer}.1"
        inside = norm(z, f"{attend}.norm_latents")
        both = np.concatenate([norm(x, f"{attend}.norm_media"), inside])
        q = inside @ w[f"{attend}.to_q.weight"].T
        k, v = np.split(both @ w[f"{attend}.to_kv.weight"].T, 2, axis=1)
        parts = []
        for qh, kh, vh in zip(*(np.split(m, heads, axis=1) for m in (q, k, v)), strict=True):
            e = np.exp(qh @ kh.T / math.sqrt(qh.shape[1]))
            parts.append(e / e.sum(1, keepdims=True) @ vh)
        z = z + np.concatenate(parts, axis=1) @ w[f"{attend}.to_out.weight"].T
        h = norm(z, f"{feed}.0") @ w[f"{feed}.1.weight"].T
        gelu = h * 0.5 * (1 + np.vectorize(math.erf)(h / math.sqrt(2)))
        z = z + gelu @ w[f"{feed}.3.weight"].T
    return norm(z, "norm")


@pytest.fixture
def weights_file(tmp_path):
    def write(weights, prefix=""):
        path = tmp_path / "resampler.safetensors"
        save_file({prefix + name: tensor for name, tensor in weights.items()}, path)
        return path

    return write


@pytest.mark.parametrize("prefix", ["", "perceiver."])
def test_a_token_counts_as_its_patches(weights_file, prefix):
    """Equal to the reference on copies: log(size) makes one token of four the same as four."""
    weights = state()
    extra = {"lang_encoder.x": torch.ones(1)} if prefix else {}
    path = weights_file({f"{prefix}{k}": v for k, v in weights.items()} | extra)
    module = Resampler(str(path), head_width=4).module(WIDTH, GRID)
    x = torch.from_numpy(np.random.default_rng(2).standard_normal((2, 4, WIDTH)).astype("float32"))
    size = torch.tensor([[1.0, 4.0, 2.0, 2.0], [3.0, 1.0, 1.0, 4.0]])
    with torch.no_grad():
        found = module(FinalTokens(x, size, None, GRID)).numpy()
        plain = module(FinalTokens(x, None, None, GRID)).numpy()
    for image in range(2):
        copies = x[image].repeat_interleave(size[image].long(), dim=0).double().numpy()
        assert np.abs(found[image] - reference(weights, copies, 2)).max() <= 1e-5
        ones = reference(weights, x[image].double().numpy(), 2)
        assert np.abs(plain[image] - ones).max() <= 1e-5
    assert np.abs(found - plain).max() > 1e-2


def test_random_weights_are_those_of_the_seed():
    one, same, other = (
        Resampler(latents=2, layers=1, heads=2, head_width=4, seed=seed).module(WIDTH, GRID)
        for seed in (0, 0, 1)
    )
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True))
    assert not torch.equal(one.latents, other.latents)


@pytest.mark.parametrize(
    ("change", "options", "why"),
    [
        ({"latents": None}, {}, "has no latents and layers.0.0.to_q.weight"),
        ({"latents": (3, 8)}, {}, "is for features 8 wide and the model's are 12"),
        ({}, {"head_width": 5}, "has queries 8 wide, no multiple of head_width 5"),
        ({}, {"latents": 4}, "has 3 latents and 4 are asked for"),
        ({}, {"layers": 1}, "has 2 layers and 1 are asked for"),
        (
            {"frame_embs": (2, 12)},
            {},
            "has frame_embs of shape [2, 12]; expected nothing",
        ),
        (
            {"layers.1.1.1.weight": (9, 12)},
            {},
            "has layers.1.1.1.weight of shape [9, 12]; expected of shape [20, 12]",
        ),
    ],
)
def test_a_file_that_does_not_fit_is_refused(weights_file, change, options, why):
    weights = state()
    for name, shape in change.items():
        weights.pop(name, None)
        if shape is not None:
            weights[name] = torch.zeros(shape)
    path = weights_file(weights)
    with pytest.raises(InputError) as failure:
        Resampler(str(path), **{"head_width": 4, **options}).module(WIDTH, GRID)
    assert str(failure.value) == (
        f"resampler weights {path} {why}; give a file in the layout of OpenFlamingo's "
        "PerceiverResampler that fits, or weights=random"
    )


def test_values_that_are_not_finite_are_refused(weights_file):
    weights = state()
    weights["latents"][0, 0] = torch.nan
    path = weights_file(weights)
    with pytest.raises(InputError, match="have NaN or infinite values in latents"):
        Resampler(str(path), head_width=4).module(WIDTH, GRID)


def test_sizes_below_one_are_refused():
    with pytest.raises(InputError, match="option latents of resampler is 0; expected 1 or more"):
        Resampler(latents=0)


def test_its_weights_are_in_the_models_state(make_vit, make_images):
    """Beside the library's own keys; a patched model loads what another one saved."""
    small = {"latents": 2, "layers": 1, "heads": 2, "head_width": 4}
    inner = make_vit(depth=2)
    one, other = (
        patch(inner, 5, dense=True, compressor=Resampler(**small, seed=seed)) for seed in (0, 1)
    )
    own = {key for key in one.state_dict() if key.startswith("compressor.")}
    assert set(one.state_dict()) - own == set(inner.state_dict())
    assert "compressor.layers.0.0.to_kv.weight" in own
    images = torch.from_numpy(make_images(one, 2))
    with torch.no_grad():
        before, expected = other(images), one(images)
        other.load_state_dict(one.state_dict())
        found = other(images)
    assert expected.shape == (2, 2, one.width)
    assert not torch.equal(before, expected)
    assert torch.equal(found, expected)
