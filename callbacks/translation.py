"""Unpaired translation judged: by classifiers and segmenters of its own, against the truth, beside other modules."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, get_args

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torchvision.transforms.functional import center_crop

from callbacks.judging import (
    JudgedTranslations,
    Scores,
    difference,
    distances,
)
from callbacks.media import labelled_grid, log_images
from callbacks.report import due, evenly, require, write_table
from lightning_modules.arguments import demand_at_least
from lightning_modules.checkpoints import load_frozen
from lightning_modules.cyclegan.module import Direction
from lightning_modules.metrics.prdc import PrecisionRecallDensityCoverage
from lightning_modules.metrics.segmentation import confusion_matrix, scores_of_confusion
from lightning_modules.nn.pixels import in_8_bits
from lightning_modules.nn.statistics import gather_over_ranks
from lightning_modules.supervised import Classifier, Segmenter

COLUMNS = {
    "taken_for_target": "as target %",
    "object_miou": "object mIoU %",
    "error": "error x100",
    "cycle_error": "cycle x100",
    "density": "density %",
    "coverage": "coverage %",
    "fid": "FID",
}
"""Metrics, as they are logged, and the heads of their columns."""

SETS = ("train_a", "train_b", "test_a", "test_b")
SIDES = ("a", "b")


class Judges(NamedTuple):
    """Who looks at the translations into one domain."""

    classifier: Classifier
    """Class 0 is domain A, class 1 domain B."""
    segmenter: Segmenter | None
    reference: PrecisionRecallDensityCoverage | None
    """Has the features of real images of the domain; None if there are too few."""


class TranslationReport(JudgedTranslations):
    """What translations are worth, in a table, with a picture: after a test, and during the training on demand.

    Works with any module that offers ``translate(images, direction)``, from [B, C, H, W] to [B, C', H, W] in [0, 1],
    and a DataModule whose ``train_a``, ``train_b``, ``test_a`` and ``test_b`` have ``batch(indices, device)`` with
    ``image``, perhaps ``mask`` (integers [B, H, W], 255 does not count) and perhaps ``counterpart`` (the true
    translation); ``mask_classes`` are the names of the classes of the masks, None without masks; ``domain_names`` those
    of ``a`` and ``b``.

    Rows: the source as it is, its translations, real images of the target. Columns, "-" where the data do not allow
    them:

    - as target: share that a classifier, trained here on both training sets, takes for the target domain;
    - object mIoU: of a segmenter that has seen real images of the target alone, on the masks of the source. A
      translation that moves objects falls below the source as it is;
    - error: mean absolute difference from the true translation;
    - cycle: mean absolute difference of an image from its translation there and back;
    - density, coverage, FID against the real test images of the target, in the embedding that the table names.

    Translations are rounded to 8 bits before anyone looks at them, also before they are translated back: nothing can
    hide in digits that no file would hold. Scores are logged as ``test/translation/DIRECTION/METRIC`` (``val/...``),
    those of the other rows as ``.../DIRECTION/source/METRIC``, ``real`` and the name of a module. The images are shared
    among the processes.

    Args:
        directions: ``AtoB``, ``BtoA`` or both.
        against: checkpoints of other translating modules, for rows of their own.
        segmenter: checkpoint of a :class:`Segmenter` to be used instead of training one.
        segmenter_steps: batches that a segmenter is trained with.
        **judging: arguments of :class:`JudgedTranslations`; every ``every_n_epochs`` epochs it judges ``val_a`` and
            ``val_b`` if the data have these, else the test images.

    Raises:
        ValueError: for an impossible argument.
        FileNotFoundError: weights are missing.
    """

    columns = COLUMNS

    def __init__(
        self,
        directions: Sequence[Direction] = ("AtoB",),
        against: list[str] | None = None,
        segmenter: str | None = None,
        segmenter_steps: int = 600,
        **judging: Any,
    ) -> None:
        super().__init__(**judging)
        demand_at_least(1, segmenter_steps=segmenter_steps)
        for direction in directions:
            if direction not in get_args(Direction):
                raise ValueError(
                    f"directions={list(directions)} must be some of {', '.join(get_args(Direction))}"
                )
        self.directions = list(directions)
        self.against = list(against or [])
        self.segmenter = segmenter
        self.segmenter_steps = segmenter_steps
        self._others: dict[str, Any] = {}
        self._judges: dict[str, Any] = {}
        self._references: dict[str, PrecisionRecallDensityCoverage | None] = {}
        self._rows: dict[Direction, list[list[Any]]] = {}
        self._notes: dict[Direction, list[str]] = {}

    # ------------------------------------------------------------------ when
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Checks the protocol and reads the checkpoints.

        Raises:
            MisconfigurationException: the module does not translate, or the data are not of two domains.
            FileNotFoundError: a checkpoint is missing.
            RuntimeError: a checkpoint is of something else.
        """
        require(self, pl_module, "translate")
        require(self, getattr(trainer, "datamodule", None), *SETS)
        option = "--trainer.callbacks.against"
        if not self._others:
            taken = [type(pl_module).__name__]
            for path in self.against:
                other = load_frozen(path, option, translate="does not translate")
                taken.append(_unique(type(other).__name__, taken))
                self._others[taken[-1]] = other
        if self.segmenter is not None and "given" not in self._judges:
            given = load_frozen(
                self.segmenter, "--trainer.callbacks.segmenter", classes="does not segment"
            )
            self._judges["given"] = given

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Every ``every_n_epochs`` epochs of a training."""
        if due(trainer, self.every_n_epochs):
            self._evaluate(trainer, pl_module, "val")

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Judges the module, and those of ``against``."""
        self._evaluate(trainer, pl_module, "test")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes ``translation_DIRECTION_table.txt`` and the picture, prints the table and where things are."""
        if not trainer.is_global_zero:
            return
        for direction, rows in self._rows.items():
            source, target = self._names(trainer, direction)
            written = [
                write_table(
                    trainer,
                    f"translation_{direction}",
                    f"Translation of {source} into {target}, {self._notes[direction][0]}",
                    ["images", *self.heads().values()],
                    rows,
                    self._notes[direction][1:],
                ),
                self._picture(trainer, pl_module, direction),
            ]
            for path in filter(None, written):
                print(f"wrote {path}")

    # ------------------------------------------------------------------ scores
    @torch.no_grad()
    def _evaluate(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        module: Any = pl_module
        self.extractor.to(module.device)
        self._rows, self._notes = {}, {}
        others = self._others if stage == "test" else {}
        for direction in self.directions:
            source, target = _sides(direction)
            images, real = (self._set(trainer, stage, side) for side in (source, target))
            judges = self._judges_of(trainer, module, stage, target)
            # The reference itself has nothing to be compared with, and real images no truth.
            alone = judges._replace(reference=None)
            found = {
                "source": self._scores(trainer, judges, direction, images, module.device),
                "real": self._scores(
                    trainer, alone, direction, real, module.device, with_truth=False
                ),
                "": self._scores(trainer, judges, direction, images, module.device, module),
            }
            for name, other in others.items():
                other.to(module.device)
                found[name] = self._scores(trainer, judges, direction, images, module.device, other)
                other.to("cpu")
            for name, scores in found.items():
                prefix = "/".join(filter(None, (stage, "translation", direction, name)))
                logged = {f"{prefix}/{metric}": value for metric, value in scores.items()}
                # Every rank has the same values.
                pl_module.log_dict(logged, rank_zero_only=False)
            titles = {"source": "source as it is", "": f"translated ({type(module).__name__})"}
            titles |= {name: f"translated ({name})" for name in others} | {"real": "real target"}
            self._rows[direction] = [
                [title, *self.cells(found[name])] for name, title in titles.items()
            ]
            self._notes[direction] = self._describe(found, judges, images, real)

    def _scores(
        self,
        trainer: Trainer,
        judges: Judges,
        direction: Direction,
        images: Any,
        device: torch.device,
        translator: Any = None,
        with_truth: bool = True,
    ) -> Scores:
        """What the judges say of a set, translated or as it is; the same on all ranks."""
        _, target = _sides(direction)
        back: Direction = "BtoA" if direction == "AtoB" else "AtoB"
        confusion = torch.zeros((), dtype=torch.long)
        columns: dict[str, dict[int, float]] = {"taken_for_target": {}}
        for part in self.mine(images, trainer.global_rank, trainer.world_size):
            for places, batch in _equal_sizes(part, images.batch(part, device)):
                shown = _unit(batch["image"])
                measured: dict[str, Tensor] = {}
                if translator is not None:
                    shown = _translated(translator, shown, direction)
                    again = _translated(translator, shown, back)
                    measured["cycle_error"] = difference(again, _unit(batch["image"]))
                if with_truth and "counterpart" in batch:
                    truth = _unit(batch["counterpart"])
                    if truth.shape == shown.shape:
                        measured["error"] = difference(truth, shown)
                taken = judges.classifier(shown).argmax(1) == SIDES.index(target)
                measured["taken_for_target"] = 100 * taken.double()
                for name, values in measured.items():
                    column = zip(places.tolist(), values.tolist(), strict=True)
                    columns.setdefault(name, {}).update(column)
                if judges.segmenter is not None and "mask" in batch:
                    classes = judges.segmenter.classes(shown)
                    count = judges.segmenter.hp.num_classes
                    confusion = (
                        confusion + confusion_matrix(batch["mask"].long(), classes, count).cpu()
                    )
                if judges.reference is not None:
                    features = self.extractor(shown)
                    judges.reference.update(features, real=False, indices=places)
        parts = gather_over_ranks(trainer, (columns, confusion))
        scores: Scores = {}
        for name in dict.fromkeys(name for part, _ in parts for name in part):
            whole = [value for part, _ in parts for value in part.get(name, {}).values()]
            if whole:
                # A sum that does not depend on the order: nor on the number of processes.
                scores[name] = math.fsum(whole) / len(whole)
        confusion = sum((part for _, part in parts), torch.zeros((), dtype=torch.long))
        if confusion.sum() > 0:
            scores["object_miou"] = 100 * scores_of_confusion(confusion)["class_iou_present"]
        if judges.reference is not None:
            scores |= distances(judges.reference)[0]
        return scores

    def _describe(
        self, found: dict[str, Scores], judges: Judges, images: Any, real: Any
    ) -> list[str]:
        """The end of the title, then the notes."""
        right = (100 - found["source"]["taken_for_target"] + found["real"]["taken_for_target"]) / 2
        notes = [
            f"{len(self.places(images))} test images against {len(self.places(real))} of the target",
            f"judges (seed {self.judge_seed}): the classifier is right on {right:.1f} % of the real test images "
            "of both domains",
        ]
        miou = found["real"].get("object_miou")
        if judges.segmenter is not None:
            origin = self.segmenter or "trained on real images of the target"
            judged = "-" if miou is None else f"{miou:.1f} %"
            notes.append(f"segmenter ({origin}): mIoU {judged} on real test images of the target")
        if judges.reference is not None:
            notes.append(self.note_on_distances())
        known = zip(self._others, self.against, strict=True)
        return notes + [f"{name}: {path}" for name, path in known]

    # ------------------------------------------------------------------ judges
    def _judges_of(self, trainer: Trainer, module: Any, stage: str, target: str) -> Judges:
        reference = f"{stage}_{target}"
        if reference not in self._references:
            self._references[reference] = self._reference(trainer, module, stage, target)
        return Judges(
            self._classifier(trainer, module.device),
            self._segmenter(trainer, module.device, target),
            self._references[reference],
        )

    def _classifier(self, trainer: Trainer, device: torch.device) -> Classifier:
        if "classifier" not in self._judges:
            both = _BothDomains(*(self._set(trainer, "train", side) for side in SIDES))
            self._judges["classifier"] = self.trained(
                "domain classifier",
                lambda: Classifier(2, in_channels=both.channels, width=self.judge_width),
                both,
                self.judge_steps,
                ("classifier",),
                device,
            )
        return self._judges["classifier"].to(device)

    def _segmenter(self, trainer: Trainer, device: torch.device, target: str) -> Segmenter | None:
        names = getattr(trainer.datamodule, "mask_classes", None)  # type: ignore[attr-defined]
        if not names:
            return None
        name = "given" if self.segmenter is not None else target
        if name == target and name not in self._judges:
            images = self._set(trainer, "train", target)
            sample = images.batch(torch.zeros(1, dtype=torch.long))
            if "mask" not in sample:
                return None
            channels = sample["image"].shape[1]
            self._judges[name] = self.trained(
                f"segmenter of domain {target.upper()}",
                lambda: Segmenter(len(names), self.judge_width, in_channels=channels),
                _Unpadded(images),
                self.segmenter_steps,
                ("segmenter", target),
                device,
            )
        return self._judges[name].to(device)

    def _reference(
        self, trainer: Trainer, module: Any, stage: str, target: str
    ) -> PrecisionRecallDensityCoverage | None:
        images = self._set(trainer, stage, target)
        batches = (
            (indices, _unit(batch["image"]))
            for part in self.mine(images, trainer.global_rank, trainer.world_size)
            for indices, batch in _equal_sizes(part, images.batch(part, module.device))
        )
        return self.reference(batches, len(self.places(images)), module.device)

    # ------------------------------------------------------------------ data
    def _set(self, trainer: Trainer, stage: str, side: str) -> Any:
        """The images of a domain."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        if stage == "val" and getattr(data, f"val_{side}", None) is None:
            stage = "test"
        return self.images_of(data, f"{stage}_{side}")

    def _names(self, trainer: Trainer, direction: Direction) -> list[str]:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        return [data.domain_names[side] for side in _sides(direction)]

    # ------------------------------------------------------------------ picture
    @torch.no_grad()
    def _picture(self, trainer: Trainer, pl_module: LightningModule, direction: Direction) -> Any:
        module: Any = pl_module
        source, target = self._names(trainer, direction)
        images = self._set(trainer, "test", _sides(direction)[0])
        places = evenly(images, self.pictures)
        translators = {type(module).__name__: module, **self._others}
        rows: dict[str, list[Tensor]] = {}
        for part in places:
            batch = images.batch(part[None], module.device)
            ((_, batch),) = _equal_sizes(part[None], batch)
            shown = _unit(batch["image"])
            rows.setdefault(f"source: {source}", []).append(shown)
            if "counterpart" in batch:
                rows.setdefault(f"truth: {target}", []).append(_unit(batch["counterpart"]))
            for name, translator in translators.items():
                translator.to(module.device)
                rows.setdefault(name, []).append(_translated(translator, shown, direction))
        grid = labelled_grid({title: _stacked(row) for title, row in rows.items()}, self.pictures)
        return log_images(trainer, f"translation/{direction}", grid)


class _Unpadded:
    """A set whose batches have no padding: images of various sizes are cut to the middle of the smallest."""

    def __init__(self, images: Any) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, indices: Tensor, device: torch.device | None = None) -> dict[str, Any]:
        """``image`` [B, C, H, W] and ``mask`` [B, H, W]."""
        parts = [part for _, part in _equal_sizes(indices, self.images.batch(indices, device))]
        masks = _stacked([part["mask"][:, None] for part in parts])[:, 0]
        return {"image": _stacked([_unit(part["image"]) for part in parts]), "mask": masks}


