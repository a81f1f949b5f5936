"""Torchvision's ViTs: nn.MultiheadAttention, a plain and a convolutional stem."""

from __future__ import annotations

import contextlib
import threading

import pytest
import torch
from torch import nn
from torchvision.models.vision_transformer import ConvStemConfig, VisionTransformer
from towers import (
    assert_duplicates_count,
    assert_plans_are_the_references,
    assert_r_0_is_the_librarys,
    built,
    live,
)

from tome_export.errors import InputError
from tome_export.patch import patch

STRUCTURES = {
    "plain": {},
    "pre-logits": {"representation_size": 24},
    "convolutional stem": {
        "conv_stem_configs": [ConvStemConfig(8, 3, 2), ConvStemConfig(16, 3, 4)]
    },
}


def make(**kwargs):
    return live(VisionTransformer(64, 8, 3, 2, 64, 128, **{"num_classes": 10, **kwargs}))


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_r_0_is_torchvisions_own_output(structure, dense):
    assert_r_0_is_the_librarys(make(**STRUCTURES[structure]), dense=dense)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_plans_are_the_references(structure):
    assert_plans_are_the_references(make(**STRUCTURES[structure]))


def test_duplicates_count():
    model = make()
    assert_duplicates_count(model, model.encoder.pos_embedding)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_real_build_keeps_parity(tmp_path, monkeypatch, precision):
    parity = built(make(), tmp_path, monkeypatch, precision).manifest.parity
    assert parity.passed
    if precision == "fp32":
        assert parity.disagreements == 0


def test_tensorrt_rtx_takes_it(tmp_path, monkeypatch):
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    made = built(make(), tmp_path, monkeypatch, "fp16", "tensorrt-rtx")
    assert made.manifest.engines["tensorrt-rtx"].size_bytes > 50_000


class MyAttention(nn.MultiheadAttention):
    pass


def odd_attention(model):
    model.encoder.layers[1].self_attention = MyAttention(64, 2, batch_first=True)


def odd_keys(model):
    model.encoder.layers[1].self_attention = nn.MultiheadAttention(64, 2, add_bias_kv=True)


def odd_mlp(model):
    model.encoder.layers[2].mlp[1] = nn.Softmax(dim=1)


def odd_norm(model):
    model.encoder.layers[0].ln_2 = nn.BatchNorm1d(65)


def odd_block(model):
    model.encoder.layers[0] = nn.Identity()


def hooked(model):
    model.encoder.layers[0].register_forward_hook(lambda *_: None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            odd_attention,
            "attention class MyAttention of model torchvision VisionTransformer is not",
        ),
        (odd_keys, "is a MultiheadAttention with add_bias_kv, whose extra key is no token"),
        (odd_mlp, "MLP part class Softmax of model torchvision VisionTransformer is not supported"),
        (odd_norm, "normalisation class BatchNorm1d of model torchvision"),
        (odd_block, "block class Identity of model torchvision VisionTransformer is not supported"),
        (hooked, "encoder.layers.encoder_layer_0 of model torchvision .* has a forward hook"),
    ],
)
def test_what_is_not_understood_is_named(change, message):
    model = make()
    change(model)
    with pytest.raises(InputError, match=message) as caught:
        patch(model, 2)
    assert "\n" not in str(caught.value)


def test_threads_leave_torchs_fast_path_as_it_was():
    """It is one switch of the process: whoever puts it back last would decide for all."""
    from tome_export.patch.attention import same_arithmetic

    inside, left = threading.Event(), threading.Event()

    def first() -> None:
        with same_arithmetic():
            inside.set()
            left.wait(10)

    thread = threading.Thread(target=first)
    thread.start()
    inside.wait(10)
    with same_arithmetic():
        left.set()
        thread.join()
        assert torch.backends.mha.get_fastpath_enabled()
    assert torch.backends.mha.get_fastpath_enabled()


def test_same_arithmetic_is_not_the_fast_path():
    from torch.profiler import profile

    from tome_export.patch.attention import same_arithmetic

    attn, x = live(nn.MultiheadAttention(32, 4, batch_first=True)), torch.randn(2, 9, 32)
    kernels = []
    for context in (contextlib.nullcontext(), same_arithmetic()):
        with torch.inference_mode(), context, profile() as seen:
            attn(x, x, x, need_weights=False)
        kernels.append("aten::_native_multi_head_attention" in {e.name for e in seen.events()})
    assert kernels == [True, False]


def test_state_dict_has_the_librarys_keys():
    model = make()
    assert list(patch(model, 3).state_dict()) == list(model.state_dict())


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_multihead_is_the_class_own_forward(batch_first, separate, bias):
    from tome_export.patch.attention import multihead, same_arithmetic

    sizes = {"kdim": 24, "vdim": 24} if separate else {}
    attn = live(nn.MultiheadAttention(32, 4, bias=bias, batch_first=batch_first, **sizes))
    context = torch.randn(2, 9, 24 if separate else 32)
    queries = torch.randn(2, 5, 32) if separate else context
    given = [x if batch_first else x.transpose(0, 1) for x in (queries, context, context)]
    with torch.no_grad(), same_arithmetic():
        expected = attn(*given, need_weights=False)[0]
        found, attended = multihead(attn, queries, context, None)
    torch.testing.assert_close(found, expected if batch_first else expected.transpose(0, 1))
    assert attended.keys.shape == (2, 4, 9, 8)
