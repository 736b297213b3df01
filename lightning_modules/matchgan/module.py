"""MatchGAN: StarGAN with few labels; a third head of the critic tells whether two images have the same label.

Paper: Sun, Bhattarai, Kim, "MatchGAN: A Self-Supervised Semi-Supervised Conditional Generative Adversarial Network",
ACCV 2020. The text of the paper was not available: defaults follow the released code, apart from the decay of the
learning rate, see :class:`StarGAN`.

One step on a labelled or an unlabelled batch, which take turns:

1. Targets are drawn from the label space, one for every group of the batch.
2. The critic: Wasserstein terms with a gradient penalty; on labelled batches also the labels of the images, and
   whether pairs of them have the same one.
3. In every ``n_critic``-th batch the generator: fool the critic, be classified as the target, match where the targets
   are the same; on labelled batches also lead back to the source.
"""

from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_modules.arguments import demand_at_least, demand_choice
from lightning_modules.attributes import enumerate_label_space
from lightning_modules.matchgan.losses import (
    Matching,
    MatchReduction,
    MatchSource,
    discriminator_terms,
    generator_terms,
    match_loss,
)
from lightning_modules.matchgan.networks import MatchGANDiscriminator
from lightning_modules.matchgan.pairs import match_pair_indices, match_targets
from lightning_modules.matchgan.schedule import (
    MatchSchedule,
    StepKind,
    generator_sees_labels,
    step_kind,
)
from lightning_modules.randomness import keyed_generator
from lightning_modules.stargan.module import StarGAN, Task

BatchKind = Literal["labelled", "unlabelled"]
IdleHeads = Literal["zero", "skip"]


