"""Patching leaves the library model as it was, and a patched model is an ordinary module."""

from __future__ import annotations

import copy
import io
import pickle
import weakref

import pytest
import torch
from torch import nn

from tome_export.errors import InputError
from tome_export.merge import ops
from tome_export.merge.schedule import Schedule
from tome_export.patch import MergedModel, merger, patch, unpatch


def images_for(merged, count=2, seed=0):
    return torch.randn(count, *merged.input_size, generator=torch.Generator().manual_seed(seed))


def snapshot(model):
    """Everything that a patch could leave behind."""
    hooks = [name for name in vars(model) if name.endswith("hooks") and len(getattr(model, name))]
    modules = {
        name: (type(module), sorted(vars(module)), type(module).forward, "forward" in vars(module))
        for name, module in model.named_modules()
    }
    state = {key: value.clone() for key, value in model.state_dict().items()}
    return hooks, modules, state, model.training


@pytest.mark.parametrize("training", [False, True])
def test_original_module_is_untouched(make_vit, training):
    model = make_vit().train(training)
    before = snapshot(model)
    merged = patch(model, 7)
    assert merged.training == training
    with torch.no_grad():
        merged(images_for(merged))
    after = snapshot(model)
    assert before[:2] == after[:2]
    assert before[3] == after[3]
    assert list(before[2]) == list(after[2])
    assert all(torch.equal(before[2][key], after[2][key]) for key in before[2])
    assert merged.model is model


def test_original_still_answers_without_merging(make_vit):
    model = make_vit()
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        before = model(images)
        patch(model, 9)(images)
        assert torch.equal(model(images), before)


def test_patching_twice_replaces_the_settings(make_vit):
    model = make_vit()
    once = patch(model, 3)
    twice = patch(once, (5, -1.0), prop_attn=False)
    assert twice.model is model
    assert twice.settings.schedule == Schedule(r=5, inflect=-1.0)
    assert not twice.settings.prop_attn
    assert once.settings.schedule == Schedule(r=3)
    images = images_for(once)
    with torch.no_grad():
        assert torch.equal(patch(twice, 3)(images), once(images))


def test_unpatch_gives_the_very_model_back(make_vit):
    model = make_vit()
    assert unpatch(patch(model, 3)) is model
    assert unpatch(model) is model


def test_deepcopy_separates_weights(make_vit):
    merged = patch(make_vit(), 5)
    clone = copy.deepcopy(merged)
    images = images_for(merged)
    with torch.no_grad():
        before = merged(images)
        assert torch.equal(clone(images), before)
        for parameter in clone.parameters():
            parameter.zero_()
        assert torch.equal(merged(images), before)
    assert list(clone.state_dict()) == list(merged.state_dict())


def test_pickle_round_trip(make_vit):
    merged = patch(make_vit("test_vit2"), [3, 0, 5], prop_attn=False)
    merged.macs()
    clone = pickle.loads(pickle.dumps(merged))  # noqa: S301
    assert isinstance(clone, MergedModel)
    assert (clone.settings, clone.layers, clone.macs()) == (
        merged.settings,
        merged.layers,
        merged.macs(),
    )
    images = images_for(merged)
    with torch.no_grad():
        assert torch.equal(clone(images), merged(images))
    buffer = io.BytesIO()
    torch.save(clone.state_dict(), buffer)
    buffer.seek(0)
    merged.model.load_state_dict(torch.load(buffer, weights_only=True))


class Wrapper(nn.Module):
    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(2, 2)


@pytest.mark.parametrize("wrap", [lambda m: m, Wrapper, lambda m: Wrapper(Wrapper(m))])
def test_state_dict_has_the_plain_keys_and_loads_both_ways(make_vit, wrap):
    plain, other = make_vit(seed=1), make_vit(seed=2)
    plain_outer, merged_outer = wrap(plain), wrap(patch(other, 4))
    assert list(merged_outer.state_dict()) == list(plain_outer.state_dict())

    result = merged_outer.load_state_dict(plain_outer.state_dict(), strict=True)
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert all(
        torch.equal(a, b) for a, b in zip(plain.parameters(), other.parameters(), strict=True)
    )

    third = make_vit(seed=3)
    wrap(third).load_state_dict(merged_outer.state_dict(), strict=False)
    assert all(
        torch.equal(a, b) for a, b in zip(plain.parameters(), third.parameters(), strict=True)
    )


def test_wrong_checkpoints_are_still_noticed(make_vit):
    merged = patch(make_vit(), 4)
    state = merged.state_dict()
    state["surprise"] = state.pop("cls_token")
    with pytest.raises(RuntimeError, match=r"Missing key.*cls_token(.|\n)*Unexpected.*surprise"):
        merged.load_state_dict(state)
    assert "surprise" in state
    assert not any(key.startswith("model.") for key in state)


def test_checkpoints_of_another_shape_are_refused(make_vit):
    with pytest.raises(RuntimeError, match="size mismatch for"):
        patch(make_vit(), 4).load_state_dict(make_vit(num_classes=7).state_dict())


def test_parameters_are_shared_and_move_together(make_vit):
    model = make_vit()
    merged = patch(model, 4)
    assert [id(p) for p in merged.parameters()] == [id(p) for p in model.parameters()]
    with torch.no_grad():
        assert merged.half()(images_for(merged).half()).dtype == torch.float16
    assert model.cls_token.dtype == torch.float16


