"""Precision, recall, density and coverage as a program: two sets of images or features, or a generator and a set."""

from lightning_modules.prdc.module import PRDCModule

__all__ = ["PRDCModule"]
