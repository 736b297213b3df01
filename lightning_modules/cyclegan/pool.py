"""The image pool of CycleGAN: a discriminator also sees translations of some steps ago."""

from typing import Any

import torch
from torch import Tensor, nn


class ImagePool(nn.Module):
    """Remembers translations and hands some of them out in place of new ones (released code).

    A pool that is not full keeps every image and returns it. A full one swaps an image, with probability 1/2, with one
    that it keeps. Its answer is a function of the arguments of :meth:`query` and of what it keeps, which is in the
    state dict.

    Args:
        pool_size: number of images kept; 0 switches the pool off.
        dtype: type that images are kept in; None: as they come.

    Raises:
        ValueError: a negative size.
    """

    images: Tensor

    def __init__(self, pool_size: int = 50, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        if pool_size < 0:
            raise ValueError(f"pool_size={pool_size} must be at least 0 (0 = no pool)")
        self.pool_size = pool_size
        self.dtype = dtype
        self.register_buffer("images", torch.empty(0, dtype=dtype))

    def __len__(self) -> int:
        """Images kept at present."""
        return len(self.images)

    @torch.no_grad()
    def query(
        self, images: Tensor, chance: Tensor | None = None, slot: Tensor | None = None
    ) -> Tensor:
        """Gives an image for each new one, one after the other, so that a batch may meet its own images.

        Args:
            images: new translations [B, ...].
            chance: numbers in [0, 1) [B]: an image is swapped above 1/2. None: drawn from torch's global generator.
            slot: place of the image that it is swapped with, int64 in 0..pool_size-1 [B]. None: drawn likewise. Both
                are asked for every image, also where the pool is not yet full. On the CPU they cost no wait for an
                accelerator.

        Returns:
            [B, ...] without a graph; with a pool of size 0 ``images`` itself.

        Raises:
            ValueError: images of another shape than the kept ones, a number of draws other than B, or a slot outside
                the pool.
        """
        if self.pool_size == 0:
            return images
        chance = torch.rand(len(images)) if chance is None else chance
        slot = torch.randint(self.pool_size, (len(images),)) if slot is None else slot
        chances, slots = chance.tolist(), slot.tolist()
        self._check(images, chances, slots)

        answer = images.detach().clone()
        room = self.pool_size - len(self)
        if room > 0:
            new = answer[:room].to(self.dtype or answer.dtype)
            kept = self.images.to(new.device)
            self.images = torch.cat([kept.to(new.dtype), new]) if len(self) else new.clone()
        for i in range(min(room, len(images)), len(images)):
            if chances[i] > 0.5:
                old = self.images[slots[i]].clone()
                self.images[slots[i]] = answer[i]
                answer[i] = old
        return answer

    def _check(self, images: Tensor, chances: list[float], slots: list[int]) -> None:
        if len(self) and images.shape[1:] != self.images.shape[1:]:
            raise ValueError(
                f"the pool keeps images of shape {list(self.images.shape[1:])}, the new ones have "
                f"{list(images.shape[1:])}; train with crops of one size or without a pool, --model.pool_size 0"
            )
        if not len(chances) == len(slots) == len(images):
            raise ValueError(
                f"{len(images)} images need as many draws, not {len(chances)} chances and {len(slots)} slots"
            )
        if any(not 0 <= place < self.pool_size for place in slots):
            raise ValueError(f"slots {slots} must be in 0..{self.pool_size - 1}")

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        stored = state_dict.get(f"{prefix}images")
        if stored is not None and len(stored) > self.pool_size:
            error_msgs.append(
                f"{prefix}images holds {len(stored)} images, more than pool_size={self.pool_size}; set "
                f"--model.pool_size {len(stored)}"
            )
            return
        if stored is not None:
            # However full the stored pool was.
            self.images = torch.empty_like(
                stored, dtype=self.dtype or stored.dtype, device=self.images.device
            )
        super()._load_from_state_dict(
            state_dict,
            prefix,
            local_metadata,
            strict,
            missing_keys,
            unexpected_keys,
            error_msgs,
        )

    def extra_repr(self) -> str:
        """The size."""
        return f"pool_size={self.pool_size}"
