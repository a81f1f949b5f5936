"""Every rule of a sound config, broken one at a time; what a server would refuse."""

from __future__ import annotations

from dataclasses import replace

import pytest
from server_rules import problems

from tome_export.artifact import Artifact
from tome_export.errors import InputError
from tome_export.serve.config import (
    ModelFolder,
    ServeOptions,
    config_from_text,
    file_folder,
)
from tome_export.serve.model_file import model_file_from_artifact

pytest.importorskip("tritonclient.grpc", reason="the serve extra is not installed")


@pytest.fixture
def folder(make_artifact):
    """A TensorRT plan of ``pixel_values [B, 3, 8, 8]``, B at most 8, with labels."""
    artifact = Artifact.open(make_artifact(engines={"tensorrt": "1:4:8"}, labels=list("abcde")))
    return file_folder(model_file_from_artifact(artifact), "m", ServeOptions())


def graph(config, batch, dims=(3, 8, 8)):
    config.optimization.cuda.graph_spec.add(batch_size=batch).input["pixel_values"].dim.extend(dims)


def warm(config):
    return config.model_warmup[0].inputs["pixel_values"]


BROKEN = {
    "duplicate input": (
        lambda c: c.input.append(c.input[0]),
        "has the input pixel_values 2 times; expected each once",
    ),
    "duplicate output": (
        lambda c: c.output.append(c.output[0]),
        "has the output logits 2 times; expected each once",
    ),
    "no input": (lambda c: c.ClearField("input"), "has no input; expected one or more"),
    "no data type": (
        lambda c: c.input[0].ClearField("data_type"),
        "has no data type for input pixel_values",
    ),
    "dims of zero": (
        lambda c: c.input[0].dims.__setitem__(0, 0),
        "has dims [0, 8, 8] for input pixel_values; expected sizes, or -1",
    ),
    "other name": (
        lambda c: setattr(c, "name", "n"),
        "has the name 'n'; expected that of its folder",
    ),
    "negative batch": (
        lambda c: setattr(c, "max_batch_size", -1),
        "has max_batch_size -1; expected 0 or more",
    ),
    "graph of other dims": (
        lambda c: graph(c, 2, (3, 8, 9)),
        "has a CUDA graph with pixel_values [3, 8, 9]; expected [3, 8, 8]",
    ),
    "preferred above max": (
        lambda c: c.dynamic_batching.preferred_batch_size.append(16),
        "has preferred_batch_size 16; expected 1 to max_batch_size, 8",
    ),
    "warmup above max": (
        lambda c: setattr(c.model_warmup[1], "batch_size", 9),
        "has a warmup of batch 9; expected 1 to 8",
    ),
    "warmup of another input": (
        lambda c: c.model_warmup[0].inputs["x"].CopyFrom(warm(c)),
        "has a warmup with the inputs ['pixel_values', 'x']; expected ['pixel_values']",
    ),
    "warmup dims": (
        lambda c: warm(c).dims.__setitem__(0, 4),
        "has a warmup with pixel_values [4, 8, 8]; expected [3, 8, 8]",
    ),
    "warmup type": (
        lambda c: setattr(warm(c), "data_type", 10),
        "has a warmup whose pixel_values is of another data type than the input",
    ),
    "warmup without data": (
        lambda c: warm(c).ClearField("zero_data"),
        "has a warmup without data for pixel_values",
    ),
    "no instance": (
        lambda c: setattr(c.instance_group[0], "count", 0),
        "has an instance group of 0; expected 1 or more",
    ),
    "engine on the CPU": (
        lambda c: setattr(c.instance_group[0], "kind", c.instance_group[0].KIND_CPU),
        "puts a TensorRT engine on the CPU; expected KIND_GPU",
    ),
    "labels missing": (
        lambda c: setattr(c.output[0], "label_filename", "names.txt"),
        "names the labels names.txt, which are not there",
    ),
    "file of another platform": (
        lambda c: setattr(c, "platform", "onnxruntime_onnx"),
        "is for onnxruntime_onnx, and version 1 has no model.onnx",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_the_rules_find_what_is_broken(case, folder):
    """What we write is sound by them, and they are no empty words."""
    change, message = BROKEN[case]
    assert [*problems(folder.config, folder)] == []
    change(folder.config)
    assert next(problems(folder.config, folder)) == message


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ((1, 9), "has a CUDA graph for batch 9; expected 1 to max_batch_size, 8"),
        ((8, 8), "has 2 CUDA graphs for batch 8; expected one"),
    ],
)
def test_cuda_graphs_that_cannot_be(make_artifact, batches, message):
    file = model_file_from_artifact(Artifact.open(make_artifact(engines={"tensorrt": "1:4:8"})))
    with pytest.raises(InputError) as error:
        file_folder(file, "m", ServeOptions(cuda_graph_batches=batches))
    assert str(error.value) == f"config.pbtxt of model m {message}"


def test_version_folders(folder):
    path = folder.files["1/model.plan"]
    last = replace(folder, files={**folder.files, f"{2**63 - 1}/model.plan": path})
    assert [*problems(folder.config, last)] == []
    for name in ("0", "01", "v1", "\u0663", str(2**63), "9" * 5000):
        wrong = replace(folder, files={**folder.files, f"{name}/model.plan": path})
        (message,) = problems(folder.config, wrong)
        assert message.startswith(f"comes with the version folder {name!r}; expected")
    none = replace(folder, files={"labels.txt": b""})
    assert "comes without a version folder" in problems(folder.config, none)


@pytest.mark.parametrize(
    "text", ['name: "m" max_batch: 3', 'name: "m', "max_batch_size: many", "platform: 3"]
)
def test_text_that_the_schema_refuses(text):
    with pytest.raises(InputError, match=r"^x is not a model config \(1:.*\); correct or remove"):
        config_from_text(text, "x")


def test_ensembles():
    config = config_from_text(
        """name: "e" platform: "ensemble" max_batch_size: 4
        input { name: "a" data_type: TYPE_FP32 dims: 1 }
        output { name: "c" data_type: TYPE_FP32 dims: 1 }
        ensemble_scheduling { step { model_name: "m" model_version: -1
          input_map { key: "x" value: "a" } output_map { key: "y" value: "b" } }
        step { model_name: "n" model_version: -1
          input_map { key: "x" value: "b" } output_map { key: "y" value: "c" } } }""",
        "e",
    )
    folder = ModelFolder("e", config, {"1/README": b""})

    def first(models):
        return next(problems(config, folder, models), None)

    assert first({"m", "n"}) is None
    assert first({"m"}) == "has a step n, which is not a model of the repository"
    config.ensemble_scheduling.step[1].input_map["x"] = "z"
    assert first({"m", "n"}) == "has a step n that takes z, which nothing before it gives"
    del config.ensemble_scheduling.step[1]
    assert first({"m", "n"}) == "has the output c, which no step gives"
