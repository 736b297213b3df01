"""StarGAN: one generator for translations between many domains (Choi et al., CVPR 2018)."""

from lightning_modules.stargan.module import StarGAN
from lightning_modules.stargan.released import load_reference_checkpoint

__all__ = ["StarGAN", "load_reference_checkpoint"]
