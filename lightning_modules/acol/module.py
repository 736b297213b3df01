"""ACoL: adversarial complementary learning for weakly supervised localization, and the variant's chains.

Paper: Zhang, Wei, Feng, Yang, Huang, "Adversarial Complementary Learning for Weakly Supervised Object Localization",
CVPR 2018. "Adversarial" is only the erasing: there is one loss, one optimizer, one backward.

A batch: features of the images; stage A classifies them; where its map of the label reaches delta, the features are
erased; stage B classifies what is left. The localization map is the larger of both stages' normalised maps. Recipes
``p``, ``pp``, ``pn`` ... are the variant's chains of 1x1 classifiers, ``cam`` is branch A alone.
"""

import copy
import math
import string
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD
from torch.optim.lr_scheduler import MultiStepLR
from torchmetrics.classification import MulticlassAccuracy

from lightning_modules.acol.losses import RestLoss, rest_cross_entropy
from lightning_modules.acol.networks import (
    ErasingNetwork,
    Pool,
    Stage,
    build_backbone,
)
from lightning_modules.arguments import demand_at_least, demand_choice
from lightning_modules.metrics.boxes import boxes_from_map
from lightning_modules.metrics.localization import (
    LocalizationError,
    MaxBoxAcc,
    MaxBoxAccV2,
    PxAP,
)
from lightning_modules.named_classes import NamedClasses
from lightning_modules.nn.maps import normalize_map, upsample_map
from lightning_modules.nn.norm import Norm
from lightning_modules.table_rows import TableRows

ClassifyWith = Literal["a", "b", "mean"]
EraseClass = Literal["each", "predicted", "label"]
Schedule = Literal["step", "one_cycle"]

DEFAULT_THRESHOLD = 0.2

STAGES = {"acol": "pp", "cam": "p"}
"""Named recipes as chains; both have heads with hidden convolutions."""


class Localization(NamedTuple):
    """What one row of the table says about a batch."""

    probabilities: Tensor
    """[B, K]."""
    classes: Tensor
    """Classes the maps are of: the label if there is one, then the most probable ones [B, T]."""
    maps: Tensor
    """[B, T, h, w] in [0, 1], at the resolution of the features."""


