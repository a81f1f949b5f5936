"""Write the tables of docs/over-merging.md: what thresholds mean, and what vit_digits shows.

python scripts/over_merging.py
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tome_export.merge.entropy import effective_tokens, uniform_entropy

PAGE = Path(__file__).parents[1] / "docs" / "over-merging.md"
ARITHMETIC = ("<!-- arithmetic by scripts/over_merging.py -->\n", "<!-- end of arithmetic -->")
MEASURED = ("<!-- measured by scripts/over_merging.py -->\n", "<!-- end of measured -->")

PATCHES = (196, 576)
"""Of 224 pixels in patches of 16, and of LLaVA's tower: 336 pixels in patches of 14."""

THRESHOLDS = (0.2734, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
EVEN = (4, 8, 16, 49, 98)
RS = (0, 2, 4, 8, 12, 16, 24)


def table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table."""
    lines = [headers, ["---"] * len(headers), *rows]
    return [f"| {' | '.join(cells)} |" for cells in lines]


def arithmetic() -> str:
    """Effective tokens of thresholds, and thresholds of even tokens."""
    names = [f"of {patches} patches" for patches in PATCHES]
    allowed = [
        [f"{h:g}", *(f"{effective_tokens(h, patches):.1f}" for patches in PATCHES)]
        for h in THRESHOLDS
    ]
    even = [[str(k), *(f"{uniform_entropy(k, patches):.4f}" for patches in PATCHES)] for k in EVEN]
    figure = THRESHOLDS[0]
    whole = math.exp(figure * math.log(197))
    return "\n".join(
        [
            "Effective tokens that a threshold allows:",
            "",
            *table(["threshold", *names], allowed),
            "",
            "Entropy of K equally large tokens:",
            "",
            *table(["K", *names], even),
            "",
            f"With the class token counted, as in the figure's own form, exp({figure} log 197) = "
            f"{whole:.2f} effective tokens of 197.",
            "",
        ]
    )


def entropies(r: int) -> tuple[np.ndarray, float, int, int]:
    """Of vit_digits on its test images: entropy of each, top-1, final tokens and patches."""
    import torch

    from tome_export.data.samples import labelled_samples
    from tome_export.models import resolve
    from tome_export.patch import patch

    recipe = resolve("vit_digits")
    samples = labelled_samples(recipe)
    assert samples is not None, "vit_digits has images of its own"  # noqa: S101
    pixels, labels = samples
    model = patch(recipe.load(weights="pretrained", seed=0).module, r, entropy=True).eval()
    with torch.inference_mode():
        logits, entropy = model(torch.from_numpy(pixels))
    top1 = float((logits.argmax(dim=1).numpy() == labels).mean())
    left = model.layers[-1].tokens_out - model.prefix
    return entropy.numpy(), top1, left, model.tower.tokens - model.prefix


def measured() -> str:
    """What vit_digits shows at several r."""
    rows, patches, images = [], 0, 0
    for r in RS:
        found, top1, left, patches = entropies(r)
        images = len(found)
        few = [float(found.min()), float(np.percentile(found, 5)), float(np.median(found))]
        shown = [f"{h:.2f} ({effective_tokens(h, patches):.1f})" for h in few]
        ceiling = f"{uniform_entropy(left, patches):.2f}"
        rows.append([str(r), str(left), ceiling, *shown, f"{100 * top1:.2f} %"])
    headers = ["r", "final patch tokens", "even", "least", "5th percentile", "median", "top-1"]
    return "\n".join(
        [
            f"vit_digits, {patches} patches, on its {images} test images; in brackets effective "
            "tokens:",
            "",
            *table(headers, rows),
            "",
        ]
    )


def written(page: str, marks: tuple[str, str], text: str) -> str:
    """The page with other text between two marks."""
    before, _, rest = page.partition(marks[0])
    _, end, after = rest.partition(marks[1])
    if not end:
        raise SystemExit(f"{PAGE} lacks the marks {marks[0].strip()} and {marks[1]}")
    return before + marks[0] + text + end + after


def main() -> None:
    """Write both tables."""
    page = PAGE.read_text(encoding="utf-8")
    page = written(page, ARITHMETIC, arithmetic())
    PAGE.write_text(written(page, MEASURED, measured()), encoding="utf-8")


if __name__ == "__main__":
    main()
