"""Configs: what is served, and how."""

from __future__ import annotations

import pytest
from manifests import manifest

from tome_export.artifact import Artifact
from tome_export.errors import InputError, UsageError
from tome_export.runtime.ort import CUDA_OPTIONS
from tome_export.serve.config import (
    ServeOptions,
    config_from_text,
    config_text,
    file_folder,
    model_config,
    model_folders,
)
from tome_export.serve.model_file import model_file_from_artifact
from tome_export.serve.names import check_name, name_end, plain_name
from tome_export.spec import BatchRange

pytest.importorskip("tritonclient.grpc", reason="the serve extra is not installed")

TENSORRT = {"tensorrt": "1:4:8"}


@pytest.fixture
def source(make_artifact):
    """``source(choice, **artifact)``"""

    def make(choice="auto", **changes):
        return model_file_from_artifact(Artifact.open(make_artifact(**changes)), choice)

    return make


def graphs(config):
    return [
        (g.batch_size, list(g.input["pixel_values"].dim))
        for g in config.optimization.cuda.graph_spec
    ]


def accelerators(config):
    listed = config.optimization.execution_accelerators.gpu_execution_accelerator
    return {a.name: dict(a.parameters) for a in listed}


def test_what_every_config_has(source):
    options = ServeOptions(instances=3, max_queue_delay_us=70)
    config = model_config(source(), "m", options)
    assert (config.name, config.platform, config.max_batch_size) == ("m", "onnxruntime_onnx", 8)
    (given,), (got,) = config.input, config.output
    assert (given.name, list(given.dims)) == ("pixel_values", [3, 8, 8])
    assert (got.name, list(got.dims)) == ("logits", [5])
    assert config.version_policy.latest.num_versions == 2
    batching = config.dynamic_batching
    assert batching.max_queue_delay_microseconds == 70
    assert list(batching.preferred_batch_size) == []
    assert not batching.HasField("default_queue_policy")
    assert [(w.batch_size, list(w.inputs["pixel_values"].dims)) for w in config.model_warmup] == [
        (1, [3, 8, 8]),
        (8, [3, 8, 8]),
    ]
    (group,) = config.instance_group
    assert (group.count, group.kind) == (3, group.KIND_GPU)


@pytest.mark.parametrize(
    ("given", "limits", "count"),
    [
        ({"max_queue_size": 9, "timeout_ms": 11, "instances": 3}, (9, 11_000), 3),
        ({"max_queue_size": 9}, (9, 0), 2),
        ({"timeout_ms": 11, "instances": 1}, (0, 11_000), 2),
    ],
)
def test_a_limited_queue_has_two_instances(source, given, limits, count):
    for gpu in (True, False):
        config = model_config(source(), "m", ServeOptions(**given), gpu=gpu)
        queue = config.dynamic_batching.default_queue_policy
        assert (queue.max_queue_size, queue.default_timeout_microseconds) == limits
        assert queue.timeout_action == queue.REJECT
        assert queue.allow_timeout_override
        assert [group.count for group in config.instance_group] == [count]


BACKEND_KEYS = {
    "max_workspace_size_bytes",
    "trt_engine_cache_enable",
    "trt_engine_cache_path",
    "trt_engine_cache_prefix",
    "trt_profile_min_shapes",
    "trt_profile_opt_shapes",
    "trt_profile_max_shapes",
    "trt_timing_cache_enable",
    "trt_timing_cache_path",
    "trt_builder_optimization_level",
    "trt_cuda_graph_enable",
}
"""Parameters that change no types, of those that the backend's README maps to ONNX Runtime's."""

PROFILE = {
    "trt_profile_min_shapes": "pixel_values:1x3x8x8",
    "trt_profile_opt_shapes": "pixel_values:4x3x8x8",
    "trt_profile_max_shapes": "pixel_values:8x3x8x8",
    "trt_engine_cache_enable": "1",
    "trt_engine_cache_path": "/tmp/tome_export_m",  # noqa: S108
}


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_onnx_with_tensorrt_accelerator(source, precision):
    """No key of it says a precision: TensorRT keeps to the types of the model only without one."""
    config = model_config(source(precision=precision), "m", ServeOptions())
    assert accelerators(config) == {"tensorrt": PROFILE, "cuda": CUDA_OPTIONS}
    assert graphs(config) == []


