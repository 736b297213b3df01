"""Predictions as a table."""

import csv
import os
from collections import Counter
from collections.abc import Sequence
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from torch import Tensor

from callbacks.media import run_directory
from lightning_modules.nn.statistics import gather_over_ranks

Row = dict[str, Any]


class PredictionWriter(BasePredictionWriter):
    """Writes ``predictions.csv`` into the run directory: one row for every sample, in the order of the data.

    Protocol: ``predict_step`` returns a dict of columns of equal length, each a tensor [B] or a list of text or
    numbers. The column ``index`` is taken from the batch where the module does not return it, and so is ``path``, the
    file an image came from, where the batch has it.

    The rows of all ranks are gathered and each index is written once. Rank 0 prints where the table lies and, if there
    is a column ``decision``, how often each decision was taken.

    Args:
        filename: of the table, within the run directory.

    Raises:
        ValueError: if the file name is empty or leaves the run directory.
    """

    def __init__(self, filename: str = "predictions.csv") -> None:
        super().__init__(write_interval="batch")
        if not filename or os.path.basename(filename) != filename:
            raise ValueError(f"filename={filename!r} must be a plain file name")
        self.filename = filename
        self._rows: dict[tuple[int, int], Row] = {}

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts an empty table."""
        self._rows = {}

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Collects the rows of a batch.

        Raises:
            ValueError: if the prediction is no table.
        """
        table = _columns(prediction, batch, type(pl_module).__name__)
        for values in zip(*table.values(), strict=True):
            row = dict(zip(table, values, strict=True))
            self._rows.setdefault((dataloader_idx, int(row["index"])), row)

    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gathers the rows and writes them."""
        parts = gather_over_ranks(trainer, self._rows)
        self._rows = {}
        if not trainer.is_global_zero:
            return
        merged: dict[tuple[int, int], Row] = {}
        for part in parts:
            merged |= part
        rows = [merged[key] for key in sorted(merged)]
        if len({loader for loader, _ in merged}) > 1:
            rows = [{"dataloader": key[0], **merged[key]} for key in sorted(merged)]
        self._write(trainer, rows)

    def _write(self, trainer: Trainer, rows: list[Row]) -> None:
        path = run_directory(trainer) / self.filename
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(path.name + ".part")
        with beside.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]) if rows else ["index"])
            writer.writeheader()
            writer.writerows(rows)
        os.replace(beside, path)
        summary = f"{len(rows)} predictions in {path}"
        if rows and "decision" in rows[0]:
            counts = Counter(str(row["decision"]) for row in rows)
            summary += ": " + ", ".join(f"{value} {count}" for value, count in counts.most_common())
        print(summary)


def _columns(prediction: Any, batch: Any, module: str) -> dict[str, list[Any]]:
    """Checked columns as lists, ``index`` and ``path`` first."""
    if not isinstance(prediction, dict) or not prediction:
        raise ValueError(
            f"PredictionWriter needs {module}.predict_step to return a dict of columns, "
            f"not {type(prediction).__name__}"
        )
    given = batch if isinstance(batch, dict) else {}
    lead = {
        key: source[key]
        for key in ("index", "path")
        for source in (given, prediction)
        if key in source
    }
    if "index" not in lead:
        raise ValueError(
            f"PredictionWriter needs the column 'index' to put rows in order; let the dataset or "
            f"{module}.predict_step give it"
        )
    table: dict[str, list[Any]] = {}
    for name, column in {**lead, **prediction}.items():
        if isinstance(column, Tensor):
            if column.ndim != 1:
                raise ValueError(
                    f"column {name!r} of {module}.predict_step has shape {list(column.shape)}; expected [B]"
                )
            column = column.tolist()
        table[name] = list(column)
    lengths = {name: len(column) for name, column in table.items()}
    if len(set(lengths.values())) != 1:
        raise ValueError(f"columns of {module}.predict_step differ in length: {lengths}")
    return table
