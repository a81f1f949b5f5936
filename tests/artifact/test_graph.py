"""A model takes its weights from the artifact's own file and from nowhere else."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from google.protobuf.descriptor import Descriptor
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, helper

from tome_export.artifact import graph
from tome_export.artifact.graph import check_graph
from tome_export.errors import InputError

DATA = "model.onnx.data"
BYTES = 64
PRECISION = {TensorProto.FLOAT: "fp32", TensorProto.FLOAT16: "fp16", TensorProto.BFLOAT16: "bf16"}


def tensor(location: str | None = DATA, **entries: object) -> TensorProto:
    """Sixteen numbers in a file, or in the model itself."""
    made = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4, 4])
    if location is None:
        made.raw_data = bytes(BYTES)
        return made
    made.data_location = TensorProto.EXTERNAL
    for key, value in {"location": location, **entries}.items():
        made.external_data.add(key=key, value=str(value))
    return made


def node(**attribute: object) -> NodeProto:
    return NodeProto(op_type="Constant", attribute=[AttributeProto(name="a", **attribute)])


def graph_of(**fields: object) -> ModelProto:
    return ModelProto(ir_version=10, graph=GraphProto(**fields))


def sparse(one: TensorProto, other: TensorProto) -> onnx.SparseTensorProto:
    return onnx.SparseTensorProto(values=one, indices=other, dims=[4, 4])


PLACES: dict[str, Callable[[TensorProto], ModelProto]] = {
    "initializer": lambda t: graph_of(initializer=[t]),
    "values of a sparse initializer": lambda t: graph_of(
        sparse_initializer=[sparse(t, tensor(None))]
    ),
    "indices of one": lambda t: graph_of(sparse_initializer=[sparse(tensor(None), t)]),
    "attribute": lambda t: graph_of(node=[node(t=t)]),
    "list of tensors": lambda t: graph_of(node=[node(tensors=[tensor(None), t])]),
    "sparse attribute": lambda t: graph_of(node=[node(sparse_tensor=sparse(t, tensor(None)))]),
    "sparse list": lambda t: graph_of(node=[node(sparse_tensors=[sparse(tensor(None), t)])]),
    "subgraph": lambda t: graph_of(node=[node(g=GraphProto(initializer=[t]))]),
    "subgraph of a subgraph": lambda t: graph_of(
        node=[node(graphs=[GraphProto(node=[node(g=GraphProto(node=[node(t=t)]))])])]
    ),
    "function": lambda t: ModelProto(functions=[onnx.FunctionProto(node=[node(t=t)])]),
    "default of a function": lambda t: ModelProto(
        functions=[onnx.FunctionProto(attribute_proto=[AttributeProto(name="a", t=t)])]
    ),
    "training": lambda t: ModelProto(
        training_info=[onnx.TrainingInfoProto(algorithm=GraphProto(initializer=[t]))]
    ),
}


def check(folder: Path, model: ModelProto, *, data: int | None = BYTES) -> None:
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    listed = {"model.onnx": 1, "link": BYTES} | ({} if data is None else {DATA: data})
    check_graph(folder, "model.onnx", listed, "fp32")


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
def test_another_file_is_found_wherever_it_is_named(tmp_path, place):
    check(tmp_path, place(tensor()))
    check(tmp_path, place(tensor(None)), data=None)
    with pytest.raises(
        InputError,
        match=r"/model.onnx takes tensor 'w' from the file 'link', and build.json lists model.onnx",
    ):
        check(tmp_path, place(tensor("link")))
    with pytest.raises(InputError, match="lists no file of weights; rebuild the artifact"):
        check(tmp_path, place(tensor()), data=None)


@pytest.mark.parametrize(
    "location",
    ["", ".", "..", "../model.onnx.data", "/etc/passwd", f"./{DATA}", f"{DATA}/", f"a/../{DATA}",
     f"{DATA}\0", "*/_ORT_MEM_ADDR_/*", "x" * 5000, "model.onnx", "file://model.onnx.data"],
)  # fmt: skip
def test_only_the_one_file_may_be_named(tmp_path, location):
    with pytest.raises(InputError, match=r"takes tensor 'w' from the file ") as caught:
        check(tmp_path, graph_of(initializer=[tensor(location)]))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400 + len(str(tmp_path))


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"offset": 64, "length": 64}, "from bytes 64 to 128 of model.onnx.data, which has 64"),
        ({"offset": 65}, "from bytes 65 to 64 of"),
        ({"length": 10**17}, "from bytes 0 to 100000000000000000 of"),
        ({"offset": -4}, "of offset '-4' in model.onnx.data, expected a whole number"),
        ({"length": 1e9}, "of length '1000000000.0' in"),
        ({"offset": "٣"}, "of offset '٣' in"),
        ({"length": "9" * 5000}, "of length '999"),
    ],
)
def test_values_lie_within_the_file(tmp_path, entries, message):
    check(tmp_path, graph_of(initializer=[tensor(offset=0, length=64, checksum="x")]))
    with pytest.raises(InputError, match=message):
        check(tmp_path, graph_of(initializer=[tensor(**entries)]))


def test_what_libraries_read_differently_is_refused(tmp_path):
    twice = tensor()
    twice.external_data.add(key="location", value="link")
    with pytest.raises(InputError, match="says twice where the location of a tensor"):
        check(tmp_path, graph_of(initializer=[twice]))
    unsaid = tensor()
    unsaid.data_location = TensorProto.DEFAULT
    unsaid.external_data[0].value = "link"
    with pytest.raises(InputError, match="from the file 'link'"):
        check(tmp_path, graph_of(initializer=[unsaid]))
    with pytest.raises(InputError, match="has a node EPContext, which names a file to be loaded"):
        check(tmp_path, graph_of(node=[NodeProto(op_type="EPContext")]))
    endless = node(g=GraphProto(node=[NodeProto(op_type="Loop")]))
    with pytest.raises(InputError, match="has a node Loop, which may never end"):
        check(tmp_path, graph_of(node=[endless]))


def deep(levels: int) -> bytes:
    """Graphs in attributes of nodes of graphs: more of them than ONNX's own writer can make."""
    content = b""
    for number in [6, 5, 1] * levels + [7]:
        length = len(content)
        size = bytes([length & 0x7F | 0x80, length >> 7]) if length > 0x7F else bytes([length])
        content = bytes([number << 3 | 2]) + size + content
    return content


