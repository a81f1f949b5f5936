"""CLIP4Clip's tower: what it computes, and the layouts of checkpoints that it takes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from video_reference import Merging, tempme

from tome_export.errors import InputError
from tome_export.models import resolve
from tome_export.models.video.recipes import Clip4ClipLoader
from tome_export.video.options import ClipSizes, FrameMerging

MERGING = FrameMerging((1,), (2,), (30, 10))
TINY = Clip4ClipLoader(ClipSizes(128, 2, 8, 32, 24), 4)


def tiny_recipe(merging: FrameMerging | None = None) -> Any:
    recipe, loader = resolve("clip4clip_b32"), replace(TINY, merging=merging)
    return replace(recipe, source=replace(recipe.source, loader=loader))


def videos(count: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    mask = torch.ones(count, 4)
    mask[1, 2:] = 0
    return torch.randn(count, 4, 3, 32, 32, generator=generator), mask


def openai_state(seed: int = 1) -> tuple[Any, dict[str, torch.Tensor]]:
    module = tiny_recipe().load("random", seed=seed).module
    return module, {f"visual.{key}": value for key, value in module.state_dict().items()}


def test_the_tower_is_clip_on_every_frame_and_a_masked_mean():
    module = tiny_recipe().load("random", seed=3).module
    pixels, mask = videos()
    with torch.no_grad():
        found = module(pixels, mask)
        expected, plans = tempme(module.state_dict(), pixels, mask, Merging(r=0, layers=()))
    assert plans == []
    assert torch.allclose(found.double(), expected, rtol=0, atol=1e-6)


def test_frames_masked_out_change_nothing_and_no_frame_gives_zero():
    module = tiny_recipe().load("random").module
    pixels, mask = videos()
    with torch.no_grad():
        before = module(pixels, mask)
        pixels[1, 2:] = 7.0
        assert torch.equal(module(pixels, mask), before)
        alone = module(pixels[:, :2].repeat(1, 2, 1, 1, 1), torch.tensor([[1.0, 1, 0, 0]] * 2))
        assert torch.allclose(alone[1], before[1], atol=1e-6)
        assert torch.equal(module(pixels, torch.zeros(2, 4)), torch.zeros_like(before))


def hf_state(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Transformers' layout, written here by hand from OpenAI's."""
    found = {
        "visual_projection.weight": state["visual.proj"].T.contiguous(),
        "text_projection.weight": torch.zeros(24, 8),
        "logit_scale": torch.zeros(()),
        "vision_model.embeddings.position_ids": torch.arange(17)[None],
    }
    for theirs, ours in (
        ("embeddings.class_embedding", "class_embedding"),
        ("embeddings.patch_embedding.weight", "conv1.weight"),
        ("embeddings.position_embedding.weight", "positional_embedding"),
        ("pre_layrnorm.weight", "ln_pre.weight"),
        ("pre_layrnorm.bias", "ln_pre.bias"),
        ("post_layernorm.weight", "ln_post.weight"),
        ("post_layernorm.bias", "ln_post.bias"),
    ):
        found[f"vision_model.{theirs}"] = state[f"visual.{ours}"]
    for layer in range(2):
        for kind in ("weight", "bias"):
            front = f"visual.transformer.resblocks.{layer}."
            to = f"vision_model.encoder.layers.{layer}."
            q, k, v = state[f"{front}attn.in_proj_{kind}"].chunk(3)
            for name, value in (("q", q), ("k", k), ("v", v)):
                found[f"{to}self_attn.{name}_proj.{kind}"] = value.clone()
            for theirs, ours in (
                ("self_attn.out_proj", "attn.out_proj"),
                ("layer_norm1", "ln_1"),
                ("layer_norm2", "ln_2"),
                ("mlp.fc1", "mlp.c_fc"),
                ("mlp.fc2", "mlp.c_proj"),
            ):
                found[f"{to}{theirs}.{kind}"] = state[f"{front}{ours}.{kind}"]
    return found


@pytest.mark.parametrize("layout", ["openai", "transformers", "training", "wrapped", "bare"])
def test_every_layout_gives_the_same_tower(tmp_path, layout):
    module, state = openai_state()
    text = {"transformer.resblocks.0.ln_1.weight": torch.ones(8), "ln_final.weight": torch.ones(8)}
    given = {
        "openai": {**state, **text, "input_resolution": torch.tensor(32)},
        "transformers": hf_state(state),
        "training": {f"clip.{key}": value for key, value in {**state, **text}.items()},
        "wrapped": {f"module.clip.{key}": value for key, value in {**state, **text}.items()},
        "bare": {key.removeprefix("visual."): value for key, value in state.items()},
    }[layout]
    path = tmp_path / "weights.safetensors"
    save_file(given, path)
    loaded = tiny_recipe().load(str(path))
    assert loaded.weights.kind == "file"
    pixels, mask = videos()
    with torch.no_grad():
        assert torch.equal(loaded.module(pixels, mask), module(pixels, mask))


