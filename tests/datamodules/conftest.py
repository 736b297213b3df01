"""Small fakes of every file format, with pixels that tell the class: image i of class c is (c, i)."""

import gzip
import pickle
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import scipy.io
from PIL import Image
from torchvision.datasets import CIFAR10, CIFAR100, SVHN


def constant_images(labels: np.ndarray, side: int, channels: int) -> np.ndarray:
    """uint8 [N, side, side, channels]; every pixel of an image is 20 * label + 1."""
    shape = (len(labels), side, side, channels)
    return np.broadcast_to((20 * labels + 1)[:, None, None, None], shape).astype(np.uint8)


def ten_classes(count: int) -> np.ndarray:
    return np.arange(count) % 10


@pytest.fixture
def mnist_root(tmp_path: Path) -> Path:
    """MNIST as nothing but ``.gz`` files: 100 training and 40 test images."""
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for half, count in (("train", 100), ("t10k", 40)):
        labels = ten_classes(count)
        images = constant_images(labels, 28, 1)[..., 0]
        header = struct.pack(">iiii", 2051, count, 28, 28)
        (raw / f"{half}-images-idx3-ubyte.gz").write_bytes(gzip.compress(header + images.tobytes()))
        header = struct.pack(">ii", 2049, count)
        (raw / f"{half}-labels-idx1-ubyte.gz").write_bytes(
            gzip.compress(header + labels.astype(np.uint8).tobytes())
        )
    return tmp_path


@pytest.fixture
def svhn_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """SVHN with 100 training and 40 test images; the digit 0 is written 10."""
    for split, count in (("train", 100), ("test", 40)):
        labels = ten_classes(count)
        scipy.io.savemat(
            tmp_path / f"{split}_32x32.mat",
            {
                "X": constant_images(labels, 32, 3).transpose(1, 2, 3, 0),
                "y": np.where(labels == 0, 10, labels)[:, None].astype(np.uint8),
            },
        )
    unchecked = {split: [url, name, None] for split, (url, name, _) in SVHN.split_list.items()}
    monkeypatch.setattr(SVHN, "split_list", unchecked)
    return tmp_path


@pytest.fixture
def cifar_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """CIFAR-10 (100 + 40 images) and CIFAR-100 (200 + 200 images) as pickles."""
    for dataset, key, classes in ((CIFAR10, "labels", 10), (CIFAR100, "fine_labels", 100)):
        folder = tmp_path / dataset.base_folder
        folder.mkdir()
        for batches, total in (
            (dataset.train_list, 100 if classes == 10 else 200),
            (dataset.test_list, 40 if classes == 10 else 200),
        ):
            for name, _ in batches:
                labels = np.arange(total // len(batches)) % classes
                images = constant_images(labels, 32, 3).transpose(0, 3, 1, 2)
                content = {"data": images.reshape(len(labels), -1), key: labels.tolist()}
                (folder / name).write_bytes(pickle.dumps(content))
        names = [f"class{i}" for i in range(classes)]
        meta = {str(dataset.meta["key"]): names}
        (folder / str(dataset.meta["filename"])).write_bytes(pickle.dumps(meta))
        for attribute in ("train_list", "test_list"):
            unchecked = [[name, None] for name, _ in getattr(dataset, attribute)]
            monkeypatch.setattr(dataset, attribute, unchecked)
        monkeypatch.setattr(dataset, "meta", {**dataset.meta, "md5": None})
    return tmp_path


def save_picture(path: Path, value: int, side: int = 20) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((side, side, 3), value, np.uint8)).save(path)


@pytest.fixture
def tiny_imagenet_root(tmp_path: Path) -> Path:
    """TinyImageNet with 4 classes: 5 training images and 3 validation images each."""
    base = tmp_path / "tiny-imagenet-200"
    names = ["n03", "n01", "n04", "n02"]
    rows: list[str] = []
    for name in names:
        value = 20 * sorted(names).index(name) + 1
        for i in range(5):
            save_picture(base / "train" / name / "images" / f"{name}_{i}.JPEG", value, 64)
        for _ in range(3):
            filename = f"val_{len(rows)}.JPEG"
            save_picture(base / "val" / "images" / filename, value, 64)
            rows.append(f"{filename}\t{name}\t0\t0\t63\t63")
    (base / "wnids.txt").write_text("\n".join(names) + "\n")
    (base / "val" / "val_annotations.txt").write_text("\n".join(rows) + "\n")
    return tmp_path


@pytest.fixture
def make_tree(tmp_path: Path) -> Callable[..., Path]:
    """Builds ``train|test/CLASS/*.png``; the value of a picture is 20 * (place of its class) + 1."""

    def build(names: list[str], train: int = 10, test: int = 4) -> Path:
        for half, count in (("train", train), ("test", test)):
            for place, name in enumerate(sorted(names)):
                for i in range(count):
                    save_picture(tmp_path / half / name / f"{i}.png", 20 * place + 1)
        return tmp_path

    return build


@pytest.fixture
def caltech_root(tmp_path: Path) -> Path:
    """Caltech-256 with 4 categories of 20 pictures and 40 of clutter."""
    base = tmp_path / "256_ObjectCategories"
    for place, name in enumerate(["001.ak47", "002.bat", "003.cat-101", "004.dog", "257.clutter"]):
        for i in range(40 if place == 4 else 20):
            save_picture(base / name / f"{name[:3]}_{i + 1:04d}.jpg", 20 * place + 1)
    (base / "004.dog" / "greg").mkdir()
    save_picture(base / "004.dog" / "greg" / "stray.jpg", 255)
    (base / "RENAME2").mkdir()
    return tmp_path


@pytest.fixture
def save_clip(tmp_path: Path) -> Callable[..., Path]:
    """Writes a clip of UCSD Ped2 (uint8 [T, H, W]), with masks if it is given any."""

    def save(name: str, frames: np.ndarray, masks: np.ndarray | None = None) -> Path:
        half = tmp_path / "UCSDped2" / name.rstrip("0123456789")
        for folder, pictures, suffix in (
            (half / name, frames, "tif"),
            (half / f"{name}_gt", masks, "bmp"),
        ):
            if pictures is not None:
                folder.mkdir(parents=True)
                for i, picture in enumerate(pictures):
                    Image.fromarray(picture).save(folder / f"{i + 1:03d}.{suffix}")
                (folder / f"._001.{suffix}").write_bytes(b"left by macOS")
        return tmp_path

    return save
