"""LLaVA's towers from checkpoint folders: what is read, what is cut, what is refused."""

from __future__ import annotations

import inspect
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tome_export.artifact.manifest import Tower
from tome_export.errors import InputError, MissingComponentError, UsageError
from tome_export.models import resolve
from tome_export.models.catalog import sizes_from_geometry, sizes_from_model
from tome_export.models.facts import RULE, recommended_r
from tome_export.models.hf.checkpoint import TILES, read_config
from tome_export.models.llava.config import KNOWN, kept_layers, llava_config
from tome_export.models.llava.loader import tower_key
from tome_export.models.llava.recipes import recipe_from_clip, recipe_from_llava, with_tower
from tome_export.spec import TowerOptions

pytest.importorskip("transformers")

LAYOUTS = ("llava", "transformers")
WITH_PROJECTOR = TowerOptions(projector=True)
IMAGES = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def recipe_of(folder: Path, tower: TowerOptions = TowerOptions()) -> Any:  # noqa: B008
    return recipe_from_llava(f"hf:{folder}", folder, tower)


def output(module: Any) -> torch.Tensor:
    with torch.no_grad():
        return module(IMAGES)


def hidden_state(whole: Any, index: int) -> torch.Tensor:
    """What the library's own layers give, one after the other, without this package's tower."""
    vision = whole.vision_model
    with torch.no_grad():
        states = [vision.pre_layrnorm(vision.embeddings(IMAGES))]
        for layer in vision.encoder.layers:
            # Transformers 4 asks for a mask more.
            more = {"causal_attention_mask"} & set(inspect.signature(layer.forward).parameters)
            given = layer(states[-1], attention_mask=None, **dict.fromkeys(more))
            states.append(given[0] if isinstance(given, tuple) else given)
    return states[index]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("select", [-2, -1, 1, 4])
def test_the_tower_is_the_selected_hidden_state(make_llava, tmp_path, layout, select):
    whole = make_llava(tmp_path, layout)
    for feature, first in (("patch", 1), ("cls_patch", 0)):
        options = TowerOptions(select_layer=select, select_feature=feature)
        loaded = recipe_of(tmp_path, options).load()
        assert torch.equal(output(loaded.module), hidden_state(whole, select)[:, first:])
        assert len(loaded.module.vision_model.encoder.layers) == kept_layers(select, 4)
        assert loaded.weights.source == f"{tmp_path.name}/model.safetensors"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_projector_is_fused_where_asked(make_llava, tmp_path, layout):
    whole = make_llava(tmp_path, layout)
    loaded = recipe_of(tmp_path, WITH_PROJECTOR).load()
    with torch.no_grad():
        expected = whole.mm_projector(hidden_state(whole, -2)[:, 1:])
    assert torch.equal(output(loaded.module), expected)
    assert loaded.recipe.tower == TowerOptions("llava", -2, "patch", True)


def test_it_is_what_transformers_gives_the_language_model(tmp_path):
    """Saved by the library, sharded, read by us: bit for bit its ``get_image_features``."""
    import transformers

    vision = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    vision |= {"num_hidden_layers": 4, "image_size": 32, "patch_size": 4, "projection_dim": 16}
    text = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 99}
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**vision),
        text_config=transformers.LlamaConfig(
            **text, num_attention_heads=4, num_key_value_heads=4, pad_token_id=0
        ),
        image_token_index=98,
    )
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration(config).eval()
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    shards = list(tmp_path.glob("model-*.safetensors"))
    loaded = recipe_of(tmp_path, WITH_PROJECTOR).load()
    with torch.no_grad():
        features = model.get_image_features(pixel_values=IMAGES)
    features = torch.stack(list(getattr(features, "pooler_output", features)))
    assert torch.equal(output(loaded.module), features)
    assert 0 < loaded.weights.source.count(".safetensors") < len(shards)


