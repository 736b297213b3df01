from pathlib import Path

import pytest
import torch

from datamodules.datasets import FeatureDataset, ImageArrayDataset, PictureFileDataset
from tests.datamodules.conftest import save_picture


def make(paths: list[str] | None = None) -> ImageArrayDataset:
    images = torch.randint(
        0, 256, (6, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    labels = torch.tensor([0, 1, 0, -1, 1, -1])
    return ImageArrayDataset(images, labels, ["cat", "dog"], labels + 7, paths)


def test_a_batch_is_fetched_at_once_as_bytes() -> None:
    data = make()
    batch = data.__getitems__([4, 0, 3])
    assert batch["image"].dtype == torch.uint8
    assert torch.equal(batch["image"], data.images[[4, 0, 3]])
    assert batch["label"].tolist() == [1, 0, -1]
    assert batch["index"].tolist() == [4, 0, 3]
    assert torch.equal(data[4]["image"], data.images[4])
    assert data[4]["index"] == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_batch_gives_floats_in_the_unit_interval(dtype: torch.dtype) -> None:
    data = make()
    batch = data.batch(torch.tensor([1, 5]), device="cpu", dtype=dtype)
    assert batch["image"].dtype == dtype
    assert torch.equal(batch["image"], data.images[[1, 5]].to(dtype) / 255)
    assert data.images.dtype == torch.uint8


def test_paths_travel_with_their_images() -> None:
    data = make([f"{i}.png" for i in range(6)])
    assert data.batch([2, 1])["path"] == ["2.png", "1.png"]
    assert data[5]["path"] == "5.png"
    assert data.subset([5, 2]).batch([1])["path"] == ["2.png"]


def test_a_subset_is_numbered_anew() -> None:
    part = make().subset([3, 1])
    assert len(part) == 2
    assert part.batch([0, 1])["index"].tolist() == [0, 1]
    assert part.labels.tolist() == [-1, 1]
    assert part.class_ids.tolist() == [6, 8]


def test_wrong_images_are_refused() -> None:
    with pytest.raises(ValueError, match="uint8"):
        ImageArrayDataset(torch.rand(2, 3, 4, 4), torch.zeros(2).long(), ["cat"])
    with pytest.raises(ValueError, match="2 images but 3 labels"):
        ImageArrayDataset(
            torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.zeros(3).long(), ["cat"]
        )


def test_picture_files_are_decoded_when_asked_for(tmp_path: Path) -> None:
    paths = [tmp_path / f"{i}.png" for i in range(3)]
    data = PictureFileDataset(paths, (20, 20))
    assert (len(data), data.sample_shape) == (3, (3, 20, 20))
    for i, path in enumerate(paths):
        save_picture(path, 50 * i)
    batch = data.__getitems__([2, 0])
    assert batch["image"].dtype == torch.uint8
    assert batch["image"].shape == (2, 3, 20, 20)
    assert batch["image"][:, 2, 7, 7].tolist() == [100, 0]
    assert (batch["path"], batch["index"].tolist()) == ([str(paths[2]), str(paths[0])], [2, 0])
    assert data[1]["path"] == str(paths[1])
    assert torch.equal(data[1]["image"], torch.full((3, 20, 20), 50, dtype=torch.uint8))
    assert PictureFileDataset(paths, 6).batch([1])["image"].shape == (1, 3, 6, 6)
    with torch.inference_mode():  # as Lightning tests
        assert torch.equal(data.__getitems__([2, 0])["image"], batch["image"])


def test_a_picture_of_another_size_is_named(tmp_path: Path) -> None:
    paths = [tmp_path / f"{i}.png" for i in range(3)]
    for path, side in zip(paths, (20, 1, 20), strict=True):
        save_picture(path, 9, side)
    data = PictureFileDataset(paths, (20, 20))
    with pytest.raises(RuntimeError, match=r"(?s)1 of 2 images.*1.png \(shape \[3, 1, 1\] where"):
        data.batch([0, 1])
    data.batch([0, 2])


def test_features_are_handed_out_in_at_least_single_precision() -> None:
    features = torch.arange(12).view(6, 2)
    for given, expected in ((torch.float16, torch.float32), (torch.float64, torch.float64)):
        data = FeatureDataset(features.to(given))
        assert (len(data), data.sample_shape) == (6, (2,))
        batch = data.batch(torch.tensor([5, 1]))
        assert batch["features"].dtype == expected
        assert batch["features"].tolist() == [[10, 11], [2, 3]]
        assert batch["index"].tolist() == [5, 1]
        assert data[3]["features"].tolist() == [6, 7]
    with pytest.raises(ValueError, match=r"features must be \[N, D\], got \[4\]"):
        FeatureDataset(torch.zeros(4))
