"""Zero-shot adversarial quantization (Liu, Zhang, Wang, CVPR 2021) and data-free baselines under the same quantizer."""

from lightning_modules.zaq.detection import ZAQDetection
from lightning_modules.zaq.module import ZAQ

__all__ = ["ZAQ", "ZAQDetection"]
