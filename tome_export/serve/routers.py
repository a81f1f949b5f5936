"""Routers of a repository, which choose among models that merge differently."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from tome_export.artifact.document import Document, Measure, Part
from tome_export.errors import InputError
from tome_export.serve.client import PIPELINE, ROUTER, ROUTES
from tome_export.serve.config import (
    ModelFolder,
    ServeOptions,
    interface_of,
    python_config,
    python_folder,
    take_interface,
)
from tome_export.serve.repository import config_of, is_ours, models_in, versions_of

if TYPE_CHECKING:
    from tritonclient.grpc.model_config_pb2 import ModelConfig

    from tome_export.artifact import Artifact

ROUTER_INSTANCES = 4
"""Of a router, and of a cascade: an instance of that answers the requests that it has taken
together, and takes no other until the slowest of them is answered."""

ROUTES_FILE = "routes.json"


class RouteEntry(Part):
    """A model that the router may choose, its r and its latency; see ``Route``."""

    model: str
    r: Measure
    ms: Measure | None


class RouteList(Document):
    """``routes.json`` beside a router: the models that it may choose."""

    remedy: ClassVar[str] = "remove the router's folder and serve its models again"

    routes: tuple[RouteEntry, ...]


@dataclass(frozen=True)
class Route:
    """A model that a router may choose.

    Attributes:
        model: Its name on the server.
        r: Tokens merged per layer, as asked for; the mean if layers differ.
        ms: Measured latency of one image; None if it was not measured.
        config: The model's own config.
    """

    model: str
    r: float
    ms: float | None
    config: ModelConfig


def has_router(repository: Path, base: str) -> bool:
    """Whether the repository has a router of ours for the models of this base name."""
    return is_ours(repository / f"{base}{ROUTER}")


def router_folders(
    repository: Path,
    base: str,
    routes: Sequence[Route],
    pipelines: Sequence[Route],
    options: ServeOptions,
) -> list[ModelFolder]:
    """The routers of a base name, with the routes that they have in the repository already.

    Routes to models that the repository has no more are left out.

    Args:
        repository: Where they go.
        base: What the names of the models have in common.
        routes: To the models that are added or replaced.
        pipelines: To their pipelines; empty if they have none.
        options: Instances and queue limits. The routes are all that a router is: there is nothing
            to go back to, so its version is always 1.

    Returns:
        ``<base>_router``, then ``<base>_router_pipeline`` if there are pipelines to choose among;
        none if a single model is given and the repository has no router for it.

    Raises:
        InputError: if the routes do not go together, or those in the repository are unreadable.
    """
    name = f"{base}{ROUTER}"
    if len(routes) < 2 and not has_router(repository, base):
        return []
    merged = _merged(routes, _existing(repository, name))
    folders = [router_folder(name, merged, options)]
    if pipelines:
        there = models_in(repository)
        # Models that came without a router for images may have pipelines nevertheless.
        older = [
            Route(pipeline, route.r, route.ms, config_of(repository / pipeline))
            for route in merged
            if (pipeline := f"{route.model}{PIPELINE}") in there
        ]
        name = f"{name}{PIPELINE}"
        merged = _merged(pipelines, [*older, *_existing(repository, name)])
        if len(merged) > 1 or is_ours(repository / name):
            folders.append(router_folder(name, merged, options))
    return folders


def _existing(repository: Path, router: str) -> list[Route]:
    """The routes of a router whose models are there."""
    folder = repository / router
    if not is_ours(folder):
        return []
    there = models_in(repository)
    listed = RouteList.read(folder / str((*versions_of(folder), 1)[-1]) / ROUTES_FILE).routes
    return [
        Route(one.model, one.r, one.ms, config_of(repository / one.model))
        for one in listed
        if one.model in there
    ]


def _merged(new: Sequence[Route], old: Sequence[Route]) -> list[Route]:
    """A new route replaces the one to the same model."""
    return [*{route.model: route for route in (*old, *new)}.values()]


def router_folder(
    name: str, routes: Sequence[Route], options: ServeOptions | None = None
) -> ModelFolder:
    """A model that hands each request to one of several, by its parameter ``r`` or ``max_ms``.

    The routes may be models of pixels, or the pipelines of such models.

    Args:
        name: Of the router on the server.
        routes: At least one, in any order.
        options: Version and instances of the router.

    Raises:
        InputError: if two routes have the same model or r, or inputs or outputs differ.
    """
    options = options or ServeOptions()
    ordered = sorted(routes, key=lambda route: route.r)
    _check_routes(ordered)
    like = ordered[0].config
    config = python_config(name, min(route.config.max_batch_size for route in ordered), options)
    config.instance_group[0].count = max(ROUTER_INSTANCES, options.instances)
    # It hands requests on one by one, and of images that are taken together one whose bytes are not
    # as long as they say fails all.
    config.ClearField("dynamic_batching")
    config.parameters[ROUTES].string_value = ",".join(route.model for route in ordered)
    take_interface(config, like)
    listed = tuple(RouteEntry(model=one.model, r=one.r, ms=one.ms) for one in ordered)
    content = RouteList(routes=listed).model_dump()
    return python_folder(config, "router", ROUTES_FILE, content, options)


def route_of(artifact: Artifact, folder: ModelFolder, ms: float | None = None) -> Route:
    """The route to a model that serves an artifact."""
    merge = artifact.manifest.merge
    asked = re.match(r"r=(\d+)", merge.schedule)
    mean = sum(merge.r) / len(merge.r) if merge.r else 0
    return Route(folder.name, int(asked[1]) if asked else mean, ms, folder.config)


def _check_routes(routes: Sequence[Route]) -> None:
    if not routes:
        raise InputError("a router is given no models; expected 1 or more")
    first = routes[0]
    for before, route in itertools.pairwise(routes):
        if before.model != route.model and before.r == route.r:
            raise InputError(
                f"models {before.model} and {route.model} both merge r = {route.r:g}; a router "
                "needs one model for each r, give another --name"
            )
        if interface_of(route.config) != interface_of(first.config):
            raise InputError(
                f"models {first.model} and {route.model} have different inputs or outputs; "
                "a router needs artifacts of one model, give another --name"
            )
    names = [route.model for route in routes]
    for model in names:
        if names.count(model) > 1:
            raise InputError(f"model {model} is given twice to a router; give it once")


def of_one_shape(configs: Sequence[ModelConfig]) -> bool:
    """Whether models that are alike in all else also have outputs of one shape.

    The tokens that a vision tower gives are fewer for a larger r, and then no model can stand in
    for another.
    """

    def shape(config: ModelConfig) -> list[tuple[int, ...]]:
        return [tuple(tensor.dims) for tensor in config.output]

    def rest(config: ModelConfig) -> list[tuple[object, ...]]:
        inputs = [(t.name, t.data_type, *t.dims) for t in config.input]
        return [*inputs, *((t.name, t.data_type, len(t.dims)) for t in config.output)]

    first, *others = configs
    return not any(rest(one) == rest(first) and shape(one) != shape(first) for one in others)
