"""Checkpoints of Transformers: from a folder to a model, a recipe and its preprocessing."""

from __future__ import annotations

import json

import pytest
import torch
from hf_models import MODELS, make
from safetensors.torch import load_file, save_file

from tome_export.errors import InputError
from tome_export.merge.schedule import Schedule
from tome_export.models import RECIPES, resolve
from tome_export.models.hf.checkpoint import (
    NO_PROCESSOR,
    PROCESSOR,
    PROCESSORS,
    preprocessing_of,
    quiet,
    reason_of,
)
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
    assert recipe.output.name == (
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


@pytest.mark.parametrize("family", ["CLIP", "Siglip"])
def test_the_text_towers_shards_are_not_opened(tmp_path, family):
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 4, "image_size": 32, "patch_size": 4}
    config = getattr(transformers, f"{family}Config")(vision_config=vision)
    model = getattr(transformers, f"{family}VisionModel")(config.vision_config)
    config.save_pretrained(tmp_path)
    front = "" if next(iter(model.state_dict())).startswith("vision_model.") else "vision_model."
    state = {f"{front}{key}": value for key, value in model.state_dict().items()}
    if family == "CLIP":
        state["visual_projection.weight"] = torch.ones(512, 32)
    save_file(state, tmp_path / "image.safetensors")
    (tmp_path / "text.safetensors").write_bytes(b"no file of tensors")
    text = dict.fromkeys(("text_model.x", "text_projection.weight", "logit_scale"), "text")
    shards = {**dict.fromkeys(state, "image"), **text}
    index = {"weight_map": {key: f"{file}.safetensors" for key, file in shards.items()}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    loaded = resolve(f"hf:{tmp_path}").load()
    assert loaded.weights.source == f"{tmp_path.name}/image.safetensors"
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        found = loaded.module(images).last_hidden_state
        assert torch.equal(found, model.eval()(images).last_hidden_state)


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
    said = "; position embedding resampled 12x12 -> 8x8 patches"
    assert loaded.weights.source.endswith(said)
    assert loaded.weights.resampled_from == (12, 12)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(loaded.module(images)[0], model(images)[0])


def test_labels_are_those_of_the_configuration(tmp_path):
    labels = {index: f"kind {index}" for index in range(7)}
    saved(tmp_path, "ViT, classifier", id2label=labels)
    assert resolve(f"hf:{tmp_path}").output.label_names(7) == tuple(labels.values())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_stored_type_is_known(tmp_path, dtype):
    make("CLIP").to(getattr(torch, dtype)).save_pretrained(tmp_path)
    loaded = resolve(f"hf:{tmp_path}").load()
    assert loaded.weights.stored_dtype == dtype
    assert {p.dtype for p in loaded.module.parameters()} == {torch.float32}


DEFAULTS = Preprocessing((3, 224, 224), (0.5,) * 3, (0.5,) * 3, 1.0, "bicubic")


CLIP = {
    "image_mean": [0.5] * 3,
    "image_std": [0.25] * 3,
    "resample": 3,
    "do_center_crop": True,
}


def preprocessing(folder, values, kind="clip_vision_model"):
    (folder / "preprocessor_config.json").write_text(json.dumps(values))
    return preprocessing_of(folder, kind, DEFAULTS, "m")


@pytest.mark.parametrize(
    ("values", "size", "crop_pct", "interpolation", "resize"),
    [
        ({**CLIP, "size": 224, "crop_size": 224}, 224, 1.0, "bicubic", "crop"),
        (
            {**CLIP, "size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}},
            224,
            0.875,
            "bicubic",
            "crop",
        ),
        (
            {
                **CLIP,
                "size": {"height": 224, "width": 224},
                "resample": 2,
                "do_center_crop": False,
            },
            224,
            1.0,
            "bilinear",
            "squash",
        ),
    ],
)
def test_preprocessing(tmp_path, values, size, crop_pct, interpolation, resize):
    found, said = preprocessing(tmp_path, values)
    assert found.input_size == (3, size, size)
    assert found.crop_pct == crop_pct
    assert found.interpolation == interpolation
    assert (found.mean, found.std) == ((0.5,) * 3, (0.25,) * 3)
    assert (found.resize, found.crop_offset) == (resize, "floor")
    assert said == ""


FULL = {**CLIP, "size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}}


@pytest.mark.parametrize(
    ("left_out", "said"),
    [
        (
            ["size", "crop_size"],
            "size 224 x 224, bicubic, mean 0.5, 0.5, 0.5, std 0.25, 0.25, 0.25",
        ),
        (
            ["image_mean"],
            "size 224 x 224 cut out of 256, bicubic, mean 0.5, 0.5, 0.5, std 0.25, 0.25",
        ),
        (["image_std"], "size 224 x 224 cut out of 256, bicubic, mean 0.5, 0.5, 0.5, std 0.5, 0.5"),
        (
            ["resample"],
            "size 224 x 224 cut out of 256, bicubic, mean 0.5, 0.5, 0.5, std 0.25, 0.25",
        ),
        (
            ["do_center_crop"],
            "size 224 x 224 cut out of 256, bicubic, mean 0.5, 0.5, 0.5, std 0.25",
        ),
    ],
)
@pytest.mark.parametrize("file", [PROCESSOR, PROCESSORS])
def test_what_a_file_leaves_out_is_said_with_its_value(tmp_path, left_out, said, file):
    values = {key: value for key, value in FULL.items() if key not in left_out}
    text = json.dumps(values if file == PROCESSOR else {"image_processor": values})
    (tmp_path / file).write_text(text)
    told = preprocessing_of(tmp_path, "clip_vision_model", DEFAULTS, "m")[1]
    assert told.startswith(f"{file} names no {', '.join(left_out)}: {said}")


def test_padding_of_a_batch_changes_no_image(tmp_path):
    padding, plain = (preprocessing(tmp_path, {**FULL, "do_pad": flag}) for flag in (True, False))
    assert padding == plain
    with pytest.raises(InputError, match=r"asks for images that are padded to .*'height': 300"):
        preprocessing(tmp_path, {**FULL, "do_pad": True, "pad_size": {"height": 300, "width": 300}})


def test_llavas_processor_pads_to_a_square(tmp_path):
    given = {**FULL, "do_pad": True, "image_processor_type": "LlavaImageProcessor"}
    found = preprocessing(tmp_path, given)[0]
    assert (found.resize, found.fill, found.crop_pct) == ("pad", (127, 127, 127), 0.875)


def test_the_file_of_transformers_5(tmp_path):
    """``processor_config.json`` alone, as its processors are saved (transformers issue 44623)."""
    saved(tmp_path, "CLIP, projection")
    made = transformers.CLIPImageProcessor(
        size={"shortest_edge": 36},
        crop_size={"height": 32, "width": 32},
        image_mean=[0.1, 0.2, 0.3],
        image_std=[0.9, 0.8, 0.7],
        resample=2,
    )
    text = json.dumps({"image_processor": made.to_dict(), "processor_class": "CLIPProcessor"})
    (tmp_path / PROCESSORS).write_text(text)
    recipe = resolve(f"hf:{tmp_path}")
    found = recipe.preprocessing
    assert found == Preprocessing(
        (3, 32, 32), (0.1, 0.2, 0.3), (0.9, 0.8, 0.7), 32 / 36, "bilinear", crop_offset="floor"
    )
    assert recipe.description == "Transformers' CLIPVisionModelWithProjection"
    # As in Transformers, it goes before the other file, unless it has no image processor.
    (tmp_path / PROCESSOR).write_text(json.dumps({**FULL, "size": 36, "crop_size": 32}))
    assert resolve(f"hf:{tmp_path}").preprocessing == found
    (tmp_path / PROCESSORS).write_text('{"processor_class": "CLIPProcessor"}')
    assert resolve(f"hf:{tmp_path}").preprocessing.mean == (0.5,) * 3


@pytest.mark.parametrize("text", ["[1]", "{", '{"image_processor": 5}', '{"image_processor": []}'])
def test_a_processors_file_that_is_none(tmp_path, text):
    (tmp_path / PROCESSORS).write_text(text)
    with pytest.raises(InputError, match=PROCESSORS):
        preprocessing_of(tmp_path, "clip_vision_model", DEFAULTS, "m")


def test_the_librarys_words_are_one_short_line():
    assert reason_of(ValueError("one\n  two")) == "one two"
    assert reason_of(ValueError()) == "ValueError"
    assert reason_of(KeyError("x")) == "unknown 'x'"
    assert reason_of(ValueError("a" * 9999)) == "a" * 299 + "…"
    with pytest.raises(RuntimeError) as caught:
        torch.ones(2, device="meta").to("cuda:99")
    native = RuntimeError(
        f"{caught.value}\nException raised from f at a.cpp:1 (most recent call first):"
    )
    assert "Exception raised" not in reason_of(native)


def test_nothing_of_the_librarys_log_is_seen(caplog, capfd):
    logger = transformers.utils.logging.get_logger("transformers.models")
    with quiet():
        logger.error("an error")
        logger.critical("worse")
    assert caplog.text + capfd.readouterr().err == ""
    logger.error("an error")
    assert "an error" in caplog.text + capfd.readouterr().err


def test_without_an_image_processor_it_is_the_familys(tmp_path):
    said = f"{NO_PROCESSOR}: size 224 x 224, bicubic, mean 0.5, 0.5, 0.5, std 0.5, 0.5, 0.5"
    assert preprocessing_of(tmp_path, "vit", DEFAULTS, "m") == (DEFAULTS, said)


def test_a_dinov2_that_names_no_mean_has_imagenets(tmp_path):
    """The library's class for it has CLIP's, which no DINOv2 was trained with."""
    saved(tmp_path, "DINOv2")
    text = json.dumps({"size": {"shortest_edge": 36}, "crop_size": 32})
    (tmp_path / "preprocessor_config.json").write_text(text)
    recipe = resolve(f"hf:{tmp_path}")
    assert recipe.preprocessing.mean == (0.485, 0.456, 0.406)
    assert "names no resample, do_center_crop, image_mean, image_std: " in recipe.description
    assert "mean 0.485, 0.456, 0.406, std 0.229, 0.224, 0.225" in recipe.description


@pytest.mark.parametrize(
    ("values", "what"),
    [
        ({"do_rescale": False}, "pixels that are not scaled to [0, 1]"),
        ({"resample": 1}, "PIL's resampling 1"),
        ({"resample": [3]}, "PIL's resampling [3]"),
        ({"size": 16, "crop_size": 32}, "a cut of 32 x 32 out of images of 16"),
        ({"do_resize": False}, "images that are not resized"),
        ({"size": {"longest_edge": 3}}, "size {'longest_edge': 3}"),
        (
            {"size": 256, "crop_size": {"height": 224, "width": 128}},
            "a cut of 224 x 128 out of images whose shorter side is 256",
        ),
        ({"size": {"shortest_edge": 224}, "do_center_crop": False}, "images that keep their shape"),
    ],
)
def test_preprocessing_that_is_refused(tmp_path, values, what):
    with pytest.raises(InputError) as refused:
        preprocessing(tmp_path, values)
    assert str(refused.value) == (
        f"preprocessor_config.json of m asks for {what}, which is not supported; expected a resize "
        "to a fixed size, a centre crop, scaling to [0, 1] and normalisation"
    )


@pytest.mark.parametrize("kind", MODELS)
def test_the_layouts_of_all_versions_are_one(tmp_path, kind):
    """As the hub has it, and as this version of the library names its tensors."""
    model = saved(tmp_path, kind)
    recipe = resolve(f"hf:{tmp_path}")
    names = load_file(tmp_path / "model.safetensors").keys()
    if kind.startswith(("ViT", "DeiT")) and int(transformers.__version__.partition(".")[0]) > 4:
        assert names != model.state_dict().keys()
    one = recipe.load().module.state_dict()
    save_file(dict(model.state_dict()), tmp_path / "model.safetensors")
    two = recipe.load().module.state_dict()
    for key, value in model.state_dict().items():
        assert torch.equal(one[key], value)
        assert torch.equal(two[key], value)


def test_the_named_recipes_are_counted_as_they_are():
    from tome_export.models.catalog import sizes_from_geometry, sizes_from_model

    names = [name for name in RECIPES if name.startswith("hf_")]
    assert names == [
        "hf_clip_b32",
        "hf_clip_b16",
        "hf_clip_l14",
        "hf_clip_l14_336",
        "hf_siglip_b16",
    ]
    for name in names:
        assert sizes_from_geometry(RECIPES[name]) == sizes_from_model(RECIPES[name])


@pytest.mark.parametrize("half", ["", "vision_config", "text_config"])
def test_a_quantised_checkpoint_is_refused_wherever_it_says_so(tmp_path, half):
    told = {"quantization_config": {"quant_method": "bitsandbytes"}}
    config = {"model_type": "clip", **({half: told} if half else told)}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError) as refused:
        resolve(f"hf:{tmp_path}")
    assert str(refused.value) == (
        f"weights of {tmp_path} are quantised (quantization_config in config.json), which is not "
        "supported; use the checkpoint in float32, float16 or bfloat16"
    )


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
def test_codes_are_no_weights(tmp_path, dtype):
    state = saved(tmp_path, "SigLIP").state_dict()
    key = next(name for name in state if name.endswith("layers.1.self_attn.q_proj.weight"))
    state[key] = state[key].to(getattr(torch, dtype))
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(InputError) as refused:
        resolve(f"hf:{tmp_path}").load()
    assert str(refused.value) == (
        f"weights of {tmp_path} are stored as {dtype} in {key}, which is not supported; expected "
        "float32, float64, float16 or bfloat16, not quantised"
    )


@pytest.mark.parametrize(
    "extra",
    [
        "encoder.layers.0.self_attn.visual_projection.lora_A",
        "embeddings.classifier_free.weight",
        "adapter.weight",
    ],
)
def test_tensors_without_a_place_are_named(tmp_path, extra):
    state = make("CLIP, projection").state_dict()
    make("CLIP, projection").save_pretrained(tmp_path)
    save_file({**state, f"vision_model.{extra}": torch.ones(3)}, tmp_path / "model.safetensors")
    with pytest.raises(InputError) as refused:
        resolve(f"hf:{tmp_path}").load()
    assert str(refused.value) == (
        f"weights of {tmp_path} do not fit its config.json: keys 1 unexpected "
        f"(vision_model.{extra}); expected the whole checkpoint of this architecture"
    )


@pytest.mark.parametrize(
    ("kind", "bare"), [("ViT, classifier", "ViT"), ("DeiT, teacher", "DeiT"), ("CLIP", "CLIP")]
)
def test_heads_that_the_class_has_no_use_for_are_left(tmp_path, kind, bare):
    state = make(kind).state_dict()
    if bare == "CLIP":
        state = {f"vision_model.{k.removeprefix('vision_model.')}": v for k, v in state.items()}
        state["visual_projection.weight"] = torch.ones(24, 32)
    model = saved(tmp_path, bare)
    save_file(state, tmp_path / "model.safetensors")
    loaded = resolve(f"hf:{tmp_path}").load()
    assert type(loaded.module) is type(model)


@pytest.mark.parametrize("keeps_head", [False, True])
def test_a_siglip_without_a_head(tmp_path, keeps_head):
    from tome_export.build import BuildRequest, build
    from tome_export.models.catalog import details

    model = saved(tmp_path, "SigLIP", vision_use_head=False)
    if keeps_head:
        save_file(make("SigLIP").state_dict(), tmp_path / "model.safetensors")
    name = f"hf:{tmp_path}"
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        found = resolve(name).load().module(images).last_hidden_state
        assert torch.equal(found, model(images).last_hidden_state)
    assert details(name).tokens == 64
    request = {"model": name, "engine": "none", "schedule": Schedule(5)}
    with pytest.raises(InputError, match=r"has no pooling head .*; use dense outputs$"):
        build(BuildRequest(output=tmp_path / "out", **request))
    manifest = build(BuildRequest(output=tmp_path / "out", dense=True, **request)).manifest
    assert manifest.output.shape == ("batch", 64, 32)


@pytest.mark.parametrize("kind", ["CLIP", "ViT", "DINOv2"])
def test_torchs_generator_is_left_alone(tmp_path, kind):
    saved(tmp_path, kind, image_size=48)
    if kind == "DINOv2":
        processor = {"size": {"shortest_edge": 36}, "crop_size": {"height": 32, "width": 32}}
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    before = torch.get_rng_state()
    recipe = resolve(f"hf:{tmp_path}")
    recipe.load()
    recipe.load(weights="random", seed=5)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", ["my model", "a--b/c"])
def test_names_that_no_hub_has(name):
    with pytest.raises(InputError) as refused:
        resolve(f"hf:{name}")
    assert str(refused.value) == (
        f"{name!r} is neither a folder here nor a name that the hub allows; expected hf:<folder> "
        "or hf:<owner>/<name>"
    )


def test_the_vision_half_of_old_files(tmp_path):
    old = {"hidden_size": 64, "num_attention_heads": 2, "patch_size": 16, "num_hidden_layers": 1}
    vision = {**old, "hidden_size": 8, "intermediate_size": 16}
    config = {"model_type": "clip", "vision_config": vision, "vision_config_dict": old}
    (tmp_path / "config.json").write_text(json.dumps(config))
    made = resolve(f"hf:{tmp_path}").source.loader.config()
    assert (made.hidden_size, made.intermediate_size) == (64, 3072)
    (tmp_path / "config.json").write_text(json.dumps({**config, "vision_config_dict": None}))
    made = resolve(f"hf:{tmp_path}").source.loader.config()
    assert (made.hidden_size, made.intermediate_size) == (8, 16)


SUPPORTED = (
    "clip, siglip, clip_vision_model, siglip_vision_model, vit, deit, dinov2, "
    "dinov2_with_registers, llava"
)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"architectures": [3]},
            "architecture 3 of {} is not supported; supported: Dinov2Model, "
            "Dinov2ForImageClassification",
        ),
        (
            {"model_type": ["vit"], "image_size": 32},
            f"model type ['vit'] of {{}} is not supported; supported: {SUPPORTED}",
        ),
        (
            {"hidden_size": 0},
            "config.json of {}: hidden_size is 0; expected a whole number, 1 or more",
        ),
        (
            {"hidden_act": "foo"},
            "config.json of {}: hidden_act is 'foo'; expected an activation of Transformers, such "
            "as quick_gelu",
        ),
        (
            {"layer_norm_eps": -1.0},
            "config.json of {}: layer_norm_eps is -1.0; expected a number above 0",
        ),
    ],
)
def test_configurations_that_are_refused(tmp_path, values, message):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "dinov2", **values}))
    with pytest.raises(InputError) as refused:
        resolve(f"hf:{tmp_path}")
    assert str(refused.value) == message.format(tmp_path)


