import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from datamodules import OpenSetDataModule
from datamodules.datasets import ImageArrayDataset
from tests.datamodules.conftest import save_picture

FAKES = [
    ("mnist", "mnist_root", 0.1),
    ("svhn", "svhn_root", None),
    ("cifar10", "cifar_root", None),
    ("cifar+10", "cifar_root", None),
    ("cifar+50", "cifar_root", None),
]


def part(dataset: ImageArrayDataset | None) -> ImageArrayDataset:
    assert dataset is not None
    return dataset


def ready(*args: Any, **kwargs: Any) -> OpenSetDataModule:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*same known classes")
        data = OpenSetDataModule(*args, **kwargs)
        data.prepare_data()
        data.setup()
    return data


def images_of(loader: DataLoader) -> Tensor:
    return torch.cat([batch["image"] for batch in loader])


def check_no_leak(data: OpenSetDataModule) -> None:
    """By the original class of every image that a loader hands out, and by its pixels."""
    info = data.split_info
    for loader, dataset in (
        (data.train_dataloader(), part(data.train)),
        (data.val_dataloader(), part(data.val)),
    ):
        for batch in loader:
            original = dataset.class_ids[batch["index"]].tolist()
            assert set(original) <= set(info["known"])
            assert [info["known"][label] for label in batch["label"]] == original
    for dataset in (part(data.train), part(data.val), part(data.test_known)):
        assert set(dataset.labels.tolist()) == set(range(data.num_classes))
    test = part(data.test)
    unknown = test.labels == -1
    assert not set(test.class_ids[unknown].tolist()) & set(info["known"])
    assert set(test.class_ids[~unknown].tolist()) == set(info["known"])


@pytest.mark.parametrize("split", range(5))
@pytest.mark.parametrize("protocol", ["neal", "arpl"])
def test_no_unknown_digit_reaches_training_or_validation(protocol: str, split: int) -> None:
    data = ready("digits", protocol=protocol, split=split, image_size=8)
    check_no_leak(data)
    counts = data.split_info["counts"]
    assert counts["train"] + counts["val"] + counts["test_known"] < 1797
    unknown = {image.numpy().tobytes() for image in part(data.test_unknown).images}
    for loader in (data.train_dataloader(), data.val_dataloader()):
        assert not unknown & {image.numpy().tobytes() for image in images_of(loader)}


