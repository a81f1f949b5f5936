"""Small labelled pictures in every layout."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tome_export.data.labels import Classes


def png(seed: int, size: int = 8) -> bytes:
    """A grey picture that differs from the others."""
    values = np.random.default_rng(seed).integers(0, 256, (size, size), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(values).save(stream, "PNG")
    return stream.getvalue()


def write_tree(root: Path, names: list[str]) -> Path:
    """Pictures under the given relative names."""
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(png(number))
    return root


def write_tar(path: Path, members: list[tuple[str, bytes]], mode: str = "w") -> Path:
    """A tar file of these members."""
    with tarfile.open(path, mode) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def members(count: int, form: str = "cls", classes: int = 3) -> list[tuple[str, bytes]]:
    """Samples as webdataset writes them; ``form`` is of their labels."""
    found = []
    for n in range(count):
        label = str(n % classes)
        data = label if form == "cls" else json.dumps({"label": n % classes, "x": None})
        found += [(f"a/{n:03}.left.png", png(n)), (f"a/{n:03}.{form}", data.encode())]
    return found


def write_parquet(path: Path, images: list, labels: list | None, rows: int = 4) -> Path:
    """Rows with small row groups."""
    import pyarrow
    from pyarrow import parquet

    columns = {"image": images} | ({"label": labels} if labels is not None else {})
    parquet.write_table(pyarrow.table(columns), path, row_group_size=rows)
    return path


@pytest.fixture
def ten() -> Classes:
    """Ten classes without names."""
    return Classes(10)


@pytest.fixture
def named() -> Classes:
    """Classes with names, two of them equal."""
    return Classes(5, ("cat", "dog", "crane", "owl", "crane"))
