"""ZAQ of a classifier, and the baselines that learn from classes: GDFQ, and distillation on ZeroQ's images."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy

from lightning_modules.arguments import demand_at_least
from lightning_modules.supervised.classifier import NO_CLASS, Classifier
from lightning_modules.zaq.attach import calibrate
from lightning_modules.zaq.comparison import ComparedMethods
from lightning_modules.zaq.gdfq import gdfq_generator_loss, gdfq_student_loss
from lightning_modules.zaq.generators import GDFQGenerator
from lightning_modules.zaq.methods import Trained, Training
from lightning_modules.zaq.zeroq import record_norm_inputs


class ZAQ(ComparedMethods):
    """ZAQ and its baselines on a :class:`~lightning_modules.supervised.Classifier`; the table shows accuracies.

    Further arguments and errors are those of :class:`~lightning_modules.zaq.game.QuantizationGame`.

    Args:
        num_classes: K; must be the data's.
        network: of P, see :class:`~lightning_modules.supervised.base.SupervisedModule`.
        pretrained: P is torchvision's network with torchvision's weights.
        weights_path: their file; without it the one in torch.hub's folder.
        gdfq_epochs: of GDFQ at a width.
        gdfq_warmup_epochs: the first ones of these train the generator alone and observe ranges.
        gdfq_latent_dim: of its generator, which has ``ngf`` and ``up_blocks`` in common with ZAQ's.
        gdfq_lr_q, gdfq_lr_g: learning rates, with Nesterov's momentum and Adam (0.5, 0.999).
        gdfq_bns_weight, gdfq_temperature, gdfq_alpha: see :mod:`~lightning_modules.zaq.gdfq`.
        zeroq_kd_epochs: of the distillation of P into Q on ZeroQ's images (ours), with the loss and the rate of GDFQ's
            Q.
        **options: those of the game.

    Raises:
        FileNotFoundError: the weights that were asked for are not on this machine.
    """

    teacher_class = Classifier
    truth = ("label",)
    score_name = "accuracy"
    class_axis = 1

    def __init__(
        self,
        num_classes: int = 10,
        network: str | nn.Module = "resnet20",
        pretrained: bool = False,
        weights_path: str | None = None,
        gdfq_epochs: int = 400,
        gdfq_warmup_epochs: int = 4,
        gdfq_latent_dim: int = 100,
        gdfq_lr_q: float = 1e-4,
        gdfq_lr_g: float = 1e-3,
        gdfq_bns_weight: float = 0.1,
        gdfq_temperature: float = 20.0,
        gdfq_alpha: float = 1.0,
        zeroq_kd_epochs: int = 100,
        **options: Any,
    ) -> None:
        super().__init__(num_classes, network, **options)

    def _check_arguments(self) -> None:
        super()._check_arguments()
        hp = self.hp
        lengths = ("gdfq_epochs", "gdfq_warmup_epochs", "gdfq_latent_dim", "zeroq_kd_epochs")
        demand_at_least(1, option="--model.", **{name: hp[name] for name in lengths})
        weights = {name: hp[name] for name in ("gdfq_bns_weight", "gdfq_alpha")}
        demand_at_least(0, option="--model.", **weights)
        if not hp.gdfq_temperature > 0:
            raise ValueError(
                f"gdfq_temperature={hp.gdfq_temperature} must be above 0 (--model.gdfq_temperature)"
            )
        if hp.pretrained and hp.teacher is not None:
            raise ValueError("P is either --model.teacher or --model.pretrained, not both")

    def build_generator(self, method: Trained) -> nn.Module:
        """GDFQ's takes classes."""
        if method != "gdfq":
            return super().build_generator(method)
        hp = self.hp
        return GDFQGenerator(hp.num_classes, hp.gdfq_latent_dim, **self._generator_size())

    # ------------------------------------------------------------------ what P does
    def teacher_options(self) -> dict[str, Any]:
        """Torchvision's weights, if they are wanted."""
        return {"pretrained": self.hp.pretrained, "weights_path": self.hp.weights_path}

    def compared(self, outputs: Tensor) -> Tensor:
        """Logits."""
        return outputs

    def ft_losses(self, student: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Cross entropy."""
        logits = student(self.to_network(batch["image"]))
        return {"q_classification": F.cross_entropy(logits, batch["label"])}

    # ------------------------------------------------------------------ schedule
    def trainings(self) -> dict[Trained, Training]:
        """With GDFQ and distillation, if they are wanted."""
        hp, trainings = self.hp, super().trainings()
        # Released code of GDFQ: rates fall at 100, 200 and 300 of 400 epochs.
        student = Training(hp.gdfq_epochs, hp.gdfq_lr_q, 1e-4, nesterov=True, decay_parts=4)
        if "zeroq_kd" in hp.baselines:
            trainings["zeroq_kd"] = student._replace(epochs=hp.zeroq_kd_epochs)
        if "gdfq" in hp.baselines:
            trainings["gdfq"] = student._replace(lr_g=hp.gdfq_lr_g, betas=(0.5, 0.999))
        return trainings

    # ------------------------------------------------------------------ training
    def on_train_epoch_start(self) -> None:
        """Distillation begins with the ranges of ZeroQ's images."""
        super().on_train_epoch_start()
        stage = self.stage
        if stage.method == "zeroq_kd" and self.current_epoch == stage.start:
            calibrate(self.students[stage.key], [self.distilled_images()])

    def zeroq_kd_step(self, batch: dict[str, Any]) -> None:
        """An update of Q on as many distilled images as the batch has rows, whose labels are what P says."""
        student = self._student_in_training("frozen", observes=False)
        images = self.distilled_images()
        chosen = self.draw("distilled", "uniform", len(batch["index"])) * len(images)
        images = images[chosen.long()]
        with torch.no_grad():
            logits = self.float_network(images)
        self._distil(student, images, logits, logits.argmax(1))

    def gdfq_step(self, batch: dict[str, Any]) -> None:
        """An update of the generator, and one of Q on the same images, after the warm-up."""
        hp, stage, rows = self.hp, self.stage, len(batch["index"])
        warmup = self.current_epoch - stage.start < hp.gdfq_warmup_epochs
        student = self._student_in_training("frozen", observes=warmup)
        labels = (self.draw("labels", "uniform", rows) * hp.num_classes).long()
        with self.update(f"{stage.key}_generator") as minimize:
            fakes = self._fakes("generator", rows, labels)
            with record_norm_inputs(self.float_network) as norm_inputs:
                logits = self.float_network(fakes)
            terms = gdfq_generator_loss(logits, labels, norm_inputs, hp.gdfq_bns_weight)
            minimize(
                g_classification=terms["classification"],
                g_statistics=hp.gdfq_bns_weight * terms["statistics"],
            )
        fakes, logits = fakes.detach(), logits.detach()
        if warmup:
            with torch.no_grad():
                student(fakes)
            return
        self._distil(student, fakes, logits, labels)

    def _distil(self, student: nn.Module, images: Tensor, logits: Tensor, labels: Tensor) -> None:
        """An update of Q on images [B, C, H, W] with P's logits [B, K] and their classes [B]."""
        hp = self.hp
        with self.update(f"{self.stage.key}_student") as minimize:
            found = gdfq_student_loss(
                student(images), logits, labels, hp.gdfq_temperature, hp.gdfq_alpha
            )
            minimize(
                q_distillation=hp.gdfq_alpha * found["distillation"],
                q_classification=found["classification"],
            )

    # ------------------------------------------------------------------ evaluation
    def new_score(self) -> Metric:
        """Accuracy over the images that are of one of the classes."""
        return MulticlassAccuracy(self.hp.num_classes, average="micro", ignore_index=NO_CLASS)

    def judge(self, score: Metric, network: nn.Module, batch: dict[str, Any]) -> None:
        """Adds the logits of a batch with ``label``."""
        score.update(network(self.to_network(batch["image"])), batch["label"])

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        """What the quantized network of the first width says.

        Returns:
            Columns ``label`` and ``float_label`` (names, of the quantized and of the float network) and ``confidence``
            ([B], of the quantized one, in (0, 1]).
        """
        confidence, label = torch.softmax(self(batch["image"]), 1).max(1)
        names = self.teacher.class_names
        return {
            "label": [names[k] for k in label.tolist()],
            "confidence": confidence,
            "float_label": [names[k] for k in self.teacher(batch["image"]).argmax(1).tolist()],
        }

    # ------------------------------------------------------------------ pictures
    def pictures_of(self, generator: nn.Module, z: Tensor) -> Tensor:
        """GDFQ's go through the classes."""
        if not isinstance(generator, GDFQGenerator):
            return super().pictures_of(generator, z)
        return generator(z, torch.arange(len(z), device=z.device) % self.hp.num_classes)

    # ------------------------------------------------------------------ the float network
    def _get_teacher(self, data: Any) -> None:
        if not self.hp.pretrained:
            super()._get_teacher(data)
