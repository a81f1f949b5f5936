"""Every bad input: one line on standard error, compared whole, and the documented exit code."""

from __future__ import annotations

import json
import pickle
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from tome_export.engine import BUILDERS
from tome_export.models.facts import DATA
from tome_export.runtime.registry import BACKENDS

BUILD = ("build", "vit_digits", "--engine", "none", "-o", "out")

SUFFIXES = ".safetensors, .pth, .pt, .bin, .ckpt, .tar"

CASES = {
    "unknown model": (
        ("build", "vit_b61", "-o", "out", "--r", "8"),
        3,
        "unknown model 'vit_b61'; did you mean vit_b16, vit_s16, vit_l16? "
        "`tome-export models` lists the recipes",
    ),
    "r negative": (
        (*BUILD, "--r", "-1"),
        3,
        "r is -1; expected 0 or more tokens to merge per layer",
    ),
    "r not an int": (
        (*BUILD, "--r", "abc"),
        2,
        "Invalid value for '--r': 'abc' is not a valid integer; see 'tome-export build --help'",
    ),
    "schedule too long": (
        (*BUILD, "--schedule", "1,2,3,4,5,6,7"),
        3,
        "schedule has 7 entries; the model has 6 layers, give at most one entry per layer",
    ),
    "schedule no numbers": (
        (*BUILD, "--schedule", "8,b"),
        3,
        "schedule is '8,b'; expected constant, decreasing, increasing, or whole numbers per layer "
        "such as 12,10,8",
    ),
    "schedule empty": (
        (*BUILD, "--schedule", ""),
        3,
        "schedule is ''; expected constant, decreasing, increasing, or whole numbers per layer "
        "such as 12,10,8",
    ),
    "compressor of a classifier": (
        (*BUILD, "--compress", "avgpool:4x4"),
        3,
        "compressor avgpool makes tokens for a language model, and this model gives classes; use "
        "--dense for the features of its patches, or a LLaVA tower",
    ),
    "compressor unknown": (
        (*BUILD, "--dense", "--compress", "conv"),
        3,
        "compressor is 'conv'; expected one of avgpool, resampler",
    ),
    "compressor option alone": (
        (*BUILD, "--compress-option", "latents=4"),
        3,
        "compressor option 'latents=4' is given without --compress; give both",
    ),
    "least entropy of a check above 1": (
        ("check", "out", "--min-entropy", "2"),
        2,
        "--min-entropy is 2; expected 0 to 1, such as 0.8",
    ),
    "least entropy of a search below 0": (
        ("tune", "vit_digits", "--target-macs", "50%", "--min-entropy", "-1"),
        2,
        "--min-entropy is -1; expected 0 to 1, such as 0.8",
    ),
    "images that are not looked at": (
        (*BUILD, "--images", "mine", "--no-check"),
        2,
        "--images are for the check that --no-check omits; give one; see 'tome-export build "
        "--help'",
    ),
    "schedule negative": (
        (*BUILD, "--schedule", "8,-2"),
        3,
        "r is -2; expected 0 or more tokens to merge per layer",
    ),
    "r twice": (
        (*BUILD, "--schedule", "8,4", "--r", "3"),
        3,
        "schedule '8,4' already gives r for every layer; drop --r 3 or the schedule",
    ),
    "weights missing": (
        (*BUILD, "--weights", "none.safetensors"),
        3,
        "weights file none.safetensors does not exist; expected 'pretrained', 'random', or a file "
        f"ending in {SUFFIXES}",
    ),
    "batch inverted": (
        (*BUILD, "--batch", "8:4:1"),
        3,
        "batch range is 8:4:1; expected 1 <= MIN <= OPT <= MAX, for example 1:8:32",
    ),
    "batch no number": (
        (*BUILD, "--batch", "many"),
        3,
        "batch range is 'many'; expected MIN:OPT:MAX or one number, for example 1:8:32",
    ),
    "plugin for an old GPU": (
        (*BUILD, "--merge-op", "plugin", "--compute-capability", "6.1"),
        2,
        "compute capability is 6.1; the plugin's kernels can be compiled for 7.5, 8.0, 8.6, 8.7, "
        "8.9, 9.0, 10.0, 10.3, 12.0, 12.1: choose among these, or use --merge-op matmul",
    ),
    "two precisions": (
        (*BUILD, "--fp16", "--bf16"),
        2,
        "--fp16 and --bf16 exclude each other; give one; see 'tome-export build --help'",
    ),
    "workspace without unit": (
        (*BUILD, "--workspace", "12"),
        2,
        "Invalid value for '--workspace': '12' is not a size with a unit, such as 512MiB or 4GiB; "
        "see 'tome-export build --help'",
    ),
    "optimisation level": (
        (*BUILD, "--optimization-level", "9"),
        2,
        "optimisation level is 9; expected 0 to 5",
    ),
    "compute capability": (
        (*BUILD, "--compute-capability", "ninety"),
        2,
        "compute capability is 'ninety'; expected one such as 8.9, or current",
    ),
    "index_add into an engine": (
        ("build", "vit_digits", "-o", "out", "--engine", "tensorrt-rtx", "--merge-op", "index_add"),
        2,
        "--merge-op index_add cannot go into a tensorrt-rtx engine (TensorRT's parser refuses "
        "scatter-add); use --merge-op matmul, or --engine none",
    ),
    "unknown option": (
        (*BUILD, "--forse"),
        2,
        None,  # the wording is click's and differs between its versions
    ),
    "no model": (("build",), 2, "Missing argument 'MODEL'; see 'tome-export build --help'"),
    "unknown command": (("bild",), 2, "No such command 'bild'; see 'tome-export --help'"),
    "images missing": (
        (*BUILD, "--images", "nowhere"),
        3,
        "nowhere does not exist; expected an image or a folder of images",
    ),
    "hf folder": (
        ("build", "hf:./nowhere", "--r", "8"),
        3,
        "folder ./nowhere does not exist; expected a checkpoint folder or a name on the hub",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input(case, run, tmp_path):
    arguments, code, message = CASES[case]
    if "tensorrt-rtx" in arguments:
        pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    ran = run(*arguments)
    assert ran.code == code
    assert ran.out == ""
    if message is None:
        assert re.match(r"No such option.*--forse.*--force", ran.error)
        assert ran.error.endswith(" see 'tome-export build --help'")
    else:
        assert ran.error == message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "case", ["unknown model", "r not an int", "plugin for an old GPU", "weights missing"]
)
def test_bad_input_as_json(case, run):
    arguments, code, message = CASES[case]
    ran = run(*arguments, "--json")
    kinds = {2: "UsageError", 3: "InputError", 4: "MissingComponentError"}
    assert ran.json == {"error": {"type": kinds[code], "message": message, "exit_code": code}}
    assert ran.error == message
    assert ran.code == code


@pytest.fixture
def state():
    return load_file(DATA / "vit_digits.safetensors")


def test_weights_of_wrong_shapes(run, state, tmp_path):
    state["norm.weight"] = torch.ones(65)
    save_file(state, tmp_path / "w.safetensors")
    ran = run(*BUILD, "--weights", "w.safetensors")
    assert ran.code == 3
    assert ran.error == (
        "weights file w.safetensors does not fit the model: 1 wrong shapes (norm.weight: got [65] "
        "expected [64]); expected the checkpoint of this architecture"
    )


def test_weights_with_wrong_keys(run, state, tmp_path):
    state["extra"] = state.pop("norm.bias")
    save_file(state, tmp_path / "w.safetensors")
    ran = run(*BUILD, "--weights", "w.safetensors")
    assert ran.code == 3
    assert ran.error == (
        "weights file w.safetensors does not fit the model: keys 1 missing (norm.bias) and 1 "
        "unexpected (extra); expected the checkpoint of this architecture"
    )


class Malicious:
    def __reduce__(self):
        return print, ("this must never be printed",)


def test_weights_that_hold_objects_are_never_run(run, tmp_path):
    torch.save({"model": Malicious()}, tmp_path / "w.pth")
    ran = run(*BUILD, "--weights", "w.pth")
    assert ran.code == 3
    assert ran.error == (
        "weights file w.pth holds Python objects, which could run code and are not loaded; save "
        "the state_dict alone, or as .safetensors"
    )
    assert "never be printed" not in ran.out + ran.err


def test_a_bare_pickle_is_never_run(run, tmp_path):
    (tmp_path / "w.pth").write_bytes(pickle.dumps(Malicious()))
    ran = run(*BUILD, "--weights", "w.pth")
    assert ran.code == 3
    assert ran.error == (
        "weights file w.pth is not a PyTorch checkpoint of tensors; save the state_dict with "
        "torch.save, or as .safetensors"
    )
    assert "never be printed" not in ran.out + ran.err


def test_pretrained_weights_offline(start):
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_CACHE": "empty", "HF_HOME": "empty"}
    process = start("build", "vit_ti16", "--r", "8", "-o", "out", "--engine", "none", **nowhere)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 3
    assert out == ""
    assert re.fullmatch(
        r"Load vit_ti16\nError: pretrained weights of vit_ti16 cannot be had from the hub "
        r"\(.*\); give a \.safetensors or \.pth file downloaded elsewhere with --weights PATH, or "
        r"try the toolchain with --weights random\n",
        err,
    )


@pytest.mark.skipif(BUILDERS[0].can_build().available, reason="TensorRT can build here")
def test_engine_that_cannot_be_built_here(run):
    ran = run("build", "vit_digits", "--engine", "tensorrt", "-o", "out")
    assert ran.code == 4
    assert ran.error == BUILDERS[0].can_build().reason
    assert "TensorRT" in ran.error


@pytest.mark.parametrize("command", ["check", "engine"])
def test_no_artifact(command, run, tmp_path):
    ran = run(command, "nowhere")
    assert ran.code == 3
    assert ran.error == (
        f"{tmp_path / 'nowhere'} is not an artifact: it has no build.json; give the directory that "
        "'tome-export build' wrote"
    )


@pytest.mark.parametrize("command", ["check", "engine"])
def test_corrupted_and_truncated_artifact(command, run, artifact):
    model = artifact / "model.onnx"
    content = bytearray(model.read_bytes())
    content[1000] ^= 1
    model.write_bytes(content)
    ran = run(command, artifact)
    assert ran.code == 3
    assert ran.error == (
        f"{model} does not match the sha256 in build.json: the file is corrupted or was changed, "
        "rebuild the artifact or copy it again"
    )
    size = len(content)
    model.write_bytes(content[: size // 2])
    ran = run(command, artifact)
    assert ran.code == 3
    assert ran.error == (
        f"{model} has {size // 2} bytes; build.json records {size}: the file is truncated or was "
        "changed, rebuild the artifact or copy it again"
    )
    model.unlink()
    ran = run(command, artifact)
    assert ran.code == 3
    assert ran.error == f"{model} is missing; rebuild the artifact or copy it whole"


def test_truncated_manifest(run, artifact):
    manifest = artifact / "build.json"
    manifest.write_text(manifest.read_text()[:200])
    ran = run("check", artifact)
    assert ran.code == 3
    assert re.fullmatch(
        rf"{re.escape(str(manifest))} is not valid JSON \(.*\); rebuild the artifact or copy it "
        "again",
        ran.error,
    )


@pytest.mark.parametrize("command", ["check", "engine"])
def test_edited_manifest(command, run, artifact):
    manifest = artifact / "build.json"
    values = json.loads(manifest.read_text())
    del values["merge"]["r"]
    manifest.write_text(json.dumps(values))
    ran = run(command, artifact)
    assert ran.code == 3
    assert ran.error == f"{manifest} has no merge.r; rebuild the artifact or copy it again"


def test_engine_batch_outside_the_models(run, artifact):
    ran = run("engine", artifact, "--batch", "1:8:64", "--engine", "auto")
    if all(not backend.can_build().available for backend in BUILDERS):
        assert ran.code == 4
        return
    assert ran.code == 3
    assert ran.error == (
        "batch range is 1:8:64; the artifact's model takes 1:8:32, choose one inside it or rebuild "
        "the artifact"
    )


def test_check_of_an_engine_that_is_not_there(run, artifact):
    # What this machine lacks is told first, as by every command, with exit code 4.
    for command in (("check",), ("bench",), ("eval", "--data", "samples")):
        ran = run(command[0], artifact, *command[1:], "--backend", "tensorrt")
        reason = BACKENDS["tensorrt"].missing()
        if reason is not None:
            assert (ran.code, ran.error) == (4, reason)
        elif command == ("check",):
            assert (ran.code, ran.error) == (
                3,
                "the artifact has no tensorrt engine; build one with 'tome-export engine "
                f"{artifact} --engine tensorrt'",
            )
    ran = run("check", artifact, "--backend", "torch")
    assert ran.code == 2
    assert ran.error == (
        "backend is 'torch', which is what the others are checked against; choose another"
    )