def test_bombs_are_refused(tmp_path, monkeypatch):
    file = tmp_path / "model.onnx"
    file.write_bytes(deep(30))
    check_graph(tmp_path, "model.onnx", {"model.onnx": 1}, "fp32")
    file.write_bytes(deep(34))
    with pytest.raises(InputError, match="has messages more than 100 deep in each other"):
        check_graph(tmp_path, "model.onnx", {"model.onnx": 1}, "fp32")
    monkeypatch.setattr(graph, "MOST_FIELDS", 1000)
    with pytest.raises(InputError, match="has more than 1000 fields, expected an exported model"):
        check(tmp_path, graph_of(node=[NodeProto()] * 1000))


@pytest.mark.parametrize(
    "content", [b"", b"\0", b"\x0b\x0c", b"<net name='x'/>", b"\x10\0\0\0ORTM", b"\xff" * 20]
)
def test_what_is_no_model_is_refused(tmp_path, content):
    (tmp_path / "model.onnx").write_bytes(content)
    with pytest.raises(InputError, match=r"model\.onnx .*; rebuild the artifact"):
        check_graph(tmp_path, "model.onnx", {"model.onnx": 1}, "fp32")


@pytest.mark.parametrize("kind", PRECISION)
def test_most_weights_are_of_the_precision(tmp_path, kind):
    few = helper.make_tensor("few", TensorProto.FLOAT, [4], np.ones(4))
    most = helper.make_tensor("most", kind, [4, 4], np.ones((4, 4)))
    model = graph_of(initializer=[few, most]).SerializeToString()
    (tmp_path / "model.onnx").write_bytes(model)
    check_graph(tmp_path, "model.onnx", {"model.onnx": 1}, PRECISION[kind])
    for other in {*PRECISION.values()} - {PRECISION[kind]}:
        with pytest.raises(InputError, match=f"in {PRECISION[kind]}, and build.json says {other}"):
            check_graph(tmp_path, "model.onnx", {"model.onnx": 1}, other)


