"""Make the sample images under models/data: photographs and a digit.

    python scripts/make_samples.py

The photographs are scikit-image's, in the public domain or CC0. Each is scaled to a shorter side of
384 pixels (the largest input of a recipe) where it is larger, and saved as a JPEG of at most 50 KB.
The digit is the first test image of ``vit_digits``.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image
from skimage import data

DATA = Path(__file__).parent.parent / "models" / "data"
NAMES = ("astronaut", "chelsea", "coffee", "rocket", "hubble_deep_field", "camera")
SIDE = 384
LIMIT_BYTES = 50_000


def encode(image: Image.Image) -> bytes:
    for quality in range(90, 20, -5):
        stream = io.BytesIO()
        image.save(stream, "JPEG", quality=quality, optimize=True)
        if stream.tell() <= LIMIT_BYTES:
            return stream.getvalue()
    raise SystemExit(f"no quality brings an image under {LIMIT_BYTES} bytes")


def main() -> None:
    for name in NAMES:
        image = Image.fromarray(getattr(data, name)())
        scale = min(1.0, SIDE / min(image.size))
        size = (round(image.width * scale), round(image.height * scale))
        content = encode(image.resize(size, Image.Resampling.LANCZOS))
        (DATA / f"{name}.jpg").write_bytes(content)
        print(f"{name}.jpg {size[0]}x{size[1]} {len(content)} bytes")
    digits = np.load(DATA / "digits_test.npz")
    Image.fromarray(digits["images"][0]).save(DATA / "digit.png")
    print(f"digit.png is a {digits['labels'][0]}")


if __name__ == "__main__":
    main()