def shard(folder: Path, suffix: str) -> None:
    """Put tower, projector and language model into a file each."""
    whole = folder / "model.safetensors"
    state = load_file(whole)
    whole.unlink()
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    weight_map = {}
    for key in state:
        kind = 3 if key.startswith("model.layers.") else 2 if "projector" in key else 1
        weight_map[key] = f"{stem}-0000{kind}-of-00003.{suffix}"
    for name in set(weight_map.values()):
        held = {key: state[key] for key, file in weight_map.items() if file == name}
        if suffix == "safetensors":
            save_file(held, folder / name)
        else:
            torch.save(held, folder / name)
    index = folder / f"{stem}.{suffix}.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_shards_of_the_language_model_need_not_be_there(make_llava, tmp_path, suffix):
    whole = make_llava(tmp_path)
    shard(tmp_path, suffix)
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    (tmp_path / f"{stem}-00003-of-00003.{suffix}").unlink()
    loaded = recipe_of(tmp_path, WITH_PROJECTOR).load()
    expected = whole.mm_projector(hidden_state(whole, -2)[:, 1:])
    assert torch.equal(output(loaded.module), expected)
    (tmp_path / f"{stem}-00002-of-00003.{suffix}").unlink()
    assert torch.equal(output(recipe_of(tmp_path).load().module), hidden_state(whole, -2)[:, 1:])
    index = tmp_path / f"{stem}.{suffix}.index.json"
    with pytest.raises(InputError) as failure:
        recipe_of(tmp_path, WITH_PROJECTOR).load()
    assert str(failure.value) == (
        f"index {index} names {stem}-00002-of-00003.{suffix}, which is not there (1 of the 2 "
        "shards needed are missing); download the whole checkpoint"
    )


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_shards_of_the_language_model_are_not_opened(make_llava, tmp_path, suffix):
    whole = make_llava(tmp_path)
    shard(tmp_path, suffix)
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    (tmp_path / f"{stem}-00003-of-00003.{suffix}").write_bytes(b"no file of tensors")
    assert torch.equal(output(recipe_of(tmp_path).load().module), hidden_state(whole, -2)[:, 1:])
    (tmp_path / f"{stem}-00001-of-00003.{suffix}").write_bytes(b"no file of tensors")
    with pytest.raises(InputError, match=rf"^weights file .*{stem}-00001-of-00003\.{suffix} "):
        recipe_of(tmp_path).load()


def test_the_language_model_is_not_read(make_llava, tmp_path, monkeypatch):
    import safetensors

    make_llava(tmp_path)
    asked = []
    plain = safetensors.safe_open

    class Spy:
        def __init__(self, *arguments: Any, **options: Any) -> None:
            self.opened = plain(*arguments, **options)

        def __enter__(self) -> Any:
            inner = self.opened.__enter__()

            class Inner:
                keys = inner.keys

                @staticmethod
                def get_tensor(key: str) -> Any:
                    asked.append(key)
                    return inner.get_tensor(key)

            return Inner

        def __exit__(self, *error: object) -> Any:
            return self.opened.__exit__(*error)

    monkeypatch.setattr(safetensors, "safe_open", Spy)
    recipe_of(tmp_path).load()
    assert asked
    assert all(key.startswith("model.vision_tower.") for key in asked)
    assert not any("layers.3." in key or "post_layernorm" in key for key in asked)


def test_a_tower_that_is_not_stored_comes_from_the_clip_model_it_names(make_llava, tmp_path):
    whole = make_llava(tmp_path, drop=lambda key: "vision_tower" in key)
    clip = {
        key: value.half()
        for key, value in whole.vision_model.state_dict(prefix="vision_model.").items()
    }
    save_file(
        {**clip, "text_model.encoder.layers.0.x": torch.zeros(3)},
        tmp_path / "clip" / "model.safetensors",
    )
    loaded = recipe_of(tmp_path, WITH_PROJECTOR).load()
    whole.vision_model.half().float()
    expected = whole.mm_projector(hidden_state(whole, -2)[:, 1:])
    assert torch.equal(output(loaded.module), expected)
    assert loaded.module.vision_model.pre_layrnorm.weight.dtype == torch.float32
    assert loaded.weights.source == f"{tmp_path.name}/model.safetensors, clip/model.safetensors"
    assert loaded.weights.stored_dtype == "float16", "that of most values"
    assert recipe_of(tmp_path).load().weights.stored_dtype == "float16"


