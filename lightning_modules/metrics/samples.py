"""Columns of samples over all batches and processes, for metrics that need every sample at once."""

from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat


def score_array(values: ArrayLike | Tensor, name: str) -> NDArray[np.float64]:
    """Scores [N] of any type as a flat float64 array.

    Raises:
        ValueError: no value, or nan.
    """
    if isinstance(values, Tensor):
        values = values.detach().cpu().double().numpy()
    array = np.asarray(values, dtype=np.float64).ravel()
    if not len(array):
        raise ValueError(f"{name} is empty: the metrics need samples of both sides")
    if np.isnan(array).any():
        raise ValueError(f"{name} contains nan")
    return array


def label_array(values: ArrayLike | Tensor) -> NDArray[np.int64]:
    """Labels [N] of any type as a flat int64 array."""
    if isinstance(values, Tensor):
        values = values.detach().cpu().numpy()
    return np.asarray(values, dtype=np.int64).ravel()


class SampleMetric(Metric):
    """Keeps columns of samples, one of them ``index``, over all batches and processes.

    A process may have no batch at all. A sample that comes twice, as samplers pad with, counts
    once.

    Attributes:
        columns: dtype by name, without ``index``; set by the subclass. float64 is float32 on MPS.
    """

    full_state_update = False
    higher_is_better = None
    is_differentiable = False

    columns: ClassVar[dict[str, torch.dtype]]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name in self._dtypes():
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def add(self, **batch: Tensor) -> None:
        """Adds a batch: every column of ``columns``, and ``index``, the position in the dataset, each [B].

        Raises:
            ValueError: columns of different lengths.
        """
        lengths = {name: column.numel() for name, column in batch.items()}
        if len(set(lengths.values())) != 1:
            raise ValueError(f"the columns of a batch differ in length: {lengths}")
        for name, dtype in self._dtypes().items():
            getattr(self, name).append(batch[name].detach().to(dtype).ravel())

    def rows(self) -> dict[str, NDArray[Any]]:
        """The columns and ``index``, each [N], one row per sample in the order of ``index``."""
        table = {}
        for name, dtype in self._dtypes().items():
            state = getattr(self, name)
            column = dim_zero_cat(state) if len(state) else torch.empty(0, dtype=dtype)
            table[name] = column.cpu().numpy()
        first = np.unique(table["index"], return_index=True)[1]
        return {name: column[first] for name, column in table.items()}

    def _dtypes(self) -> dict[str, torch.dtype]:
        dtypes = {**self.columns, "index": torch.long}
        if self.device.type == "mps":
            return {n: torch.float32 if d == torch.float64 else d for n, d in dtypes.items()}
        return dtypes

    def _sync_dist(self, *args: Any, **kwargs: Any) -> None:
        # torchmetrics gathers float32 from a process without data, whatever the type on the others.
        for name, dtype in self._dtypes().items():
            if not getattr(self, name):
                setattr(self, name, [torch.empty(0, dtype=dtype, device=self.device)])
        super()._sync_dist(*args, **kwargs)
