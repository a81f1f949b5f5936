"""A model of one batch size, and the batching model, which takes any number of rows up to that."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tome_export.serve.config import (
    add_batching,
    add_interface,
    folder_from_source,
    label_files,
)
from tome_export.serve.pipeline_models import python_config, python_folder
from tome_export.serve.source import FIXED
from tome_export.serve.spec import ModelFolder

if TYPE_CHECKING:
    from tome_export.serve.source import Source
    from tome_export.serve.spec import ServeOptions


def folders_from_source(
    source: Source, name: str, options: ServeOptions, *, asked_by_models: bool = True
) -> list[ModelFolder]:
    """The model with the file, and last what users call: the same one, or a batching model.

    A batch size of 1 leaves nothing to fill up: users call the file itself, and the wire is spared
    a copy through another process. Pipelines, routers and cascades cannot: the server batches
    them, and lets them ask only models that it batches as well.

    Args:
        source: What is served.
        name: What users call.
        options: How; None as version stands for 1.
        asked_by_models: Whether a pipeline, router or cascade may ask it.

    Raises:
        UsageError: see ``folder_from_source``.
    """
    batch = source.batch
    if not batch.is_static or (batch.max == 1 and not asked_by_models):
        return [folder_from_source(source, name, options)]
    model = folder_from_source(source, f"{name}{FIXED}", options, behind=True)
    return [model, batching_folder(source, name, options)]


def batching_folder(source: Source, name: str, options: ServeOptions) -> ModelFolder:
    """A model that collects requests, fills them up to the batch, and asks ``<name>_fixed``.

    The queue is its own: the model behind it is given one full batch after the other.

    Args:
        source: What the model behind it is; of one batch size.
        name: What users call.
        options: Version, queue and instances. There is one process more than instances of the
            model: it collects the next batch while they run.
    """
    config = python_config(name, source.batch.max, options)
    config.instance_group[0].count = options.instances + 1
    add_interface(config, source, batched=True, labelled=True)
    add_batching(config, options)
    folder = python_folder(config, "fixed", "fixed.json", {"model": f"{name}{FIXED}"}, options)
    return ModelFolder(name, config, {**folder.files, **label_files(source)})
