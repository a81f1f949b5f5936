"""ONNX graphs made on one machine and run on another, without carrying their weights.

The weights are drawn from numbers by each parameter's name, so both machines have the same. Every
large constant of a graph is one parameter or its transpose: which one is written down beside the
graphs, with its digest, and put back on the other machine.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from tome_export.models import resolve
from tome_export.patch import MergedModel, patch
from tome_export.spec import BatchRange

if TYPE_CHECKING:
    import onnx

    from tome_export.models.recipe import Recipe

INDEX = "graphs.json"
KEPT_BYTES = 4096
"""Constants up to this size stay in the graph."""
HALF = 10
"""ONNX's number of float16."""
BATCH = BatchRange(1, 8, 64)

Form = Literal["fused", "parts"]


@dataclass(frozen=True)
class GraphCase:
    """One graph.

    Attributes:
        r: Tokens merged per layer; 0 is the unmerged model.
        attention: As in ``ExportOptions``.
    """

    r: int
    attention: Form

    @property
    def file(self) -> str:
        """Its name."""
        return f"r{self.r}_{self.attention}.onnx"


@dataclass(frozen=True)
class Weight:
    """What a constant of a graph is.

    Attributes:
        parameter: Name in the model.
        transposed: Whether the constant is its transpose.
        sha256: Of the constant's bytes.
    """

    parameter: str
    transposed: bool
    sha256: str


def seeded_model(name: str, depth: int | None = None) -> tuple[Recipe, torch.nn.Module]:
    """A recipe's model, whose parameters are the same everywhere.

    Args:
        name: Of the recipe, whose model is timm's.
        depth: Layers, if not all.
    """
    recipe = resolve(name)
    with torch.device("meta"):
        module = recipe.source.loader.create(depth)
    module.to_empty(device="cpu")
    with torch.no_grad():
        for parameter_name, parameter in module.named_parameters():
            rng = np.random.default_rng(zlib.crc32(parameter_name.encode()))
            drawn = rng.standard_normal(tuple(parameter.shape), dtype=np.float32)
            if parameter.ndim > 1:
                drawn *= np.prod(parameter.shape[1:]) ** -0.5
            else:
                drawn = 0.02 * drawn + float(parameter_name.endswith("weight"))
            parameter.copy_(torch.from_numpy(np.ascontiguousarray(drawn, np.float32)))
    return recipe, module.eval()


def write_graphs(
    folder: Path, name: str, cases: Iterable[GraphCase], depth: int | None = None
) -> None:
    """Export fp16 graphs of one model and write them without their weights.

    Args:
        folder: Made here.
        name: Of the recipe.
        cases: What to export.
        depth: Layers, if not all.
    """
    import onnx

    from tome_export.onnx.export import ExportOptions, onnx_from_model

    recipe, module = seeded_model(name, depth)
    known = _digests(module)
    folder.mkdir(parents=True)
    weights: dict[str, dict[str, Any]] = {}
    for case in cases:
        path = folder / case.file
        options = ExportOptions(precision="fp16", batch=BATCH, attention=case.attention)
        onnx_from_model(patch(module, case.r), path, options, recipe.output.name)
        graph = onnx.load(path)
        found = _take_weights(graph, known)
        onnx.save(graph, path)
        weights[case.file] = {key: asdict(weight) for key, weight in found.items()}
    index = {"model": name, "depth": depth, "weights": weights}
    (folder / INDEX).write_text(json.dumps(index))


def _digests(module: torch.nn.Module) -> dict[str, Weight]:
    found = {}
    for name, parameter in module.named_parameters():
        half = parameter.detach().numpy().astype(np.float16)
        for transposed in (True, False) if half.ndim == 2 else (False,):
            digest = hashlib.sha256((half.T if transposed else half).tobytes()).hexdigest()
            found[digest] = Weight(name, transposed, digest)
    return found


def _take_weights(graph: onnx.ModelProto, known: dict[str, Weight]) -> dict[str, Weight]:
    """Empty the large constants.

    Raises:
        ValueError: if one is no parameter, nor the transpose of one.
    """
    found = {}
    for constant in graph.graph.initializer:
        # Positions of tokens are integers; weights are half.
        if len(constant.raw_data) <= KEPT_BYTES or constant.data_type != HALF:
            continue
        digest = hashlib.sha256(constant.raw_data).hexdigest()
        if digest not in known:
            raise ValueError(
                f"constant {constant.name} {list(constant.dims)} is no parameter of the model, nor "
                "the transpose of one; it cannot be left out"
            )
        found[constant.name] = known[digest]
        constant.raw_data = b""
    return found


class Graphs:
    """Graphs that were written without their weights, and the model that has them.

    Args:
        folder: Given to ``write_graphs``.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._index = json.loads((folder / INDEX).read_text())
        self.recipe, self._module = seeded_model(self._index["model"], self._index["depth"])

    def model(self, r: int) -> MergedModel:
        """The model in fp32, merging r tokens per layer."""
        return patch(self._module, r)

    def graph(self, case: GraphCase) -> onnx.ModelProto:
        """A graph with its weights.

        Raises:
            ValueError: if the weights drawn here are not those that it was exported with.
        """
        import onnx

        graph = onnx.load(self._folder / case.file)
        parameters = dict(self._module.named_parameters())
        weights = self._index["weights"][case.file]
        for constant in graph.graph.initializer:
            if constant.name not in weights:
                continue
            weight = Weight(**weights[constant.name])
            half = parameters[weight.parameter].detach().numpy().astype(np.float16)
            content = (half.T if weight.transposed else half).tobytes()
            if hashlib.sha256(content).hexdigest() != weight.sha256:
                raise ValueError(
                    f"{weight.parameter} drawn by NumPy {np.__version__} differs from what "
                    f"{case.file} was exported with; prepare the folder with this version"
                )
            constant.raw_data = content
        return graph
