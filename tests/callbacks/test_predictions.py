import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from callbacks.predictions import PredictionWriter
from tests.callbacks.boring import BoringGAN, boring_trainer, loader


class Returning(BoringGAN):
    def __init__(self, prediction: Any) -> None:
        super().__init__()
        self.prediction = prediction

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Any:
        return self.prediction


def _table(path: Path) -> list[dict[str, str]]:
    with (path / "predictions.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_writes_rows_in_order_and_a_summary(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = boring_trainer(tmp_path, callbacks=[PredictionWriter()])
    trainer.predict(BoringGAN(), loader(10), return_predictions=False)
    rows = _table(tmp_path)
    assert list(rows[0]) == ["index", "decision", "score", "rank"]
    assert [int(row["index"]) for row in rows] == list(range(10))
    assert float(rows[7]["score"]) == pytest.approx(0.7)
    assert [path.name for path in tmp_path.iterdir()] == ["predictions.csv"]
    expected = f"10 predictions in {tmp_path / 'predictions.csv'}: known 7, unknown 3"
    assert expected in capsys.readouterr().out
    # A second call starts anew.
    trainer.predict(BoringGAN(), loader(4), return_predictions=False)
    assert len(_table(tmp_path)) == 4


def test_several_loaders_keep_their_rows_apart(tmp_path: Path) -> None:
    trainer = boring_trainer(tmp_path, callbacks=[PredictionWriter()])

    class Two(BoringGAN):
        def predict_step(
            self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0
        ) -> dict[str, Any]:
            return super().predict_step(batch, batch_idx)

    trainer.predict(Two(), [loader(3), loader(2)], return_predictions=False)
    rows = [(row["dataloader"], row["index"]) for row in _table(tmp_path)]
    assert rows == [("0", "0"), ("0", "1"), ("0", "2"), ("1", "0"), ("1", "1")]


@pytest.mark.parametrize(
    ("prediction", "message"),
    [
        (torch.zeros(4), "dict of columns"),
        ({"score": torch.zeros(3)}, "differ in length"),
        ({"score": torch.zeros(4, 2)}, r"shape \[4, 2\]"),
    ],
)
def test_predictions_that_are_no_table(tmp_path: Path, prediction: Any, message: str) -> None:
    trainer = boring_trainer(tmp_path, callbacks=[PredictionWriter()])
    with pytest.raises(ValueError, match=message):
        trainer.predict(Returning(prediction), loader(4))


def test_index_is_needed_and_path_is_taken_from_the_batch(tmp_path: Path) -> None:
    batch = {"image": torch.zeros(2, 1, 8, 8), "path": ["b.png", "a.png"]}
    batches: DataLoader = DataLoader([batch], batch_size=None)  # type: ignore[arg-type]
    trainer = boring_trainer(tmp_path, callbacks=[PredictionWriter()])
    with pytest.raises(ValueError, match="'index'"):
        trainer.predict(Returning({"score": torch.zeros(2)}), batches)
    prediction = {"score": torch.tensor([1.0, 2.0]), "index": torch.tensor([5, 3])}
    trainer = boring_trainer(tmp_path, callbacks=[PredictionWriter()])
    trainer.predict(Returning(prediction), batches)
    assert [list(row.values()) for row in _table(tmp_path)] == [
        ["3", "a.png", "2.0"],
        ["5", "b.png", "1.0"],
    ]
    with pytest.raises(ValueError, match="plain file name"):
        PredictionWriter("../outside.csv")


def test_rows_of_two_processes(two_processes: tuple[Path, str]) -> None:
    directory, printed = two_processes
    rows = _table(directory)
    assert [int(row["index"]) for row in rows] == list(range(15))
    assert {row["rank"] for row in rows} == {"0", "1"}
    assert printed.count("15 predictions in") == 1
