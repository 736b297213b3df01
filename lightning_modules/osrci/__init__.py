"""Open-set learning with counterfactual images (Neal et al., ECCV 2018)."""

from lightning_modules.osrci.kplusone import KPlusOneClassifierModule
from lightning_modules.osrci.module import OSRCIModule

__all__ = ["KPlusOneClassifierModule", "OSRCIModule"]