@pytest.mark.parametrize(
    "values",
    [
        {"model_type": "dinov2", "hidden_size": "wide"},
        {"model_type": "clip", "vision_config": [1]},
        {"model_type": "clip_vision_model", "hidden_size": 33},
    ],
)
def test_configurations_that_the_library_refuses(tmp_path, values):
    """In its own words, which change with its version, in one line of ours."""
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(InputError) as refused:
        resolve(f"hf:{tmp_path}")
    message = str(refused.value)
    assert message.startswith(f"config.json of {tmp_path}")
    assert "; expected " in message
    assert "\n" not in message
    assert "wide" in message or "33" in message or "CLIP" in message or "vision_config" in message


@pytest.mark.parametrize(
    ("values", "what"),
    [
        ({"image_mean": 0.5}, "image_mean is 0.5; expected 3 finite numbers"),
        ({"image_std": [1, 1]}, "image_std is [1, 1]; expected 3 finite numbers"),
        ({"image_std": [1, 1, 0]}, "image_std is (1.0, 1.0, 0.0); expected numbers above 0"),
        ({"image_std": [1, 1, -1]}, "image_std is (1.0, 1.0, -1.0); expected numbers above 0"),
        (
            {"image_processor_type": 5},
            "image_processor_type is 5; expected the name of one of Transformers' image processors",
        ),
        (
            {"feature_extractor_type": ["x"]},
            "feature_extractor_type is ['x']; expected the name of one of Transformers' image "
            "processors",
        ),
        ({"rescale_factor": "x"}, "rescale_factor is 'x'; expected 1/255"),
        (
            {"size": {"height": "a", "width": 2}},
            "size is 'a'; expected a whole number, 1 or more",
        ),
        (
            {"size": {"shortest_edge": 0}, "crop_size": 32},
            "size is 0; expected a whole number, 1 or more",
        ),
    ],
)
def test_preprocessing_that_is_no_such_thing(tmp_path, values, what):
    with pytest.raises(InputError) as refused:
        preprocessing(tmp_path, values)
    assert str(refused.value) == f"preprocessor_config.json of m: {what}"


