"""How much of the saved work becomes saved time in whole models on the GPU?

fp16, CUDA graphs, random weights: the library's model with its own fused attention, the merged one
with PyTorch's operations for match and merge, and the merged one with the carried kernels, replayed
in turn.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu import timing
from benchmarks.gpu.check_kernels import precompiled_kernels
from benchmarks.gpu.kernels import PrecompiledKernels, use_kernels
from benchmarks.gpu.parts import Context
from benchmarks.gpu.rows import attempt
from benchmarks.harness import percentiles
from tome_export.patch import MergedModel, patch
from tome_export.plugins.match import contract as match_contract
from tome_export.plugins.merge import contract as merge_contract
from tome_export.plugins.variants import Variant


@dataclass(frozen=True)
class ModelCase:
    """One model and how it is run.

    Attributes:
        name: timm's.
        r: Tokens merged per layer.
        batches: Of images, in the order in which they are run.
        options: timm's, besides.
    """

    name: str
    r: int
    batches: tuple[int, ...]
    options: Mapping[str, Any] = field(default_factory=dict)


BATCH_64 = (
    ModelCase("vit_base_patch16_224", 16, (64,)),
    ModelCase("vit_large_patch16_224", 8, (64,)),
)
OTHER_BATCHES = (
    ModelCase("vit_base_patch16_224", 16, (1, 256)),
    ModelCase("vit_large_patch16_224", 8, (1, 256)),
    ModelCase("vit_large_patch16_384", 23, (64, 1)),
)


def batch_64(context: Context) -> None:
    """Emit the rows of the two models that have goals, at the batch that they are for."""
    emit_rows(BATCH_64, precompiled_kernels(context), context.device)


def other_batches(context: Context) -> None:
    """Emit the rows of other batches and of a larger image."""
    emit_rows(OTHER_BATCHES, precompiled_kernels(context), context.device)


def profile_64(context: Context) -> None:
    """Emit what takes the time inside the first two models."""
    emit_profiles(BATCH_64, precompiled_kernels(context), context.device)


def variants(cases: Iterable[ModelCase] = (*BATCH_64, *OTHER_BATCHES)) -> list[Variant]:
    """Kernels that the layers of the models need."""
    found = {}
    for case in cases:
        model = without_weights(case)
        merged = patch(model, case.r)
        width = model.embed_dim
        head = width // model.blocks[0].attn.num_heads
        for layer in merged.layers:
            if layer.r:
                match = match_contract.variant(layer.tokens_in, head, "float16")
                found[match.name] = match
        merge = merge_contract.variant(width, "float16")
        found[merge.name] = merge
    return list(found.values())


def without_weights(case: ModelCase) -> Any:
    """The library's model, whose parameters take no memory yet."""
    import timm

    with torch.device("meta"):
        return timm.create_model(case.name, **case.options).eval()


def emit_rows(cases: Iterable[ModelCase], kernels: PrecompiledKernels | None, device: str) -> None:
    """A row per model and batch."""
    for case in cases:
        model, merged = half_precision(case, device)
        for batch in case.batches:
            images = _images(merged, batch, device)
            about = {"model": case.name, "batch": batch, "r": case.r, "dtype": "float16"}
            attempt("end to end", about, end_to_end, model, merged, images, kernels)
        del model, merged, images
        _free(device)


def emit_profiles(
    cases: Iterable[ModelCase], kernels: PrecompiledKernels | None, device: str
) -> None:
    """Two rows per model: unmerged, and merged with the kernels."""
    for case in cases:
        model, merged = half_precision(case, device)
        images = _images(merged, case.batches[0], device)
        for label, module in (("unmerged", model), ("merged", merged)):
            about = {"model": case.name, "batch": len(images), "r": case.r, "case": label}
            with use_kernels(kernels, device):
                attempt("profile", about, profiled, module, images)
        del model, merged, images, module
        _free(device)


def half_precision(case: ModelCase, device: str) -> tuple[nn.Module, MergedModel]:
    """The library's model and the merged one, which share their random weights."""
    model = without_weights(case)
    merged = patch(model, case.r)
    draw_weights(model, device)
    return model, merged


def draw_weights(model: nn.Module, device: str) -> None:
    """Give a model weights on the device: a library's own way takes longer than the measurement."""
    for path, parameter in list(model.named_parameters()):
        centre = float(parameter.ndim == 1 and path.endswith("weight"))
        drawn = torch.empty(parameter.shape, device=device, dtype=torch.float16)
        owner, _, name = path.rpartition(".")
        weight = nn.Parameter(drawn.normal_(centre, 0.02), requires_grad=False)
        setattr(model.get_submodule(owner), name, weight)


def _images(merged: MergedModel, batch: int, device: str) -> Tensor:
    return torch.randn((batch, *merged.input_size), device=device, dtype=torch.float16)


def _free(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


@torch.inference_mode()
def end_to_end(
    model: nn.Module, merged: MergedModel, images: Tensor, kernels: PrecompiledKernels | None
) -> dict[str, Any]:
    """Times of the variants, in turn, and what they are of each other.

    Args:
        model: Unmerged.
        merged: The same, merging.
        images: ``[B, C, H, W]`` float16.
        kernels: None where there are none, so that all is PyTorch's own.
    """

    def with_kernels(chosen: PrecompiledKernels | None) -> Callable[[Tensor], object]:
        def run(pixels: Tensor) -> object:
            with use_kernels(chosen, pixels.device.type):
                return merged(pixels)

        return run

    runs: dict[str, Callable[..., object]] = {"unmerged": model}
    runs |= {"merged": with_kernels(kernels), "eager": with_kernels(None)}
    seconds = timing.timed(runs, [(images,)], 1, 1.5)
    return end_to_end_row(seconds, merged.macs(merged=False) / merged.macs())


def end_to_end_row(seconds: Mapping[str, timing.Array], macs_ratio: float) -> dict[str, Any]:
    """Speed-ups from the seconds of all variants, ``[rounds]`` each."""
    speedup = timing.medians_over(seconds, "unmerged")
    return {
        "rounds": len(seconds["unmerged"]),
        "macs_ratio": macs_ratio,
        "seconds": {name: percentiles(values) for name, values in seconds.items()},
        "speedup": speedup,
        "speedup_over_macs_ratio": {name: value / macs_ratio for name, value in speedup.items()},
    }


@torch.inference_mode()
def profiled(module: nn.Module, images: Tensor) -> dict[str, Any]:
    """Which attention PyTorch takes, and the kernels that take the most time.

    Returns:
        ``attention``: calls of each scaled-dot-product operator; ``kernels``: share of the GPU's
        time of the ten longest, by name.
    """
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU]
    if images.is_cuda:
        activities.append(ProfilerActivity.CUDA)
    module(images)
    with profile(activities=activities) as profiler:
        module(images)
        if images.is_cuda:
            torch.cuda.synchronize()
    averages = profiler.key_averages()
    used = {
        event.key.removeprefix("aten::_scaled_dot_product_"): event.count
        for event in averages
        if event.key.startswith("aten::_scaled_dot_product_")
    }
    times = {
        event.key[:120]: float(event.self_device_time_total)
        for event in averages
        if str(event.device_type).endswith("CUDA") and event.self_device_time_total > 0
    }
    total = sum(times.values()) or 1.0
    longest = sorted(times.items(), key=lambda item: -item[1])[:10]
    return {"attention": used, "kernels": {name: value / total for name, value in longest}}
