"""Open-set learning with counterfactual images (Neal et al., ECCV 2018)."""

from lightning_modules.osrci.module import KPlusOneClassifierModule, OSRCIModule

__all__ = ["KPlusOneClassifierModule", "OSRCIModule"]