def test_accelerators_have_keys_that_the_backend_hands_on(source):
    """It refuses others: the model would not load."""
    found = accelerators(model_config(source(precision="fp16"), "m", ServeOptions()))
    assert {*found["tensorrt"]} <= BACKEND_KEYS
    assert found["cuda"] == {"use_tf32": "0"}


def test_the_profile_starts_at_one_row_whatever_the_artifact_was_tuned_for(source):
    found = accelerators(model_config(source(batch="2:4:8"), "m", ServeOptions()))
    assert found["tensorrt"]["trt_profile_min_shapes"] == "pixel_values:1x3x8x8"


def test_a_merge_that_tensorrt_refuses_gets_no_tensorrt(source):
    found = accelerators(model_config(source(merge_op="index_add"), "m", ServeOptions()))
    assert found == {"cuda": CUDA_OPTIONS}


def test_cpu_config_differs_in_device_and_accelerator_only(source):
    served = source()
    gpu = model_config(served, "m", ServeOptions(instances=2))
    cpu = model_config(served, "m", ServeOptions(instances=2), gpu=False)
    (group,) = cpu.instance_group
    assert (group.kind, group.count) == (group.KIND_CPU, 2)
    assert accelerators(cpu) == {}
    for config in (gpu, cpu):
        config.ClearField("instance_group")
        config.ClearField("optimization")
    assert gpu == cpu


def test_plan(source):
    served = source(engines={"tensorrt": "1:2:4"})
    config = model_config(served, "m", ServeOptions())
    assert (config.platform, config.max_batch_size) == ("tensorrt_plan", 4)
    assert config.optimization.cuda.graphs
    assert graphs(config) == [(1, [3, 8, 8]), (2, [3, 8, 8]), (4, [3, 8, 8])]
    assert accelerators(config) == {}
    chosen = model_config(served, "m", ServeOptions(cuda_graph_batches=(4, 3)))
    assert graphs(chosen) == [(3, [3, 8, 8]), (4, [3, 8, 8])]
    folder = file_folder(served, "m", ServeOptions(version=3))
    assert {*folder.files} == {"3/model.plan"}
    assert folder.files["3/model.plan"].name == "model.engine"


def test_cuda_graphs_are_of_engines(source):
    with pytest.raises(UsageError, match="the ONNX model is served; leave them out, or serve a"):
        file_folder(source(), "m", ServeOptions(cuda_graph_batches=(1,)))


def test_fixed_batch_is_not_batched_by_the_server(source):
    served = source(batch="4", engines={"tensorrt": "4"})
    config = model_config(served, "m", ServeOptions())
    assert config.max_batch_size == 0
    assert [list(t.dims) for t in (*config.input, *config.output)] == [[4, 3, 8, 8], [4, 5]]
    assert graphs(config) == [(0, [4, 3, 8, 8])]
    assert [w.batch_size for w in config.model_warmup] == [1]
    onnx = accelerators(model_config(source(batch="4"), "m", ServeOptions()))["tensorrt"]
    assert {onnx[f"trt_profile_{w}_shapes"] for w in ("min", "opt", "max")} == {
        "pixel_values:4x3x8x8"
    }
    with pytest.raises(UsageError, match="fixed batch 4; leave them out, that batch is recorded"):
        file_folder(served, "m", ServeOptions(cuda_graph_batches=(4,)))


