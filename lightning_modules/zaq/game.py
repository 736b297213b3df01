"""The game of ZAQ, whatever the float network does: a quantized copy against a generator, without data.

Paper: Liu, Zhang, Wang, "Zero-shot Adversarial Quantization", CVPR 2021. The paper itself could not be read: what is
said of it here was reported by others and is not verified. Facts of the released code were read in it.

Order of things:

1. The float network P comes from a checkpoint, or is trained on the training images before the run begins.
2. For every width, the game: K steps of the quantized copy Q, which minimises its distance from P on generated images,
   per step of the generator, which maximises it. No image of the data is in reach: the batches hold none.
3. For every width, the baselines that train: on ZeroQ's distilled images, GDFQ on generated images, FT on training
   images, an upper bound.
4. In the test the baselines that do not train (RQ, DFQ, ACIQ, ZeroQ) are made of P, and all are compared
   (:mod:`~lightning_modules.zaq.comparison`).
"""

import copy
import warnings
from collections.abc import Callable, Sequence
from contextvars import Context
from math import cos, pi
from typing import Any, ClassVar, Literal, Self, cast, get_args

import torch
from torch import Tensor, fx, nn
from torch.optim import SGD, Adam, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from lightning_modules.adversarial import AdversarialModule
from lightning_modules.arguments import demand_at_least, demand_choice
from lightning_modules.checkpoints import load_frozen
from lightning_modules.nn.norm import Norm
from lightning_modules.randomness import keyed_generator
from lightning_modules.supervised.base import SupervisedModule
from lightning_modules.supervised.judge import fit_judge
from lightning_modules.zaq.attach import (
    Placement,
    activation_quantizers,
    forward_with_features,
    observe_ranges,
)
from lightning_modules.zaq.baselines import (
    Quantizer,
    has_batch_norms,
    parse_width,
    set_clipping_ranges,
)
from lightning_modules.zaq.generators import ZAQGenerator
from lightning_modules.zaq.layer_weights import LayerWeightEMA
from lightning_modules.zaq.losses import (
    FeatureLoss,
    Outputs,
    RelationMode,
    zaq_generator_loss,
    zaq_student_loss,
)
from lightning_modules.zaq.methods import (
    NEED_BATCH_NORMS,
    PRESETS,
    Baseline,
    BNMode,
    GeneratorBatch,
    RangeSource,
    Schedule,
    Stage,
    Trained,
    Training,
)
from lightning_modules.zaq.observers import Observer
from lightning_modules.zaq.quantizers import STE, QuantSpec
from lightning_modules.zaq.zeroq import distill_data, network_statistics_loss, record_norm_inputs


