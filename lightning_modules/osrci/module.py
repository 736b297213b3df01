"""OSRCI: open-set recognition with counterfactual images, all phases in one module.

Paper: Neal, Olson, Fern, Wong, Li, "Open Set Learning with Counterfactual Images", ECCV 2018. Where paper and released
code differ, the option that produced the published numbers is the default, except for the latent search, whose
default is the paper's objective (per sample, hence independent of batch size and number of processes).

Order of things:

1. ``joint`` phase: discriminator, generator, auto-encoder and classifier are stepped in this order on every batch.
2. At its end the running statistics of encoder and generator are re-estimated, and OpenMax is fitted.
3. Before each round of the ``kplusone`` phase, training images are moved in latent space until the classifier rejects
   them (:meth:`OSRCIModule.synthesize`, driven by :class:`callbacks.CounterfactualSynthesis`).
4. ``kplusone`` phase: a copy of the classifier learns them as the class "unknown", whose logit is the constant 0.
"""

import hashlib
from collections.abc import Iterable
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.nn import SyncBatchNorm
from torch.optim import Adam, Optimizer
from tqdm.auto import tqdm

from lightning_modules.adversarial import AdversarialModule
from lightning_modules.arguments import demand_at_least, demand_choice
from lightning_modules.metrics.open_set import OpenSetMetrics, acceptance_threshold, macro_f1
from lightning_modules.named_classes import NamedClasses
from lightning_modules.nn.modes import eval_mode
from lightning_modules.osrci.counterfactual import (
    generate_open_set,
    recalibrate_batch_norm,
)
from lightning_modules.osrci.losses import (
    discriminator_loss,
    generator_adversarial_loss,
    gradient_penalty,
    kplusone_loss,
    normalize_latent,
    one_vs_rest_softplus_loss,
    open_set_score,
    reconstruction_loss,
    reconstruction_score,
)
from lightning_modules.osrci.networks import Classifier32, Discriminator32, Encoder32, Generator32
from lightning_modules.osrci.openmax import OpenMax
from lightning_modules.osrci.synthesis import (
    OpenSetPool,
    interpolated_open_set,
    to_uint8,
)
from lightning_modules.paper import ImageBank
from lightning_modules.randomness import global_seed, keyed_generator, mix
from lightning_modules.table_rows import TableRows


class Rounds(NamedTuple):
    """How the open set and the K+1 classifier grow together."""

    rounds: int
    images_per_round: int
    epochs_per_round: int


PRESETS = {"paper": Rounds(10, 640, 1), "reference": Rounds(1, 3200, 3)}
"""``paper``: the submission's schedule, 6,400 images. ``reference``: the last commit of the released code."""

ROWS = {
    "msp": "softmax threshold",
    "mls": "maximum logit",
    "energy": "energy",
    "openmax": "OpenMax (released code)",
    "openmax_bendale": "OpenMax (Bendale & Boult)",
    "gopenmax": "G-OpenMax (released code)",
    "reconstruction": "auto-encoder error",
    "kplusone": "OSRCI, P(unknown)",
    "margin": "OSRCI, margin",
}
"""Rows of the open-set table in the order in which they are printed."""


