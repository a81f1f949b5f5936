"""Layouts of weights files: what is taken of a trainer's checkpoint, and what is no weights."""

from __future__ import annotations

import argparse
import collections
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from tome_export.errors import InputError
from tome_export.models import RECIPES, resolve
from tome_export.reducers.learned import filled, state_of_file
from tome_export.weights.files import AVERAGED, PLAIN, read_checkpoint

W = {"a.weight": torch.eye(2), "a.bias": torch.ones(2)}


def averaged(state):
    return {key: value + 1 for key, value in state.items()}


def written(folder, content, name="w.pth"):
    torch.save(content, folder / name)
    return folder / name


def state_of(folder, content, key="", name="w.pth"):
    return read_checkpoint(written(folder, content, name), key)


def same(found, expected):
    return found.keys() == expected.keys() and all(
        torch.equal(found[k], expected[k]) for k in found
    )


def message_of(folder, content, key="", name="w.pth"):
    with pytest.raises(InputError) as refused:
        state_of(folder, content, key, name)
    text = str(refused.value)
    assert "\n" not in text
    return text.replace(f"{folder}/", "")


@pytest.mark.parametrize("name", ["w.ckpt", "w.pth.tar", "w.tar", "w.bin", "w.pt"])
def test_every_name_of_a_file_of_torch_save(tmp_path, name):
    assert same(state_of(tmp_path, {"state_dict": W, "epoch": 3}, name=name).state, W)


@pytest.mark.parametrize("key", [*AVERAGED, *PLAIN, "anything"])
def test_the_one_state_dict_is_taken_whatever_its_name(tmp_path, key):
    optimizer = {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 0.1}]}
    found = state_of(tmp_path, {"epoch": 3, key: W, "optimizer": optimizer, "best": 0.5})
    assert same(found.state, W)
    assert (found.key, found.source) == (key, f"w.pth; its {key}")


@pytest.mark.parametrize("plain", PLAIN)
@pytest.mark.parametrize("better", AVERAGED)
def test_averaged_weights_go_first_and_it_is_said(tmp_path, plain, better):
    content = {plain: W, better: averaged(W)}
    found = state_of(tmp_path, content)
    assert same(found.state, averaged(W))
    assert found.source == f"w.pth; its {better}, not {plain}"
    asked = state_of(tmp_path, content, plain)
    assert same(asked.state, W)
    assert asked.source == f"w.pth; its {plain}"


@pytest.mark.parametrize("empty", [None, {}, {"decay": 0.9}])
def test_an_average_that_is_none_hides_nothing(tmp_path, empty):
    found = state_of(tmp_path, {"state_dict": W, "state_dict_ema": empty})
    assert same(found.state, W)
    assert found.key == "state_dict"


def test_which_of_several_is_asked(tmp_path):
    content = {"student_1": W, "student_2": averaged(W), "epoch": 1}
    assert message_of(tmp_path, content) == (
        "weights file w.pth has several state dicts (student_1, student_2); say with --weights-key "
        "which is the model's"
    )
    assert same(state_of(tmp_path, content, "student_2").state, averaged(W))
    assert message_of(tmp_path, content, "student_3") == (
        "weights file w.pth has no 'student_3'; it has student_1, student_2: give one of these, or "
        "how the names of the wanted tensors begin"
    )
    assert message_of(tmp_path, W, "ema") == (
        "weights file w.pth has no 'ema'; it has a: give one of these, or how the names of the "
        "wanted tensors begin"
    )


def test_a_key_may_lead_into_an_entry_or_be_how_names_begin(tmp_path):
    teacher = {f"backbone.{k}": v for k, v in W.items()} | {"head.mlp.weight": torch.ones(3)}
    content = {"teacher": teacher, "student": averaged(W), "run.1": {"model": averaged(W)}}
    assert same(state_of(tmp_path, content, "teacher.backbone").state, W)
    assert same(state_of(tmp_path, content, "run.1.model").state, averaged(W))
    inside = state_of(tmp_path, content, "run.1")
    assert same(inside.state, averaged(W))
    assert inside.key == "run.1.model"
    save_file({f"teacher.{k}": v for k, v in teacher.items()}, tmp_path / "w.safetensors")
    assert same(read_checkpoint(tmp_path / "w.safetensors", "teacher.backbone").state, W)


