"""Writing, checking and loading model files, with external data above a lowered threshold."""

from __future__ import annotations

import errno
import os
import shutil

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from tome_export.errors import ExportError, InputError
from tome_export.onnx import files


def add_model(count=4000, seed=0):
    weight = np.random.default_rng(seed).standard_normal(count, dtype=np.float32)
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [count])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [count])],
        [numpy_helper.from_array(weight, "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)


def run(source):
    session = onnxruntime.InferenceSession(source, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": np.zeros(4000, np.float32)})[0]


def test_small_models_are_one_file(tmp_path):
    path = tmp_path / "model.onnx"
    assert files.save(add_model(), path) == [path]
    assert list(tmp_path.iterdir()) == [path]
    files.check(path)


def test_large_models_have_external_data(tmp_path):
    path, model = tmp_path / "model.onnx", add_model()
    written = files.save(model, path, threshold=1000)
    assert written == [path, tmp_path / "model.onnx.data"]
    assert written[1].stat().st_size == 16000
    assert path.stat().st_size < 1000
    files.check(path)
    expected = numpy_helper.to_array(add_model().graph.initializer[0])
    np.testing.assert_array_equal(run(str(path)), expected)
    assert not files.load(path, weights=False).graph.initializer[0].raw_data
    np.testing.assert_array_equal(
        numpy_helper.to_array(files.load(path).graph.initializer[0]), expected
    )


def test_saving_leaves_the_model_as_it_was(tmp_path):
    model = add_model()
    files.save(model, tmp_path / "model.onnx", threshold=1000)
    tensor, fresh = model.graph.initializer[0], add_model().graph.initializer[0]
    assert tensor.raw_data == fresh.raw_data
    assert not tensor.external_data
    assert tensor.data_location == fresh.data_location
    assert run(model.SerializeToString()) is not None


def test_saving_again_replaces_the_data(tmp_path):
    path = tmp_path / "model.onnx"
    for seed in (0, 1):
        files.save(add_model(seed=seed), path, threshold=1000)
    assert (tmp_path / "model.onnx.data").stat().st_size == 16000
    np.testing.assert_array_equal(
        run(str(path)), numpy_helper.to_array(add_model(seed=1).graph.initializer[0])
    )
    files.save(add_model(), path)
    assert list(tmp_path.iterdir()) == [path]


def layered_model(*seeds):
    """A sum of an input and weights ``w0``, ``w1`` and so on, each drawn from its seed."""
    names = [f"s{index}" for index in range(len(seeds))]
    nodes = [
        helper.make_node("Add", [before, f"w{index}"], [after])
        for index, (before, after) in enumerate(
            zip(["x", *names], [*names[:-1], "y"], strict=False)
        )
    ]
    weights = [
        numpy_helper.from_array(
            np.random.default_rng(seed).standard_normal(4000, dtype=np.float32), f"w{index}"
        )
        for index, seed in enumerate(seeds)
    ]
    one = numpy_helper.from_array(np.ones(1, np.float32), "one")
    nodes[0].input[1], mul = "scaled", helper.make_node("Mul", ["w0", "one"], ["scaled"])
    graph = helper.make_graph(
        [mul, *nodes],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [4000])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [4000])],
        [*weights, one],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)


def write_models(folder, *models, threshold=files.EXTERNAL_DATA_BYTES):
    paths = [folder / str(index) / "model.onnx" for index in range(len(models))]
    for path, model in zip(paths, models, strict=True):
        path.parent.mkdir()
        files.save(model, path, threshold=threshold)
    return paths


@pytest.mark.parametrize("threshold", [files.EXTERNAL_DATA_BYTES, 1000])
def test_weights_in_common_are_one_file_whatever_they_are_called(tmp_path, threshold):
    models = layered_model(1, 2, 3), layered_model(4, 3, 1), layered_model(3, 3, 1)
    expected = [run(model.SerializeToString()) for model in models]
    paths = write_models(tmp_path, *models, threshold=threshold)
    assert files.share_weights(paths) == 2 * 16000
    data = [files.data_of(path) for path in paths]
    assert [path.stat().st_nlink for path in data] == [3] * 3
    # Each begins at a page of its own.
    assert data[0].stat().st_size == 4 * files.PAGE_BYTES + 16000
    inside = []
    for path, before in zip(paths, expected, strict=True):
        # ONNX's own checker takes no file of several names.
        copy = shutil.copytree(path.parent, tmp_path / f"copy{len(inside)}")
        files.check(copy / path.name)
        np.testing.assert_array_equal(run(str(path)), before)
        np.testing.assert_array_equal(run(files.load(path).SerializeToString()), before)
        held = files.load(path, weights=False).graph.initializer
        inside.append({tensor.name for tensor in held if tensor.raw_data})
    assert inside == [{"one", "w1"}, {"one", "w0"}, {"one"}]


def test_the_shared_file_is_the_same_in_another_build(tmp_path):
    contents = []
    for name, orders in (("a", ((1, 2, 3), (2, 1, 5))), ("b", ((7, 2, 1), (1, 8, 2)))):
        (tmp_path / name).mkdir()
        paths = write_models(tmp_path / name, *(layered_model(*order) for order in orders))
        files.share_weights(paths)
        contents.append(files.data_of(paths[0]).read_bytes())
    assert contents[0] == contents[1]


def test_without_links_it_is_a_copy(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EXDEV, "another filesystem")

    monkeypatch.setattr(os, "link", refuse)
    paths = write_models(tmp_path, layered_model(1, 2), layered_model(2, 1))
    assert files.share_weights(paths) == 2 * 16000
    first, second = map(files.data_of, paths)
    assert first.read_bytes() == second.read_bytes()
    assert (first.stat().st_nlink, second.stat().st_nlink) == (1, 1)
    run(str(paths[1]))


