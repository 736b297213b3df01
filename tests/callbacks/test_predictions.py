import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from callbacks.predictions import PictureWriter, PredictionWriter
from tests.callbacks.boring import BoringGAN, boring_trainer, loader
from tests.processes import run_fresh


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


# ------------------------------------------------------------------ pictures
class Brighter(BoringGAN):
    def predict_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> Any:
        return {"image": batch["image"] - 0.4 / 255, "mean": batch["image"].flatten(1).mean(1)}


class Folder(LightningDataModule):
    def __init__(self, root: Path | None, paths: list[str] | None, channels: int = 3) -> None:
        super().__init__()
        self.predict_folder = None if root is None else str(root)
        self.batches = []
        for index in range(3 if paths is None else len(paths)):
            image = torch.full((1, channels, 4 + index, 6), index / 255)
            batch: dict[str, Any] = {"image": image, "index": torch.tensor([index])}
            if paths is not None:
                batch["path"] = [paths[index]]
            self.batches.append(batch)

    def predict_dataloader(self) -> DataLoader:
        return DataLoader(self.batches, batch_size=None)  # type: ignore[arg-type]


def _pictures(path: Path) -> set[str]:
    folder = path / "predictions"
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


def _write(path: Path, data: Folder, extension: str = "png") -> set[str]:
    trainer = boring_trainer(path, callbacks=[PictureWriter(extension), PredictionWriter()])
    trainer.predict(Brighter(), datamodule=data, return_predictions=False)
    return _pictures(path)


def test_pictures_keep_name_size_and_values(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "in"
    paths = [f"{root}/one.jpg", f"{root}/sub/two.v2.PNG", "/elsewhere/deep/three.png"]
    names = _write(tmp_path, Folder(root, paths))
    assert names == {"one.png", "sub/two.v2.png", "three.png"}
    for index, name in enumerate(["one.png", "sub/two.v2.png", "three.png"]):
        with Image.open(tmp_path / "predictions" / name) as picture:
            assert (picture.size, picture.mode) == ((6, 4 + index), "RGB")
            assert picture.getcolors() == [((4 + index) * 6, (index,) * 3)], "rounded to nearest"
    assert f"3 pictures in {tmp_path / 'predictions'}" in capsys.readouterr().out
    assert list(_table(tmp_path)[0]) == ["index", "path", "mean"], "pictures are no column"


def test_grey_pictures_without_names(tmp_path: Path) -> None:
    assert _write(tmp_path, Folder(None, None, 1), ".TIF") == {f"00000{i}.tif" for i in range(3)}
    with Image.open(tmp_path / "predictions" / "000002.tif") as picture:
        assert (picture.mode, picture.getpixel((0, 0))) == ("L", 2)


def test_no_picture_replaces_another_or_leaves_the_run(tmp_path: Path) -> None:
    root = tmp_path / "in"
    paths = [f"{root}/x.png", f"{root}/x.jpg", f"{root}/X.PNG", f"{root}/../../up.png", "/a/y.png"]
    paths += ["/b/y.png", f"{root}/z/y.png"]
    names = _write(tmp_path / "run", Folder(root, paths))
    assert names == {
        *("x.png.png", "x.jpg.png", "X.PNG-2.png", "up.png"),
        *("y.png.png", "y.png-5.png", "z/y.png"),
    }
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize(
    ("prediction", "message"),
    [
        ({"score": torch.zeros(1)}, r"'image' \[B, C, H, W\] with C of 1 or 3, not NoneType"),
        ({"image": torch.zeros(1, 2, 4, 4)}, r"not \[1, 2, 4, 4\]"),
        (torch.zeros(1, 3, 4, 4), "not NoneType"),
    ],
)
def test_predictions_that_are_no_pictures(tmp_path: Path, prediction: Any, message: str) -> None:
    trainer = boring_trainer(tmp_path, callbacks=[PictureWriter()])
    with pytest.raises(ValueError, match=message):
        trainer.predict(Returning(prediction), datamodule=Folder(None, None))
    for extension in ("exe", "", "eps/../x"):
        with pytest.raises(ValueError, match="no picture that can be written"):
            PictureWriter(extension)


PICTURES = """
import sys
from tests.callbacks.test_predictions import *
from tests.callbacks.boring import loader

trainer = boring_trainer(
    Path(sys.argv[1]), devices=2, strategy="ddp_fork", callbacks=[PictureWriter()]
)
trainer.predict(Brighter(), loader(5, 2), return_predictions=False)
"""


def test_pictures_of_two_processes(tmp_path: Path) -> None:
    printed = run_fresh(PICTURES, str(tmp_path))
    assert _pictures(tmp_path) == {f"00000{i}.png" for i in range(5)}
    assert printed.count("pictures in") == 1
