"""Heat maps, the localization table, and boxes of a prediction."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from PIL import Image
from torchvision.io import decode_image

from callbacks.localization import LocalizationOverlays, LocalizationReport, overlay
from datamodules.localization import LocalizationDataModule
from datamodules.shapes import SceneOptions
from lightning_modules.acol import ACoL
from tests.callbacks.boring import BoringGAN, boring_trainer, loader

SMALL: dict[str, Any] = {
    "num_classes": 2,
    "backbone": "small",
    "width": 4,
    "head_width": 4,
    "lr": 0.01,
    "epochs": 1,
}


def scenes() -> LocalizationDataModule:
    options = SceneOptions(mode="parts", label="colour", colours=("red", "blue"), image_size=32)
    return LocalizationDataModule(
        shapes=options, shapes_train=32, shapes_val=8, shapes_test=10, batch_size=16
    )


def test_an_overlay_is_hot_where_the_map_is_and_shows_both_boxes() -> None:
    images = torch.full((1, 1, 16, 16), 0.5)
    maps = torch.zeros(1, 4, 4)
    maps[0, 3, 3] = 1
    plain = overlay(images, maps)[0]
    assert plain.shape == (3, 16, 16)
    assert plain[0, 15, 15] > plain[2, 15, 15], "red where hot"
    assert plain[2, 0, 0] > plain[0, 0, 0], "blue where cold"
    both = overlay(images, maps, torch.tensor([[1, 1, 6, 6]]), [torch.tensor([[8, 8, 14, 14]])])[0]
    assert both[1, 1, 3] > both[0, 1, 3] + 0.5, "the predicted box is green"
    assert both[:, 8, 11].min() > 0.95, "the true one is white"


def test_a_test_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module = ACoL(**SMALL, cam_baseline=True)
    trainer = boring_trainer(tmp_path, callbacks=[LocalizationReport(4)], max_epochs=1)
    data = scenes()
    trainer.fit(module, datamodule=data)
    thresholds = module.row_thresholds
    assert all(0 <= value < 1 for value in thresholds.values() if value is not None)
    assert None not in thresholds.values()
    trainer.test(module, datamodule=data, verbose=False)
    table = (tmp_path / "localization_table.txt").read_text()
    assert [line[:3] for line in table.splitlines()[2:6]] == ["CAM", "sta", "sta", "ACo"]
    assert "10 test images of 2 classes" in table
    metrics = trainer.callback_metrics
    for row in ("cam", "stage_a", "stage_b", "fused"):
        assert 0 < metrics[f"test/{row}/pxap"] <= 100
        assert 0 <= metrics[f"test/{row}/box_acc@50"] <= metrics[f"test/{row}/max_box_acc"] <= 100
        known = 100 - metrics[f"test/{row}/gt_known_error"]
        assert float(known) == pytest.approx(float(metrics[f"test/{row}/box_acc@50"]), abs=1e-4)
    names = {path.name.rsplit("-", 1)[0] for path in (tmp_path / "images").glob("*.png")}
    assert {"localization-sheet", "localization-sweep"} <= names
    assert (tmp_path / "tables" / "localization-sweep.csv").read_text().count("\n") == 101
    assert "wrote" in capsys.readouterr().out


def test_without_boxes_classes_alone_are_reported(tmp_path: Path) -> None:
    for part in ("train", "validation"):
        for name, colour in (("a", 40), ("b", 200)):
            (tmp_path / "data" / part / name).mkdir(parents=True)
            for i in range(4):
                picture = Image.new("RGB", (40, 32), (colour, 10 * i, 90))
                picture.save(tmp_path / "data" / part / name / f"{i}.png")
    data = LocalizationDataModule(
        "image_folder", str(tmp_path / "data"), image_size=32, resize=36, batch_size=4
    )
    module = ACoL(**SMALL)
    trainer = boring_trainer(
        tmp_path / "run", callbacks=[LocalizationReport(), LocalizationOverlays()], max_epochs=1
    )
    trainer.fit(module, datamodule=data)
    with pytest.warns(UserWarning, match="test is missing"):
        trainer.test(module, datamodule=data, verbose=False)
    assert "test/fused/accuracy" in trainer.callback_metrics
    assert not any("box" in name for name in trainer.callback_metrics)
    assert not (tmp_path / "run" / "localization_table.txt").exists()

    data = LocalizationDataModule(
        "image_folder", image_size=32, predict_folder=str(tmp_path / "data" / "train")
    )
    module.class_names = ["a", "b"]
    trainer.predict(module, datamodule=data)
    found = json.loads((tmp_path / "run" / "boxes.json").read_text())
    assert [entry["index"] for entry in found] == list(range(8))
    assert found[0]["path"].endswith("a/0.png")
    for entry in found:
        x0, y0, x1, y1 = entry["box"]
        assert 0 <= x0 <= x1 < 40
        assert 0 <= y0 <= y1 < 32
    pictures = sorted((tmp_path / "run" / "overlays").glob("*.png"))
    assert len(pictures) == 8
    assert decode_image(str(pictures[0])).shape == (3, 32, 40), "as large as the file"


def test_what_does_not_fit_is_said(tmp_path: Path) -> None:
    for callback in (LocalizationReport(), LocalizationOverlays()):
        with pytest.raises(MisconfigurationException, match="BoringGAN has no"):
            boring_trainer(tmp_path, callbacks=[callback]).test(BoringGAN(), loader())
    with pytest.raises(ValueError, match="-1"):
        LocalizationReport(-1)
    with pytest.raises(ValueError, match="largest=3"):
        LocalizationOverlays(largest=3)
