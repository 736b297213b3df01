"""Images in memory, fetched a batch at a time."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset


def unit_interval(images: Tensor, dtype: torch.dtype) -> Tensor:
    """Pixels 0..255 as floats in [0, 1]."""
    return images.to(dtype).div_(255)


class ImageArrayDataset(Dataset):
    """A labelled set of images of one size, kept as bytes.

    Workers hand out bytes; the conversion to floats happens once per batch on the device, in
    :meth:`datamodules.base.AdversariaDataModule.on_after_batch_transfer`. :meth:`batch` does both
    for whoever wants images outside a loader.

    Args:
        images: uint8 [N, C, H, W].
        labels: int64 [N], network labels; -1 stands for "none of ``class_names``" (or for "not
            known" in a folder of pictures to predict).
        class_names: name of each network label.
        class_ids: int64 [N], original class of each image in its source, where that differs from
            the label.
        paths: the file of each image, where there is one; batches then have ``path``.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        class_names: Sequence[str],
        class_ids: Tensor | None = None,
        paths: Sequence[str] | None = None,
    ) -> None:
        if images.dtype != torch.uint8 or images.ndim != 4:
            raise ValueError(
                f"images must be uint8 [N, C, H, W], got {images.dtype} {list(images.shape)}"
            )
        if len(labels) != len(images):
            raise ValueError(f"{len(images)} images but {len(labels)} labels")
        self.images = images
        self.labels = labels
        self.class_names = list(class_names)
        self.class_ids = labels if class_ids is None else class_ids
        self.paths = None if paths is None else list(paths)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample: dict[str, Any] = {
            "image": self.images[index],
            "label": self.labels[index],
            "index": torch.tensor(index),
        }
        if self.paths is not None:
            sample["path"] = self.paths[index]
        return sample

    def __getitems__(self, indices: Sequence[int] | Tensor) -> dict[str, Any]:
        """The batch of these images: ``image`` uint8 [B, C, H, W]; ``label``, ``index`` [B]."""
        index = torch.as_tensor(indices, dtype=torch.int64)
        batch: dict[str, Any] = {
            "image": self.images.index_select(0, index),
            "label": self.labels.index_select(0, index),
            "index": index,
        }
        if self.paths is not None:
            batch["path"] = [self.paths[i] for i in index.tolist()]
        return batch

    def batch(
        self,
        indices: Sequence[int] | Tensor,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> dict[str, Any]:
        """The batch of these images as a module receives it, without augmentation.

        Returns:
            ``image`` in [0, 1] [B, C, H, W], ``label`` and ``index`` int64 [B], ``path`` if the
            images have files.
        """
        batch = self.__getitems__(torch.as_tensor(indices).cpu())
        batch = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
        batch["image"] = unit_interval(batch["image"], dtype)
        return batch

    def subset(self, indices: Sequence[int] | Tensor) -> "ImageArrayDataset":
        """A dataset of these images alone, numbered anew from 0."""
        index = torch.as_tensor(indices, dtype=torch.int64)
        return ImageArrayDataset(
            self.images.index_select(0, index),
            self.labels.index_select(0, index),
            self.class_names,
            self.class_ids.index_select(0, index),
            None if self.paths is None else [self.paths[i] for i in index.tolist()],
        )
