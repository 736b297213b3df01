"""The eleven basic colour terms of English, for pixels."""

import torch
from torch import Tensor

# Typical values in sRGB; which term a colour near a border gets is a matter of taste.
COLOUR_TERMS = {
    "black": (0, 0, 0),
    "blue": (50, 80, 200),
    "brown": (110, 70, 40),
    "green": (50, 140, 60),
    "grey": (128, 128, 128),
    "orange": (240, 140, 30),
    "pink": (240, 160, 180),
    "purple": (130, 50, 150),
    "red": (200, 30, 35),
    "white": (250, 250, 250),
    "yellow": (240, 220, 50),
}

_TO_XYZ = ((0.4124, 0.3576, 0.1805), (0.2126, 0.7152, 0.0722), (0.0193, 0.1192, 0.9505))
_WHITE = (0.9505, 1.0, 1.089)


def name_colours(images: Tensor) -> Tensor:
    """The term nearest to every pixel in CIELAB (D65), where distances are about as large as they look.

    Args:
        images: sRGB, uint8 [..., 3, H, W].

    Returns:
        int64 [..., H, W], places in ``COLOUR_TERMS``.

    Raises:
        ValueError: another type, or not three channels.
    """
    if images.dtype != torch.uint8 or images.ndim < 3 or images.shape[-3] != 3:
        raise ValueError(
            f"colours are named in uint8 [..., 3, H, W], not {images.dtype} {list(images.shape)}"
        )
    terms = _lab(torch.tensor(list(COLOUR_TERMS.values()), dtype=torch.uint8))
    pixels = images.movedim(-3, -1)
    # Few of the 2**24 colours occur, and neighbours share theirs.
    codes = (pixels.long() * torch.tensor([65536, 256, 1])).sum(-1)
    seen, place = codes.unique(return_inverse=True)
    colours = torch.stack([seen >> 16, seen >> 8 & 255, seen & 255], -1)
    return torch.cdist(_lab(colours), terms).argmin(1)[place]


def _lab(colours: Tensor) -> Tensor:
    """[N, 3] of 0..255 in sRGB to L*, a*, b*."""
    share = colours.double() / 255
    linear = torch.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
    xyz = linear @ torch.tensor(_TO_XYZ, dtype=torch.float64).T
    relative = xyz / torch.tensor(_WHITE, dtype=torch.float64)
    small = relative <= (6 / 29) ** 3
    f = torch.where(small, relative * (29 / 6) ** 2 / 3 + 4 / 29, relative.clamp_min(0) ** (1 / 3))
    x, y, z = f.unbind(1)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], 1)
