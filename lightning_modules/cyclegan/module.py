"""CycleGAN: unpaired image-to-image translation with cycle consistency.

Paper: Zhu, Park, Isola, Efros, "Unpaired Image-to-Image Translation using Cycle-Consistent Adversarial Networks", ICCV
2017. Where paper and released code differ, the released code is the default.

One step:

1. Both generators: adversarial terms, cycles in both directions, identities.
2. Both discriminators, on images and on translations made before the generators' step, taken through image pools.

``discriminator_b`` judges domain B; the released code calls that one D_A, the paper D_Y.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Adam, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from lightning_modules.adversarial import AdversarialModule
from lightning_modules.arguments import demand_at_least
from lightning_modules.cyclegan.losses import (
    Convention,
    Objective,
    cyclegan_generator_losses,
    discriminator_loss,
    gradient_penalty,
    linear_decay_factor,
)
from lightning_modules.cyclegan.networks import (
    PatchDiscriminator,
    PixelDiscriminator,
    build_generator,
    init_weights,
    translate_any_size,
)
from lightning_modules.cyclegan.pool import ImagePool
from lightning_modules.nn.norm import Norm
from lightning_modules.nn.pixels import mean_difference
from lightning_modules.randomness import keyed_generator

Direction = Literal["AtoB", "BtoA"]

LOSSES = {
    "adversarial_ab": "loss_G_A",
    "adversarial_ba": "loss_G_B",
    "cycle_a": "loss_cycle_A",
    "cycle_b": "loss_cycle_B",
    "identity_ab": "loss_idt_A",
    "identity_ba": "loss_idt_B",
}
"""What the generators minimise, by our names and by those of the released code."""


class CycleGAN(AdversarialModule):
    """Two generators and two discriminators.

    A training batch is ``{"a": {"image": ...}, "b": {"image": ...}}``. An evaluation batch is of one domain: ``image``,
    ``index``, ``domain`` (``a`` or ``b``), and perhaps ``counterpart``, the true translation.

    Args:
        channels_a: channels of the images of domain A.
        channels_b: channels of the images of domain B.
        generator: ``resnet_Nblocks`` (9 for 256 px, 6 for 128 px) or ``unet_SIZE``.
        ngf: width of the generators (64 in the paper).
        discriminator: ``patch`` or ``pixel``.
        ndf: width of the discriminators (64 in the paper).
        n_layers: strided layers of a patch discriminator; 3 gives the 70 px patches of the paper.
        norm: normalisation layer of all networks.
        dropout: dropout in the generators.
        upsample: transposed convolutions (released code), or resizing and a convolution against checkerboards.
        init: how weights are drawn.
        init_gain: standard deviation or gain of the drawn weights.
        objective: of the adversarial game. ``wgangp`` has a gradient penalty here; in the released code its critic is
            unconstrained.
        lambda_gp: of that penalty.
        lambda_A: weight of the cycle A to B to A.
        lambda_B: weight of the cycle B to A to B.
        lambda_identity: weight of the identity terms relative to the cycles; 0 saves a third of the generators' work.
            The released code has 0.5 everywhere, the paper only where it says so.
        d_loss_factor: of a discriminator's loss (1/2 in the paper's text and the released code).
        pool_size: translations that each pool remembers. The pools are common to all processes.
        lr: learning rate of all networks.
        betas: of Adam.
        n_epochs: epochs at the full learning rate.
        n_epochs_decay: epochs of linear decay after them.
        lr_convention: when the decay begins; ``start_of_epoch`` is what the released code has done since 2020, which
            ends with an epoch at rate 0.
        checkpoint_blocks: compute residual blocks again in the backward pass instead of keeping their activations.
        channels_last: memory layout that convolutions on tensor cores prefer; results differ by rounding.

    Raises:
        ValueError: for an impossible argument.
    """

    bar_terms = ("adversarial_ab", "cycle_a", "discriminator_b")
    fixed_arguments: tuple[str, ...] = ()
    """Arguments that are no hyper-parameters of a paper that builds on this one."""

    def __init__(
        self,
        channels_a: int = 3,
        channels_b: int = 3,
        generator: str = "resnet_9blocks",
        ngf: int = 64,
        discriminator: Literal["patch", "pixel"] = "patch",
        ndf: int = 64,
        n_layers: int = 3,
        norm: Norm = "instance",
        dropout: bool = False,
        upsample: Literal["deconv", "resize_conv"] = "deconv",
        init: Literal["normal", "xavier", "kaiming", "orthogonal"] = "normal",
        init_gain: float = 0.02,
        objective: Objective = "lsgan",
        lambda_gp: float = 10.0,
        lambda_A: float = 10.0,
        lambda_B: float = 10.0,
        lambda_identity: float = 0.5,
        d_loss_factor: float = 0.5,
        pool_size: int = 50,
        lr: float = 2e-4,
        betas: tuple[float, float] = (0.5, 0.999),
        n_epochs: int = 100,
        n_epochs_decay: int = 100,
        lr_convention: Convention = "end_of_epoch",
        checkpoint_blocks: bool = False,
        channels_last: bool = False,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=self.fixed_arguments)
        self.cycle_weights = (lambda_A, lambda_B)
        self._check_arguments()
        if objective == "wgangp":
            self.gradient_penalised = ("discriminator_a", "discriminator_b")

        shape: dict[str, Any] = {
            "ngf": ngf,
            "norm": norm,
            "dropout": dropout,
            "upsample": upsample,
            "checkpoint_blocks": checkpoint_blocks,
        }
        self.generator_ab = build_generator(generator, channels_a, channels_b, **shape)
        self.generator_ba = build_generator(generator, channels_b, channels_a, **shape)
        self.discriminator_a = self._discriminator(channels_a)
        self.discriminator_b = self._discriminator(channels_b)
        for network in self.children():
            init_weights(network, init, init_gain)
        self.pool_a = ImagePool(pool_size)
        self.pool_b = ImagePool(pool_size)
        self._found: dict[str, list[dict[str, Tensor]]] = {"a": [], "b": []}

    def _check_arguments(self) -> None:
        hp, (lambda_A, lambda_B) = self.hp, self.cycle_weights
        if hp.lambda_identity > 0 and hp.channels_a != hp.channels_b:
            raise ValueError(
                f"identity terms need equal channels, not channels_a={hp.channels_a} and channels_b={hp.channels_b}; "
                "set --model.lambda_identity 0"
            )
        if min(hp.n_epochs, hp.n_epochs_decay) < 0 or hp.n_epochs + hp.n_epochs_decay < 1:
            raise ValueError(
                f"n_epochs={hp.n_epochs} and n_epochs_decay={hp.n_epochs_decay} must be at least 1 together, none "
                "negative"
            )
        demand_at_least(0, lambda_A=lambda_A, lambda_B=lambda_B, lambda_identity=hp.lambda_identity)

    def _discriminator(self, channels: int) -> nn.Module:
        hp = self.hp
        if hp.discriminator == "pixel":
            return PixelDiscriminator(channels, hp.ndf, norm=hp.norm)
        return PatchDiscriminator(channels, hp.ndf, n_layers=hp.n_layers, norm=hp.norm)

    # ------------------------------------------------------------------ schedule
    @property
    def total_epochs(self) -> int:
        """Epochs at the full rate and of the decay."""
        return self.hp.n_epochs + self.hp.n_epochs_decay

    def build_optimizers(self) -> dict[str, Optimizer]:
        """One Adam over both generators, one over both discriminators (released code)."""
        networks = {
            "generators": (self.generator_ab, self.generator_ba),
            "discriminators": (self.discriminator_a, self.discriminator_b),
        }
        return {name: self._adam(*members) for name, members in networks.items()}

    def _adam(self, *networks: nn.Module, lr: float | None = None) -> Adam:
        parameters = [p for network in networks for p in network.parameters()]
        return Adam(parameters, lr=self.hp.lr if lr is None else lr, betas=tuple(self.hp.betas))

    def build_schedulers(self, optimizers: dict[str, Optimizer]) -> list[LRScheduler]:
        """Constant, then linear to zero."""
        hp = self.hp
        return [
            LambdaLR(
                optimizer,
                lambda epoch: linear_decay_factor(
                    epoch + 1, hp.n_epochs, hp.n_epochs_decay, hp.lr_convention
                ),
            )
            for optimizer in optimizers.values()
        ]

    # ------------------------------------------------------------------ training
    def training_step(self, batch: dict[str, dict[str, Tensor]], batch_idx: int) -> None:
        """Generators, then discriminators."""
        a, b = (self.to_network(batch[side]["image"]) for side in ("a", "b"))
        fake_a, fake_b = self.update_generators(a, b)
        self.update_discriminators(a, b, fake_a, fake_b)

    def update_generators(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """One step of both generators on images [B, C, H, W] in [-1, 1].

        Returns:
            The translations into A and into B that it was made with, detached.
        """
        hp = self.hp
        with self.update("generators") as minimize:
            fake_b, fake_a = self.translate_raw(a, "AtoB"), self.translate_raw(b, "BtoA")
            identities: dict[str, Tensor] = {}
            if hp.lambda_identity > 0:
                identities = {
                    "idt_A": self.translate_raw(b, "AtoB"),
                    "idt_B": self.translate_raw(a, "BtoA"),
                }
            terms = cyclegan_generator_losses(
                a,
                b,
                self.translate_raw(fake_b, "BtoA"),
                self.translate_raw(fake_a, "AtoB"),
                self.discriminator_b(fake_b),
                self.discriminator_a(fake_a),
                **identities,
                lambda_A=self.cycle_weights[0],
                lambda_B=self.cycle_weights[1],
                lambda_identity=hp.lambda_identity,
                mode=hp.objective,
            )
            losses = {ours: terms[theirs] for ours, theirs in LOSSES.items() if theirs in terms}
            minimize(**losses, **self.more_generator_losses(a, b, fake_a, fake_b))
        return fake_a.detach(), fake_b.detach()

    def more_generator_losses(
        self, a: Tensor, b: Tensor, fake_a: Tensor, fake_b: Tensor
    ) -> dict[str, Tensor]:
        """What a paper that builds on this one adds to the generators' objective, weighted."""
        return {}

    def update_discriminators(self, a: Tensor, b: Tensor, fake_a: Tensor, fake_b: Tensor) -> None:
        """One step of both discriminators, which share no parameter: one backward serves both.

        Args:
            a: images of A [B, C, H, W] in [-1, 1].
            b: images of B.
            fake_a: translations into A, without a graph.
            fake_b: translations into B.
        """
        # B first: the order of the released code.
        fake_b, fake_a = self._from_pool("b", fake_b), self._from_pool("a", fake_a)
        with self.update("discriminators") as minimize:
            minimize(
                **self._discriminator_losses("a", a, fake_a),
                **self._discriminator_losses("b", b, fake_b),
            )

    def _discriminator_losses(self, side: str, real: Tensor, fake: Tensor) -> dict[str, Tensor]:
        hp = self.hp
        critic = getattr(self, f"discriminator_{side}")
        judged = discriminator_loss(critic(real), critic(fake), hp.objective, hp.d_loss_factor)
        losses = {f"discriminator_{side}": judged}
        if hp.objective == "wgangp":
            alpha = self.draw(f"alpha {side}", "uniform", len(real))
            penalty = gradient_penalty(critic, real, fake, alpha)
            losses[f"penalty_{side}"] = hp.lambda_gp * penalty
        return losses

    def _from_pool(self, side: str, fake: Tensor) -> Tensor:
        """This process's rows of what the pool gives for the translations of all processes."""
        pool: ImagePool = getattr(self, f"pool_{side}")
        if pool.pool_size == 0:
            return fake
        world, rank = self.trainer.world_size, self.trainer.global_rank
        rows = len(fake)
        if world > 1:
            everyone = self.all_gather(fake)
            assert isinstance(everyone, Tensor)
            fake = everyone.flatten(0, 1)
        answer = pool.query(fake, *self._pool_draws(side, len(fake)))
        return answer[rank * rows : (rank + 1) * rows]

    def _pool_draws(self, side: str, rows: int) -> tuple[Tensor, Tensor]:
        generator = keyed_generator("pool", side, *self._draw_position)
        chance = torch.rand(rows, generator=generator)
        return chance, torch.randint(self.hp.pool_size, (rows,), generator=generator)

    # ------------------------------------------------------------------ images
    def to_network(self, images: Tensor) -> Tensor:
        """Images in [0, 1] as the networks take them, in [-1, 1]."""
        images = images * 2 - 1
        return (
            images.contiguous(memory_format=torch.channels_last)
            if self.hp.channels_last
            else images
        )

    def translate_raw(self, x: Tensor, direction: Direction) -> Tensor:
        """Translations [B, C', H, W] in [-1, 1] of images [B, C, H, W] in [-1, 1] of any size, with gradients."""
        name = "generator_ab" if direction == "AtoB" else "generator_ba"
        # Outside a training a running average of the generator, where there is one, stands for it.
        network = getattr(self, name if self.training else f"{name}_ema", getattr(self, name))
        # In reduced precision the losses and the pools still get full floats.
        return translate_any_size(network, x).to(x.dtype)

    @torch.no_grad()
    def translate(self, images: Tensor, direction: Direction = "AtoB") -> Tensor:
        """Translations [B, C', H, W] in [0, 1] of images [B, C, H, W] in [0, 1] of any size.

        Raises:
            ValueError: for another direction than ``AtoB`` and ``BtoA``.
        """
        if direction not in ("AtoB", "BtoA"):
            raise ValueError(f"direction={direction!r} must be AtoB or BtoA")
        return (self.translate_raw(self.to_network(images), direction) + 1) / 2

    # ------------------------------------------------------------------ evaluation
    @torch.no_grad()
    def evaluate(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """What there is to say about each image of an evaluation batch, [B] each."""
        there, back = _directions(batch["domain"])
        images = batch["image"]
        translated = self.translate(images, there)
        found = {
            "cycle": mean_difference(self.translate(translated, back), images),
            "correlation": _correlation(images.mean(1), translated.mean(1)),
        }
        if images.shape[1] == translated.shape[1]:
            found["change"] = mean_difference(translated, images)
        if "counterpart" in batch:
            found["error"] = mean_difference(translated, batch["counterpart"])
            found["error_of_identity"] = mean_difference(images, batch["counterpart"])
        return found

    def validation_step(
        self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Evaluates a batch of one domain."""
        self._found[batch["domain"]].append(self.evaluate(batch))

    test_step = validation_step

    def on_validation_epoch_end(self) -> None:
        """Logs ``val/DIRECTION/cycle``, ``change``, ``correlation`` and, with a known truth, ``error``.

        All but ``correlation`` are mean absolute differences of images in [0, 1]. ``correlation`` is that of the
        brightness of image and translation; it is negative where the game has settled on inverted colours.
        """
        self._log_found("val")

    def on_test_epoch_end(self) -> None:
        """Logs the same as ``test/DIRECTION/...``."""
        self._log_found("test")

    def _log_found(self, stage: str) -> None:
        for domain in ("a", "b"):
            collected, self._found[domain] = self._found[domain], []
            if not self.trainer.sanity_checking:
                columns = self.gather_columns(collected)
                direction, _ = _directions(domain)
                self.log_dict({f"{stage}/{direction}/{k}": v.mean() for k, v in columns.items()})

    def predict_step(
        self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0
    ) -> dict[str, Any]:
        """Translates pictures of ``batch["domain"]`` into the other domain.

        Returns:
            ``image`` [B, C', H, W] in [0, 1], of the size of the pictures.
        """
        return {"image": self.translate(batch["image"], _directions(batch["domain"])[0])}

    # ------------------------------------------------------------------ pictures
    @torch.no_grad()
    def image_grid(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Rows of pictures for :class:`callbacks.ImageGrid`."""
        batch = {"domain": "a", **batch.get("a", batch)}
        there, back = _directions(batch["domain"])
        images = batch["image"]
        translated = self.translate(images, there)
        rows = {f"domain {batch['domain'].upper()}": images, "translated": translated}
        if "counterpart" in batch:
            rows["truth"] = batch["counterpart"]
        return {**rows, "back again": self.translate(translated, back)}

    # ------------------------------------------------------------------ checks
    def setup(self, stage: str) -> None:
        """Checks the channels of the images, and lays the networks out in memory.

        Raises:
            ValueError: if the data have images of other channels.
        """
        super().setup(stage)
        self.demand_as_in_data(channels_a="image_channels", channels_b="image_channels")
        if self.hp.channels_last:
            self.to(memory_format=torch.channels_last)


def _directions(domain: str) -> tuple[Direction, Direction]:
    """From a domain to the other one, and back."""
    return ("AtoB", "BtoA") if domain == "a" else ("BtoA", "AtoB")


def _correlation(first: Tensor, second: Tensor) -> Tensor:
    """Correlation over space of images [B, H, W], [B]; 0 for a constant one."""
    first, second = (
        image.flatten(1).float() - image.flatten(1).float().mean(1, keepdim=True)
        for image in (first, second)
    )
    return F.cosine_similarity(first, second, dim=1)
