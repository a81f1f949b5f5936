"""Checkpoints of Transformers: from a folder to a model, a recipe and its preprocessing."""

from __future__ import annotations

import json

import pytest
import torch
from hf_models import MODELS, make
from safetensors.torch import save_file

from tome_export.errors import InputError
from tome_export.models import RECIPES, resolve
from tome_export.models.hf_loader import canonical
from tome_export.models.hf_preprocess import SQUASHES, preprocessing_of
from tome_export.spec import Preprocessing

transformers = pytest.importorskip("transformers")


def saved(folder, kind, **changed):
    model = make(kind, **changed)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("kind", MODELS)
def test_a_saved_model_comes_back(tmp_path, kind):
    model = saved(tmp_path, kind)
    recipe = resolve(f"hf:{tmp_path}")
    loaded = recipe.load()
    assert type(loaded.module) is type(model)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(loaded.module(images)[0], model(images)[0])
    assert loaded.weights.kind == "pretrained"
    assert loaded.weights.source == f"{tmp_path.name}/model.safetensors"
    assert loaded.weights.sha256
    assert recipe.output_name == (
        "logits" if "classifier" in kind or "teacher" in kind else "features"
    )


@pytest.mark.parametrize("name", ["CLIPModel", "SiglipModel"])
def test_only_the_image_tower_is_taken(tmp_path, name):
    family = name.removesuffix("Model")
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    vision |= {"num_attention_heads": 4, "image_size": 32, "patch_size": 4}
    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 4, "vocab_size": 50, "max_position_embeddings": 8}
    extra = {"projection_dim": 24} if family == "CLIP" else {}
    config = getattr(transformers, f"{family}Config")(
        text_config=text, vision_config=vision, **extra
    )
    torch.manual_seed(0)
    model = getattr(transformers, name)(config).eval()
    model.save_pretrained(tmp_path)
    loaded = resolve(f"hf:{tmp_path}").load()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = model.get_image_features(images)
        expected = getattr(expected, "pooler_output", expected)
        found = loaded.module(images)
    output = found.image_embeds if family == "CLIP" else found.pooler_output
    assert torch.allclose(output, expected, atol=1e-6)


@pytest.mark.parametrize("kind", ["ViT", "DINOv2, SwiGLU", "CLIP"])
def test_random_weights_follow_the_seed_and_depth(tmp_path, kind):
    saved(tmp_path, kind)
    (tmp_path / "model.safetensors").unlink()
    recipe = resolve(f"hf:{tmp_path}")
    one, same, other = (recipe.load(weights="random", seed=seed) for seed in (1, 1, 2))
    key = next(name for name, value in one.module.named_parameters() if value.ndim == 2)
    first = one.module.state_dict()[key]
    assert torch.equal(first, same.module.state_dict()[key])
    assert not torch.equal(first, other.module.state_dict()[key])
    small = recipe.load(weights="random", depth=1).module
    assert small.config.num_hidden_layers == 1