def test_a_clip_checkpoint_becomes_a_tower(make_llava, tmp_path):
    whole = make_llava(tmp_path / "llava")
    clip = tmp_path / "llava" / "clip"
    save_file(whole.vision_model.state_dict(prefix="vision_model."), clip / "model.safetensors")
    recipe = recipe_from_clip("hf:clip", clip, TowerOptions("llava"))
    assert torch.equal(output(recipe.load().module), hidden_state(whole, -2)[:, 1:])
    with pytest.raises(InputError, match=r"has no projector; leave --projector out"):
        with_tower(recipe, WITH_PROJECTOR)


def test_weights_of_a_file_and_random_ones(make_llava, tmp_path):
    whole = make_llava(tmp_path / "llava")
    file = tmp_path / "tower.safetensors"
    save_file(whole.state_dict(), file)
    recipe = recipe_of(tmp_path / "llava", WITH_PROJECTOR)
    loaded = recipe.load(weights=str(file))
    assert torch.equal(output(loaded.module), output(recipe.load().module))
    assert loaded.weights.sha256
    random = [recipe.load("random", seed) for seed in (1, 1, 2)]
    given = [output(model.module) for model in random]
    assert torch.equal(given[0], given[1])
    assert not torch.equal(given[0], given[2])
    assert len(recipe.load("random", depth=2).module.vision_model.encoder.layers) == 2
    with pytest.raises(
        InputError, match=r"^depth 2 was asked with pretrained .* use random weights"
    ):
        recipe.load(depth=2)


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("model.vision_tower.vision_tower.vision_model.pre_layrnorm.bias", "pre_layrnorm.bias"),
        (
            "vision_tower.vision_model.encoder.layers.1.mlp.fc1.bias",
            "encoder.layers.1.mlp.fc1.bias",
        ),
        ("model.vision_tower.embeddings.class_embedding", "embeddings.class_embedding"),
        ("vision_model.embeddings.class_embedding", "embeddings.class_embedding"),
        ("vision_tower.vision_model.adapter.weight", "adapter.weight"),
        ("vision_model.encoder.layers.2.mlp.fc1.bias", None),
        ("vision_model.embeddings.position_ids", None),
        ("vision_model.post_layernorm.bias", None),
        ("text_model.encoder.layers.0.mlp.fc1.bias", None),
        ("model.layers.0.mlp.fc1.bias", None),
        ("language_model.model.embed_tokens.weight", None),
    ],
)
def test_names_of_tensors(key, expected):
    found = tower_key(key, 2, projector=True)
    assert found == (f"vision_model.{expected}" if expected else None)


def test_names_of_the_projector():
    assert tower_key("model.mm_projector.2.bias", 2, True) == "mm_projector.2.bias"
    assert tower_key("model.mm_projector.weight", 2, True) == "mm_projector.weight"
    assert tower_key("multi_modal_projector.extra", 2, True) == "mm_projector.extra"
    renamed = tower_key("model.multi_modal_projector.linear_2.bias", 2, True)
    assert renamed == "mm_projector.2.bias"
    assert tower_key("model.mm_projector.2.bias", 2, False) is None


@pytest.mark.parametrize(
    ("kind", "layers", "shape"),
    [
        ("linear", 1, (2, 64, 48)),
        ("mlp1x_gelu", 1, (2, 64, 48)),
        ("identity", 0, (2, 64, 32)),
        ("mlp3x_gelu", 3, (2, 64, 48)),
    ],
)
def test_other_projectors_of_llavas_own_code(make_llava, tmp_path, kind, layers, shape):
    make_llava(tmp_path, mm_projector_type=kind)
    recipe = recipe_of(tmp_path, WITH_PROJECTOR)
    assert recipe.source.loader.config.projector.layers == layers
    assert output(recipe.load("random").module).shape == shape


