"""UCSD Ped2, a surveillance video with pedestrians only in training, as moving patches.

``ROOT/UCSDped2/Train/TrainNNN/*.tif``, ``ROOT/UCSDped2/Test/TestNNN/*.tif`` and, for each test
clip, masks of what is anomalous in ``TestNNN_gt/*.bmp``. ROOT may be the folder UCSDped2 itself.

The OGNet paper scores patches and takes the largest score of a frame's moving patches as the
frame's, but its code for this is not released. Our choices:

- grey frames, cut from the top left into patches that do not overlap; the rest at the right and
  the bottom is left out;
- a patch moves if its mean absolute difference to the same place in the previous frame exceeds a
  threshold; the first frame of a clip is compared with the second;
- a patch is anomalous if its mask has an anomalous pixel; a frame is, if its whole mask has one.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor

from datamodules.datasets import ImageArrayDataset
from datamodules.pictures import rgb_squares, visit_files


@dataclass(frozen=True)
class Clip:
    """The files of one clip.

    Attributes:
        name: of its folder.
        frames: in the order of time, at least two.
        masks: one per frame; none in the training half, where all is normal.
    """

    name: str
    frames: list[Path]
    masks: list[Path]


def list_clips(root: str | Path, train: bool) -> list[Clip]:
    """The clips of one half, sorted by name. Reads no pixels.

    Raises:
        FileNotFoundError: the folder, its clips, or the masks of a test clip are missing.
        ValueError: a clip has fewer than two frames, or not one mask per frame.
    """
    root = Path(root).expanduser()
    half = "Train" if train else "Test"
    nested = not any((root / name).is_dir() for name in ("Train", "Test"))
    folder = (root / "UCSDped2" if nested else root) / half
    if not folder.is_dir():
        what = f"{folder} is missing" if root.exists() else f"{root} does not exist"
        raise FileNotFoundError(
            f"{what}: expected UCSD Ped2 as unpacked from UCSD_Anomaly_Dataset.tar.gz at {folder}; "
            "give the folder that holds UCSDped2 with --data.root DIR"
        )
    names = sorted(e.name for e in folder.iterdir() if re.fullmatch(rf"{half}\d+", e.name))
    if not names:
        raise FileNotFoundError(f"{folder} holds no clips; expected {folder}/{half}001/*.tif")
    return [_clip(folder, name, with_masks=not train) for name in names]


def _clip(folder: Path, name: str, with_masks: bool) -> Clip:
    frames = _files(folder / name, ".tif")
    if len(frames) < 2:
        raise ValueError(
            f"{folder / name} holds {len(frames)} frames (*.tif); motion needs at least two"
        )
    if not with_masks:
        return Clip(name, frames, [])
    mask_folder = folder / f"{name}_gt"
    if not mask_folder.is_dir():
        raise FileNotFoundError(
            f"{mask_folder} is missing: without masks (*.bmp) nobody knows what is anomalous in "
            f"{name}; unpack the whole archive, or remove the clip"
        )
    masks = _files(mask_folder, ".bmp")
    if len(masks) != len(frames):
        raise ValueError(
            f"{mask_folder} holds {len(masks)} masks (*.bmp) for the {len(frames)} frames of "
            f"{name}; there must be one for each"
        )
    return Clip(name, frames, masks)


def read_patches(
    clips: Sequence[Clip],
    image_size: int = 45,
    patch_size: int = 45,
    motion_threshold: float = 5.0,
) -> tuple[ImageArrayDataset, Tensor]:
    """The moving patches of some clips; a frame in which nothing moves has none.

    Args:
        clips: at least one.
        image_size: side of the images in pixels.
        patch_size: side of a patch in a frame.
        motion_threshold: see above, in grey levels 0..255.

    Returns:
        The patches, clip by clip and frame by frame, with ``label`` 1 where anomalous, else 0, and
        ``group`` = number of the frame over all these clips. And the labels of the frames, int64
        [number of frames], 1 where anomalous.

    Raises:
        ValueError: frames or masks of more than one size, patches larger than a frame, or nothing
            that moves.
        RuntimeError: a file cannot be read.
    """
    images, labels, groups, frame_labels = [], [], [], []
    size: tuple[int, int] | None = None
    count = 0
    for clip in clips:
        frames = _read_grey(clip.frames, size, clip.name)
        size = (frames.shape[1], frames.shape[2])
        if patch_size > min(size):
            raise ValueError(
                f"patch_size={patch_size} exceeds the frames of {size[1]}x{size[0]} (width x "
                f"height); use --data.patch_size {min(size)} or less"
            )
        change = (frames[1:].short() - frames[:-1].short()).abs()
        motion = _grid(torch.cat([change[:1], change]), patch_size).float().mean((-1, -2))
        moving = motion > motion_threshold
        if clip.masks:
            anomalous = _read_grey(clip.masks, size, f"{clip.name}_gt") > 0
        else:
            anomalous = torch.zeros_like(frames, dtype=torch.bool)
        images.append(rgb_squares(_grid(frames, patch_size)[moving][:, None], image_size))
        labels.append(_grid(anomalous, patch_size)[moving].flatten(1).any(1).long())
        groups.append(moving.nonzero()[:, 0] + count)
        frame_labels.append(anomalous.flatten(1).any(1).long())
        count += len(frames)
    patches = ImageArrayDataset(
        torch.cat(images), torch.cat(labels), ["normal", "outlier"], groups=torch.cat(groups)
    )
    if not len(patches):
        raise ValueError(
            f"nothing moves in the {count} frames of {clips[0].name} to {clips[-1].name} by more "
            f"than motion_threshold={motion_threshold} grey levels; lower it with "
            "--data.motion_threshold"
        )
    return patches, torch.cat(frame_labels)


def _files(folder: Path, suffix: str) -> list[Path]:
    # Copies of the archive hold the hidden files of macOS, which are no pictures.
    return sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() == suffix and not path.name.startswith(".")
    )


def _read_grey(paths: Sequence[Path], size: tuple[int, int] | None, name: str) -> Tensor:
    """uint8 [N, H, W]; ``size`` is the (H, W) that is due, None for that of the first."""
    pixels = [torch.empty(0)] * len(paths)

    def read(position: int) -> None:
        with Image.open(paths[position]) as picture:
            pixels[position] = pil_to_tensor(picture.convert("L"))[0]

    visit_files(read, paths, name)
    height, width = size or tuple(pixels[0].shape)
    for path, picture in zip(paths, pixels, strict=True):
        if picture.shape != (height, width):
            raise ValueError(
                f"{path} is {picture.shape[1]}x{picture.shape[0]} (width x height), but the frames "
                f"before are {width}x{height}; all frames and masks must have one size"
            )
    return torch.stack(pixels)


def _grid(frames: Tensor, size: int) -> Tensor:
    """[N, H, W] as a view [N, H // size, W // size, size, size]."""
    return frames.unfold(1, size, size).unfold(2, size, size)
