"""What Classifier, Detector and Segmenter share: network and weights, the optimizer, the names of the classes."""

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR
from torchvision.transforms.functional import normalize

from lightning_modules.arguments import demand_at_least, demand_choice
from lightning_modules.named_classes import NamedClasses
from lightning_modules.nn.norm import Norm
from lightning_modules.supervised.networks import (
    Statistics,
    Task,
    build_network,
    load_pretrained,
    replace_first_convolution,
    statistics_of,
)

OptimizerName = Literal["adam", "sgd"]
Schedule = Literal["constant", "cosine"]


class SupervisedModule(NamedClasses):
    """A network, one loss, one optimizer. Subclasses say what the loss is and how the result is judged.

    Args:
        num_classes: K; must be the data's.
        network: ``small``, one of :data:`~lightning_modules.supervised.cifar.CIFAR_NETWORKS` (classifiers of 32-pixel
            images), a network of torchvision by name, or any module of your own that maps images
            [B, C, H, W] in [0, 1] to logits. Your own is not among the hyper-parameters: give it again to
            ``load_from_checkpoint``.
        in_channels: channels the network takes. Grey images are repeated for a network of several channels, colour
            ones averaged for a network of one.
        width: of ``small``.
        norm: of ``small``; ``group`` keeps the images of a batch independent of each other.
        pretrained: start from torchvision's weights; the head is kept only if it has K classes.
        weights_path: their file; without it the one in torch.hub's folder.
        download: let torchvision fetch a missing file.
        optimizer: ``adam``, or ``sgd`` with Nesterov's momentum.
        lr: learning rate at the start.
        weight_decay: L2 penalty.
        momentum: of ``sgd``.
        epochs: length of the training.
        lr_schedule: ``cosine`` goes down to nothing over the epochs.

    Raises:
        ValueError: for an impossible argument.
        RuntimeError: the weights file holds something else, or the download failed.
    """

    task: ClassVar[Task]

    bar_terms = ("loss",)

    def __init__(
        self,
        num_classes: int,
        network: str | nn.Module = "small",
        in_channels: int = 3,
        width: int = 32,
        norm: Norm = "batch",
        pretrained: bool = False,
        weights_path: str | None = None,
        download: bool = False,
        optimizer: OptimizerName = "adam",
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        momentum: float = 0.9,
        epochs: int = 10,
        lr_schedule: Schedule = "cosine",
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=[] if isinstance(network, str) else ["network"])
        self._check_arguments()
        self.statistics: Statistics | None = None
        if isinstance(network, str):
            self.network = build_network(
                self.task, network, num_classes, 3 if pretrained else in_channels, width, norm
            )
            self.statistics = statistics_of(network, in_channels)
            if pretrained:
                self._load(network, weights_path, download)
        else:
            self.network = network
        self.class_names = [str(k) for k in range(num_classes)]

    def _check_arguments(self) -> None:
        hp = self.hp
        demand_at_least(2, option="--model.", num_classes=hp.num_classes)
        demand_at_least(
            1, option="--model.", in_channels=hp.in_channels, width=hp.width, epochs=hp.epochs
        )
        demand_choice(OptimizerName, option="--model.", optimizer=hp.optimizer)
        demand_choice(Schedule, option="--model.", lr_schedule=hp.lr_schedule)

    def _load(self, name: str, weights_path: str | None, download: bool) -> None:
        try:
            load_pretrained(self.pretrained_part, name, weights_path, download)
        except FileNotFoundError as error:
            # A checkpoint that is loaded into this module brings them; without one nothing may start.
            self._missing_weights = error
        if self.hp.in_channels != 3:
            replace_first_convolution(self.network, self.hp.in_channels)

    @property
    def pretrained_part(self) -> nn.Module:
        """What torchvision's weights are for."""
        return self.network

    # ------------------------------------------------------------------ schedule
    @property
    def total_epochs(self) -> int:
        """Length of the training."""
        return self.hp.epochs

    def configure_optimizers(self) -> Any:
        """One optimizer for everything."""
        hp = self.hp
        optimizer: Optimizer
        if hp.optimizer == "adam":
            optimizer = Adam(self.parameters(), lr=hp.lr, weight_decay=hp.weight_decay)
        else:
            optimizer = SGD(
                self.parameters(),
                lr=hp.lr,
                momentum=hp.momentum,
                weight_decay=hp.weight_decay,
                nesterov=hp.momentum > 0,
            )
        if hp.lr_schedule == "constant":
            return optimizer
        return [optimizer], [CosineAnnealingLR(optimizer, hp.epochs)]

    # ------------------------------------------------------------------ training
    def forward(self, images: Tensor) -> Tensor:
        """Logits, float32 or better, of images [B, C, H, W] in [0, 1].

        Raises:
            ValueError: the images have channels that the network does not take.
        """
        logits = self.network(self.to_network(images))
        logits = logits["out"] if isinstance(logits, dict) else logits
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def to_network(self, images: Tensor) -> Tensor:
        """Images [B, C, H, W] in [0, 1] as the network takes them: of its channels, normalised.

        Raises:
            ValueError: the images have channels that the network does not take.
        """
        channels = self.hp.in_channels
        if images.shape[1] == 1:
            images = images.expand(-1, channels, -1, -1)
        elif channels == 1:
            images = images.mean(1, keepdim=True)
        if images.shape[1] != channels:
            raise ValueError(
                f"the network takes in_channels={channels}, the images have {images.shape[1]} channels; set "
                f"--model.in_channels {images.shape[1]}"
            )
        if self.statistics is not None:
            images = normalize(images, *map(list, self.statistics))
        return images

    def loss(self, batch: dict[str, Any]) -> Tensor:
        """What is minimised, a scalar, for a batch with the task's truth."""
        raise NotImplementedError

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """The loss of the batch."""
        loss = self.loss(batch)
        self.losses = {"loss": loss.detach()}
        return loss
