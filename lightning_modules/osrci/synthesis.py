"""The generated open set: where it is kept and how a chunk of it is made."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_modules.nn.modes import eval_mode
from lightning_modules.osrci.counterfactual import interpolated_open_set_candidates


class OpenSetPool(nn.Module):
    """Generated images with a record of each, as buffers that grow round by round.

    Images are kept as uint8, rounded, so that a pool of 6,400 costs 20 MB in a checkpoint.

    Args:
        shape: (C, H, W) of an image.
        records: names of the float values kept per sample.
    """

    images: Tensor
    start: Tensor

    def __init__(self, shape: tuple[int, int, int], records: tuple[str, ...]) -> None:
        super().__init__()
        self.records = records
        self.register_buffer("images", torch.zeros(0, *shape, dtype=torch.uint8))
        self.register_buffer("start", torch.zeros(0, dtype=torch.long))
        for name in records:
            self.register_buffer(name, torch.zeros(0))

    def __len__(self) -> int:
        return len(self.images)

    def append(self, samples: Mapping[str, Tensor]) -> None:
        """Adds samples: ``images`` uint8 [N, C, H, W], ``start`` [N] and one float [N] for each record."""
        for name, buffer in self.named_buffers():
            setattr(self, name, torch.cat([buffer, samples[name].to(buffer.device, buffer.dtype)]))

    def rows(self, uniform: Tensor) -> Tensor:
        """Images drawn with replacement.

        Args:
            uniform: [B] in [0, 1), one number for each image to draw; its dtype is that of the result.

        Returns:
            Images [B, C, H, W] in [0, 1].
        """
        index = (uniform * len(self)).long()
        return self.images[index].to(uniform.dtype) / 255

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        for name, buffer in self.named_buffers():
            stored = state_dict.get(prefix + name)
            if stored is not None:
                setattr(self, name, buffer.new_zeros(stored.shape))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def to_uint8(images: Tensor) -> Tensor:
    """Images in [0, 1] to uint8, rounded. (The released code truncates.)"""
    return images.mul(255).round_().clamp_(0, 255).to(torch.uint8)


@torch.no_grad()
def interpolated_open_set(
    encode: Callable[[Tensor], Tensor],
    networks: tuple[nn.Module, nn.Module, nn.Module],
    draw: Callable[[int], tuple[Tensor, Tensor, Tensor]],
    count: int,
    tries: int,
) -> dict[str, Tensor]:
    """G-OpenMax as in the released code: decoded mixtures of two codes that the classifier is unsure of.

    The released code tries for ever when the classifier is sure of everything; here the set is filled up
    with the least confident candidates of one try, with a warning.

    Args:
        encode: indices of training images [B] to their codes.
        networks: encoder, generator and classifier; in evaluation mode for the duration.
        draw: a number B to indices [B] of the first and the second image and their theta [B] in [0, 1).
        count: images to make.
        tries: batches of ``count`` candidates drawn at most.

    Returns:
        ``images`` [count, C, H, W], ``start`` (index of the first image) and ``confidence`` (largest class
        probability), [count] each.
    """
    kept: list[tuple[Tensor, Tensor, Tensor]] = []
    least: tuple[Tensor, Tensor, Tensor] | None = None
    missing = count
    _, generator, classifier = networks
    with eval_mode(*networks):
        for _ in range(tries):
            first, second, theta = draw(count)
            codes = encode(first), encode(second)
            found = interpolated_open_set_candidates(
                *codes, theta.to(codes[0]), generator, classifier
            )
            columns = found.images, first.to(found.images.device), found.confidence
            chosen = found.keep.nonzero().squeeze(1)[:missing]
            kept.append(tuple(column[chosen] for column in columns))  # type: ignore[arg-type]
            missing -= len(chosen)
            if least is None or found.confidence.min() < least[2].min():
                order = found.confidence.argsort()
                least = tuple(column[order] for column in columns)  # type: ignore[assignment]
            if not missing:
                break
    if missing:
        rank_zero_warn(
            f"G-OpenMax: only {count - missing} of {count} candidates below confidence 0.5 after {tries} tries; "
            "filled up with the least confident ones of one try"
        )
        assert least is not None
        kept.append(tuple(column[:missing] for column in least))  # type: ignore[arg-type]
    images, start, confidence = (torch.cat(columns) for columns in zip(*kept, strict=True))
    return {"images": images, "start": start, "confidence": confidence}
