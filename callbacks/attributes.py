"""Translations of attributes judged: by a classifier of its own, against the truth, in numbers and in a grid."""

from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional as F

from callbacks.judging import (
    JudgedTranslations,
    Scores,
    difference,
    distances,
)
from callbacks.media import labelled_grid, log_images
from callbacks.report import due, evenly, require, write_table
from lightning_modules.arguments import demand_at_least, demand_choice
from lightning_modules.attributes import LabelKind, exclusive_indices, observed_label_space
from lightning_modules.matchgan.classifier import AttributeClassifier
from lightning_modules.metrics.inception import inception_score_from_probs
from lightning_modules.metrics.prdc import PrecisionRecallDensityCoverage
from lightning_modules.metrics.translation import gan_test_accuracy, gan_train_accuracy
from lightning_modules.nn.pixels import in_8_bits
from lightning_modules.nn.statistics import gather_over_ranks
from lightning_modules.randomness import mix
from lightning_modules.stargan.labels import single_attribute_targets
from lightning_modules.supervised import Classifier

JudgeNetwork = Literal["small", "matchgan"]

COLUMNS = {
    "target": "as asked %",
    "kept": "others kept %",
    "gan_test": "GAN-test %",
    "reconstruction": "cycle x100",
    "label_effect": "effect x100",
    "error_object": "object x100",
    "error_rest": "rest x100",
    "density": "density %",
    "coverage": "coverage %",
    "fid": "FID",
}
"""Metrics, as they are logged, and the heads of their columns."""

SETS = ("train", "val", "test")
INCEPTION_SIDE = 299
INCEPTION_CLASSES = 1000
FEWEST_IN_PART = 500


class Member(NamedTuple):
    """One of the data sets of a run."""

    data: Any
    place: int
    prefix: str
    """Of the names under which its scores are logged."""

    @property
    def names(self) -> list[str]:
        """Its attributes."""
        return list(self.data.attribute_names)

    @property
    def kind(self) -> LabelKind:
        """Of its labels."""
        return self.data.attribute_kind

    def targets(self, attributes: Tensor) -> Tensor:
        """Every attribute edited alone, [B, c, c] of image, translation, attribute."""
        groups = self.data.exclusive_groups
        return torch.stack(single_attribute_targets(attributes, self.names, groups), 1)

    def touched(self) -> Tensor:
        """Which attributes an edit may change, bool [c, c]: itself, and with it those it excludes."""
        found = torch.eye(len(self.names), dtype=torch.bool)
        for group in exclusive_indices(self.names, self.data.exclusive_groups):
            for i in group:
                found[i, group] = True
        return found


class Found(NamedTuple):
    """What was seen of the translations of every image towards every attribute."""

    columns: dict[str, Tensor]
    """[N, c] in the order of the images; nan where a number means nothing."""
    predictions: Tensor
    """Attributes that the judge finds, [N, c, c]."""
    targets: Tensor
    """Those that were asked for."""
    probabilities: Tensor
    """Of the classes of the inception score, [N * c, K]."""


