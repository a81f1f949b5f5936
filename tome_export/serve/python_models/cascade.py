"""Gives each image to one of several models that merge differently; runs inside the server.

Inputs are those of the models. Outputs are theirs, then ``budget`` INT32 ``[B, 1]``, the index of
the model whose answer an image got, by MACs ascending, and ``macs`` INT64 ``[B, 1]``, what the
image cost: the policy and every model that was run for it.

``cascade.json`` beside this file names the models and holds the calibrated policy; ``policy.py``
beside it is what the calibration computed with. The images of all requests that are answered
together are grouped by budget, and each group is one request to its model. Under the policy
``confidence`` all images go to the first model and only the unsure ones on to the next.

An error of a model fails the requests whose images it was given, and no other.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

SETTINGS, POLICY = "cascade.json", "policy.py"
OWN_OUTPUTS = ("budget", "macs")

Array = np.ndarray[Any, Any]
Ask = Callable[[int, Array], Awaitable[dict[str, Array]]]


class MemberError(Exception):
    """A model's refusal; the message is for the client."""


class TritonPythonModel:
    """What the python backend calls."""

    def initialize(self, args: dict[str, str]) -> None:
        """Read the policy and the names of the models."""
        folder = Path(args["model_repository"]) / args["model_version"]
        self.policy = policy_from_file(folder / POLICY)
        self.settings = self.policy.settings_from_json((folder / SETTINGS).read_text())
        config = json.loads(args["model_config"])
        self.input = config["input"][0]["name"]
        names = [output["name"] for output in config["output"]]
        self.outputs = [name for name in names if name not in OWN_OUTPUTS]

    async def execute(self, requests: list[Any]) -> list[Any]:
        """Answer all requests together."""
        import triton_python_backend_utils as pb_utils

        given = [pb_utils.get_input_tensor_by_name(r, self.input).as_numpy() for r in requests]
        pixels = np.concatenate(given)
        found, errors = await run_cascade(self.policy, self.settings, pixels, self._ask)
        responses = []
        ends = np.cumsum([len(part) for part in given])
        for request, part, end in zip(requests, given, ends, strict=True):
            rows = slice(int(end) - len(part), int(end))
            failed = [error for index, error in errors.items() if rows.start <= index < rows.stop]
            if failed:
                # One error object in several responses ends the server: each has its own.
                error = pb_utils.TritonError(failed[0])
                responses.append(pb_utils.InferenceResponse(error=error))
                continue
            asked = set(request.requested_output_names())
            tensors = [pb_utils.Tensor(n, a[rows]) for n, a in found.items() if n in asked]
            responses.append(pb_utils.InferenceResponse(tensors))
        return responses

    async def _ask(self, budget: int, pixels: Array) -> dict[str, Array]:
        """One request to a model."""
        import triton_python_backend_utils as pb_utils

        inner = pb_utils.InferenceRequest(
            model_name=self.settings.members[budget].model,
            requested_output_names=self.outputs,
            inputs=[pb_utils.Tensor(self.input, np.ascontiguousarray(pixels))],
            preferred_memory=pb_utils.PreferredMemory(pb_utils.TRITONSERVER_MEMORY_CPU, 0),
        )
        answer = await inner.async_exec()
        if answer.has_error():
            raise MemberError(answer.error().message())
        return {
            name: pb_utils.get_output_tensor_by_name(answer, name).as_numpy()
            for name in self.outputs
        }


def policy_from_file(path: Path) -> ModuleType:
    """Load ``policy.py`` from beside this file, whatever else of that name there is."""
    spec = importlib.util.spec_from_file_location("tome_export_cascade_policy", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} cannot be loaded")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


async def run_cascade(
    policy: ModuleType, settings: Any, pixels: Array, ask: Ask
) -> tuple[dict[str, Array], dict[int, str]]:
    """Run a cascade on a batch.

    Args:
        policy: The module ``policy``.
        settings: The content of ``cascade.json``, by the policy's ``settings_from_json``.
        pixels: Images as the members take them, ``[B, ...]``.
        ask: Gives the outputs of a member for some of the images, or raises ``MemberError``.

    Returns:
        Output name -> ``[B, ...]``, the members' first one being their logits, then ``budget`` and
        ``macs``; and the error of each image that has one, by its index. Rows of such images hold
        nothing.
    """
    count, members = len(pixels), settings.members
    budget = policy.first_budgets(settings, pixels)
    macs = np.full(count, settings.policy_macs, np.int64)
    found: dict[str, Array] = {}
    errors: dict[int, str] = {}

    async def visit(member: int, rows: Array) -> None:
        macs[rows] += members[member].macs
        try:
            answer = await ask(member, pixels[rows])
        except MemberError as error:
            errors.update(dict.fromkeys(rows.tolist(), str(error)))
            return
        for name, array in answer.items():
            if name not in found:
                found[name] = np.zeros((count, *array.shape[1:]), array.dtype)
            found[name][rows] = array
        budget[rows] = member
        unsure = rows[policy.goes_on(settings, member, next(iter(answer.values())))]
        if len(unsure):
            await visit(member + 1, unsure)

    groups = [(int(member), np.flatnonzero(budget == member)) for member in np.unique(budget)]
    await asyncio.gather(*(visit(member, rows) for member, rows in groups))
    own = {"budget": budget.astype(np.int32)[:, None], "macs": macs[:, None]}
    return {**found, **own}, errors
