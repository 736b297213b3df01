"""CycleGAN: unpaired translation with cycle consistency (Zhu et al., ICCV 2017)."""

from lightning_modules.cyclegan.module import CycleGAN

__all__ = ["CycleGAN"]