@pytest.mark.parametrize(("dataset", "root", "val_fraction"), FAKES)
def test_no_unknown_image_reaches_training_or_validation(
    dataset: str, root: str, val_fraction: float | None, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(root)
    data = ready(dataset, str(folder), image_size=16, batch_size=8, val_fraction=val_fraction)
    check_no_leak(data)
    for known in (part(data.train), part(data.val), part(data.test_known)):
        # The pixels of the fakes tell the class, so this does not rely on any bookkeeping.
        values = set(known.images.unique().tolist())
        assert values == {20 * c + 1 for c in data.split_info["known"]}


def test_the_test_set_is_everything_once_with_the_known_first() -> None:
    data = ready("digits", image_size=8, eval_batch_size=50)
    batches = list(data.test_dataloader())
    index = torch.cat([batch["index"] for batch in batches])
    labels = torch.cat([batch["label"] for batch in batches])
    counts = data.split_info["counts"]
    assert index.tolist() == list(range(counts["test_known"] + counts["test_unknown"]))
    assert (labels[: counts["test_known"]] >= 0).all()
    assert (labels[counts["test_known"] :] == -1).all()
    known, unknown = part(data.test_known), part(data.test_unknown)
    assert torch.equal(images_of(data.test_dataloader()), torch.cat([known.images, unknown.images]))
    assert known.class_names == data.class_names == ["0", "1", "2", "4", "5", "9"]
    assert set(known.class_ids.tolist()) == {0, 1, 2, 4, 5, 9}


def test_mixed_sources_take_unknowns_from_cifar100(cifar_root: Path) -> None:
    data = ready("cifar+10", str(cifar_root), split=1, batch_size=8)
    assert data.class_names == ["airplane", "automobile", "ship", "truck"]
    assert data.split_info["counts"]["test_known"] == 16
    assert data.split_info["counts"]["test_unknown"] == 20
    wanted = {10 + c for c in [7, 11, 66, 75, 77, 93, 95, 97, 98, 99]}
    assert set(part(data.test_unknown).class_ids.tolist()) == wanted


def test_mnist_holds_out_its_last_training_images(
    mnist_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=r"100 MNIST training images.*--data.val_fraction 0.1"):
        ready("mnist", str(mnist_root))
    monkeypatch.setattr("datamodules.open_set.MNIST_HOLDOUT", 15)
    data = ready("mnist", str(mnist_root), image_size=28)
    # Labels of the fake run 0..9; the last fifteen images are 5..9, 0..9, of which these are known.
    assert part(data.val).class_ids.tolist() == [5, 9, 0, 1, 2, 4, 5, 9]
    assert part(data.train).class_ids.tolist() == [0, 1, 2, 4, 5, 9] * 8 + [0, 1, 2, 4]


def test_holdout_is_stratified_and_the_same_in_every_run(monkeypatch: pytest.MonkeyPatch) -> None:
    data = ready("digits", image_size=8)
    train, val = part(data.train), part(data.val)
    share = val.labels.bincount() / (val.labels.bincount() + train.labels.bincount())
    assert (share - 0.1).abs().max() < 0.01
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    again = ready("digits", image_size=8)
    assert torch.equal(part(again.train).images, train.images)
    assert torch.equal(part(again.val).images, val.images)
    more = ready("digits", image_size=8, val_fraction=0.5)
    assert len(part(more.val)) == pytest.approx(len(part(more.train)), abs=6)


def test_limits_are_per_class() -> None:
    data = ready("digits", image_size=8, train_limit=12, test_limit=5)
    assert part(data.train).labels.bincount().tolist() == [12] * 6
    assert part(data.test_known).labels.bincount().tolist() == [5] * 6
    assert part(data.test_unknown).class_ids.bincount()[[3, 6, 7, 8]].tolist() == [5] * 4
    full = ready("digits", image_size=8)
    assert torch.equal(part(full.val).images, part(data.val).images)


def test_stages_read_only_what_they_need(make_tree: Callable[..., Path], tmp_path: Path) -> None:
    root = make_tree(["ant", "bee", "cow"])
    protocol = tmp_path / "protocol.yaml"
    protocol.write_text("splits: [{known: [cow, ant], unknown: [bee]}]")
    data = OpenSetDataModule("image_folder", str(root), str(protocol), image_size=8, batch_size=4)
    assert data.num_classes == 2
    data.prepare_data()
    for path in (root / "train" / "bee").iterdir():
        path.write_bytes(b"broken, but unknown, so never decoded")
    data.setup("fit")
    assert (data.class_names, data.split_info["unknown"]) == (["ant", "cow"], [1])
    assert data.test is None
    train = data.train
    for path in (root / "test" / "cow").iterdir():
        path.write_bytes(b"broken")
    with pytest.raises(RuntimeError, match="4 of 12 images of image_folder cannot be read"):
        data.setup("test")
    data.setup("fit")
    assert data.train is train
    check = OpenSetDataModule("image_folder", str(root), str(protocol), image_size=8)
    with pytest.raises(RuntimeError, match="cannot be read"):
        check.setup("test")
    assert check.train is None


def test_tiny_imagenet_by_own_lists_and_too_few_classes(
    tiny_imagenet_root: Path, tmp_path: Path
) -> None:
    protocol = tmp_path / "protocol.yaml"
    protocol.write_text("splits: [{known: [n04, 0], unknown: [n02]}]")
    data = ready("tiny_imagenet", str(tiny_imagenet_root), str(protocol), batch_size=4)
    assert data.class_names == ["n01", "n04"]
    assert data.split_info["counts"] == {"train": 8, "val": 2, "test_known": 6, "test_unknown": 3}
    protocol.write_text("splits: [{known: [0, 1, 2, 3, 4]}]")
    with pytest.raises(ValueError, match="5 known classes, but tiny_imagenet has only 4"):
        ready("tiny_imagenet", str(tiny_imagenet_root), str(protocol))
    with pytest.raises(ValueError, match=r"uses class 19\d, but .* has only 4 classes"):
        ready("tiny_imagenet", str(tiny_imagenet_root))


def test_a_known_class_without_images(make_tree: Callable[..., Path], tmp_path: Path) -> None:
    root = make_tree(["ant", "bee", "cow"])
    protocol = tmp_path / "protocol.yaml"
    protocol.write_text("splits: [{known: [ant, bee], unknown: [cow]}]")
    (root / "train" / "bee").rename(root / "elsewhere")
    with pytest.raises(ValueError, match="no training images are left for the known class bee"):
        ready("image_folder", str(root), str(protocol))
    (root / "elsewhere").rename(root / "train" / "bee")
    (root / "test" / "cow").rename(root / "elsewhere")
    with pytest.raises(ValueError, match="no test image of the unknown classes"):
        ready("image_folder", str(root), str(protocol))


def test_split_info_is_plain() -> None:
    info = ready("digits", image_size=8).split_info
    assert list(info) == [
        *("dataset", "protocol", "index", "known", "unknown", "provenance", "counts"),
    ]
    assert (info["dataset"], info["protocol"], info["index"]) == ("digits", "neal", 0)
    assert info["unknown"] == [3, 6, 7, 8]
    assert all(type(c) is int for c in info["known"] + list(info["counts"].values()))


def test_duplicate_splits_are_flagged() -> None:
    with pytest.warns(UserWarning, match="split 1 of cifar10 .*same known classes as split 0;"):
        OpenSetDataModule("cifar10", protocol="arpl", split=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        OpenSetDataModule("cifar10", protocol="arpl", split=2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": 7}, "split 7 does not exist: .*splits 0 to 4"),
        ({"dataset": "minst"}, "did you mean mnist"),
        ({"protocol": "neil"}, "neal or arpl"),
        ({"dataset": "image_folder"}, "--data.protocol FILE"),
        ({"image_size": 0}, "image_size=0 must be at least 1"),
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"train_limit": 0}, "train_limit=0 must be at least 1"),
        ({"val_fraction": 1.0}, "val_fraction=1.0 is a fraction"),
    ],
)
def test_bad_arguments_are_errors_before_any_data_are_read(
    arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        OpenSetDataModule(**arguments)


@pytest.mark.filterwarnings("ignore:.*same known classes")
def test_missing_data_are_an_error_before_setup(tmp_path: Path) -> None:
    data = OpenSetDataModule("cifar+10", str(tmp_path / "none"), split=0)
    with pytest.raises(FileNotFoundError, match="none does not exist"):
        data.prepare_data()
    with pytest.raises(FileNotFoundError, match=r"none.yaml does not exist"):
        OpenSetDataModule("digits", protocol=str(tmp_path / "none.yaml"))


@pytest.mark.filterwarnings("ignore:.*same known classes")
def test_downloads_happen_in_prepare_data_and_only_if_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[tuple[str, bool, bool]] = []

    def record(name: str, root: str, train: bool, download: bool) -> None:
        asked.append((name, train, download))

    monkeypatch.setattr("datamodules.open_set.prepare_source", record)
    OpenSetDataModule("cifar+10", download=True).prepare_data()
    assert asked == [
        ("cifar10", True, True),
        ("cifar10", False, True),
        ("cifar100", False, True),
    ]
    asked.clear()
    OpenSetDataModule("digits").prepare_data()
    assert asked == [("digits", True, False), ("digits", False, False)]


class Collector(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.batches: list[dict[str, Any]] = []

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        return self.weight * batch["image"].mean()

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self.batches.append(batch)

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> Any:
        return batch

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.fixture
def trainer(tmp_path: Path) -> Trainer:
    return Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )


def test_predict_needs_nothing_but_its_folder(trainer: Trainer, tmp_path: Path) -> None:
    for i, name in enumerate(["b.png", "a.png", "deep/er/c.jpg"]):
        save_picture(tmp_path / "pictures" / name, 50 * i)
    (tmp_path / "pictures" / "notes.txt").write_text("no picture")
    data = OpenSetDataModule(
        "mnist",
        str(tmp_path / "nowhere"),
        image_size=8,
        eval_batch_size=2,
        predict_folder=str(tmp_path / "pictures"),
    )
    batches = trainer.predict(Collector(), datamodule=data)
    assert batches is not None
    paths = [path for batch in batches for path in batch["path"]]  # type: ignore[call-overload]
    assert [Path(path).name for path in paths] == ["a.png", "b.png", "c.jpg"]
    first: Any = batches[0]
    assert first["image"].shape == (2, 3, 8, 8)
    assert torch.allclose(first["image"][0], torch.tensor(50 / 255))
    assert first["label"].tolist() == [-1, -1]


def test_predict_without_a_folder_runs_on_the_test_images(trainer: Trainer) -> None:
    data = OpenSetDataModule("digits", image_size=8)
    batches: Any = trainer.predict(Collector(), datamodule=data)
    assert sum(len(batch["index"]) for batch in batches) == len(part(data.test))


def test_bad_predict_folders(tmp_path: Path) -> None:
    def predict(folder: Path) -> None:
        OpenSetDataModule(predict_folder=str(folder)).setup("predict")

    with pytest.raises(FileNotFoundError, match=r"none is not a folder.*--data.predict_folder"):
        predict(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="holds no pictures"):
        predict(tmp_path / "empty")
    (tmp_path / "empty" / "broken.png").write_bytes(b"nothing")
    with pytest.raises(RuntimeError, match=r"(?s)1 of 1 images of .*broken.png"):
        predict(tmp_path / "empty")


def test_a_checkpoint_of_other_known_classes_is_refused(trainer: Trainer, tmp_path: Path) -> None:
    path = str(tmp_path / "split0.ckpt")
    module = Collector()
    trainer.fit(module, datamodule=OpenSetDataModule("digits", image_size=8, train_limit=12))
    trainer.save_checkpoint(path)
    same = OpenSetDataModule("digits", image_size=8)
    trainer.test(module, datamodule=same, ckpt_path=path)
    assert sum(len(batch["index"]) for batch in module.batches) == len(part(same.test))
    other = OpenSetDataModule("digits", image_size=8, split=2)
    with pytest.raises(ValueError, match=r"trained on digits, protocol 'neal', split 0 .*split 2"):
        trainer.test(module, datamodule=other, ckpt_path=path)
    save_picture(tmp_path / "pictures" / "a.png", 1)
    pictures = OpenSetDataModule(split=2, predict_folder=str(tmp_path / "pictures"))
    trainer.predict(module, datamodule=pictures, ckpt_path=path)


def test_the_training_loader_gives_access_to_its_dataset(trainer: Trainer) -> None:
    data = OpenSetDataModule("digits", image_size=8)
    trainer.fit(Collector(), datamodule=data)
    loader = trainer.train_dataloader
    assert loader is not None
    batch = loader.dataset.batch(range(5))
    assert batch["image"].dtype == torch.float32
    assert batch["image"].max() <= 1
