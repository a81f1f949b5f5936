"""Hands each request to one of several models of one model; runs inside the server.

The models merge differently, or are for images of different sizes, or both. Inputs and outputs are
those of the models; what differs between sizes is -1 in this model's config.

First the image size. ``pixel_values`` go to the models whose input has exactly their shape. Each
encoded image goes to the size that wastes least of it, by the width and height in its header: the
rule and its formula are ``best_size.waste``, beside this file. The request parameter ``size``, such
as ``448x224``, decides it for all images of a request. Images of one request that go to different
sizes are asked about in one request per size; the answers come in the order of the images. Outputs
whose shape differs between sizes cannot be put together, and such a request is refused.

Then, of that size's models, a request parameter says which one:

- ``r``: merge at most that many tokens per layer. Taken is the model with the largest r that does
  not exceed it; if all do, the one that merges least.
- ``max_ms``: be as fast as that. Taken is the model that merges least among those whose measured
  latency fits; if none does, the fastest of them. If no model was measured, as with neither.
- Neither: the model that merges least, which is the largest budget.

``routes.json`` beside this file lists the models. A parameter that is no such number or size fails
the request it came with, and no other. An error of the model keeps its message, but not its code:
the server makes that INTERNAL.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROUTES = "routes.json"
RULE, HEADERS = "best_size", "headers"
IMAGE, PIXELS = "image", "pixel_values"


class BadRequestError(ValueError):
    """A request that goes to no model; the message is for the client."""


class TritonPythonModel:
    """What the python backend calls."""

    def initialize(self, args: dict[str, str]) -> None:
        """Read the routes."""
        folder = Path(args["model_repository"]) / args["model_version"]
        self.settings = json.loads((folder / ROUTES).read_text())
        self.sizes = sizes_of(self.settings["routes"])
        if len(self.sizes) > 1:
            self.rule, self.headers = beside(RULE, folder), beside(HEADERS, folder)
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
            parameters = json.loads(request.parameters() or "{}")
            tensors = {tensor.name(): tensor for tensor in request.inputs()}
            sizes = self._sizes(tensors, parameters)
            groups = {
                size: (chosen_route(self._routes(size), parameters), np.flatnonzero(sizes == size))
                for size in dict.fromkeys(sizes)
            }
            if len(groups) == 1:
                ((route, _),) = groups.values()
                answer = await self._ask(route, request, request.inputs())
                if answer.has_error():
                    return pb_utils.InferenceResponse(error=answer.error())
                return pb_utils.InferenceResponse(answer.output_tensors())
            return await self._answer_together(request, groups)
        except BadRequestError as error:
            refusal = pb_utils.TritonError(str(error), pb_utils.TritonError.INVALID_ARG)
            return pb_utils.InferenceResponse(error=refusal)

    async def _answer_together(self, request: Any, groups: dict[str, Any]) -> Any:
        """The answers of models of several image sizes, each about some of the images."""
        import triton_python_backend_utils as pb_utils

        given = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
        answers = await asyncio.gather(
            *(
                self._ask(
                    route,
                    request,
                    [pb_utils.Tensor(name, array[rows]) for name, array in given.items()],
                )
                for route, rows in groups.values()
            )
        )
        for (size, (_, rows)), answer in zip(groups.items(), answers, strict=True):
            if answer.has_error():
                where = f"of the images that go to size {size} ({numbers(rows)}): "
                error = pb_utils.TritonError(where + answer.error().message())
                return pb_utils.InferenceResponse(error=error)
        outputs = []
        count = sum(len(rows) for _, rows in groups.values())
        for name in request.requested_output_names():
            parts = [pb_utils.get_output_tensor_by_name(one, name).as_numpy() for one in answers]
            if len({part.shape[1:] for part in parts}) > 1:
                shapes = ", ".join(
                    f"{size} {[*part.shape[1:]]}" for size, part in zip(groups, parts, strict=True)
                )
                raise BadRequestError(
                    f"the images go to sizes whose {name} differ in shape ({shapes}); ask about "
                    "each in a request of its own, or give the parameter size"
                )
            whole = np.empty((count, *parts[0].shape[1:]), parts[0].dtype)
            for (_, rows), part in zip(groups.values(), parts, strict=True):
                whole[rows] = part
            outputs.append(pb_utils.Tensor(name, whole))
        return pb_utils.InferenceResponse(outputs)

    async def _ask(self, route: dict[str, Any], request: Any, inputs: Sequence[Any]) -> Any:
        import triton_python_backend_utils as pb_utils

        inner = pb_utils.InferenceRequest(
            model_name=route["model"],
            requested_output_names=list(request.requested_output_names()),
            inputs=inputs,
            request_id=request.request_id(),
            preferred_memory=pb_utils.PreferredMemory(pb_utils.TRITONSERVER_MEMORY_CPU, 0),
        )
        return await inner.async_exec()

    def _routes(self, size: str) -> list[dict[str, Any]]:
        return [route for route in self.settings["routes"] if route["size"] == size]

    def _sizes(self, tensors: dict[str, Any], parameters: dict[str, Any]) -> np.ndarray[Any, Any]:
        """The image size ``[B]`` that each image of a request goes to."""
        asked = parameters.get("size")
        if asked is not None:
            text = str(asked)
            asked = f"{text}x{text}" if text.isdecimal() else text
            if asked not in self.sizes:
                raise BadRequestError(f"size is {text!r}; expected one of {', '.join(self.sizes)}")
        if PIXELS in tensors:
            rows, *shape = tensors[PIXELS].shape()
            return np.full(rows, self._size_of_pixels([*map(int, shape)], asked), object)
        (rows, *_), *_ = (tensor.shape() for tensor in tensors.values())
        if asked is not None or len(self.sizes) == 1:
            return np.full(rows, asked or self.sizes[0], object)
        if IMAGE not in tensors:
            raise BadRequestError(
                "the size that a video goes to is not chosen; give the parameter size, one of "
                f"{', '.join(self.sizes)}"
            )
        images = tensors[IMAGE].as_numpy()
        # DALI takes the bytes themselves, ``[B, bytes]``.
        files = map(bytes, images) if images.dtype == np.uint8 else images.reshape(-1)
        return np.array([self._size_of(data) for data in files], object)

    def _size_of_pixels(self, shape: list[int], asked: str | None) -> str:
        shapes: dict[str, list[int]] = {r["size"]: r["shape"] for r in self.settings["routes"]}
        if len(shapes) == 1:  # the server has compared the shape
            return next(iter(shapes))
        found = next((size for size in shapes if shapes[size] == shape), None)
        if found is None:
            known = ", ".join(f"{size} {shapes[size]}" for size in self.sizes)
            raise BadRequestError(f"pixel_values of an image are {shape}; there are {known}")
        if asked not in (None, found):
            raise BadRequestError(
                f"size is {asked} and pixel_values of an image are {shape}, size {found}; leave "
                "the parameter out, or give pixels of that size"
            )
        return found

    def _size_of(self, data: bytes) -> str:
        """The image size for one file; of one that has none the least: its decoder says why."""
        header = self.headers.read_header(data)
        if header is None:
            return self.sizes[0]
        sizes = [(int(height), int(width)) for height, width in (s.split("x") for s in self.sizes)]
        height, width = self.rule.best_size(
            header.upright, sizes, self.settings["crop_pct"], self.settings["resize"]
        )
        return f"{height}x{width}"


def sizes_of(routes: list[dict[str, Any]]) -> list[str]:
    """The image sizes of routes, such as ``448x224``, that of fewest pixels first."""

    def pixels(size: str) -> int:
        return math.prod(int(side) for side in size.split("x"))

    return sorted({route["size"] for route in routes}, key=pixels)


def numbers(rows: Sequence[int]) -> str:
    """Which images of a request, counted from 1, are meant."""
    shown = ", ".join(str(row + 1) for row in rows[:5])
    return f"{shown} and {len(rows) - 5} more" if len(rows) > 5 else shown


def beside(name: str, folder: Path) -> Any:
    """The module of a file that lies beside this one, whatever else has that name."""
    spec = importlib.util.spec_from_file_location(f"tome_export_{name}", folder / f"{name}.py")
    if spec is None or spec.loader is None:
        raise ImportError(f"{name}.py is not beside the model; write the repository again")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def chosen_route(routes: list[dict[str, Any]], parameters: dict[str, Any]) -> dict[str, Any]:
    """The route for the parameters of a request; only ``r`` and ``max_ms`` matter."""
    ordered = sorted(routes, key=lambda route: route["r"])
    if "r" in parameters and "max_ms" in parameters:
        raise BadRequestError("both r and max_ms are given; give one of them")
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
        raise BadRequestError(f"{name} is {value!r}; expected a number, 0 or more")
    return number
