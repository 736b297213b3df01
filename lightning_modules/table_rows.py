"""Modules whose test is a table: rows that score the same samples, each with a threshold from validation data."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lightning_modules.paper import PaperModule


class TableRows(PaperModule):
    """A module with rows, their titles, and a threshold of each that goes into checkpoints.

    With ``test_metrics`` (row to metric) it has what :class:`callbacks.AnomalyReport` and
    :class:`callbacks.OpenSetEvaluationCallback` print.
    """

    row_titles: Mapping[str, str]
    """Row to description, in the order of the printed table; a module may lack some of the rows."""
    rows: list[str]
    thresholds: Tensor
    """Of every row; nan before it was chosen."""

    def add_rows(self, rows: Sequence[str]) -> None:
        """Says which rows there are."""
        self.rows = list(rows)
        self.register_buffer("thresholds", torch.full((len(self.rows),), torch.nan))

    @property
    def ready_rows(self) -> list[str]:
        """Rows that can be computed by now."""
        return self.rows

    @property
    def row_thresholds(self) -> dict[str, float | None]:
        """The threshold of each row; None before it was chosen."""
        values = self.thresholds.tolist()
        return {row: v if v == v else None for row, v in zip(self.rows, values, strict=True)}

    def set_threshold(self, row: str, threshold: Tensor | float) -> None:
        """Chooses the threshold of a row."""
        self.thresholds[self.rows.index(row)] = threshold

    def demand_threshold(self, row: str) -> Tensor:
        """The threshold of the row that a prediction decides with.

        Raises:
            RuntimeError: it was not chosen yet, or its row cannot be computed yet.
        """
        threshold = self.thresholds[self.rows.index(row)]
        if threshold.isnan() or row not in self.ready_rows:
            raise RuntimeError(
                f"the checkpoint has no threshold for score {row!r}: it was written before the first validation "
                "of its phase; train on, or choose another --model.decision_score"
            )
        return threshold
