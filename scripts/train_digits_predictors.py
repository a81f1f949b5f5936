"""Train DynamicViT's predictors for vit_digits, whose own weights stay as they are.

    python scripts/train_digits_predictors.py

Writes models/data/dynamicvit_digits.safetensors, the predictors alone, and prints the top-1 on the
450 test images at several keep rates. As in the paper (arXiv 2106.02034, section 3.3) tokens are
kept by Gumbel-softmax, a dropped one is masked out of attention, and the loss adds the squared
distance of the shares kept from those wanted to the cross-entropy and the divergence from the
unmerged model. Fixed seed and thread count: a second run gives the same.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor
from torch.nn import functional
from train_vit_digits import DATA, RECIPE, SEED, augment, digits_split, pixels, top1

from tome_export.patch import patch
from tome_export.reducers.base import Tower
from tome_export.reducers.dynamicvit import DynamicViT, Predictors
from tome_export.reducers.stages import KEEP

RATIO_WEIGHT = 2.0
"""Of the shares kept, in the loss (the paper's lambda_ratio)."""


def masked_block(block: Any, x: Tensor, mask: Tensor) -> Tensor:
    """A timm block whose attention leaves out the tokens that ``mask [B, N]`` has at 0."""
    attn = block.attn
    batch, tokens, width = x.shape
    heads = (batch, tokens, 3, attn.num_heads, width // attn.num_heads)
    q, k, v = attn.qkv(block.norm1(x)).reshape(heads).permute(2, 0, 3, 1, 4)
    scores = q @ k.transpose(-1, -2) * attn.scale
    weight = (scores - scores.amax(dim=-1, keepdim=True)).exp()
    # A token always sees itself (the paper's equation 10), so that no row is empty.
    seen = mask[:, None, :] + (1 - mask[:, None, :]) * torch.eye(tokens)
    weight = weight * seen[:, None]
    weight = weight / weight.sum(dim=-1, keepdim=True)
    x = x + attn.proj((weight @ v).transpose(1, 2).flatten(-2))
    return x + block.mlp(block.norm2(x))


def forward(model: Any, predictors: Predictors, at: list[int], x: Tensor) -> tuple[Tensor, Tensor]:
    """Logits, and the share of patches that each stage keeps, ``[B, stages]``."""
    x = model.norm_pre(model._pos_embed(model.patch_embed(x)))
    mask = torch.ones(x.shape[:2])
    shares = []
    for layer, block in enumerate(model.blocks):
        if layer in at:
            predictor, patches = predictors.score_predictor[at.index(layer)], x[:, 1:]
            local, part = predictor.in_conv(patches).chunk(2, dim=-1)
            still = mask[:, 1:, None]
            mean = (part * still).sum(dim=1, keepdim=True) / still.sum(dim=1, keepdim=True)
            scores = predictor.out_conv(torch.cat([local, mean.expand_as(part)], dim=-1))
            kept = functional.gumbel_softmax(scores.log_softmax(dim=-1), hard=True)[..., 0]
            mask = torch.cat([mask[:, :1], mask[:, 1:] * kept], dim=1)
            shares.append(mask[:, 1:].mean(dim=1))
        x = masked_block(block, x, mask)
    return model.forward_head(model.norm(x)), torch.stack(shares, dim=1)


def train(model: Any, x: Tensor, y: Tensor, epochs: int, batch: int) -> Predictors:
    """Train the predictors alone."""
    torch.manual_seed(SEED)
    generator = torch.Generator().manual_seed(SEED)
    depth = len(model.blocks)
    reducer = DynamicViT(weights="random")
    tower = Tower(model.embed_dim, depth, 1 + model.patch_embed.num_patches, 1)
    at = [layer + 1 for layer, r in enumerate(reducer.counts(tower).per_layer or ()) if r]
    predictors = Predictors(model.embed_dim, len(at)).train()
    wanted = torch.tensor([KEEP ** (stage + 1) for stage in range(len(at))])
    optimizer = torch.optim.AdamW(predictors.parameters(), lr=2e-3, weight_decay=0.05)
    for epoch in range(epochs):
        total = 0.0
        order = torch.randperm(len(x), generator=generator)
        for rows in order[: len(x) // batch * batch].view(-1, batch):
            images = augment(x[rows], generator)
            with torch.no_grad():
                teacher = model(images)
            logits, shares = forward(model, predictors, at, images)
            loss = functional.cross_entropy(logits, y[rows])
            loss = loss + functional.kl_div(
                logits.log_softmax(dim=1), teacher.log_softmax(dim=1), reduction="batchmean",
                log_target=True,
            )  # fmt: skip
            loss = loss + RATIO_WEIGHT * ((shares.mean(dim=0) - wanted) ** 2).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item()
        print(
            f"epoch {epoch + 1}/{epochs}  loss {total * batch / len(x):.4f}  {shares.mean(dim=0)}"
        )
    return predictors.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--output", type=Path, default=DATA, help="folder to write to")
    options = parser.parse_args()
    torch.set_num_threads(2)
    torch.use_deterministic_algorithms(True)

    train_images, test_images, train_labels, test_labels = digits_split()
    model = RECIPE.load().module.requires_grad_(False)
    predictors = train(
        model, pixels(train_images), torch.from_numpy(train_labels), options.epochs, options.batch
    )
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "dynamicvit_digits.safetensors"
    path.write_bytes(save({key: v.contiguous() for key, v in predictors.state_dict().items()}))
    test_x, test_y = pixels(test_images), torch.from_numpy(test_labels)
    for keep in (0.9, KEEP, 0.5, 0.3):
        for weights in (str(path), "random"):
            merged = patch(model, None, reducer=DynamicViT(weights=weights, keep=(keep,))).eval()
            name = "trained" if weights != "random" else "random"
            print(f"keep {keep:g}, {name}: test top-1 {top1(merged, test_x, test_y):.4f}")


if __name__ == "__main__":
    main()