def test_the_recipe_of_llava_15():
    recipe = resolve("llava15_tower")
    assert recipe.tower == TowerOptions("llava", -2, "patch", False)
    assert (recipe.merging.r, recipe.source.loader.config.layers) == (23, 23)
    by_name, by_model = sizes_from_geometry(recipe), sizes_from_model(recipe)
    assert by_name == by_model
    assert (by_name.tokens, by_name.layers[-1].tokens_out) == (577, 48)
    cut = resolve("llava15_tower", TowerOptions(select_layer=-4))
    assert (cut.source.loader.config.layers, cut.merging.r) == (21, recommended_r(577, 21))
    assert cut.merging.source == RULE
    last = resolve("llava15_tower", TowerOptions(select_layer=-1))
    assert (last.source.loader.config.layers, last.merging.r) == (24, 23)
    assert sizes_from_geometry(cut) == sizes_from_model(cut)
    projected = resolve("llava15_tower", WITH_PROJECTOR).architecture()
    assert [p.shape for p in projected.mm_projector.parameters()][::2] == [
        (4096, 1024),
        (4096,) * 2,
    ]


def test_the_recipe_has_no_projector_of_its_own():
    with pytest.raises(InputError) as failure:
        resolve("llava15_tower", WITH_PROJECTOR).load()
    assert str(failure.value) == (
        "the projector is not in openai/clip-vit-large-patch14-336, which has the tower only; "
        "name a LLaVA checkpoint (hf:<folder>), or leave --projector out"
    )


def test_a_recipe_that_imports_no_torch():
    import subprocess

    code = "import sys; from tome_export.models import RECIPES; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert {"torch", "transformers"}.isdisjoint(loaded.stdout.split())


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "no tower": (
        {"model_type": "llava_llama"},
        "config.json of F names no vision tower; expected mm_vision_tower (LLaVA's own layout) or "
        "vision_config (that of Transformers)",
    ),
    "tower of another kind": (
        {"model_type": "llava", "vision_config": {"model_type": "siglip_vision_model"}},
        "vision tower 'siglip_vision_model' of F is not supported; supported: clip_vision_model",
    ),
    "another model of Transformers": (
        {"model_type": "llava_onevision", "vision_config": {}},
        "model type 'llava_onevision' of F is not supported; supported: llava and llava_next of "
        "Transformers, and LLaVA's own layout with mm_vision_tower",
    ),
    "several layers": (
        {"model_type": "llava", "vision_config": {}, "vision_feature_layer": [-2, -5]},
        "vision_feature_layer is [-2, -5]; expected one whole number (features of several layers "
        "are not supported)",
    ),
    "another feature": (
        {"model_type": "llava", "vision_config": {}, "vision_feature_select_strategy": "mean"},
        "selected feature of F is 'mean'; expected patch or cls_patch (Transformers: default or "
        "full)",
    ),
    "another activation": (
        {"model_type": "llava", "vision_config": {}, "projector_hidden_act": "silu"},
        "projector_hidden_act of F is 'silu'; supported: gelu",
    ),
    "another projector": (
        {"mm_vision_tower": "x", "mm_projector_type": "cabstract"},
        "config.json of F: mm_projector_type is 'cabstract'; supported: mlp<N>x_gelu with N from 1 "
        "to 99, linear, identity",
    ),
    "a projector of no layers": (
        {"mm_vision_tower": "x", "mm_projector_type": "mlp0x_gelu"},
        "config.json of F: mm_projector_type is 'mlp0x_gelu'; supported: mlp<N>x_gelu with N from "
        "1 to 99, linear, identity",
    ),
    "a language model of no width": (
        {"mm_vision_tower": "x", "hidden_size": "wide"},
        "config.json of F: hidden_size is 'wide'; expected a whole number, 1 or more",
    ),
    "vision_config of another type": (
        {"model_type": "llava", "vision_config": [1]},
        "config.json of F: vision_config is [1]; expected a JSON object",
    ),
    "text_config of another type": (
        {"model_type": "llava", "vision_config": {}, "text_config": "x"},
        "config.json of F: text_config is 'x'; expected a JSON object",
    ),
    "width of the language model": (
        {"model_type": "llava", "vision_config": {}, "text_config": {"hidden_size": "x"}},
        "config.json of F: hidden_size of text_config is 'x'; expected a whole number, 1 or more",
    ),
    "hidden_act": (
        {"model_type": "llava", "vision_config": {"hidden_act": "foo"}},
        "config.json of F: hidden_act is 'foo'; expected an activation of Transformers, such as "
        "quick_gelu",
    ),
    "patch size": (
        {"model_type": "llava", "vision_config": {"patch_size": 0}},
        "config.json of F: patch_size is 0; expected a whole number, 1 or more",
    ),
    "epsilon": (
        {"model_type": "llava", "vision_config": {"layer_norm_eps": -1.0}},
        "config.json of F: layer_norm_eps is -1.0; expected a number above 0",
    ),
    "strategy": (
        {"model_type": "llava", "vision_config": {}, "vision_feature_select_strategy": ["full"]},
        "selected feature of F is ['full']; expected patch or cls_patch (Transformers: default or "
        "full)",
    ),
    "quantised": (
        {"mm_vision_tower": "x", "quantization_config": {"load_in_8bit": True}},
        "weights of F are quantised (quantization_config in config.json), which is not supported; "
        "use the checkpoint in float32, float16 or bfloat16",
    ),
    "quantised inside": (
        {"model_type": "llava", "vision_config": {"quantization_config": {"bits": 4}}},
        "weights of F are quantised (quantization_config in config.json), which is not supported; "
        "use the checkpoint in float32, float16 or bfloat16",
    ),
    "no name of a tower": (
        {"mm_vision_tower": None},
        "config.json of F: mm_vision_tower is None; expected the folder or hub name of a CLIP "
        "model",
    ),
    "S2": (
        {"mm_vision_tower": "x", "s2": True},
        "config.json of F asks for S2 (several scales joined on a grid), which merged tokens "
        "cannot give; not supported",
    ),
    "a language model that is not known": (
        {"model_type": "llava", "vision_config": {}, "text_config": {"model_type": "no_such"}},
        "config.json of F does not say how wide its language model ('no_such') is; expected "
        "text_config.hidden_size",
    ),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_configurations_that_are_refused(case):
    config, message = CONFIGS[case]
    with pytest.raises(InputError) as failure:
        llava_config(config, "F")
    assert str(failure.value) == message


