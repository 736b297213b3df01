"""The methods that are compared: their names, how those that are trained are trained, and the readings of ZAQ."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

from lightning_modules.zaq.baselines import Width
from lightning_modules.zaq.losses import FeatureLoss

Baseline = Literal["rq", "dfq", "aciq", "zeroq", "mixed", "zeroq_kd", "gdfq", "ft"]
Trained = Literal["zaq", "zeroq_kd", "gdfq", "ft"]
"""In the order of their stages."""
BNMode = Literal["frozen", "train"]
GeneratorBatch = Literal["local", "global"]
RangeSource = Literal["generated", "batch_norms"]
Schedule = Literal["constant", "step", "cosine"]

ROWS = {
    "float": "float",
    "rq": "RQ, rounded only",
    "dfq": "DFQ",
    "aciq": "ACIQ, ranges from batch norms",
    "zeroq": "ZeroQ, ranges only",
    "mixed": "ZeroQ, bits for each layer",
    "zeroq_kd": "ZeroQ, distillation, last epoch",
    "gdfq": "GDFQ, last epoch",
    "zaq": "ZAQ, last epoch",
    "zaq_best": "ZAQ, best epoch on validation images",
    "ft": "FT with real data",
}
"""Rows of the table in the order in which they are printed."""

NEED_BATCH_NORMS = ("dfq", "aciq", "zeroq", "mixed", "zeroq_kd", "gdfq")

BEST_IS_NOT_ZERO_SHOT = (
    "the best epoch was chosen with labelled images: it is not zero-shot, and nothing else uses it"
)


@dataclass(frozen=True)
class Preset:
    """What the readings of the method differ in.

    Attributes:
        alpha: weight of the feature maps' discrepancy.
        beta: weight of P's activation in the generator's loss.
        feature_loss: how feature maps are compared.
        bn_mode: batch norms of Q use, and move, the statistics of generated batches (``train``), or keep P's.
        range_epochs: epochs in which activation ranges follow the generated images; None: all of them.
        bns_weight: weight of P's batch-norm statistics in the generator's loss.
        share_relu_ranges: one range for all calls of a ReLU module.
        reuse_fakes: one batch of images for all of Q's steps between two of the generator.
    """

    alpha: float
    beta: float
    feature_loss: FeatureLoss
    bn_mode: BNMode
    range_epochs: int | None
    bns_weight: float
    share_relu_ranges: bool
    reuse_fakes: bool


PRESETS = {
    "paper": Preset(0.1, 0.05, "crm", "train", None, 0.0, False, False),
    "released": Preset(1.0, 0.1, "scrm", "train", None, 0.0, True, False),
    "best": Preset(1.0, 0.1, "crm", "frozen", 1, 0.1, False, True),
}
"""``paper``: weights as others report them, the rest as in the released code. ``best``: ours."""


class Training(NamedTuple):
    """How a method is trained at a width.

    Attributes:
        epochs: of its stage.
        lr_q: learning rate of the quantized copy, for SGD with momentum 0.9.
        weight_decay: of the copy.
        nesterov: the momentum is Nesterov's.
        lr_g: learning rate of the generator, for Adam; None without one.
        betas: of the generator's Adam.
        decay_parts: the stage is cut in so many parts, after each of which ``step`` divides the rates by 10.
    """

    epochs: int
    lr_q: float
    weight_decay: float
    nesterov: bool = False
    lr_g: float | None = None
    betas: tuple[float, float] = (0.9, 0.999)
    decay_parts: int = 3


class Stage(NamedTuple):
    """Some epochs that belong to one method at one width."""

    method: Trained
    width: Width
    start: int
    epochs: int

    @property
    def key(self) -> str:
        """Name of its networks and optimizers."""
        return f"{self.method}_{self.width}"
