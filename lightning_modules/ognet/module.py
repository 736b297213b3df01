"""OGNet: one-class classification by the quality of reconstructions, both phases in one module.

Paper: Zaheer, Lee, Astrid, Lee, "Old is Gold: Redefining the Adversarially Learned One-Class Classifier Training
Paradigm", CVPR 2020. Where paper and released code differ, the released code is the default; what was recalled from the
paper and not verified is marked so.

Order of things:

1. Phase one: an auto-encoder G and a discriminator D that calls reconstructions bad and images good, on normal images.
2. At the end of the epoch ``old_epoch``, G is remembered as ``old_generator``.
3. Phase two, one more epoch of ``phase_two_iterations`` batches: G is frozen, a copy of D learns that images and their
   reconstructions are good, and that old reconstructions, and reconstructions of averaged old ones, are bad.
4. The anomaly score is that D on a reconstruction.
"""

from typing import Any, Literal

import torch
from torch import Tensor
from torch.func import functional_call
from torch.optim import Adam, Optimizer
from torchvision.transforms.functional import rgb_to_grayscale

from lightning_modules.adversarial import AdversarialModule
from lightning_modules.arguments import demand_at_least, demand_choice
from lightning_modules.metrics.anomaly import AnomalyMetrics, frame_scores
from lightning_modules.metrics.open_set import acceptance_threshold
from lightning_modules.nn.ema import AveragedNetwork
from lightning_modules.nn.modes import eval_mode, frozen_statistics
from lightning_modules.nn.norm import Norm
from lightning_modules.ognet.losses import add_input_noise, discriminator_loss, generator_loss
from lightning_modules.ognet.networks import (
    SMALLEST_IMAGE,
    OGNetDiscriminator,
    OGNetGenerator,
)
from lightning_modules.ognet.phase_two import (
    Pairing,
    Reconstructor,
    draw_pairs,
    phase_two_terms,
)
from lightning_modules.paper import ImageBank
from lightning_modules.table_rows import TableRows

ROWS = {
    "reconstruction": "reconstruction error",
    "input": "phase one, D(x)",
    "phase_one": "phase one, D(G(x))",
    "ognet": "OGNet, D(G(x))",
}
"""Rows of the anomaly table in the order in which they are printed."""


