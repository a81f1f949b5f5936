from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tome_export.errors import InputError
from tome_export.models import RECIPES
from tome_export.models.timm.loader import TimmLoader
from tome_export.weights.files import stored_dtype

TI = RECIPES["deit_ti16"]
DEPTH = 2


@pytest.fixture(scope="module")
def model():
    return TI.load("random", seed=3, depth=DEPTH).module


@pytest.fixture
def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def error_of(path, recipe=TI):
    with pytest.raises(InputError) as caught:
        recipe.load(str(path), depth=DEPTH)
    message = str(caught.value)
    assert "\n" not in message
    assert caught.value.exit_code == 3
    return message.replace(f"{Path(path).parent}/", "")


def test_safetensors_round_trip(state, tmp_path):
    save_file(state, tmp_path / "w.safetensors")
    loaded = TI.load(str(tmp_path / "w.safetensors"), depth=DEPTH)
    assert same(loaded.module.state_dict(), state)
    assert loaded.weights.kind == "file"
    assert loaded.weights.source == "w.safetensors"
    assert len(loaded.weights.sha256) == 64


@pytest.mark.parametrize(
    "nest",
    [
        lambda s: s,
        lambda s: {"model": s, "epoch": 3},
        lambda s: {"state_dict": {f"module.{k}": v for k, v in s.items()}},
        lambda s: {f"_orig_mod.module.{k}": v for k, v in s.items()},
    ],
    ids=["plain", "model", "state_dict", "prefixes"],
)
@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin"])
def test_torch_round_trip(state, tmp_path, nest, suffix):
    torch.save(nest(state), tmp_path / f"w{suffix}")
    assert same(TI.load(str(tmp_path / f"w{suffix}"), depth=DEPTH).module.state_dict(), state)


def test_half_precision_checkpoint_becomes_float32(state, tmp_path):
    save_file({k: v.half() for k, v in state.items()}, tmp_path / "w.safetensors")
    loaded = TI.load(str(tmp_path / "w.safetensors"), depth=DEPTH)
    assert {p.dtype for p in loaded.module.parameters()} == {torch.float32}
    assert loaded.weights.stored_dtype == "float16"


