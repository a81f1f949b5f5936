"""The user's code behind ``module:function``: what it may do, and what a model must not be."""

from __future__ import annotations

import sys

import pytest
import torch

from tome_export.cli.main import main
from tome_export.errors import InputError
from tome_export.models import resolve

HEAD = """
import os, sys, threading, timm, torch
ARGS = dict(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=5)
def model():
    return timm.create_model("vit_tiny_patch16_224", **ARGS)
"""

ENDS = {
    "sys.exit()": "ended with sys.exit() in {file}, line 7",
    "sys.exit(0)": "ended with sys.exit(0) in {file}, line 7",
    "sys.exit('no data')": "ended with sys.exit('no data') in {file}, line 7",
    "__import__('argparse').ArgumentParser().parse_args(['--x'])": (
        "ended with sys.exit(2) in {file}, line 7"
    ),
    "raise GeneratorExit": "failed with GeneratorExit: no message",
    "raise type('Stop', (BaseException,), {})('now')": "failed with Stop: now",
    "raise __import__('click').exceptions.Exit(0)": "failed with Exit: 0",
    "raise ValueError('one\\ntwo')": "failed with ValueError: one",
    "raise type('Mute', (Exception,), {'__str__': lambda s: 1})": "failed with Mute: no message",
}


@pytest.fixture
def written(tmp_path, monkeypatch):
    """Writes a module into the current folder; it is forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    names = []

    def write(text, name="users_t"):
        names.append(name)
        (tmp_path / f"{name}.py").write_text(HEAD + text)
        return tmp_path / f"{name}.py"

    before = list(sys.path)
    yield write
    assert sys.path == before
    for name in names:
        sys.modules.pop(name, None)


def refused(name):
    with pytest.raises(InputError) as caught:
        resolve(name)
    assert caught.value.exit_code == 3
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("when", ["in the function", "at import"])
def test_code_that_ends_the_program(written, end, when):
    inside = when == "in the function"
    file = written(f"def make():\n    {end}\n" if inside else f"if True:\n    {end}\n")
    what = "the function" if inside else "importing 'users_t'"
    expected = "; expected it to return an nn.Module when called without arguments" * inside
    said = ENDS[end].format(file=file)
    assert refused("users_t:make") == f"model 'users_t:make': {what} {said}{expected}"


def test_ctrl_c_is_no_mistake_of_the_users(written):
    written("def make():\n    raise KeyboardInterrupt\n")
    with pytest.raises(KeyboardInterrupt):
        resolve("users_t:make")


@pytest.mark.parametrize("where", ["", "forward"])
def test_build_ends_with_3_and_one_line(written, tmp_path, capsys, where):
    if where:
        text = """
class Head(torch.nn.Linear):
    def forward(self, x):
        sys.exit()
def make():
    made = model()
    made.head = Head(32, 5)
    return made
"""
    else:
        text = "def make():\n    sys.exit()\n"
    written(text)
    assert main(["build", "users_t:make", "-o", "out", "--r", "1", "--engine", "none"]) == 3
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.splitlines()[-1].count("sys.exit()") == 1
    assert not (tmp_path / "out").exists()


def test_what_users_code_prints_is_no_result(written, capsys):
    written("print('at import')\ndef make():\n    print('made')\n    return model()\n")
    resolve("users_t:make")
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == "at import\nmade\n"


def test_the_current_folder_comes_first(written):
    """``test`` is a package of Python's own library, which nothing has loaded."""
    assert "test" not in sys.modules
    written("def make():\n    return model()\n", "test")
    try:
        assert resolve("test:make").description.startswith("VisionTransformer from test:make;")
    finally:
        sys.modules.pop("test", None)


def test_neighbours_are_found_also_when_the_function_runs(written, tmp_path):
    (tmp_path / "neighbour_t.py").write_text("import users_t\nmake = users_t.model\n")
    written("def make():\n    import neighbour_t\n    return neighbour_t.make()\n")
    assert resolve("users_t:make").merging.r == int(0.8 * 17 / 2)
    sys.modules.pop("neighbour_t")


@pytest.mark.parametrize("name", ["json", "time"])
def test_a_name_that_is_taken_is_said(written, name):
    file = written("def make():\n    return model()\n", name)
    held = sys.modules[name]
    try:
        loaded = getattr(held, "__file__", None) or "part of Python"
        assert refused(f"{name}:make") == (
            f"model '{name}:make': {file} has the name of a module that is loaded already "
            f"({loaded}); give your file another name"
        )
    finally:
        sys.modules[name] = held


def test_another_folders_module_is_not_taken_for_this_ones(written, tmp_path, monkeypatch):
    written("def make():\n    return model()\n")
    resolve("users_t:make")
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    (tmp_path / "other" / "users_t.py").write_text("")
    assert "module 'users_t' has no function 'make'" in refused("users_t:make")


MODELS = {
    "torch.ao.quantization.quantize_dynamic(made.eval(), {torch.nn.Linear})": (
        "users_t:make returned a model with a dtype as blocks.0.attn.qkv._packed_params.dtype, so "
        "it is quantised or keeps other things than tensors; expected weights of floating-point "
        "numbers"
    ),
    "made.to('meta')": (
        "weights of users_t:make are stored as a meta tensor without values in cls_token, which is "
        "not supported; expected dense tensors of floating-point numbers"
    ),
    "sparse(made)": (
        "weights of users_t:make are stored as a sparse tensor (sparse_coo) in head.weight, which "
        "is not supported; expected dense tensors of floating-point numbers"
    ),
    "lazy(made)": (
        "weights of users_t:make are stored as a UninitializedParameter in head.weight, which is "
        "not supported; expected dense tensors of floating-point numbers"
    ),
    "coded(made)": (
        "weights of users_t:make are stored as int8 in head.weight, which is not supported; "
        "expected float32, float64, float16 or bfloat16, not quantised"
    ),
    "broken(made)": (
        "users_t:make returned a model that has NaN or infinite values in head.weight; expected "
        "finite weights"
    ),
}

