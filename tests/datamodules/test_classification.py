"""All classes of a set, and epochs without images."""

from typing import Any

import pytest
import torch

from datamodules.classification import ClassificationDataModule
from datamodules.datasets import Positions


def ready(**options: Any) -> ClassificationDataModule:
    data = ClassificationDataModule("digits", **{"image_size": 8, "batch_size": 16, **options})
    data.setup()
    return data


def test_parts_share_no_image_and_have_all_classes() -> None:
    data = ready()
    sizes = [len(part) for part in (data.train, data.val, data.test)]
    assert sum(sizes) == 1797
    assert data.split_info["counts"] == dict(zip(("train", "val", "test"), sizes, strict=True))
    for part in (data.train, data.val, data.test):
        assert part.labels.unique().tolist() == list(range(10))
    again = ready()
    assert torch.equal(data.val.images, again.val.images)


def test_limits() -> None:
    data = ready(train_limit=3, test_limit=2)
    assert data.train.labels.bincount().tolist() == [3] * 10
    assert data.test.labels.bincount().tolist() == [2] * 10


def test_without_training_images_nothing_but_the_test_set_is_read() -> None:
    data = ready(training_images=False)
    assert data.train is None
    assert data.val is None
    assert data.val_dataloader() == []
    assert len(data.test) == 539
    with pytest.raises(ValueError, match=r"--data\.training_images"):
        data.train_dataloader()


def test_padding_leaves_room_to_crop() -> None:
    data = ready(crop_padding=2)
    assert data.train.images.shape[-2:] == (12, 12)
    assert data.val.images.shape[-2:] == (8, 8)
    assert data.random_crop == 8


def test_positions_hold_no_image() -> None:
    assert set(Positions(8).__getitems__([3, 1])) == {"index"}


@pytest.mark.parametrize(
    "options", [{"val_fraction": 1.0}, {"crop_padding": -1}, {"image_size": 0}, {"train_limit": 0}]
)
def test_impossible_arguments(options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(ValueError, match=name):
        ClassificationDataModule("digits", **options)
