"""Old is Gold: one-class classification with a discriminator of reconstruction quality (Zaheer et al., CVPR 2020)."""

from lightning_modules.ognet.module import OGNet
from lightning_modules.ognet.released import load_reference_checkpoint

__all__ = ["OGNet", "load_reference_checkpoint"]
