"""ToMe on STOP's tower, against the independent reading of both."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from torch.nn.functional import conv3d
from video_reference import Merging
from video_reference import stop as reference
from video_towers import MERGING, SIZES, groups, schedule, stop, videos

from tome_export.errors import InputError
from tome_export.models import resolve
from tome_export.models.video.recipes import Clip4ClipLoader
from tome_export.patch import patch
from tome_export.video.checkpoints import folded_prompts
from tome_export.video.options import VideoSchedule
from tome_export.video.stop import convolved


@pytest.mark.parametrize(
    ("r", "changes", "prop_attn"),
    [
        (3, {}, True),
        (3, {}, False),
        (2, {"layers": (0, 3), "frames": (4, 2), "position": False}, True),
    ],
)
def test_plans_and_features_are_the_references(r, changes, prop_attn):
    pixels, _ = videos()
    tower = stop()
    model = patch(tower, schedule(r, **changes), prop_attn=prop_attn)
    found, trace = model.forward_traced(pixels)
    chosen = replace(MERGING, **changes)
    inter, intra = (p / 100 for p in chosen.proportions)
    m = Merging(r, chosen.layers, chosen.frames, inter, intra, chosen.position, prop_attn)
    expected, records = reference(tower.state_dict(), pixels, m)
    assert [(t.layer, t.across) for t in trace] == [(r.layer, r.cross) for r in records]
    for step, record in zip(trace, records, strict=True):
        each = model.sequences_at(step.step)
        for video, of_video in enumerate(record.groups):
            for clip, one in enumerate(of_video):
                assert groups(step.plan, video * each + clip) == one
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_without_merging_it_is_the_tower_and_the_tower_the_papers():
    pixels, _ = videos()
    tower = stop()
    found = tower(pixels)
    # Each token is projected once here and twice in the tower.
    assert torch.allclose(patch(tower, 0)(pixels), found, rtol=0, atol=1e-6)
    expected, plans = reference(tower.state_dict(), pixels, Merging(r=0, layers=()))
    assert plans == []
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert torch.allclose(found.norm(dim=1), torch.ones(2))


def test_a_video_does_not_depend_on_its_neighbours():
    # The public code scales importance over the whole batch, and this is where it would show.
    pixels, _ = videos(3)
    tower = stop()
    together = tower(pixels)
    for video in range(3):
        alone = tower(pixels[video : video + 1])
        assert torch.allclose(alone[0], together[video], rtol=0, atol=1e-6)


def test_a_still_grey_video_is_finite():
    assert stop()(torch.zeros(1, 8, 3, 32, 32)).isfinite().all()


def test_class_tokens_and_prompts_are_protected():
    model = patch(stop(), schedule(20, proportions=(100, 100)))
    pixels, _ = videos(1)
    _, trace = model.forward_traced(pixels)
    for step in trace:
        protected = model.prefix_at(step.step)
        assert protected == 5 * {0: 1, 1: 2, 2: 4, 3: 4}[step.layer]
        assert (step.plan.dst >= protected).all()
        assert not (step.plan.src < protected).any()


def test_macs_count_global_prompts_and_adapters():
    model = patch(stop(), 0)
    frames, n, c, g = 8, 21, 64, 4
    after = 8 * c**2 + 2 * 32 * c
    everything = frames * n
    pairs = frames * n * n + everything * g + g * (everything + g)
    block = (everything + g) * (4 * c**2 + after) + pairs * 2 * c
    assert model.block_costs[0].macs(model.layers[0]) == block
    # Of the last block's clips only keys and values are read.
    last = everything * 2 * c**2 + g * (4 * c**2 + after) + g * (everything + g) * 2 * c
    assert model.block_costs[-1].macs(model.layers[-1]) == last


def test_the_last_block_merges_only_across():
    model = patch(stop(), schedule())
    assert model.steps[-1] == 2
    assert (model.layers[3].r, model.layers[3].tokens_out) == (0, model.layers[3].attended)


def training_state(kind: str) -> dict[str, torch.Tensor]:
    """A checkpoint as STOP's training saves it, from a tower and drawn prompts."""
    generator = torch.Generator().manual_seed(4)

    def drawn(*shape: int) -> torch.Tensor:
        return 0.1 * torch.randn(*shape, generator=generator)

    state = {f"clip.visual.{k}": v for k, v in stop().state_dict().items() if k != "frame_prompts"}
    state = {key: value for key, value in state.items() if "frame_positions" not in key}
    state["clip.visual.position_ids"] = torch.arange(17)[None]
    if kind == "linear":
        return {**state, "clip.visual_prompt_embedding": drawn(1, 4, 4 * 64)}
    state["clip.unified_prompt_embedding.weight"] = drawn(8 + 4 * 8, 4 * 64)
    front = "clip.PromptTransformer.resblocks.0."
    shapes = {
        "attn.in_proj_weight": (192, 64),
        "attn.in_proj_bias": (192,),
        "attn.out_proj.weight": (64, 64),
        "attn.out_proj.bias": (64,),
        "ln_1.weight": (64,),
        "ln_1.bias": (64,),
        "ln_2.weight": (64,),
        "ln_2.bias": (64,),
        "mlp.c_fc.weight": (256, 64),
        "mlp.c_fc.bias": (256,),
        "mlp.c_proj.weight": (64, 256),
        "mlp.c_proj.bias": (64,),
    }
    return {**state, **{front + name: drawn(*shape) for name, shape in shapes.items()}}


