"""What is in ``.wandb`` files, in which wandb keeps a run; wandb itself offers nothing that reads them."""

import json
from collections.abc import Iterable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

MAGIC = b":W&B"
BLOCK = 32768
HEADER = 7
_WHOLE, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


def read_records(path: Path) -> Iterator[Any]:
    """The records as wandb's own protobuf messages, up to where a kill cut the file off.

    The container is LevelDB's log format behind seven bytes: blocks of 32 KiB, in them pieces of records behind
    checksum, length and kind (the only one, the first, a middle or the last piece of a record).

    Raises:
        ValueError: if the file is something else.
    """
    messages: Any = import_module("wandb.proto.wandb_internal_pb2")
    data, whole, position = path.read_bytes(), b"", HEADER
    if data and data[:4] != MAGIC:
        raise ValueError(f"{path} does not begin with {MAGIC.decode()}, so it is not a wandb file")
    while position + HEADER <= len(data):
        if BLOCK - position % BLOCK < HEADER:
            position += BLOCK - position % BLOCK
            continue
        size = int.from_bytes(data[position + 4 : position + 6], "little")
        kind = data[position + 6]
        end = position + HEADER + size
        if kind not in (_WHOLE, _FIRST, _MIDDLE, _LAST) or end > len(data):
            return
        piece = data[position + HEADER : end]
        whole = piece if kind in (_WHOLE, _FIRST) else whole + piece
        position = end
        if kind in (_WHOLE, _LAST):
            record = messages.Record()
            record.ParseFromString(whole)
            yield record


def values(items: Iterable[Any]) -> dict[str, Any]:
    """Keys and values of a record; those of nested keys as dicts in dicts."""
    found: dict[str, Any] = {}
    for item in items:
        *above, last = list(item.nested_key) or [item.key]
        inside = found
        for key in above:
            inside = inside.setdefault(key, {})
        inside[last] = json.loads(item.value_json)
    return found


def history(path: Path) -> Iterator[dict[str, Any]]:
    """The rows that were logged."""
    for record in read_records(path):
        if record.WhichOneof("record_type") == "history":
            yield values(record.history.item)
