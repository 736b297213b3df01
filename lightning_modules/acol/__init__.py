"""ACoL: weakly supervised localization by classifiers that see what others left (Zhang et al., CVPR 2018)."""

from lightning_modules.acol.module import ACoL

__all__ = ["ACoL"]