class QuantizationGame(AdversarialModule):
    """A float network, and for every width its quantized copies with their generators.

    Images of a DataModule are in [0, 1]; generated ones are normalised already. A subclass says what P is
    (:attr:`teacher_class`, :attr:`truth`), which of its outputs are compared (:meth:`compared`) and how it learns from
    real data (:meth:`ft_losses`).

    Args:
        num_classes: K; must be the data's.
        network: of P, see :class:`~lightning_modules.supervised.base.SupervisedModule`.
        in_channels: channels P takes.
        image_size: side of the images; must be the data's.
        width: of P, if that is ``small``.
        norm: of P, if that is ``small``.
        teacher: checkpoint of a module of :mod:`lightning_modules.supervised` with this network. None: P is trained on
            the training images before the first epoch, equally on every process.
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
        lr_schedule: ``step`` divides both by 10 at one and two thirds of a game (released code), ``cosine`` takes them
            to 0.
        clip_q: largest gradient norm of Q.
        generator_batch: batch norms of a generator see the images of this process (``local``), or those of all
            (``global``): each process generates everything and takes its share.
        observer: how ranges follow the batches of what is trained, GDFQ too (whose released code takes ``ema``), see
            :class:`~lightning_modules.zaq.observers.ActivationQuantizer`.
        percentile: of the observer of that name.
        range_source: the activation ranges of ZAQ's Q are those of ``generated`` images (released code), or follow from
            P's ``batch_norms`` as in ACIQ and never move: a generator that is hardly trained, as in a short game or
            before a deep network, shows Q activations that real images do not have.
        placement: activations are rounded after ReLUs (``relu``, released code) or everywhere (``full``: what integer
            kernels need).
        symmetric: weight codes around 0.
        per_channel: a scale for every output channel.
        ste: gradient of the rounding.
        first_bits, last_bits: weight bits of the first and last layer, where they differ.
        overrides: bits by name of a layer or activation, null for floating point.
        ft_epochs: of the fine-tuning on training images, with ``iterations`` batches each as well.
        ft_lr: its learning rate, with ``weight_decay`` and momentum 0.9.
        zeroq_images, zeroq_steps: see :func:`~lightning_modules.zaq.zeroq.distill_data`.

    Raises:
        ValueError: for an impossible argument.
    """

    bar_terms = ("q_output", "g_output")

    teacher_class: ClassVar[type[SupervisedModule]]
    """What P is a module of."""
    truth: ClassVar[tuple[str, ...]]
    """What the data hold of every image, beside the image."""
    refused: ClassVar[dict[Baseline, str]] = {}
    """Baselines that cannot be made of such a P, and why."""

    def __init__(
        self,
        num_classes: int,
        network: str | nn.Module,
        in_channels: int = 3,
        image_size: int = 32,
        width: int = 32,
        norm: Norm = "batch",
        teacher: str | None = None,
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
        lr_schedule: Schedule = "step",
        clip_q: float | None = None,
        generator_batch: GeneratorBatch = "local",
        observer: Observer = "minmax",
        percentile: float = 99.99,
        range_source: RangeSource = "generated",
        placement: Placement = "relu",
        symmetric: bool = False,
        per_channel: bool = True,
        ste: STE = "identity",
        first_bits: int | None = None,
        last_bits: int | None = None,
        overrides: dict[str, int | None] | None = None,
        ft_epochs: int = 100,
        ft_lr: float = 0.1,
        zeroq_images: int = 64,
        zeroq_steps: int = 500,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=[] if isinstance(network, str) else ["network"])
        self.widths = [parse_width(text) for text in widths]
        self._check_arguments()
        # In a context of its own: the command line would give it this module's hyper-parameters.
        self.teacher = Context().run(self._float_module, network)
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
        if clip_q is not None:
            self.gradient_clip = {f"{stage.key}_student": clip_q for stage in self.stages}
        self.layer_distances: Tensor | None = None
        """Mean [L] over Q's steps of the last batch; None where no layers are weighted."""
        self._distilled: Tensor | None = None
        # P and the copies that are not being trained are in evaluation mode by design.
        warnings.filterwarnings("ignore", r".*module\(s\) in eval mode at the start of training")
        # The schedulers of the stages to come are stepped as well, to where their stage begins.
        warnings.filterwarnings("ignore", r"Detected call of `lr_scheduler.step\(\)` before")

    def _check_arguments(self) -> None:
        hp = self.hp
        demand_choice(PRESETS, option="--model.", preset=hp.preset)
        demand_choice(FeatureLoss, option="--model.", feature_loss=self.setting("feature_loss"))
        demand_choice(BNMode, option="--model.", bn_mode=self.setting("bn_mode"))
        demand_choice(RelationMode, option="--model.", relation_mode=hp.relation_mode)
        demand_choice(Schedule, option="--model.", lr_schedule=hp.lr_schedule)
        demand_choice(GeneratorBatch, option="--model.", generator_batch=hp.generator_batch)
        demand_choice(RangeSource, option="--model.", range_source=hp.range_source)
        lengths = ("epochs", "iterations", "q_steps", "teacher_steps", "ft_epochs", "zeroq_steps")
        sizes = {name: hp[name] for name in (*lengths, "image_size", "zeroq_images")}
        demand_at_least(1, option="--model.", **sizes)
        weights = {name: self.setting(name) for name in ("alpha", "beta", "bns_weight")}
        demand_at_least(0, option="--model.", range_epochs=hp.range_epochs, **weights)
        if not self.widths or len(set(self.widths)) < len(self.widths):
            raise ValueError(
                f"widths={list(hp.widths)} must name each width once, and at least one"
            )
        for name in hp.baselines:
            demand_choice(Baseline, option="--model.", baselines=name)
            if name in self.refused:
                raise ValueError(
                    f"no {name} here: {self.refused[name]}; leave it out of --model.baselines"
                )

    def _check_batch_norms(self) -> None:
        if has_batch_norms(self.float_network):
            return
        lost = [name for name in NEED_BATCH_NORMS if name in self.hp.baselines]
        if self.setting("bns_weight"):
            lost.append("bns_weight")
        if self.hp.range_source == "batch_norms":
            lost.append("range_source=batch_norms")
        if lost:
            raise ValueError(
                f"{', '.join(lost)} would learn from the batch norms of P, and it has none with running statistics; "
                "leave them out of --model.baselines and set --model.bns_weight 0 and --model.range_source generated, "
                "or take another network"
            )

    def _float_module(self, network: str | nn.Module) -> SupervisedModule:
        hp = self.hp
        return self.teacher_class(
            hp.num_classes,
            network=network,
            in_channels=hp.in_channels,
            width=hp.width,
            norm=hp.norm,
            **self.teacher_options(),
        )

    @property
    def float_network(self) -> nn.Module:
        """P, which takes normalised images."""
        return cast(nn.Module, self.teacher.network)

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
        trainings = self.trainings()
        stages, start = [], 0
        for method in get_args(Trained):
            for width in self.widths if method in trainings else ():
                stages.append(Stage(method, width, start, trainings[method].epochs))
                start += trainings[method].epochs
        return stages

    def _build_networks(self) -> None:
        trainings = self.trainings()
        self.students, self.generators, self.best = (nn.ModuleDict() for _ in range(3))
        self.layer_weights = nn.ModuleDict()
        for stage in self.stages:
            taps = self.taps if stage.method == "zaq" else ()
            self.students[stage.key] = self.quantizer.attach(
                self.float_network, stage.width, taps=taps
            )
            if trainings[stage.method].lr_g is not None:
                self.generators[stage.key] = self.build_generator(stage.method)
            if stage.method == "zaq":
                self.layer_weights[stage.key] = LayerWeightEMA(len(self.taps))
                self.best[stage.key] = self.quantizer.attach(self.float_network, stage.width)
                self.best[stage.key].requires_grad_(False)

    def build_generator(self, method: Trained) -> nn.Module:
        """The generator of a method that has one, with the width of its latents as ``latent_dim``."""
        return ZAQGenerator(self.hp.latent_dim, **self._generator_size())

    def _generator_size(self) -> dict[str, Any]:
        hp = self.hp
        return {
            "ngf": hp.ngf,
            "channels": hp.in_channels,
            "img_size": hp.image_size,
            "up_blocks": hp.up_blocks,
        }

    def setting(self, name: str) -> Any:
        """An argument, or what the preset says where it was not given."""
        given = self.hp[name]
        return getattr(PRESETS[self.hp.preset], name) if given is None else given

    # ------------------------------------------------------------------ what P does
    def teacher_options(self) -> dict[str, Any]:
        """Further arguments of :attr:`teacher_class`."""
        return {}

    def compared(self, outputs: Any) -> Outputs:
        """The outputs of a network in which P and Q are compared."""
        raise NotImplementedError

    def ft_losses(self, student: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
        """The losses, scalars by name, of a quantized copy on a batch with its :attr:`truth`."""
        raise NotImplementedError

    # ------------------------------------------------------------------ schedule
    def trainings(self) -> dict[Trained, Training]:
        """The methods that are trained; each has a ``METHOD_step(batch)``. Their order is that of ``Trained``."""
        hp = self.hp
        trainings: dict[Trained, Training] = {
            "zaq": Training(hp.epochs, hp.lr_q, hp.weight_decay, lr_g=hp.lr_g)
        }
        if "ft" in hp.baselines:
            trainings["ft"] = Training(hp.ft_epochs, hp.ft_lr, hp.weight_decay)
        return trainings

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

    def stage_of(self, key: str) -> Stage:
        """The stage with these networks."""
        return next(stage for stage in self.stages if stage.key == key)

    def batches_in_epoch(self, epoch: int) -> int:
        """The same for all, whatever the size of the data."""
        return self.hp.iterations

    def needs_images(self, epoch: int) -> bool:
        """Whether an epoch learns from training images; a DataModule gives none where it does not."""
        return self.stage_at(epoch).method == "ft"

    def build_optimizers(self) -> dict[str, Optimizer]:
        """SGD for every copy, Adam for every generator."""
        trainings = self.trainings()
        optimizers: dict[str, Optimizer] = {}
        for stage in self.stages:
            training = trainings[stage.method]
            optimizers[f"{stage.key}_student"] = SGD(
                self.students[stage.key].parameters(),
                training.lr_q,
                momentum=0.9,
                nesterov=training.nesterov,
                weight_decay=training.weight_decay,
            )
            if training.lr_g is not None:
                optimizers[f"{stage.key}_generator"] = Adam(
                    self.generators[stage.key].parameters(), training.lr_g, betas=training.betas
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
        parts = self.trainings()[stage.method].decay_parts

        def factor(epoch: int) -> float:
            done = min(max(epoch - stage.start, 0), stage.epochs - 1) / stage.epochs
            match self.hp.lr_schedule:
                case "step":
                    return 0.1 ** int(parts * done + 1e-9)
                case "cosine":
                    return (1 + cos(pi * done)) / 2
            return 1.0

        return factor

    # ------------------------------------------------------------------ training
    def train(self, mode: bool = True) -> Self:
        """P and the quantized copies stay in evaluation mode; a step puts the copy it trains into another one."""
        super().train(mode)
        for part in (self.teacher, self.students, self.best):
            part.eval()
        return self

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Of an image [C, H, W]."""
        return self.hp.in_channels, self.hp.image_size, self.hp.image_size

    def to_network(self, images: Tensor) -> Tensor:
        """Images [B, C, H, W] in [0, 1] as the networks take them."""
        return self.teacher.to_network(images)

    def on_train_epoch_start(self) -> None:
        """A stage begins with P's weights and statistics."""
        stage = self.stage
        if self.current_epoch == stage.start:
            student = cast(fx.GraphModule, self.students[stage.key])
            state = self.float_network.state_dict()
            student.load_state_dict(state, strict=False)
            if self._ranges_are_given:
                set_clipping_ranges(self.float_network, student, self.image_shape)
            else:
                observe_ranges(student)

    @property
    def _ranges_are_given(self) -> bool:
        return self.stage.method == "zaq" and self.hp.range_source == "batch_norms"

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """One batch of the current method; unless it learns from real images it holds ``index`` alone."""
        self.layer_distances = None
        getattr(self, f"{self.stage.method}_step")(batch)

    def zaq_step(self, batch: dict[str, Any]) -> None:
        """K updates of Q and one of the generator, each with as many generated images as the batch has rows."""
        hp, stage, rows = self.hp, self.stage, len(batch["index"])
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
                terms = zaq_student_loss(
                    *self._side_by_side(of_p, of_q), alpha, **self._comparison()
                )
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
        terms = zaq_generator_loss(
            *self._side_by_side(of_p, of_q), alpha, beta, **self._comparison()
        )
        losses["g_output"] = -terms["output"]
        losses["g_feature"] = -alpha * terms["feature"]
        losses["g_activation"] = beta * terms["activation"]
        return losses

    def _side_by_side(
        self, of_p: tuple[Any, list[Tensor]], of_q: tuple[Any, list[Tensor]]
    ) -> tuple[Outputs, Outputs, list[Tensor], list[Tensor]]:
        return self.compared(of_p[0]), self.compared(of_q[0]), of_p[1], of_q[1]

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

    def distilled_images(self) -> Tensor:
        """ZeroQ's images, made when they are first needed: they depend on P and the seed alone, on every process."""
        if self._distilled is None:
            hp = self.hp
            self._distilled = distill_data(
                self.float_network,
                hp.zeroq_images,
                self.image_shape,
                hp.zeroq_steps,
                device=self.device,
                progress=self.trainer.is_global_zero,
            )
        return self._distilled.to(self.device)

    def ft_step(self, batch: dict[str, Any]) -> None:
        """An update of Q on a batch of training images."""
        student = self._student_in_training(self.setting("bn_mode"), self._observes())
        with self.update(f"{self.stage.key}_student") as minimize:
            minimize(**self.ft_losses(student, batch))

    def _observes(self) -> bool:
        if self._ranges_are_given:
            return False
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

    # ------------------------------------------------------------------ pictures
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
            z = torch.randn(len(batch["index"]), cast(int, generator.latent_dim))
            fakes = self.pictures_of(generator, z.to(self.device, cast(torch.dtype, self.dtype)))
            title = f"generated, {key.replace('_', ' ')}"
            pictures[title] = self._to_pixels(fakes)
        return pictures if "image" not in batch else {"data": batch["image"], **pictures}

    def pictures_of(self, generator: nn.Module, z: Tensor) -> Tensor:
        """What a generator makes of latents [B, D] to be looked at, of every kind something."""
        return generator(z)

    def _to_pixels(self, fakes: Tensor) -> Tensor:
        if self.teacher.statistics is not None:
            mean, std = (fakes.new_tensor(v).view(-1, 1, 1) for v in self.teacher.statistics)
            fakes = fakes * std + mean
        return fakes.clamp(0, 1)

    # ------------------------------------------------------------------ the float network, and checks against the data
    def setup(self, stage: str) -> None:
        """Checks the data, and gets P where no checkpoint of this module brings it.

        Raises:
            ValueError: the data have images of another size, other classes or other truth, or P's checkpoint holds
                another network.
        """
        super().setup(stage)
        self.demand_as_in_data(image_size="image_size")
        data = getattr(self.trainer, "datamodule", None)
        if stage != "predict":
            self._demand_truth(data)
        self.teacher.setup(stage)
        if stage == "fit" and self.trainer.ckpt_path is None:
            self._get_teacher(data)

    def _demand_truth(self, data: Any) -> None:
        parts = (getattr(data, name, None) for name in ("train", "val", "test"))
        part = next((part for part in parts if hasattr(part, "batch")), None)
        if part is None:
            return
        held = part.batch(torch.zeros(1, dtype=torch.long))
        missing = [name for name in self.truth if name not in held]
        if missing:
            raise ValueError(
                f"{type(self).__name__} needs {' and '.join(missing)} of every image, {type(data).__name__} has "
                f"{', '.join(held)}; set --data to images with {' and '.join(self.truth)}"
            )

    def _get_teacher(self, data: Any) -> None:
        hp = self.hp
        trained: nn.Module
        if hp.teacher is not None:
            trained = load_frozen(hp.teacher, "--model.teacher")
            if not isinstance(trained, self.teacher_class):
                raise ValueError(
                    f"{hp.teacher} holds a {type(trained).__name__}; {type(self).__name__} needs a checkpoint of a "
                    f"{self.teacher_class.__name__} by --model.teacher FILE"
                )
        else:
            bank = getattr(data, "train", None)
            if bank is None:
                raise ValueError(
                    "there is no float network: give its checkpoint by --model.teacher FILE, or training images "
                    "that it can be trained on"
                )
            trained = fit_judge(  # equal on all processes
                self._untrained,
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

    def _untrained(self) -> SupervisedModule:
        network = self.hp.get("network")
        if network is None:  # a module of the user's own
            network = copy.deepcopy(self.float_network).requires_grad_(True)
        return self._float_module(network)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """P comes with the checkpoint."""
        super().on_load_checkpoint(checkpoint)
        self.teacher._missing_weights = None