class MatchGAN(StarGAN):
    """StarGAN's networks with a match head; evaluation and prediction are StarGAN's.

    A training batch is ``{"labelled": {...}}`` or ``{"unlabelled": {...}}``, or has both of which one is used, see
    :meth:`batch_kind`; a batch without these names is a labelled one. Both kinds are made of blocks of ``n_groups``
    groups of ``group_size`` images. A group of labelled images has one label, the groups of a block have different
    ones. Pairs and targets are drawn within a block, so that with whole blocks on every process it does not matter how
    many there are.

    Args:
        lambda_match: weight of the match loss, in both objectives.
        match_reduction: mean over all pairs (released code), or ``sum_of_means``, twice as much.
        d_match_source: the critic matches real images on labelled batches (released code), translations (abstract of
            the paper), or both.
        schedule: see :func:`lightning_modules.matchgan.schedule.step_kind`.
        idle_heads: on unlabelled batches Adam sees zero gradients of heads without a loss, by which it still moves them
            (released code, with the PyTorch of its time), or skips them.
        n_groups: groups of a block; must be the data's.
        group_size: images of a group; must be the data's.
        **stargan: arguments of :class:`StarGAN`, of a single data set.

    Raises:
        ValueError: for an impossible argument.
    """

    discriminator: MatchGANDiscriminator
    bar_terms = ("d_match", "g_match", "g_rec")

    def __init__(
        self,
        lambda_match: float = 0.5,
        match_reduction: MatchReduction = "mean",
        d_match_source: MatchSource = "real",
        schedule: MatchSchedule = "reference",
        idle_heads: IdleHeads = "zero",
        n_groups: int = 4,
        group_size: int = 4,
        **stargan: Any,
    ) -> None:
        super().__init__(**stargan)
        self.weights["match"] = lambda_match
        self.has_unlabelled = True
        self.label_space: Tensor | None = None

    def _check_arguments(self) -> None:
        super()._check_arguments()
        hp = self.hp
        if len(self.names) > 1:
            raise ValueError(
                f"MatchGAN trains on one data set, attributes={hp.attributes} are of {len(self.names)}; its unlabelled "
                "images may come from anywhere"
            )
        demand_at_least(0, option="--model.", lambda_match=hp.lambda_match)
        demand_choice(MatchReduction, option="--model.", match_reduction=hp.match_reduction)
        demand_choice(MatchSource, option="--model.", d_match_source=hp.d_match_source)
        demand_choice(IdleHeads, option="--model.", idle_heads=hp.idle_heads)
        # Both check their arguments before any training.
        match_pair_indices(hp.n_groups * hp.group_size, hp.group_size)
        step_kind(0, True, hp.n_critic, hp.schedule)

    def build_discriminator(self) -> MatchGANDiscriminator:
        """StarGAN's critic with the match head."""
        hp = self.hp
        return MatchGANDiscriminator(
            hp.image_size, hp.ndf, sum(self.dims), hp.n_layers, hp.in_channels
        )

    # ------------------------------------------------------------------ schedule
    def kind_at(self, number: int) -> StepKind:
        """What the batch of this number does."""
        return step_kind(number, self.has_unlabelled, self.hp.n_critic, self.hp.schedule)

    def batch_kind(self, number: int) -> BatchKind:
        """The pool that the batch of this number is from, a function of the number alone."""
        return "labelled" if self.kind_at(number).labelled else "unlabelled"

    def terms_at(self, number: int) -> set[str]:
        """Kinds of terms that the batch of this number computes."""
        pool = self.batch_kind(number)
        return {f"{pool} {side}" for side in super().terms_at(number)}

    # ------------------------------------------------------------------ targets
    def tasks(self, batch: dict[str, Any]) -> list[Task]:
        """What a batch asks for: one task.

        Raises:
            ValueError: the batch does not have the images whose turn it is.
        """
        kind = self.batch_kind(self.batches_done)
        parts = {"labelled": batch} if "image" in batch else batch
        if kind not in parts:
            raise ValueError(
                f"it is the turn of {kind} images and the batch has {', '.join(parts)} ones; let the data ask "
                "batch_kind(number), and see --data.unlabelled"
            )
        part = parts[kind]
        attributes = part["attributes"] if kind == "labelled" else None
        images = self.to_network(part["image"])
        target = self.targets(len(images)).to(images)
        return [
            Task(
                images,
                None if attributes is None else self.generator_label(attributes),
                self.generator_label(target),
                None if attributes is None else self.class_label(attributes),
                self.class_label(target),
                prefix=f"{kind}/",
            )
        ]

    def targets(self, rows: int) -> Tensor:
        """Target labels [rows, c] of this process's blocks.

        Raises:
            ValueError: the batch is not made of whole blocks, or there are fewer labels than groups.
        """
        hp = self.hp
        size = hp.n_groups * hp.group_size
        if rows % size:
            raise ValueError(
                f"a batch of {rows} images on a process is not made of blocks of n_groups * group_size = "
                f"{hp.n_groups} * {hp.group_size} = {size} (--data.batch_size, --data.n_groups, --data.group_size)"
            )
        if self.label_space is None:
            self.label_space = self._enumerated()
        space = self.label_space
        if len(space) < hp.n_groups:
            raise ValueError(
                f"{hp.n_groups} different targets out of {len(space)} labels; name more attributes "
                "(--data.attributes) or take fewer groups (--data.n_groups)"
            )
        first = self.trainer.global_rank * (rows // size)
        blocks = [
            match_targets(space[self.draw_targets(len(space), block)], hp.group_size)[0]
            for block in range(first, first + rows // size)
        ]
        return torch.cat(blocks)

    def draw_targets(self, labels: int, block: int) -> Tensor:
        """Rows of the label space for a block of the global batch, int64 [n_groups], all different."""
        generator = keyed_generator("targets", block, *self._draw_position)
        return torch.randperm(labels, generator=generator)[: self.hp.n_groups]

    def regroup(self, rows: int) -> Tensor:
        """Order in which the translations of a batch of whole blocks form groups of one target, int64 [rows]."""
        hp = self.hp
        size = hp.n_groups * hp.group_size
        _, within = match_targets(torch.arange(hp.n_groups), hp.group_size)
        return torch.cat([within + start for start in range(0, rows, size)])

    def _enumerated(self) -> Tensor:
        if self.kinds[0] == "single_label":
            return torch.eye(self.dims[0])
        return enumerate_label_space(self.names[0], self.exclusive(0))

    # ------------------------------------------------------------------ losses
    def update_discriminator(self, task: Task, fake: Tensor) -> None:
        """As StarGAN's; the term of idle heads is always 0 and is not logged."""
        super().update_discriminator(task, fake)
        self.losses.pop(f"{task.prefix}d_idle", None)

    def discriminator_terms(self, task: Task, fake: Tensor) -> dict[str, Tensor]:
        """What the critic minimises but for the penalty, not weighted."""
        hp = self.hp
        return discriminator_terms(
            self.discriminator,
            task.images,
            fake,
            task.labels,
            self.regroup(len(fake)),
            self.classification(task, "d_accuracy"),
            group_size=hp.group_size,
            n_groups=hp.n_groups,
            match_source=hp.d_match_source,
            matching=self.matching(task, "d_match_accuracy"),
            idle_heads=hp.idle_heads,
        )

    def generator_terms(self, task: Task) -> dict[str, Tensor]:
        """What the generator minimises, not weighted."""
        hp = self.hp
        return generator_terms(
            self.translate_raw,
            self.discriminator,
            task.images,
            task.source,
            task.target,
            task.target_labels,
            self.regroup(len(task.images)),
            self.classification(task, "g_accuracy"),
            group_size=hp.group_size,
            n_groups=hp.n_groups,
            matching=self.matching(task, "g_match_accuracy"),
        )

    def matching(self, task: Task, accuracy: str) -> Matching:
        """The loss of pair logits [P, 2] and of whether they match; notes the share of right ones under a name."""

        def loss(pair_logits: Tensor, is_match: Tensor) -> Tensor:
            right = pair_logits.argmax(1) == is_match.to(pair_logits.device)
            self._note(task, {accuracy: right.float().mean()})
            return match_loss(pair_logits, is_match, self.hp.match_reduction)

        return loss

    # ------------------------------------------------------------------ checks
    def setup(self, stage: str) -> None:
        """As StarGAN's; takes the label space over from the data, and warns of a generator without labels.

        Raises:
            ValueError: if the data have other attributes, groups, or images of another size.
        """
        super().setup(stage)
        data = getattr(self.trainer, "datamodule", None)
        if stage != "fit" or data is None:
            return
        hp = self.hp
        self.demand_as_in_data(n_groups="n_groups", group_size="group_size")
        if not getattr(data, "balanced", True):
            raise ValueError(
                "MatchGAN needs labelled images in groups of one label; set --data.balanced true"
            )
        self.label_space = getattr(data, "label_space", None)
        self.has_unlabelled = getattr(data, "has_unlabelled", True)
        if not generator_sees_labels(hp.n_critic, self.has_unlabelled, hp.schedule):
            rank_zero_warn(
                f"with n_critic={hp.n_critic}, an even number, the generator is only ever updated on unlabelled "
                "images, so nothing is reconstructed; choose an odd --model.n_critic or --model.schedule balanced"
            )