def tempme_state() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A checkpoint as TempMe's training saves it, and the LoRA's folded projections."""
    _, state = openai_state()
    given = {f"clip.{key}": value for key, value in state.items()}
    generator = torch.Generator().manual_seed(9)
    folded = {}
    for layer in range(2):
        front = f"clip.visual.transformer.resblocks.{layer}."
        down, up = (torch.randn(*shape, generator=generator) for shape in ((8, 128), (384, 8)))
        given |= {f"{front}attn.TVPt_LoRA_a": down, f"{front}attn.TVPt_LoRA_b": up}
        name = f"transformer.resblocks.{layer}.attn.in_proj_weight"
        folded[name] = state[f"visual.{name}"] + up @ down
    position = torch.randn(1, 4, 1, 128, generator=generator)
    given["clip.visual.transformer.resblocks.1.TVPt_Video_Positional_embedding"] = position
    folded["frame_positions.1"] = position[0, :, 0]
    return given, folded


def test_lora_is_folded_and_frame_positions_are_taken(tmp_path):
    given, folded = tempme_state()
    path = tmp_path / "tempme.pth"
    torch.save({"model": given}, path)
    state = tiny_recipe(MERGING).load(str(path)).module.state_dict()
    for name, expected in folded.items():
        assert torch.allclose(state[name], expected, atol=1e-5), name
    plain = tiny_recipe().load(str(path))
    assert plain.weights.source == "tempme.pth; its model; its frame positions are left out"


def test_clip_without_frame_positions_starts_from_zero(tmp_path):
    _, state = openai_state()
    path = tmp_path / "clip.safetensors"
    save_file(state, path)
    loaded = tiny_recipe(MERGING).load(str(path))
    assert loaded.weights.source == "clip.safetensors; no frame positions in it, zero taken"
    assert not loaded.module.frame_positions["1"].any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: s.pop("clip.visual.transformer.resblocks.0.attn.TVPt_LoRA_b"),
            "has transformer.resblocks.0.attn.TVPt_LoRA_a without its other half; expected both "
            "of a LoRA and the projection they change",
        ),
        (
            lambda s: s.pop("clip.visual.transformer.resblocks.0.attn.TVPt_LoRA_a"),
            "has transformer.resblocks.0.attn.TVPt_LoRA_b without its other half; expected both "
            "of a LoRA",
        ),
        (
            lambda s: s.update(
                {"clip.visual.transformer.resblocks.0.attn.TVPt_LoRA_b": torch.zeros(8, 8)}
            ),
            "has a LoRA of shapes [8, 8] x [8, 128] for a projection of [384, 128]; expected the "
            "same outer sizes",
        ),
        (
            lambda s: s.pop("clip.visual.proj"),
            "does not fit the model: keys 1 missing (proj); expected the checkpoint of this "
            "architecture",
        ),
        (
            lambda s: s.update(
                {
                    "clip.visual.transformer.resblocks.1.TVPt_Video_Positional_embedding": (
                        torch.zeros(1, 6, 1, 128)
                    )
                }
            ),
            "does not fit the model: 1 wrong shapes (frame_positions.1: got [6, 128] expected "
            "[4, 128]); expected the checkpoint of this architecture",
        ),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_one_clear_line(tmp_path, change, message):
    given, _ = tempme_state()
    change(given)
    path = tmp_path / "weights.pth"
    torch.save(given, path)
    with pytest.raises(InputError) as caught:
        tiny_recipe(MERGING).load(str(path))
    assert str(caught.value) == f"weights file {path} {message}"


def test_pretrained_names_what_to_give():
    with pytest.raises(InputError) as caught:
        resolve("clip4clip_b32").load()
    assert str(caught.value) == (
        "clip4clip_b32 has no weights of its own to download; give the file of a CLIP or video "
        "retrieval checkpoint with --weights PATH, or try the toolchain with --weights random"
    )


@pytest.mark.parametrize(("name", "tokens"), [("clip4clip_b32", 50), ("clip4clip_b16", 197)])
def test_the_recipes_have_clips_sizes(name, tokens):
    tower: Any = resolve(name).architecture()
    assert tower.sizes.tokens == tokens
    assert (tower.frames, tower.sizes.features, len(tower.transformer.resblocks)) == (12, 512, 12)
