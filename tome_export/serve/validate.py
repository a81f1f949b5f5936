"""What the server would refuse or, worse, load and get wrong: found before anything is written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from tome_export.errors import InputError
from tome_export.serve.config import DATA_TYPES, ModelFolder, config_from_text, config_text
from tome_export.spec import TensorInfo

if TYPE_CHECKING:
    from tritonclient.grpc.model_config_pb2 import ModelConfig


def validate(
    folder: ModelFolder,
    inputs: Sequence[TensorInfo] | None = None,
    outputs: Sequence[TensorInfo] | None = None,
) -> None:
    """Check the configs of a model: by the server's schema, then against the file that is served.

    Args:
        folder: The model.
        inputs: What the file takes, read from it; None where it holds no such file.
        outputs: What it gives.

    Raises:
        InputError: with the first thing that is wrong.
    """
    texts = {"config.pbtxt": config_text(folder.config)}
    for name, content in folder.files.items():
        if name.startswith("configs/") and isinstance(content, bytes):
            texts[name] = content.decode()
    for name, text in texts.items():
        where = f"{name} of model {folder.name}"
        config = config_from_text(text, where)
        wrong = next(_problems(config, inputs, outputs), None)
        if wrong:
            raise InputError(f"{where} {wrong}")


def _problems(
    config: ModelConfig,
    inputs: Sequence[TensorInfo] | None,
    outputs: Sequence[TensorInfo] | None,
) -> Iterator[str]:
    most = config.max_batch_size
    graphs = [spec.batch_size for spec in config.optimization.cuda.graph_spec]
    for size, count in Counter(graphs).items():
        if not (1 <= size <= most or size == most == 0):
            allowed = f"1 to max_batch_size, {most}" if most else "0, as max_batch_size is 0"
            yield f"has a CUDA graph for batch {size}; expected {allowed}"
        if count > 1:
            yield f"has {count} CUDA graphs for batch {size}; expected one"
    if inputs is not None:
        yield from _like_file(config, config.input, inputs, "input")
    if outputs is not None:
        yield from _like_file(config, config.output, outputs, "output")


def _like_file(
    config: ModelConfig, tensors: Sequence[Any], found: Sequence[TensorInfo], kind: str
) -> Iterator[str]:
    """Compare with what the file itself says."""
    from tritonclient.grpc.model_config_pb2 import DataType

    described = {tensor.name: tensor for tensor in tensors}
    actual = {tensor.name: tensor for tensor in found}
    if {*described} != {*actual}:
        yield f"has the {kind}s {sorted(described)}; the file that is served has {sorted(actual)}"
    for name in {*described} & {*actual}:
        shape = actual[name].shape
        if config.max_batch_size and shape[:1] != (-1,):
            yield (
                f"batches up to {config.max_batch_size}; the file that is served has a fixed "
                f"{kind} {name} {list(shape)}"
            )
        dims = shape[1:] if config.max_batch_size else shape
        said = described[name]
        mine = list(said.reshape.shape if said.HasField("reshape") else said.dims)
        # A file of any batch may be given one size only.
        fits = len(mine) == len(dims) and all(
            size in (-1, given) for given, size in zip(mine, dims, strict=True)
        )
        if not fits:
            yield f"has {kind} {name} {mine}; the file that is served has {list(dims)}"
        dtype = DataType.Name(described[name].data_type)
        if dtype != DATA_TYPES.get(actual[name].dtype):
            yield f"has {kind} {name} of {dtype}; the file that is served has {actual[name].dtype}"
