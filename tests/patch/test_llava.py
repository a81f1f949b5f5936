"""The merged LLaVA tower: r = 0 is the plain tower, r > 0 decides as the reference does."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tome_export.errors import InputError
from tome_export.merge import reference
from tome_export.merge.schedule import Schedule
from tome_export.patch import patch

FORMS = [(feature, projector) for feature in ("patch", "cls_patch") for projector in (False, True)]


@pytest.mark.parametrize(("feature", "projector"), FORMS)
def test_r_0_is_the_plain_tower(make_tower, make_images, feature, projector):
    model = make_tower(select_feature=feature, projector=projector)
    merged = patch(model, 0)
    images = torch.from_numpy(make_images(merged))
    with torch.no_grad():
        expected, output = model(images), merged(images)
    assert torch.equal(output, expected)
    assert torch.equal(merged.library(images), expected)
    assert output.shape == (3, 64 + (feature == "cls_patch"), 48 if projector else 32)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_both_attention_implementations(make_tower, make_images, attention):
    model = make_tower()
    model.vision_model.config._attn_implementation = attention
    merged = patch(model, 6)
    images = torch.from_numpy(make_images(merged))
    with torch.no_grad():
        assert (patch(model, 0)(images) - model(images)).abs().max() <= 1e-5
        output = merged(images)
    model.vision_model.config._attn_implementation = "sdpa"
    with torch.no_grad():
        assert torch.allclose(output, merged(images), atol=1e-5)


@pytest.mark.parametrize(("feature", "projector"), FORMS)
def test_tokens_and_plans(make_tower, make_images, feature, projector):
    model = make_tower(select_feature=feature, projector=projector)
    merged = patch(model, 11)
    images = torch.from_numpy(make_images(merged))
    with torch.no_grad():
        output, trace = merged.forward_traced(images)
    assert output.shape[1] == 64 - 3 * 11 + (feature == "cls_patch")
    assert [step.layer for step in trace] == [0, 1, 2]
    for step in trace:
        assert (step.plan.keep[:, 0] == 0).all(), "the class token is protected"
        for image in range(len(images)):
            expected = reference.match(step.metric[image].tolist(), 11, 1, class_token=True)
            for name in ("keep", "src", "dst"):
                assert getattr(step.plan, name)[image].tolist() == getattr(expected, name)


def test_proportional_attention_matters(make_tower, make_images):
    model = make_tower()
    with_sizes, without = patch(model, 11), patch(model, 11, prop_attn=False)
    images = torch.from_numpy(make_images(with_sizes))
    with torch.no_grad():
        assert (with_sizes(images) - without(images)).abs().max() > 1e-2


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize(("feature", "projector"), FORMS)
def test_macs_are_torchs(make_tower, feature, projector, dense):
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    model = make_tower(select_feature=feature, projector=projector)
    merged = patch(model, 0, dense=dense)
    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), counter:
        merged(torch.zeros(1, *merged.input_size))
    assert merged.macs() == counter.get_total_flops() // 2
    assert patch(model, 11, dense=dense).macs() < merged.macs()
    assert patch(model, 11, dense=dense).macs(merged=False) == merged.macs()


def test_weights_are_shared_and_keys_the_towers_own(make_tower):
    model = make_tower(projector=True)
    merged = patch(model, 4)
    assert merged.state_dict().keys() == model.state_dict().keys()
    assert not any("post_layernorm" in key or "position_ids" in key for key in model.state_dict())
    assert merged.settings.schedule == Schedule(4)


def quantised(model: Any) -> None:
    class Linear8(torch.nn.Linear):
        pass

    layer = model.vision_model.encoder.layers[1]
    layer.mlp.fc1 = Linear8(32, 64)


def hooked(model: Any) -> None:
    model.vision_model.encoder.layers[1].register_forward_hook(lambda *_: None)


def flash(model: Any) -> None:
    model.vision_model.config._attn_implementation = "flash_attention_2"


def spread(model: Any) -> None:
    model.mm_projector.to("meta")


def odd(model: Any) -> None:
    model.vision_model.config.patch_size = 5


REFUSALS = {
    quantised: r"^module .*mlp.fc1 of model LlavaTower is a \w+ Linear8, which is not supported",
    hooked: r"^module vision_model.encoder.layers.1 of model LlavaTower has a forward hook",
    flash: r"^attention implementation 'flash_attention_2' of model LlavaTower takes no additive",
    spread: r"^model LlavaTower is on cpu, meta: a device map has placed it.*runs on one device",
    odd: r"^model LlavaTower has an image size of 32 x 32, which is not a multiple",
}


@pytest.mark.parametrize("edit", REFUSALS, ids=lambda edit: edit.__name__)
def test_refusals(make_tower, edit):
    model = make_tower(projector=True)
    edit(model)
    with pytest.raises(InputError, match=REFUSALS[edit]):
        patch(model, 4)
