"""A ``.wandb`` file with what lies beside it."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from callbacks.wandb_records import history, read_records, values


class WandbFile:
    """What one process recorded of a wandb run.

    Args:
        folder: ``offline-run-...``.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (path,) = folder.glob("run-*.wandb")
        records = list(read_records(path))
        kinds = [record.WhichOneof("record_type") for record in records]
        self.run = records[kinds.index("run")].run
        self.finished = "exit" in kinds
        self.config: dict[str, Any] = {}
        self.summary: dict[str, Any] = {}
        for record in records:
            self.config |= values(record.config.update)
            self.summary |= values(record.summary.update)
        self.history = list(history(path))
        self.step_metrics = {
            r.metric.name or r.metric.glob_name: r.metric.step_metric
            for r, kind in zip(records, kinds, strict=True)
            if kind == "metric"
        }

    def media(self, kind: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """Key and description of everything in the history that is of this kind, e.g. ``images/separated``."""
        for row in self.history:
            for key, value in row.items():
                if isinstance(value, dict) and value.get("_type") == kind:
                    yield key, value

    def images(self) -> Iterator[tuple[str, str, Path]]:
        """Key, caption and file of every picture."""
        for key, value in self.media("images/separated"):
            captions = value.get("captions") or [""] * len(value["filenames"])
            for caption, name in zip(captions, value["filenames"], strict=True):
                yield key, caption, self.folder / "files" / name

    def tables(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Key and content, ``columns`` and ``data``, of every table."""
        for key, value in self.media("table-file"):
            yield key, json.loads((self.folder / "files" / value["path"]).read_text())


def scalars(row: dict[str, Any]) -> dict[str, float]:
    """The metrics of a row of the history, without wandb's own columns."""
    return {
        key: value
        for key, value in row.items()
        if not key.startswith("_") and not isinstance(value, dict)
    }