def test_an_engine_with_plugins_and_a_range_is_given_one_batch_and_no_cuda_graph(source):
    served = source(merge_op="plugin", engines={"tensorrt": "1:4:8"})
    assert served.batch == BatchRange(4, 4, 4)
    (note,) = served.notes
    assert note.startswith("The engine has plugins and was built for batches of 1:4:8: it is given")
    assert "NVIDIA/TensorRT issue 4849" in note
    model, batching = model_folders(served, "m", ServeOptions())
    assert (model.config.max_batch_size, batching.config.max_batch_size) == (0, 4)
    assert [list(t.dims) for t in model.config.input] == [[4, 3, 8, 8]]
    assert not model.config.optimization.cuda.graphs
    assert graphs(model.config) == []
    with pytest.raises(UsageError, match="with plugins of a range it is not recorded"):
        model_folders(served, "m", ServeOptions(cuda_graph_batches=(4,)))
    # Built with least 2, it is served all the same.
    assert source(merge_op="plugin", engines={"tensorrt": "2:4:8"}).batch == BatchRange(4, 4, 4)


def test_an_engine_with_plugins_of_one_batch_has_its_cuda_graph(source):
    served = source(merge_op="plugin", batch="4", engines={"tensorrt": "4"})
    assert served.notes == ()
    assert graphs(model_config(served, "m", ServeOptions())) == [(0, [4, 3, 8, 8])]


def test_onnx_of_an_artifact_with_plugins_keeps_its_range(source):
    served = source("onnx", merge_op="plugin", engines={"tensorrt": "1:4:8"})
    assert (served.batch, served.notes) == (BatchRange(1, 4, 8), ())


def test_a_version_compatible_engine_says_so_in_its_version(source):
    for choice, compatible, expected in (
        ("engine", True, {"2/model.plan", "2/version_compatible"}),
        ("engine", False, {"2/model.plan"}),
        ("onnx", True, {"2/model.onnx", "configs/cpu.pbtxt"}),
    ):
        served = source(choice, engines=TENSORRT, version_compatible=compatible)
        assert {*file_folder(served, "m", ServeOptions(version=2)).files} == expected


@pytest.mark.parametrize(
    ("artifact", "parts"),
    [
        ({"attention": "parts"}, ()),
        ({"attention": "fused", "engines": TENSORRT}, ()),
        ({"attention": "fused"}, ("ONNX Runtime 1.27 or later", "--attention parts")),
        ({"attention": "fused-fp32"}, ("summed in float32", "rebuild the artifact with")),
        (
            {"attention": "fused", "engines": {"tensorrt-rtx": "1:4:8"}},
            ("no backend for TensorRT-RTX", "1.27 or later"),
        ),
    ],
)
def test_fused_attention_that_falls_to_onnx_runtime_is_said(source, artifact, parts):
    text = "\n".join(source(**artifact).notes)
    assert all(part in text for part in parts)
    assert bool(text) == bool(parts)


def test_text_is_read_back_the_same(source):
    for choice in ("engine", "onnx"):
        config = model_config(source(choice, engines=TENSORRT), "m", ServeOptions())
        assert config_from_text(config_text(config), "it") == config


def test_labels_are_one_line_each(source):
    folder = file_folder(source(labels=["a", "två\nrader", "c", "d", "e"]), "m", ServeOptions())
    assert folder.files["labels.txt"].decode() == "a\ntvå rader\nc\nd\ne\n"
    assert folder.config.output[0].label_filename == "labels.txt"
    assert {*folder.files} == {"1/model.onnx", "labels.txt", "configs/cpu.pbtxt"}


def test_which_file_is_served(source):
    assert source().platform == "onnxruntime_onnx"
    assert source(engines=TENSORRT).platform == "tensorrt_plan"
    assert source("onnx", engines=TENSORRT).platform == "onnxruntime_onnx"
    assert source(engines=TENSORRT | {"tensorrt-rtx": "1:4:8"}).notes == ()
    rtx = source(engines={"tensorrt-rtx": "1:4:8"})
    assert rtx.platform == "onnxruntime_onnx"
    assert rtx.notes == (
        "Triton Inference Server has no backend for TensorRT-RTX engines: the ONNX model is served",
    )


