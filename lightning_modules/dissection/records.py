"""The units of a network, explained by all processes together and written down one by one."""

import json
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from lightning_modules.nn.statistics import gather_over_ranks

Record = dict[str, Any]


def explain_units(
    trainer: Any,
    units: Sequence[int],
    areas: Mapping[int, int],
    key: str,
    explain: Callable[[int], Record],
) -> list[Record]:
    """A record of every unit, the same on any number of processes if ``explain`` is.

    Whoever is free takes the next unit. Each record is appended to ``units/rank-R.jsonl`` in the run directory as soon
    as it is there; a run that is continued makes only those that are missing.

    Args:
        trainer: of the run.
        units: their numbers.
        areas: positions on which a unit fires; those with many come first, so that no process is left with one.
        key: hash of everything that a record depends on; records with another one do not count.
        explain: makes the record of a unit, with its number as ``unit``, of plain values.

    Returns:
        The records in the order of the units' numbers, on every process.
    """
    folder = Path(trainer.default_root_dir, "units")
    done = trainer.strategy.broadcast(
        _finished(folder, key, set(units)) if trainer.is_global_zero else None
    )
    waiting = sorted({*units} - done.keys(), key=lambda unit: (-areas[unit], unit))
    bar = tqdm(
        total=len(waiting) + len(done),
        initial=len(done),
        desc="explaining units",
        unit="unit",
        disable=not trainer.is_global_zero,
        leave=False,
    )
    folder.mkdir(parents=True, exist_ok=True)
    mine = []
    with (folder / f"rank-{trainer.global_rank}.jsonl").open("ab") as file, bar:
        if file.tell():  # the last line may have been cut off by a kill
            file.write(b"\n")
        for place in _deal(trainer, len(waiting)):
            line = json.dumps({"search": key, **explain(waiting[place])})
            file.write(line.encode() + b"\n")
            file.flush()
            mine.append(json.loads(line))
            bar.update(len(done) + place + 1 - bar.n)
    for made in gather_over_ranks(trainer, mine):
        done |= {record["unit"]: record for record in made}
    for record in done.values():
        record.pop("search", None)
    return [done[unit] for unit in sorted(done)]


def _finished(folder: Path, key: str, units: set[int]) -> dict[int, Record]:
    found: dict[int, Record] = {}
    for path in sorted(folder.glob("rank-*.jsonl")):
        for line in path.read_bytes().splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                continue  # a kill in the middle of the line
            if record["search"] == key and record["unit"] in units:
                found[record["unit"]] = record
    return found


def _deal(trainer: Any, count: int) -> Iterator[int]:
    """Places for this process, one at a time."""
    if trainer.world_size == 1:
        yield from range(count)
        return
    store = torch.distributed.distributed_c10d._get_default_store()
    # A counter of its own, should the same units be explained twice in one process group.
    counter = trainer.strategy.broadcast(uuid.uuid4().hex)
    while (place := store.add(counter, 1) - 1) < count:
        yield place
