import pytest
import torch

from datamodules.datasets import ImageArrayDataset


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
