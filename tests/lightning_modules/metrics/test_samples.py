from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_modules.metrics.samples import SampleMetric

BIG = 2**40 + 1  # needs int64


class Table(SampleMetric):
    columns: ClassVar = {"scores": torch.float64, "labels": torch.long}

    def update(self, scores: Tensor, labels: Tensor, index: Tensor) -> None:
        self.add(scores=scores, labels=labels, index=index)

    def compute(self) -> dict[str, Any]:
        return self.rows()


def batch(*index: int) -> dict[str, Tensor]:
    numbers = torch.tensor(index, dtype=torch.long)
    return {"scores": numbers.double() / 3, "labels": BIG + numbers, "index": numbers}


def expected(*index: int) -> dict[str, Any]:
    return {name: column.numpy() for name, column in batch(*index).items()}


def same(actual: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert list(actual) == list(wanted)
    for name, column in wanted.items():
        assert actual[name].dtype == column.dtype
        np.testing.assert_array_equal(actual[name], column)


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_rows_are_in_order_and_the_first_of_duplicates_counts() -> None:
    metric = Table()
    metric.update(**batch(7, 2))
    metric.update(**batch(5, 11, 0))
    metric.update(**{**batch(2), "scores": torch.tensor([9.0])})
    same(metric.compute(), expected(0, 2, 5, 7, 11))
    metric.reset()
    same(metric.compute(), expected())


def test_columns_of_any_type_and_of_one_length() -> None:
    metric = Table()
    metric.update(torch.ones(2, 1, dtype=torch.half), torch.tensor([True, False]), torch.arange(2))
    same(
        metric.compute(),
        {"scores": np.ones(2), "labels": np.array([1, 0]), "index": np.arange(2)},
    )
    with pytest.raises(ValueError, match="'scores': 2, 'labels': 1, 'index': 1"):
        metric.update(torch.ones(2), torch.ones(1), torch.ones(1))


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
@pytest.mark.parametrize("mine", [(), (4, 1)])
def test_rows_of_other_processes_join_also_where_there_is_no_batch(mine: tuple[int, ...]) -> None:
    waiting = list(batch(3, 1, 2).values())

    def gather(here: Tensor, group: Any) -> list[Tensor]:
        there = waiting.pop(0)
        assert here.dtype == there.dtype
        return [here, there]

    metric = Table(dist_sync_fn=gather, distributed_available_fn=lambda: True)
    if mine:
        metric.update(**batch(*mine))
    same(metric.compute(), expected(*sorted({*mine, 1, 2, 3})))