@pytest.mark.parametrize(
    ("types", "expected"),
    [
        ([], "float32"),
        ([(9, torch.float32), (1, torch.float16)], "float32"),
        ([(1, torch.float32), (9, torch.float16)], "float16"),
        ([(1, torch.float32), (9, torch.bfloat16), (2, torch.float16)], "bfloat16"),
        ([(9, torch.float64)], "float32"),
        ([(1, torch.bfloat16), (99, torch.int64)], "bfloat16"),
        ([(4, torch.float32), (4, torch.float16)], "float32"),
    ],
)
def test_stored_dtype_is_that_of_most_values(types, expected):
    assert stored_dtype(torch.zeros(count, dtype=dtype) for count, dtype in types) == expected


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_build_asks_for_the_precision_of_the_file(tmp_path, dtype, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state = RECIPES["vit_digits"].load().module.state_dict()
    save_file({k: v.to(getattr(torch, dtype)) for k, v in state.items()}, "w.safetensors")
    loaded = RECIPES["vit_digits"].load("w.safetensors")
    assert loaded.weights.stored_dtype == dtype


def test_pretrained_weights_in_half_precision_are_known(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    state = TI.load("random").module.state_dict()
    save_file({name: value.half() for name, value in state.items()}, path)
    monkeypatch.setattr(TimmLoader, "recorded_file", lambda _: path)
    loaded = TI.load()
    assert (loaded.weights.kind, loaded.weights.stored_dtype) == ("pretrained", "float16")


def test_head_of_the_checkpoint_decides_the_classes(state, tmp_path):
    state["head.weight"], state["head.bias"] = torch.randn(7, 192), torch.randn(7)
    save_file(state, tmp_path / "w.safetensors")
    loaded = TI.load(str(tmp_path / "w.safetensors"), depth=DEPTH)
    assert loaded.module(torch.randn(1, 3, 224, 224)).shape == (1, 7)
    assert loaded.recipe.output.label_names(7) is None


def test_distilled_heads_must_agree(tmp_path):
    recipe = RECIPES["deit_ti16_distilled"]
    state = dict(recipe.load("random", depth=DEPTH).module.state_dict())
    for head in ("head", "head_dist"):
        state[f"{head}.weight"], state[f"{head}.bias"] = torch.randn(5, 192), torch.randn(5)
    save_file(state, tmp_path / "w.safetensors")
    module = recipe.load(str(tmp_path / "w.safetensors"), depth=DEPTH).module
    assert module(torch.randn(1, 3, 224, 224)).shape == (1, 5)
    state["head_dist.weight"] = torch.randn(6, 192)
    save_file(state, tmp_path / "w.safetensors")
    assert error_of(tmp_path / "w.safetensors", recipe) == (
        "weights file w.safetensors has heads with different numbers of classes "
        "(head.weight 5, head_dist.weight 6); expected the same"
    )


def test_head_on_a_feature_model_makes_logits(tmp_path):
    recipe = RECIPES["dinov2_s14"]
    state = dict(recipe.load("random", depth=1).module.state_dict())
    state["head.weight"], state["head.bias"] = torch.randn(4, 384), torch.randn(4)
    save_file(state, tmp_path / "w.safetensors")
    assert recipe.load("random", depth=1).recipe.output.name == "features"
    assert recipe.load(str(tmp_path / "w.safetensors"), depth=1).recipe.output.name == "logits"


def test_original_deit3_layout(tmp_path):
    recipe = RECIPES["deit3_b16"]
    state = dict(recipe.load("random", depth=1).module.state_dict())
    original = {
        k.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): v
        for k, v in state.items()
    }
    assert "blocks.0.gamma_1" in original
    torch.save({"model": original}, tmp_path / "deit3.pth")
    loaded = recipe.load(str(tmp_path / "deit3.pth"), depth=1)
    assert same(loaded.module.state_dict(), state)


def dinov2_original(recipe, grid):
    """The state dict of timm's model in the layout of the original release, for another grid."""
    state = dict(recipe.load("random", depth=1).module.state_dict())
    original = dict(state)
    width = state["cls_token"].shape[-1]
    original["mask_token"] = torch.zeros(1, width)
    original["pos_embed"] = torch.randn(1, grid * grid + 1, width)
    if "reg_token" in original:
        original["register_tokens"] = original.pop("reg_token")
    return state, original


def test_original_dinov2_layout_is_resampled_and_told(tmp_path):
    state, original = dinov2_original(RECIPES["dinov2_s14"], 37)
    torch.save(original, tmp_path / "dinov2.pth")
    loaded = RECIPES["dinov2_s14"].load(str(tmp_path / "dinov2.pth"), depth=1)
    assert loaded.weights.source == (
        "dinov2.pth; position embedding resampled 37x37 -> 16x16 patches"
    )
    assert loaded.weights.resampled_from == (37, 37)
    del state["pos_embed"]
    assert all(torch.equal(loaded.module.state_dict()[k], v) for k, v in state.items())


def test_original_dinov2_register_layout(tmp_path):
    recipe = RECIPES["dinov2_s14_reg"]
    state, original = dinov2_original(recipe, 16)
    torch.save(original, tmp_path / "reg.pth")
    loaded = recipe.load(str(tmp_path / "reg.pth"), depth=1)
    assert loaded.weights.source == "reg.pth"
    got = loaded.module.state_dict()
    assert torch.equal(got["reg_token"], state["reg_token"])
    assert torch.equal(got["pos_embed"], original["pos_embed"][:, 1:])
    assert torch.equal(got["cls_token"], state["cls_token"] + original["pos_embed"][:, :1])


def test_other_patch_size_is_not_resampled(state, tmp_path):
    state["patch_embed.proj.weight"] = torch.randn(192, 3, 32, 32)
    state["pos_embed"] = torch.randn(1, 50, 192)
    save_file(state, tmp_path / "w.safetensors")
    assert error_of(tmp_path / "w.safetensors") == (
        "weights file w.safetensors does not fit the model: 2 wrong shapes "
        "(pos_embed: got [1, 50, 192] expected [1, 197, 192]; patch_embed.proj.weight: "
        "got [192, 3, 32, 32] expected [192, 3, 16, 16]); "
        "expected the checkpoint of this architecture"
    )


def test_wrong_keys_are_named(state, tmp_path):
    for name in [name for name in state if name.startswith("blocks.1.")]:
        del state[name]
    state["extra"] = torch.ones(1)
    save_file(state, tmp_path / "w.safetensors")
    assert error_of(tmp_path / "w.safetensors") == (
        "weights file w.safetensors does not fit the model: keys 12 missing "
        "(blocks.1.norm1.weight, blocks.1.norm1.bias, blocks.1.attn.qkv.weight, …) and "
        "1 unexpected (extra); expected the checkpoint of this architecture"
    )


def test_wrong_shapes_are_named(state, tmp_path):
    state["norm.weight"] = torch.ones(10)
    save_file(state, tmp_path / "w.safetensors")
    assert error_of(tmp_path / "w.safetensors") == (
        "weights file w.safetensors does not fit the model: 1 wrong shapes "
        "(norm.weight: got [10] expected [192]); expected the checkpoint of this architecture"
    )


def test_values_that_are_not_finite_are_named(state, tmp_path):
    state["norm.weight"][3] = float("nan")
    save_file(state, tmp_path / "w.safetensors")
    assert "has NaN or infinite values in norm.weight" in error_of(tmp_path / "w.safetensors")


def test_missing_file_folder_and_other_kinds(tmp_path):
    assert error_of(tmp_path / "none.pth") == (
        "weights file none.pth does not exist; expected 'pretrained', 'random', or a file ending "
        "in .safetensors, .pth, .pt, .bin, .ckpt, .tar"
    )
    (tmp_path / "d.pth").mkdir()
    assert error_of(tmp_path / "d.pth") == (
        "weights d.pth is a folder; expected a file ending in .safetensors, .pth, .pt, .bin, "
        ".ckpt, .tar"
    )
    (tmp_path / "w.pkl").touch()
    assert error_of(tmp_path / "w.pkl") == (
        "weights file w.pkl ends in '.pkl'; expected one of .safetensors, .pth, .pt, .bin, "
        ".ckpt, .tar"
    )


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("part", [0.0, 0.001, 0.5, 0.999])
def test_truncated_files(state, tmp_path, suffix, part):
    path = tmp_path / f"w{suffix}"
    if suffix == ".pth":
        torch.save(state, path)
    else:
        save_file(state, path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * part)])
    assert f"weights file w{suffix} " in error_of(path)