class AttributeReport(JudgedTranslations):
    """What translations of attributes are worth: a table after a test, and a grid of pictures.

    Works with any module that offers ``translate(images, attributes, place)``, from [B, C, H, W] in [0, 1] and the
    wanted labels [B, c] to [B, C, H, W] in [0, 1], ``place`` being the number of the data set; and a DataModule with
    ``attribute_names``, ``attribute_kind``, ``exclusive_groups``, and ``train``, ``val`` and ``test`` that have the
    true ``attributes`` [N, c] and ``batch(indices, device)`` with ``image`` and ``attributes``; or ``members`` of that
    kind. Sets that know the truth have ``counterparts(indices, attributes)`` and ``object_masks(indices, attributes)``.

    Every test image is translated once for every attribute: one of an exclusive group is set and the others of it are
    cleared, any other is flipped. The table has a row for each, their mean, the images as they are, and real images.
    Columns, "-" where the data do not allow them:

    - as asked: share of the translations in which a classifier, trained here on all real training images with their
      true labels, finds everything the edit was to change; the row of real images has its accuracy;
    - others kept: share of the other attributes that it finds as they were;
    - GAN-test (MatchGAN's protocol): share in which it finds the edited attribute alone as asked;
    - cycle: mean absolute difference of an image from its translation there and back;
    - effect: mean absolute difference of the translation from that towards the image's own label; near 0 the label is
      ignored;
    - object, rest: mean absolute difference from the true translation, where the object is before or after (and a
      pixel around, for its smooth edge), and everywhere else, where nothing should change;
    - density, coverage, FID against the real test images, in the embedding that the table names. The rows of attributes
      have the FID of their translations alone; "all" that of all translations together (MatchGAN's overall FID).

    "As asked", "others kept", cycle, effect, object and rest are means over the images that the edit changes; GAN-test
    and FID are over all, also where an edit asks for what is there. Below the table: the inception score of all
    translations, and GAN-train, the accuracy on real test images of a classifier trained on translations of the
    training images, whose targets are the true training labels in another order.

    Translations are rounded to 8 bits before anyone looks at them, also before they are translated back. Scores are
    logged as ``test/attributes/METRIC``, those of a row as ``test/attributes/ROW/METRIC``, with several data sets as
    ``test/attributes/NUMBER/...``. The images are shared among the processes.

    The grid has a row for each of some images, a column for each attribute and, where it is known, the truth below.

    Args:
        judge_network: ``small``, or ``matchgan``, the classifier of MatchGAN's evaluation, for images of at least 32
            pixels; ``judge_width`` is then that of its second stage, 32 in the released code.
        gan_train_steps: batches that a classifier is trained with on translations; 0: no GAN-train.
        inception_weights: file of torchvision's ImageNet weights of ``inception_v3``, whose classes the inception score
            then is of (as MatchGAN's); null: those of the judge, the labels that training images have.
        judge_batch_size: as in :class:`JudgedTranslations`.
        batch_size: likewise.
        pictures: rows of the grid.
        **judging: further arguments of :class:`JudgedTranslations`; every ``every_n_epochs`` epochs a grid of
            validation images is drawn.

    Raises:
        ValueError: for an impossible argument.
        FileNotFoundError: weights are missing.
    """

    columns = COLUMNS

    def __init__(
        self,
        judge_network: JudgeNetwork = "small",
        gan_train_steps: int = 0,
        inception_weights: str | None = None,
        judge_batch_size: int = 32,
        batch_size: int = 32,
        pictures: int = 6,
        **judging: Any,
    ) -> None:
        super().__init__(
            judge_batch_size=judge_batch_size, batch_size=batch_size, pictures=pictures, **judging
        )
        demand_at_least(0, gan_train_steps=gan_train_steps)
        demand_choice(JudgeNetwork, judge_network=judge_network)
        self.judge_network = judge_network
        self.gan_train_steps = gan_train_steps
        self.inception: Classifier | None = None
        if inception_weights is not None:
            self.inception = Classifier(
                INCEPTION_CLASSES,
                network="inception_v3",
                pretrained=True,
                weights_path=inception_weights,
            )
            self.inception.require_weights()
            self.inception.eval().requires_grad_(False)
        self._judges: dict[int, _Judge] = {}
        self._references: dict[int, PrecisionRecallDensityCoverage | None] = {}
        self._tables: dict[int, tuple[list[list[Any]], list[str]]] = {}

    # ------------------------------------------------------------------ when
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Checks the protocol.

        Raises:
            MisconfigurationException: the module does not translate, or the data have no attributes.
        """
        require(self, pl_module, "translate")
        for member in _members(trainer):
            needed = (*SETS, "attribute_names", "attribute_kind", "exclusive_groups")
            require(self, member.data, *needed)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draws the grid every ``every_n_epochs`` epochs of a training."""
        if due(trainer, self.every_n_epochs) and trainer.is_global_zero:
            for member in _members(trainer):
                self._picture(trainer, pl_module, member, "val")

    @torch.no_grad()
    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Judges the translations of the test images."""
        module: Any = pl_module
        self.extractor.to(module.device)
        if self.inception is not None:
            self.inception.to(module.device)
        for member in _members(trainer):
            rows, notes = self._evaluate(trainer, module, member)
            for name, scores in rows.items():
                head = "/".join(filter(None, ("test/attributes", member.prefix, name)))
                logged = {f"{head}/{metric}": value for metric, value in scores.items()}
                # Every rank has the same values.
                pl_module.log_dict(logged, rank_zero_only=False)
            titles = {name: f"to {name}" for name in member.names} | {"": "all"}
            titles |= {"source": "images as they are", "real": "real images"}
            table = [[titles[name], *self.cells(scores)] for name, scores in rows.items()]
            self._tables[member.place] = (table, notes)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes ``attributes_table.txt`` and the grid, prints the table and where things are."""
        if not trainer.is_global_zero:
            return
        for member in _members(trainer):
            rows, notes = self._tables[member.place]
            key = "_".join(filter(None, ("attributes", member.prefix)))
            title = f"Translation of attributes ({type(pl_module).__name__}), {notes[0]}"
            written = [
                write_table(
                    trainer, key, title, ["images", *self.heads().values()], rows, notes[1:]
                ),
                self._picture(trainer, pl_module, member, "test"),
            ]
            for path in filter(None, written):
                print(f"wrote {path}")

    # ------------------------------------------------------------------ scores
    def _evaluate(
        self, trainer: Trainer, module: Any, member: Member
    ) -> tuple[dict[str, Scores], list[str]]:
        """Scores by row, and notes of which the first ends the title; the same on all ranks."""
        images = self._set(member, "test")
        judge = self._judge(trainer, module, member)
        accuracy, real_probabilities = self._accuracy(trainer, judge, images, module.device)
        reference = self._reference(trainer, module, member, images)
        space = observed_label_space(self._set(member, "train").attributes)
        source = self._look(trainer, member, judge, images, module, space, None, None)
        seen = self._look(trainer, member, judge, images, module, space, module, reference)

        rows = self._rows(member, seen)
        together, per_attribute = distances(reference, len(member.names))
        for name, fid in zip(member.names, per_attribute, strict=False):
            rows[name]["fid"] = fid
        rows[""] |= together
        if per_attribute:
            rows[""]["fid_mean"] = sum(per_attribute) / len(per_attribute)
        rows["source"] = self._rows(member, source)[""]
        rows["real"] = {"target": accuracy[""]}
        rows["real"] |= {f"target_{name}": accuracy[name] for name in member.names}

        classes = "ImageNet's classes" if self.inception else f"the judge's {len(space)} labels"
        score = _inception_score(seen.probabilities)
        rows[""]["inception_score"] = score[0]
        rows["real"]["inception_score"] = _inception_score(real_probabilities)[0]
        each = ", ".join(f"{name} {accuracy[name]:.1f}" for name in member.names)
        notes = [
            f"{len(self.places(images))} test images, {len(member.names)} translations of each",
            f"judge ({self.judge_network}, seed {self.judge_seed}, {self.judge_steps} steps): right on "
            f"{accuracy['']:.1f} % of the real test images ({each})",
            f"inception score over {classes}: {score[0]:.2f} ± {score[1]:.2f}; of the real images "
            f"{rows['real']['inception_score']:.2f}",
        ]
        if reference is not None:
            notes.append(self.note_on_distances())
        if self.gan_train_steps:
            trained = self._gan_train(trainer, module, member, images)
            rows[""]["gan_train"] = trained.pop("")
            for name, value in trained.items():
                rows[name]["gan_train"] = value
            notes.append(
                f"GAN-train ({self.gan_train_steps} steps on translations): right on "
                f"{rows['']['gan_train']:.1f} % of the real test images"
            )
        return rows, notes

    def _look(
        self,
        trainer: Trainer,
        member: Member,
        judge: "_Judge",
        images: Any,
        module: Any,
        space: Tensor,
        translator: Any,
        reference: PrecisionRecallDensityCoverage | None,
    ) -> Found:
        """All translations of a set, or its images as they are; the same on all ranks."""
        c = len(member.names)
        kept: dict[str, list[Tensor]] = {}
        for places in self._mine(trainer, images):
            batch = images.batch(places, module.device)
            real, own = batch["image"], batch["attributes"]
            targets = member.targets(own)
            shown = [real] * c
            found: dict[str, list[Tensor]] = {}
            if translator is not None:
                shown = [_translated(translator, real, t, member) for t in targets.unbind(1)]
                plain = _translated(translator, real, own, member)
                for image in shown:
                    back = _translated(translator, image, own, member)
                    found.setdefault("reconstruction", []).append(difference(back, real))
                    found.setdefault("label_effect", []).append(difference(image, plain))
            if hasattr(images, "counterparts"):
                for image, target in zip(shown, targets.unbind(1), strict=True):
                    for name, error in _errors(images, places, image, target).items():
                        found.setdefault(name, []).append(error)
            logits = torch.stack([judge(image) for image in shown], 1)
            changed = (targets != own[:, None]).any(2)
            predictions = _decided(logits, member.kind)
            right = predictions == targets
            touched = member.touched().to(right.device)
            columns = {
                "target": 100 * (right | (targets == own[:, None])).all(2).double(),
                **{name: torch.stack(values, 1) for name, values in found.items()},
            }
            if not touched.all():
                others = (~touched).double()
                columns["kept"] = 100 * (right * others).sum(2) / others.sum(1)
            for name, values in columns.items():
                kept.setdefault(f"column {name}", []).append(
                    values.masked_fill(~changed, torch.nan).cpu()
                )
            for name, values in (
                ("place", places),
                ("prediction", predictions),
                ("target", targets),
                ("probability", self._probabilities(shown, logits, space)),
            ):
                kept.setdefault(name, []).append(values.cpu())
            if reference is not None:
                for k, image in enumerate(shown):
                    reference.update(self.extractor(image), real=False, indices=places * c + k)
        whole = _whole(trainer, kept)
        return Found(
            {name[7:]: values for name, values in whole.items() if name.startswith("column ")},
            whole["prediction"],
            whole["target"],
            whole["probability"].flatten(0, 1),
        )

    def _probabilities(self, shown: Sequence[Tensor], logits: Tensor, space: Tensor) -> Tensor:
        """Of the classes that the inception score is of, [B, c, K]."""
        if self.inception is None:
            # The probability of a label is that of all its attributes, among the labels that there are.
            return torch.softmax(logits @ space.to(logits).T, 2)
        side = (INCEPTION_SIDE, INCEPTION_SIDE)
        large = [F.interpolate(image, side, mode="bilinear") for image in shown]
        return torch.stack([torch.softmax(self.inception(image), 1) for image in large], 1)

    def _rows(self, member: Member, found: Found) -> dict[str, Scores]:
        """Means over the images for every attribute, and under "" the means of these."""
        right, mean = gan_test_accuracy(found.targets, found.predictions)
        rows: dict[str, Scores] = {
            name: {"gan_test": 100 * float(value)}
            for name, value in zip(member.names, right, strict=True)
        }
        rows[""] = {"gan_test": 100 * float(mean)}
        for metric, values in found.columns.items():
            means = values.nanmean(0)
            for name, value in zip(member.names, means.tolist(), strict=True):
                if value == value:
                    rows[name][metric] = value
            if not means.isnan().all():
                rows[""][metric] = float(means.nanmean())
        return rows

    def _accuracy(
        self, trainer: Trainer, judge: "_Judge", images: Any, device: torch.device
    ) -> tuple[Scores, Tensor]:
        """Accuracy on real images, of each attribute and under "" of all; and the inception score's probabilities."""
        kept: dict[str, list[Tensor]] = {}
        for places in self._mine(trainer, images):
            batch = images.batch(places, device)
            logits = judge(batch["image"])
            for name, values in (
                ("place", places),
                ("logits", logits),
                ("attributes", batch["attributes"]),
                (
                    "probability",
                    self._probabilities([batch["image"]], logits[:, None], judge.space),
                ),
            ):
                kept.setdefault(name, []).append(values.cpu())
        whole = _whole(trainer, kept)
        labels = whole["attributes"]
        labels = labels.argmax(1) if judge.kind == "single_label" else labels
        each, mean = gan_train_accuracy(whole["logits"], labels, judge.kind)
        scores = dict(zip(judge.class_names, (100 * each).tolist(), strict=True))
        return scores | {"": 100 * float(mean)}, whole["probability"].flatten(0, 1)

    def _gan_train(self, trainer: Trainer, module: Any, member: Member, images: Any) -> Scores:
        translations = _Translations(module, member, self._set(member, "train"), self.judge_seed)
        judge = self._fit(
            member, translations, self.gan_train_steps, "GAN-train classifier", module.device
        )
        return self._accuracy(trainer, judge, images, module.device)[0]

    # ------------------------------------------------------------------ judges
    def _judge(self, trainer: Trainer, module: Any, member: Member) -> "_Judge":
        if member.place not in self._judges:
            real = self._set(member, "train")
            self._judges[member.place] = self._fit(
                member, real, self.judge_steps, "attribute classifier", module.device
            )
        return self._judges[member.place].to(module.device)

    def _fit(
        self, member: Member, images: Any, steps: int, description: str, device: torch.device
    ) -> "_Judge":
        real = self._set(member, "train")
        space = observed_label_space(real.attributes)
        channels, side = real.batch(torch.zeros(1, dtype=torch.long))["image"].shape[1:3]

        def build() -> _Judge:
            # Two outputs at least are what a classifier has; of a lone attribute the second one is never used.
            outputs = max(2, len(member.names))
            network: str | nn.Module = "small"
            if self.judge_network == "matchgan":
                network = _Centred(AttributeClassifier(outputs, self.judge_width, side, channels))
            return _Judge(
                member.names,
                member.kind,
                space,
                num_classes=outputs,
                network=network,
                in_channels=channels,
                width=self.judge_width,
            )

        return self.trained(description, build, images, steps, (description, member.place), device)

    def _reference(
        self, trainer: Trainer, module: Any, member: Member, images: Any
    ) -> PrecisionRecallDensityCoverage | None:
        if member.place not in self._references:
            batches = (
                (places, images.batch(places, module.device)["image"])
                for places in self._mine(trainer, images)
            )
            count = len(self.places(images))
            self._references[member.place] = self.reference(batches, count, module.device)
        return self._references[member.place]

    def _mine(self, trainer: Trainer, images: Any) -> Iterator[Tensor]:
        return self.mine(images, trainer.global_rank, trainer.world_size)

    def _set(self, member: Member, stage: str) -> Any:
        return self.images_of(member.data, stage)

    # ------------------------------------------------------------------ picture
    @torch.no_grad()
    def _picture(self, trainer: Trainer, module: Any, member: Member, stage: str) -> Any:
        images = self._set(member, stage)
        places = evenly(images, self.pictures)
        batch = images.batch(places, module.device)
        real, own = batch["image"], batch["attributes"]
        targets = member.targets(own).unbind(1)
        shown = torch.stack([real, *(_translated(module, real, t, member) for t in targets)], 1)
        truth = None
        if hasattr(images, "counterparts"):
            found = [images.counterparts(places, target).to(real) for target in targets]
            truth = torch.stack([real, *found], 1)
        rows: dict[str, Tensor] = {}
        for number, label in enumerate(own.tolist()):
            held = [name for name, value in zip(member.names, label, strict=True) if value]
            title = f"{number + 1}: {' '.join(held) or 'none'}"
            rows[title] = shown[number]
            if truth is not None:
                rows[f"truth of {number + 1}"] = truth[number]
        titles = ["input", *member.names]
        grid = labelled_grid(rows, len(titles), titles)
        key = "/".join(filter(None, (stage, "attributes", member.prefix)))
        return log_images(trainer, key, grid)


