"""Routers of a repository, to which models may be added later."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tome_export.serve.client import PIPELINE, ROUTER
from tome_export.serve.pipeline_models import Route, router_folder, routes_from_json
from tome_export.serve.repository import config_of, is_ours, models_in, versions_of
from tome_export.serve.spec import ModelFolder, ServeOptions


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
    file = folder / str((*versions_of(folder), 1)[-1]) / "routes.json"
    there = models_in(repository)
    text = file.read_text() if file.is_file() else ""
    return routes_from_json(text, lambda model: config_of(repository / model), there, str(file))


def _merged(new: Sequence[Route], old: Sequence[Route]) -> list[Route]:
    """A new route replaces the one to the same model."""
    return [*{route.model: route for route in (*old, *new)}.values()]
