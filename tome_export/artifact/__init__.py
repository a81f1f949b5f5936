"""The artifact directory and the typed files in it: what every command after ``build`` takes."""

from tome_export.artifact.directory import Artifact, write_manifest
from tome_export.artifact.files import locked, write_json, writing_to
from tome_export.artifact.manifest import FORMAT, MANIFEST, MODEL, Manifest
from tome_export.artifact.parity import PARITY
from tome_export.artifact.staging import staged

__all__ = [
    "FORMAT",
    "MANIFEST",
    "MODEL",
    "PARITY",
    "Artifact",
    "Manifest",
    "locked",
    "staged",
    "write_json",
    "write_manifest",
    "writing_to",
]
