import csv
import re
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import DataLoader

import callbacks.anomaly
import callbacks.report
from callbacks.anomaly import COLUMNS, AnomalyReport, AnomalySheet
from callbacks.report import Histogram, score_histograms
from lightning_modules.metrics.anomaly import AnomalyMetrics, anomaly_metrics, auc_interval
from tests.callbacks.boring import BoringGAN, BoringImages, boring_trainer, loader
from tests.processes import run_fresh

INFO = {
    "dataset": "mnist",
    "normal": [0, 7],
    "counts": {"train": 99},
    "holdout_inliers": True,
}


class Scorer(BoringGAN):
    """Two rows of scores; every third sample is an outlier; a reconstruction is the negative."""

    ready_rows = ("plain", "bent")
    row_titles: ClassVar = {"plain": "D(G(x))", "bent": "reconstruction error"}

    def __init__(self, thresholds: tuple[float | None, float | None] = (0.5, None)) -> None:
        super().__init__()
        self.test_metrics: Any = torch.nn.ModuleDict({r: AnomalyMetrics() for r in self.ready_rows})
        self.row_thresholds = dict(zip(self.ready_rows, thresholds, strict=True))

    def scores(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        plain = batch["image"].flatten(1).mean(1)
        return {"plain": plain, "bent": (5 * plain - 2).square().round()}

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        index = batch["index"]
        for row, scores in self.scores(batch).items():
            self.test_metrics[row].update(scores, (index % 3 == 0).long(), index, index // 2)

    def on_test_epoch_end(self) -> None:
        for row in self.ready_rows:
            self.test_metrics[row].compute()

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Any]:
        return {"score": self.scores(batch)["bent"]}

    def reconstruct(self, images: Tensor) -> Tensor:
        return 1 - images


class Data(LightningDataModule):
    def __init__(self, split_info: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.split_info = INFO if split_info is None else split_info

    def test_dataloader(self) -> DataLoader:
        return DataLoader(BoringImages(15), batch_size=4)

    def predict_dataloader(self) -> DataLoader:
        return DataLoader(BoringImages(15), batch_size=4)


def run(path: Path, module: BoringGAN, data: Any = None, **options: Any) -> Trainer:
    trainer = boring_trainer(path, callbacks=[AnomalyReport(), AnomalySheet(5)], **options)
    trainer.test(module, data or Data(), verbose=False)
    trainer.predict(module, data or Data(), return_predictions=False)
    return trainer


def samples() -> tuple[dict[str, Tensor], Tensor]:
    whole = next(iter(loader(15, 15)))
    return Scorer().scores(whole), (whole["index"] % 3 == 0).long()


def test_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path, Scorer())
    text = (tmp_path / "anomaly_table.txt").read_text()
    out = capsys.readouterr().out
    assert text in out
    for name in ("anomaly_table.txt", "images/anomaly-histograms-0.png"):
        assert f"wrote {tmp_path / name}" in out
        assert (tmp_path / name).exists()
    assert "on the test set itself" in text
    title, heading, *lines = text.splitlines()
    for part in (
        "mnist",
        "normal: 0, 7",
        "10 inlier and 5 outlier test images",
        "99 training",
        "held out from",
    ):
        assert part in title
    assert re.split("  +", heading.strip()) == list(COLUMNS.values())
    with (tmp_path / "tables" / "anomaly-table.csv").open() as file:
        head, *table = csv.reader(file)
    assert head == ["score", *COLUMNS.values()]
    assert [head[5], head[6]] == ["F1 inlier tuned", "F1 outlier tuned"]
    assert "tuned" not in "".join(head[7:])
    scores, labels = samples()
    for (row, values), threshold, line, cells in zip(
        scores.items(), (0.5, None), lines, table, strict=False
    ):
        wanted = anomaly_metrics(values, labels, threshold)
        wanted["low"], wanted["high"] = auc_interval(values, labels)
        numbers = [100 * wanted[name] if name in wanted else None for name in COLUMNS]
        assert cells[0] == Scorer.row_titles[row]
        assert [float(c) if c else None for c in cells[1:]] == pytest.approx(numbers)
        shown = [f"{n:.1f}" if n is not None else "-" for n in numbers]
        assert line.removeprefix(cells[0]).split() == shown


@pytest.mark.parametrize(
    ("info", "part", "missing"),
    [
        ({**INFO, "holdout_inliers": False}, "TRAINED ON as well", "held out"),
        ({}, "test set: 10 inlier", "train"),
    ],
)
def test_title_says_what_the_data_say(tmp_path: Path, info: Any, part: str, missing: str) -> None:
    run(tmp_path, Scorer(), Data(info))
    title = (tmp_path / "anomaly_table.txt").read_text().splitlines()[0]
    assert part in title
    assert missing not in title


def test_frames_are_named(tmp_path: Path) -> None:
    module = Scorer()
    for metric in module.test_metrics.values():
        metric.frame_labels = torch.tensor([1, 0, 0, 0, 0, 1, 0, 0])
    run(tmp_path, module)
    title = (tmp_path / "anomaly_table.txt").read_text().splitlines()[0]
    assert "6 inlier and 2 outlier test frames, scored by their largest" in title


def test_histograms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Any] = []
    monkeypatch.setattr(callbacks.report, "save_figure", lambda *args: figures.append(args))
    run(tmp_path, Scorer())
    ((_, key, figure),) = figures
    assert key == "anomaly/histograms"
    assert [axis.get_title() for axis in figure.axes] == list(Scorer.row_titles.values())
    assert [[line.get_xdata()[0] for line in axis.lines] for axis in figure.axes] == [[0.5], []]
    for axis, scores in zip(figure.axes, samples()[0].values(), strict=True):
        for bars, side in zip(axis.containers, (0, 1), strict=True):
            mine = scores[samples()[1] == side]
            filled = [bar.get_x() for bar in bars if bar.get_height() > 0]
            near = 1.001 * bars[0].get_width()
            assert min(filled) - 1e-6 <= mine.min() <= min(filled) + near
            assert max(filled) - 1e-6 <= mine.max() <= max(filled) + near