def test_the_messages_are_those_of_onnx():
    """Every field of ONNX's own description from which a tensor can be reached is in the table."""
    reaching: dict[str, dict[int, str]] = {"TensorProto": {}}
    while True:
        found = {name: inside for name, inside in _described(reaching) if inside}
        if found.keys() | {"TensorProto"} == reaching.keys():
            break
        reaching = {"TensorProto": {}, **found}
    assert found == {name: dict(inside) for name, inside in graph.INSIDE.items()}
    numbers = {n: f.number for n, f in TensorProto.DESCRIPTOR.fields_by_name.items()}
    places = ("data_type", "name", "external_data", "data_location")
    assert [numbers[n] for n in places] == [
        graph._DATA_TYPE, graph._NAME, graph._EXTERNAL, graph._LOCATION,
    ]  # fmt: skip
    assert NodeProto.DESCRIPTOR.fields_by_name["op_type"].number == graph._OP_TYPE


def _described(reaching: dict[str, dict[int, str]]) -> list[tuple[str, dict[int, str]]]:
    pending, seen = [ModelProto.DESCRIPTOR], dict[str, Descriptor]()
    while pending:
        one = pending.pop()
        if one.name not in seen:
            seen[one.name] = one
            pending += [f.message_type for f in one.fields if f.message_type]
    return [
        (name, {f.number: f.message_type.name for f in one.fields
                if f.message_type and f.message_type.name in reaching})
        for name, one in seen.items()
    ]  # fmt: skip


def locations(message: object) -> set[str]:
    """Every place that ONNX's own reader sees named in a model."""
    found = set()
    if isinstance(message, TensorProto):
        found |= {e.value for e in message.external_data if e.key == "location"}
    for field, value in message.ListFields():  # type: ignore[attr-defined]
        if field.message_type is not None:
            for one in value if hasattr(value, "extend") else [value]:
                found |= locations(one)
    return found


WHOLE = ModelProto(
    graph=GraphProto(
        initializer=[tensor(offset=0, length=32), tensor(None)],
        node=[node(g=GraphProto(sparse_initializer=[sparse(tensor(), tensor(None))]))],
    ),
    functions=[onnx.FunctionProto(node=[node(tensors=[tensor()])])],
).SerializeToString()


@settings(max_examples=200, derandomize=True, deadline=None, database=None)
@given(st.data())
def test_a_changed_model_is_refused_or_names_nothing_else(tmp_path_factory, data):
    content = bytearray(WHOLE)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(content) - 1))
        edit = data.draw(st.sampled_from(["set", "cut", "insert", "double"]))
        if edit == "set":
            content[at] = data.draw(st.integers(0, 255))
        elif edit == "cut":
            del content[at : at + data.draw(st.integers(1, 40))]
        elif edit == "insert":
            content[at:at] = data.draw(st.binary(min_size=1, max_size=12))
        else:
            content += content[at:]
        content = content or bytearray(b"\0")
    folder = tmp_path_factory.getbasetemp()
    (folder / "model.onnx").write_bytes(content)
    with contextlib.suppress(InputError, DecodeError):
        check_graph(folder, "model.onnx", {"model.onnx": 1, DATA: BYTES}, "fp32")
        assert locations(ModelProto.FromString(bytes(content))) <= {DATA}
