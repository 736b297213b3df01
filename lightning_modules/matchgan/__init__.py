"""MatchGAN: StarGAN with few labels, by telling whether two images share theirs (Sun et al., ACCV 2020)."""

from lightning_modules.matchgan.module import MatchGAN

__all__ = ["MatchGAN"]
