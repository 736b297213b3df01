"""Reads ``.wandb`` files, with wandb's own messages."""

import json
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

BLOCK = 32768
HEADER = 7


class WandbFile:
    """What one process recorded of a wandb run.

    Args:
        folder: ``offline-run-...``.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (path,) = folder.glob("run-*.wandb")
        records = list(_records(path))
        kinds = [record.WhichOneof("record_type") for record in records]
        self.run = records[kinds.index("run")].run
        self.finished = "exit" in kinds
        self.config: dict[str, Any] = {}
        self.summary: dict[str, Any] = {}
        for record in records:
            self.config |= _values(record.config.update)
            self.summary |= _values(record.summary.update)
        self.history = [_values(r.history.item) for r in records if r.history.item]
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


def _records(path: Path) -> Iterator[Any]:
    """The records: LevelDB's log format behind seven bytes."""
    wandb_internal_pb2: Any = import_module("wandb.proto.wandb_internal_pb2")
    data, whole, position = path.read_bytes(), b"", HEADER
    assert data[:4] == b":W&B"
    while position + HEADER <= len(data):
        if BLOCK - position % BLOCK < HEADER:
            position += BLOCK - position % BLOCK
            continue
        size = int.from_bytes(data[position + 4 : position + 6], "little")
        kind = data[position + 6]
        whole += data[position + HEADER : position + HEADER + size]
        position += HEADER + size
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            yield record
            whole = b""


def _values(items: Any) -> dict[str, Any]:
    """Keys and values; those of nested keys as dicts in dicts."""
    values: dict[str, Any] = {}
    for item in items:
        *above, last = list(item.nested_key) or [item.key]
        inside = values
        for key in above:
            inside = inside.setdefault(key, {})
        inside[last] = json.loads(item.value_json)
    return values
