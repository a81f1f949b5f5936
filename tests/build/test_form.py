"""Which form the merge takes: plugins and batch sizes, and what ``auto`` knows of both."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from tome_export.build import BuildRequest, build
from tome_export.build.engine import EngineRequest, add_engine
from tome_export.build.form import choose_form, fit_form
from tome_export.engine import BUILDERS, EngineOptions, Selection, gpu, limits
from tome_export.errors import ExportError, InputError, UsageError
from tome_export.merge.schedule import Schedule
from tome_export.onnx.files import load
from tome_export.patch import patch
from tome_export.plugins import choice
from tome_export.runtime import ort
from tome_export.spec import BatchRange

BUILD = sys.modules["tome_export.build.main"]
FORM = sys.modules["tome_export.build.form"]
TENSORRT, RTX = BUILDERS
H100 = gpu.GpuReport((gpu.Gpu(0, "NVIDIA H100", (9, 0), 80 << 30),), "NVIDIA H100")
FIXED = BatchRange(4, 4, 4)
ONE_GPU = EngineOptions(compute_capabilities=("9.0",))
ISSUE = "NVIDIA/TensorRT issue 4849"


def digits(output: Any = "unused", **options: Any) -> BuildRequest:
    fixed = {"schedule": Schedule(8), "precision": "fp16", "engine": "none", "check": False}
    return BuildRequest("vit_digits", output, **{**fixed, **options})


@pytest.fixture
def on_h100(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with TensorRT and a GPU, as far as choices are concerned."""
    monkeypatch.setattr(gpu, "detect", lambda: H100)
    monkeypatch.setattr(FORM, "select", lambda _: Selection(TENSORRT, "TensorRT builds"))


def test_a_plugin_has_one_batch_size_by_default(tmp_path):
    artifact = build(digits(tmp_path / "x", merge_op="plugin", engine_options=ONE_GPU))
    assert artifact.manifest.batch == BatchRange(8, 8, 8)
    assert artifact.manifest.merge.note == (
        f"the batch is fixed at 8, another with --batch: {choice.LEAK}"
    )
    assert ISSUE in choice.LEAK
    model = load(artifact.model_path, weights=False)
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_value == 8


def test_one_batch_size_that_was_asked_for_needs_no_explanation():
    form = choose_form(digits(merge_op="plugin", batch=FIXED))
    assert (form.batch, form.note) == (FIXED, "")


def test_a_plugin_for_a_range_is_refused_with_the_reason():
    with pytest.raises(UsageError) as refused:
        choose_form(digits(merge_op="plugin", batch=BatchRange(1, 4, 16)))
    assert str(refused.value) == (
        "--batch is 1:4:16 with --merge-op plugin; TensorRT keeps GPU memory at every change of "
        f"the batch of such a plugin ({ISSUE}): give one batch size such as --batch 4, or "
        "--plugin-batch-range to build it all the same"
    )


@pytest.mark.parametrize("batch", [None, BatchRange(1, 4, 16)])
def test_a_range_that_was_asked_for_in_so_many_words_is_built_and_says_why_not(batch):
    form = choose_form(digits(merge_op="plugin", batch=batch, plugin_batch_range=True))
    assert form.batch == (batch or BatchRange())
    assert form.capabilities
    assert form.note == f"a range of batch sizes, as asked: {choice.LEAK}"


@pytest.mark.parametrize("merge_op", ["auto", "matmul", "index_add"])
def test_the_option_goes_with_the_plugin_only(merge_op):
    with pytest.raises(UsageError, match=f"--merge-op is {merge_op}; leave it out"):
        choose_form(digits(merge_op=merge_op, plugin_batch_range=True))


def test_a_range_that_is_none_is_refused():
    with pytest.raises(UsageError, match="--batch is 4:4:4, one batch size; leave one of them out"):
        choose_form(digits(merge_op="plugin", batch=FIXED, plugin_batch_range=True))