class _Judge(Classifier):
    """Finds attributes, or one of the classes.

    Args:
        names: of the attributes.
        kind: of the labels.
        space: labels that there are [K, c].
        **options: of :class:`Classifier`.
    """

    def __init__(
        self, names: Sequence[str], kind: LabelKind, space: Tensor, **options: Any
    ) -> None:
        super().__init__(**options)
        self.class_names = list(names)
        self.kind = kind
        self.space = space

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, c] of images [B, C, H, W] in [0, 1]."""
        return super().forward(images)[:, : len(self.class_names)]

    def loss(self, batch: dict[str, Any]) -> Tensor:
        """Cross entropy with ``attributes`` [B, c]."""
        logits, attributes = self(batch["image"]), batch["attributes"]
        if self.kind == "single_label":
            return F.cross_entropy(logits, attributes.argmax(1))
        return F.binary_cross_entropy_with_logits(logits, attributes.to(logits))


class _Centred(nn.Module):
    """A network of images in [-1, 1] for images in [0, 1]."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        """What the network says."""
        return self.network(2 * images - 1)


class _Translations:
    """Training images translated to the labels of others, with these labels."""

    def __init__(self, module: Any, member: Member, images: Any, seed: int) -> None:
        generator = torch.Generator().manual_seed(mix("gan train", seed, member.place))
        self.module, self.member, self.images = module, member, images
        self.targets = images.attributes[torch.randperm(len(images), generator=generator)]

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, indices: Tensor, device: torch.device | None = None) -> dict[str, Any]:
        """``image`` [B, C, H, W] in [0, 1] and ``attributes`` [B, c]."""
        real = self.images.batch(indices, device)["image"]
        target = self.targets[indices].to(real.device)
        return {
            "image": _translated(self.module, real, target, self.member),
            "attributes": target,
        }


def _members(trainer: Trainer) -> list[Member]:
    """The data sets of a run, one or several."""
    data: Any = getattr(trainer, "datamodule", None)
    several = getattr(data, "members", None)
    if several is None:
        return [Member(data, 0, "")]
    return [Member(member, place, str(place)) for place, member in enumerate(several)]


def _translated(translator: Any, images: Tensor, target: Tensor, member: Member) -> Tensor:
    """Translations as any file would hold them, in 8 bits."""
    return in_8_bits(translator.translate(images.to(translator.dtype), target, member.place))


def _decided(logits: Tensor, kind: LabelKind) -> Tensor:
    """Attributes that logits [..., c] stand for, zeros and ones."""
    if kind == "single_label":
        return F.one_hot(logits.argmax(-1), logits.shape[-1]).float()
    return (logits > 0).float()


def _errors(images: Any, places: Tensor, shown: Tensor, target: Tensor) -> dict[str, Tensor]:
    """Mean absolute differences x100 from the truth, float64 [B]; nan for a region without pixels."""
    truth = images.counterparts(places, target).to(shown)
    union = images.object_masks(places) | images.object_masks(places, target)
    # A smooth edge reaches a pixel further than the mask.
    grown = F.max_pool2d(union[:, None].float(), 3, 1, 1).to(shown.device) > 0
    differences = (shown.double() - truth.double()).abs().mean(1, keepdim=True)
    regions = {"error_object": grown, "error_rest": ~grown}
    return {
        name: 100 * (differences * region).flatten(1).sum(1) / region.flatten(1).sum(1)
        for name, region in regions.items()
    }


def _whole(trainer: Trainer, kept: dict[str, list[Tensor]]) -> dict[str, Tensor]:
    """The rows of all ranks in the order of their places."""
    parts = gather_over_ranks(trainer, {name: torch.cat(values) for name, values in kept.items()})
    parts = [part for part in parts if part]
    joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    order = joined["place"].argsort()
    return {name: values[order] for name, values in joined.items()}


def _inception_score(probabilities: Tensor) -> tuple[float, float]:
    # Ten parts as usual, but none so small that its score says more about its size than about the images.
    parts = min(10, max(1, len(probabilities) // FEWEST_IN_PART))
    mean, std = inception_score_from_probs(probabilities, parts)
    return float(mean), float(std)
