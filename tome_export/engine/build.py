"""An engine from a graph, and the plugin's kernels on their way into an artifact and TensorRT."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tome_export.artifact import MANIFEST, MODEL, Manifest
from tome_export.artifact.manifest import PluginInfo
from tome_export.engine import EngineBuilder, EngineOptions, gpu
from tome_export.errors import ExportError, InputError, MissingComponentError, UsageError
from tome_export.plugins import store
from tome_export.plugins.match import contract as match_contract
from tome_export.plugins.merge import contract as merge_contract

if TYPE_CHECKING:
    from tome_export.artifact.manifest import EngineInfo
    from tome_export.onnx.plugin import Merging
    from tome_export.progress import Progress


@dataclass(frozen=True)
class Plugins:
    """What an artifact's model needs of TensorRT's plugins.

    Attributes:
        nodes: Number of nodes that carry plugin attributes.
        kernels: Names of the kernels that they start.
    """

    nodes: int
    kernels: tuple[str, ...]


def build_engine(
    builder: EngineBuilder,
    artifact: Path,
    options: EngineOptions,
    progress: Progress,
    folder: Path | None = None,
    *,
    plugins: Plugins | None = None,
    model: Path | None = None,
) -> EngineInfo:
    """Build from ``artifact/model.onnx`` into ``folder`` (by default the artifact itself)."""
    if plugins and builder.name == "tensorrt":
        _register_plugins(artifact, plugins.kernels, options)
    output = (folder or artifact) / builder.file_name
    info = builder.build(model or artifact / MODEL, options, output, progress)
    if plugins and builder.name == "tensorrt" and info.plugin_layers != plugins.nodes:
        raise ExportError(
            f"TensorRT {info.version} took {info.plugin_layers} plugin layers; expected "
            f"{plugins.nodes}: its parser did not choose the plugins, rebuild the artifact with "
            "--merge-op matmul"
        )
    for note in info.notes:
        progress.detail(note)
    return info


def _register_plugins(artifact: Path, expected: Collection[str], options: EngineOptions) -> None:
    from tome_export.plugins import tensorrt as plugins

    kernels = store.KernelStore.read(artifact / store.FOLDER)
    missing = set(expected) - set(kernels.kernels)
    if missing:
        raise InputError(
            f"{artifact / store.FOLDER} lacks {', '.join(sorted(missing))}, which {MANIFEST} lists:"
            " rebuild the artifact"
        )
    gpus = gpu.detect().gpus
    if not gpus:
        raise InputError("no GPU is visible; a TensorRT engine with plugins is built on its GPU")
    # An engine for all GPUs from Ampere on needs kernels for all of them.
    capability = (8, 0) if options.hardware_compatible else gpus[0].compute_capability
    plugins.register(kernels, capability)


def plugins_of(manifest: Manifest) -> Plugins | None:
    """The plugins of an artifact, or None if its model has none."""
    merge = manifest.merge
    if merge.merge_op != "plugin":
        return None
    if manifest.plugins is None:
        raise InputError("build.json lists no kernels of its plugins: rebuild the artifact")
    return Plugins(2 * sum(r > 0 for r in merge.r), manifest.plugins.kernels)


def takes_plugins(builder: EngineBuilder | None) -> bool:
    """Whether the plugin is of use to what builds the engine, and can be compiled here."""
    from tome_export.plugins.aot import PTX_VERSIONS, require_compiler

    if builder is None or builder.name != "tensorrt":
        return False
    gpus = gpu.detect().gpus
    if not gpus or gpus[0].compute_capability < min(PTX_VERSIONS):
        return False
    try:
        require_compiler()
    except MissingComponentError:
        return False
    return True


def capabilities_of(
    asked: Sequence[str], builder: EngineBuilder | None
) -> tuple[tuple[int, int], ...]:
    """Compute capabilities to compile for.

    Args:
        asked: As given, such as ``8.9`` or ``current``; empty for the default, which is Ampere to
            Blackwell, and this machine's GPU if a TensorRT engine is built here.
        builder: What builds the engine, or None.
    """
    from tome_export.plugins.aot import PTX_VERSIONS

    report = gpu.detect()
    here = [one.compute_capability for one in report.gpus[:1]]
    found = []
    for text in asked or store.DEFAULT_CAPABILITIES:
        if text == "current" and not here:
            raise UsageError(
                f"kernels for the current GPU were asked for, but {report.reason}; name its "
                "compute capability instead, such as 8.9"
            )
        found.append(here[0] if text == "current" else store.parse_capability(text))
    if not asked and builder is not None and builder.name == "tensorrt":
        found += [capability for capability in here if capability in PTX_VERSIONS]
    for major, minor in found:
        if (major, minor) not in PTX_VERSIONS:
            known = ", ".join(f"{major}.{minor}" for major, minor in PTX_VERSIONS)
            raise UsageError(
                f"compute capability is {major}.{minor}; the plugin's kernels can be compiled for "
                f"{known}: choose among these, or use --merge-op matmul"
            )
    return tuple(sorted(set(found)))


def refusal(merging: Merging) -> str | None:
    """Why the kernels cannot take a model's match and merge nodes, or None."""
    if not merging.matches and not merging.merges:
        return "the reducer has neither match nor merge nodes that a plugin could take"
    reasons = [match_contract.refusal(*shape) for shape in merging.matches]
    reasons += [merge_contract.refusal(*shape) for shape in merging.merges]
    return next(filter(None, reasons), None)


def compile_kernels(
    merging: Merging, capabilities: Sequence[tuple[int, int]], folder: Path, progress: Progress
) -> PluginInfo:
    """Compile what the merging nodes need into ``folder/plugins``; returns the manifest's entry."""
    from tome_export.plugins.aot import compile_ptx, compiler

    reason = refusal(merging)
    if reason:
        raise InputError(f"{reason}; use --merge-op matmul, which needs no kernel")
    progress.stage("Compile the plugin's kernels")
    needed = [match_contract.variant(*shape) for shape in merging.matches]
    needed += [merge_contract.variant(*shape) for shape in merging.merges]
    variants = {variant.name: variant for variant in needed}
    kernels = []
    for variant in variants.values():
        progress.detail(variant.name)
        binaries = [compile_ptx(variant, capability) for capability in capabilities]
        kernels.append(store.Kernel.of(variant, binaries))
    store.KernelStore(kernels).write(folder / store.FOLDER, compiler())
    return PluginInfo(
        kernels=tuple(variants),
        compute_capabilities=tuple(f"{major}.{minor}" for major, minor in capabilities),
        compiler=compiler(),
    )
