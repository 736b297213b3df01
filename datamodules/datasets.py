"""Sets fetched a batch at a time: images in memory, picture files, features."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS

from datamodules.pictures import decode_images, decode_picture, image_files, visit_files


def unit_interval(images: Tensor, dtype: torch.dtype) -> Tensor:
    """Pixels 0..255 as floats in [0, 1]."""
    return images.to(dtype).div_(255)


class BatchDataset(Dataset):
    """A set that hands out whole batches as dicts; subclasses say which.

    Workers hand out images as bytes; the conversion to floats happens once per batch on the device,
    in :meth:`datamodules.base.AdversariaDataModule.on_after_batch_transfer`. :meth:`batch` does
    both for whoever wants samples outside a loader.

    Attributes:
        sample_shape: [C, H, W] of an image or [D] of features.
    """

    sample_shape: tuple[int, ...]

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitems__(self, indices: Sequence[int] | Tensor) -> dict[str, Any]:
        """The batch of these samples, with ``index`` int64 [B]."""
        raise NotImplementedError

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {key: values[0] for key, values in self.__getitems__([index]).items()}

    def batch(
        self,
        indices: Sequence[int] | Tensor,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> dict[str, Any]:
        """The batch of these samples as a module receives it, without augmentation.

        Args:
            indices: places in this set.
            device: where the tensors go.
            dtype: of the images; features keep their own.

        Returns:
            what :meth:`__getitems__` gives, with ``image`` (and ``counterpart``, where there is one)
            in [0, 1] [B, C, H, W].
        """
        batch = self.__getitems__(torch.as_tensor(indices).cpu())
        batch = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
        for name in {"image", "counterpart"} & batch.keys():
            batch[name] = unit_interval(batch[name], dtype)
        return batch


class Positions(BatchDataset):
    """A set of nothing but ``index``, for epochs in which a module must not see any data."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitems__(self, indices: Sequence[int] | Tensor) -> dict[str, Any]:
        """``index`` int64 [B]."""
        return {"index": torch.as_tensor(indices, dtype=torch.int64)}