class ACoL(TableRows, NamedClasses):
    """Backbone, chain of classifiers, and on demand a CAM baseline beside it on the same batches.

    Args:
        num_classes: K; must be the data's.
        backbone: ``vgg16``, ``resnet18`` to ``resnet152``, ``googlenet``, ``inception_v3``, or ``small``, for CPUs.
        stride: of the last feature map; None: 8 for VGG-16 (28x28 at 224, released code), 16 for the others
            (wsolevaluation), 32 for ResNets in chains (the variant), 4 for ``small``.
        pool: max pools of VGG-16, see :func:`~lightning_modules.acol.networks.build_backbone`.
        width: channels of ``small``.
        norm: of ``small``; ``group`` keeps the images of a batch independent of each other.
        smooth: 3x3 average of the features; None: for VGG-16 but in chains (released codes).
        pretrained: start from torchvision's ImageNet weights.
        weights_path: their file; without it the one in torch.hub's folder.
        download: let torchvision fetch a missing file.
        recipe: ``acol``, ``cam`` (branch A alone), or a chain of ``p`` (learns the label) and ``n`` (learns that it is
            any other class) beginning with ``p``.
        delta: erasing thresholds, one less than stages; a single number is for all stages. 0.6 is ACoL's best, the
            variant's author prefers 0.9 for ``pn``.
        inclusive: erase where the normalised map equals delta; None: in ``acol`` (released code), not in chains.
        rest_loss: of ``n`` stages, see :func:`~lightning_modules.acol.losses.rest_cross_entropy`.
        head_width: of the heads' hidden convolutions.
        head_depth: hidden 3x3 convolutions of a head; None: 2, in chains 0.
        classify_with: probabilities of stage ``a`` (all released codes), ``b``, or the ``mean`` over the ``p`` stages.
        erase_class: class whose attention is erased in evaluation: that of ``each`` map asked for, the one stage A
            ``predicted`` (paper), or the ``label`` (released code; lets the label leak into maps of other classes).
        cam_baseline: train a second network with one stage, on the same batches from the same initial weights.
        lr: learning rate of the backbone.
        head_lr_ratio: of the heads.
        bias_lr_ratio: of biases.
        bias_weight_decay: decay biases, too (released code).
        weight_decay: of SGD.
        momentum: of SGD; ``one_cycle`` varies it itself.
        nesterov: Nesterov's momentum.
        epochs: length of the training.
        lr_schedule: ``step`` multiplies at ``decay_epochs``; ``one_cycle`` reaches ``lr`` and goes down to nothing.
        decay_epochs: epochs after which the learning rate is multiplied with ``decay_factor``.
        decay_factor: see there.

    Raises:
        ValueError: for an impossible argument.
        RuntimeError: the weights file holds something else, or the download failed.
    """

    bar_terms = ("loss_a", "loss_b", "erased_b")

    def __init__(
        self,
        num_classes: int = 200,
        backbone: str = "vgg16",
        stride: int | None = None,
        pool: Pool = "acol",
        width: int = 32,
        norm: Norm = "batch",
        smooth: bool | None = None,
        pretrained: bool = False,
        weights_path: str | None = None,
        download: bool = False,
        recipe: str = "acol",
        delta: float | list[float] = 0.6,
        inclusive: bool | None = None,
        rest_loss: RestLoss = "rest",
        head_width: int = 1024,
        head_depth: int | None = None,
        classify_with: ClassifyWith = "a",
        erase_class: EraseClass = "each",
        cam_baseline: bool = False,
        lr: float = 1e-4,
        head_lr_ratio: float = 10.0,
        bias_lr_ratio: float = 2.0,
        bias_weight_decay: bool = True,
        weight_decay: float = 5e-4,
        momentum: float = 0.9,
        nesterov: bool = True,
        epochs: int = 60,
        lr_schedule: Schedule = "step",
        decay_epochs: list[int] | None = None,
        decay_factor: float = 0.1,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.chain = _checked_chain(recipe)
        self.deltas = _checked_deltas(delta, recipe, len(self.chain) - 1)
        self._check_arguments()
        variant = recipe not in STAGES
        if stride is None and variant and backbone.startswith("resnet"):
            stride = 32
        options: dict[str, Any] = {
            "num_classes": num_classes,
            "head_width": head_width,
            "head_depth": (0 if variant else 2) if head_depth is None else head_depth,
            "smooth": (backbone == "vgg16" and not variant) if smooth is None else smooth,
        }
        trunk = build_backbone(backbone, stride, pool, width, norm)
        if pretrained:
            try:
                trunk.load_pretrained(weights_path, download)
            except FileNotFoundError as error:
                # A checkpoint that is loaded into this module brings them; without one nothing may start.
                self._missing_weights = error
        self.network = ErasingNetwork(
            trunk,
            recipe=self.chain,
            deltas=self.deltas,
            inclusive=not variant if inclusive is None else inclusive,
            **options,
        )
        titles = {f"stage_{s}": f"stage {s.upper()} alone" for s in self.stage_names}
        if len(self.chain) == 1:
            titles = {}
        titles["fused"] = {"acol": "ACoL", "cam": "CAM"}.get(recipe, f"chain {recipe}")
        if cam_baseline:
            self.cam = ErasingNetwork(copy.deepcopy(trunk), recipe="p", deltas=(), **options)
            self.cam.heads[0].load_state_dict(self.network.heads[0].state_dict())
            titles = {"cam": "CAM", **titles}
        self.row_titles = titles
        self.add_rows(list(titles))
        self.class_names = [str(k) for k in range(num_classes)]
        for stage in ("val", "test"):
            metrics = {
                row: MulticlassAccuracy(num_classes, average="micro") for row in self.classifiers
            }
            setattr(self, f"{stage}_accuracy", nn.ModuleDict(metrics))
        kinds: dict[str, Any] = {
            "val_boxes": MaxBoxAcc,
            "test_boxes": MaxBoxAcc,
            "test_boxes_v2": MaxBoxAccV2,
            "test_pixels": PxAP,
            "test_errors": partial(LocalizationError, topk=sorted({1, min(5, num_classes)})),
        }
        for name, kind in kinds.items():
            setattr(self, name, nn.ModuleDict({row: kind() for row in self.rows}))
        self.val_boxes: Any
        self.test_boxes: Any
        self.test_boxes_v2: Any
        self.test_pixels: Any
        self.test_errors: Any
        self.curves: dict[str, Tensor] = {}

    def _check_arguments(self) -> None:
        hp = self.hp
        demand_at_least(2, option="--model.", num_classes=hp.num_classes)
        sizes = {name: hp[name] for name in ("epochs", "head_width", "width")}
        demand_at_least(1, option="--model.", **sizes)
        demand_choice(ClassifyWith, option="--model.", classify_with=hp.classify_with)
        demand_choice(EraseClass, option="--model.", erase_class=hp.erase_class)
        demand_choice(RestLoss, option="--model.", rest_loss=hp.rest_loss)
        demand_choice(Schedule, option="--model.", lr_schedule=hp.lr_schedule)
        if hp.classify_with == "b" and self.chain[1:2] != "p":
            raise ValueError(
                f"classify_with='b' needs a second stage that learns the label; recipe={hp.recipe!r} has none: set "
                "--model.classify_with a"
            )
        if hp.cam_baseline and len(self.chain) == 1:
            raise ValueError(
                f"recipe={hp.recipe!r} has one stage, which is what cam_baseline would train a second time: set "
                "--model.cam_baseline false"
            )

    @property
    def stage_names(self) -> str:
        """A letter a stage, from ``a``."""
        return string.ascii_lowercase[: len(self.chain)]

    @property
    def classifiers(self) -> dict[str, str]:
        """Rows that classify on their own; the other rows have the probabilities of ``fused``."""
        return {row: title for row, title in self.row_titles.items() if row in ("cam", "fused")}

    # ------------------------------------------------------------------ schedule
    @property
    def total_epochs(self) -> int:
        """Length of the training."""
        return self.hp.epochs

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Weights and biases of backbone and heads, with the rates of the released code; the baseline's after them."""
        hp = self.hp
        groups: list[dict[str, Any]] = []
        networks = {"": self.network} | ({"cam_": self.cam} if hp.cam_baseline else {})
        for prefix, network in networks.items():
            parts = {
                "backbone": (network.backbone, 1.0),
                "heads": (network.heads, hp.head_lr_ratio),
            }
            for part, (layers, ratio) in parts.items():
                for kind in ("weights", "biases"):
                    bias = kind == "biases"
                    found = [
                        parameter
                        for name, parameter in layers.named_parameters()
                        if name.endswith("bias") == bias
                    ]
                    decays = hp.bias_weight_decay or not bias
                    group = {
                        "name": f"{prefix}{part}_{kind}",
                        "params": found,
                        "lr": hp.lr * ratio * (hp.bias_lr_ratio if bias else 1.0),
                        "weight_decay": hp.weight_decay if decays else 0.0,
                    }
                    groups += [group] if found else []
        return groups

    def configure_optimizers(self) -> Any:
        """One SGD for everything."""
        hp = self.hp
        optimizer = SGD(
            self.parameter_groups(), lr=hp.lr, momentum=hp.momentum, nesterov=hp.nesterov
        )
        if hp.lr_schedule == "step":
            return [optimizer], [MultiStepLR(optimizer, hp.decay_epochs or [], hp.decay_factor)]
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
        return optimizer

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Sets the learning rates of ``one_cycle``, which are a function of the number of the batch alone."""
        super().on_train_batch_start(batch, batch_idx)
        if self.hp.lr_schedule != "one_cycle":
            return
        trainer: Any = self.trainer
        length = int(trainer.num_training_batches) * int(trainer.max_epochs)
        share, momentum = one_cycle(self.batches_done, length)
        for group in trainer.optimizers[0].param_groups:
            group["lr"], group["momentum"] = share * group["peak_lr"], momentum

    # ------------------------------------------------------------------ training
    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Sum of the losses of all stages, and of the baseline, which shares no parameter with them."""
        images, labels = batch["image"], batch["label"]
        stages = self.network(self.network.features(images), labels)
        losses = self.stage_losses(stages, labels)
        terms = {f"loss_{name}": loss for name, loss in zip(self.stage_names, losses, strict=True)}
        total = terms["loss"] = torch.stack(losses).sum()
        for name, stage in zip(self.stage_names[1:], stages[1:], strict=True):
            terms[f"erased_{name}"] = 1 - stage.visible.float().mean()
        if self.hp.cam_baseline:
            (alone,) = self.cam(self.cam.features(images), labels)
            terms["cam_loss"] = F.cross_entropy(alone.logits, labels)
            total = total + terms["cam_loss"]
        self.losses = {name: value.detach() for name, value in terms.items()}
        return total

    def stage_losses(self, stages: Sequence[Stage], labels: Tensor) -> list[Tensor]:
        """Cross entropy of ``p`` stages, rest cross entropy of ``n`` stages; batch means.

        Args:
            stages: of the network.
            labels: [B].
        """
        return [
            F.cross_entropy(stage.logits, labels)
            if kind == "p"
            else rest_cross_entropy(stage.logits, labels, kind=self.hp.rest_loss)
            for stage, kind in zip(stages, self.chain, strict=True)
        ]

    # ------------------------------------------------------------------ classes and maps
    def classify(self, images: Tensor) -> Tensor:
        """Class probabilities [B, K] of images [B, 3 or 1, H, W] in [0, 1], by ``classify_with``."""
        self.require_weights()
        with torch.no_grad():
            features = self.network.features(images)
            return self._probabilities(self.network, features, self.network.heads[0](features))

    def _probabilities(
        self, network: ErasingNetwork, features: Tensor, first_maps: Tensor
    ) -> Tensor:
        if network is not self.network or self.hp.classify_with == "a":
            return first_maps.mean((-2, -1)).softmax(1)
        # What is erased is always what stage A predicts: the label must not help to classify.
        stages = network(features, None, first_maps)
        scores = [stage.logits.softmax(1) for stage in stages]
        if self.hp.classify_with == "b":
            return scores[1]
        learners = [each for each, kind in zip(scores, self.chain, strict=True) if kind == "p"]
        return torch.stack(learners).mean(0)

    @torch.no_grad()
    def localize(
        self, images: Tensor, labels: Tensor | None = None, top: int = 1
    ) -> dict[str, Localization]:
        """Classes and maps of every row, as localization metrics need them.

        Args:
            images: [B, 3 or 1, H, W] in [0, 1].
            labels: [B]; their maps come first (ground truth known).
            top: that many most probable classes have maps, too; may be 0 with labels.

        Returns:
            Row to its :class:`Localization`. Rows of :attr:`classifiers` ask for their own predictions, the others for
            those of ``fused``.

        Raises:
            ValueError: no class is asked for, or more than there are.
        """
        self.require_weights()
        least = 0 if labels is not None else 1
        if not least <= top <= self.hp.num_classes:
            raise ValueError(f"top={top} must be from {least} to {self.hp.num_classes}")
        found: dict[str, Localization] = {}
        for name in self.classifiers:
            network = self.cam if name == "cam" else self.network
            features = network.features(images)
            first = network.heads[0](features)
            probabilities = self._probabilities(network, features, first)
            classes = probabilities.topk(top).indices
            if labels is not None:
                classes = torch.cat([labels[:, None], classes], 1)
            erased = {
                "each": None,
                "label": classes[:, 0],
                "predicted": first.mean((-2, -1)).argmax(1),
            }[self.hp.erase_class]
            maps = network.class_maps(features, classes, erased, first)
            if name == "fused" and len(maps) > 1:
                for letter, own in zip(self.stage_names, maps, strict=True):
                    found[f"stage_{letter}"] = Localization(probabilities, classes, own)
            found[name] = Localization(probabilities, classes, network.fuse(maps))
        return {row: found[row] for row in self.rows}

    def localization_maps(self, images: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        """Maps of one class an image.

        Args:
            images: [B, 3 or 1, H, W] in [0, 1].
            labels: classes [B]; None for those predicted, by each row on its own.

        Returns:
            Row to [B, h, w] in [0, 1], at the resolution of the features: ``fused`` is the module's answer,
            ``stage_a`` ... its parts (absent with a single stage), ``cam`` the baseline's.
        """
        found = self.localize(images, labels, top=0 if labels is not None else 1)
        return {row: localization.maps[:, 0] for row, localization in found.items()}

    # ------------------------------------------------------------------ evaluation
    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Feeds the metrics of the validation data."""
        self._evaluate("val", batch)

    def on_validation_epoch_end(self) -> None:
        """Chooses the thresholds that turn maps into boxes (MaxBoxAcc at IoU 0.5)."""
        for row, metric in self.val_boxes.items():
            if not self._seen(metric.count):
                continue
            values = metric.compute()
            metric.reset()
            if self.trainer.sanity_checking:
                continue
            self.set_threshold(row, values["threshold@50"])
            names = ("max_box_acc", "threshold@50")
            self.log_dict({f"val/{row}/{name}": values[name].float() for name in names})

    def on_test_start(self) -> None:
        """Hands the chosen thresholds to the metrics."""
        for row, threshold in self.row_thresholds.items():
            self.test_boxes[row].at_threshold = threshold

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Feeds the metrics of the test data."""
        self._evaluate("test", batch)

    def on_test_epoch_end(self) -> None:
        """Logs ``test/ROW/METRIC`` for every row; accuracies and errors of boxes in percent."""
        self.curves = {}
        for row in self.rows:
            if not self._seen(self.test_boxes[row].count):
                continue
            values = self.test_boxes[row].compute() | self.test_boxes_v2[row].compute()
            if self._seen(self.test_errors[row].count):
                values |= self.test_errors[row].compute()
            if self._seen(self.test_pixels[row].positive):
                values |= self.test_pixels[row].compute()
            self.curves[row] = values["curve@50"].cpu()
            scalars = {name: value.float() for name, value in values.items() if value.ndim == 0}
            self.log_dict({f"test/{row}/{name}": value for name, value in scalars.items()})

    def _seen(self, counts: Tensor) -> bool:
        """Whether any process has counted something; the same answer on all."""
        reduced = self.trainer.strategy.reduce(counts.sum().double(), reduce_op="sum")
        assert isinstance(reduced, Tensor)
        return bool(reduced > 0)

    def _evaluate(self, stage: str, batch: dict[str, Tensor]) -> None:
        labels = batch["label"]
        top = min(5, self.hp.num_classes) if stage == "test" else 1
        found = self.localize(batch["image"], labels, top)
        for row in self.classifiers:
            accuracy = getattr(self, f"{stage}_accuracy")[row]
            accuracy.update(found[row].probabilities, labels)
            self.log(f"{stage}/{row}/accuracy", accuracy, on_epoch=True, on_step=False)
        if "boxes" in batch:
            self._evaluate_boxes(stage, batch, found)

    def _evaluate_boxes(
        self, stage: str, batch: dict[str, Tensor], found: dict[str, Localization]
    ) -> None:
        """Feeds the metrics of boxes; images without a box play no part."""
        truth = [boxes[(boxes >= 0).all(1)].cpu() for boxes in batch["boxes"]]
        chosen = [position for position, boxes in enumerate(truth) if len(boxes)]
        if not chosen:
            return
        truth = [truth[position] for position in chosen]
        size, labels = batch["image"].shape[-2:], batch["label"][chosen].cpu()
        for row, localization in found.items():
            maps = normalize_map(upsample_map(localization.maps[chosen], size)).cpu()
            getattr(self, f"{stage}_boxes")[row].update(maps[:, 0], truth)
            threshold = self.row_thresholds[row]
            if stage == "val":
                continue
            self.test_boxes_v2[row].update(maps[:, 0], truth)
            if "mask" in batch:
                self.test_pixels[row].update(maps[:, 0], batch["mask"][chosen].cpu())
            if threshold is None:
                continue
            # [B, 1 + top, 4]: the true class first, then the most probable ones.
            boxes = torch.stack(
                [torch.cat([boxes_from_map(m, threshold) for m in each]) for each in maps]
            )
            self.test_errors[row].update(
                localization.classes[chosen, 1:].cpu(), boxes[:, 1:], labels, truth, boxes[:, 0]
            )

    def boxes(self, maps: Tensor, size: Sequence[int], row: str = "fused") -> Tensor:
        """Boxes of maps at the threshold chosen on validation data, else at 0.2 (as in CAM).

        Args:
            maps: [B, h, w], see :meth:`localization_maps`.
            size: height and width of the image.
            row: whose threshold.

        Returns:
            x0, y0, x1, y1 in pixels of an image of that size, int64 [B, 4].
        """
        threshold = self.row_thresholds[row]
        scaled = normalize_map(upsample_map(maps, size)).cpu()
        at = DEFAULT_THRESHOLD if threshold is None else threshold
        return torch.cat([boxes_from_map(one, at) for one in scaled])

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Any]:
        """The most probable class of every image and the box of its map.

        Returns:
            Columns ``label`` (names), ``confidence`` ([B], in (0, 1]) and ``x0``, ``y0``, ``x1``, ``y1`` ([B], in
            pixels of the file where the batch has ``original_size``, else of the image).
        """
        images = batch["image"]
        found = self.localize(images)["fused"]
        confidence, label = found.probabilities.max(1)
        height, width = images.shape[-2:]
        boxes = self.boxes(found.maps[:, 0], (height, width))
        if "original_size" in batch:
            scale = batch["original_size"].cpu() / torch.tensor([height, width])
            boxes = (boxes * scale[:, [1, 0, 1, 0]]).long()
        names = [self.class_names[k] for k in label.tolist()]
        corners = dict(zip(("x0", "y0", "x1", "y1"), boxes.T, strict=True))
        return {"label": names, "confidence": confidence, **corners}


def one_cycle(step: int, length: int) -> tuple[float, float]:
    """Learning rate, as a share of its peak, and momentum of a step of ``torch.optim.lr_scheduler.OneCycleLR``.

    As a function it needs no state, so that a resumed run needs to know no more than where it is.

    Args:
        step: from 0.
        length: steps of the whole training.
    """
    top = max(0.3 * length - 1, 1e-9)
    rising = step <= top
    place = step / top if rising else min(1.0, (step - top) / max(length - 1 - top, 1e-9))
    low, start = 1 / 25 / 1e4, 1 / 25
    begin, end = (start, 1.0) if rising else (1.0, low)
    momentum = (0.95, 0.85) if rising else (0.85, 0.95)

    def between(first: float, last: float) -> float:
        return last + (first - last) / 2 * (1 + math.cos(math.pi * place))

    return between(begin, end), between(*momentum)


def _checked_chain(recipe: str) -> str:
    chain = STAGES.get(recipe, recipe)
    if not chain or set(chain) - set("pn"):
        raise ValueError(
            f"unknown recipe={recipe!r} (--model.recipe); choose acol, cam or a chain of p and n such as p, pp, pn"
        )
    if chain[0] != "p":
        raise ValueError(
            f"recipe={recipe!r} must begin with p: its first stage classifies (--model.recipe p{chain})"
        )
    if len(chain) > len(string.ascii_lowercase):
        raise ValueError(f"recipe={recipe!r} has {len(chain)} stages; at most 26 have names")
    return chain


def _checked_deltas(delta: float | Sequence[float], recipe: str, needed: int) -> tuple[float, ...]:
    deltas = (float(delta),) * needed if isinstance(delta, int | float) else tuple(delta)
    given = [float(delta)] if isinstance(delta, int | float) else list(deltas)
    for value in given:
        if not 0 < value < 1:
            raise ValueError(
                f"delta={value} must be in (0, 1): it is a share of the range of a map (--model.delta 0.6)"
            )
    if len(deltas) < needed:
        raise ValueError(
            f"recipe={recipe!r} erases {needed} times, but delta={given} has {len(deltas)} thresholds; "
            "give one for each, or a single number for all (--model.delta 0.6)"
        )
    return deltas[:needed]
