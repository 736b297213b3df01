"""OP-GAN: CycleGAN with a Siamese network that makes translations keep their objects where they are.

Paper: Xie, Chen, Li, Shen, Ma, Zheng, "Self-Supervised CycleGAN for Object-Preserving Image-to-Image Domain
Adaptation", ECCV 2020. No code was released; equations, weights and the order of the updates come from public summaries
of the paper, everything marked inferred is our choice.

One step:

1. Both generators: CycleGAN's terms without identities, and on patches of an image and of its translation the content
   and domain losses of a fixed Siamese network.
2. The Siamese network, on the same pairs of patches; it is cooperative, it minimises the same losses.
3. Both discriminators, as in CycleGAN.
"""

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_modules.arguments import demand_at_least
from lightning_modules.cyclegan.module import CycleGAN, Direction
from lightning_modules.nn.maps import normalize_map
from lightning_modules.opgan.losses import AttentionNorm
from lightning_modules.opgan.networks import (
    ContentPositions,
    SiameseNetwork,
    SiameseNorm,
    content_ratio,
    siamese_terms,
)
from lightning_modules.opgan.pairs import (
    PairSampling,
    draws_per_image,
    patch_grid,
    sample_patch_pairs,
)

DIRECTIONS: dict[str, Direction] = {"ab": "AtoB", "ba": "BtoA"}