def test_it_is_said_under_which_key_all_of_the_model_is(tmp_path):
    model = resolve("timm:test_vit").load("random").module.state_dict()
    state = {f"vit.{k}": v for k, v in model.items()} | {"loss.weight": torch.ones(3)}
    path = written(tmp_path, {"state_dict": state}, "w.ckpt")
    with pytest.raises(InputError) as refused:
        resolve("timm:test_vit").load(str(path))
    assert str(refused.value).endswith("(it is all there under vit: say so with --weights-key)")


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda m: nn.ModuleDict({"module": m}),
        lambda m: nn.ModuleDict({"model": nn.ModuleDict({"module": m})}),
        lambda m: torch.compile(m),
        lambda m: torch.optim.swa_utils.AveragedModel(m),
        lambda m: nn.Sequential(collections.OrderedDict(net=m)),
    ],
    ids=["DDP", "Lightning and DDP", "compile", "average", "net"],
)
def test_prefixes_of_wrappers_go(tmp_path, wrapped):
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 3))
    state = wrapped(model).state_dict()
    assert state.keys() != model.state_dict().keys()
    assert same(state_of(tmp_path, {"model_ema": state}).state, model.state_dict())


def test_a_compiled_part_of_a_model(tmp_path):
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 3))
    expected = dict(model.state_dict())
    model[1] = torch.compile(model[1])
    assert "1._orig_mod.weight" in model.state_dict()
    assert same(state_of(tmp_path, model.state_dict()).state, expected)


def test_a_name_that_no_file_can_have():
    with pytest.raises(InputError, match=r"a{200} cannot be opened \(File name too long\)"):
        read_checkpoint(Path("a" * 5000 + ".pth"))


class Arguments:
    """A trainer's object beside the weights."""


def test_objects_beside_the_weights_are_not_made(tmp_path):
    content = {
        "args": argparse.Namespace(lr=0.1, path=tmp_path),
        "best": np.float64(97.5),
        "history": np.arange(4),
        "counts": collections.defaultdict(list, train=[1]),
        "config": Arguments(),
        "model": W,
    }
    assert same(state_of(tmp_path, content).state, W)


@pytest.mark.parametrize("content", [nn.Linear(2, 2), {"model": nn.Linear(2, 2), "epoch": 1}])
def test_a_whole_pickled_module_is_refused(tmp_path, content):
    assert message_of(tmp_path, content) == (
        "weights file w.pth holds Python objects, which could run code and are not loaded; save "
        "the state_dict alone, or as .safetensors"
    )


def test_numpy_arrays_are_no_tensors(tmp_path):
    text = message_of(tmp_path, {key: value.numpy() for key, value in W.items()})
    assert text.startswith("weights file w.pth holds Python objects")


def quantised():
    return torch.quantize_per_tensor(torch.ones(2, 2), 0.1, 0, torch.qint8)


