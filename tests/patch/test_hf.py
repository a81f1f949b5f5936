"""Transformers' vision models, each class with both of its attention implementations."""

from __future__ import annotations

import copy
import re
from types import SimpleNamespace

import pytest
import torch
from hf_models import MODELS, make, position_of
from torch import nn
from towers import (
    assert_duplicates_count,
    assert_plans_are_the_references,
    assert_r_0_is_the_librarys,
    built,
    images_of,
)

from tome_export.errors import InputError
from tome_export.patch import patch, unpatch
from tome_export.patch.checks import ONE_DEVICE

pytest.importorskip("transformers")

ATTENTIONS = ("sdpa", "eager")


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("kind", MODELS)
def test_r_0_is_the_librarys_own_output(kind, attention, dense):
    assert_r_0_is_the_librarys(make(kind, attention), dense=dense)


@pytest.mark.parametrize("kind", MODELS)
def test_plans_are_the_references(kind):
    assert_plans_are_the_references(make(kind))


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("kind", MODELS)
def test_duplicates_count(kind, attention):
    model = make(kind, attention)
    assert_duplicates_count(model, position_of(model))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", MODELS)
def test_both_attentions_agree_in_every_precision(kind, dtype):
    outputs = []
    for attention in ATTENTIONS:
        merged = patch(make(kind, attention).to(dtype), 5)
        with torch.no_grad():
            # The plans of one, so that rounding cannot choose other tokens.
            images = images_of(merged).to(dtype)
            if not outputs:
                plans = {s.layer: s.plan for s in merged.forward_traced(images)[1]}
            outputs.append(merged.forward_traced(images, plans)[0])
    tolerance = {torch.float64: 1e-12, torch.float16: 2e-2, torch.bfloat16: 1e-1}[dtype]
    difference = (outputs[0] - outputs[1]).abs().max()
    assert difference <= tolerance * outputs[0].abs().max()


def test_without_a_pooler_the_class_token_is_given():
    model = make("ViT", extra={"add_pooling_layer": False})
    assert_r_0_is_the_librarys(model)


def test_the_state_keeps_the_models_own_names():
    model = make("CLIP")
    merged = patch(model, 3)
    assert list(merged.state_dict()) == list(model.state_dict())
    assert unpatch(merged) is model
    copy.deepcopy(merged).load_state_dict(model.state_dict())


def test_macs_fall_with_r():
    merged = patch(make("SigLIP"), 5)
    assert merged.macs() < merged.macs(merged=False)
    assert (merged.prefix, merged.class_token) == (0, False)
    registers = patch(make("registers"), 5)
    assert (registers.prefix, registers.class_token) == (3, True)
    assert (registers.patch_grid.rows, registers.patch_grid.cols) == (8, 8)


def test_flash_attention_is_refused():
    model = make("CLIP")
    model.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(InputError) as refused:
        patch(model, 3)
    assert str(refused.value) == (
        "attention implementation 'flash_attention_2' of model CLIPVisionModel takes no additive "
        "bias, which token merging needs; load it with attn_implementation='sdpa' or 'eager'"
    )


def test_a_device_map_is_refused():
    accelerate = pytest.importorskip("accelerate")
    model = make("ViT")
    accelerate.cpu_offload(model)
    with pytest.raises(InputError) as refused:
        patch(model, 3)
    assert "a device map has placed it" in str(refused.value)
    assert str(refused.value).endswith(ONE_DEVICE)


@pytest.mark.parametrize("name", ["CLIP", "SigLIP", "ViT"])
@pytest.mark.parametrize("inner", [False, True])
def test_offload_after_patching_is_told(name, inner):
    accelerate = pytest.importorskip("accelerate")
    model = make(name)
    merged = patch(model, 1)
    accelerate.cpu_offload(model if inner else merged)
    with pytest.raises(InputError) as refused:
        merged(torch.rand(1, *merged.input_size))
    message = str(refused.value)
    assert re.match(r"module [\w.()]+( model\))? of patched model \w+ has a hook of accel", message)
    assert message.endswith(ONE_DEVICE)
    assert "\n" not in message


def test_dispatch_to_one_device_works():
    accelerate = pytest.importorskip("accelerate")
    merged = patch(make("CLIP"), 1)
    pixels = torch.rand(1, *merged.input_size)
    expected = merged(pixels)
    accelerate.dispatch_model(merged, {"": "cpu"})
    assert torch.equal(merged(pixels), expected)


def test_a_model_on_two_devices_is_refused():
    model = make("ViT")
    model.layernorm.to("meta")
    with pytest.raises(InputError, match="model ViTModel is on cpu, meta: a device map has placed"):
        patch(model, 3)


def test_a_foreign_linear_is_refused():
    class Linear8bitLt(nn.Linear):
        pass

    model = make("DINOv2")
    model.encoder.layer[1].mlp.fc1 = Linear8bitLt(32, 64)
    with pytest.raises(InputError) as refused:
        patch(model, 3)
    assert "encoder.layer.1.mlp.fc1" in str(refused.value)
    assert "Linear8bitLt, which is not supported; expected the library's own" in str(refused.value)


def test_a_foreign_clip_layer_is_refused():
    from tome_export.patch.hf.clip import check_layer

    with pytest.raises(InputError, match="layer class SimpleNamespace of model m is not supported"):
        check_layer(SimpleNamespace(), "m")


def test_a_broken_patch_grid_is_refused():
    model = make("CLIP", image_size=34)
    with pytest.raises(InputError) as refused:
        patch(model, 3)
    assert str(refused.value) == (
        "model CLIPVisionModel has an image size of 34 x 34, which is not a multiple of its patch "
        "size of 4 x 4; correct its configuration"
    )


def test_siglip_without_a_head_gives_dense_features_only():
    model = make("SigLIP", vision_use_head=False)
    with pytest.raises(InputError, match="has no pooling head"):
        patch(model, 3)
    assert_r_0_is_the_librarys(model, dense=True)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("kind", ["CLIP, projection", "SigLIP", "DeiT, teacher", "registers"])
def test_a_real_build_keeps_parity(tmp_path, monkeypatch, kind, precision):
    parity = built(make(kind), tmp_path, monkeypatch, precision).manifest.parity
    assert parity.passed
    if precision == "fp32":
        assert parity.disagreements == 0


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_real_build_of_eager_attention(tmp_path, monkeypatch, precision):
    made = built(make("DINOv2", "eager"), tmp_path, monkeypatch, precision)
    assert made.manifest.parity.passed


@pytest.mark.parametrize("kind", ["CLIP, projection", "SigLIP", "registers, classifier"])
def test_tensorrt_rtx_takes_it(tmp_path, monkeypatch, kind):
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    made = built(make(kind), tmp_path, monkeypatch, "fp16", "tensorrt-rtx")
    assert made.manifest.engines["tensorrt-rtx"].size_bytes > 50_000
