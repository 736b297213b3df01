import json
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.trainer.states import TrainerFn

from datamodules import one_class
from datamodules.datasets import ImageArrayDataset
from datamodules.one_class import OneClassDataModule
from tests.datamodules.conftest import save_picture
from tests.datamodules.test_open_set import Collector, part, trainer  # noqa: F401 (a fixture)


def ready(*args: Any, stage: str | None = None, **kwargs: Any) -> OneClassDataModule:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*very inliers")
        data = OneClassDataModule(*args, **{"image_size": 8, **kwargs})
        data.prepare_data()
        data.setup(stage)
    return data


def pixels(dataset: ImageArrayDataset | None) -> set[bytes]:
    return {image.numpy().tobytes() for image in part(dataset).images}


def outlier_counts(data: OneClassDataModule) -> list[int]:
    test = part(data.test)
    return test.class_ids[test.labels == 1].bincount().tolist()


def check_no_leak(data: OneClassDataModule, normal: set[int]) -> None:
    """By the original class of every image, and by the labels that a loader hands out."""
    for dataset in (part(data.train), part(data.val)):
        assert set(dataset.class_ids.tolist()) == normal
        assert not dataset.labels.any()
    test = part(data.test)
    inliers = test.labels == 0
    assert set(test.class_ids[inliers].tolist()) == normal
    assert not set(test.class_ids[~inliers].tolist()) & normal
    assert test.labels.tolist() == sorted(test.labels.tolist())
    labels = torch.cat([batch["label"] for batch in data.test_dataloader()])
    assert torch.equal(labels, test.labels)
    counts = data.split_info["counts"]
    assert counts["test_outlier"] == (~inliers).sum() > 0
    assert counts["test_normal"] == inliers.sum() > 0
    assert (counts["train"], counts["val"]) == (len(part(data.train)), len(part(data.val)))