def test_bin_files_shards_and_a_file_given_by_path(tmp_path):
    model = saved(tmp_path, "CLIP")
    state = model.state_dict()
    (tmp_path / "model.safetensors").rename(tmp_path / "other.safetensors")
    torch.save(state, tmp_path / "pytorch_model.bin")
    recipe = resolve(f"hf:{tmp_path}")
    key = next(iter(state))
    assert torch.equal(recipe.load().module.state_dict()[key], state[key])
    by_path = recipe.load(weights=str(tmp_path / "other.safetensors"))
    assert by_path.weights.kind == "file"
    assert torch.equal(by_path.module.state_dict()[key], state[key])
    (tmp_path / "pytorch_model.bin").unlink()
    names = list(state)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, keys in shards.items():
        save_file({k: state[k].contiguous() for k in keys}, tmp_path / file)
    index = {"weight_map": {k: file for file, keys in shards.items() for k in keys}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert torch.equal(recipe.load().module.state_dict()[key], state[key])
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(InputError) as refused:
        recipe.load()
    assert str(refused.value) == (
        f"index {tmp_path}/model.safetensors.index.json names b.safetensors, which is not there "
        "(1 of the 2 shards needed are missing); download the whole checkpoint"
    )


def test_dinov2_is_resampled_as_the_library_does(tmp_path):
    model = saved(tmp_path, "DINOv2", image_size=48)
    processor = {"size": {"shortest_edge": 36}, "crop_size": {"height": 32, "width": 32}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    recipe = resolve(f"hf:{tmp_path}")
    assert recipe.preprocessing.input_size == (3, 32, 32)
    loaded = recipe.load()
    assert loaded.weights.source.endswith("; position embedding resampled 48 -> 32 pixels")
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(loaded.module(images)[0], model(images)[0])


def test_labels_are_those_of_the_configuration(tmp_path):
    labels = {index: f"kind {index}" for index in range(7)}
    saved(tmp_path, "ViT, classifier", id2label=labels)
    assert resolve(f"hf:{tmp_path}").label_names(7) == tuple(labels.values())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_stored_type_is_known(tmp_path, dtype):
    make("CLIP").to(getattr(torch, dtype)).save_pretrained(tmp_path)
    loaded = resolve(f"hf:{tmp_path}").load()
    assert loaded.weights.stored_dtype == dtype
    assert {p.dtype for p in loaded.module.parameters()} == {torch.float32}


DEFAULTS = Preprocessing((3, 224, 224), (0.5,) * 3, (0.5,) * 3, 1.0, "bicubic")


@pytest.mark.parametrize(
    ("values", "size", "crop_pct", "interpolation", "remark"),
    [
        ({"size": 224, "crop_size": 224}, 224, 1.0, "bicubic", ""),
        (
            {"size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}},
            224,
            0.875,
            "bicubic",
            "",
        ),
        ({"size": {"height": 224, "width": 224}, "resample": 2}, 224, 1.0, "bilinear", SQUASHES),
        (
            {},
            224,
            1.0,
            "bicubic",
            "without preprocessor_config.json, preprocessing is its family's",
        ),
    ],
)
def test_preprocessing(values, size, crop_pct, interpolation, remark):
    found, said = preprocessing_of(values, DEFAULTS, "m")
    assert found.input_size == (3, size, size)
    assert found.crop_pct == crop_pct
    assert found.interpolation == interpolation
    assert said == remark


@pytest.mark.parametrize(
    ("values", "what"),
    [
        ({"do_rescale": False}, "pixels that are not scaled to [0, 1]"),
        ({"resample": 1}, "PIL's resampling 1"),
        ({"do_resize": False}, "images that are not resized"),
        ({"size": {"longest_edge": 3}}, "size {'longest_edge': 3}"),
        ({"size": {"shortest_edge": 224}}, "images that keep their shape"),
    ],
)
def test_preprocessing_that_is_refused(values, what):
    with pytest.raises(InputError) as refused:
        preprocessing_of(values, DEFAULTS, "m")
    assert str(refused.value) == (
        f"preprocessor_config.json of m asks for {what}, which is not supported; expected a resize "
        "to a fixed size, a centre crop, scaling to [0, 1] and normalisation"
    )


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (
            "vit.encoder.layer.0.attention.attention.query.weight",
            "layers.0.attention.q_proj.weight",
        ),
        ("encoder.layer.3.attention.output.dense.bias", "layers.3.attention.o_proj.bias"),
        ("encoder.layer.3.output.dense.bias", "layers.3.mlp.fc2.bias"),
        ("deit.encoder.layer.3.intermediate.dense.bias", "layers.3.mlp.fc1.bias"),
        ("vision_model.encoder.layers.0.mlp.fc1.weight", "encoder.layers.0.mlp.fc1.weight"),
    ],
)
def test_names_of_both_versions_are_one(old, new):
    assert canonical(old) == new
    assert canonical(new) == new


def test_the_named_recipes_are_counted_as_they_are():
    from tome_export.pipeline.catalog import sizes_from_model, sizes_from_name

    names = [name for name in RECIPES if name.startswith("hf_")]
    assert names == [
        "hf_clip_b32",
        "hf_clip_b16",
        "hf_clip_l14",
        "hf_clip_l14_336",
        "hf_siglip_b16",
    ]
    for name in names:
        assert sizes_from_name(RECIPES[name]) == sizes_from_model(RECIPES[name])
