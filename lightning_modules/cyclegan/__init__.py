"""CycleGAN: unpaired translation with cycle consistency (Zhu et al., ICCV 2017)."""

from lightning_modules.cyclegan.module import CycleGAN
from lightning_modules.cyclegan.released import (
    load_reference_discriminator,
    load_reference_generator,
)

__all__ = ["CycleGAN", "load_reference_discriminator", "load_reference_generator"]
