"""Pooling of merged tokens, computed apart from the library: from the trace and timm's layers."""

from __future__ import annotations

import pytest
import torch

from tome_export.merge import reference
from tome_export.merge.plan import source_map
from tome_export.patch import patch


def final_tokens(merged, images):
    """What enters the pooling, and each token's size, counted from the plans."""
    seen = []
    hook = merged.model.norm.register_forward_hook(lambda _m, _a, out: seen.append(out))
    with torch.no_grad():
        output, trace = merged.forward_traced(images)
    hook.remove()
    mapping = source_map([s.plan for s in trace], len(images), merged.layers[0].tokens_in)
    size = torch.nn.functional.one_hot(mapping, seen[0].shape[1]).sum(1).to(images.dtype)
    assert size.max() > 1
    return output, seen[0], size


def build(make_vit, make_images, name, **kwargs):
    model = make_vit(name, fc_norm=False, **kwargs).double()
    merged = patch(model, 9)
    return model, merged, torch.from_numpy(make_images(merged)).double()


@pytest.mark.parametrize("include_prefix", [False, True])
@pytest.mark.parametrize("pool", ["avg", "avgmax", "max"])
def test_average_counts_every_patch_once(make_vit, make_images, pool, include_prefix):
    model, merged, images = build(
        make_vit, make_images, "test_vit2", global_pool=pool, pool_include_prefix=include_prefix
    )
    output, tokens, size = final_tokens(merged, images)
    first = 0 if include_prefix else model.num_prefix_tokens
    rows = []
    for image in range(len(images)):
        group = reference.ReferencePlan([0], list(range(1, tokens.shape[1] - first)), [])
        group = reference.ReferencePlan([0], group.src, [0] * len(group.src))
        mean, total = reference.merge(
            tokens[image, first:].tolist(), size[image, first:].tolist(), group
        )
        assert total == [model.patch_embed.num_patches + include_prefix * model.num_prefix_tokens]
        largest = tokens[image, first:].max(0).values
        average = torch.tensor(mean[0], dtype=torch.float64)
        rows.append({"avg": average, "max": largest, "avgmax": (average + largest) / 2}[pool])
    with torch.no_grad():
        expected = model.head(model.fc_norm(torch.stack(rows)))
    torch.testing.assert_close(output, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("include_prefix", [False, True])
@pytest.mark.parametrize("prop_attn", [True, False])
def test_attention_pooling_sees_each_token_as_often_as_its_size(
    make_vit, make_images, include_prefix, prop_attn
):
    model = make_vit("test_vit3", fc_norm=False, pool_include_prefix=include_prefix).double()
    merged = patch(model, 9, prop_attn=prop_attn)
    images = torch.from_numpy(make_images(merged)).double()
    output, tokens, size = final_tokens(merged, images)
    first = 0 if include_prefix else model.num_prefix_tokens
    rows = []
    for image in range(len(images)):
        repeats = (
            size[image, first:].long() if prop_attn else torch.ones_like(size[image, first:]).long()
        )
        repeated = tokens[image, first:].repeat_interleave(repeats, dim=0)
        with torch.no_grad():
            rows.append(model.attn_pool(repeated[None])[0])
    with torch.no_grad():
        expected = model.head(model.fc_norm(torch.stack(rows)))
    torch.testing.assert_close(output, expected, rtol=1e-6, atol=1e-6)


def test_no_pooling_hands_on_every_token(make_vit, make_images):
    model, merged, images = build(make_vit, make_images, "test_vit", global_pool="", reg_tokens=2)
    output, tokens, _ = final_tokens(merged, images)
    with torch.no_grad():
        torch.testing.assert_close(output, model.head(tokens))
    assert output.shape[1] == merged.layers[-1].tokens_out


def test_token_pooling_reads_the_class_token(make_vit, make_images):
    model, merged, images = build(make_vit, make_images, "test_vit", reg_tokens=2)
    output, tokens, _ = final_tokens(merged, images)
    with torch.no_grad():
        torch.testing.assert_close(output, model.head(tokens[:, 0]))


def test_distilled_model_averages_its_two_heads(make_vit, make_images):
    model, merged, images = build(
        make_vit, make_images, "deit_tiny_distilled_patch16_224", embed_dim=64, num_heads=2, depth=3
    )
    output, tokens, _ = final_tokens(merged, images)
    with torch.no_grad():
        expected = (model.head(tokens[:, 0]) + model.head_dist(tokens[:, 1])) / 2
    torch.testing.assert_close(output, expected)
