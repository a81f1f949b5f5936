"""The saliency recipes: a file of weights becomes the model that wrote it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from tome_export.errors import InputError
from tome_export.models import RECIPES
from tome_export.models.hf.loader import SaliencyLoader
from tome_export.models.recipe import ModelSource

pytest.importorskip("transformers")

TINY = {
    "model_type": "dinov2",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "patch_size": 4,
    "image_size": 32,
}


def tiny(size: int = 32):
    loader = SaliencyLoader("Dinov2Model", TINY, "tiny", (size, size), (12, 8, 4))
    return replace(RECIPES["dinov2_s14_saliency"], source=ModelSource(loader))


def images(size: int = 32):
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A model, and the file of its weights by the names of Transformers' checkpoints."""
    folder = tmp_path_factory.mktemp("saliency")
    module = tiny().load("random").module
    module.backbone.save_pretrained(folder / "tower")
    state = {f"backbone.{k}": v for k, v in load_file(folder / "tower/model.safetensors").items()}
    state |= {f"decoder.{key}": value for key, value in module.decoder.state_dict().items()}
    path = folder / "saliency.safetensors"
    save_file(state, path)
    return module, path


@torch.no_grad()
def test_a_file_gives_the_model_that_wrote_it(written):
    module, path = written
    found = tiny().load(str(path))
    expected = module(images())["saliency"]
    assert expected.shape == (2, 1, 32, 32)
    assert expected.std() > 0.01
    assert torch.equal(found.module(images())["saliency"], expected)
    assert found.weights.kind == "file"
    assert found.weights.sha256


@torch.no_grad()
def test_positions_are_resampled_as_the_library_does(written):
    module, path = written
    found = tiny(size=16).load(str(path))
    # The library itself resamples at every call for images of another size.
    expected = module(images(16))["saliency"]
    assert torch.allclose(found.module(images(16))["saliency"], expected, atol=1e-5)
    assert "8x8 -> 4x4 patches" in found.weights.source
    assert found.module.backbone.config.image_size == 16


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: s.pop("decoder.bn2.running_var"), "decoder.bn2.running_var"),
        (lambda s: s.pop("backbone.layernorm.bias"), "layernorm.bias"),
        (lambda s: s["decoder.upconv1.weight"].fill_(float("nan")), "upconv1.weight"),
        (lambda s: s.update({"decoder.more": torch.zeros(1)}), "more"),
        (lambda s: s.update({"decoder.final_conv.bias": torch.zeros(3)}), "final_conv.bias"),
    ],
)
def test_another_models_file_is_refused(written, tmp_path, change, said):
    state = load_file(written[1])
    change(state)
    save_file(state, tmp_path / "changed.safetensors")
    with pytest.raises(InputError, match=said):
        tiny().load(str(tmp_path / "changed.safetensors"))


@pytest.mark.parametrize("name", ["dinov2_s14_saliency", "dinov2_s14_saliency_518"])
def test_it_is_said_how_weights_are_made(name):
    with pytest.raises(InputError, match=r"scripts/trained_dinov2.py OUT .*saliency.safetensors"):
        RECIPES[name].load()
