"""Train vit_digits on scikit-learn's digits and write its weights and test images.

    python scripts/train_vit_digits.py

Writes models/data/vit_digits.safetensors and models/data/digits_test.npz, and prints the top-1 on
the 450 test images, unmerged and merged. Fixed seed and thread count: a second run gives the same.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import cast

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional

from tome_export.data.preprocess import pixels_from_image
from tome_export.models import resolve
from tome_export.models.timm.loader import TimmLoader
from tome_export.patch import patch

DATA = Path(__file__).parent.parent / "models" / "data"
RECIPE = resolve("vit_digits")
TEST_IMAGES = 450
SEED = 0


def pixels(images: np.ndarray) -> Tensor:
    """``[B, 8, 8]`` uint8 to ``[B, 1, 32, 32]`` float32, as a user's images are made."""
    rows = [pixels_from_image(Image.fromarray(image), RECIPE.preprocessing) for image in images]
    return torch.from_numpy(np.stack(rows))


def augment(x: Tensor, generator: torch.Generator) -> Tensor:
    """Turn by up to 12 degrees, scale by up to 12%, shift by up to 3 of 32 pixels, at random."""

    def uniform(limit: float) -> Tensor:
        return (torch.rand(len(x), generator=generator) * 2 - 1) * limit

    angle, scale = uniform(math.radians(12)), 1 + uniform(0.12)
    cos, sin = angle.cos() * scale, angle.sin() * scale
    shift = 3 * 2 / 32
    theta = torch.stack([cos, -sin, uniform(shift), sin, cos, uniform(shift)], dim=1)
    grid = functional.affine_grid(theta.view(-1, 2, 3), list(x.shape), align_corners=False)
    # Outside the picture is background: shift it to 0 while sampling, which pads with zeros.
    return functional.grid_sample(x + 1, grid, align_corners=False) - 1


def train(x: Tensor, y: Tensor, epochs: int, batch: int) -> nn.Module:
    """Train with AdamW, one-cycle cosine learning rate and label smoothing.

    A share of the patches is dropped in each step: faster, and the model learns not to need every
    single token, which is what merging asks of it.
    """
    torch.manual_seed(SEED)
    generator = torch.Generator().manual_seed(SEED)
    loader = cast(TimmLoader, RECIPE.source.loader)
    model = loader.create(patch_drop_rate=0.25)
    model.train()
    decay = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decay, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=2e-3)
    steps = epochs * (len(x) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    start = time.perf_counter()
    for epoch in range(epochs):
        total = 0.0
        order = torch.randperm(len(x), generator=generator)
        for rows in order[: len(x) // batch * batch].view(-1, batch):
            logits = model(augment(x[rows], generator))
            loss = functional.cross_entropy(logits, y[rows], label_smoothing=0.05)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            total += loss.item()
        if epoch % 10 == 9:
            seconds = time.perf_counter() - start
            print(f"epoch {epoch + 1}/{epochs}  loss {total * batch / len(x):.4f}  {seconds:.0f} s")
    return model.eval()


@torch.inference_mode()
def top1(model: nn.Module, x: Tensor, y: Tensor) -> float:
    return float((model(x).argmax(dim=1) == y).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--output", type=Path, default=DATA, help="folder to write to")
    options = parser.parse_args()
    torch.set_num_threads(2)
    torch.use_deterministic_algorithms(True)

    digits = load_digits()
    # Ink is 0 to 16 in the data set; stored as ordinary 8-bit grey pictures.
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    train_images, test_images, train_labels, test_labels = train_test_split(
        images, digits.target, test_size=TEST_IMAGES, random_state=SEED, stratify=digits.target
    )
    x, y = pixels(train_images), torch.from_numpy(train_labels)
    model = train(x, y, options.epochs, options.batch)

    options.output.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    weights = options.output / "vit_digits.safetensors"
    weights.write_bytes(save(state))
    np.savez_compressed(
        options.output / "digits_test.npz", images=test_images, labels=test_labels.astype(np.int64)
    )
    test_x, test_y = pixels(test_images), torch.from_numpy(test_labels)
    print(f"train top-1 {top1(model, x, y):.4f}")
    written = RECIPE.load(weights=str(weights)).module
    print(f"test top-1 unmerged {top1(written, test_x, test_y):.4f}")
    for r in (4, 8, 10, 12):
        merged = patch(written, r)
        tokens = [layer.tokens_out for layer in merged.layers]
        print(f"test top-1 r={r} {top1(merged, test_x, test_y):.4f}  tokens {tokens}")


if __name__ == "__main__":
    main()