class OSRCIModule(TableRows, NamedClasses, AdversarialModule):
    """Encoder, generator, discriminator, classifier and the K+1 classifiers, trained phase by phase.

    Args:
        num_classes: K, the number of known classes; must be the data's.
        latent_size: L, channels of the latent code.
        scale: s in {1, 2, 4, 8}; a code has L*s*s entries.
        in_channels: channels of an image.
        width: channels of the first convolution; all others scale with it (64 in the paper).
        dropout: probability of the channel dropout in encoder, discriminator and classifiers.
        norm: normalisation layer; ``group`` keeps samples independent of each other.
        classifier_pool: ``flatten`` as in the paper, ``avg`` for the later "classifier32".
        normalize: how a code is cut into unit vectors; ``channel_group`` is the released code's.
        lr: learning rate of the joint phase.
        lr_kplusone: learning rate of the K+1 phase.
        betas: of every Adam.
        discriminator_real_weight: weight of the real term.
        discriminator_fake_weight: weight of the fake term.
        generator_weight: weight of the adversarial term.
        reconstruction_weight: weight of the L1 term.
        lambda_gp: weight of the gradient penalty.
        fake_source: what the discriminator sees as fake: decoded ``noise`` (released code) or ``reconstruction``
            (paper, eq. for L_D).
        objective: ``softplus`` (released code) or ``wasserstein`` (paper) discriminator terms.
        gp_norm: gradient norm over the ``channel`` axis (released code) or per ``sample`` (paper).
        gp_outputs: penalise ``all`` outputs (released code) or the ``first`` (paper).
        gather_minibatch_feature: average the discriminator's batch feature over all processes.
        joint_epochs: epochs of the joint phase.
        preset: rounds of synthesis and fine-tuning, see :data:`PRESETS`.
        rounds: overrides the preset's number of rounds.
        images_per_round: overrides the preset's images generated before each round.
        epochs_per_round: overrides the preset's fine-tuning epochs after each synthesis.
        variant: latent search of the ``paper`` (per sample) or of the released code (``reference``).
        search_steps: iterations of the latent search.
        search_speed: step size of the latent search.
        distance_weight: weight of the latent distance.
        search_batch_size: images searched together; also the unit in which synthesis is shared among processes.
        search_mode: networks in ``eval`` or ``train`` mode during the search; None takes the variant's.
        project: project the code back to unit vectors after every step (paper variant).
        color_weight: weight of the colour term of the earliest released version.
        stop_confidence: stop a sample when P(target) exceeds this, None to make all steps.
        recalibrate_bn: re-estimate batch-norm statistics of encoder and generator before the search.
        gopenmax: also train G-OpenMax (a second K+1 classifier on interpolated images).
        gopenmax_tries: batches of candidates drawn per kept batch before giving up.
        openmax_tail: distances per class that the Weibull tail is fitted to.
        openmax_alpha: classes revised by the Bendale & Boult form.
        decision_score: the score ``predict`` decides with.
        acceptance: share of held-out known images that the decision accepts.

    Raises:
        ValueError: for an impossible combination of arguments.
    """

    bar_terms = ("reconstruction", "classification", "closed", "open")
    kind_of_classes = "known classes"
    gradient_penalised = ("discriminator",)
    row_titles = ROWS
    pool_titles: ClassVar = {"open_set": "counterfactual", "gopenmax_set": "G-OpenMax"}

    def __init__(
        self,
        num_classes: int = 6,
        latent_size: int = 64,
        scale: int = 4,
        in_channels: int = 3,
        width: int = 64,
        dropout: float = 0.2,
        norm: Literal["batch", "group", "none"] = "batch",
        classifier_pool: Literal["flatten", "avg"] = "flatten",
        normalize: Literal["channel_group", "position"] = "channel_group",
        lr: float = 1e-4,
        lr_kplusone: float = 1e-5,
        betas: tuple[float, float] = (0.5, 0.999),
        discriminator_real_weight: float = 0.01,
        discriminator_fake_weight: float = 1.0,
        generator_weight: float = 0.01,
        reconstruction_weight: float = 1.0,
        lambda_gp: float = 10.0,
        fake_source: Literal["noise", "reconstruction"] = "noise",
        objective: Literal["softplus", "wasserstein"] = "softplus",
        gp_norm: Literal["channel", "sample"] = "channel",
        gp_outputs: Literal["all", "first"] = "all",
        gather_minibatch_feature: bool = False,
        joint_epochs: int = 30,
        preset: Literal["paper", "reference"] = "paper",
        rounds: int | None = None,
        images_per_round: int | None = None,
        epochs_per_round: int | None = None,
        variant: Literal["paper", "reference"] = "paper",
        search_steps: int = 100,
        search_speed: float = 0.1,
        distance_weight: float = 1.0,
        search_batch_size: int = 64,
        search_mode: Literal["eval", "train"] | None = None,
        project: bool = True,
        color_weight: float = 0.0,
        stop_confidence: float | None = None,
        recalibrate_bn: bool = True,
        gopenmax: bool = True,
        gopenmax_tries: int = 20,
        openmax_tail: int = 20,
        openmax_alpha: int = 10,
        decision_score: str = "margin",
        acceptance: float = 0.95,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        base = PRESETS[preset]
        self.schedule = Rounds(
            base.rounds if rounds is None else rounds,
            base.images_per_round if images_per_round is None else images_per_round,
            base.epochs_per_round if epochs_per_round is None else epochs_per_round,
        )
        self._check_arguments()

        trunk: dict[str, Any] = {
            "in_channels": in_channels,
            "width": width,
            "dropout": dropout,
            "norm": norm,
        }
        heads: dict[str, Any] = {"num_classes": num_classes, **trunk}
        self.encoder = Encoder32(latent_size, scales=(scale,), normalize=normalize, **trunk)
        self.generator = Generator32(
            latent_size, in_channels=in_channels, scales=(scale,), width=width, norm=norm
        )
        self.discriminator = Discriminator32(gather_minibatch=gather_minibatch_feature, **heads)
        self.classifier = Classifier32(pool=classifier_pool, **heads)
        self.kplusone_classifier = Classifier32(pool=classifier_pool, **heads)
        self.openmax = OpenMax(num_classes, tail_size=openmax_tail)
        image = (in_channels, 32, 32)
        self.open_set = OpenSetPool(image, ("confidence", "distance", "steps"))
        if gopenmax:
            self.gopenmax_classifier = Classifier32(pool=classifier_pool, **heads)
            self.gopenmax_openmax = OpenMax(num_classes, tail_size=openmax_tail)
            self.gopenmax_set = OpenSetPool(image, ("confidence",))
        self.add_rows([row for row in ROWS if gopenmax or row != "gopenmax"])
        self.class_names = [str(k) for k in range(num_classes)]
        self.test_metrics: Any = torch.nn.ModuleDict({row: OpenSetMetrics() for row in self.rows})
        self._validation: list[dict[str, Tensor]] = []

    def _check_arguments(self) -> None:
        hp = self.hp
        lengths = {"joint_epochs": hp.joint_epochs, **self.schedule._asdict()}
        demand_at_least(1, option="--model.", **lengths)
        if not 0 < hp.acceptance < 1:
            raise ValueError(
                f"acceptance is a share of the known images in (0, 1), not {hp.acceptance}"
            )
        rows = [row for row in ROWS if hp.gopenmax or row != "gopenmax"]
        demand_choice(rows, option="--model.", decision_score=hp.decision_score)
        if hp.variant == "reference" and hp.stop_confidence is not None:
            raise ValueError(
                "stop_confidence belongs to variant='paper'; the released code makes every step"
            )

    # ------------------------------------------------------------------ schedule
    @property
    def total_epochs(self) -> int:
        """Epochs of all phases together."""
        return self.hp.joint_epochs + self.schedule.rounds * self.schedule.epochs_per_round

    def phase_at(self, epoch: int) -> Literal["joint", "kplusone"]:
        """The phase an epoch belongs to."""
        return "joint" if epoch < self.hp.joint_epochs else "kplusone"

    @property
    def phase(self) -> Literal["joint", "kplusone"]:
        """The current phase."""
        return self.phase_at(self.current_epoch)

    def build_optimizers(self) -> dict[str, Optimizer]:
        """One Adam per network (released code)."""
        rates = {
            "encoder": self.hp.lr,
            "generator": self.hp.lr,
            "discriminator": self.hp.lr,
            "classifier": self.hp.lr,
            "kplusone_classifier": self.hp.lr_kplusone,
        }
        if self.hp.gopenmax:
            rates["gopenmax_classifier"] = self.hp.lr_kplusone
        return {
            name: Adam(getattr(self, name).parameters(), lr=lr, betas=tuple(self.hp.betas))
            for name, lr in rates.items()
        }

    @property
    def search_mode(self) -> Literal["eval", "train"]:
        """The networks' mode during the search."""
        return self.hp.search_mode or ("eval" if self.hp.variant == "paper" else "train")

    def on_fit_start(self) -> None:
        """Refuses what would only fail at the phase boundary.

        Raises:
            MisconfigurationException: for a search in train mode through SyncBatchNorm, whose ranks would
                wait for each other's chunks for ever.
        """
        super().on_fit_start()
        searched = (self.encoder, self.generator, self.classifier)
        synchronised = any(
            isinstance(part, SyncBatchNorm) for network in searched for part in network.modules()
        )
        if synchronised and self.search_mode == "train":
            raise MisconfigurationException(
                "ranks search different images, which SyncBatchNorm in train mode cannot; "
                "use --model.search_mode eval, or leave out configs/trainer/sync_batchnorm.yaml"
            )

    # ------------------------------------------------------------------ training
    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """One batch of the current phase."""
        if self.phase == "joint":
            self.joint_step(batch["image"], batch["label"])
        else:
            self.kplusone_step(batch["image"], batch["label"])

    def joint_step(self, images: Tensor, labels: Tensor) -> None:
        """The four updates of the joint phase (released code), on images [B, C, 32, 32] and labels [B]."""
        hp = self.hp
        gaussian = self.draw("noise", "normal", len(images), hp.latent_size * hp.scale**2)
        alpha = self.draw("alpha", "uniform", len(images))

        with self.update("discriminator") as minimize:
            with torch.no_grad():
                if hp.fake_source == "noise":
                    fake = self.generator(normalize_latent(gaussian, hp.scale, hp.normalize))
                else:
                    fake = self.generator(self.encoder(images))
            terms = discriminator_loss(
                self.discriminator(images),
                self.discriminator(fake),
                real_weight=hp.discriminator_real_weight,
                fake_weight=hp.discriminator_fake_weight,
                adversarial=hp.objective,
            )
            penalty = gradient_penalty(
                self.discriminator,
                images,
                fake,
                alpha=alpha,
                weight=hp.lambda_gp,
                norm=hp.gp_norm,
                outputs=hp.gp_outputs,
            )
            minimize(
                loss_fake=terms["loss_fake"],
                loss_real=terms["loss_real"],
                gradient_penalty=penalty,
            )

        with self.update("generator") as minimize:
            with torch.no_grad():
                code = self.encoder(images)
            logits = self.discriminator(self.generator(code))
            minimize(adversarial=generator_adversarial_loss(logits, weight=hp.generator_weight))

        with self.update("encoder", "generator") as minimize:
            decoded = self.generator(self.encoder(images))
            minimize(
                reconstruction=reconstruction_loss(images, decoded, weight=hp.reconstruction_weight)
            )

        with self.update("classifier") as minimize:
            minimize(classification=one_vs_rest_softplus_loss(self.classifier(images), labels))

    def kplusone_step(self, images: Tensor, labels: Tensor) -> None:
        """One update of each K+1 classifier on known images and as many generated ones."""
        if not len(self.open_set):
            raise RuntimeError(
                "the K+1 phase has no counterfactual images; add callbacks.CounterfactualSynthesis to trainer.callbacks"
            )
        uniform = self.draw("open_set", "uniform", len(images))
        with self.update("kplusone_classifier") as minimize:
            known = self.kplusone_classifier(images)
            unknown = self.kplusone_classifier(self.open_set.rows(uniform))
            loss = kplusone_loss(known, labels, unknown)
            minimize(closed=loss["closed"], open=loss["open"])
        if self.hp.gopenmax:
            with self.update("gopenmax_classifier") as minimize:
                known = self.gopenmax_classifier(images)
                unknown = self.gopenmax_classifier(self.gopenmax_set.rows(uniform))
                loss = kplusone_loss(known, labels, unknown)
                minimize(gopenmax_closed=loss["closed"], gopenmax_open=loss["open"])

    def on_train_epoch_start(self) -> None:
        """Starts the K+1 classifiers from the classifier, weights and running statistics."""
        if self.current_epoch == self.hp.joint_epochs:
            self.kplusone_classifier.load_state_dict(self.classifier.state_dict())
            if self.hp.gopenmax:
                self.gopenmax_classifier.load_state_dict(self.classifier.state_dict())

    def on_train_epoch_end(self) -> None:
        """At the end of a phase, fits what the next phase or the test needs."""
        super().on_train_epoch_end()
        finished = self.current_epoch + 1
        if finished == self.hp.joint_epochs:
            bank = self.training_bank()
            if self.hp.recalibrate_bn:
                self._recalibrate(bank)
            self.openmax.fit(*self._training_logits(self.classifier, bank))
        elif finished == self.total_epochs:
            self._fit_gopenmax()

    def on_validation_start(self) -> None:
        """Fits what the last validation calibrates a threshold for."""
        fitting = self.trainer.state.fn == "fit" and not self.trainer.sanity_checking
        if fitting and self.current_epoch + 1 == self.total_epochs:
            self._fit_gopenmax()

    def _fit_gopenmax(self) -> None:
        if self.hp.gopenmax and not self.gopenmax_openmax.fitted:
            logits, labels = self._training_logits(self.gopenmax_classifier, self.training_bank())
            self.gopenmax_openmax.fit(logits, labels)

    def _batch(self, bank: ImageBank, indices: Tensor) -> dict[str, Any]:
        dtype: Any = self.dtype
        return bank.batch(indices, self.device, dtype)

    def _chunks(self, bank: ImageBank, purpose: str) -> Iterable[Tensor]:
        """Indices of the whole set, with a progress bar."""
        trainer: Any = self.trainer
        silent = not trainer.is_global_zero or trainer.progress_bar_callback is None
        chunks = torch.arange(len(bank)).split(256)
        return tqdm(chunks, desc=purpose, unit="batch", leave=False, disable=silent)

    def _recalibrate(self, bank: ImageBank) -> None:
        # Every rank makes the whole pass: the statistics are then bit-identical for any number of ranks, for
        # a small part of the cost of the search that follows.
        chunks = self._chunks(bank, "batch-norm statistics")
        images = (self._batch(bank, chunk)["image"] for chunk in chunks)
        before = self._reconstruction_error(bank)
        recalibrate_batch_norm(
            lambda batch: self.generator(self.encoder(batch)),
            (self.encoder, self.generator),
            images,
        )
        after = self._reconstruction_error(bank)
        self.log_dict(
            {
                "synthesis/reconstruction/before_recalibration": before,
                "synthesis/reconstruction/after_recalibration": after,
            }
        )

    @torch.no_grad()
    def _reconstruction_error(self, bank: ImageBank) -> Tensor:
        images = self._batch(bank, torch.arange(min(len(bank), 256)))["image"]
        with eval_mode(self.encoder, self.generator):
            return reconstruction_loss(images, self.generator(self.encoder(images)))

    @torch.no_grad()
    def _training_logits(self, classifier: Classifier32, bank: ImageBank) -> tuple[Tensor, Tensor]:
        """Logits [N, K] and labels [N] of the training set, the same on every rank."""
        logits, labels = [], []
        with eval_mode(classifier):
            for chunk in self._chunks(bank, "logits for OpenMax"):
                batch = self._batch(bank, chunk)
                logits.append(classifier(batch["image"]))
                labels.append(batch["label"])
        return torch.cat(logits), torch.cat(labels)

    # ------------------------------------------------------------------ synthesis
    def synthesis_request(self, epoch: int) -> range | None:
        """Global indices of the samples that must exist before ``epoch`` and do not yet, None for none.

        Part of the protocol of :class:`callbacks.CounterfactualSynthesis`.
        """
        if self.phase_at(epoch) == "joint":
            return None
        current_round = (epoch - self.hp.joint_epochs) // self.schedule.epochs_per_round
        wanted = (current_round + 1) * self.schedule.images_per_round
        return range(len(self.open_set), wanted) if len(self.open_set) < wanted else None

    def synthesis_fingerprint(self) -> str:
        """Changes with everything a generated sample depends on."""
        digest = hashlib.sha256(repr((global_seed(), sorted(self.hparams.items()))).encode())
        for network in (self.encoder, self.generator, self.classifier):
            for tensor in network.state_dict().values():
                digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        return digest.hexdigest()

    def synthesis_chunks(self, request: range) -> list[range]:
        """The request cut into what is searched together."""
        size = self.hp.search_batch_size
        return [
            range(i, min(i + size, request.stop)) for i in range(request.start, request.stop, size)
        ]

    def synthesize(self, bank: ImageBank, samples: range) -> dict[str, dict[str, Tensor]]:
        """Generates the samples with these global indices, as a function of the seed and the indices alone.

        Args:
            bank: training images of the known classes.
            samples: consecutive global indices, at most ``search_batch_size``.

        Returns:
            For each pool what :meth:`OpenSetPool.append` takes, on the CPU.
        """
        pools = {"open_set": self._counterfactuals(bank, samples)}
        if self.hp.gopenmax:
            pools["gopenmax_set"] = self._interpolations(bank, samples)
        return {
            pool: {name: values.cpu() for name, values in content.items()}
            for pool, content in pools.items()
        }

    def store_synthesis(self, pools: dict[str, dict[str, Tensor]]) -> None:
        """Appends generated samples to their pools and logs what the search achieved."""
        for pool, content in pools.items():
            getattr(self, pool).append(content)
        result = pools["open_set"]
        self.log_dict(
            {
                "synthesis/counterfactual/confidence": result["confidence"].mean(),
                "synthesis/counterfactual/distance": result["distance"].mean(),
                "synthesis/counterfactual/steps": result["steps"].float().mean(),
            }
        )

    def _counterfactuals(self, bank: ImageBank, samples: range) -> dict[str, Tensor]:
        draws = [keyed_generator("start", index) for index in samples]
        start = torch.cat([torch.randint(len(bank), (1,), generator=g) for g in draws])
        images = self._batch(bank, start)["image"]
        found = self.search(images, self.hp.num_classes, key=samples.start)
        return {**found, "images": to_uint8(found["images"]), "start": start}

    def search(self, images: Tensor, target: int | Tensor, key: int = 0) -> dict[str, Tensor]:
        """Moves images in latent space until the classifier says ``target``.

        Args:
            images: [B, C, 32, 32] in [0, 1].
            target: class in [0, K], K being "none of the above", or one such class per image [B].
            key: keys the dropout of a search in train mode.

        Returns:
            On the CPU: ``images`` [B, C, 32, 32] in [0, 1] and, [B] each, ``confidence`` (P(target)), squared
            latent ``distance`` and number of ``steps``.
        """
        hp = self.hp
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(mix(global_seed(), "search", key))
            found = generate_open_set(
                self.encoder,
                self.generator,
                self.classifier,
                [images],
                len(images),
                bn_mode=self.search_mode,
                target=target,
                steps=hp.search_steps,
                speed=hp.search_speed,
                distance_weight=hp.distance_weight,
                scale=hp.scale,
                variant=hp.variant,
                project=hp.project,
                color_weight=hp.color_weight,
                stop_confidence=hp.stop_confidence,
                normalize=hp.normalize,
            )
        return dict(zip(("images", "confidence", "distance", "steps"), found.tensors, strict=True))

    def _interpolations(self, bank: ImageBank, samples: range) -> dict[str, Tensor]:
        generator = keyed_generator("interpolation", samples.start)

        def draw(count: int) -> tuple[Tensor, Tensor, Tensor]:
            pairs = torch.randint(len(bank), (2, count), generator=generator)
            theta = torch.rand(count, generator=generator, dtype=torch.double)
            return pairs[0], pairs[1], theta

        made = interpolated_open_set(
            lambda indices: self.encoder(self._batch(bank, indices)["image"]),
            (self.encoder, self.generator, self.classifier),
            draw,
            len(samples),
            self.hp.gopenmax_tries,
        )
        return {**made, "images": to_uint8(made["images"])}

    # ------------------------------------------------------------------ evaluation
    @property
    def ready_rows(self) -> list[str]:
        """Rows of the table whose parts are fitted."""
        waiting = set()
        if not self.openmax.fitted:
            waiting |= {"openmax", "openmax_bendale"}
        if self.hp.gopenmax and not self.gopenmax_openmax.fitted:
            waiting |= {"gopenmax"}
        if not len(self.open_set):
            waiting |= {"kplusone", "margin"}
        return [row for row in self.rows if row not in waiting]

    @torch.no_grad()
    def open_set_scores(self, images: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Scores and closed-set predictions of every row of the table that is ready.

        Args:
            images: [B, C, 32, 32] in [0, 1].

        Returns:
            Two dicts from row to [B]: the score (larger is more unknown) and the predicted known class.
        """
        # In full precision: bfloat16 logits would tie by the dozen and blunt every ranking metric.
        with torch.autocast(self.device.type, enabled=False):
            logits = self.classifier(images)
            decoded = self.generator(self.encoder(images))
            scores = {kind: open_set_score(logits, kind=kind) for kind in ("msp", "mls", "energy")}
            ready = self.ready_rows
            if "openmax" in ready:
                scores["openmax"] = self.openmax.score(logits)
                scores["openmax_bendale"] = self.openmax.score(
                    logits, variant="bendale", alpha=self.hp.openmax_alpha
                )
            scores["reconstruction"] = reconstruction_score(images, decoded)
            predictions = {row: logits.argmax(1) for row in scores}
            if "margin" in ready:
                plus = self.kplusone_classifier(images)
                for kind in ("kplusone", "margin"):
                    scores[kind] = open_set_score(plus, kind=kind)
                    predictions[kind] = plus.argmax(1)
            if "gopenmax" in ready:
                generative = self.gopenmax_classifier(images)
                scores["gopenmax"] = self.gopenmax_openmax.score(generative)
                predictions["gopenmax"] = generative.argmax(1)
        return scores, predictions

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Collects scores of held-out known images."""
        scores, predictions = self.open_set_scores(batch["image"])
        classifiers = {"classifier": "msp", "kplusone_classifier": "margin"}
        correct = {
            name: predictions[row] == batch["label"]
            for name, row in classifiers.items()
            if row in predictions
        }
        self._validation.append({**scores, **correct})

    def on_validation_epoch_end(self) -> None:
        """Calibrates the thresholds so that ``acceptance`` of the held-out known images are accepted."""
        collected, self._validation = self._validation, []
        if self.trainer.sanity_checking:
            return
        columns = self.gather_columns(collected)
        accuracies = {
            f"val/{name}/closed_accuracy": columns[name].float().mean()
            for name in ("classifier", "kplusone_classifier")
            if name in columns
        }
        self.log_dict(accuracies, prog_bar=True)
        for row in self.rows:
            if row in columns:
                self.set_threshold(row, acceptance_threshold(columns[row], self.hp.acceptance))
        before = accuracies["val/classifier/closed_accuracy"]
        after = accuracies.get("val/kplusone_classifier/closed_accuracy", before)
        if self.current_epoch + 1 == self.total_epochs and after < before - 0.01:
            rank_zero_warn(
                f"fine-tuning against counterfactuals lowered the closed-set accuracy on held-out knowns from "
                f"{before:.3f} to {after:.3f}"
            )

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Feeds every row of the table."""
        scores, predictions = self.open_set_scores(batch["image"])
        for row in scores:
            self.test_metrics[row].update(
                scores[row], batch["label"], predictions[row], batch["index"]
            )

    def on_test_epoch_end(self) -> None:
        """Logs ``test/ROW/METRIC`` for every row, with the macro F1 at its calibrated threshold."""
        for row in self.ready_rows:
            values = self.test_metrics[row].compute()
            threshold = self.row_thresholds[row]
            if threshold is not None:
                scores, labels, predictions = self.test_metrics[row].samples
                values["macro_f1"] = macro_f1(
                    scores, labels, predictions, threshold, self.hp.num_classes
                )
            self.log_dict({f"test/{row}/{name}": value for name, value in values.items()})

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Any]:
        """A decision for every image: the name of a known class or ``unknown``.

        Returns:
            Columns ``decision`` (text), ``label`` ([B], -1 for unknown), ``score`` and ``threshold`` ([B]).

        Raises:
            RuntimeError: if no threshold was calibrated.
        """
        row = self.hp.decision_score
        threshold = self.demand_threshold(row)
        scores, predictions = self.open_set_scores(batch["image"])
        known = scores[row] <= threshold
        label = torch.where(known, predictions[row], -1)
        names = [self.class_names[k] if k >= 0 else "unknown" for k in label.tolist()]
        columns = {"decision": names, "label": label, "score": scores[row]}
        columns["threshold"] = threshold.expand(len(label))
        return columns

    # ------------------------------------------------------------------ pictures
    @torch.no_grad()
    def image_grid(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Rows of pictures for :class:`callbacks.ImageGrid`."""
        images, hp = batch["image"], self.hp
        gaussian = torch.randn(
            len(images),
            hp.latent_size * hp.scale**2,
            generator=keyed_generator("image_grid", device=self.device),
            device=self.device,
        ).to(images.dtype)
        return {
            "input": images,
            "decoded": self.generator(self.encoder(images)),
            "from noise": self.generator(normalize_latent(gaussian, hp.scale, hp.normalize)),
        }

    def counterfactual_columns(self, images: Tensor) -> dict[str, Tensor]:
        """Columns of the counterfactual grid: the original, then one image for each target class and "unknown".

        Args:
            images: [B, C, 32, 32] in [0, 1].

        Returns:
            K+2 columns [B, C, 32, 32] by title.
        """
        titles = [*(f"as {name}" for name in self.class_names), "unknown"]
        targets = torch.arange(len(titles), device=self.device).repeat_interleave(len(images))
        result = self.search(images.repeat(len(titles), 1, 1, 1), targets)
        return {
            "original": images,
            **dict(zip(titles, result["images"].split(len(images)), strict=True)),
        }

    def generated_kinds(self) -> dict[str, int | None]:
        """What :meth:`generate` makes: counterfactual images, decoded noise, and G-OpenMax's mixtures."""
        kinds = {"counterfactuals": len(self.open_set), "samples": None}
        if self.hp.gopenmax:
            kinds["gopenmax"] = len(self.gopenmax_set)
        return kinds

    @torch.no_grad()
    def generate(self, kind: str, indices: Tensor) -> Tensor:
        """Images [B, C, 32, 32] in [0, 1] with these numbers [B], see :class:`ImageGenerator`."""
        if kind != "samples":
            pool = self.open_set if kind == "counterfactuals" else self.gopenmax_set
            return pool.images[indices.to(self.device)].float() / 255
        hp, entries = self.hp, self.hp.latent_size * self.hp.scale**2
        gaussian = torch.stack(
            [torch.randn(entries, generator=keyed_generator(kind, i)) for i in indices.tolist()]
        )
        with eval_mode(self.generator):
            gaussian = gaussian.to(next(self.generator.parameters()))
            return self.generator(normalize_latent(gaussian, hp.scale, hp.normalize))
