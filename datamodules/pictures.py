"""Picture files: which there are, their sizes, and their pixels."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import pil_to_tensor, resize
from tqdm import tqdm


def image_files(folder: Path) -> list[Path]:
    """All pictures below a folder, sorted by path."""
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in IMG_EXTENSIONS and path.is_file()
    )


def decode_images(paths: Sequence[Path], image_size: int, name: str) -> Tensor:
    """Decodes picture files in threads, with a progress bar.

    A picture that is not square is squeezed to a square, like every training picture.

    Args:
        paths: the files, at least one.
        image_size: side of the result.
        name: what the progress bar and an error call them.

    Returns:
        uint8 RGB [N, 3, image_size, image_size].

    Raises:
        RuntimeError: some files cannot be read; names up to five of them.
    """
    images = torch.empty(len(paths), 3, image_size, image_size, dtype=torch.uint8)

    def decode(position: int) -> None:
        images[position] = decode_picture(paths[position], image_size)

    visit_files(decode, paths, name, progress=f"decoding {name}")
    return images


def decode_picture(path: Path, image_size: int | None = None) -> Tensor:
    """The pixels of one file as uint8 RGB [3, H, W], squeezed to a square if a size is given."""
    with Image.open(path) as picture:
        pixels = pil_to_tensor(picture.convert("RGB"))
    return pixels if image_size is None else rgb_squares(pixels[None], image_size)[0]


def picture_sizes(
    paths: Sequence[Path], name: str, progress: str | None = None
) -> list[tuple[int, int]]:
    """Height and width of each picture, by its header; the files are checked as far as is cheap.

    PNG files are compared with their checksums; of most other formats only the header is read.

    Args:
        paths: the files.
        name: what an error calls them.
        progress: what the progress bar says; None for no bar.

    Raises:
        RuntimeError: some files are no pictures, damaged, or have more than 8 bits per channel
            (which a conversion would clip); names up to five of them.
    """
    sizes = [(0, 0)] * len(paths)

    def check(position: int) -> None:
        with Image.open(paths[position]) as picture:
            if picture.mode.startswith(("I", "F")):
                raise ValueError(f"{picture.mode} pixels; save it with 8 bits per channel")
            sizes[position] = (picture.height, picture.width)
            picture.verify()

    visit_files(check, paths, name, progress)
    return sizes


def visit_files(
    visit: Callable[[int], None], paths: Sequence[Path], name: str, progress: str | None = None
) -> None:
    """Calls ``visit(position)`` for each file, in threads; goes on after a failure.

    Args:
        visit: reads the file at this position of ``paths``; raises whatever it likes.
        paths: the files.
        name: what an error calls them.
        progress: what the progress bar says; None for no bar.

    Raises:
        RuntimeError: some visits failed; names up to five of the files.
    """

    def failure(position: int) -> str | None:
        try:
            visit(position)
        except Exception as error:  # Pillow raises half a dozen types for damaged files
            return f"{paths[position]} ({error})"
        return None

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        results = tqdm(
            pool.map(failure, range(len(paths))),
            desc=progress,
            total=len(paths),
            unit="image",
            disable=progress is None or getattr(rank_zero_only, "rank", 0) != 0,
            leave=False,
        )
        unreadable = [error for error in results if error is not None]
    if unreadable:
        listed = "\n  ".join(unreadable[:5]) + ("\n  ..." if len(unreadable) > 5 else "")
        raise RuntimeError(
            f"{len(unreadable)} of {len(paths)} images of {name} cannot be read; replace or "
            f"delete:\n  {listed}"
        )


def rgb_squares(images: Tensor, image_size: int, antialias: bool = True) -> Tensor:
    """Squeezes uint8 [N, 1 or 3, H, W] to uint8 RGB [N, 3, image_size, image_size], bilinear."""
    # In pieces, because the interpolation works on floats.
    pieces = [
        resize(piece, [image_size, image_size], InterpolationMode.BILINEAR, antialias=antialias)
        for piece in images.split(4096)
    ]
    return torch.cat(pieces).expand(-1, 3, -1, -1).contiguous()