@pytest.mark.parametrize(
    ("config", "needs"),
    [
        ({"image_aspect_ratio": "anyres"}, "image_aspect_ratio of F is 'anyres'"),
        ({"image_aspect_ratio": "anyres_max_9"}, "image_aspect_ratio of F is 'anyres_max_9'"),
        ({"mm_patch_merge_type": "spatial_unpad"}, "mm_patch_merge_type of F is 'spatial_unpad'"),
        ({"image_aspect_ratio": "pad", "mm_patch_merge_type": "flat"}, ""),
    ],
)
def test_which_language_models_need_the_grid(config, needs):
    name = next(iter(KNOWN))
    assert llava_config({"mm_vision_tower": name, **config}, "F").needs_grid == needs


def test_llava_next_needs_the_grid():
    found = llava_config({"model_type": "llava_next", "vision_config": {}}, "F")
    assert found.needs_grid == "model type of F is llava_next (anyres)"


@pytest.mark.parametrize("select", [0, 5, -5, -9])
def test_layers_that_are_not_there(make_llava, tmp_path, select):
    make_llava(tmp_path)
    with pytest.raises(InputError) as failure:
        recipe_of(tmp_path, TowerOptions(select_layer=select))
    assert str(failure.value) == (
        f"select layer is {select} of a tower of 4 layers; expected 1 to 4, or -1 to -4"
    )


def test_options_are_for_towers_only():
    with pytest.raises(UsageError) as failure:
        resolve("vit_b16", TowerOptions("llava", select_layer=-2))
    assert str(failure.value) == (
        "--tower, --select-layer: vit_b16 is no vision tower; these are for llava15_tower and for "
        "hf:<folder> of a LLaVA or CLIP checkpoint"
    )


