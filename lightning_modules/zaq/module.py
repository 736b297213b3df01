"""ZAQ: a quantized network fine-tuned against a generator, without data; and what it is compared with, in one run.

Paper: Liu, Zhang, Wang, "Zero-shot Adversarial Quantization", CVPR 2021. The paper itself could not be read: what is
said of it here was reported by others and is not verified. Facts of the released code were read in it.

Order of things:

1. The float network P comes from a checkpoint, or is trained on the training images before the run begins.
2. For every width, the game: K steps of the quantized copy Q, which minimises its distance from P on generated images,
   per step of the generator, which maximises it. No image of the data is in reach: the batches hold none.
3. For every width, the baselines that train: on ZeroQ's distilled images, GDFQ on generated images, FT on training
   images, an upper bound.
4. In the test the baselines that do not train (RQ, DFQ, ACIQ, ZeroQ) are made of P, and all are compared.
"""

import copy
import warnings
from collections.abc import Callable, Sequence
from contextvars import Context
from dataclasses import dataclass
from math import cos, pi
from typing import Any, Literal, NamedTuple, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.optim import SGD, Adam, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy

from lightning_modules.adversarial import AdversarialModule
from lightning_modules.checkpoints import load_frozen
from lightning_modules.nn.norm import Norm
from lightning_modules.randomness import keyed_generator
from lightning_modules.supervised.classifier import Classifier
from lightning_modules.supervised.judge import fit_judge
from lightning_modules.zaq.attach import (
    Placement,
    activation_quantizers,
    calibrate,
    demand_unmoved,
    evaluation_state,
    forward_with_features,
    observe_ranges,
)
from lightning_modules.zaq.baselines import (
    Quantizer,
    Width,
    aciq,
    dfq,
    has_batch_norms,
    mixed_precision,
    parse_width,
    round_to_nearest,
    weight_bits,
    weight_sensitivities,
    zeroq,
)
from lightning_modules.zaq.gdfq import gdfq_generator_loss, gdfq_student_loss
from lightning_modules.zaq.generators import GDFQGenerator, ZAQGenerator
from lightning_modules.zaq.layer_weights import LayerWeightEMA
from lightning_modules.zaq.losses import (
    FeatureLoss,
    RelationMode,
    zaq_generator_loss,
    zaq_student_loss,
)
from lightning_modules.zaq.observers import Observer
from lightning_modules.zaq.quantizers import STE, QuantSpec
from lightning_modules.zaq.zeroq import distill_data, network_statistics_loss, record_norm_inputs

Baseline = Literal["rq", "dfq", "aciq", "zeroq", "mixed", "zeroq_kd", "gdfq", "ft"]
Trained = Literal["zaq", "zeroq_kd", "gdfq", "ft"]
BNMode = Literal["frozen", "train"]
Decay = Literal["constant", "step", "cosine"]


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

BEST_IS_NOT_ZERO_SHOT = (
    "the best epoch was chosen with labelled images: it is not zero-shot, and nothing else uses it"
)
NEED_BATCH_NORMS = ("dfq", "aciq", "zeroq", "mixed", "zeroq_kd", "gdfq")
DISTILLING = ("zeroq_kd", "gdfq")
"""Methods whose Q learns by GDFQ's loss, at its rate."""


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


