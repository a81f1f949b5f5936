"""What parity is checked on: the same images from a folder, from shards and from one file."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest

from tome_export.data.images import LIMIT, image_names, parity_images
from tome_export.errors import InputError
from tome_export.models import resolve

spec = importlib.util.spec_from_file_location(
    "data_layouts", __file__.replace("test_images", "conftest")
)
layouts = importlib.util.module_from_spec(spec)
spec.loader.exec_module(layouts)
png = layouts.png
SIZE = (1, 32, 32)


@pytest.fixture(scope="module")
def recipe():
    return resolve("vit_digits")


def test_a_folder_shards_and_a_file(tmp_path, recipe):
    names = [f"{n % 3}/{n:02}.png" for n in range(LIMIT + 2)]
    folder = layouts.write_tree(tmp_path / "tree", names)
    in_order = sorted(names)[:LIMIT]
    found = parity_images(recipe, SIZE, folder, 4)
    assert found.shape == (LIMIT, *SIZE)
    assert image_names(folder, LIMIT) == [f"{folder}/{name}" for name in in_order]
    members = [(name, png(int(name[2:4]))) for name in in_order]
    tar = layouts.write_tar(tmp_path / "s.tar", members)
    np.testing.assert_array_equal(parity_images(recipe, SIZE, tar, 4), found)
    layouts.write_parquet(tmp_path / "s.parquet", [data for _, data in members], None)
    np.testing.assert_array_equal(parity_images(recipe, SIZE, tmp_path / "s.parquet", 4), found)
    one = folder / in_order[5]
    np.testing.assert_array_equal(parity_images(recipe, SIZE, one, 4), found[5:6])
    assert image_names(one, 1) == [str(one)]


def test_an_image_that_cannot_be_read_is_named(tmp_path, recipe):
    folder = layouts.write_tree(tmp_path / "tree", ["a.png"])
    (folder / "b.png").symlink_to("nowhere")
    with pytest.raises(InputError) as caught:
        parity_images(recipe, SIZE, folder, 4)
    assert str(caught.value) == (
        f"image {folder / 'b.png'} cannot be read (No such file or directory); expected an image "
        "file"
    )
    (folder / "b.png").unlink()
    (folder / "b.png").write_bytes(png(1)[:60])
    with pytest.raises(InputError, match=rf"^image {folder / 'b.png'} cannot be decoded \("):
        parity_images(recipe, SIZE, folder, 4)
