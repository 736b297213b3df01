"""AdversarialModule: hand-stepped optimizers, and the one place that knows Lightning's traps with them.

What it protects from, each found by running it (Lightning 2.6):

* ``loss.backward()`` instead of ``manual_backward``: ranks drift apart without a word.
* nested or unfinished toggles: networks stay frozen for ever after an exception.
* ``global_step`` counts optimizer steps: ``max_steps``, checkpoint intervals and logs disagree.
* BatchNorm statistics are not synchronised under manual optimisation.
* one backward for two optimizers under a GradScaler: the second one sees gradients of another scale.
* clipping before unscaling clips the scaled gradients.
* epoch schedulers are never stepped.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer, do_nothing_closure
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.nn import SyncBatchNorm
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_modules.paper import PaperModule

Minimize = Callable[..., Tensor]


class AdversarialModule(PaperModule):
    """Base class of modules that step several optimizers by hand.

    A paper implements :meth:`build_optimizers` and writes its ``training_step`` as the sequence of its updates::

        with self.update("discriminator") as minimize:
            minimize(loss_real=..., loss_fake=...)
        with self.update("generator") as minimize:
            minimize(adversarial=...)

    One update toggles exactly the parameters of the named optimizers, zeroes their gradients, sums the losses, runs one
    backward, clips (:attr:`gradient_clip`) and steps. The losses are kept in :attr:`losses` and logged.

    ``trainer.global_step`` counts *batches*: only the first optimizer step of a batch is counted, so ``max_steps``,
    checkpoint intervals and the logged axis mean what they mean with one optimizer. A batch without any update is not
    counted.
    """

    gradient_penalised: tuple[str, ...] = ()
    """Networks that are differentiated twice, in which SyncBatchNorm is impossible."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.optimizer_names: list[str] = []
        self.gradient_clip: dict[str, float] = {}
        """Largest gradient norm by name of the optimizer; the others are not clipped."""
        self._updating: tuple[str, ...] = ()
        self._batch_is_counted = False

    # ------------------------------------------------------------------ to be written by a paper
    def build_optimizers(self) -> dict[str, Optimizer]:
        """The optimizers by name, in the order in which checkpoints store them."""
        raise NotImplementedError

    def build_schedulers(self, optimizers: dict[str, Optimizer]) -> list[LRScheduler]:
        """Learning-rate schedulers that are stepped once an epoch."""
        return []

    # ------------------------------------------------------------------ one update
    @contextmanager
    def update(self, *names: str) -> Iterator[Minimize]:
        """One update of the named optimizers; the body calls what it is given, once, with the losses by name.

        Args:
            names: optimizers that step together on one backward, in the order of their steps.

        Yields:
            ``minimize(**losses) -> total``: scalars that are summed, differentiated and stepped on.

        Raises:
            RuntimeError: if updates are nested, or the body did not minimise anything.
            ValueError: for a name that is not an optimizer's.
        """
        if self._updating:
            raise RuntimeError(
                f"update{names} inside update{self._updating}: updates cannot be nested, close the first one before"
            )
        every = self._optimizers_by_name()
        for name in names:
            if name not in every:
                raise ValueError(f"no optimizer {name!r}; this module has {', '.join(every)}")
        chosen = {name: every[name] for name in names}
        own = {id(p) for opt in chosen.values() for g in opt.param_groups for p in g["params"]}
        flags = {
            p: p.requires_grad
            for opt in every.values()
            for g in opt.param_groups
            for p in g["params"]
        }
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag and id(parameter) in own)
        self._updating = names
        done = False

        def minimize(**losses: Tensor) -> Tensor:
            nonlocal done
            if done:
                raise RuntimeError(f"update{names} minimises once; sum the losses in one call")
            done = True
            return self._minimize(chosen, losses)

        try:
            yield minimize
            if not done:
                raise RuntimeError(f"update{names} ended without a call of minimize(...)")
        finally:
            for parameter, flag in flags.items():
                parameter.requires_grad_(flag)
            self._updating = ()

    def _minimize(self, chosen: dict[str, LightningOptimizer], losses: dict[str, Tensor]) -> Tensor:
        total = torch.stack(list(losses.values())).sum()
        for optimizer in chosen.values():
            optimizer.zero_grad()
        self.manual_backward(total)
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        # Stepping one optimizer may change the scale of the gradients that the next one still has to unscale.
        scale = scaler.get_scale() if scaler is not None and len(chosen) > 1 else None
        for optimizer in chosen.values():
            if scaler is not None and scale is not None and scaler.get_scale() != scale:
                ratio = scaler.get_scale() / scale
                grads = [
                    p.grad
                    for g in optimizer.param_groups
                    for p in g["params"]
                    if p.grad is not None
                ]
                torch._foreach_mul_(grads, ratio)
            if self._batch_is_counted:
                # The loop counts a step through these two hooks and installs them anew for every batch.
                optimizer._on_before_step = optimizer._on_after_step = do_nothing_closure
            optimizer.step()
            self._batch_is_counted = True
        self.losses.update({name: loss.detach() for name, loss in losses.items()})
        return total.detach()

    def _optimizers_by_name(self) -> dict[str, LightningOptimizer]:
        optimizers = self.optimizers()
        if not isinstance(optimizers, list):
            optimizers = [optimizers]
        return dict(zip(self.optimizer_names, optimizers, strict=True))

    # ------------------------------------------------------------------ hooks
    def configure_optimizers(self) -> Any:
        """Builds the named optimizers and their schedulers."""
        optimizers = self.build_optimizers()
        self.optimizer_names = list(optimizers)
        return list(optimizers.values()), self.build_schedulers(optimizers)

    def on_fit_start(self) -> None:
        """Checks that the strategy can carry several backwards a batch.

        Raises:
            MisconfigurationException: for DDP without ``find_unused_parameters``, and for SyncBatchNorm in
                a network under a gradient penalty.
        """
        strategy = self.trainer.strategy
        if isinstance(strategy, DDPStrategy) and not strategy._ddp_kwargs.get(
            "find_unused_parameters"
        ):
            raise MisconfigurationException(
                "each update uses some of the networks only, which plain DDP takes for an error; "
                "use --trainer.strategy ddp_find_unused_parameters_true"
            )
        for name in self.gradient_penalised:
            if any(isinstance(part, SyncBatchNorm) for part in getattr(self, name).modules()):
                raise MisconfigurationException(
                    f"{name} is under a gradient penalty and SyncBatchNorm cannot be differentiated twice; "
                    "instead of trainer.sync_batchnorm use -c configs/trainer/sync_batchnorm.yaml, which leaves it out"
                )

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Keys the randomness; no step of the coming batch is counted yet."""
        super().on_train_batch_start(batch, batch_idx)
        self._batch_is_counted = False

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Clips, which is only right here: after the gradients were unscaled."""
        for name, wrapped in self._optimizers_by_name().items():
            if wrapped.optimizer is optimizer and name in self.gradient_clip:
                self.clip_gradients(optimizer, self.gradient_clip[name], "norm")

    def on_train_epoch_end(self) -> None:
        """Steps the epoch schedulers, which manual optimisation leaves to us."""
        schedulers = self.lr_schedulers()
        if schedulers is None:
            return
        for scheduler in schedulers if isinstance(schedulers, list) else [schedulers]:
            scheduler.step()  # type: ignore[call-arg]
