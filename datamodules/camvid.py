"""CamVid: labelled frames of five drives, in the 11-class layout of SegNet.

``ROOT/{train,val,test}/SEQUENCE_FRAME.jpg`` (or png) with masks
``ROOT/{train,val,test}annot/SEQUENCE_FRAME.png``, or the same in ``ROOT/CamVid/``. The name of a file
begins with that of its drive: 0001TP was filmed at dusk, 0006R0, 0016E5 and Seq05VD by day.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from datamodules.pictures import image_files
from datamodules.sources import unknown_name

PARTS = ("train", "val", "test")

# In the order of their ids in the masks.
CLASS_NAMES = [
    "sky",
    "building",
    "pole",
    "road",
    "pavement",
    "tree",
    "sign",
    "fence",
    "car",
    "pedestrian",
    "bicyclist",
]
UNLABELLED = 11
VOID = 255


@dataclass(frozen=True)
class Frame:
    """One frame.

    Attributes:
        sequence: the drive it is from.
        part: the published part it is in: ``train``, ``val`` or ``test``.
        picture: its file.
        mask: the file of its classes.
    """

    sequence: str
    part: str
    picture: Path
    mask: Path


def list_frames(root: Path) -> list[Frame]:
    """All frames, drive by drive, each in the order of time.

    Raises:
        FileNotFoundError: a folder is missing or empty, or a frame has no mask.
    """
    base = root if (root / "train").is_dir() else root / "CamVid"
    frames = []
    for part in PARTS:
        for folder in (base / part, base / f"{part}annot"):
            if not folder.is_dir():
                what = f"{folder} is missing" if root.exists() else f"{root} does not exist"
                raise FileNotFoundError(
                    f"{what}: expected CamVid with the folders "
                    f"{', '.join(f'{p}, {p}annot' for p in PARTS)} at {root}; give the folder with "
                    "--data.root DIR"
                )
        pictures = image_files(base / part)
        if not pictures:
            raise FileNotFoundError(f"{base / part} holds no pictures; unpack CamVid anew")
        masks = {path.stem: path for path in image_files(base / f"{part}annot")}
        lacking = [picture.name for picture in pictures if picture.stem not in masks]
        if lacking:
            raise FileNotFoundError(
                f"{len(lacking)} of {len(pictures)} frames in {base / part} have no mask, e.g. "
                f"{lacking[0]}; expected {base / f'{part}annot' / Path(lacking[0]).stem}.png"
            )
        frames += [
            Frame(path.stem.partition("_")[0], part, path, masks[path.stem]) for path in pictures
        ]
    return sorted(frames, key=lambda frame: (frame.sequence, frame.picture.stem))


def choose_sequences(
    frames: list[Frame], domain_a: list[str], domain_b: list[str] | None
) -> tuple[list[str], list[str]]:
    """The drives of both domains; ``domain_b`` None stands for all others.

    Raises:
        ValueError: an unknown drive, one in both domains, or an empty domain.
    """
    known = list(dict.fromkeys(frame.sequence for frame in frames))
    for option, names in (("domain_a", domain_a), ("domain_b", domain_b or [])):
        for name in names:
            if name not in known:
                raise unknown_name(f"sequence in --data.{option} of CamVid", name, known)
    second = [name for name in known if name not in domain_a] if domain_b is None else domain_b
    both = sorted(set(domain_a) & set(second))
    if both:
        raise ValueError(f"domain_a and domain_b both have {', '.join(both)}; name each drive once")
    if not domain_a or not second:
        raise ValueError(
            f"domain_a={domain_a} and domain_b={second} must have at least one of the sequences "
            f"{', '.join(known)} each"
        )
    return domain_a, second


def halves(frames: list[Frame], sequences: list[str]) -> tuple[list[Frame], list[Frame]]:
    """The frames of a domain to train on and to test on.

    As published: the frames in ``test`` are tested on, the others are trained on. For 0001TP these
    are the first and the second half of the drive. Where a domain has frames on one of the two sides
    alone, the second half of each of its drives is tested on.
    """
    mine = [frame for frame in frames if frame.sequence in sequences]
    test = [frame for frame in mine if frame.part == "test"]
    if 0 < len(test) < len(mine):
        return [frame for frame in mine if frame.part != "test"], test
    return last_share(mine, 0.5)


def last_share(frames: list[Frame], share: float) -> tuple[list[Frame], list[Frame]]:
    """Cuts the last frames of each drive off: (rest, last).

    Frames that follow each other look alike, so that a random draw would leave near copies.
    """
    rest, last = [], []
    for sequence in dict.fromkeys(frame.sequence for frame in frames):
        drive = [frame for frame in frames if frame.sequence == sequence]
        kept = len(drive) - max(1, round(share * len(drive)))
        rest += drive[:kept]
        last += drive[kept:]
    return rest, last


def read_mask(path: Path, size: tuple[int, int] | None = None) -> Tensor:
    """The classes of the pixels, uint8 [1, H, W]: ids of ``CLASS_NAMES``, 255 for void.

    Args:
        path: the file.
        size: (width, height) to which it is brought, by the nearest pixel.

    Raises:
        ValueError: it has several channels, or an id above 11.
    """
    with Image.open(path) as picture:
        if picture.mode not in ("L", "P"):
            raise ValueError(f"{picture.mode} pixels; a mask holds one class id per pixel")
        ids = np.array(picture)
        if ids.max() > UNLABELLED:
            raise ValueError(f"class id {ids.max()}; ids are 0 to {UNLABELLED} (unlabelled)")
        if size is not None:
            ids = np.array(picture.resize(size, Image.Resampling.NEAREST))
    return torch.from_numpy(np.where(ids == UNLABELLED, VOID, ids).astype(np.uint8))[None]
