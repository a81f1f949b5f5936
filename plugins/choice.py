"""When the plugin is the better choice: the one table that ``--merge-op auto`` goes by.

Imports nothing heavy.
"""

from __future__ import annotations

from collections.abc import Mapping

LEAK = (
    "TensorRT keeps GPU memory at every change of the batch of such a plugin (NVIDIA/TensorRT "
    "issue 4849)"
)
"""Why a plugin is built for one batch size: ahead-of-time plugins load their code anew whenever the
input's shape changes, also back to an earlier one, and never unload it."""

ANY = "any"

PAYS_UP_TO_TOKENS: Mapping[str, int] = {ANY: 256}
"""Compute capability, such as ``9.0`` -> most tokens of a layer with which the kernels pay there.

``any`` stands for every GPU without an entry of its own. 256 is an estimate and not a measurement:
one program matches one image, so that beyond it a small batch takes longer than plain operators
(``plugins/match/README.md``). Rows of ``benchmarks/results/gpu.json`` replace it.
"""


def drawback(tokens: int, capability: tuple[int, int]) -> str | None:
    """Why plain operators are expected to be faster than the kernels, or None.

    ``tokens`` is the most N that a layer matches; ``capability`` is that of the GPU for the engine.
    """
    limit = PAYS_UP_TO_TOKENS.get("{}.{}".format(*capability), PAYS_UP_TO_TOKENS[ANY])
    if tokens <= limit:
        return None
    return f"a layer matches {tokens} tokens, and the kernels pay up to {limit}"