class Payload:
    """Writes a file when unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("save", ["torch", "torch_old", "pickle"])
def test_malicious_pickle_is_refused_and_not_executed(tmp_path, save, protocol):
    mark, path = tmp_path / "executed", tmp_path / "w.pth"
    content = {"head.weight": torch.ones(2), "x": Payload(mark)}
    if save == "pickle":
        path.write_bytes(pickle.dumps(content["x"], protocol=protocol))
    else:
        zipped = save == "torch"
        torch.save(content, path, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    message = error_of(path)
    assert not mark.exists()
    assert "w.pth " in message
    if save == "torch" and protocol == 2:
        assert message == (
            "weights file w.pth holds Python objects, which could run code and are not loaded; "
            "save the state_dict alone, or as .safetensors"
        )
    # The same file does run code when loaded without the guard: the test would see it.
    loader = pickle.load if save == "pickle" else lambda f: torch.load(f, weights_only=False)
    with path.open("rb") as stream:
        loader(stream)
    assert mark.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (torch.ones(3), "holds a Tensor; expected a state_dict of tensors"),
        ({}, "holds a empty dict; expected"),
        ({"model": {"a": 1}}, "holds a int under 'a'; expected a state_dict of tensors"),
    ],
)
def test_files_without_a_state_dict(tmp_path, content, message):
    torch.save(content, tmp_path / "w.pth")
    assert message in error_of(tmp_path / "w.pth")
