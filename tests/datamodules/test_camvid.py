from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules.camvid import CLASS_NAMES, read_mask
from datamodules.unpaired import UnpairedDataModule

PARTS: dict[str, dict[str, int]] = {
    "train": {"0001TP": 4, "0006R0": 3, "0016E5": 5},
    "val": {"0016E5": 2},
    "test": {"0001TP": 4, "Seq05VD": 6},
}
NAMES = {"train": 0, "val": 40, "test": 60}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Frames of 24x18 pixels; the place of a grey level tells its class, the right border is void."""
    for part, drives in PARTS.items():
        for folder in (part, f"{part}annot"):
            (tmp_path / folder).mkdir()
        for drive, count in drives.items():
            for i in range(count):
                ids = np.arange(18)[:, None].repeat(24, 1).astype(np.uint8) * 11 // 18
                ids[:, 20:] = 11
                name = f"{drive}_{NAMES[part] + i:05}"
                Image.fromarray(ids).save(tmp_path / f"{part}annot" / f"{name}.png")
                pixels = (ids * 20)[..., None].repeat(3, -1)
                Image.fromarray(pixels).save(tmp_path / part / f"{name}.png")
    return tmp_path


def ready(root: Path, stage: str | None = None, **arguments: Any) -> UnpairedDataModule:
    given = {"preprocess": "scale_width_and_crop", "load_size": 24, "crop_size": 12}
    data = UnpairedDataModule("camvid", str(root), **{**given, **arguments})
    data.setup(stage)
    return data


def names(dataset: Any) -> list[str]:
    return [Path(path).stem for path in dataset.batch(range(len(dataset)))["path"]]


def test_dusk_against_day(root: Path) -> None:
    data = ready(root, val_fraction=0)
    assert data.domain_names == {"a": "0001TP", "b": "0006R0+0016E5+Seq05VD"}
    assert data.mask_classes == CLASS_NAMES
    assert len(CLASS_NAMES) == 11
    assert names(data.train_a) == [f"0001TP_0000{i}" for i in range(4)]
    assert names(data.test_a) == [f"0001TP_0006{i}" for i in range(4)]
    days = [*(f"0006R0_0000{i}" for i in range(3)), *(f"0016E5_0000{i}" for i in range(5))]
    assert names(data.train_b) == [*days, "0016E5_00040", "0016E5_00041"]
    assert names(data.test_b) == [f"Seq05VD_0006{i}" for i in range(6)]


def test_the_last_frames_of_each_drive_are_held_out(root: Path) -> None:
    data = ready(root, val_fraction=0.3)
    assert names(data.val_a) == ["0001TP_00003"]
    assert names(data.val_b) == ["0006R0_00002", "0016E5_00040", "0016E5_00041"]
    assert not {*names(data.train_b)} & {*names(data.val_b)}
    assert len(names(data.train_b)) == 7


def test_chosen_drives(root: Path) -> None:
    data = ready(root, domain_a=["Seq05VD"], domain_b=["0001TP"], val_fraction=0)
    assert names(data.train_a) == [f"Seq05VD_0006{i}" for i in range(3)]  # without a training half
    assert names(data.test_a) == [f"Seq05VD_0006{i}" for i in range(3, 6)]
    assert data.domain_names == {"a": "Seq05VD", "b": "0001TP"}


def test_masks_lie_on_their_pictures(root: Path) -> None:
    data = ready(root, "test")
    assert data.test_a is not None
    batch = data.test_a.batch([0, 3])
    image, mask = (batch["image"][:, 0] * 255).round(), batch["mask"]
    assert mask.shape == (2, 18, 24)
    assert mask.dtype == torch.uint8
    assert (mask[:, :, 20:] == 255).all()
    assert torch.equal(image[:, :, :20], mask[:, :, :20].float() * 20)
    halved = ready(root, load_size=12)
    assert halved.train_b is not None
    small = halved.train_b.batch([0])
    assert small["mask"].shape == (1, 12, 12)
    assert small["image"].shape == (1, 3, 12, 12)
    assert set(small["mask"].unique().tolist()) <= {*range(11), 255}, "no class between two"


def test_training_batches_have_no_masks(root: Path) -> None:
    batch = next(iter(ready(root, batch_size=2).train_dataloader()))
    assert batch["a"].keys() == batch["b"].keys() == {"image", "index"}


def test_a_mask_of_a_palette(tmp_path: Path) -> None:
    ids = np.array([[0, 10], [11, 3]], np.uint8)
    picture = Image.fromarray(ids)
    picture.putpalette([7 * i % 256 for i in range(768)])
    picture.save(tmp_path / "mask.png")
    assert read_mask(tmp_path / "mask.png").tolist() == [[[0, 10], [255, 3]]]


def test_bad_files(root: Path) -> None:
    with pytest.raises(
        ValueError, match=r"unknown sequence in --data.domain_a .*'0001TQ': did you mean 0001TP"
    ):
        ready(root, domain_a=["0001TQ"])
    with pytest.raises(ValueError, match="both have 0001TP"):
        ready(root, domain_b=["0001TP", "0006R0"])
    everything = ["0001TP", "0006R0", "0016E5", "Seq05VD"]
    with pytest.raises(ValueError, match="must have at least one of the sequences"):
        ready(root, domain_a=everything)
    with pytest.raises(FileNotFoundError, match=r"nowhere does not exist: expected CamVid"):
        ready(root / "nowhere")
    (root / "valannot").rename(root / "annotations")
    with pytest.raises(FileNotFoundError, match="valannot is missing: expected CamVid"):
        ready(root, "fit")
    (root / "annotations").rename(root / "valannot")
    mask = root / "trainannot" / "0006R0_00001.png"
    Image.fromarray(np.full((18, 24), 12, np.uint8)).save(mask)
    with pytest.raises(RuntimeError, match=r"0006R0_00001\.png \(class id 12; ids are 0 to 11"):
        ready(root, "fit")
    ready(root, "test")
    Image.fromarray(np.zeros((18, 24, 3), np.uint8)).save(mask)
    with pytest.raises(RuntimeError, match=r"0006R0_00001\.png \(RGB pixels; a mask holds one"):
        ready(root, "fit")
    Image.fromarray(np.zeros((9, 12), np.uint8)).save(mask)
    with pytest.raises(ValueError, match=r"0006R0_00001\.png is 12x9 but .* is 24x18"):
        ready(root, "fit")
    mask.unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of 12 frames .* 0006R0_00001\.png"):
        ready(root, "fit")


def test_resized_masks_have_no_class_between_two(tmp_path: Path) -> None:
    ids = np.zeros((8, 9), np.uint8)
    ids[:, 4:] = 10
    Image.fromarray(ids).save(tmp_path / "mask.png")
    assert read_mask(tmp_path / "mask.png", (6, 5)).shape == (1, 5, 6)
    assert set(read_mask(tmp_path / "mask.png", (6, 5)).unique().tolist()) == {0, 10}


def test_masks_of_various_sizes_are_padded_with_void(root: Path) -> None:
    name = "0001TP_00061.png"
    Image.fromarray(np.zeros((12, 16, 3), np.uint8)).save(root / "test" / name)
    Image.fromarray(np.zeros((12, 16), np.uint8)).save(root / "testannot" / name)
    data = ready(root, "test", preprocess="none", load_size=None)
    assert data.test_a is not None
    batch = data.test_a.batch([0, 1])
    assert batch["size"] == [(16, 24), (12, 16)]
    assert (batch["mask"][1, :12, :16] == 0).all()
    assert (batch["mask"][1, 12:] == 255).all()
    assert (batch["mask"][1, :, 16:] == 255).all()