def damaged(folder: Path, what: str) -> str:
    """Damage a checkpoint; what the message says then."""
    file = folder / "model.safetensors"
    name = f"{folder.name}/model.safetensors"
    state = load_file(file)
    if what == "no config":
        (folder / "config.json").unlink()
        return (
            f"folder {folder} has no config.json; expected a checkpoint folder as it is on the hub"
        )
    if what == "config not JSON":
        (folder / "config.json").write_text("{")
        return (
            f"{folder / 'config.json'} is not JSON (Expecting property name enclosed in double "
            "quotes: line 1 column 2 (char 1)); get the checkpoint again"
        )
    if what == "no weights":
        file.unlink()
        return (
            f"folder {folder} has no weights; expected model.safetensors, pytorch_model.bin, or "
            "the index of a sharded one beside its shards"
        )
    if what == "no projector":
        save_file({k: v for k, v in state.items() if "projector" not in k}, file)
        return (
            f"weights of {name} do not fit its config.json: keys 4 missing (mm_projector.0.weight, "
            "mm_projector.0.bias, mm_projector.2.weight, …); expected the whole checkpoint of this "
            "architecture"
        )
    key = "model.mm_projector.2.bias"
    if what == "wrong shape":
        save_file({**state, key: torch.zeros(5)}, file)
        return (
            f"weights of {name} do not fit its config.json: 1 wrong shapes (mm_projector.2.bias: "
            "got [5] expected [48]); expected the whole checkpoint of this architecture"
        )
    if what == "not finite":
        save_file({**state, key: torch.full((48,), float("nan"))}, file)
        return (
            f"weights of {name} have NaN or infinite values in mm_projector.2.bias; expected "
            "finite weights"
        )
    if what == "index not one":
        file.unlink()
        index = folder / "model.safetensors.index.json"
        index.write_text("[]")
        return f"index {index} is not one of a sharded checkpoint; expected JSON with a weight_map"
    if what == "index leads out":
        shutil.move(file, folder.parent / "x.safetensors")
        index = folder / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": {key: "../x.safetensors"}}))
        return (
            f"index {index} names '../x.safetensors', which is no file beside it; expected file "
            "names"
        )
    old = folder / "pytorch_model.bin"
    file.unlink()
    torch.save(state, old, _use_new_zipfile_serialization=False)
    return (
        f"weights file {old} is in PyTorch's format of before 1.6, which can only be read whole; "
        "save it again with torch.save, or as .safetensors"
    )


@pytest.mark.parametrize(
    "what",
    [
        "no config",
        "config not JSON",
        "no weights",
        "no projector",
        "wrong shape",
        "not finite",
        "index not one",
        "index leads out",
        "old format",
    ],
)
def test_damaged_checkpoints(make_llava, tmp_path, what):
    folder = tmp_path / "checkpoint"
    make_llava(folder)
    message = damaged(folder, what)
    with pytest.raises(InputError) as failure:
        recipe_of(folder, WITH_PROJECTOR).load()
    assert str(failure.value) == message


def test_a_cut_short_file(make_llava, tmp_path):
    make_llava(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"is not a whole safetensors file.*get it again$"):
        recipe_of(tmp_path).load()


def test_a_tower_of_another_kind_is_named(make_llava, tmp_path):
    make_llava(tmp_path)
    (tmp_path / "clip" / "config.json").write_text('{"model_type": "siglip"}')
    with pytest.raises(InputError) as failure:
        recipe_of(tmp_path)
    assert str(failure.value) == (
        "vision tower clip is a 'siglip' model; a LLaVA tower is cut from clip or clip_vision_model"
    )


def test_options_of_a_manifest_come_back():
    options = TowerOptions("llava", -3, "cls_patch", True)
    assert Tower(**options.given, tokens=4, width=8, grid=None).options == options
    assert TowerOptions().given == {}
    assert (
        replace(options, select_layer=None).over(TowerOptions(select_layer=-1)).select_layer == -1
    )


def test_read_config_wants_an_object(tmp_path):
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(InputError, match=r"holds a list; expected a JSON object$"):
        read_config(tmp_path)