ODD = """
def sparse(made):
    made.head.weight = torch.nn.Parameter(made.head.weight.detach().to_sparse())
    return made
def lazy(made):
    made.head = torch.nn.LazyLinear(5)
    return made
def coded(made):
    weight = made.head.weight.detach().to(torch.int8)
    made.head.weight = torch.nn.Parameter(weight, requires_grad=False)
    return made
def broken(made):
    made.head.weight.data[0, 0] = float("nan")
    return made
def locked(made):
    made.lock = threading.Lock()
    return made
def counted(made):
    made.register_buffer("steps", torch.tensor(3))
    made.register_buffer("mask", torch.tensor(float("-inf")))
    return made
"""


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("made", MODELS)
def test_models_without_weights_to_copy(written, made):
    written(f"{ODD}\ndef make():\n    made = model()\n    return {made}\n")
    assert refused("users_t:make") == MODELS[made]


def test_what_cannot_be_copied_is_said(written):
    written(f"{ODD}\ndef make():\n    return locked(model())\n")
    with pytest.raises(InputError) as caught:
        resolve("users_t:make").load()
    assert str(caught.value) == (
        "the model of users_t:make cannot be copied (cannot pickle '_thread.lock' object); "
        "expected one that copy.deepcopy copies: leave locks, open files and tensors with a "
        "gradient out"
    )


def test_counters_and_masks_of_the_users(written):
    written(f"{ODD}\ndef make():\n    return counted(model())\n")
    assert resolve("users_t:make").load().module.steps.dtype == torch.int64


SAID = {
    "model()": (
        "; preprocessing is that of its pretrained_cfg: size 32 x 32 cut out of 35, bicubic, mean "
        "0.5, 0.5, 0.5, std 0.5, 0.5, 0.5"
    ),
    "timm.create_model('vit_tiny_patch16_224', in_chans=1, **ARGS)": (
        "; preprocessing is that of its pretrained_cfg: size 32 x 32 cut out of 35, bicubic, mean "
        "0.5, std 0.5"
    ),
    "torchvision_model()": (
        "; preprocessing is its family's: size 32 x 32 cut out of 36, bicubic, mean 0.485, 0.456, "
        "0.406, std 0.229, 0.224, 0.225"
    ),
    "(model(), Preprocessing((3, 32, 32), (0.1,) * 3, (0.2,) * 3, 0.8, 'bilinear'))": "",
}


@pytest.mark.parametrize("made", SAID)
def test_preprocessing_that_nobody_gave_is_said(written, made):
    written(
        f"""
from tome_export.spec import Preprocessing
def torchvision_model():
    from torchvision.models.vision_transformer import VisionTransformer
    return VisionTransformer(32, 8, 2, 2, 32, 64, num_classes=5)
def make():
    return {made}
"""
    )
    description = resolve("users_t:make").description
    assert description == f"VisionTransformer from users_t:make{SAID[made]}"


UNMERGED = "users_t:make returned a model that cannot be merged: "
CFG = "users_t:make returned a model whose pretrained_cfg is none ("


@pytest.mark.parametrize(
    ("cfg", "said"),
    [
        ("{'mean': 5}", CFG),
        ("'imagenet'", f"{UNMERGED}pretrained_cfg of the VisionTransformer is a str; expected"),
        ("[1]", f"{UNMERGED}pretrained_cfg of the VisionTransformer is a list; expected"),
        ("{'crop_pct': 'x'}", CFG),
        ("{'mean': 'abc'}", "preprocessing of users_t:make has mean ('a', 'b', 'c'); expected 3 "),
        ("{'std': (1, 1, 0)}", "preprocessing of users_t:make has std (1, 1, 0); expected 3 "),
        ("{'crop_pct': -1}", "preprocessing of users_t:make has crop_pct -1.0; expected a number"),
    ],
)
def test_a_configuration_that_is_none(written, cfg, said):
    written(f"def make():\n    m = model()\n    m.pretrained_cfg = {cfg}\n    return m\n")
    assert refused("users_t:make").startswith(said)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"mean": (0.5,)}, "mean (0.5,); expected 3 finite numbers"),
        ({"mean": (0.5, 0.5, float("nan"))}, "mean (0.5, 0.5, nan); expected 3 finite numbers"),
        ({"std": (1, 1, -1)}, "std (1, 1, -1); expected 3 finite numbers above 0"),
        ({"crop_pct": 0}, "crop_pct 0; expected a number above 0, at most 16"),
        ({"crop_pct": float("inf")}, "crop_pct inf; expected a number above 0, at most 16"),
        (
            {"interpolation": "cubic"},
            "interpolation 'cubic'; expected nearest, bilinear, bicubic",
        ),
        (
            {"input_size": (3, 64, 64)},
            "input_size (3, 64, 64); expected that of the model, (3, 32, 32)",
        ),
    ],
)
def test_preprocessing_of_the_users_that_makes_no_images(written, changed, said):
    given = {"input_size": (3, 32, 32), "mean": (0.1,) * 3, "std": (0.2,) * 3}
    given |= {"crop_pct": 0.8, "interpolation": "bilinear", **changed}
    text = repr(given).replace("nan", "float('nan')").replace("inf}", "float('inf')}")
    text = text.replace("inf,", "float('inf'),")
    written(
        "from tome_export.spec import Preprocessing\n"
        f"def make():\n    return model(), Preprocessing(**{text})\n"
    )
    assert refused("users_t:make") == f"preprocessing of users_t:make has {said}"
