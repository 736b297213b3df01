"""StarGAN: one generator for translations between many domains, on one or several data sets.

Paper: Choi, Choi, Kim, Ha, Kim, Choo, "StarGAN: Unified Generative Adversarial Networks for Multi-Domain Image-to-Image
Translation", CVPR 2018. Where paper and released code differ, the default follows the released code, but for the decay
of the learning rate, which that code announces and does not carry out.

One step, for every data set in turn:

1. Targets are the labels of the batch in another order.
2. The critic: Wasserstein terms with a gradient penalty, and the labels of the real images.
3. In every ``n_critic``-th batch the generator: fool the critic, be classified as the target, lead back to the source.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor
from torch.optim import Adam, Optimizer

from lightning_modules.adversarial import AdversarialModule
from lightning_modules.arguments import demand_at_least, demand_choice
from lightning_modules.attributes import HAIR_COLOURS, LabelKind, exclusive_indices
from lightning_modules.metrics.translation import gan_train_accuracy
from lightning_modules.nn.gradient_penalty import PatchReduction, slope_norms
from lightning_modules.nn.pixels import mean_difference
from lightning_modules.randomness import keyed_generator
from lightning_modules.stargan.labels import (
    class_targets,
    joint_label,
    name_sets,
    one_hot,
    parse_edits,
    permute_targets,
    single_attribute_targets,
)
from lightning_modules.stargan.losses import (
    Classification,
    Reduction,
    Schedule,
    decayed_lr,
    discriminator_terms,
    generator_terms,
    joint_classification_loss,
    weighted,
)
from lightning_modules.stargan.networks import StarGANDiscriminator, StarGANGenerator

PenaltyUpdate = Literal["joint", "separate"]

Edit = Callable[[Tensor], Tensor]
"""Labels [B, c] to the wanted ones."""


class Task(NamedTuple):
    """Images of one data set and what they are to be translated to.

    Attributes:
        images: [B, C, H, W] in [-1, 1].
        source: their labels as the generator takes them; None if they are not known.
        target: the wanted labels as the generator takes them.
        labels: their labels as the classification loss takes them; None if they are not known.
        target_labels: the wanted labels as that loss takes them.
        place: number of the data set.
        prefix: of the names under which the terms are logged.
    """

    images: Tensor
    source: Tensor | None
    target: Tensor
    labels: Tensor | None
    target_labels: Tensor
    place: int = 0
    prefix: str = ""


class StarGAN(AdversarialModule):
    """One generator and one critic that also classifies.

    A training batch is ``image`` [B, C, H, W] in [0, 1] and ``attributes`` [B, c], zeros and ones (one-hot for
    ``single_label``); with several data sets a dict of such batches, ``"0"``, ``"1"``, ..., each of which has its own
    updates (paper, sec. 3.3). An evaluation batch is of one data set, that of its dataloader.

    Attributes of an exclusive group are meant to be one of them at most: an edit that sets one clears the others.

    Args:
        attributes: names in the order of the columns of the labels; for several data sets a list of such lists.
        label_kind: ``multi_label`` for attributes that are independent of each other but for exclusive groups,
            ``single_label`` for classes; for several data sets a list.
        exclusive: groups of names of which one at most is true; None: the hair colours of CelebA.
        image_size: side of the images; must be the data's.
        in_channels: channels of the images.
        ngf: width of the generator (64 in the paper).
        n_blocks: its residual blocks (6 in the paper).
        ndf: width of the critic (64 in the paper).
        n_layers: its strided convolutions (6 in the paper).
        lambda_cls: weight of the classification (1 in the paper).
        lambda_rec: weight of the reconstruction (10 in the paper).
        lambda_gp: weight of the gradient penalty (10 in the paper).
        cls_reduction: over the attributes; ``mean`` keeps the classification from growing with their number.
        gp_update: the penalty in the critic's step (``joint``, released code) or in a second step of its own after it
            (``separate``, the code of the paper's time); there Adam skips what the penalty does not reach.
        patch_reduction: the penalty is on the slope of the sum of the patch scores (released code) or of their mean.
        n_critic: the generator is updated in every n-th batch (5 in the paper).
        lr_g: learning rate of the generator.
        lr_d: learning rate of the critic.
        betas: of both Adams.
        total_steps: batches in all.
        decay_steps: how many of them, the last ones, the decay of the learning rates takes.
        lr_schedule: ``linear`` to zero (paper), or what the released code does, ``reference``: hardly anything.
        steps_per_epoch: batches of an epoch, whatever the size of the data; a validation comes after each.
        edits: what ``predict`` changes, such as ``+Smiling,-Young``.

    Raises:
        ValueError: for an impossible argument.
    """

    bar_terms: tuple[str, ...] = ("d_loss", "g_rec", "d_accuracy")
    gradient_penalised = ("discriminator",)

    def __init__(
        self,
        attributes: list[str] | list[list[str]],
        label_kind: LabelKind | list[LabelKind] = "multi_label",
        exclusive: list[list[str]] | None = None,
        image_size: int = 128,
        in_channels: int = 3,
        ngf: int = 64,
        n_blocks: int = 6,
        ndf: int = 64,
        n_layers: int = 6,
        lambda_cls: float = 1.0,
        lambda_rec: float = 10.0,
        lambda_gp: float = 10.0,
        cls_reduction: Reduction = "sum",
        gp_update: PenaltyUpdate = "joint",
        patch_reduction: PatchReduction = "sum",
        n_critic: int = 5,
        lr_g: float = 1e-4,
        lr_d: float = 1e-4,
        betas: tuple[float, float] = (0.5, 0.999),
        total_steps: int = 200_000,
        decay_steps: int = 100_000,
        lr_schedule: Schedule = "linear",
        steps_per_epoch: int = 1000,
        edits: str = "",
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.names = [list(names) for names in name_sets(attributes)]
        self.kinds: list[LabelKind] = (
            list(label_kind) if isinstance(label_kind, list) else [label_kind] * len(self.names)
        )
        self._check_arguments()
        self.dims = [len(names) for names in self.names]
        self.weights = {"cls": lambda_cls, "rec": lambda_rec, "gp": lambda_gp}
        self._edit: tuple[int, Edit] | None = self._parse(edits) if edits else None
        self.generator = StarGANGenerator(ngf, self.label_width, n_blocks, in_channels)
        self.discriminator = self.build_discriminator()
        self._found: list[list[dict[str, Tensor]]] = [[] for _ in self.names]

    def _check_arguments(self) -> None:
        hp = self.hp
        if not self.names or not all(self.names):
            raise ValueError(
                f"attributes={hp.attributes} must name at least one attribute of every data set (--model.attributes)"
            )
        if len(self.kinds) != len(self.names):
            raise ValueError(
                f"label_kind={hp.label_kind} must be one for each of the {len(self.names)} data sets "
                "(--model.label_kind)"
            )
        for place, names in enumerate(self.names):
            exclusive_indices(names, self.exclusive(place))
        lengths = {name: hp[name] for name in ("n_critic", "total_steps", "steps_per_epoch")}
        demand_at_least(1, option="--model.", **lengths)
        if hp.total_steps % hp.steps_per_epoch:
            raise ValueError(
                f"total_steps={hp.total_steps} is no multiple of steps_per_epoch={hp.steps_per_epoch}; set both "
                "(--model.total_steps, --model.steps_per_epoch)"
            )
        if hp.n_critic > hp.total_steps:
            raise ValueError(
                f"n_critic={hp.n_critic} exceeds total_steps={hp.total_steps}: the generator would never be updated"
            )
        weights = {name: hp[name] for name in ("lambda_cls", "lambda_rec", "lambda_gp")}
        demand_at_least(0, option="--model.", **weights)
        demand_choice(PenaltyUpdate, option="--model.", gp_update=hp.gp_update)
        demand_choice(PatchReduction, option="--model.", patch_reduction=hp.patch_reduction)
        demand_choice(Reduction, option="--model.", cls_reduction=hp.cls_reduction)
        decayed_lr(0, 1.0, hp.total_steps, hp.decay_steps, mode=hp.lr_schedule)

    def build_discriminator(self) -> StarGANDiscriminator:
        """The critic."""
        hp = self.hp
        return StarGANDiscriminator(
            hp.image_size, hp.ndf, sum(self.dims), hp.n_layers, hp.in_channels
        )

    # ------------------------------------------------------------------ labels
    @property
    def label_width(self) -> int:
        """Entries of a label of the generator; with several data sets it says which one it is of."""
        return sum(self.dims) + (len(self.dims) if len(self.dims) > 1 else 0)

    def exclusive(self, place: int) -> Sequence[Sequence[str]]:
        """Groups of names of a data set that exclude each other."""
        if self.kinds[place] == "single_label":
            return [self.names[place]]
        return [HAIR_COLOURS] if self.hp.exclusive is None else self.hp.exclusive

    def generator_label(self, attributes: Tensor, place: int = 0) -> Tensor:
        """Labels [B, c] of a data set as the generator takes them."""
        if len(self.dims) == 1:
            return attributes
        return joint_label(attributes, place, self.dims, self.kinds)

    def class_label(self, attributes: Tensor, place: int = 0) -> Tensor:
        """Labels [B, c] of a data set as the classification loss takes them: [B, c], or class indices [B]."""
        return attributes.argmax(1) if self.kinds[place] == "single_label" else attributes

    def edited(self, attributes: Tensor, place: int = 0) -> list[Tensor]:
        """For every attribute of a data set labels [B, c] with it edited, for every class those of that class."""
        if self.kinds[place] == "single_label":
            targets = class_targets(len(attributes), self.dims[place])
            return [target.to(attributes) for target in targets]
        return single_attribute_targets(attributes, self.names[place], self.exclusive(place))

    @torch.no_grad()
    def predict_attributes(self, images: Tensor, place: int = 0) -> Tensor:
        """Labels [B, c] that the critic finds in images [B, C, H, W] in [0, 1]; one of an exclusive group at most."""
        logits = self._own(self.discriminator(self.to_network(images))[1], place).to(images.dtype)
        if self.kinds[place] == "single_label":
            return one_hot(logits.argmax(1), self.dims[place]).to(images)
        found = (logits > 0).to(images)
        for group in exclusive_indices(self.names[place], self.exclusive(place)):
            best = one_hot(logits[:, group].argmax(1), len(group)).to(images)
            found[:, group] *= best
        return found

    def _own(self, logits: Tensor, place: int) -> Tensor:
        """Columns of a data set."""
        start = sum(self.dims[:place])
        return logits[:, start : start + self.dims[place]]

    def _parse(self, edits: str) -> tuple[int, Edit]:
        """The data set whose attributes the edits name, and the edits."""
        errors = []
        for place, names in enumerate(self.names):
            try:
                edit = parse_edits(edits, names, self.exclusive(place))
            except ValueError as error:
                errors.append(str(error))
                continue
            one_class = self.kinds[place] == "single_label"
            if one_class and (edit(torch.eye(len(names))).sum(1) != 1).any():
                raise ValueError(
                    f"edits={edits!r}: an image has exactly one of the classes {', '.join(names)}; name the wanted "
                    "one (--model.edits)"
                )
            return place, edit
        raise ValueError("; ".join(dict.fromkeys(errors)))

    # ------------------------------------------------------------------ schedule
    @property
    def total_epochs(self) -> int:
        """Epochs of ``steps_per_epoch`` batches."""
        return self.hp.total_steps // self.hp.steps_per_epoch

    def batches_in_epoch(self, epoch: int) -> int:
        """The same for every epoch, whatever the size of the data."""
        return self.hp.steps_per_epoch

    def updates_generator(self, number: int) -> bool:
        """Whether the generator is updated in the batch of this number."""
        return (number + 1) % self.hp.n_critic == 0

    def terms_at(self, number: int) -> set[str]:
        """Kinds of terms that the batch of this number computes."""
        return {"d", "g"} if self.updates_generator(number) else {"d"}

    def build_optimizers(self) -> dict[str, Optimizer]:
        """One Adam for each network."""
        hp = self.hp
        rates = {"discriminator": hp.lr_d, "generator": hp.lr_g}
        return {
            name: Adam(getattr(self, name).parameters(), lr=lr, betas=tuple(hp.betas))
            for name, lr in rates.items()
        }

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Sets the learning rates, which are functions of the number of the batch."""
        super().on_train_batch_start(batch, batch_idx)
        hp = self.hp
        # The released code looks at its learning rates every 1000 iterations; by that its decay all but vanishes.
        every = 1000 if hp.lr_schedule == "reference" else 1
        rates = {"discriminator": hp.lr_d, "generator": hp.lr_g}
        for name, optimizer in self._optimizers_by_name().items():
            rate = decayed_lr(
                self.batches_done,
                rates[name],
                hp.total_steps,
                hp.decay_steps,
                every,
                hp.lr_schedule,
            )
            for group in optimizer.param_groups:
                group["lr"] = rate

    # ------------------------------------------------------------------ training
    def training_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """The critic, and when its turn has come the generator, on every data set."""
        for task in self.tasks(batch):
            with torch.no_grad():
                fake = self.translate_raw(task.images, task.target)
            self.update_discriminator(task, fake)
            if self.updates_generator(self.batches_done):
                self.update_generator(task)

    def tasks(self, batch: dict[str, Any]) -> list[Task]:
        """What a batch asks for, in the order of the updates.

        Raises:
            ValueError: the batch is not of the model's data sets.
        """
        keys = [str(place) for place in range(len(self.names))]
        parts = {"0": batch} if "image" in batch else batch
        if list(parts) != keys:
            expected = f"parts {', '.join(keys)}" if len(keys) > 1 else "images and attributes"
            raise ValueError(
                f"the batch has {', '.join(parts)}; {type(self).__name__} with the attributes of {len(keys)} data "
                f"set(s) trains on {expected} (--model.attributes, --data.unlabelled false)"
            )
        several = len(keys) > 1
        return [self._task(parts[key], int(key), f"{key}/" if several else "") for key in keys]

    def _task(self, part: dict[str, Tensor], place: int, prefix: str) -> Task:
        attributes = part["attributes"]
        wanted = self.permuted(attributes, place)
        return Task(
            self.to_network(part["image"]),
            self.generator_label(attributes, place),
            self.generator_label(wanted, place),
            self.class_label(attributes, place),
            self.class_label(wanted, place),
            place,
            prefix,
        )

    def permuted(self, attributes: Tensor, place: int) -> Tensor:
        """This process's rows [B, c] of the labels of the global batch in another order."""
        rows, rank = len(attributes), self.trainer.global_rank
        if self.trainer.world_size > 1:
            everyone = self.all_gather(attributes)
            assert isinstance(everyone, Tensor)
            attributes = everyone.flatten(0, 1)
        permutation = self.draw_permutation(len(attributes), place)
        return permute_targets(attributes, permutation)[rank * rows : (rank + 1) * rows]

    def draw_permutation(self, rows: int, place: int) -> Tensor:
        """Of the global batch of a data set, int64 [rows]."""
        generator = keyed_generator("targets", place, *self._draw_position)
        return torch.randperm(rows, generator=generator)

    def draw_alpha(self, task: Task) -> Tensor:
        """Shares of the real images in the interpolates of the gradient penalty, [B]."""
        return self.draw(f"alpha {task.place}", "uniform", len(task.images))

    def update_discriminator(self, task: Task, fake: Tensor) -> None:
        """One step of the critic, or two with a separate penalty, on images and their translations."""
        hp = self.hp
        alpha = self.draw_alpha(task)
        with self.update("discriminator") as minimize:
            terms = self.discriminator_terms(task, fake)
            if hp.gp_update == "joint":
                terms["d_gp"] = self.penalty(task, fake, alpha)
            total = minimize(**self._weighted(task, terms))
        if hp.gp_update == "separate":
            with self.update("discriminator") as minimize:
                terms["d_gp"] = self.penalty(task, fake, alpha)
                total = total + minimize(**self._weighted(task, {"d_gp": terms["d_gp"]}))
        self._note(task, {**terms, "d_loss": total})

    def update_generator(self, task: Task) -> None:
        """One step of the generator, on the images of the critic's step; the critic has moved by then."""
        with self.update("generator") as minimize:
            terms = self.generator_terms(task)
            total = minimize(**self._weighted(task, terms))
        self._note(task, {**terms, "g_loss": total})

    def discriminator_terms(self, task: Task, fake: Tensor) -> dict[str, Tensor]:
        """What the critic minimises but for the penalty, not weighted."""
        assert task.labels is not None
        classify = self.classification(task, "d_accuracy")
        return discriminator_terms(self.discriminator, task.images, fake, task.labels, classify)

    def generator_terms(self, task: Task) -> dict[str, Tensor]:
        """What the generator minimises, not weighted."""
        assert task.source is not None
        return generator_terms(
            self.translate_raw,
            self.discriminator,
            task.images,
            task.source,
            task.target,
            task.target_labels,
            self.classification(task, "g_accuracy"),
        )

    def penalty(self, task: Task, fake: Tensor, alpha: Tensor) -> Tensor:
        """The gradient penalty, not weighted; notes the mean slope, which it draws to 1, as ``d_slope``."""
        slopes = slope_norms(self.discriminator, task.images, fake, alpha, self.hp.patch_reduction)
        self._note(task, {"d_slope": slopes.mean()})
        return (slopes - 1).square().mean()

    def classification(self, task: Task, accuracy: str) -> Classification:
        """The loss of class logits [B, sum(dims)] and labels; notes the share of right ones under a name."""

        def loss(logits: Tensor, labels: Tensor) -> Tensor:
            own = self._own(logits.detach(), task.place)
            _, right = gan_train_accuracy(own, labels, self.kinds[task.place])
            self._note(task, {accuracy: right})
            return joint_classification_loss(
                logits, labels, task.place, self.dims, self.kinds, self.hp.cls_reduction
            )

        return loss

    def _weighted(self, task: Task, terms: dict[str, Tensor]) -> dict[str, Tensor]:
        return {f"{task.prefix}{k}": v for k, v in weighted(terms, self.weights).items()}

    def _note(self, task: Task, values: dict[str, Tensor]) -> None:
        # Replaces the weighted terms: comparable whatever the weights, as the released code prints them.
        self.losses |= {f"{task.prefix}{name}": value.detach() for name, value in values.items()}

    def log_mean_over_ranks(self, values: dict[str, Tensor]) -> None:
        """Logs what this batch computed, if no later batch does until the trainer's next time to log.

        So terms that are computed now and then are logged, whatever their turn, and none is logged again later:
        through ``self.log`` they would stay in every row to the end of the epoch.
        """
        trainer: Any = self.trainer
        number, every = self.batches_done, trainer.log_every_n_steps
        later = map(self.terms_at, range(number + 1, (number // every + 1) * every))
        if not self.terms_at(number) - set().union(*later):
            return
        stacked = torch.stack([value.float().reshape(()) for value in values.values()])
        reduced = cast(Tensor, trainer.strategy.reduce(stacked, reduce_op="mean")).tolist()
        row = dict(zip(values, reduced, strict=True))
        for name, value in row.items():
            on_bar = name.split("/")[-1] in self.bar_terms
            self.log(name, value, on_step=True, on_epoch=False, prog_bar=on_bar, logger=False)
        for logger in trainer.loggers:
            logger.log_metrics({**row, "epoch": trainer.current_epoch}, step=number)

    # ------------------------------------------------------------------ images
    def to_network(self, images: Tensor) -> Tensor:
        """Images in [0, 1] as the networks take them, in [-1, 1]."""
        return images * 2 - 1

    def translate_raw(self, x: Tensor, label: Tensor) -> Tensor:
        """Translations [B, C, H, W] in [-1, 1] of images in [-1, 1], with gradients; ``label`` is the generator's."""
        # Outside a training a running average of the generator, where there is one, stands for it.
        name = "generator" if self.training else "generator_ema"
        # In reduced precision the losses still get full floats.
        return getattr(self, name, self.generator)(x, label).to(x.dtype)

    @torch.no_grad()
    def translate(self, images: Tensor, attributes: Tensor, place: int = 0) -> Tensor:
        """Translations [B, C, H, W] in [0, 1].

        Args:
            images: [B, C, H, W] in [0, 1]; H and W are multiples of 4.
            attributes: the wanted ones [B, c], zeros and ones.
            place: the data set that they are attributes of.
        """
        label = self.generator_label(attributes.to(images), place)
        return (self.translate_raw(self.to_network(images), label) + 1) / 2

    # ------------------------------------------------------------------ evaluation
    @torch.no_grad()
    def evaluate(
        self,
        batch: dict[str, Any],
        place: int = 0,
        counterparts: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Means [B] over the edits of one attribute that change the label of an image.

        Args:
            batch: ``image``, ``attributes`` and ``index`` of a data set.
            place: number of the data set.
            counterparts: indices and attributes to the true images in [0, 1], where the truth is known.

        Returns:
            Mean absolute differences of images in [0, 1]: ``reconstruction``, of the image led back; ``label_effect``,
            of the translation and that towards the image's own label; and with the truth ``error`` and
            ``error_of_identity``, of the translation and of the image itself.
        """
        images, own = batch["image"], batch["attributes"]
        unchanged = self.translate(images, own, place)
        sums: dict[str, Tensor] = {}
        edits = images.new_zeros(len(images))
        for target in self.edited(own, place):
            changed = (target != own).any(1)
            translated = self.translate(images, target, place)
            found = {
                "reconstruction": mean_difference(self.translate(translated, own, place), images),
                "label_effect": mean_difference(translated, unchanged),
            }
            if counterparts is not None:
                truth = counterparts(batch["index"].cpu(), target).to(images)
                found["error"] = mean_difference(translated, truth)
                found["error_of_identity"] = mean_difference(images, truth)
            edits += changed
            sums = {name: sums.get(name, 0) + value * changed for name, value in found.items()}
        return {name: total / edits.clamp_min(1) for name, total in sums.items()}

    def validation_step(
        self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Evaluates a batch of the data set of its dataloader."""
        dataset = self._evaluation_loaders()[dataloader_idx].dataset
        truth = getattr(dataset, "counterparts", None)
        self._found[dataloader_idx].append(self.evaluate(batch, dataloader_idx, truth))

    test_step = validation_step

    def on_validation_epoch_end(self) -> None:
        """Logs the means of :meth:`evaluate` as ``val/NAME``, with several data sets ``val/NUMBER/NAME``."""
        self._log_found("val")

    def on_test_epoch_end(self) -> None:
        """Logs the same as ``test/...``."""
        self._log_found("test")

    def _log_found(self, stage: str) -> None:
        for place in range(len(self._evaluation_loaders())):
            collected, self._found[place] = self._found[place], []
            if not self.trainer.sanity_checking:
                columns = self.gather_columns(collected)
                head = f"{stage}/{place}" if len(self.names) > 1 else stage
                self.log_dict({f"{head}/{name}": v.mean() for name, v in columns.items()})

    def _evaluation_loaders(self) -> list[Any]:
        trainer: Any = self.trainer
        loaders = trainer.test_dataloaders if trainer.testing else trainer.val_dataloaders
        return loaders if isinstance(loaders, list) else [loaders]

    def predict_step(
        self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0
    ) -> dict[str, Any]:
        """Applies ``edits`` to pictures. Where the batch has no attributes, they are what the critic finds.

        Returns:
            ``image`` [B, C, H, W] in [0, 1], and the names of the attributes before, ``source``, and after, ``target``.

        Raises:
            ValueError: there are no ``edits``.
        """
        place, edit = self._demand_edit()
        images = batch["image"]
        if dataloader_idx == place and "attributes" in batch:
            source = batch["attributes"]
        else:
            source = self.predict_attributes(images, place)
        target = edit(source)
        return {
            "image": self.translate(images, target, place),
            "source": self._named(source, place),
            "target": self._named(target, place),
        }

    def _demand_edit(self) -> tuple[int, Edit]:
        if self._edit is None:
            raise ValueError(
                f"say what to change, for example --model.edits +{self.names[0][0]}; the model knows "
                f"{', '.join(name for names in self.names for name in names)}"
            )
        return self._edit

    def _named(self, attributes: Tensor, place: int) -> list[str]:
        rows = attributes.tolist()
        return [
            "+".join(name for name, value in zip(self.names[place], row, strict=True) if value)
            for row in rows
        ]

    # ------------------------------------------------------------------ pictures
    @torch.no_grad()
    def image_grid(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Rows of pictures for :class:`callbacks.ImageGrid`: the images, and a row for every attribute or class."""
        batch = batch if "image" in batch else next(iter(batch.values()))
        images = batch["image"]
        rows = {"source": images}
        for place, names in enumerate(self.names):
            known = place == 0 and "attributes" in batch
            own = batch["attributes"] if known else self.predict_attributes(images, place)
            for name, target in zip(names, self.edited(own, place), strict=True):
                title = f"{name} ({place})" if name in rows else name
                rows[title] = self.translate(images, target, place)
        return rows

    # ------------------------------------------------------------------ checks
    def setup(self, stage: str) -> None:
        """Checks that model and data agree.

        Raises:
            ValueError: if the data have other attributes, or images of another size; and for a prediction without
                ``edits``.
        """
        super().setup(stage)
        data = getattr(self.trainer, "datamodule", None)
        hp = self.hp
        names = getattr(data, "attribute_names", None)
        if names and [list(part) for part in name_sets(names)] != self.names:
            raise ValueError(
                f"the model has attributes={hp.attributes}, the data have {names}; both need the same names in the "
                "same order (--model.attributes)"
            )
        if names and stage == "fit":
            self._demand_same_labels(data)
        self.demand_as_in_data(image_size="image_size", in_channels="image_channels")
        if stage == "predict":
            self._demand_edit()

    def _demand_same_labels(self, data: Any) -> None:
        several = len(self.names) > 1
        kinds = data.kinds if several else [data.attribute_kind]
        if list(kinds) != self.kinds:
            raise ValueError(
                f"the model has label_kind={self.hp.label_kind}, the labels of the data are "
                f"{', '.join(kinds)}; set --model.label_kind"
            )
        groups = data.exclusive_groups if several else [data.exclusive_groups]
        for place, (names, theirs) in enumerate(zip(self.names, groups, strict=True)):
            ours = self.exclusive(place)
            if sorted(exclusive_indices(names, theirs)) != sorted(exclusive_indices(names, ours)):
                raise ValueError(
                    f"the model has exclusive={self.hp.exclusive}, in the data {theirs} exclude each other; set "
                    "--model.exclusive"
                )
