"""OP-GAN: CycleGAN that keeps objects in their places (Xie et al., ECCV 2020)."""

from lightning_modules.opgan.module import OPGAN

__all__ = ["OPGAN"]
