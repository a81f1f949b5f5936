"""The model in front of one of fixed batch, which takes any number of rows up to that batch."""

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


def folders_from_source(source: Source, name: str, options: ServeOptions) -> list[ModelFolder]:
    """The model with the file, and last what users call: the same one, or that in front of it.

    Args:
        source: What is served.
        name: What users call.
        options: How; None as version stands for 1.

    Raises:
        UsageError: see ``folder_from_source``.
    """
    if not source.batch.is_static:
        return [folder_from_source(source, name, options)]
    model = folder_from_source(source, f"{name}{FIXED}", options)
    return [model, front_folder(source, name, options)]


def front_folder(source: Source, name: str, options: ServeOptions) -> ModelFolder:
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
    add_interface(config, source, batched=True)
    add_batching(config, options)
    folder = python_folder(config, "fixed", "fixed.json", {"model": f"{name}{FIXED}"}, options)
    return ModelFolder(name, config, {**folder.files, **label_files(source)})