def test_histograms_without_a_threshold_or_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Any] = []
    monkeypatch.setattr(callbacks.report, "save_figure", lambda *args: figures.append(args[2]))
    trainer: Any = None
    texts: tuple[Any, ...] = (("low", "high"), "threshold", "score")
    for threshold in (None, float("nan")):
        panel = Histogram("equal", np.full(4, 7.0), np.arange(4) < 2, threshold)
        score_histograms(trainer, "a", [panel], *texts)
    assert [len(figure.axes[0].lines) for figure in figures] == [0, 0]
    assert score_histograms(trainer, "a", [], *texts) is None


def test_a_module_without_rows_is_refused(tmp_path: Path) -> None:
    trainer = boring_trainer(tmp_path, callbacks=[AnomalyReport()])
    with pytest.raises(MisconfigurationException, match=r"AnomalyReport needs.*no ready_rows"):
        trainer.test(BoringGAN(), loader())
    trainer = boring_trainer(tmp_path, callbacks=[AnomalySheet()])
    trainer.test(BoringGAN(), loader(), verbose=False)  # only predict needs a reconstruction
    with pytest.raises(MisconfigurationException, match="reconstruct"):
        trainer.predict(BoringGAN(), loader())
    with pytest.raises(ValueError, match="pictures=0"):
        AnomalySheet(0)


@pytest.mark.parametrize("count", [5, 40])
def test_sheet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    drawn: list[Any] = []
    real = callbacks.anomaly.labelled_grid

    def spy(*args: Any) -> Tensor:
        drawn.append(args)
        return real(*args)

    monkeypatch.setattr(callbacks.anomaly, "labelled_grid", spy)
    trainer = boring_trainer(tmp_path, callbacks=[AnomalySheet(count)])
    trainer.predict(Scorer(), loader(15), return_predictions=False)
    scores = samples()[0]["bent"]
    order = sorted(range(15), key=lambda i: (-float(scores[i]), i))[:count]
    assert len(set(scores[order].tolist())) < len(order)  # there are ties
    images = torch.stack([BoringImages(15)[i]["image"] for i in order])
    ((rows, columns, titles),) = drawn
    wanted = {"image": images, "reconstruction": 1 - images, "difference": (2 * images - 1).abs()}
    assert list(rows) == list(wanted)
    for name, value in wanted.items():
        torch.testing.assert_close(rows[name], value)
    assert columns >= len(order)
    assert titles == [f"{scores[i]:.3g}" for i in order]
    assert [path.name for path in (tmp_path / "images").iterdir()] == ["most_anomalous.png"]
    # A second prediction starts anew.
    trainer.predict(Scorer(), loader(3), return_predictions=False)
    assert len(drawn[1][2]) == 3


def test_sheet_shows_nan_first_and_each_sample_once(tmp_path: Path) -> None:
    image = torch.zeros(1)
    rows = [(2.0, 0, 1, image), (float("nan"), 0, 5, image), (2.0, 0, 0, image)]
    rows += [(2.0, 1, 1, image), (3.0, 0, 1, image), (2.0, 0, 7, image), (2.0, 0, 4, image)]
    best = callbacks.anomaly._most_anomalous(rows, 6)
    assert [row[1:3] for row in best] == [(0, 5), (0, 1), (0, 0), (0, 4), (0, 7), (1, 1)]
    assert best[1][0] == 3.0


@pytest.mark.parametrize("prediction", [None, {"index": torch.arange(4)}])
def test_sheet_needs_scores(tmp_path: Path, prediction: Any) -> None:
    class Silent(Scorer):
        def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Any:
            return prediction

    trainer = boring_trainer(tmp_path, callbacks=[AnomalySheet()])
    with pytest.raises(ValueError, match="found no score in"):
        trainer.predict(Silent(), loader())


TWO_PROCESSES = """
import sys
from tests.callbacks.test_anomaly import *
torch.manual_seed(0)
run(Path(sys.argv[1]), Scorer(), devices=2, strategy="ddp_fork")
"""


def test_two_processes_write_the_same(tmp_path: Path) -> None:
    run(tmp_path / "one", Scorer())
    printed = run_fresh(TWO_PROCESSES, str(tmp_path / "two"))
    assert printed.count("most_anomalous.png") == printed.count("Anomaly detection") == 1
    for name in ("anomaly_table.txt", "tables/anomaly-table.csv", "images/most_anomalous.png"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