ONES = torch.ones(2, 2)
NO_WEIGHTS = {
    "int8": (ONES.to(torch.int8), "int8"),
    "uint8": (ONES.to(torch.uint8), "uint8"),
    "int32": (ONES.to(torch.int32), "int32"),
    "int64": (ONES.to(torch.int64), "int64"),
    "bool": (ONES.to(torch.bool), "bool"),
    "float8": (ONES.to(torch.float8_e4m3fn), "float8_e4m3fn"),
    "complex": (ONES.to(torch.complex64), "complex64"),
    "quantised": (quantised, "qint8"),
    "sparse": (ONES.to_sparse(), "a sparse tensor (sparse_coo)"),
    "csr": (ONES.to_sparse_csr, "a sparse tensor (sparse_csr)"),
    "meta": (torch.empty(2, 2, device="meta"), "a meta tensor without values"),
}
READERS = ["timm", "torchvision", "open_clip", "hf", "llava", "clip4clip", "stop", "custom", "dtem"]


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta", "ignore:torch.quantize")
@pytest.mark.parametrize("kind", NO_WEIGHTS)
def test_what_is_no_plain_tensor_of_numbers_is_refused(tmp_path, kind):
    value, said = NO_WEIGHTS[kind]
    value = value() if callable(value) else value
    text = message_of(tmp_path, {"model": {**W, "a.weight": value}})
    assert text.startswith(f"weights of w.pth are stored as {said} in a.weight, which is not")
    assert text.endswith(("not quantised", "dense tensors of floating-point numbers"))


def test_counters_beside_the_weights_are_whole_numbers(tmp_path):
    counts = {"bn.num_batches_tracked": torch.tensor(3), "embeddings.position_ids": torch.arange(4)}
    assert same(state_of(tmp_path, W | counts).state, W | counts)


def reader(name, path):
    """One that reads a file of one tensor, whatever its name, before it looks what it fits."""
    if name == "custom":
        from tome_export.models.custom import FunctionLoader

        recipe = RECIPES["vit_digits"]
        return lambda: FunctionLoader(nn.Linear(2, 2), "m:f").from_path(recipe, Path(path))
    if name == "dtem":
        return lambda: state_of_file(path)
    recipe = RECIPES[
        {
            "timm": "deit_ti16",
            "torchvision": "torchvision_b32",
            "open_clip": "openclip_b32",
            "hf": "hf_clip_b32",
            "llava": "llava15_tower",
            "clip4clip": "clip4clip_b32",
            "stop": "stop_b32",
        }[name]
    ]
    return lambda: recipe.load(path)


@pytest.mark.parametrize("name", READERS)
def test_every_reader_has_the_rule(tmp_path, name):
    needs = {"open_clip": "open_clip", "hf": "transformers", "llava": "transformers"}
    if name in needs:
        pytest.importorskip(needs[name])
    weight = torch.ones(2, 2, dtype=torch.int8)
    path = written(tmp_path, {"model": {"vision_model.head.weight": weight}})
    with pytest.raises(InputError, match=r"are stored as int8 in vision_model\.head\.weight"):
        reader(name, str(path))()


def test_whole_numbers_fit_no_weights_and_weights_no_index(tmp_path):
    class Indexed(nn.Module):
        def __init__(self, dtype):
            super().__init__()
            self.register_buffer("index", torch.zeros(2, dtype=dtype))

    from tome_export.models.custom import FunctionLoader

    recipe = RECIPES["vit_digits"]
    path = written(tmp_path, {"index": torch.ones(2, dtype=torch.int64)})
    made = FunctionLoader(Indexed(torch.int64), "m:f").from_path(recipe, path)
    assert made.module.index.tolist() == [1, 1]
    with pytest.raises(InputError, match="are stored as int64 in index"):
        FunctionLoader(Indexed(torch.float32), "m:f").from_path(recipe, path)
    path = written(tmp_path, {"index": torch.ones(2)})
    with pytest.raises(InputError, match="index is float32; expected int64"):
        FunctionLoader(Indexed(torch.int64), "m:f").from_path(recipe, path)


def test_values_above_float32_are_not_finite(tmp_path):
    state = resolve("timm:test_vit").load("random").module.state_dict()
    state = {key: value.double() for key, value in state.items()}
    state["norm.weight"][0] = 1e300
    path = written(tmp_path, state)
    with pytest.raises(InputError, match=r"has NaN or infinite values in norm\.weight"):
        resolve("timm:test_vit").load(str(path))


def test_views_and_shared_values_are_read(tmp_path):
    base = torch.arange(8.0)
    state = {"a": base[:4].view(2, 2).T, "b": base[::2], "c": torch.ones(1).expand(3)}
    assert same(state_of(tmp_path, state).state, state)