@pytest.mark.parametrize("select", [-1, -2, -4])
def test_r_is_the_same_of_a_checkpoint_and_of_the_recipe(tmp_path, select):
    config = {"mm_vision_tower": next(iter(KNOWN)), "hidden_size": 4096}
    (tmp_path / "config.json").write_text(json.dumps(config))
    options = TowerOptions(select_layer=select)
    found, known = resolve(f"hf:{tmp_path}", options), resolve("llava15_tower", options)
    assert found.merging == known.merging


def coded(folder: Path, dtype: torch.dtype, extra: bool) -> None:
    """Store a layer's matrix as the codes of a quantisation, as bitsandbytes does."""
    file = folder / "model.safetensors"
    state = load_file(file)
    key = next(key for key in state if key.endswith("layers.1.self_attn.q_proj.weight"))
    if extra:
        state[key.replace(".weight", ".SCB")] = torch.ones(32)
    else:
        state[key] = state[key].to(dtype)
    save_file(state, file)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_codes_are_no_weights(make_llava, tmp_path, layout, dtype):
    make_llava(tmp_path, layout)
    coded(tmp_path, dtype, extra=False)
    with pytest.raises(InputError) as failure:
        recipe_of(tmp_path).load()
    assert str(failure.value) == (
        f"weights of {tmp_path.name}/model.safetensors are stored as "
        f"{str(dtype).removeprefix('torch.')} in "
        "vision_model.encoder.layers.1.self_attn.q_proj.weight, which is not supported; expected "
        "float32, float64, float16 or bfloat16, not quantised"
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tensors_without_a_place_are_named(make_llava, tmp_path, layout):
    make_llava(tmp_path, layout)
    coded(tmp_path, torch.float32, extra=True)
    with pytest.raises(InputError) as failure:
        recipe_of(tmp_path).load()
    assert str(failure.value) == (
        f"weights of {tmp_path.name}/model.safetensors do not fit its config.json: keys 1 "
        "unexpected (vision_model.encoder.layers.1.self_attn.q_proj.SCB); expected the whole "
        "checkpoint of this architecture"
    )


def test_a_quantised_clip_model_is_refused(make_llava, tmp_path):
    make_llava(tmp_path)
    path = tmp_path / "clip" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "quantization_config": {"bits": 4}}))
    with pytest.raises(InputError, match=r"^weights of clip are quantised"):
        recipe_of(tmp_path)


def test_without_the_library(make_llava, tmp_path, monkeypatch):
    for layout in LAYOUTS:
        make_llava(tmp_path / layout, layout)
    monkeypatch.setitem(sys.modules, "transformers", None)
    names = ("llava15_tower", *(f"hf:{tmp_path / layout}" for layout in LAYOUTS))
    for name in names:
        with pytest.raises(MissingComponentError) as failure:
            resolve(name).load(weights="random")
        assert str(failure.value).endswith("install it with pip install 'tome-export[hf]'")
        assert failure.value.exit_code == 4


@pytest.mark.parametrize(
    "given",
    [{"_attn_implementation": "eager"}, {"attn_implementation": {"vision_config": "eager"}}],
)
def test_the_attention_implementation_is_the_configurations(make_llava, tmp_path, given):
    make_llava(tmp_path, "transformers", **given)
    module = recipe_of(tmp_path).load().module
    assert module.vision_model.config._attn_implementation == "eager"
    make_llava(tmp_path, "transformers")
    module = recipe_of(tmp_path).load().module
    assert module.vision_model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_attention_implementation_without_bias(make_llava, tmp_path, layout):
    make_llava(tmp_path, layout)
    path = tmp_path / ("clip" if layout == "llava" else "") / "config.json"
    config = json.loads(path.read_text())
    half = config if layout == "llava" else config["vision_config"]
    half["_attn_implementation"] = "flash_attention_2"
    path.write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"^attention implementation 'flash_attention_2' of model"):
        recipe_of(tmp_path).load()


def test_a_projector_of_one_layer_has_llavas_keys(make_llava, tmp_path):
    whole = make_llava(
        tmp_path, drop=lambda key: "mm_projector.2" in key, mm_projector_type="mlp1x_gelu"
    )
    loaded = recipe_of(tmp_path, WITH_PROJECTOR).load()
    with torch.no_grad():
        expected = whole.mm_projector[0](hidden_state(whole, -2)[:, 1:])
    assert torch.equal(output(loaded.module), expected)


