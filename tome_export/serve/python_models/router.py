"""Hands each request to one of several models that merge differently; runs inside the server.

Inputs and outputs are those of the models. A request parameter says which one:

- ``r``: merge at most that many tokens per layer. Taken is the model with the largest r that does
  not exceed it; if all do, the one that merges least.
- ``max_ms``: be as fast as that. Taken is the model that merges least among those whose measured
  latency fits; if none does, the fastest of them. If no model was measured, as with neither.
- Neither: the model that merges least, which is the largest budget.

``routes.json`` beside this file lists the models. A parameter that is no such number fails the
request it came with, and no other. An error of the model keeps its message, but not its code: the
server makes that INTERNAL.
"""

from __future__ import annotations

import asyncio
import json
import math
from pathlib import Path
from typing import Any

ROUTES = "routes.json"


class BadBudgetError(ValueError):
    """A parameter that names no budget; the message is for the client."""


class TritonPythonModel:
    """What the python backend calls."""

    def initialize(self, args: dict[str, str]) -> None:
        """Read the routes."""
        folder = Path(args["model_repository"]) / args["model_version"]
        self.routes = json.loads((folder / ROUTES).read_text())["routes"]
        self.tasks: set[asyncio.Task[None]] = set()

    async def execute(self, requests: list[Any]) -> None:
        """Take requests; each is answered when its model has answered it."""
        for request in requests:
            task = asyncio.create_task(self._reply(request, request.get_response_sender()))
            self.tasks.add(task)  # the loop itself would forget it
            task.add_done_callback(self.tasks.discard)

    async def _reply(self, request: Any, sender: Any) -> None:
        import triton_python_backend_utils as pb_utils

        try:
            response = await self._answer(request)
        except Exception as error:  # whatever it is, a client waits for an answer
            response = pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error)))
        sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    async def _answer(self, request: Any) -> Any:
        import triton_python_backend_utils as pb_utils

        try:
            route = chosen_route(self.routes, json.loads(request.parameters() or "{}"))
        except BadBudgetError as error:
            refusal = pb_utils.TritonError(str(error), pb_utils.TritonError.INVALID_ARG)
            return pb_utils.InferenceResponse(error=refusal)
        inner = pb_utils.InferenceRequest(
            model_name=route["model"],
            requested_output_names=list(request.requested_output_names()),
            inputs=request.inputs(),
            request_id=request.request_id(),
            preferred_memory=pb_utils.PreferredMemory(pb_utils.TRITONSERVER_MEMORY_CPU, 0),
        )
        answer = await inner.async_exec()
        if answer.has_error():
            return pb_utils.InferenceResponse(error=answer.error())
        return pb_utils.InferenceResponse(answer.output_tensors())


def chosen_route(routes: list[dict[str, Any]], parameters: dict[str, Any]) -> dict[str, Any]:
    """The route for the parameters of a request; only ``r`` and ``max_ms`` matter."""
    ordered = sorted(routes, key=lambda route: route["r"])
    if "r" in parameters and "max_ms" in parameters:
        raise BadBudgetError("both r and max_ms are given; give one of them")
    if "r" in parameters:
        r = _number("r", parameters["r"])
        fitting = [route for route in ordered if route["r"] <= r]
        return fitting[-1] if fitting else ordered[0]
    if "max_ms" in parameters:
        limit = _number("max_ms", parameters["max_ms"])
        measured = [route for route in ordered if route["ms"] is not None]
        fitting = [route for route in measured if route["ms"] <= limit]
        if measured:
            return fitting[0] if fitting else min(measured, key=lambda route: route["ms"])
    return ordered[0]


def _number(name: str, value: Any) -> float:
    """A parameter as a number; protocols without fractions send text."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not (math.isfinite(number) and number >= 0):
        raise BadBudgetError(f"{name} is {value!r}; expected a number, 0 or more")
    return number