class ImageArrayDataset(BatchDataset):
    """A labelled set of images of one size, kept as bytes.

    Args:
        images: uint8 [N, C, H, W].
        labels: int64 [N], network labels; -1 stands for "none of ``class_names``" (or for "not
            known" in a folder of pictures to predict).
        class_names: name of each network label.
        class_ids: int64 [N], original class of each image in its source, where that differs from
            the label.
        paths: the file of each image, where there is one; batches then have ``path``.
        groups: int64 [N], what each image is a part of (the frame of a patch); batches then have
            ``group``.
        boxes: int64 [N, M, 4] in pixels, -1 for no box; batches then have ``boxes``.
        masks: uint8 [N, H, W], 1 where the object is, 0 elsewhere, 255 where it does not matter; batches then have
            ``mask``.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        class_names: Sequence[str],
        class_ids: Tensor | None = None,
        paths: Sequence[str] | None = None,
        groups: Tensor | None = None,
        boxes: Tensor | None = None,
        masks: Tensor | None = None,
    ) -> None:
        if images.dtype != torch.uint8 or images.ndim != 4:
            raise ValueError(
                f"images must be uint8 [N, C, H, W], got {images.dtype} {list(images.shape)}"
            )
        if len(labels) != len(images):
            raise ValueError(f"{len(images)} images but {len(labels)} labels")
        if groups is not None and len(groups) != len(images):
            raise ValueError(f"{len(images)} images but {len(groups)} groups")
        for name, truth in (("boxes", boxes), ("masks", masks)):
            if truth is not None and len(truth) != len(images):
                raise ValueError(f"{len(images)} images but {name} for {len(truth)}")
        self.images = images
        self.sample_shape = tuple(images.shape[1:])
        self.labels = labels
        self.class_names = list(class_names)
        self.class_ids = labels if class_ids is None else class_ids
        self.paths = None if paths is None else list(paths)
        self.groups = groups
        self.boxes = boxes
        self.masks = masks

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, indices: Sequence[int] | Tensor) -> dict[str, Any]:
        """The batch of these images: ``image`` uint8 [B, C, H, W]; ``label``, ``index`` [B].

        Also ``path`` (list of str), ``group`` (int64 [B]) and ``boxes`` (int64 [B, M, 4]), where the
        set has them.
        """
        index = torch.as_tensor(indices, dtype=torch.int64)
        batch: dict[str, Any] = {
            "image": self.images.index_select(0, index),
            "label": self.labels.index_select(0, index),
            "index": index,
        }
        if self.paths is not None:
            batch["path"] = [self.paths[i] for i in index.tolist()]
        if self.groups is not None:
            batch["group"] = self.groups.index_select(0, index)
        for name, truth in (("boxes", self.boxes), ("mask", self.masks)):
            if truth is not None:
                batch[name] = truth.index_select(0, index)
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
            None if self.groups is None else self.groups.index_select(0, index),
            *(None if t is None else t.index_select(0, index) for t in (self.boxes, self.masks)),
        )


def pictures_to_predict(folder: str) -> list[Path]:
    """The picture files below ``--data.predict_folder``, sorted by path.

    Raises:
        FileNotFoundError: there is no such folder, or no picture in it.
    """
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise FileNotFoundError(
            f"predict_folder {folder} is not a folder; give one with pictures by "
            "--data.predict_folder DIR"
        )
    files = image_files(path)
    if not files:
        raise FileNotFoundError(
            f"predict_folder {folder} holds no pictures (looked for "
            f"{', '.join(IMG_EXTENSIONS)}, recursively)"
        )
    return files


def read_pictures_to_predict(
    folder: str, image_size: int, class_names: Sequence[str]
) -> ImageArrayDataset:
    """The pictures below ``--data.predict_folder``, each with label -1 and its path.

    Raises:
        FileNotFoundError: there is no such folder, or no picture in it.
        RuntimeError: some pictures cannot be read; names up to five of them.
    """
    files = pictures_to_predict(folder)
    return ImageArrayDataset(
        decode_images(files, image_size, folder),
        torch.full((len(files),), -1),
        class_names,
        paths=[str(file) for file in files],
    )


class PictureFileDataset(BatchDataset):
    """Picture files, decoded in threads when a batch asks for them, so that a set of any size fits.

    Args:
        paths: the files.
        size: side of the square to which each picture is squeezed; or (height, width), which each
            picture has; None: ``decode`` gives various sizes.
        labels: int64 [N]; batches then have ``label``.
        boxes: int64 [N, M, 4] in pixels of the decoded picture; batches then have ``boxes``.
        original_sizes: int64 [N, 2], height and width of the files; batches then have
            ``original_size``.
        decode: how a file becomes uint8 [C, H, W], instead of squeezing.
        channels: C of what ``decode`` gives.
        padding: fills up pictures of various sizes to those of a batch.
    """

    def __init__(
        self,
        paths: Sequence[Path | str],
        size: int | tuple[int, int] | None,
        labels: Tensor | None = None,
        boxes: Tensor | None = None,
        original_sizes: Tensor | None = None,
        decode: Callable[[Path], Tensor] | None = None,
        channels: int = 3,
        padding: int = 0,
    ) -> None:
        if size is None and decode is None:
            raise ValueError("size=None needs a function that decodes")
        self.paths = list(paths)
        self.labels = labels
        self.boxes = boxes
        self._more = {"label": labels, "boxes": boxes, "original_size": original_sizes}
        for name, values in self._more.items():
            if values is not None and len(values) != len(paths):
                raise ValueError(f"{len(paths)} pictures but {len(values)} of {name}")
        self._various = size is None
        shape = (-1, -1) if size is None else (size, size) if isinstance(size, int) else size
        self.sample_shape = (channels, *shape)
        self._padding = padding
        self._squeezed = size if isinstance(size, int) else None
        self._decode = decode
        self._kept: list[Tensor | None] | None = None

    def __len__(self) -> int:
        return len(self.paths)

    def __getitems__(self, indices: Sequence[int] | Tensor) -> dict[str, Any]:
        """The batch of these pictures: ``image`` uint8 [B, C, H, W], ``index`` [B], ``path``.

        Also ``label``, ``boxes`` and ``original_size``, where the set has them. Pictures of various
        sizes are padded at the right and the bottom, and ``size`` is the list of their
        (height, width).

        Raises:
            RuntimeError: a file cannot be read or has another size; names up to five of them.
        """
        index = torch.as_tensor(indices, dtype=torch.int64)
        places = index.tolist()
        images = self._decoded(places)
        batch: dict[str, Any] = {"index": index, "path": [str(self.paths[i]) for i in places]}
        if self._various:
            sizes = [(image.shape[1], image.shape[2]) for image in images]
            height, width = (max(lengths) for lengths in zip(*sizes, strict=True))
            images = [
                torch.nn.functional.pad(image, (0, width - w, 0, height - h), value=self._padding)
                for image, (h, w) in zip(images, sizes, strict=True)
            ]
            batch["size"] = sizes
        batch["image"] = torch.stack(images)
        more = {name: values for name, values in self._more.items() if values is not None}
        return {**batch, **{name: values.index_select(0, index) for name, values in more.items()}}

    def keep(self, name: str) -> None:
        """Decodes everything once, with a progress bar, and keeps it as bytes in memory.

        Args:
            name: what the progress bar and an error call the set.

        Raises:
            RuntimeError: some files cannot be read; names up to five of them.
        """
        if self._kept is None:
            self._kept = [*self._read(range(len(self)), name, progress=f"decoding {name}")]

    def keep_read(self) -> None:
        """Keeps each picture as bytes in memory once a batch has asked for it."""
        if self._kept is None:
            self._kept = [None] * len(self)

    def _decoded(self, places: Sequence[int]) -> list[Tensor]:
        if self._kept is None:
            return self._read(places, "a batch")
        kept = self._kept
        new = sorted({place for place in places if kept[place] is None})
        for place, decoded in zip(new, self._read(new, "a batch"), strict=True):
            kept[place] = decoded
        return [image for place in places if (image := kept[place]) is not None]

    def _read(self, places: Sequence[int], name: str, progress: str | None = None) -> list[Tensor]:
        paths = [Path(self.paths[i]) for i in places]
        # Not written into one tensor: made in a test it is an inference tensor, while the threads
        # are not in inference mode.
        images = [torch.empty(0)] * len(paths)

        def decode(position: int) -> None:
            path = paths[position]
            pixels = self._decode(path) if self._decode else decode_picture(path, self._squeezed)
            if not self._various and pixels.shape != self.sample_shape:
                raise ValueError(
                    f"shape {list(pixels.shape)} where others have {list(self.sample_shape)}"
                )
            images[position] = pixels

        visit_files(decode, paths, name, progress)
        return images


class FeatureDataset(BatchDataset):
    """Rows of features that some network has computed before.

    Args:
        features: [N, D], floating point or integers.
    """

    def __init__(self, features: Tensor) -> None:
        if features.ndim != 2:
            raise ValueError(f"features must be [N, D], got {list(features.shape)}")
        self.features = features
        self.dtype = torch.float64 if features.dtype == torch.float64 else torch.float32
        self.sample_shape = tuple(features.shape[1:])

    def __len__(self) -> int:
        return len(self.features)

    def __getitems__(self, indices: Sequence[int] | Tensor) -> dict[str, Any]:
        """The batch of these rows: ``features`` float32 or float64 [B, D], ``index`` [B]."""
        index = torch.as_tensor(indices, dtype=torch.int64)
        return {"features": self.features.index_select(0, index).to(self.dtype), "index": index}
