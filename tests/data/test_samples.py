from __future__ import annotations

import numpy as np
import pytest
import torch

from tome_export.data.samples import digits_test, sample_paths, sample_pixels
from tome_export.errors import InputError
from tome_export.models import RECIPES
from tome_export.models.facts import DATA
from tome_export.patch import patch


def test_sizes_of_what_is_shipped():
    assert len(sample_paths()) == 6
    assert all(path.stat().st_size <= 50_000 for path in sample_paths())
    assert (DATA / "vit_digits.safetensors").stat().st_size < 2_000_000
    assert (DATA / "digits_test.npz").stat().st_size < 50_000
    readme = (DATA / "README.md").read_text()
    assert all(path.name in readme for path in DATA.iterdir() if path.name != "README.md")


def test_photographs_all_differ():
    pixels = sample_pixels(RECIPES["vit_b32"], 24)
    assert pixels.shape == (24, 3, 224, 224)
    assert pixels.dtype == np.float32
    assert len({image.tobytes() for image in pixels}) == 24
    np.testing.assert_array_equal(sample_pixels(RECIPES["vit_b32"], 3), pixels[:3])


@pytest.mark.parametrize(("name", "count", "most"), [("vit_b16", 25, 24), ("vit_digits", 451, 450)])
def test_more_than_there_are(name, count, most):
    message = f"{count} sample images were asked for {name}; there are {most}"
    with pytest.raises(InputError, match=message):
        sample_pixels(RECIPES[name], count)


def test_digits():
    pixels, labels = digits_test()
    assert pixels.shape == (450, 1, 32, 32)
    assert (pixels.dtype, labels.dtype) == (np.float32, np.int64)
    assert -1 <= pixels.min() < pixels.max() <= 1
    assert np.bincount(labels).min() >= 40
    np.testing.assert_array_equal(sample_pixels(RECIPES["vit_digits"], 5), pixels[:5])


@pytest.mark.parametrize("r", [0, 8])
@torch.inference_mode()
def test_digits_accuracy_of_the_shipped_weights(r):
    pixels, labels = digits_test()
    model = patch(RECIPES["vit_digits"].load().module, r)
    found = model(torch.from_numpy(pixels)).argmax(dim=1).numpy()
    assert (found == labels).mean() >= 0.98


def test_digits_tokens():
    model = patch(RECIPES["vit_digits"].load().module, RECIPES["vit_digits"].merging.r)
    assert [layer.tokens_in for layer in model.layers] == [65, 57, 49, 41, 33, 25]


def test_digits_are_the_split_that_was_not_trained_on():
    datasets = pytest.importorskip("sklearn.datasets", reason="scikit-learn is not installed")
    digits = datasets.load_digits()
    known = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    with np.load(DATA / "digits_test.npz") as archive:
        images, labels = archive["images"], archive["labels"]
    index = {(image.tobytes(), label) for image, label in zip(known, digits.target, strict=True)}
    pairs = zip(images, labels, strict=True)
    assert all((image.tobytes(), label) in index for image, label in pairs)