class ZAQ(AdversarialModule):
    """A float network, and for every width its quantized copies with their generators.

    Images of a DataModule are in [0, 1]; generated ones are normalised already.

    Args:
        num_classes: K; must be the data's.
        network: of P, see :class:`~lightning_modules.supervised.base.SupervisedModule`.
        in_channels: channels P takes.
        image_size: side of the images; must be the data's.
        width: of P, if that is ``small``.
        norm: of P, if that is ``small``.
        teacher: checkpoint of a :class:`~lightning_modules.supervised.Classifier` with this network. None: P is trained
            on the training images before the first epoch, equally on every process.
        pretrained: P is torchvision's network with torchvision's weights.
        weights_path: their file; without it the one in torch.hub's folder.
        teacher_steps: batches of 64 of P's training.
        teacher_lr: its learning rate at the start, for Adam.
        widths: bits like ``W4A4``, each a game of its own; the first one is what ``predict`` uses.
        baselines: methods to compare with: ``rq``, ``dfq``, ``aciq``, ``zeroq``, ``mixed``, ``zeroq_kd``, ``gdfq``,
            ``ft``.
        preset: ``paper``, ``released`` or ``best``, see :data:`PRESETS`; the next eight arguments override it.
        alpha, beta, feature_loss, bn_mode, range_epochs, bns_weight, share_relu_ranges, reuse_fakes: see
            :class:`Preset`. ``range_epochs`` of 0 stands for all epochs.
        relation_mode: channel relations over the ``batch`` (paper) or of each ``sample``.
        taps: modules of P whose outputs are compared, from the first to the last; None takes the network's own.
        epochs: of a game.
        iterations: batches of an epoch; one is ``q_steps`` steps of Q and one of the generator.
        q_steps: K.
        latent_dim, ngf, up_blocks: see :class:`~lightning_modules.zaq.generators.ZAQGenerator`.
        lr_q: learning rate of Q at the start, for SGD with momentum 0.9 (released code: 0.1).
        weight_decay: of Q.
        lr_g: learning rate of the generator, for Adam.
        lr_decay: ``step`` divides both by 10 at one and two thirds of a game (released code), ``cosine`` takes them
            to 0.
        clip_q: largest gradient norm of Q.
        generator_batch: batch norms of a generator see the images of this process (``local``), or those of all
            (``global``): each process generates everything and takes its share.
        observer: how ranges follow the batches of what is trained, GDFQ too (whose released code takes ``ema``), see
            :class:`~lightning_modules.zaq.observers.ActivationQuantizer`.
        percentile: of the observer of that name.
        placement: activations are rounded after ReLUs (``relu``, released code) or everywhere (``full``: what integer
            kernels need).
        symmetric: weight codes around 0.
        per_channel: a scale for every output channel.
        ste: gradient of the rounding.
        first_bits, last_bits: weight bits of the first and last layer, where they differ.
        overrides: bits by name of a layer or activation, null for floating point.
        gdfq_epochs: of GDFQ at a width.
        gdfq_warmup_epochs: the first ones of these train the generator alone and observe ranges.
        gdfq_latent_dim: of its generator, which has ``ngf`` and ``up_blocks`` in common with ZAQ's.
        gdfq_lr_q, gdfq_lr_g: learning rates, with Nesterov's momentum and Adam (0.5, 0.999).
        gdfq_bns_weight, gdfq_temperature, gdfq_alpha: see :mod:`~lightning_modules.zaq.gdfq`.
        ft_epochs: of the fine-tuning on training images, with ``iterations`` batches each as well.
        ft_lr: its learning rate, with ``weight_decay`` and momentum 0.9.
        zeroq_images, zeroq_steps: see :func:`~lightning_modules.zaq.zeroq.distill_data`.
        zeroq_kd_epochs: of the distillation of P into Q on these images (ours), with the loss and the rate of GDFQ's Q.

    Raises:
        ValueError: for an impossible argument.
        FileNotFoundError: the weights that were asked for are not on this machine.
    """

    bar_terms = ("q_output", "g_output")

    def __init__(
        self,
        num_classes: int = 10,
        network: str | nn.Module = "resnet20",
        in_channels: int = 3,
        image_size: int = 32,
        width: int = 32,
        norm: Norm = "batch",
        teacher: str | None = None,
        pretrained: bool = False,
        weights_path: str | None = None,
        teacher_steps: int = 600,
        teacher_lr: float = 3e-3,
        widths: Sequence[str] = ("W4A4",),
        baselines: Sequence[Baseline] = (),
        preset: Literal["paper", "released", "best"] = "best",
        alpha: float | None = None,
        beta: float | None = None,
        feature_loss: FeatureLoss | None = None,
        bn_mode: BNMode | None = None,
        range_epochs: int | None = None,
        bns_weight: float | None = None,
        share_relu_ranges: bool | None = None,
        reuse_fakes: bool | None = None,
        relation_mode: RelationMode = "batch",
        taps: Sequence[str] | None = None,
        epochs: int = 300,
        iterations: int = 60,
        q_steps: int = 5,
        latent_dim: int = 256,
        ngf: int = 64,
        up_blocks: int = 2,
        lr_q: float = 0.1,
        weight_decay: float = 5e-4,
        lr_g: float = 1e-3,
        lr_decay: Decay = "step",
        clip_q: float | None = None,
        generator_batch: Literal["local", "global"] = "local",
        observer: Observer = "minmax",
        percentile: float = 99.99,
        placement: Placement = "relu",
        symmetric: bool = False,
        per_channel: bool = True,
        ste: STE = "identity",
        first_bits: int | None = None,
        last_bits: int | None = None,
        overrides: dict[str, int | None] | None = None,
        gdfq_epochs: int = 400,
        gdfq_warmup_epochs: int = 4,
        gdfq_latent_dim: int = 100,
        gdfq_lr_q: float = 1e-4,
        gdfq_lr_g: float = 1e-3,
        gdfq_bns_weight: float = 0.1,
        gdfq_temperature: float = 20.0,
        gdfq_alpha: float = 1.0,
        ft_epochs: int = 100,
        ft_lr: float = 0.1,
        zeroq_images: int = 64,
        zeroq_steps: int = 500,
        zeroq_kd_epochs: int = 100,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=[] if isinstance(network, str) else ["network"])
        if preset not in PRESETS:
            raise ValueError(f"unknown preset={preset!r}; choose one of {', '.join(PRESETS)}")
        self.widths = [parse_width(text) for text in widths]
        self._check_arguments()
        # In a context of its own: the command line would give it this module's hyper-parameters.
        self.teacher = Context().run(self._classifier, network, pretrained, weights_path)
        self.teacher.eval().requires_grad_(False)
        self._check_batch_norms()
        self.taps = self._chosen_taps()
        self.quantizer = Quantizer(
            QuantSpec(
                symmetric=symmetric, narrow_range=symmetric, per_channel=per_channel, ste=ste
            ),
            observer,
            percentile,
            placement,
            bool(self.setting("share_relu_ranges")),
            first_bits,
            last_bits,
            overrides or {},
        )
        self.stages = self._stages()
        self._build_networks()
        self.best_accuracy: Tensor
        self.register_buffer("best_accuracy", torch.full((len(self.widths),), torch.nan))
        self.last_accuracy: Tensor
        self.register_buffer("last_accuracy", torch.full((len(self.stages),), torch.nan))
        self.layer_distances: Tensor | None = None
        """Mean [L] over Q's steps of the last batch; None where no layers are weighted."""
        self.row_titles = ROWS
        self.table_notes = [BEST_IS_NOT_ZERO_SHOT]
        self.rows = [row for row in ROWS if row in ("float", "zaq", "zaq_best", *baselines)]
        self.column_names = [str(w) for w in self.widths]
        self.val_accuracy = MulticlassAccuracy(num_classes, average="micro", ignore_index=-1)
        self.test_accuracy = nn.ModuleDict(
            {
                f"{row}_{w}": MulticlassAccuracy(num_classes, average="micro", ignore_index=-1)
                for row in self.rows
                for w in self.widths
            }
        )
        self.allocated_bits: dict[str, dict[str, int]] = {}
        """Of mixed precision: bits by layer, by width; known after a test."""
        self._distilled: Tensor | None = None
        self._compared: dict[str, nn.Module] = {}
        self._before_evaluation: dict[str, Tensor] = {}
        # P and the copies that are not being trained are in evaluation mode by design.
        warnings.filterwarnings("ignore", r".*module\(s\) in eval mode at the start of training")
        # The schedulers of the stages to come are stepped as well, to where their stage begins.
        warnings.filterwarnings("ignore", r"Detected call of `lr_scheduler.step\(\)` before")

    # ------------------------------------------------------------------ construction
    def _classifier(
        self,
        network: str | nn.Module,
        pretrained: bool = False,
        weights_path: str | None = None,
    ) -> Classifier:
        hp = self.hp
        return Classifier(
            hp.num_classes,
            network=network,
            in_channels=hp.in_channels,
            width=hp.width,
            norm=hp.norm,
            pretrained=pretrained,
            weights_path=weights_path,
        )

    def _check_arguments(self) -> None:
        hp = self.hp
        least = {"epochs": 1, "iterations": 1, "q_steps": 1, "teacher_steps": 1, "image_size": 1}
        least |= {"gdfq_epochs": 1, "gdfq_warmup_epochs": 1, "ft_epochs": 1, "zeroq_kd_epochs": 1}
        for name, value in least.items():
            if hp[name] < value:
                raise ValueError(f"{name}={hp[name]} must be at least {value} (--model.{name})")
        if not self.widths or len(set(self.widths)) < len(self.widths):
            raise ValueError(
                f"widths={list(hp.widths)} must name each width once, and at least one"
            )
        known = get_args(Baseline)
        for name in hp.baselines:
            if name not in known:
                raise ValueError(f"unknown baseline {name!r}; choose from {', '.join(known)}")
        for name in ("alpha", "beta", "bns_weight"):
            if self.setting(name) < 0:
                raise ValueError(f"{name}={self.setting(name)} must not be negative")
        if hp.range_epochs is not None and hp.range_epochs < 0:
            raise ValueError(f"range_epochs={hp.range_epochs} must not be negative; 0 for always")
        if hp.pretrained and hp.teacher is not None:
            raise ValueError("P is either --model.teacher or --model.pretrained, not both")

    @property
    def float_network(self) -> nn.Module:
        """P, which takes normalised images."""
        return cast(nn.Module, self.teacher.network)

    def _check_batch_norms(self) -> None:
        if has_batch_norms(self.float_network):
            return
        lost = [name for name in NEED_BATCH_NORMS if name in self.hp.baselines]
        if self.setting("bns_weight"):
            lost.append("bns_weight")
        if lost:
            raise ValueError(
                f"{', '.join(lost)} would learn from the batch norms of P, and it has none with running statistics; "
                "leave them out of --model.baselines and set --model.bns_weight 0, or take another network"
            )

    def _chosen_taps(self) -> tuple[str, ...]:
        taps = self.hp.taps
        if taps is None:
            taps = getattr(self.float_network, "taps", None)
        if taps is None:
            stages = [f"layer{number}" for number in range(1, 5)]  # torchvision's ResNets
            taps = stages if all(hasattr(self.float_network, name) for name in stages) else None
        if not taps:
            names = [name for name, _ in self.float_network.named_children()]
            raise ValueError(
                f"{type(self.float_network).__name__} does not say which of its modules give feature maps; name some "
                f"by --model.taps (it has {', '.join(names)} and their parts)"
            )
        return tuple(taps)

    def _stages(self) -> list[Stage]:
        hp = self.hp
        epochs: dict[Trained, int] = {
            "zaq": hp.epochs,
            "zeroq_kd": hp.zeroq_kd_epochs,
            "gdfq": hp.gdfq_epochs,
            "ft": hp.ft_epochs,
        }
        stages, start = [], 0
        for method, length in epochs.items():
            if method != "zaq" and method not in hp.baselines:
                continue
            for width in self.widths:
                stages.append(Stage(method, width, start, length))
                start += length
        return stages

    def _build_networks(self) -> None:
        hp = self.hp
        size: dict[str, Any] = {
            "ngf": hp.ngf,
            "channels": hp.in_channels,
            "img_size": hp.image_size,
            "up_blocks": hp.up_blocks,
        }
        self.students, self.generators, self.best = (nn.ModuleDict() for _ in range(3))
        self.layer_weights = nn.ModuleDict()
        for stage in self.stages:
            taps = self.taps if stage.method == "zaq" else ()
            self.students[stage.key] = self.quantizer.attach(
                self.float_network, stage.width, taps=taps
            )
            if stage.method == "zaq":
                self.generators[stage.key] = ZAQGenerator(hp.latent_dim, **size)
                self.layer_weights[stage.key] = LayerWeightEMA(len(self.taps))
                self.best[stage.key] = self.quantizer.attach(self.float_network, stage.width)
                self.best[stage.key].requires_grad_(False)
            elif stage.method == "gdfq":
                self.generators[stage.key] = GDFQGenerator(
                    hp.num_classes, hp.gdfq_latent_dim, **size
                )

    def setting(self, name: str) -> Any:
        """An argument, or what the preset says where it was not given."""
        given = self.hp[name]
        return getattr(PRESETS[self.hp.preset], name) if given is None else given

    # ------------------------------------------------------------------ schedule
    @property
    def total_epochs(self) -> int:
        """Epochs of all methods at all widths together."""
        return self.stages[-1].start + self.stages[-1].epochs

    def stage_at(self, epoch: int) -> Stage:
        """Whose epoch it is."""
        return next((s for s in self.stages if epoch < s.start + s.epochs), self.stages[-1])

    @property
    def stage(self) -> Stage:
        """Whose turn it is."""
        return self.stage_at(self.current_epoch)

    def batches_in_epoch(self, epoch: int) -> int:
        """The same for all, whatever the size of the data."""
        return self.hp.iterations

    def needs_images(self, epoch: int) -> bool:
        """Whether an epoch learns from training images; a DataModule gives none where it does not."""
        return self.stage_at(epoch).method == "ft"

    def build_optimizers(self) -> dict[str, Optimizer]:
        """SGD for every copy, Adam for every generator."""
        hp = self.hp
        rates = {"zaq": hp.lr_q, "zeroq_kd": hp.gdfq_lr_q, "gdfq": hp.gdfq_lr_q, "ft": hp.ft_lr}
        optimizers: dict[str, Optimizer] = {}
        for stage in self.stages:
            gdfq = stage.method in DISTILLING
            optimizers[f"{stage.key}_student"] = SGD(
                self.students[stage.key].parameters(),
                rates[stage.method],
                momentum=0.9,
                nesterov=gdfq,
                weight_decay=1e-4 if gdfq else hp.weight_decay,
            )
            if stage.key in self.generators:
                optimizers[f"{stage.key}_generator"] = Adam(
                    self.generators[stage.key].parameters(),
                    hp.gdfq_lr_g if gdfq else hp.lr_g,
                    betas=(0.5, 0.999) if gdfq else (0.9, 0.999),
                )
        return optimizers

    def build_schedulers(self, optimizers: dict[str, Optimizer]) -> list[LRScheduler]:
        """Each rate falls over the epochs of its own stage."""
        stages = {stage.key: stage for stage in self.stages}
        return [
            LambdaLR(optimizer, self._decay(stages[name.rpartition("_")[0]]))
            for name, optimizer in optimizers.items()
        ]

    def _decay(self, stage: Stage) -> Callable[[int], float]:
        # Released code: at 100 and 200 of 300 epochs, of GDFQ at 100, 200 and 300 of 400.
        parts = 4 if stage.method in DISTILLING else 3

        def factor(epoch: int) -> float:
            done = min(max(epoch - stage.start, 0), stage.epochs - 1) / stage.epochs
            match self.hp.lr_decay:
                case "step":
                    return 0.1 ** int(parts * done + 1e-9)
                case "cosine":
                    return (1 + cos(pi * done)) / 2
            return 1.0

        return factor

    # ------------------------------------------------------------------ the float network
    def setup(self, stage: str) -> None:
        """Checks the data, and gets P where no checkpoint of this module brings it.

        Raises:
            ValueError: the data have images of another size or other classes, or P's checkpoint holds another network.
        """
        data = getattr(self.trainer, "datamodule", None)
        size = getattr(data, "image_size", None)
        if size is not None and size != self.hp.image_size:
            raise ValueError(
                f"the model has image_size={self.hp.image_size}, the data have {size}; set --model.image_size {size} "
                f"or --data.image_size {self.hp.image_size}"
            )
        self.teacher.setup(stage)
        if stage == "fit":
            trainer: Any = self.trainer
            trainer.reload_dataloaders_every_n_epochs = 1
            if self.trainer.ckpt_path is None:
                self._get_teacher(data)

    def _get_teacher(self, data: Any) -> None:
        hp = self.hp
        if hp.pretrained:
            return
        trained: nn.Module
        if hp.teacher is not None:
            trained = load_frozen(hp.teacher, "--model.teacher")
            if not isinstance(trained, Classifier):
                raise ValueError(
                    f"{hp.teacher} holds a {type(trained).__name__}; give a checkpoint of a Classifier by "
                    "--model.teacher FILE"
                )
        else:
            bank = getattr(data, "train", None)
            if bank is None:
                raise ValueError(
                    "there is no float network: give its checkpoint by --model.teacher FILE, or training images "
                    "that it can be trained on"
                )
            trained = fit_judge(  # equal on all processes
                self._untrained_classifier,
                bank,
                hp.teacher_steps,
                batch_size=64,
                lr=hp.teacher_lr,
                keys=("teacher",),
                device=self.trainer.strategy.root_device,
                description="float network",
            )
        try:
            state = cast(nn.Module, trained.network).cpu().state_dict()
            self.float_network.load_state_dict(state)
        except RuntimeError as error:
            raise ValueError(
                f"{hp.teacher} does not hold the network {type(self.float_network).__name__} with "
                f"{hp.num_classes} classes and {hp.in_channels} channels; set --model.network, --model.num_classes, "
                f"--model.in_channels and --model.width as it was trained ({str(error).splitlines()[1].strip()})"
            ) from error

    def _untrained_classifier(self) -> Classifier:
        network = self.hp.get("network")
        if network is None:  # a module of the user's own
            network = copy.deepcopy(self.float_network).requires_grad_(True)
        return self._classifier(network)

    def train(self, mode: bool = True) -> "ZAQ":
        """P and the quantized copies stay in evaluation mode; a step puts the copy it trains into another one."""
        super().train(mode)
        for part in (self.teacher, self.students, self.best):
            part.eval()
        return self

    def to_network(self, images: Tensor) -> Tensor:
        """Images [B, C, H, W] in [0, 1] as the networks take them."""
        return self.teacher.to_network(images)

    # ------------------------------------------------------------------ training
    def on_train_epoch_start(self) -> None:
        """A stage begins with P's weights and statistics."""
        stage = self.stage
        if self.current_epoch == stage.start:
            student = self.students[stage.key]
            state = self.float_network.state_dict()
            student.load_state_dict(state, strict=False)
            observe_ranges(student)
            if stage.method == "zeroq_kd":
                calibrate(student, [self.distilled_images()])

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """One batch of the current method; that of ZAQ and GDFQ holds ``index`` alone."""
        self.layer_distances = None
        rows = len(batch["index"])
        match self.stage.method:
            case "zaq":
                self.zaq_step(rows)
            case "zeroq_kd":
                self.zeroq_kd_step(rows)
            case "gdfq":
                self.gdfq_step(rows)
            case "ft":
                self.ft_step(self.to_network(batch["image"]), batch["label"])

    def zaq_step(self, rows: int) -> None:
        """K updates of Q and one of the generator, with so many generated images each (on this process)."""
        hp, stage = self.hp, self.stage
        student = self._student_in_training(self.setting("bn_mode"), self._observes())
        alpha, distances = self.setting("alpha"), []
        fakes = None
        for step in range(hp.q_steps):
            if fakes is None or not self.setting("reuse_fakes"):
                with torch.no_grad():
                    fakes = self._fakes(f"student {step}", rows)
                    of_p = forward_with_features(self.float_network, fakes, self.taps)
            with self.update(f"{stage.key}_student") as minimize:
                of_q = forward_with_features(student, fakes, self.taps)
                terms = zaq_student_loss(*_side_by_side(of_p, of_q), alpha, **self._comparison())
                minimize(q_output=terms["output"], q_feature=alpha * terms["feature"])
            distances.append(terms["distances"])
        if self._weights_layers:
            self.layer_distances = torch.stack(distances).mean(0)
        with self.update(f"{stage.key}_generator") as minimize:
            minimize(**self._generator_losses(student, self._fakes("generator", rows)))

    def _generator_losses(self, student: fx.GraphModule, fakes: Tensor) -> dict[str, Tensor]:
        alpha, beta, bns = (self.setting(name) for name in ("alpha", "beta", "bns_weight"))
        losses = {}
        if bns:
            with record_norm_inputs(self.float_network) as norm_inputs:
                of_p = forward_with_features(self.float_network, fakes, self.taps)
            losses["g_statistics"] = bns * network_statistics_loss(norm_inputs, "gdfq")
        else:
            of_p = forward_with_features(self.float_network, fakes, self.taps)
        of_q = forward_with_features(student, fakes, self.taps)
        terms = zaq_generator_loss(*_side_by_side(of_p, of_q), alpha, beta, **self._comparison())
        losses["g_output"] = -terms["output"]
        losses["g_feature"] = -alpha * terms["feature"]
        losses["g_activation"] = beta * terms["activation"]
        return losses

    def _comparison(self) -> dict[str, Any]:
        weights = None
        if self._weights_layers:
            weights = cast(LayerWeightEMA, self.layer_weights[self.stage.key]).weights
        return {
            "weights": weights,
            "kind": self.setting("feature_loss"),
            "mode": self.hp.relation_mode,
            "sync": True,
        }

    @property
    def _weights_layers(self) -> bool:
        # The released code, whose comparison scrm is, has no weights.
        return self.setting("feature_loss") in ("crm", "gram")

    @property
    def layer_weight_ema(self) -> LayerWeightEMA | None:
        """The weights of the current game; None where no layers are weighted."""
        stage = self.stage
        if stage.method != "zaq" or not self._weights_layers:
            return None
        return cast(LayerWeightEMA, self.layer_weights[stage.key])

    def gdfq_step(self, rows: int) -> None:
        """An update of the generator, and one of Q on the same images, after the warm-up."""
        hp, stage = self.hp, self.stage
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
        with self.update(f"{stage.key}_student") as minimize:
            found = gdfq_student_loss(
                student(fakes), logits, labels, hp.gdfq_temperature, hp.gdfq_alpha
            )
            minimize(
                q_distillation=hp.gdfq_alpha * found["distillation"],
                q_classification=found["classification"],
            )

    def zeroq_kd_step(self, rows: int) -> None:
        """An update of Q on so many of the distilled images, whose labels are what P says."""
        hp = self.hp
        student = self._student_in_training("frozen", observes=False)
        images = self.distilled_images()
        images = images[(self.draw("distilled", "uniform", rows) * len(images)).long()]
        with torch.no_grad():
            logits = self.float_network(images)
        with self.update(f"{self.stage.key}_student") as minimize:
            found = gdfq_student_loss(
                student(images), logits, logits.argmax(1), hp.gdfq_temperature, hp.gdfq_alpha
            )
            minimize(
                q_distillation=hp.gdfq_alpha * found["distillation"],
                q_classification=found["classification"],
            )

    def distilled_images(self) -> Tensor:
        """ZeroQ's images, made when they are first needed: they depend on P and the seed alone, on every process."""
        if self._distilled is None:
            hp = self.hp
            self._distilled = distill_data(
                self.float_network,
                hp.zeroq_images,
                (hp.in_channels, hp.image_size, hp.image_size),
                hp.zeroq_steps,
                device=self.device,
                progress=self.trainer.is_global_zero,
            )
        return self._distilled.to(self.device)

    def ft_step(self, images: Tensor, labels: Tensor) -> None:
        """An update of Q on normalised training images [B, C, H, W] and labels [B]."""
        student = self._student_in_training(self.setting("bn_mode"), self._observes())
        with self.update(f"{self.stage.key}_student") as minimize:
            minimize(q_classification=F.cross_entropy(student(images), labels))

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Clips Q's gradients."""
        if self.hp.clip_q is not None and isinstance(optimizer, SGD):
            self.clip_gradients(
                optimizer, gradient_clip_val=self.hp.clip_q, gradient_clip_algorithm="norm"
            )

    def _observes(self) -> bool:
        epochs = self.setting("range_epochs")
        return not epochs or self.current_epoch - self.stage.start < epochs

    def _student_in_training(self, bn_mode: BNMode, observes: bool) -> fx.GraphModule:
        """The current copy in the mode of a step; ``frozen`` is evaluation mode but for the observers."""
        student = cast(fx.GraphModule, self.students[self.stage.key])
        student.train(bn_mode == "train")
        observe_ranges(student, observes)
        for quantizer in activation_quantizers(student).values():
            quantizer.train()
        return student

    def _fakes(self, purpose: str, rows: int, labels: Tensor | None = None) -> Tensor:
        """This process's images [rows, C, H, W] of the generator of the current stage."""
        generator = self.generators[self.stage.key]
        latent_dim = cast(int, generator.latent_dim)
        world, rank = self.trainer.world_size, self.trainer.global_rank
        if self.hp.generator_batch == "local" or world == 1:
            z = self.draw(f"latent {purpose}", "normal", rows, latent_dim)
            return generator(z) if labels is None else generator(z, labels)
        mine = slice(rank * rows, (rank + 1) * rows)
        keys: tuple[int | str, ...] = (f"latent {purpose}", *self._draw_position)
        source = keyed_generator(*keys, device=self.device)
        dtype: Any = self.dtype
        z = torch.randn(world * rows, latent_dim, generator=source, device=self.device, dtype=dtype)
        if labels is None:
            return generator(z)[mine]
        everyone = self.all_gather(labels)
        assert isinstance(everyone, Tensor)
        return generator(z, everyone.flatten())[mine]

    # ------------------------------------------------------------------ evaluation
    def on_validation_start(self) -> None:
        """Remembers the copy that is about to be judged."""
        self._before_evaluation = evaluation_state(self.students)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Judges the current copy."""
        logits = self.students[self.stage.key](self.to_network(batch["image"]))
        self.val_accuracy.update(logits, batch["label"])

    def on_validation_epoch_end(self) -> None:
        """Logs ``val/METHOD/WIDTH`` and keeps the best epoch of a game, which only its row of the table uses.

        Raises:
            RuntimeError: the images have moved a range, a running statistic or a weight.
        """
        demand_unmoved(self.students, self._before_evaluation)
        self._before_evaluation = {}
        stage, accuracy = self.stage, self.val_accuracy.compute()
        self.val_accuracy.reset()
        if self.trainer.sanity_checking:
            return
        self.last_accuracy[self.stages.index(stage)] = accuracy
        # Those of earlier stages too: a run that was resumed since would not know them.
        for known, value in zip(self.stages, self.last_accuracy, strict=True):
            if not value.isnan():
                self.log(f"val/{known.method}/{known.width}", value)
        place = self.widths.index(stage.width)
        best = self.best_accuracy[place]
        if stage.method == "zaq" and (best.isnan() or accuracy > best):
            self.best_accuracy[place] = accuracy
            state = self.students[stage.key].state_dict()
            kept = {name: value for name, value in state.items() if "feature_taps" not in name}
            self.best[stage.key].load_state_dict(kept)

    def on_test_start(self) -> None:
        """Makes the baselines that are not trained."""
        self._compared = self._networks_to_compare()
        self._before_evaluation = evaluation_state(nn.ModuleDict(self._compared))

    @property
    def ready_rows(self) -> list[str]:
        """Rows of the table with at least one number by now."""
        return [row for row in self.rows if any(self._is_ready(row, w) for w in self.widths)]

    def _is_ready(self, row: str, width: Width) -> bool:
        networks = self.best if row == "zaq_best" else self.students
        key = f"zaq_{width}" if row == "zaq_best" else f"{row}_{width}"
        if key not in networks:
            return row != "zaq_best"
        return all(q.has_range for q in activation_quantizers(networks[key]).values())

    def _networks_to_compare(self) -> dict[str, nn.Module]:
        hp, network = self.hp, self.float_network
        shape = (hp.in_channels, hp.image_size, hp.image_size)
        free: dict[str, Callable[[Width], nn.Module]] = {
            "rq": lambda width: round_to_nearest(network, width, self.quantizer, shape),
            "dfq": lambda width: dfq(network, width, self.quantizer, shape),
            "aciq": lambda width: aciq(network, width, self.quantizer, shape),
            "zeroq": lambda width: zeroq(network, width, self.quantizer, self.distilled_images()),
            "mixed": lambda width: mixed_precision(
                network, width, self.quantizer, self.distilled_images(), sensitivities
            ),
        }
        found: dict[str, nn.Module] = {}
        # Networks that are made in inference mode could not be exported.
        with torch.inference_mode(False), torch.no_grad():
            if "mixed" in self.rows:
                images = self.distilled_images()
                sensitivities = weight_sensitivities(network, self.quantizer, images)
            for row in self.ready_rows:
                for width in self.widths:
                    key = f"{row}_{width}"
                    if not self._is_ready(row, width):
                        continue
                    if row == "float":
                        found[key] = network
                    elif row == "zaq_best":
                        found[key] = self.best[f"zaq_{width}"]
                    elif row in free:
                        found[key] = free[row](width)
                        if row == "mixed":
                            self.allocated_bits[str(width)] = weight_bits(found[key])
                    else:
                        found[key] = self.students[key]
        return found

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Feeds every cell of the table."""
        images = self.to_network(batch["image"])
        of_float = self.float_network(images)
        for key, network in self._compared.items():
            logits = of_float if network is self.float_network else network(images)
            cast(Metric, self.test_accuracy[key]).update(logits, batch["label"])

    def on_test_epoch_end(self) -> None:
        """Logs ``test/METHOD/WIDTH``, accuracies in [0, 1].

        Raises:
            RuntimeError: the images have moved a range, a running statistic or a weight.
        """
        demand_unmoved(nn.ModuleDict(self._compared), self._before_evaluation)
        self._before_evaluation = {}
        for key in self._compared:
            metric = cast(Metric, self.test_accuracy[key])
            row, _, width = key.rpartition("_")
            self.log(f"test/{row}/{width}", metric.compute())
            metric.reset()

    def deployable_networks(self) -> dict[str, fx.GraphModule]:
        """ZAQ's quantized networks of the last epoch by their width; they take normalised images."""
        return {
            str(width): cast(fx.GraphModule, self.students[f"zaq_{width}"])
            for width in self.widths
            if self._is_ready("zaq", width)
        }

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, K] of the quantized network, of the first width, for images [B, C, H, W] in [0, 1]."""
        return self.students[f"zaq_{self.widths[0]}"](self.to_network(images))

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

    @torch.no_grad()
    def image_grid(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Rows of pictures for :class:`callbacks.ImageGrid`."""
        pictures = {}
        for key, generator in self.generators.items():
            if (
                not key.endswith(str(self.stage.width))
                or self.stage_of(key).start > self.stage.start
            ):
                continue
            count = len(batch["index"])
            z = torch.randn(count, cast(int, generator.latent_dim)).to(self.best_accuracy)
            labels = torch.arange(count, device=self.device) % self.hp.num_classes
            fakes = generator(z) if key.startswith("zaq") else generator(z, labels)
            title = f"generated, {key.replace('_', ' ')}"
            pictures[title] = self._to_pixels(fakes)
        return pictures if "image" not in batch else {"data": batch["image"], **pictures}

    def stage_of(self, key: str) -> Stage:
        """The stage with these networks."""
        return next(stage for stage in self.stages if stage.key == key)

    def _to_pixels(self, fakes: Tensor) -> Tensor:
        if self.teacher.statistics is not None:
            mean, std = (fakes.new_tensor(v).view(-1, 1, 1) for v in self.teacher.statistics)
            fakes = fakes * std + mean
        return fakes.clamp(0, 1)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """P comes with the checkpoint."""
        super().on_load_checkpoint(checkpoint)
        self.teacher._missing_weights = None


def _side_by_side(
    of_p: tuple[Any, list[Tensor]], of_q: tuple[Any, list[Tensor]]
) -> tuple[Any, Any, list[Tensor], list[Tensor]]:
    return of_p[0], of_q[0], of_p[1], of_q[1]