class OGNet(TableRows, AdversarialModule):
    """Generator, old generator, and the discriminators of both phases.

    Args:
        in_channels: 1 turns colour images to grey, 3 keeps them.
        image_size: side of the images; must be the data's.
        base_channels: width of both networks (64 in the paper).
        norm: normalisation layer; ``group`` keeps the images of a batch independent of each other.
        noise_std: standard deviation of the input noise in phase one. 0.81 is what the released code does with its
            ``sigma_noise=0.9``, whose square it passes on; the paper's reading is 0.9 (not verified).
        adversarial_weight: of D's opinion in G's loss (released code; the paper's form is 1, recalled).
        recon_weight: of the squared error in G's loss (released code; the paper's form is 0.2, recalled).
        alpha: share of the images among the good ones in phase two.
        beta: share of the old reconstructions among the bad ones in phase two.
        old_epoch: epoch at whose end the old generator is remembered, from 0.
        phase_one_epochs: epochs of phase one.
        phase_two_iterations: updates of phase two, whatever the size of the data.
        lr_g: learning rate of G.
        lr_d: learning rate of D in phase one.
        lr_d_phase_two: learning rate of D in phase two.
        d_forward: in phase one, G sees D after its update (``recompute``) or before (``simultaneous``, closest to what
            the released code did on the torch of its time).
        update_bn_in_g_step: let G's step also move D's running statistics; the released code moves them twice a batch.
        pseudo_pairing: pseudo anomalies of two batches of other images (``separate``) or of the batch itself in two
            orders (``permute``, which depends on the number of processes).
        precompute_reconstructions: reconstruct the training set once before phase two, see :class:`Reconstructor`.
        decision_score: the score ``predict`` decides with.
        acceptance: share of held-out normal images that the decision accepts.

    Raises:
        ValueError: for an impossible argument.
    """

    bar_terms = ("recon", "adversarial", "phase_two")
    row_titles = ROWS

    def __init__(
        self,
        in_channels: Literal[1, 3] = 1,
        image_size: int = 45,
        base_channels: int = 64,
        norm: Norm = "batch",
        noise_std: float = 0.81,
        adversarial_weight: float = 0.5,
        recon_weight: float = 0.5,
        alpha: float = 0.1,
        beta: float = 0.001,
        old_epoch: int = 0,
        phase_one_epochs: int = 4,
        phase_two_iterations: int = 75,
        lr_g: float = 1e-3,
        lr_d: float = 1e-4,
        lr_d_phase_two: float = 5e-5,
        d_forward: Literal["recompute", "simultaneous"] = "recompute",
        update_bn_in_g_step: bool = False,
        pseudo_pairing: Pairing = "separate",
        precompute_reconstructions: bool = False,
        decision_score: str = "ognet",
        acceptance: float = 0.95,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self._check_arguments()
        networks: dict[str, Any] = {
            "in_channels": in_channels,
            "base_channels": base_channels,
            "norm": norm,
        }
        self.generator = OGNetGenerator(**networks)
        self.old_generator = AveragedNetwork(self.generator)
        self.discriminator = OGNetDiscriminator(image_size=image_size, **networks)
        self.tuned_discriminator = OGNetDiscriminator(image_size=image_size, **networks)
        self.add_rows(list(ROWS))
        self.tuned: Tensor
        self.register_buffer("tuned", torch.zeros((), dtype=torch.bool))
        self.test_metrics: Any = torch.nn.ModuleDict({row: AnomalyMetrics() for row in self.rows})
        self._validation: list[dict[str, Tensor]] = []
        self._reconstructor: Reconstructor | None = None

    def _check_arguments(self) -> None:
        hp = self.hp
        if hp.in_channels not in (1, 3):
            raise ValueError(f"in_channels={hp.in_channels} must be 1 or 3")
        demand_at_least(SMALLEST_IMAGE, option="--model.", image_size=hp.image_size)
        lengths = {name: hp[name] for name in ("phase_one_epochs", "phase_two_iterations")}
        demand_at_least(1, option="--model.", **lengths)
        if not 0 <= hp.old_epoch < hp.phase_one_epochs:
            raise ValueError(
                f"old_epoch={hp.old_epoch} must be one of the {hp.phase_one_epochs} epochs of phase one, from 0"
            )
        for name in ("alpha", "beta"):
            if not 0 <= hp[name] <= 1:
                raise ValueError(f"{name}={hp[name]} must be in [0, 1]")
        if not 0 < hp.acceptance < 1:
            raise ValueError(
                f"acceptance is a share of the normal images in (0, 1), not {hp.acceptance}"
            )
        demand_choice(ROWS, option="--model.", decision_score=hp.decision_score)

    # ------------------------------------------------------------------ schedule
    @property
    def total_epochs(self) -> int:
        """Epochs of both phases together."""
        return self.hp.phase_one_epochs + 1

    def phase_at(self, epoch: int) -> Literal["one", "two"]:
        """The phase an epoch belongs to."""
        return "one" if epoch < self.hp.phase_one_epochs else "two"

    @property
    def phase(self) -> Literal["one", "two"]:
        """The current phase."""
        return self.phase_at(self.current_epoch)

    def batches_in_epoch(self, epoch: int) -> int | None:
        """Phase two is one epoch of ``phase_two_iterations`` batches, whatever the size of the data."""
        return None if self.phase_at(epoch) == "one" else self.hp.phase_two_iterations

    def build_optimizers(self) -> dict[str, Optimizer]:
        """One Adam for G, one for D in each phase (released code)."""
        hp = self.hp
        rates = {
            "generator": hp.lr_g,
            "discriminator": hp.lr_d,
            "tuned_discriminator": hp.lr_d_phase_two,
        }
        return {name: Adam(getattr(self, name).parameters(), lr=lr) for name, lr in rates.items()}

    # ------------------------------------------------------------------ training
    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """One batch of the current phase."""
        if self.phase == "one":
            self.phase_one_step(self.to_network(batch["image"]))
        else:
            self.phase_two_step(self.to_network(batch["image"]), batch["index"])

    def phase_one_step(self, x: Tensor) -> None:
        """An update of D and one of G on images [B, C, H, W] in [-1, 1].

        The reconstruction is cut off for D's update. The released code does not do that, steps D, and then
        differentiates through the activations that it had before the step: an error since torch 1.5.
        """
        hp = self.hp
        noise = self.draw("noise", "normal", len(x), *x.shape[1:]) * hp.noise_std
        noisy = add_input_noise(x, noise)
        if hp.d_forward == "recompute":
            recon = self.generator(noisy)
            with self.update("discriminator") as minimize:
                of_d = self._discriminator_loss(recon.detach(), x)
                minimize(discriminator=of_d["total"])
            with self.update("generator") as minimize:
                of_g = self._generator_loss(self._opinion(self.discriminator, recon), recon, x)
                minimize(generator=of_g["total"])
        else:
            with self.update("discriminator", "generator") as minimize:
                recon = self.generator(noisy)
                of_d = self._discriminator_loss(recon.detach(), x)
                # G's term must leave no gradient in D, whose parameters are being differentiated, too.
                fixed = {name: p.detach() for name, p in self.discriminator.named_parameters()}
                logits = self._opinion(
                    lambda images: functional_call(self.discriminator, fixed, (images,)), recon
                )
                of_g = self._generator_loss(logits, recon, x)
                minimize(discriminator=of_d["total"], generator=of_g["total"])
        parts = {"d_fake": of_d["fake"], "d_real": of_d["real"]}
        parts |= {"recon": of_g["recon"], "adversarial": of_g["adversarial"]}
        self.losses |= {name: part.detach() for name, part in parts.items()}

    def _opinion(self, discriminator: Any, recon: Tensor) -> Tensor:
        """Logits for G's update."""
        if self.hp.update_bn_in_g_step:
            return discriminator(recon)
        with frozen_statistics(self.discriminator):
            return discriminator(recon)

    def _discriminator_loss(self, recon: Tensor, x: Tensor) -> dict[str, Tensor]:
        # Reconstructions first: the running statistics of batch norm depend on the order (released code).
        return discriminator_loss(self.discriminator(recon), self.discriminator(x))

    def _generator_loss(self, logits: Tensor, recon: Tensor, x: Tensor) -> dict[str, Tensor]:
        return generator_loss(logits, recon, x, self.hp.adversarial_weight, self.hp.recon_weight)

    def phase_two_step(self, x: Tensor, index: Tensor) -> None:
        """One update of the tuned discriminator on images [B, C, H, W] in [-1, 1] with their places [B] in the set."""
        hp = self.hp
        bank = self.training_bank()
        if self._reconstructor is None:
            self._reconstructor = self.reconstructor(bank)
        world, rank = self.trainer.world_size, self.trainer.global_rank
        # Pairs of other images are drawn for the global batch, each rank takes its rows.
        keys: tuple[int | str, ...] = self._draw_position
        rows, mine = len(x) * world, slice(rank * len(x), (rank + 1) * len(x))
        if hp.pseudo_pairing == "permute":
            rows, mine, keys = len(x), slice(None), (*keys, rank)
        a, b = draw_pairs(len(bank), rows, hp.pseudo_pairing, index, *keys)
        batch = self._reconstructor.batch(index.cpu(), a[mine], b[mine], real=x)
        with self.update("tuned_discriminator") as minimize:
            terms = phase_two_terms(self.tuned_discriminator, batch, hp.alpha, hp.beta)
            minimize(phase_two=terms.pop("total"))
        self.losses |= {f"two_{name}": part.detach() for name, part in terms.items()}

    def reconstructor(self, bank: ImageBank) -> Reconstructor:
        """Makes phase-two batches of a training set with the generators as they are."""
        dtype: Any = self.dtype
        return Reconstructor(
            self.generator,
            self.old_generator,
            lambda indices: self.to_network(bank.batch(indices, self.device, dtype)["image"]),
            len(bank),
            self.hp.precompute_reconstructions,
        )

    def tuned_copy(self, bank: ImageBank, batch_size: int, *keys: int | str) -> torch.nn.Module:
        """A discriminator as phase two would make it from here; nothing of the module changes.

        Args:
            bank: the training set.
            batch_size: images of an update.
            keys: name the draws.

        Raises:
            RuntimeError: there is no old generator yet.
        """
        hp = self.hp
        if not self.old_generator.updates:
            raise RuntimeError(
                f"the old generator is remembered at the end of epoch {hp.old_epoch}"
            )
        tuned = OGNetDiscriminator(hp.in_channels, hp.image_size, hp.base_channels, hp.norm)
        tuned.to(next(self.discriminator.parameters()))
        tuned.load_state_dict(self.discriminator.state_dict())
        optimizer = Adam(tuned.parameters(), lr=hp.lr_d_phase_two)
        source = self.reconstructor(bank)
        for step in range(hp.phase_two_iterations):
            x, _ = draw_pairs(len(bank), batch_size, "separate", torch.empty(0), *keys, step, "x")
            a, b = draw_pairs(len(bank), batch_size, hp.pseudo_pairing, x, *keys, step)
            optimizer.zero_grad()
            with torch.enable_grad():
                terms = phase_two_terms(tuned, source.batch(x, a, b), hp.alpha, hp.beta)
                terms["total"].backward()
            optimizer.step()
        return tuned.eval()

    def on_train_epoch_start(self) -> None:
        """Starts phase two from the discriminator of phase one, weights and running statistics."""
        if self.current_epoch == self.hp.phase_one_epochs:
            self.tuned_discriminator.load_state_dict(self.discriminator.state_dict())
            self.tuned.fill_(True)

    def on_train_epoch_end(self) -> None:
        """Remembers the old generator: weights and running statistics, which are the same on all ranks."""
        super().on_train_epoch_end()
        if self.current_epoch == self.hp.old_epoch:
            self.old_generator.update_parameters(self.generator, copy=True)

    # ------------------------------------------------------------------ images and scores
    def to_network(self, images: Tensor) -> Tensor:
        """Images [B, 3 or C, H, W] in [0, 1] as the networks take them, [B, C, H, W] in [-1, 1]."""
        if self.hp.in_channels == 1 and images.shape[1] == 3:
            images = rgb_to_grayscale(images)
        return images * 2 - 1

    @torch.no_grad()
    def reconstruct(self, images: Tensor) -> Tensor:
        """Reconstructions [B, C, H, W] in [0, 1] of images [B, 3 or C, H, W] in [0, 1]."""
        with eval_mode(self.generator):
            return (self.generator(self.to_network(images)) + 1) / 2

    @property
    def ready_rows(self) -> list[str]:
        """Rows of the table that can be computed by now."""
        return [row for row in self.rows if row != "ognet" or bool(self.tuned)]

    @torch.no_grad()
    def anomaly_scores(
        self, images: Tensor, tuned: torch.nn.Module | None = None
    ) -> dict[str, Tensor]:
        """Scores of every row that is ready; larger = more anomalous.

        Discriminator rows are logits: probabilities would saturate to ties.

        Args:
            images: [B, 3 or C, H, W] in [0, 1].
            tuned: a discriminator to take in the place of that of phase two.

        Returns:
            Row to [B].
        """
        if tuned is None and "ognet" in self.ready_rows:
            tuned = self.tuned_discriminator
        with (
            torch.autocast(self.device.type, enabled=False),
            eval_mode(self.generator, self.discriminator, self.tuned_discriminator),
        ):
            x = self.to_network(images)
            recon = self.generator(x)
            scores = {
                "reconstruction": (recon - x).square().flatten(1).mean(1),
                "input": self.discriminator(x),
                "phase_one": self.discriminator(recon),
            }
            if tuned is not None:
                scores["ognet"] = tuned(recon)
        return scores

    # ------------------------------------------------------------------ evaluation
    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Collects scores of held-out normal images."""
        scores = self.anomaly_scores(batch["image"])
        # Of video the frames are judged, so their scores are what a threshold is for.
        groups = {"group": batch["group"]} if "group" in batch else {}
        self._validation.append({**scores, **groups})

    def on_validation_epoch_end(self) -> None:
        """Calibrates the thresholds so that ``acceptance`` of the held-out normal images are accepted."""
        collected, self._validation = self._validation, []
        if self.trainer.sanity_checking:
            return
        columns = self.gather_columns(collected)
        group = columns.pop("group", None)
        if group is not None:
            places, frames = group.numpy(), int(group.max()) + 1
            columns = {
                row: torch.from_numpy(frame_scores(scores.double().numpy(), places, frames))
                for row, scores in columns.items()
            }
        self.log_dict({f"val/{row}/mean_score": scores.mean() for row, scores in columns.items()})
        for row, scores in columns.items():
            self.set_threshold(row, acceptance_threshold(scores, self.hp.acceptance))

    def on_test_start(self) -> None:
        """Hands the thresholds and, for video, the labels of the frames to the metrics."""
        data = getattr(self.trainer, "datamodule", None)
        for row, metric in self.test_metrics.items():
            metric.threshold = self.row_thresholds[row]
            metric.frame_labels = getattr(data, "frame_labels", None)

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Feeds every row of the table."""
        for row, scores in self.anomaly_scores(batch["image"]).items():
            self.test_metrics[row].update(
                scores, batch["label"], batch["index"], batch.get("group")
            )

    def on_test_epoch_end(self) -> None:
        """Logs ``test/ROW/METRIC`` for every row."""
        for row in self.ready_rows:
            values = self.test_metrics[row].compute()
            self.log_dict({f"test/{row}/{name}": value for name, value in values.items()})

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Any]:
        """A decision for every image: ``normal`` or ``outlier``.

        Returns:
            Columns ``decision`` (text), ``score`` ([B]; a probability in (0, 1), or the reconstruction error) and
            ``threshold`` ([B], of the same kind).

        Raises:
            RuntimeError: if no threshold was calibrated.
        """
        row = self.hp.decision_score
        threshold = self.demand_threshold(row)
        found = self.anomaly_scores(batch["image"])[row]
        decision = ["outlier" if above else "normal" for above in (found > threshold).tolist()]
        if row != "reconstruction":
            # In float32 the probabilities of clear outliers would tie.
            found, threshold = found.double().sigmoid(), threshold.double().sigmoid()
        return {"decision": decision, "score": found, "threshold": threshold.expand(len(found))}

    # ------------------------------------------------------------------ pictures
    @torch.no_grad()
    def image_grid(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Rows of pictures for :class:`callbacks.ImageGrid`."""
        x = self.to_network(batch["image"])
        noise = torch.randn(x.shape).to(x) * self.hp.noise_std
        rows = {
            "input": x,
            "noisy input": add_input_noise(x, noise),
            "reconstruction": self.generator(x),
        }
        if self.old_generator.updates:
            old = self.old_generator(x)
            rows["old reconstruction"] = old
            rows["pseudo anomaly"] = self.generator((old + old.roll(1, 0)) / 2)
        return {title: (images + 1) / 2 for title, images in rows.items()}

    # ------------------------------------------------------------------ checks
    def setup(self, stage: str) -> None:
        """Checks the size of the images.

        Raises:
            ValueError: if the data have images of another size.
        """
        super().setup(stage)
        self.demand_as_in_data(image_size="image_size")