PROCESSOR = {
    "image_mean": [0.5] * 3,
    "image_std": [0.25] * 3,
    "resample": 2,
    "do_center_crop": True,
    "crop_size": 32,
}


@pytest.mark.parametrize(
    ("layout", "where"), [("llava", ""), ("llava", "clip"), ("transformers", "")]
)
def test_preprocessing_is_the_checkpoints(make_llava, tmp_path, layout, where):
    make_llava(tmp_path, layout)
    size = {"size": {"shortest_edge": 40}}
    text = json.dumps({**PROCESSOR, **size})
    (tmp_path / where / "preprocessor_config.json").write_text(text)
    used = recipe_of(tmp_path).preprocessing
    assert (used.mean, used.std, used.crop_pct) == ((0.5,) * 3, (0.25,) * 3, 0.8)
    assert used.interpolation == "bilinear"


@pytest.mark.parametrize(
    ("layout", "config", "processor", "resize", "remark"),
    [
        ("llava", {}, {"size": 32}, "crop", ""),
        ("llava", {"image_aspect_ratio": "pad"}, {"size": 32}, "pad", ""),
        ("llava", {"image_aspect_ratio": "anyres"}, {"size": 32}, "squash", TILES),
        (
            "transformers",
            {},
            {"size": 32, "do_pad": True, "image_processor_type": "LlavaImageProcessor"},
            "pad",
            "",
        ),
        ("transformers", {}, {"size": {"height": 32, "width": 32}}, "squash", ""),
        (
            "transformers",
            {"model_type": "llava_next"},
            {"size": 32, "do_pad": True},
            "squash",
            TILES,
        ),
        (
            "transformers",
            {},
            None,
            "crop",
            "without preprocessor_config.json and processor_config.json, preprocessing is its "
            "family's: size 32 x 32, bicubic, mean 0.4815, 0.4578, 0.4082, std 0.2686, 0.2613, "
            "0.2758",
        ),
    ],
)
def test_what_becomes_of_the_shape_of_images(
    make_llava, tmp_path, layout, config, processor, resize, remark
):
    make_llava(tmp_path, layout, **config)
    if processor is not None:
        text = json.dumps({**PROCESSOR, **processor})
        (tmp_path / "preprocessor_config.json").write_text(text)
    parts = [f"vision tower of {tmp_path.name}", *([remark] if remark else [])]
    recipe = recipe_of(tmp_path)
    assert (recipe.description, recipe.preprocessing.resize) == ("; ".join(parts), resize)


@pytest.mark.parametrize("layout", ["llava", "transformers"])
def test_the_processor_of_transformers_5(make_llava, tmp_path, layout):
    make_llava(tmp_path, layout)
    text = json.dumps({"image_processor": {**PROCESSOR, "size": 40}, "image_seq_length": 64})
    (tmp_path / "processor_config.json").write_text(text)
    found = recipe_of(tmp_path).preprocessing
    assert (found.mean, found.std) == ((0.5,) * 3, (0.25,) * 3)
    assert (found.crop_pct, found.interpolation) == (32 / 40, "bilinear")


def test_preprocessing_of_another_size_is_refused(make_llava, tmp_path):
    make_llava(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"size": 36, "crop_size": 36}')
    with pytest.raises(InputError) as failure:
        recipe_of(tmp_path)
    assert str(failure.value) == (
        f"preprocessor_config.json of {tmp_path} makes images of 36 x 36, and its config.json says "
        "32 x 32; expected the same"
    )


def test_the_licence_is_not_stated(make_llava, tmp_path):
    make_llava(tmp_path)
    assert recipe_of(tmp_path).source.licence == "not stated by the checkpoint"
    clip = recipe_from_clip("hf:clip", tmp_path / "clip", TowerOptions("llava"))
    assert clip.source.licence == "not stated by the checkpoint"
    assert resolve("llava15_tower").source.licence == "mit"
