"""Plain supervised modules: networks to look into, to quantize, and to judge generated images with."""

from lightning_modules.supervised.classifier import Classifier
from lightning_modules.supervised.detector import Detector
from lightning_modules.supervised.judge import fit_judge
from lightning_modules.supervised.segmenter import Segmenter

__all__ = ["Classifier", "Detector", "Segmenter", "fit_judge"]
