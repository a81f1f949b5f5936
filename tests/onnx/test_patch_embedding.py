"""The patch embedding in a graph: that of the library's model, or a refusal."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import load_file

from tome_export.errors import InputError
from tome_export.merge.schedule import Schedule
from tome_export.models.facts import DATA
from tome_export.onnx.files import patch_embedding


def test_it_is_the_models_own(digit_members):
    weights, bias = patch_embedding(digit_members[8] / "model.onnx")
    state = load_file(DATA / "vit_digits.safetensors")
    np.testing.assert_array_equal(weights, state["patch_embed.proj.weight"])
    np.testing.assert_array_equal(bias, state["patch_embed.proj.bias"])


def test_it_is_behind_what_normalises_uint8(built_artifact):
    artifact = built_artifact(schedule=Schedule(8), check=False, input="uint8")
    weights, bias = patch_embedding(artifact.model_path)
    state = load_file(DATA / "vit_digits.safetensors")
    np.testing.assert_array_equal(weights, state["patch_embed.proj.weight"])
    np.testing.assert_array_equal(bias, state["patch_embed.proj.bias"])


def graph_of(path, *, bias=True, half=False, before=(), **attributes):
    """``Conv`` of kernels ``[5, 3, 4, 2]`` side by side, as far as nothing else is said."""
    dtype, kind = (np.float16, TensorProto.FLOAT16) if half else (np.float32, TensorProto.FLOAT)
    rng = np.random.default_rng(0)
    tensors = {"w": rng.standard_normal((5, 3, 4, 2)), "b": rng.standard_normal(5)}
    tensors = {name: value.astype(dtype) for name, value in tensors.items()}
    plain = {"kernel_shape": [4, 2], "strides": [4, 2], "pads": [0, 0, 0, 0]}
    nodes = [*before]
    source = "pixel_values"
    if half:
        nodes.append(helper.make_node("Cast", [source], ["half"], to=TensorProto.FLOAT16))
        source = "half"
    source = before[-1].output[0] if before else source
    inputs = [source, "w", *(["b"] if bias else [])]
    nodes.append(helper.make_node("Conv", inputs, ["y"], **{**plain, **attributes}))
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("pixel_values", TensorProto.FLOAT, ["b", 3, 8, 8])],
        [helper.make_tensor_value_info("y", kind, None)],
        [numpy_helper.from_array(value, name) for name, value in tensors.items()],
    )
    opsets = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), path)
    return tensors


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_precisions_and_a_lack_of_bias(tmp_path, half, bias):
    tensors = graph_of(tmp_path / "m.onnx", half=half, bias=bias)
    weights, offset = patch_embedding(tmp_path / "m.onnx")
    assert weights.dtype == offset.dtype == np.float64
    np.testing.assert_array_equal(weights, tensors["w"])
    np.testing.assert_array_equal(offset, tensors["b"] if bias else np.zeros(5))


@pytest.mark.parametrize(
    "changes",
    [
        {"strides": [2, 2]},
        {"pads": [1, 0, 1, 0]},
        {"before": (helper.make_node("Relu", ["pixel_values"], ["x"]),)},
    ],
    ids=["overlap", "padding", "behind another operator"],
)
def test_what_cuts_no_patches_is_refused(tmp_path, changes):
    path = tmp_path / "m.onnx"
    graph_of(path, **changes)
    with pytest.raises(InputError) as caught:
        patch_embedding(path)
    assert str(caught.value) == (
        f"{path} does not begin with a convolution that cuts patches, which a learned policy looks "
        "at; choose another policy"
    )
