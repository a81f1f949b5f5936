from __future__ import annotations

import sys

import pytest
import torch
from safetensors.torch import save_file

from tome_export.errors import InputError
from tome_export.models import resolve
from tome_export.spec import Preprocessing

SOURCE = """
import timm
from tome_export.spec import Preprocessing

ARGS = dict(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=5)

def plain():
    return timm.create_model("vit_tiny_patch16_224", **ARGS)

def grey():
    return timm.create_model("vit_tiny_patch16_224", in_chans=1, **ARGS)

def with_preprocessing():
    return plain(), Preprocessing((3, 32, 32), (0.1,) * 3, (0.2,) * 3, 0.8, "bilinear")

def fails():
    raise ValueError("no such luck")

def number():
    return 3

def pair():
    return plain(), "bicubic"

def patched():
    from tome_export.patch import patch
    return patch(plain(), 4)

def half():
    return plain().half()

def odd_block():
    model = plain()
    model.blocks[1] = type("MyBlock", (type(model.blocks[1]),), {})(32, 2)
    return model

def timm_clip():
    return timm.create_model("vit_base_patch16_clip_224.openai", **{**ARGS, "num_classes": 512})

def timm_clip_tuned():
    return timm.create_model("vit_base_patch16_clip_224.openai", **ARGS)

def torchvision():
    from torchvision.models.vision_transformer import VisionTransformer
    return VisionTransformer(32, 8, 2, 2, 32, 64, num_classes=5)

def torchvision_features():
    import torch
    model = torchvision()
    model.heads = torch.nn.Identity()
    return model

def open_clip():
    from open_clip.transformer import VisionTransformer
    model = VisionTransformer(image_size=32, patch_size=8, width=32, layers=2, heads=2, mlp_ratio=2)
    model.preprocess_cfg = {"mean": (0.1, 0.2, 0.3), "std": (0.5, 0.6, 0.7)}
    return model

def hf_clip():
    from hf_models import make
    return make("CLIP, projection")

def hf_classifier():
    from hf_models import make
    model = make("ViT, classifier")
    model.config.id2label = dict(enumerate("abcdefg"))
    return model

def hf_bare():
    from hf_models import make
    return make("DINOv2")

def convnet():
    import torch
    return torch.nn.Conv2d(3, 4, 3)
"""


@pytest.fixture
def models(tmp_path, monkeypatch):
    """The user's module, in the current folder and not on the Python path."""
    (tmp_path / "mymodels_t.py").write_text(SOURCE)
    (tmp_path / "broken_t.py").write_text("1 / 0")
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    yield tmp_path
    assert sys.path == before
    sys.modules.pop("mymodels_t", None)


@pytest.mark.usefixtures("models")
def test_function_of_the_users():
    recipe = resolve("mymodels_t:plain")
    assert recipe.family == "custom"
    assert recipe.preprocessing.input_size == (3, 32, 32)
    assert recipe.preprocessing.mean == (0.5, 0.5, 0.5)
    assert recipe.merging.r == int(0.8 * 17 / 2)
    loaded = recipe.load()
    assert loaded.weights.kind == "function"
    assert loaded.weights.source == "returned by mymodels_t:plain"
    assert loaded.module(torch.randn(2, 3, 32, 32)).shape == (2, 5)
    # Each load is a model of its own, with the same weights.
    again = recipe.load().module
    assert torch.equal(again.head.weight, loaded.module.head.weight)
    assert again is not loaded.module


@pytest.mark.usefixtures("models")
def test_preprocessing_of_the_users():
    expected = Preprocessing((3, 32, 32), (0.1,) * 3, (0.2,) * 3, 0.8, "bilinear")
    assert resolve("mymodels_t:with_preprocessing").preprocessing == expected
    grey = resolve("mymodels_t:grey").preprocessing
    assert (grey.input_size, grey.mean, grey.std) == ((1, 32, 32), (0.5,), (0.5,))


@pytest.mark.usefixtures("models")
@pytest.mark.parametrize(
    ("function", "needs", "output", "tokens", "mean"),
    [
        ("timm_clip", "timm", "features", 17, 0.48145466),
        ("timm_clip_tuned", "timm", "logits", 17, 0.48145466),
        ("torchvision", "torchvision", "logits", 17, 0.485),
        ("torchvision_features", "torchvision", "features", 17, 0.485),
        ("open_clip", "open_clip", "features", 17, 0.1),
        ("hf_clip", "transformers", "features", 65, 0.48145466),
        ("hf_classifier", "transformers", "logits", 65, 0.5),
        ("hf_bare", "transformers", "features", 65, 0.485),
    ],
)
def test_any_family(function, needs, output, tokens, mean):
    pytest.importorskip(needs)
    recipe = resolve(f"mymodels_t:{function}")
    assert (recipe.family, recipe.output.name) == ("custom", output)
    assert recipe.preprocessing.input_size == (3, 32, 32)
    assert recipe.preprocessing.mean[0] == mean
    layers = 3 if needs == "transformers" else 2
    assert recipe.merging.r == int(0.8 * tokens / layers)
    assert recipe.output.labels == (tuple("abcdefg") if function == "hf_classifier" else None)


@pytest.mark.usefixtures("models")
def test_half_precision_of_the_users_is_told():
    loaded = resolve("mymodels_t:half").load()
    assert loaded.weights.stored_dtype == "float16"
    assert {parameter.dtype for parameter in loaded.module.parameters()} == {torch.float32}


def test_weights_from_a_file(models):
    recipe = resolve("mymodels_t:plain")
    state = {k: torch.full_like(v, 0.5) for k, v in recipe.load().module.state_dict().items()}
    save_file(state, models / "w.safetensors")
    loaded = recipe.load("w.safetensors")
    assert loaded.module.head.weight.unique().tolist() == [0.5]
    with pytest.raises(InputError, match="random weights were asked for mymodels_t:plain"):
        recipe.load("random")


@pytest.mark.usefixtures("models")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nomodule_t:f", "no module 'nomodule_t' on the Python path or in the current folder"),
        ("broken_t:f", "importing 'broken_t' failed with ZeroDivisionError: division by zero"),
        ("mymodels_t:nothing", "module 'mymodels_t' has no function 'nothing'"),
        ("mymodels_t:", "module 'mymodels_t' has no function ''; expected module:function"),
        ("mymodels_t:fails", "the function failed with ValueError: no such luck"),
        ("mymodels_t:number", "the function returned int; expected an nn.Module"),
        ("mymodels_t:pair", "the function returned VisionTransformer, str; expected an nn.Module"),
        ("mymodels_t:convnet", "returned a Conv2d, which has no sequence of tokens to merge"),
        ("mymodels_t:patched", "returned a model that is patched already; return the library's"),
        ("mymodels_t:odd_block", "returned a model that cannot be merged: block class MyBlock"),
        (":f", "model ':f' names no module; expected module:function"),
    ],
)
def test_mistakes(name, message):
    with pytest.raises(InputError) as caught:
        resolve(name)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert type(caught.value) is InputError  # its name is in what --json prints
