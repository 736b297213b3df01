"""ZAQ of a detector."""

from typing import Any, ClassVar

from torch import Tensor, nn
from torchmetrics import Metric

from lightning_modules.metrics.detection import DetectionAveragePrecision
from lightning_modules.supervised.detector import Detector
from lightning_modules.zaq.comparison import ComparedMethods
from lightning_modules.zaq.methods import Baseline


class MeanAveragePrecision(DetectionAveragePrecision):
    """The mean over the classes as the only value."""

    def compute(self) -> Tensor:  # type: ignore[override]
        """In [0, 1].

        Raises:
            ValueError: there was no object at all.
        """
        return super().compute()["map"].float()


class ZAQDetection(ComparedMethods):
    """ZAQ and its baselines on a :class:`~lightning_modules.supervised.Detector`; the table shows mean precisions.

    P and Q are compared in the class scores and the box offsets of all default boxes, each output by its mean, and in
    the feature maps at the ends of the backbone's stages (our choice: no code of the paper's detection was released).
    Further arguments and errors are those of :class:`~lightning_modules.zaq.game.QuantizationGame`; baselines
    that learn from the class of an image are refused.

    Args:
        num_classes: K, without the background; must be the data's.
        network: of P, see :class:`~lightning_modules.supervised.Detector`.
        image_size: side of the images; must be the data's.
        width: of P, if that is ``small``.
        score_threshold: probability from which on ``predict`` reports an object.
        **options: those of the game.
    """

    teacher_class = Detector
    teacher: Detector
    truth = ("boxes", "object_labels")
    refused: ClassVar[dict[Baseline, str]] = {
        "gdfq": "GDFQ draws a class for every image and has P classify it, and a detector's images have none",
        "zeroq_kd": "it distils the class of an image, and a detector's images have none",
        "mixed": "sensitivities compare the class of an image, and a detector's images have none",
    }
    score_name = "mean average precision at IoU 0.5"
    class_axis = 2

    def __init__(
        self,
        num_classes: int = 20,
        network: str | nn.Module = "mobilenet_v2",
        image_size: int = 320,
        width: int = 16,
        score_threshold: float = 0.5,
        **options: Any,
    ) -> None:
        super().__init__(num_classes, network, image_size=image_size, width=width, **options)

    # ------------------------------------------------------------------ what P does
    def teacher_options(self) -> dict[str, Any]:
        """What ``predict`` reports."""
        return {"score_threshold": self.hp.score_threshold}

    def compared(self, outputs: dict[str, Tensor]) -> list[Tensor]:
        """Class scores and box offsets."""
        return [*outputs.values()]

    def ft_losses(self, student: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
        """SSD's loss."""
        terms = self.teacher.loss_terms(batch, student)
        return {f"q_{name}": loss for name, loss in terms.items()}

    # ------------------------------------------------------------------ evaluation
    def new_score(self) -> Metric:
        """Mean average precision by the rules of PASCAL VOC."""
        return MeanAveragePrecision(self.hp.num_classes)

    def judge(self, score: Metric, network: nn.Module, batch: dict[str, Any]) -> None:
        """Adds the objects that are found in a batch with ``boxes`` and ``object_labels``."""
        assert isinstance(score, DetectionAveragePrecision)
        self.teacher.judge(score, batch, network)

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        """The objects that the quantized network of the first width finds in every image.

        Returns:
            ``count`` and ``objects`` of :meth:`lightning_modules.supervised.Detector.columns`, and ``float_count`` and
            ``float_objects``, those of the float network.
        """
        of_float = self.teacher.columns(batch)
        columns = self.teacher.columns(batch, self.first_student)
        return columns | {f"float_{name}": values for name, values in of_float.items()}
