"""What is not understood is refused by name, never merged wrong."""

from __future__ import annotations

import pytest
import timm
import torch
from timm.layers import Attention, Mlp
from timm.models import vision_transformer as vit
from torch import nn

from tome_export.errors import InputError
from tome_export.patch import patch


class MyBlock(vit.Block):
    pass


class MyAttention(Attention):
    pass


class MyMlp(Mlp):
    pass


class MyVit(vit.VisionTransformer):
    pass


def refused(model, message):
    with pytest.raises(InputError, match=message) as error:
        patch(model, 2)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"block_fn": MyBlock}, "block class MyBlock of model test_vit is not supported; .*Block"),
        ({"attn_layer": MyAttention}, "attention class MyAttention of model test_vit"),
        ({"mlp_layer": MyMlp}, "MLP class MyMlp of model test_vit is not supported"),
        ({"global_pool": "prr"}, "global pooling 'prr' of model test_vit is not supported"),
    ],
)
def test_unknown_parts_are_named(make_vit, kwargs, message):
    refused(make_vit(**kwargs), message)


@pytest.mark.parametrize("branches", ["attns", "ffns"])
def test_unknown_parts_of_parallel_branches_are_named(make_vit, branches):
    model = make_vit(block_fn=vit.ParallelThingsBlock)
    branch = getattr(model.blocks[1], branches)[1]
    if branches == "attns":
        branch.attn = MyAttention(64, num_heads=2)
        refused(model, "attention class MyAttention of model test_vit")
    else:
        branch.mlp = MyMlp(64)
        refused(model, "MLP class MyMlp of model test_vit")


def test_one_odd_block_among_many_is_noticed(make_vit):
    model = make_vit()
    model.blocks[3] = nn.Identity()
    refused(model, "block class Identity of model test_vit is not supported")


def test_position_embedding_in_the_pooling_is_refused(make_vit):
    model = make_vit("test_vit3")
    model.attn_pool.pos_embed = nn.Parameter(torch.zeros(65, 96))
    refused(model, "attention pooling of model test_vit3 has a position embedding")


def test_unknown_attention_pooling_is_refused(make_vit):
    model = make_vit("test_vit3")

    class MyPool(type(model.attn_pool)):
        pass

    model.attn_pool.__class__ = MyPool
    refused(model, "attention pooling class MyPool of model test_vit3 is not supported")


def test_padded_images_whose_tokens_cannot_be_counted_are_refused(make_vit):
    """timm counts the patches without the padding that it adds."""
    model = make_vit(img_size=60, dynamic_img_size=True, dynamic_img_pad=True)
    with pytest.raises(InputError, match="token"):
        patch(model, 2)(torch.zeros(1, 3, 60, 60))


@pytest.mark.parametrize("name", ["vit_relpos_small_patch16_224", "beit_base_patch16_224"])
def test_other_families_are_refused(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    refused(model, f"model class {type(model).__name__} is not supported; supported: timm's")


def test_subclasses_and_strangers_are_refused():
    refused(MyVit(img_size=32, embed_dim=32, depth=1, num_heads=1), "model class MyVit is not")
    refused(nn.Linear(2, 2), "model class Linear is not supported")


def test_a_model_without_a_name_is_named_by_its_class():
    model = vit.VisionTransformer(img_size=32, embed_dim=32, depth=1, num_heads=1, block_fn=MyBlock)
    refused(model, "block class MyBlock of model VisionTransformer")


def test_schedule_longer_than_the_model_is_refused(make_vit):
    with pytest.raises(InputError, match="7 entries; the model has 6 layers"):
        patch(make_vit(), [1] * 7)


def test_hooks_are_refused():
    """A hook would not run: patching calls the parts of a block, not the block."""
    model = timm.create_model("test_vit").eval()
    handle = model.blocks[1].register_forward_hook(lambda _module, _inputs, output: output * 2)
    with pytest.raises(InputError, match=r"module blocks\.1 of model test_vit has a forward hook"):
        patch(model, 4)
    handle.remove()
    patch(model, 4)


def test_forward_of_one_module_is_refused():
    """As accelerate and quick experiments do it."""
    model = timm.create_model("test_vit").eval()
    attn = model.blocks[0].attn
    attn.forward = lambda x, **_: x
    with pytest.raises(InputError, match=r"module blocks\.0\.attn .* forward method of its own"):
        patch(model, 4)


def test_normalisation_over_tokens_is_refused():
    class OverTokens(torch.nn.LayerNorm):
        def forward(self, x):
            return x - x.mean(dim=1, keepdim=True)

    model = timm.create_model("test_vit").eval()
    model.blocks[2].norm2 = OverTokens(model.embed_dim)
    with pytest.raises(InputError, match=r"normalisation class OverTokens .* is not supported"):
        patch(model, 4)
