"""Routers of a repository, which choose among models that differ in r, image size or both."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from tome_export.artifact.document import Document, Measure, Part, Size
from tome_export.data import best_size, headers
from tome_export.errors import InputError
from tome_export.serve.config import ModelFolder, ServeOptions, front_config, python_folder
from tome_export.serve.model_file import image_shape
from tome_export.serve.names import PIPELINE, ROUTER, ROUTES
from tome_export.serve.repository import config_of, is_ours, models_in, versions_of
from tome_export.spec import Resize

if TYPE_CHECKING:
    from tritonclient.grpc.model_config_pb2 import ModelConfig

    from tome_export.artifact import Artifact

ROUTES_FILE = "routes.json"


class Route(Part):
    """A model that a router may choose.

    Attributes:
        model: Its name.
        r: Tokens merged per layer, as asked for; the mean if layers differ.
        ms: Measured latency of one image.
        size: Size of its images, such as ``448x224``.
        shape: Of the pixels of one image or video, as the model takes them.
        weights: Digest of the weights, without embeddings of positions where that is known.
    """

    model: str
    r: Measure
    ms: Measure | None
    size: str
    shape: tuple[Size, ...]
    weights: str = ""


class RouteList(Document):
    """``routes.json`` beside a router: the models that it may choose.

    ``crop_pct`` and ``resize`` are those of ``spec.Preprocessing``: how an image is brought to the
    size of any of the models.
    """

    remedy: ClassVar[str] = "remove the router's folder and serve its models again"

    routes: tuple[Route, ...]
    crop_pct: Measure = 1.0
    resize: Resize = "crop"

    @property
    def sizes(self) -> set[str]:
        """Image sizes of the models."""
        return {route.size for route in self.routes}


def has_router(repository: Path, base: str) -> bool:
    """Whether the repository has a router of ours for the models of this base name."""
    return is_ours(repository / f"{base}{ROUTER}")


def sizes_behind(repository: Path, base: str) -> set[str]:
    """Image sizes of the models behind the routers of a base name; none if there are none."""
    return _routes_in(repository, f"{base}{ROUTER}").sizes


def router_folders(
    repository: Path,
    base: str,
    listed: RouteList,
    folders: Sequence[ModelFolder],
    options: ServeOptions,
) -> list[ModelFolder]:
    """The routers of a base name, with the routes that they have in the repository already.

    Routes to models that the repository has no more are left out; ``listed`` and ``folders`` are
    those that are added or replaced. A router is nothing but its routes, and its version always 1.
    There is ``<base>_router``, then ``<base>_router_pipeline`` if there are pipelines to choose
    among; none if a single model is given and the repository has no router for it.
    """
    name, image_name = f"{base}{ROUTER}", f"{base}{ROUTER}{PIPELINE}"
    if len(listed.routes) < 2 and not has_router(repository, base):
        return []
    configs = {folder.name: folder.config for folder in folders}
    known = {*models_in(repository), *configs}

    def router(name: str, routes: Sequence[Route]) -> ModelFolder:
        older = (one.model for one in routes if one.model not in configs)
        older_configs = {model: config_of(repository / model) for model in older}
        made = listed.model_copy(update={"routes": tuple(routes)})
        return router_folder(name, made, {**older_configs, **configs}, options)

    # A new route replaces the one to the same model.
    by_model = {one.model: one for one in (*_routes_in(repository, name).routes, *listed.routes)}
    merged = [route for route in by_model.values() if route.model in known]
    routers = [router(name, merged)]
    images = [
        route.model_copy(update={"model": pipeline})
        for route in merged
        if (pipeline := f"{route.model}{PIPELINE}") in known
    ]
    if options.preprocess and (len(images) > 1 or is_ours(repository / image_name)):
        routers.append(router(image_name, images))
    return routers


def _routes_in(repository: Path, router: str) -> RouteList:
    folder = repository / router
    if not is_ours(folder):
        return RouteList(routes=())
    return RouteList.read(folder / str((*versions_of(folder), 1)[-1]) / ROUTES_FILE)


def router_folder(
    name: str,
    listed: RouteList,
    configs: Mapping[str, ModelConfig],
    options: ServeOptions | None = None,
) -> ModelFolder:
    """A model that hands each request to one of several; see ``python_models/router.py``.

    The routes, at least one, are to models of pixels or to pipelines; ``configs`` are of at least
    these models.
    """
    options = options or ServeOptions()
    ordered = sorted(listed.routes, key=lambda route: (route.size, route.r))
    for before, route in itertools.pairwise(ordered):
        if (before.size, before.r) == (route.size, route.r):
            at = f" at {route.size}" if len(listed.sizes) > 1 else ""
            raise InputError(
                f"models {before.model} and {route.model} both merge r = {route.r:g}{at}; a router "
                "needs one model for each r, give another --name"
            )
    config = front_config(
        "router",
        name,
        {route.model: configs[route.model] for route in ordered},
        options,
        sizes={route.model: route.size for route in ordered},
        parameters={ROUTES: {"string_value": ",".join(route.model for route in ordered)}},
        # It hands requests on one by one, and of images that are taken together one whose bytes are
        # not as long as they say fails all.
        dynamic_batching=None,
    )
    content = listed.model_copy(update={"routes": tuple(ordered)}).model_dump()
    modules = [Path(best_size.__file__), Path(headers.__file__)]
    return python_folder(config, "router", ROUTES_FILE, content, options, modules)


def route_to(artifact: Artifact, model: str, ms: float | None = None) -> Route:
    """The route to a model that serves an artifact."""
    merge, weights = artifact.manifest.merge, artifact.manifest.model.weights
    asked = re.match(r"r=(\d+)", merge.schedule)
    mean = sum(merge.r) / len(merge.r) if merge.r else 0
    return Route(
        model=model,
        r=int(asked[1]) if asked else mean,
        ms=ms,
        size=str(artifact.manifest.preprocessing.image_size),
        shape=image_shape(artifact.manifest.input),
        weights=weights.common_sha256 or weights.state_sha256,
    )


def mixed_weights_note(repository: Path, router: str) -> str:
    """What to say of a router whose models have different weights; empty of any other."""
    listed = _routes_in(repository, router)
    by_weights: dict[str, list[str]] = {}
    for route in listed.routes:
        by_weights.setdefault(route.weights, []).append(route.model)
    if len(by_weights) < 2:
        return ""
    groups = "; ".join(", ".join(models) for models in by_weights.values())
    return (
        f"{router} chooses among models of different weights now ({groups}): serve the others "
        "again too, or give this one another --name"
    )
