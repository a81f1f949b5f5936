"""Evaluation on this machine: decoding in processes, inference in this one."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping

from tome_export.evaluation.classify import Classifier
from tome_export.evaluation.decode import Decode, decoded_chunks
from tome_export.evaluation.records import Record, Task
from tome_export.runtime.runner import Runner


def local_records(
    tasks: Iterable[Task],
    decode: Decode,
    workers: int,
    runners: Mapping[str, Runner],
    classifier: Classifier,
) -> Generator[Record, None, None]:
    """One record per chunk, in order.

    Args:
        tasks: Chunks.
        decode: Encoded image to pixels.
        workers: Processes that decode; 0 for none.
        runners: By run.
        classifier: What to keep.

    Raises:
        ExportError: if a runner fails, or processes cannot be started.
    """
    for decoded in decoded_chunks(tasks, decode, workers):
        yield classifier.record(decoded, runners)