def test_what_has_nothing_in_common_or_too_much_of_its_own_is_left(tmp_path, monkeypatch):
    paths = write_models(tmp_path, layered_model(1, 2), layered_model(2, 3))
    before = [path.read_bytes() for path in paths]
    monkeypatch.setattr(files, "EXTERNAL_DATA_BYTES", 15_999)
    assert files.share_weights(paths) == 0
    monkeypatch.undo()
    files.save(layered_model(4, 5), paths[1])
    assert files.share_weights(paths) == 0
    assert paths[0].read_bytes() == before[0]
    assert not files.data_of(paths[0]).exists()


def test_serialized_gives_a_file_above_the_limit_and_keeps_the_weights(monkeypatch):
    model = add_model()
    with files.serialized(model) as source:
        assert isinstance(source, bytes)
    monkeypatch.setattr(files, "EXTERNAL_DATA_BYTES", 1000)
    with files.serialized(model) as source:
        assert isinstance(source, str)
        loaded = run(source)
    expected = numpy_helper.to_array(model.graph.initializer[0])
    np.testing.assert_array_equal(loaded, expected)


@pytest.mark.parametrize("content", [b"no model at all" * 9, b"\x08"])
def test_unreadable_files_are_refused(tmp_path, content):
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"model\.onnx is not a readable ONNX model"):
        files.load(path)
    with pytest.raises(InputError, match="rebuild the artifact"):
        files.load(tmp_path / "nothing.onnx")


def test_missing_data_is_refused(tmp_path):
    path = tmp_path / "model.onnx"
    files.save(add_model(), path, threshold=1000)[1].unlink()
    with pytest.raises(InputError, match="not a readable ONNX model"):
        files.load(path)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda g: g.node[0].input.__setitem__(1, "ghost"), "not valid ONNX"),
        (lambda g: g.node[0].__setattr__("op_type", "Ad"), "not valid ONNX"),
        (lambda g: g.output[0].type.tensor_type.__setattr__("elem_type", 10), "not valid ONNX"),
    ],
)
def test_check_refuses_what_is_not_onnx(tmp_path, edit, message):
    model = add_model()
    edit(model.graph)
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(ExportError, match=message):
        files.check(path)
    assert list(tmp_path.iterdir()) == [path]


def test_check_requires_every_shape(tmp_path):
    """A custom operator without a body: its output's shape is anyone's guess."""
    graph = helper.make_graph(
        [
            helper.make_node("Mystery", ["x"], ["m"], domain="elsewhere"),
            helper.make_node("Identity", ["m"], ["y"]),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [3])],
    )
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("elsewhere", 1)]
    path = tmp_path / "model.onnx"
    path.write_bytes(
        helper.make_model(graph, opset_imports=opsets, ir_version=11).SerializeToString()
    )
    with pytest.raises(ExportError, match="no shape for 1 tensors, first 'm'"):
        files.check(path)


def test_a_model_is_written_piece_by_piece_as_protobuf_would(tmp_path):
    model = add_model()
    model.doc_string = "é"
    model.metadata_props.add(key="a", value="b")
    model.functions.add(name="f", domain="d").attribute.append("x")
    for size in (0, 127, 128, 20_000):
        model.graph.initializer.append(numpy_helper.from_array(np.zeros(size, np.int8), f"w{size}"))
    files.save(model, tmp_path / "model.onnx")
    assert onnx.load(tmp_path / "model.onnx") == model
    light = files.without_weights(model)
    assert len(model.graph.initializer) == 5
    assert not light.graph.initializer
    light.graph.initializer.extend(model.graph.initializer)
    assert light == model


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o027, 0o077])
def test_files_are_readable_as_the_umask_says(tmp_path, umask):
    before = os.umask(umask)
    try:
        written = files.save(add_model(), tmp_path / "model.onnx", threshold=1000)
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in written} == {0o666 & ~umask}
    assert len(written) == 2


def test_another_file_of_that_name_does_not_matter(tmp_path, monkeypatch):
    """ONNX's own writer looks for it in the current folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.onnx.data").write_text("mine")
    (tmp_path / "out").mkdir()
    files.save(add_model(), tmp_path / "out" / "model.onnx", threshold=1000)
    assert run(str(tmp_path / "out" / "model.onnx")) is not None
    assert (tmp_path / "model.onnx.data").read_text() == "mine"


@pytest.mark.parametrize(
    ("nodes", "shape"),
    [
        ([("ConstantOfShape", ["shape"], ["y"])], [10**9, 10**6]),
        ([("ConstantOfShape", ["shape"], ["m"]), ("ReduceMax", ["m"], ["y"])], [2**40, 2**40]),
        ([("Expand", ["x", "shape"], ["m"]), ("Identity", ["m"], ["y"])], [10**15, 1]),
    ],
)
def test_more_memory_than_there_is_is_refused_before_it_is_taken(tmp_path, nodes, shape):
    made = helper.make_graph(
        [helper.make_node(*node) for node in nodes],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.array(shape, np.int64), "shape")],
    )
    path = tmp_path / "model.onnx"
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)
    path.write_bytes(model.SerializeToString())
    with pytest.raises(InputError, match=r"asks for a tensor '.' of .* numbers, and this machine"):
        files.check_memory(path)
    files.save(add_model(), path, threshold=1000)
    files.check_memory(path)