class _BothDomains:
    """Both training sets in turn, labelled 0 and 1; the smaller one comes as often as the larger one."""

    def __init__(self, *sets: Any) -> None:
        self.sets = sets
        samples = [images.batch(torch.zeros(1, dtype=torch.long)) for images in sets]
        self.channels = max(sample["image"].shape[1] for sample in samples)

    def __len__(self) -> int:
        return 2 * max(len(images) for images in self.sets)

    def batch(self, indices: Tensor, device: torch.device | None = None) -> dict[str, Any]:
        """``image`` [B, C, H, W], cut to the middle of the smallest one, and ``label`` [B]."""
        found: list[Tensor] = []
        labels: list[int] = []
        for side, images in enumerate(self.sets):
            places = indices[indices % 2 == side] // 2 % len(images)
            if len(places):
                for _, batch in _equal_sizes(places, images.batch(places, device)):
                    found.append(_unit(batch["image"]).expand(-1, self.channels, -1, -1))
                    labels += [side] * len(batch["image"])
        return {
            "image": _stacked(found),
            "label": torch.tensor(labels, device=device),
        }


def _sides(direction: Direction) -> tuple[str, str]:
    """Source and target."""
    return ("a", "b") if direction == "AtoB" else ("b", "a")


def _unique(name: str, taken: Sequence[str]) -> str:
    number, candidate = 1, name
    while candidate in taken:
        number += 1
        candidate = f"{name} {number}"
    return candidate


def _unit(images: Tensor) -> Tensor:
    """Float images in [0, 1]; bytes are what a set gives beside ``image``."""
    return images.float() / 255 if images.dtype == torch.uint8 else images.float()


def _translated(translator: Any, images: Tensor, direction: Direction) -> Tensor:
    """Translations as any file would hold them, in 8 bits."""
    return in_8_bits(translator.translate(images.to(translator.dtype), direction))


def _equal_sizes(places: Tensor, batch: dict[str, Any]) -> list[tuple[Tensor, dict[str, Any]]]:
    """A batch, or, where its images are padded to one size, each of them alone without its padding."""
    if "size" not in batch:
        return [(places, batch)]
    return [
        (
            places[i : i + 1],
            {
                name: batch[name][i : i + 1, ..., :height, :width]
                for name in ("image", "mask", "counterpart")
                if name in batch
            },
        )
        for i, (height, width) in enumerate(batch["size"])
    ]


def _stacked(images: Sequence[Tensor]) -> Tensor:
    """Batches of images [B, C, H, W] in one, cut to the middle of the smallest."""
    height, width = (min(image.shape[axis] for image in images) for axis in (-2, -1))
    return torch.cat([center_crop(image, [height, width]) for image in images])
