"""Facts of a patched model: its outputs, and digests of its weights."""

from __future__ import annotations

import hashlib
import re
from typing import TYPE_CHECKING

from tome_export.errors import InputError
from tome_export.spec import ENTROPY, FEATURES, SOURCE_MAP

if TYPE_CHECKING:
    from torch import Tensor, nn

    from tome_export.patch import MergedModel

_POSITIONS = re.compile(r"pos_embed|position|rope|rel_pos|relative_pos")
"""In the names of tensors that are resampled or computed anew for another image size."""


def fake_outputs(model: MergedModel) -> tuple[Tensor, ...]:
    """Outputs for a batch of one with shapes and dtypes but no data."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    from tome_export.patch.precision import copy_sharing_weights

    if model.map_name is not None:
        # A user's head may keep what it made in a pass.
        model = copy_sharing_weights(model)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        extra = (torch.zeros(1, *shape) for shape in model.extra_inputs.values())
        pixels = torch.zeros(1, *model.pixel_shape, dtype=model.pixel_dtype)
        found = model(pixels, *extra)
    return found if isinstance(found, tuple) else (found,)


def output_shape(model: MergedModel) -> tuple[int, ...]:
    """Shape of the main output for one image."""
    return tuple(int(size) for size in fake_outputs(model)[0].shape[1:])


def output_names(name: str, model: MergedModel) -> list[str]:
    """Names of a model's outputs."""
    settings = model.settings
    main = FEATURES if settings.dense else name
    asked = ((SOURCE_MAP, settings.source_map), (ENTROPY, settings.entropy))
    return [main, *(output for output, given in asked if given)]


def check_memory(model: MergedModel, images: int) -> None:
    """Refuse to run a model on so many images at once where this machine cannot hold them.

    What is counted is what grows with the square of the tokens, float32 and there at the same time
    (as ONNX Runtime was seen to hold it): logits of one attention ``[B, H, N, N]`` and their
    softmax, and about three times as much as of one head for the bias and the match.

    Raises:
        InputError: if they take more than the memory that is free.
    """
    import psutil

    tokens = max((layer.attended for layer in model.layers), default=0)
    sequences = images * max((layer.sequences for layer in model.layers), default=1)
    needed = 4 * sequences * (2 * _heads(model) + 3) * tokens**2
    free = psutil.virtual_memory().available
    if needed > free:
        size = "x".join(map(str, model.image_size[1:]))
        raise InputError(
            f"images of {size} have {tokens:,} tokens, whose attention takes "
            f"{needed / 2**30:.1f} GiB for {images} of them at once; {free / 2**30:.1f} GiB are "
            "free here: use a smaller image size or batch, or a machine with more memory"
        )


def _heads(model: MergedModel) -> int:
    """Heads of the first block's attention; 1 where its library has no name for them."""
    names = ("num_heads", "num_attention_heads")
    parts = (part for block in model.blocks[:1] for part in block.modules())
    found = (getattr(part, name, None) for part in parts for name in names)
    return next((heads for heads in found if isinstance(heads, int)), 1)


def state_sha256(model: MergedModel) -> str:
    """Digest of the library model's weights by name, shape and value: the same ones anywhere."""
    return _digest(model.model)


def common_sha256(model: MergedModel) -> str:
    """Digest of the weights that a model has at every image size: all but those of positions."""
    return _digest(model.model, skip=_POSITIONS)


def learned_sha256(model: MergedModel) -> str | None:
    """Digest of what reducer and compressor learned; None where neither learns anything."""
    parts = [part for part in (model.reducer, model.compressor) if part and part.state_dict()]
    return ",".join(map(_digest, parts)) or None


def _digest(module: nn.Module, skip: re.Pattern[str] | None = None) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        if skip is not None and skip.search(name):
            continue
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
