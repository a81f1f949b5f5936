"""The entropy output of shipped graph and twin is checked against the plans."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tome_export.merge.entropy import entropy_bound
from tome_export.onnx.export import ExportOptions, onnx_from_model
from tome_export.parity.compare import check_parity
from tome_export.patch import patch
from tome_export.reducers import reducer_from_text
from tome_export.runtime.ort import OrtRunner
from tome_export.spec import BatchRange

BATCH = BatchRange(1, 2, 4)
NAMES = ["features", "source_map", "entropy"]
FAILURE = "the entropy of 3 of 3 images does not follow from their merge plans"


class Changed(OrtRunner):
    """Gives another entropy where the graph is the shipped one, or its twin."""

    twin = False

    def infer(self, inputs: Any) -> Any:
        results = super().infer(inputs)
        if (len(results) > len(NAMES)) == self.twin:
            self.change(results)
        return results

    def change(self, results: Any) -> None:
        results["entropy"] = results["entropy"] + np.float32(1e-3)


class ChangedTwin(Changed):
    twin = True


class Undefined(Changed):
    def change(self, results: Any) -> None:
        results["entropy"] = results["entropy"] * np.float32(np.nan)


class Without(Changed):
    def change(self, results: Any) -> None:
        del results["entropy"]


def exported(model: Any, path: Any, precision: str = "fp32") -> Any:
    onnx_from_model(model, path, ExportOptions(batch=BATCH, precision=precision), NAMES)
    return path


def test_a_wrong_entropy_is_found_in_either_graph(make_vit, make_images, tmp_path):
    model = patch(make_vit(depth=2), [9, 9], source_map=True, entropy=True)
    path = exported(model, tmp_path / "model.onnx")
    images = make_images(model, 3)
    for runner in (Changed, ChangedTwin, Undefined, Without):
        report = check_parity(model, path, images, "fp32", BATCH, runner_factory=runner)
        assert (report.entropy_defects, report.failures) == (3, (FAILURE,))
    report = check_parity(model, path, images, "fp32", BATCH)
    assert (report.entropy_defects, report.source_map_defects, report.failures) == (0, 0, ())
    assert len(report.entropy) == 3
    assert all(0 < value < 1 for value in report.entropy)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("reducer", ["tome", "topk"])
def test_it_holds_in_half_precision_and_where_tokens_are_dropped(
    make_vit, make_images, tmp_path, reducer, precision
):
    chosen = reducer_from_text(reducer)
    model = patch(make_vit(depth=2), [9, 8], source_map=True, entropy=True, reducer=chosen)
    path = exported(model, tmp_path / "model.onnx", precision)
    report = check_parity(model, path, make_images(model, 3), precision, BATCH)
    assert (report.entropy_defects, report.source_map_defects, report.failures) == (0, 0, ())
    if reducer == "topk":
        dropped = np.log(64 - 17) / np.log(64)
        assert np.allclose(report.entropy, dropped, atol=entropy_bound(64))


def test_nothing_merged_is_one(make_vit, make_images, tmp_path):
    model = patch(make_vit(depth=2), 0, source_map=True, entropy=True)
    path = exported(model, tmp_path / "model.onnx")
    report = check_parity(model, path, make_images(model, 2), "fp32", BATCH)
    assert (report.entropy_defects, report.entropy, report.failures) == (0, (1.0, 1.0), ())


def test_without_the_output_it_is_counted_all_the_same(make_vit, make_images, tmp_path):
    model = patch(make_vit(depth=2), [9, 9])
    path = tmp_path / "model.onnx"
    onnx_from_model(model, path, ExportOptions(batch=BATCH), ["features"])
    images = make_images(model, 3)
    report = check_parity(model, path, images, "fp32", BATCH)
    assert report.entropy_defects is None
    given = patch(make_vit(depth=2), [9, 9], entropy=True)
    import torch

    with torch.no_grad():
        expected = given(torch.from_numpy(images))[1].numpy()
    assert np.allclose(report.entropy, expected, atol=entropy_bound(64))