def test_code_of_a_checkpoint_is_not_run(tmp_path):
    mark = tmp_path / "executed"
    (tmp_path / "theirs.py").write_text(f"import pathlib; pathlib.Path({str(mark)!r}).touch()")
    values = {"image_processor_type": "Theirs", "auto_map": {"AutoImageProcessor": "theirs.Theirs"}}
    with pytest.raises(InputError) as refused:
        preprocessing(tmp_path, values)
    assert str(refused.value) == (
        "preprocessor_config.json of m names Theirs, which Transformers does not have; expected "
        "one of its image processors"
    )
    assert not mark.exists()


def test_an_image_processor_that_the_library_refuses(tmp_path):
    with pytest.raises(InputError) as refused:
        preprocessing(tmp_path, {"size": 32, "crop_size": "b"})
    assert str(refused.value) == (
        "preprocessor_config.json of m makes no image processor (Could not convert size input to "
        "size dict: b); expected that of a whole checkpoint"
    )


@pytest.mark.parametrize(
    ("values", "kind", "resize"),
    [
        ({"feature_extractor_type": "DeiTFeatureExtractor"}, "clip_vision_model", "squash"),
        ({"feature_extractor_type": "CLIPFeatureExtractor"}, "vit", "crop"),
        ({}, "deit", "squash"),
        ({}, "dinov2_with_registers", "crop"),
        ({}, "clip_vision_model", "crop"),
    ],
)
def test_a_size_of_one_number(tmp_path, values, kind, resize):
    given = {**CLIP, "size": 256, "crop_size": 224, **values}
    found, said = preprocessing(tmp_path, given, kind)
    assert (found.input_size, found.crop_pct) == ((3, 224, 224), 224 / 256)
    assert (found.resize, said) == (resize, "")


def test_a_vit_with_a_size_of_one_number_says_that_it_squashes(tmp_path):
    saved(tmp_path, "ViT")
    (tmp_path / "preprocessor_config.json").write_text('{"size": 32}')
    told = (
        f"Transformers' ViTModel; {PROCESSOR} names no resample, image_mean, image_std: size 32 x "
        "32, bilinear whatever the shape, mean 0.5, 0.5, 0.5, std 0.5, 0.5, 0.5"
    )
    assert resolve(f"hf:{tmp_path}").description == told