def test_engines_that_cannot_be_served(source):
    with pytest.raises(InputError, match=r"only engine in .* is of TensorRT-RTX: Triton Inference"):
        source("engine", engines={"tensorrt-rtx": "1:4:8"})
    with pytest.raises(InputError, match="has no engine; build one with 'tome-export engine"):
        source("engine")
    with pytest.raises(InputError, match=r"takes batches of 2 or more, .* --batch 1:4:8"):
        source(engines={"tensorrt": "2:4:8"})
    with pytest.raises(UsageError, match="format is 'rtx'; expected one of auto, engine, onnx"):
        source("rtx")


@pytest.mark.parametrize(
    ("model", "schedule", "name"),
    [
        ("vit_b16", "r=16 constant", "vit_b16_r16"),
        ("vit_b16", "r=8 decreasing", "vit_b16_r8-decreasing"),
        ("vit_b16", "12,10,8", "vit_b16_r12-10-8"),
        ("timm:vit/x y", "r=0 inflect=0.5", "timm_vit_x_y_r0-inflect_0.5"),
        ("..", "r=0 constant", "model_r0"),
    ],
)
def test_default_name(model, schedule, name):
    plain = manifest()
    merge = plain.merge.model_copy(update={"schedule": schedule})
    named = manifest(model=plain.model.model_copy(update={"name": model}), merge=merge)
    assert f"{plain_name(named.model.name)}{name_end(named)}" == name
    check_name(name)


@pytest.mark.parametrize("name", ["", "a/b", "..", ".hidden", "a b", "ä", "a\n", "a" * 129])
def test_names_that_are_none(name):
    with pytest.raises(UsageError, match="model name"):
        check_name(name)


def test_the_largest_values_fit_the_schema(source):
    most = 2**31 - 1
    options = ServeOptions(
        version=2**63 - 1,
        instances=most,
        threads=most,
        max_queue_delay_us=most,
        max_queue_size=most,
        timeout_ms=most,
    )
    config = file_folder(source(), "m", options).config
    assert config_from_text(config_text(config), "it") == config


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"version": 0}, "version is 0; expected 1 to 9223372036854775807"),
        ({"version": 2**63}, f"version is {2**63}; expected 1 to 9223372036854775807"),
        ({"instances": 0}, "instances is 0; expected 1 to 2147483647"),
        ({"instances": 2**31}, "instances is 2147483648; expected 1 to 2147483647"),
        ({"max_queue_delay_us": -1}, "queue delay is -1; expected 0 to 2147483647"),
        ({"max_queue_delay_us": 2**31}, "queue delay is 2147483648; expected 0 to 2147483647"),
        ({"max_queue_size": 0}, "queue size is 0; expected 1 to 2147483647"),
        ({"max_queue_size": 2**31}, "queue size is 2147483648; expected 1 to 2147483647"),
        ({"timeout_ms": 0}, "queue timeout is 0; expected 1 to 2147483647"),
        ({"timeout_ms": 2**31}, "queue timeout is 2147483648; expected 1 to 2147483647"),
        ({"cuda_graph_batches": (1, 0)}, "CUDA graph batch is 0; expected 1 to 2147483647"),
        ({"threads": 0}, "threads is 0; expected 1 to 2147483647"),
        ({"preprocess": True, "decoders": 0}, "decoders is 0; expected 1 to 256"),
        ({"decoders": 2}, "decoders is for a server that decodes images; preprocess too"),
        ({"dali": True}, "dali is for a server that decodes images; preprocess too"),
        (
            {"preprocess": True, "dali": True, "scaled_decoding": True},
            "scaled decoding is not for DALI, which decodes on the GPU; give one",
        ),
        (
            {"cuda_graph_batches": (2**31,)},
            f"CUDA graph batch is {2**31}; expected 1 to {2**31 - 1}",
        ),
    ],
)
def test_options_out_of_range(given, message):
    with pytest.raises(UsageError) as error:
        ServeOptions(**given)
    assert str(error.value) == message
