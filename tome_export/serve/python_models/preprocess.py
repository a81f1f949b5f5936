"""Encoded images to ``pixel_values``, as the artifact's recipe does it; runs inside the server.

Input ``image`` BYTES ``[B, 1]``: one whole JPEG or PNG file each. Output ``pixel_values`` FP32
``[B, C, H, W]``. ``preprocessing.json`` beside this file says how. An image that cannot be used
fails the request it came with, and no other.
"""

from __future__ import annotations

import io
import json
import math
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

try:
    from PIL import Image, ImageOps, UnidentifiedImageError
except ImportError as error:
    # NVIDIA's container of the server comes without it.
    raise ImportError(
        "the server's Python has no Pillow, which decodes images; pip install pillow there"
    ) from error

SETTINGS = "preprocessing.json"
FORMATS = ("JPEG", "PNG")
MODES = {1: "L", 3: "RGB"}


class BadImageError(ValueError):
    """Bytes that are not an image this model can use; the message is for the client."""


class TritonPythonModel:
    """What the python backend calls."""

    def initialize(self, args: dict[str, str]) -> None:
        """Read the settings, and start the threads that decode (Pillow releases the GIL)."""
        folder = Path(args["model_repository"]) / args["model_version"]
        self.settings = json.loads((folder / SETTINGS).read_text())
        # The process is ours alone. Our limit is checked from the header, before any decoding.
        Image.MAX_IMAGE_PIXELS = None
        Image.preinit()
        self.threads = ThreadPoolExecutor(min(4, len(os.sched_getaffinity(0))))

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer each request, with pixels or an error of its own."""
        import triton_python_backend_utils as pb_utils

        batches = [
            pb_utils.get_input_tensor_by_name(request, "image").as_numpy().reshape(-1)
            for request in requests
        ]
        # All images of all requests are on their way before the first one is waited for.
        waiting = [
            [self.threads.submit(pixels_from_bytes, data, self.settings) for data in batch]
            for batch in batches
        ]
        responses = []
        for futures in waiting:
            problem = _problem([future.exception() for future in futures])
            if problem:
                error = pb_utils.TritonError(problem, pb_utils.TritonError.INVALID_ARG)
                responses.append(pb_utils.InferenceResponse(error=error))
                continue
            pixels = np.stack([future.result() for future in futures])
            responses.append(pb_utils.InferenceResponse([pb_utils.Tensor("pixel_values", pixels)]))
        return responses

    def finalize(self) -> None:
        """Let the threads end with the model."""
        self.threads.shutdown(cancel_futures=True)


def _problem(errors: list[BaseException | None]) -> str:
    """What is wrong with a request, from the outcome of each of its images; empty if nothing."""
    if not errors:
        return "the request holds no image; expected 1 or more"
    found = next((pair for pair in enumerate(errors, 1) if pair[1] is not None), None)
    if found is None:
        return ""
    where = f" {found[0]} of {len(errors)}" if len(errors) > 1 else ""
    return f"image{where} {found[1]}"


def pixels_from_bytes(data: bytes, settings: dict[str, Any]) -> np.ndarray[Any, Any]:
    """Decode and preprocess one image.

    Args:
        data: A JPEG or PNG file.
        settings: ``input_size`` [C, H, W], ``mean``, ``std``, ``crop_pct``, ``interpolation``,
            ``max_pixels``.

    Returns:
        ``[C, H, W]`` float32.

    Raises:
        BadImageError: if it is no such file, damaged, cut short, or too large.
    """
    try:
        return pixels_from_image(_decoded(data, settings["max_pixels"]), settings)
    except BadImageError:
        raise
    # Whatever a decoder trips over in a damaged file is that file's fault.
    except (Exception, MemoryError) as error:
        reason = (str(error).splitlines() or [""])[0] or type(error).__name__
        raise BadImageError(
            f"cannot be decoded ({reason}); the file is damaged or cut short, send it whole"
        ) from None


def _decoded(data: bytes, max_pixels: int) -> Image.Image:
    """Upright, as mode ``L`` or ``RGB``."""
    if not data:
        raise BadImageError("is empty; expected the bytes of a JPEG or PNG file")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        raise BadImageError(
            f"is not a JPEG or PNG file (it begins with {bytes(data[:8])!r}); send one whole"
        ) from None
    with image:
        _check_size(image.size, max_pixels)
        image.load()
        upright = ImageOps.exif_transpose(image)
    return _eight_bit(upright)


def _check_size(size: tuple[int, int], max_pixels: int) -> None:
    if size[0] * size[1] > max_pixels:
        raise BadImageError(
            f"is {size[0]} x {size[1]} pixels ({size[0] * size[1] / 1e6:.1f} megapixels); "
            f"at most {max_pixels / 1e6:.1f} megapixels are accepted, send a smaller one"
        )


def _eight_bit(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        # 16-bit samples are scaled: Pillow's own conversion would clip them at 255.
        samples = np.asarray(image).astype(np.int64)
        if samples.min() < 0 or samples.max() > 0xFFFF:
            raise BadImageError("has more than 16 bits per channel; send 8 or 16 bits")
        return Image.fromarray((samples >> 8).astype(np.uint8))
    if "transparency" in image.info or image.mode in ("RGBA", "RGBa", "LA", "La", "PA"):
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image if image.mode in ("L", "RGB") else image.convert("RGB")


def pixels_from_image(image: Image.Image, settings: dict[str, Any]) -> np.ndarray[Any, Any]:
    """Preprocess one decoded image; see ``pixels_from_bytes``."""
    channels, height, width = settings["input_size"]
    image = image.convert(MODES[channels])
    resampling = Image.Resampling[settings["interpolation"].upper()]
    size = _resized(image.size, height, width, settings["crop_pct"])
    if size[0] * size[1] > max(settings["max_pixels"], 16 * height * width):
        raise BadImageError(
            f"is {image.size[0]} x {image.size[1]} pixels, which would be resized to "
            f"{size[0]} x {size[1]}; send one whose sides differ less"
        )
    image = _centre_crop(image.resize(size, resampling), height, width)
    x = np.asarray(image, dtype=np.float32).reshape(height, width, channels).transpose(2, 0, 1)
    mean = np.asarray(settings["mean"], np.float32)[:, None, None]
    std = np.asarray(settings["std"], np.float32)[:, None, None]
    return np.ascontiguousarray((x / np.float32(255) - mean) / std)


def _resized(size: tuple[int, int], height: int, width: int, crop_pct: float) -> tuple[int, int]:
    """Size before the crop: the shorter side, or the smallest that covers, in proportion."""
    target_h, target_w = math.floor(height / crop_pct), math.floor(width / crop_pct)
    w, h = size
    if target_h == target_w:
        longer = int(target_h * max(w, h) / min(w, h))
        return (target_h, longer) if w <= h else (longer, target_h)
    ratio = min(h / target_h, w / target_w)
    return round(w / ratio), round(h / ratio)


def _centre_crop(image: Image.Image, height: int, width: int) -> Image.Image:
    """Cut around the centre; black borders where the image is smaller."""
    w, h = image.size
    left = round((w - width) / 2) if w >= width else -((width - w) // 2)
    top = round((h - height) / 2) if h >= height else -((height - h) // 2)
    return image.crop((left, top, left + width, top + height))