def recipe(frames: int = 8):
    loader = Clip4ClipLoader(SIZES, frames, prompts=True)
    recipe = resolve("stop_b32")
    return replace(recipe, source=replace(recipe.source, loader=loader))


def test_training_checkpoints_load(tmp_path):
    state = training_state("transformer")
    path = tmp_path / "stop.safetensors"
    save_file({k: v.contiguous() for k, v in state.items()}, path)
    module = recipe().load(str(path)).module
    whole = {key.removeprefix("clip."): value for key, value in state.items()}
    assert torch.equal(module.frame_prompts, folded_prompts(whole, 8, 64))
    name = "transformer.resblocks.1.LoRA.2.weight"
    assert torch.equal(module.state_dict()[name], state[f"clip.visual.{name}"])


def test_a_linear_latent_space_is_refused_beyond_one_frame(tmp_path):
    """The public code repeats its prompts for every frame and then cuts them as those of one."""
    state = training_state("linear")
    path = tmp_path / "stop.safetensors"
    save_file({k: v.contiguous() for k, v in state.items()}, path)
    with pytest.raises(InputError) as caught:
        recipe().load(str(path))
    assert str(caught.value) == (
        f"weights file {path} was trained with shared_latent_space=linear, whose public code "
        "cannot run 8 frames, only 1; expected a checkpoint of its default, transformer"
    )
    rows = state["clip.visual_prompt_embedding"].reshape(4, 4, 64)
    module = recipe(1).load(str(path)).module
    assert torch.equal(module.frame_prompts[2, 0, 3], rows[3, 2])


def test_prompts_for_other_frames_are_refused(tmp_path):
    path = tmp_path / "stop.safetensors"
    save_file({k: v.contiguous() for k, v in training_state("transformer").items()}, path)
    with pytest.raises(InputError) as caught:
        recipe(4).load(str(path))
    assert str(caught.value) == (
        f"weights file {path} has prompts for 8 frames; expected 4, or give --frames 8"
    )


def test_plain_clip_is_no_stop_checkpoint(tmp_path):
    whole = training_state("transformer")
    state = {k: v for k, v in whole.items() if "TemporalPrompt" not in k}
    path = tmp_path / "clip.safetensors"
    save_file({k: v.contiguous() for k, v in state.items()}, path)
    with pytest.raises(InputError, match=r"keys 33 missing \(TemporalPrompt\.Conv\.0\.weight"):
        recipe().load(str(path))


def test_prompts_take_their_places_in_joined_clips():
    model = patch(
        stop(), VideoSchedule(0, frames=replace(MERGING, proportions=(0, 0), position=False))
    )
    x = torch.zeros(4, 2 * 21, 64)
    prompts = torch.arange(8.0)[None, :, None, None].expand(1, 8, 4, 64)
    found = model._with_prompts(x, prompts, 2)[..., 0]
    assert found[1, :12].tolist() == [0, 2, 2, 2, 2, 0, 3, 3, 3, 3, 0, 0]


@pytest.mark.parametrize("bias", [True, False])
def test_convolutions_of_other_precisions_are_torchs(bias):
    """Frame by frame in float64; half precision in float32, rounded once."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 3, 5, 9, 8), (4, 3, 3, 5, 3), (4,))
    x, weight, b = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
    given = (weight, b if bias else None)
    around = (1, 2, 1)
    expected = conv3d(x, *given, padding=around)
    torch.testing.assert_close(convolved(x, *given, around), expected, rtol=1e-12, atol=1e-12)
    for dtype in (torch.float16, torch.bfloat16):
        low = [None if part is None else part.to(dtype) for part in (x, *given)]
        exact = conv3d(*(part if part is None else part.double() for part in low), padding=around)
        found = convolved(*low, around)
        assert found.dtype == dtype
        torch.testing.assert_close(found, exact.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-5)