class OPGAN(CycleGAN):
    """CycleGAN's networks and one Siamese network; data and evaluation are CycleGAN's.

    With the formula of the paper the content map may become constant, which satisfies the content loss and says
    nothing; ``attention_norm="instance"`` with ``content_negative_weight=1`` prevents it (our own). The losses
    ``attention_std`` and ``val/DIRECTION/content_ratio`` tell.

    Args:
        alpha: weight of both cycles (10 in the paper).
        beta: weight of the Siamese losses (1 in the paper).
        grid: patches along each side of an image (3 in the paper).
        pair_sampling: see :func:`lightning_modules.opgan.pairs.sample_patch_pairs` (inferred).
        pairs_per_scenario: pairs for an image and a direction, of each scenario or altogether.
        content_positions: content loss on the drawn pairs or on all positions (our own).
        siamese_width: width of the Siamese network; 64 gives the paper's 512 features.
        siamese_norm: normalisation layer in its encoder (inferred).
        attention_norm: of the content map; ``none`` is the paper's formula.
        content_negative_weight: of the hinge on patches of different positions, in the Siamese step only (our own).
        content_margin: of that hinge.
        shared_siamese: one Siamese network for both directions, with pairs labelled by domain (inferred); false: one
            for each.
        lr_s: learning rate of the Siamese network; None: as ``lr``.
        lambda_identity: as in CycleGAN; no part of the method.
        **cyclegan: arguments of :class:`CycleGAN`.

    Raises:
        ValueError: for an impossible argument.
    """

    bar_terms = ("adversarial_ab", "cycle_a", "content_ab")
    fixed_arguments = ("lambda_A", "lambda_B")

    def __init__(
        self,
        alpha: float = 10.0,
        beta: float = 1.0,
        grid: int = 3,
        pair_sampling: PairSampling = "scenario",
        pairs_per_scenario: int = 1,
        content_positions: ContentPositions = "drawn",
        siamese_width: int = 64,
        siamese_norm: SiameseNorm = "instance",
        attention_norm: AttentionNorm = "none",
        content_negative_weight: float = 0.0,
        content_margin: float = 1.0,
        shared_siamese: bool = True,
        lr_s: float | None = None,
        lambda_identity: float = 0.0,
        **cyclegan: Any,
    ) -> None:
        super().__init__(
            lambda_A=alpha, lambda_B=alpha, lambda_identity=lambda_identity, **cyclegan
        )
        channels = self.hp.channels_a
        for name in ("siamese",) if shared_siamese else ("siamese_ab", "siamese_ba"):
            network = SiameseNetwork(channels, siamese_width, siamese_norm, attention_norm)
            self.add_module(name, network)

    def _check_arguments(self) -> None:
        super()._check_arguments()
        hp = self.hp
        weights = {name: hp[name] for name in ("beta", "content_negative_weight", "content_margin")}
        demand_at_least(0, option="--model.", **weights)
        if hp.channels_a != hp.channels_b:
            raise ValueError(
                f"the Siamese network compares images of equal channels, not channels_a={hp.channels_a} and "
                f"channels_b={hp.channels_b}"
            )
        # Checks its arguments before any training.
        draws = torch.zeros(1, draws_per_image(hp.pair_sampling, hp.pairs_per_scenario))
        sample_patch_pairs(1, hp.pair_sampling, hp.pairs_per_scenario, grid=hp.grid, draws=draws)

    def siamese_network(self, way: str) -> SiameseNetwork:
        """The network that judges the direction ``ab`` or ``ba``."""
        return getattr(self, "siamese" if self.hp.shared_siamese else f"siamese_{way}")

    # ------------------------------------------------------------------ schedule
    def build_optimizers(self) -> dict[str, Optimizer]:
        """CycleGAN's, and one Adam for the Siamese network between them."""
        networks = {id(n): n for n in (self.siamese_network(way) for way in DIRECTIONS)}
        built = super().build_optimizers()
        return {
            "generators": built["generators"],
            "siamese": self._adam(*networks.values(), lr=self.hp.lr_s),
            "discriminators": built["discriminators"],
        }

    # ------------------------------------------------------------------ training
    def training_step(self, batch: dict[str, dict[str, Tensor]], batch_idx: int) -> None:
        """Generators, then the Siamese network and the discriminators, which share nothing."""
        a, b = (self.to_network(batch[side]["image"]) for side in ("a", "b"))
        # Both steps look at the same pairs.
        self._pairs = {way: self.draw_pairs(way, len(a)) for way in DIRECTIONS}
        fake_a, fake_b = self.update_generators(a, b)
        self.update_siamese(a, b, fake_a, fake_b)
        self.update_discriminators(a, b, fake_a, fake_b)

    def draw_pairs(self, way: str, rows: int) -> Tensor:
        """Pairs of patches for the local batch, int64 [N, 3]."""
        hp = self.hp
        count = draws_per_image(hp.pair_sampling, hp.pairs_per_scenario)
        draws = self.draw(f"pairs {way}", "uniform", rows, count)
        return sample_patch_pairs(
            rows, hp.pair_sampling, hp.pairs_per_scenario, grid=hp.grid, draws=draws
        )

    def more_generator_losses(
        self, a: Tensor, b: Tensor, fake_a: Tensor, fake_b: Tensor
    ) -> dict[str, Tensor]:
        """The content and domain losses of both directions, times beta (paper, eq. 7)."""
        terms = self._siamese_terms(a, b, fake_a, fake_b)
        return {
            f"{name}_{way}": self.hp.beta * found[name]
            for name in ("content", "domain")
            for way, found in terms.items()
        }

    def update_siamese(self, a: Tensor, b: Tensor, fake_a: Tensor, fake_b: Tensor) -> None:
        """One step of the Siamese network on the translations of the generators' step, detached."""
        with self.update("siamese") as minimize:
            terms = self._siamese_terms(a, b, fake_a, fake_b)
            losses = {
                "siamese_content": sum(t["content"] for t in terms.values()),
                "siamese_domain": sum(t["domain"] for t in terms.values()),
            }
            if self.hp.content_negative_weight > 0:
                negative = sum(t["negative"] for t in terms.values())
                losses["siamese_negative"] = self.hp.content_negative_weight * negative
            minimize(**losses)
        for name in ("accuracy", "attention_std"):
            self.losses[name] = torch.stack([t[name] for t in terms.values()]).mean()

    def _siamese_terms(
        self, a: Tensor, b: Tensor, fake_a: Tensor, fake_b: Tensor
    ) -> dict[str, dict[str, Tensor]]:
        # The domain-A image comes first, whichever of the two is the translation.
        images = {"ab": (a, fake_b), "ba": (fake_a, b)}
        return {
            way: siamese_terms(
                self.siamese_network(way),
                *images[way],
                self._pairs[way],
                self.hp.grid,
                self.hp.content_positions,
                self.hp.content_margin,
            )
            for way in DIRECTIONS
        }

    # ------------------------------------------------------------------ evaluation
    def evaluate(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """CycleGAN's columns, and ``content_ratio``: how well the content loss sees a distortion; 1 is blind."""
        found = super().evaluate(batch)
        way = "ab" if batch["domain"] == "a" else "ba"
        images = self.to_network(batch["image"])
        translated = self.translate_raw(images, DIRECTIONS[way])
        ratio = content_ratio(self.siamese_network(way), images, translated, self.hp.grid)
        return {**found, "content_ratio": ratio.expand(len(images))}

    # ------------------------------------------------------------------ pictures
    @torch.no_grad()
    def image_grid(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """CycleGAN's rows, and the content maps of image and translation, each from black to white."""
        rows = super().image_grid(batch)
        way = "ba" if batch.get("domain") == "b" else "ab"
        network, grid = self.siamese_network(way), self.hp.grid
        titles = list(rows)[:2]
        for title in titles:
            images = self.to_network(rows[title])
            patches = patch_grid(images, grid)
            size = (patches.shape[-2], patches.shape[-1])
            maps = network.content_map(network.encode(patches.flatten(0, 1))[0], size)
            # Back from patches to one map of the image.
            maps = (
                maps.view(len(images), grid, grid, *size).transpose(2, 3).flatten(3).flatten(1, 2)
            )
            rows[f"content map, {title}"] = normalize_map(maps)[:, None]
        return rows