@pytest.mark.parametrize("shape", [(2, 3, 32, 64), (2, 3, 96, 96), (2, 1, 64, 64), (2, 3, 64)])
def test_other_image_sizes_are_refused_even_where_timm_takes_them(make_vit, shape):
    model = make_vit()
    assert model.dynamic_img_size
    merged = patch(model, 2)
    for forward in (merged, merged.forward_traced):
        with pytest.raises(InputError, match=r"this model's token counts are fixed for \(3, 64"):
            forward(torch.zeros(shape))


def test_resizing_the_inner_model_later_is_noticed(make_vit):
    merged = patch(make_vit(dynamic_img_size=False), 2)
    merged.model.set_input_size((96, 96))
    with pytest.raises(InputError, match="fixed for"):
        merged(torch.zeros(1, 3, 96, 96))
    assert patch(merged, 2).layers[0].tokens_in == 145


def test_forced_plans_are_applied_and_the_own_choice_is_kept(make_vit):
    merged = patch(make_vit(), 6)
    first, second = images_for(merged, seed=1), images_for(merged, seed=2)
    with torch.no_grad():
        output, trace = merged.forward_traced(first)
        assert torch.equal(output, merged(first))
        own = {step.layer: step.plan for step in trace}
        same, again = merged.forward_traced(first, own)
        other, led = merged.forward_traced(second, own)
    assert torch.equal(same, output)
    assert all(torch.equal(a.chosen.keep, b.plan.keep) for a, b in zip(again, trace, strict=True))
    for step in led:
        assert torch.equal(step.plan.src, own[step.layer].src)
    assert any(not torch.equal(step.chosen.src, step.plan.src) for step in led)
    assert not torch.equal(other, merged(second))


def test_training_takes_gradients_through_the_merge(make_vit):
    merged = patch(make_vit("test_vit2"), 6).train()
    merged(images_for(merged)).sum().backward()
    for name, parameter in merged.model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    weights = [b.mlp.fc1.weight.grad.abs().max() for b in merged.model.blocks]
    assert all(weight > 0 for weight in weights)


@pytest.mark.parametrize(
    "rates",
    [
        {"drop_rate": 0.5},
        {"pos_drop_rate": 0.3},
        {"proj_drop_rate": 0.3},
        {"attn_drop_rate": 0.3},
        {"drop_path_rate": 0.5},
        {"patch_drop_rate": 0.25},
    ],
)
def test_training_mode_draws_the_same_noise_as_timm(make_vit, rates):
    model = make_vit(**rates).train()
    merged = patch(model, 0)
    images = images_for(merged, 4)
    outputs = []
    for module in (model, merged):
        torch.manual_seed(5)
        outputs.append(module(images))
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-5, atol=1e-6)
    model.eval()
    assert not torch.allclose(model(images), outputs[0], rtol=1e-2, atol=1e-2)


def test_distilled_training_gives_both_heads(make_vit):
    model = make_vit("deit_tiny_distilled_patch16_224", embed_dim=64, num_heads=2, depth=2)
    merged = patch(model, 4)
    merged.train()
    model.set_distilled_training(True)
    both = merged(images_for(merged))
    assert [part.shape for part in both] == [(2, 10), (2, 10)]
    merged.eval()
    torch.testing.assert_close(merged(images_for(merged)), (both[0] + both[1]) / 2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(make_vit, dtype):
    model = make_vit("test_vit2")
    reference = patch(copy.deepcopy(model).double(), 5)
    merged = patch(model.to(dtype), 5)
    images = images_for(merged)
    with torch.no_grad():
        output, trace = merged.forward_traced(images.to(dtype))
        plans = {step.layer: step.plan for step in trace}
        expected, _ = reference.forward_traced(images.double(), plans)
    assert output.dtype == dtype
    assert {step.metric.dtype for step in trace} <= {torch.float32, torch.float64}
    error = (output.double() - expected).abs().max() / expected.abs().max()
    assert error < 50 * torch.finfo(dtype).eps


def test_forward_takes_the_mean_of_the_keys_once_per_layer_and_keeps_none(make_vit, monkeypatch):
    merged = patch(make_vit("test_vit"), 5)
    calls = []
    for module in (ops, merger):
        original = module.mean_keys
        monkeypatch.setattr(module, "mean_keys", lambda k, f=original: calls.append(1) or f(k))
    images = images_for(merged)
    with torch.no_grad():
        merged(images)
        assert len(calls) == len(merged.layers)
        seen = []

        def observe(step):
            assert [ref() for ref in seen] == [None] * len(seen), "earlier keys are still held"
            seen.append(weakref.ref(step.keys))

        output = merged.forward_observed(images, observe)
        assert len(seen) == len(merged.layers) > 1
        expected, trace = merged.forward_traced(images)
    assert torch.equal(output, expected)
    assert len(calls) == 3 * len(merged.layers)
    heads, width = merged.model.blocks[0].attn.num_heads, merged.model.blocks[0].attn.head_dim
    for step, layer in zip(trace, merged.layers, strict=True):
        assert step.keys.shape == (len(images), heads, layer.tokens_in, width)
        assert step.metric.shape == (len(images), layer.tokens_in, width)


def test_patch_dropout_in_training_leaves_fewer_tokens_to_merge():
    """The schedule counts all patches; r is clamped to those that are left."""
    import timm

    model = timm.create_model("test_vit", patch_drop_rate=0.9).train()
    merged = patch(model, 20)
    assert merged.layers[0].r == 20
    assert torch.isfinite(merged(torch.randn(2, *merged.input_size))).all()