def test_the_batch_has_one_place():
    with pytest.raises(UsageError, match="have the batch range 4:4:4; give the request's own"):
        digits(engine_options=EngineOptions(batch=FIXED))


@pytest.mark.usefixtures("on_h100")
def test_auto_takes_no_plugin_for_a_range():
    form = choose_form(digits(merge_op="auto"))
    assert form.capabilities == ()
    assert form.note == (
        f"no plugin: the batch is 1:8:32 and {choice.LEAK}; with one batch size, such as --batch "
        "8, it is taken"
    )
    assert choose_form(digits(merge_op="auto", batch=FIXED)).capabilities


@pytest.mark.usefixtures("on_h100")
@pytest.mark.parametrize(
    ("name", "options", "tokens"),
    [
        ("test_vit", {"img_size": 160, "patch_size": 10}, 257),
        ("test_vit", {"img_size": 160, "patch_size": 10, "class_token": False}, 256),
    ],
)
def test_auto_takes_the_plugin_as_far_as_it_pays(name, options, tokens):
    import timm

    if "class_token" in options:
        options = {**options, "global_pool": "avg"}
    model = patch(timm.create_model(name, **options).eval(), 8)
    assert model.layers[0].tokens_in == tokens
    form = fit_form(choose_form(digits(merge_op="auto", batch=FIXED)), model, "auto")
    assert bool(form.capabilities) == (tokens <= 256)
    # Asked for, it is built whatever the table says.
    asked = choose_form(digits(merge_op="plugin", batch=FIXED))
    assert fit_form(asked, model, "auto").capabilities


def test_the_table_says_where_the_plugin_pays(monkeypatch):
    assert choice.drawback(256, (9, 0)) is None
    assert (
        choice.drawback(257, (9, 0)) == "a layer matches 257 tokens, and the kernels pay up to 256"
    )
    monkeypatch.setattr(choice, "PAYS_UP_TO_TOKENS", {choice.ANY: 256, "9.0": 1025})
    assert choice.drawback(1025, (9, 0)) is None
    assert choice.drawback(1025, (8, 9)) is not None


@pytest.mark.usefixtures("on_h100")
def test_the_engine_is_built_for_the_same_batch(tmp_path, monkeypatch):
    seen = []

    def build_engine(_backend, _folder, options, *_, **__):
        seen.append(options.batch)
        raise ExportError("far enough")

    monkeypatch.setattr(BUILD, "build_engine", build_engine)
    one = {"engine": "tensorrt", "engine_options": ONE_GPU}
    with pytest.raises(ExportError, match="far enough"):
        build(digits(tmp_path / "x", merge_op="plugin", **one))
    assert seen == [BatchRange(8, 8, 8)]


TOO_LONG = (
    "blocks.0 merges r = 8 of 65 tokens and sorts the merged ones by one TopK of 8; TensorRT-RTX "
    "takes at most 7: use a smaller r, or --engine none"
)


def test_an_engine_that_cannot_sort_so_many_tokens_is_refused(tmp_path, monkeypatch):
    """Whoever asks for it is told before the export; ``auto`` does without."""
    monkeypatch.setattr(limits, "TOPK_MAX", 7)
    monkeypatch.setattr(ort, "missing", lambda _: None)  # as with ONNX Runtime's CUDA provider
    with pytest.raises(InputError) as refused:
        build(digits(tmp_path / "x", engine="tensorrt-rtx"))
    assert str(refused.value) == TOO_LONG
    assert list(tmp_path.iterdir()) == []
    artifact = build(digits(tmp_path / "x", engine="auto"))
    assert artifact.manifest.engines == {}
    assert artifact.manifest.engine_note == f"no engine is built: {TOO_LONG}"
    # So it is written for what runs it then, and not for the engine that there is not.
    assert artifact.manifest.onnx.attention == "parts"
    with pytest.raises(InputError) as refused:
        add_engine(EngineRequest(tmp_path / "x", engine="tensorrt-rtx"))
    assert str(refused.value) == f"the artifact cannot become an engine: {TOO_LONG}"