@pytest.mark.parametrize("normal", [["0"], ["7", "3"]])
def test_only_normal_digits_are_trained_on(
    normal: list[str | int], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = ready(normal=normal)
    assert data.class_names == part(data.test).class_names == ["normal", "outlier"]
    check_no_leak(data, {int(name) for name in normal})
    assert data.normal == sorted(str(name) for name in normal)
    train, val, test = pixels(data.train), pixels(data.val), pixels(data.test)
    assert not train & val
    assert not (train | val) & test
    assert len(part(data.val)) == pytest.approx(0.1 * (len(train) + len(val)), abs=1)
    assert len(part(data.test)) == 539
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    again = ready(normal=[int(name) for name in reversed(normal)], outlier_proportion=0.3)
    assert again.normal == data.normal
    assert (pixels(again.train), pixels(again.val)) == (train, val)
    assert pixels(again.test) < test


@pytest.mark.parametrize(
    ("dataset", "root"), [("mnist", "mnist_root"), ("cifar10", "cifar_root"), ("svhn", "svhn_root")]
)
def test_no_outlier_of_other_formats(
    dataset: str, root: str, request: pytest.FixtureRequest
) -> None:
    name = {"cifar10": "bird"}.get(dataset, "2")
    data = ready(dataset, str(request.getfixturevalue(root)), [name], batch_size=8)
    check_no_leak(data, {2})
    # The pixels of the fakes tell the class, so this does not rely on any bookkeeping.
    assert part(data.train).images.unique().tolist() == [41]
    assert part(data.val).images.unique().tolist() == [41]


def test_outliers_per_class() -> None:
    data = ready(outliers_per_class=20)
    assert outlier_counts(data) == [0] + [20] * 9
    everything = [image.numpy().tobytes() for image in part(ready().test).images]
    places = [everything.index(image.numpy().tobytes()) for image in part(data.test).images]
    assert places == sorted(places)  # in the order of the source, not class by class
    fewer = ready(outliers_per_class=5)
    assert pixels(fewer.test) < pixels(data.test)
    with pytest.raises(
        ValueError, match=r"takes 60 outliers of each class, but .* 486 .*55 of 1, 53 of 2, "
    ):
        ready(outliers_per_class=60)


@pytest.mark.parametrize("proportion", [0.1, 0.5, 0.85])
def test_outlier_proportion(proportion: float, monkeypatch: pytest.MonkeyPatch) -> None:
    data = ready(normal=["4"], outlier_proportion=proportion)
    share = part(data.test).labels.float().mean()
    assert share == pytest.approx(proportion, abs=0.01)
    counts = outlier_counts(data)
    assert counts[4] == 0
    present = counts[:4] + counts[5:]
    assert max(present) - min(present) <= 1
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    again = ready(normal=["4"], outlier_proportion=proportion, stage="test")
    assert torch.equal(part(again.test).images, part(data.test).images)


def test_outliers_are_spread_over_what_is_there() -> None:
    for total, there, expected in (
        (6, [10, 1, 10], [2, 1, 3]),
        (7, [3, 3, 3], [2, 2, 3]),
        (2, [5, 5, 5], [0, 1, 1]),
        (9, [3, 3, 3], [3, 3, 3]),
        (8, [1, 9, 2], [1, 5, 2]),
    ):
        assert one_class._spread(total, there) == expected
    with pytest.raises(
        ValueError, match=r"477 outliers to 53 normal .* 108 .*\(55 of 1, 53 of 2\)"
    ):
        ready(outlier_proportion=0.9, outlier_classes=["1", "2"])


def test_limits_and_chosen_outliers() -> None:
    data = ready(
        normal=["1", "0"], outlier_classes=[8, "5"], train_limit=12, test_limit=6, batch_size=8
    )
    assert part(data.train).class_ids.tolist().count(0) == 12
    assert part(data.train).class_ids.bincount().tolist() == [12, 12]
    assert part(data.test).class_ids.bincount().tolist() == [6, 6, 0, 0, 0, 6, 0, 0, 6]
    assert pixels(data.val) == pixels(ready(normal=["0", "1"]).val)


def test_drawn_normal_classes(caltech_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def drawn(**kwargs: Any) -> list[str]:
        data = OneClassDataModule(normal=None, **kwargs)
        if data.normal is None:
            data.setup("test")
        assert data.normal is not None
        return data.normal

    first = drawn(normal_count=3)
    assert len(set(first)) == 3
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    assert drawn(normal_count=3) == first
    assert len({tuple(drawn(normal_count=3, split=split)) for split in range(6)}) > 3
    caltech: Any = {"dataset": "caltech256", "root": str(caltech_root)}
    for split in range(4):
        # All but the one class that is there for outliers.
        names = drawn(**caltech, normal_count=4, split=split, outlier_classes=["clutter"])
        assert names == ["ak47", "bat", "cat-101", "dog"]
    with pytest.raises(ValueError, match=r"normal_count=5 exceeds the 4 classes"):
        drawn(**caltech, normal_count=5, outlier_classes=["clutter"])


def test_caltech256_with_and_without_held_out_inliers(caltech_root: Path) -> None:
    arguments: Any = {
        "dataset": "caltech256",
        "root": str(caltech_root),
        "normal": ["bat", "dog"],
        "outlier_classes": ["clutter"],
        "outlier_proportion": 0.5,
        "batch_size": 8,
    }
    held_out = ready(**arguments)
    check_no_leak(held_out, {1, 3})
    assert held_out.split_info["counts"] == {
        **{"train": 26, "val": 2, "test_normal": 12, "test_outlier": 12},
    }
    with pytest.warns(UserWarning, match="tested on the very inliers that are trained on"):
        data = OneClassDataModule(**arguments, holdout_inliers=False, image_size=8, train_limit=15)
    data.prepare_data()
    data.setup("test")  # alone, as in train.py test
    data.setup("fit")
    check_no_leak(data, {1, 3})
    train, test = part(data.train), part(data.test)
    assert data.split_info["counts"] == {
        **{"train": 30, "val": 4, "test_normal": 30, "test_outlier": 30},
    }
    assert torch.equal(test.images[test.labels == 0], train.images)
    assert (data.split_info["holdout_inliers"], held_out.split_info["holdout_inliers"]) == (
        False,
        True,
    )


def test_the_very_digits_that_are_trained_on() -> None:
    data = ready(holdout_inliers=False, outliers_per_class=60)
    inliers = part(data.test).images[part(data.test).labels == 0]
    assert torch.equal(inliers, part(data.train).images)
    assert not pixels(data.val) & pixels(data.test)


def test_own_folders(make_tree: Callable[..., Path]) -> None:
    root = make_tree(["good", "hole", "stain"])
    for path in (root / "train" / "hole").iterdir():
        path.write_bytes(b"an outlier, so never decoded")
    data = ready("image_folder", str(root), ["good"], batch_size=4)
    check_no_leak(data, {0})
    assert data.split_info["counts"]["test_outlier"] == 8
    (root / "test" / "good").rename(root / "elsewhere")
    with pytest.raises(ValueError, match="no test images are left for the normal class good"):
        ready("image_folder", str(root), ["good"], stage="test")
    (root / "test" / "stain").rename(root / "test" / "good")
    (root / "test" / "hole").rename(root / "train" / "scratch")
    with pytest.raises(ValueError, match="no test image of the outlier classes"):
        ready("image_folder", str(root), ["good"], stage="test")
    with pytest.raises(ValueError, match=r"unknown class in --data.normal .* 'goof': did you mean"):
        ready("image_folder", str(root), ["goof"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dataset": "digit"}, "did you mean digits"),
        ({"normal": ["10"]}, "unknown class in --data.normal of digits '10'"),
        ({"normal": []}, r"normal=\[\] must name at least one class"),
        ({"normal": ["1", "1"]}, r"must name at least one class, each once"),
        ({"normal": list("0123456789")}, "none is left for outliers"),
        ({"normal": None}, "set --data.normal null and --data.normal_count"),
        ({"normal_count": 2}, "set --data.normal null and --data.normal_count"),
        ({"normal": None, "normal_count": 10}, "none is left for outliers"),
        ({"split": 1}, r"split=1 is the number of a draw .* --data.normal null"),
        ({"outlier_classes": ["x"]}, "unknown class in --data.outlier_classes"),
        ({"outlier_classes": ["0", "1"]}, "class 0 cannot be normal and an outlier"),
        ({"outlier_classes": []}, r"outlier_classes=\[\] must name"),
        ({"outlier_proportion": 1.0}, r"outlier_proportion=1.0 is a fraction"),
        ({"outlier_proportion": 0.1, "outliers_per_class": 1}, "set one to null"),
        ({"outliers_per_class": 0}, "outliers_per_class=0 must be at least 1"),
        ({"val_fraction": 0.0}, "val_fraction=0.0 is a fraction"),
        ({"train_limit": 0}, "train_limit=0 must be at least 1"),
        ({"dataset": "mnist", "holdout_inliers": False}, "mnist has one; use"),
        ({"patch_size": 20}, "patch_size=20 does not apply to digits"),
        ({"dataset": "ped2", "normal": ["1"]}, r"normal=\['1'\] does not apply to ped2; leave out"),
        ({"dataset": "ped2", "outliers_per_class": 2}, "outliers_per_class=2 does not apply"),
        ({"dataset": "ped2", "holdout_inliers": False}, "holdout_inliers=False does not apply"),
        ({"dataset": "ped2", "test_limit": 3}, "test_limit=3 does not apply"),
        ({"dataset": "ped2", "motion_threshold": -1.0}, r"motion_threshold=-1.0 must be in"),
    ],
)
def test_impossible_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OneClassDataModule(**arguments)


def moving(clips: int, save_clip: Callable[..., Path]) -> Path:
    """Training clips that flicker in two patches, each clip with a value of its own."""
    for clip in range(1, clips + 1):
        frames = np.zeros((4, 10, 30), np.uint8)
        frames[::2, :, :20] = 20 * clip
        root = save_clip(f"Train{clip:03d}", frames)
    return root


def ped2_root(save_clip: Callable[..., Path], anomalous: bool = True) -> Path:
    """Also two test clips of 3 frames, of which 0 and 1 flicker; masks in 1 and 2 of the second."""
    frames, masks = np.zeros((2, 3, 10, 30), np.uint8), np.zeros((2, 3, 10, 30), np.uint8)
    frames[:, 0, :, 10:] = 90
    masks[1, 1:, 0, 29] = 255 * anomalous
    for clip in range(2):
        save_clip(f"Test{clip + 1:03d}", frames[clip], masks[clip])
    return moving(5, save_clip)


def test_ped2(save_clip: Callable[..., Path]) -> None:
    root = str(ped2_root(save_clip))
    data = ready("ped2", root, patch_size=10, batch_size=4, val_fraction=0.3, eval_batch_size=5)
    assert part(data.test).sample_shape == (3, 8, 8)
    train, val = part(data.train), part(data.val)
    # Whole clips are held out: two of the five, 8 patches each.
    values = [set(dataset.images.unique().tolist()) - {0} for dataset in (train, val)]
    assert [len(found) for found in values] == [3, 2]
    assert not values[0] & values[1]
    assert (len(train), len(val)) == (24, 16)
    assert not train.labels.any()
    batches = list(data.test_dataloader())
    assert torch.cat([batch["group"] for batch in batches]).tolist() == [0, 0, 1, 1, 3, 3, 4, 4]
    assert torch.cat([batch["label"] for batch in batches]).tolist() == [0] * 7 + [1]
    # The last frame is anomalous, but nothing moves in it, so that it has no patch.
    assert data.frame_labels is not None
    assert data.frame_labels.tolist() == [0, 0, 0, 0, 1, 1]
    assert data.split_info == {
        **{"dataset": "ped2", "patch_size": 10, "motion_threshold": 5.0, "val_fraction": 0.3},
        **{"holdout_inliers": True, "train_limit": None},
        "counts": {
            **{"train": 24, "val": 16, "test_normal": 7, "test_outlier": 1},
            **{"test_frames": 6, "test_anomalous_frames": 2},
        },
    }
    limited = ready("ped2", root, patch_size=10, batch_size=4, val_fraction=0.3, train_limit=5)
    assert len(part(limited.train)) == 5
    assert pixels(limited.val) == pixels(data.val)


def test_ped2_that_cannot_be_used(save_clip: Callable[..., Path]) -> None:
    root = str(ped2_root(save_clip, anomalous=False))
    with pytest.raises(ValueError, match="8 are normal and 0 anomalous"):
        ready("ped2", root, patch_size=10, stage="test")
    with pytest.raises(ValueError, match=r"val_fraction=0.95 leaves none of the 5 training clips"):
        ready("ped2", root, patch_size=10, val_fraction=0.95, stage="fit")
    with pytest.raises(FileNotFoundError, match="Train is missing"):
        ready("ped2", root + "/UCSDped2/Train")


def test_split_info_is_plain() -> None:
    info = ready(normal=None, normal_count=2, split=3).split_info
    assert json.loads(json.dumps(info)) == info
    assert list(info) == [
        *("dataset", "normal", "normal_count", "split", "outlier_proportion"),
        *("outliers_per_class", "outlier_classes", "test_limit", "val_fraction", "holdout_inliers"),
        *("train_limit", "counts"),
    ]
    assert len(info["normal"]) == 2


def test_a_checkpoint_of_other_normal_classes_is_refused(
    trainer: Trainer,  # noqa: F811
    tmp_path: Path,
) -> None:
    path = str(tmp_path / "zero.ckpt")
    module = Collector()
    trainer.fit(module, datamodule=OneClassDataModule(image_size=8))
    trainer.save_checkpoint(path)
    same = OneClassDataModule(image_size=8, outlier_proportion=0.2)
    trainer.test(module, datamodule=same, ckpt_path=path)
    assert sum(len(batch["index"]) for batch in module.batches) == len(part(same.test))
    other = OneClassDataModule(image_size=8, normal=["1"])
    with pytest.raises(ValueError, match=r"trained on digits, normal classes \['0'\].*\['1'\]"):
        trainer.test(module, datamodule=other, ckpt_path=path)
    with pytest.warns(UserWarning, match="very inliers"):
        seen = OneClassDataModule(image_size=8, holdout_inliers=False)
    with pytest.raises(ValueError, match=r"holdout_inliers=True, but .*holdout_inliers=False"):
        trainer.test(module, datamodule=seen, ckpt_path=path)
    save_picture(tmp_path / "pictures" / "b.png", 1)
    save_picture(tmp_path / "pictures" / "a.png", 50)
    pictures = OneClassDataModule(
        "ped2", str(tmp_path / "nowhere"), image_size=8, predict_folder=str(tmp_path / "pictures")
    )
    batches: Any = trainer.predict(module, datamodule=pictures, ckpt_path=path)
    assert [Path(name).name for name in batches[0]["path"]] == ["a.png", "b.png"]
    assert batches[0]["label"].tolist() == [-1, -1]


def test_predict_without_a_folder_runs_on_the_test_images(trainer: Trainer) -> None:  # noqa: F811
    data = OneClassDataModule(image_size=8)
    batches: Any = trainer.predict(Collector(), datamodule=data)
    assert sum(len(batch["index"]) for batch in batches) == len(part(data.test))


@pytest.mark.parametrize(
    ("stage", "holdout_inliers", "halves"),
    [
        (TrainerFn.FITTING, True, [True, False]),
        (TrainerFn.VALIDATING, True, [True]),
        (TrainerFn.TESTING, True, [False]),
        (TrainerFn.TESTING, False, [True, False]),
        (None, True, [True, False]),
    ],
)
@pytest.mark.filterwarnings("ignore:.*very inliers")
def test_only_the_needed_halves_must_be_there(
    stage: TrainerFn | None,
    holdout_inliers: bool,
    halves: list[bool],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(one_class, "prepare_source", lambda *args: asked.append(args))
    data = OneClassDataModule("caltech256", "root", ["a"], holdout_inliers=holdout_inliers)
    data.trainer = SimpleNamespace(state=SimpleNamespace(fn=stage))  # type: ignore[assignment]
    data.prepare_data()
    assert asked == [("caltech256", "root", half, False) for half in halves]