def test_a_tensor_of_a_trillion_values_in_a_file_of_one(tmp_path):
    state = resolve("timm:test_vit").load("random").module.state_dict()
    path = written(tmp_path, {**state, "norm.weight": torch.ones(1).expand(10**12)})
    with pytest.raises(InputError, match=r"norm\.weight: got \[1000000000000\]"):
        resolve("timm:test_vit").load(str(path))


def test_learned_parts_are_finite(tmp_path):
    path = written(tmp_path, {"weight": torch.full((2, 2), torch.nan), "bias": torch.zeros(2)})
    with pytest.raises(InputError, match="x has NaN or infinite values in weight"):
        filled(nn.Linear(2, 2), state_of_file(str(path)), "x", "dtem")


OPENAI = {
    "input_resolution": torch.tensor(224),
    "context_length": torch.tensor(77),
    "vocab_size": torch.tensor(49408),
}


@pytest.mark.parametrize("library", ["open_clip", "timm"])
def test_openais_clip_has_quickgelu(tmp_path, library):
    """open_clip issue 771: the other activation computes something else without a word."""
    open_clip = pytest.importorskip("open_clip")
    from tome_export.models.open_clip.loader import OpenClipLoader

    tower = OpenClipLoader("ViT-B-32").create(1).state_dict()
    assert open_clip.get_model_config("ViT-B-32-quickgelu")["quick_gelu"]
    path = written(tmp_path, {f"visual.{key}": v for key, v in tower.items()} | OPENAI)
    right, wrong = {
        "open_clip": ("open_clip:ViT-B-32-quickgelu", "open_clip:ViT-B-32"),
        "timm": (
            "timm:vit_base_patch32_clip_quickgelu_224.openai",
            "timm:vit_base_patch32_clip_224.openai",
        ),
    }[library]
    with pytest.raises(InputError) as refused:
        resolve(wrong).load(str(path), depth=1)
    assert str(refused.value) == (
        f"weights file {path} is OpenAI's CLIP, whose activation is QuickGELU; this architecture "
        "has another: name the one with quickgelu in its name, such as "
        "open_clip:ViT-B-32-quickgelu or timm:vit_base_patch32_clip_quickgelu_224"
    )
    assert resolve(right).load(str(path), depth=1).weights.source == "w.pth"


def test_a_configuration_beside_the_file_has_the_activation(tmp_path):
    """Transformers' CLIP of another trainer has GELU, and no tensor shows it."""
    pytest.importorskip("transformers")
    path = written(tmp_path, {"vision_model.x": torch.zeros(1)})
    (tmp_path / "config.json").write_text('{"vision_config": {"hidden_act": "gelu"}}')
    with pytest.raises(InputError) as refused:
        resolve("hf_clip_b32").load(str(path))
    assert str(refused.value) == (
        f"config.json beside {path} says hidden_act 'gelu', but openai/clip-vit-base-patch32 has "
        f"'quick_gelu'; build hf:{tmp_path}"
    )
    (tmp_path / "config.json").write_text('{"vision_config": {"hidden_act": "quick_gelu"}}')
    with pytest.raises(InputError, match="do not fit"):
        resolve("hf_clip_b32").load(str(path))


def test_timms_weights_of_quickgelu():
    """timm 1.0 runs them in both architectures, and notes which is theirs."""
    with pytest.raises(InputError) as refused:
        resolve("timm:vit_base_patch32_clip_224.openai").load()
    assert str(refused.value) == (
        "weights of timm's vit_base_patch32_clip_224.openai were trained with QuickGELU, which "
        "this architecture has not; use timm:vit_base_patch32_clip_quickgelu_224.openai"
    )


def test_a_key_is_for_a_file():
    recipe = RECIPES["vit_digits"]
    for weights in ("pretrained", "random"):
        with pytest.raises(InputError, match=f"'ema'\\) was given with {weights} weights"):
            recipe.load(weights, weights_key="ema")
