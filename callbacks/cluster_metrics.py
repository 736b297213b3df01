"""How fast the processes are, which one holds the others up, and what they use."""

import resource
import sys
import time
from statistics import median
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.data import extract_batch_size
from torch import Tensor
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from callbacks.media import batch_count

GIB = 2**30


class ClusterMetrics(Callback):
    """Throughput, stragglers, memory and gradient norms over all processes, every few batches.

    Works with every module. Optimizers are called by ``module.optimizer_names`` where it exists (every
    :class:`~lightning_modules.adversarial.AdversarialModule` has it), ``optimizer_0`` and so on elsewhere.

    Processes that train together take equally long for a batch, since all of them wait for the slowest one. To
    find it, the ranks are lined up at the beginning of every measured batch, after its data arrived and before each
    backward pass, and the time spent waiting there is not counted. Two delays cannot be told apart from waiting: one
    *inside* a backward pass, and one between two batches, such as rank 0 writing a checkpoint or a module's own
    ``on_train_batch_end``. Only the measured batch, one of ``every_n_batches``, pays for this; only then does the host
    wait for the accelerator, too.

    Logged to every logger with the batch count as step, after one gather of a few numbers:

    - ``cluster/images_per_second``: all processes together, over the batches since the last measured one; validation
      and what happens between epochs are left out.
    - ``cluster/step_time_min``, ``_median``, ``_max``: seconds of own work of a rank in the measured batch, data
      loading included, waiting for others left out.
    - ``cluster/straggler_rank``, ``cluster/straggler_ratio``: the slowest rank, and its time over the median.
    - ``cluster/data_time``: seconds that the rank with the slowest loader waited for its batch.
    - ``cluster/memory_gib``: peak memory of the fullest rank, allocated on the device with CUDA, resident else.
    - ``cluster/grad_norm/OPTIMIZER``: norm of the gradients, unscaled and before any clipping; the largest where an
      optimizer steps several times in the batch.

    Args:
        every_n_batches: distance of the measured batches.

    Raises:
        ValueError: if it is below 1.
    """

    def __init__(self, every_n_batches: int = 50) -> None:
        if every_n_batches < 1:
            raise ValueError(f"every_n_batches={every_n_batches} must be at least 1")
        self.every_n_batches = every_n_batches
        self._forget()

    def _forget(self) -> None:
        self._images = 0
        self._seconds = 0.0
        # When the batch before ended; None where the time up to the next batch means nothing.
        self._mark: float | None = None
        self._data_time = 0.0
        self._work = 0.0
        self._resumed_at = 0.0
        self._measuring = False
        self._coming: int | None = None
        self._norms: dict[int, Tensor] = {}

    # ------------------------------------------------------------------ clock
    def _measured(self, position: int | None) -> bool:
        return position is not None and (position + 1) % self.every_n_batches == 0

    def _line_up(self, trainer: Trainer) -> None:
        """Lets all ranks start together; what they wait here belongs to nobody's time."""
        if trainer.world_size > 1:
            trainer.strategy.barrier("cluster_metrics")

    def _now(self, trainer: Trainer) -> float:
        """Host time, after the device finished what it was given."""
        device = trainer.strategy.root_device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    def _start_waiting_for_data(self, trainer: Trainer) -> None:
        if self._measured(self._coming):
            self._now(trainer)
            self._line_up(trainer)
        self._mark = time.perf_counter()

    # ------------------------------------------------------------------ hooks
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begins anew: times of an interrupted run say nothing about this one."""
        self._forget()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leaves out what happened between the epochs."""
        self._start_waiting_for_data(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leaves out validation."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._start_waiting_for_data(trainer)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """The batch has arrived."""
        arrived = time.perf_counter()
        if self._mark is None:
            self._mark = arrived
        self._coming = batch_count(trainer)
        self._measuring = self._measured(self._coming)
        self._images += _images_in(batch)
        if self._measuring:
            self._data_time = arrived - self._mark
            self._work = self._now(trainer) - self._mark
            self._norms = {}
            self._line_up(trainer)
            self._resumed_at = time.perf_counter()

    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor
    ) -> None:
        """Takes the waiting for other ranks out of the measured time: backward passes exchange gradients."""
        if self._measuring and trainer.world_size > 1:
            self._work += self._now(trainer) - self._resumed_at
            self._line_up(trainer)
            self._resumed_at = time.perf_counter()

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Norm of the gradients the optimizer is about to use."""
        if not self._measuring:
            return
        grads = [
            parameter.grad.detach()
            for group in optimizer.param_groups
            for parameter in group["params"]
            if parameter.grad is not None
        ]
        norm = get_total_norm(grads).to(trainer.strategy.root_device, torch.float64)
        for position, known in enumerate(trainer.optimizers):
            if known is optimizer:
                earlier = self._norms.get(position, norm)
                self._norms[position] = torch.maximum(earlier, norm)

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Gathers and logs after a measured batch."""
        assert self._mark is not None
        assert self._coming is not None
        if self._measuring:
            self._work += self._now(trainer) - self._resumed_at
        self._seconds += time.perf_counter() - self._mark
        if self._measuring:
            self._log(trainer, pl_module)
            self._images, self._seconds, self._measuring = 0, 0.0, False
        self._coming += 1
        self._start_waiting_for_data(trainer)

    # ------------------------------------------------------------------ report
    def _log(self, trainer: Trainer, pl_module: LightningModule) -> None:
        device = trainer.strategy.root_device
        numbers = [self._images, self._seconds, self._work, self._data_time, _peak_memory(device)]
        # A step that one rank skipped must not change the shape of what is gathered.
        absent = torch.tensor(torch.nan, dtype=torch.float64, device=device)
        norms = [self._norms.get(i, absent) for i in range(len(trainer.optimizers))]
        own = torch.cat(
            [torch.tensor(numbers, dtype=torch.float64, device=device), torch.stack(norms)]
        )
        gathered = trainer.strategy.all_gather(own).reshape(trainer.world_size, -1).cpu()
        if not trainer.is_global_zero:
            return
        images, seconds, work, data, memory = gathered[:, : len(numbers)].T.tolist()
        slowest = max(range(len(work)), key=work.__getitem__)
        metrics = {
            "images_per_second": sum(images) / max(max(seconds), 1e-9),
            "step_time_min": min(work),
            "step_time_median": median(work),
            "step_time_max": max(work),
            "straggler_rank": float(slowest),
            "straggler_ratio": max(work) / max(median(work), 1e-9),
            "data_time": max(data),
            "memory_gib": max(memory) / GIB,
        }
        for position, name in enumerate(optimizer_names(trainer, pl_module)):
            if position in self._norms:
                metrics[f"grad_norm/{name}"] = gathered[0, len(numbers) + position].item()
        for logger in trainer.loggers:
            logger.log_metrics(
                {f"cluster/{key}": value for key, value in metrics.items()}, batch_count(trainer)
            )


def optimizer_names(trainer: Trainer, module: LightningModule) -> list[str]:
    """A name for each of ``trainer.optimizers``: the module's own, else ``optimizer_0`` and so on."""
    names = list(getattr(module, "optimizer_names", []))
    if len(names) == len(trainer.optimizers):
        return names
    return [f"optimizer_{i}" for i in range(len(trainer.optimizers))]


def _images_in(batch: Any) -> int:
    if isinstance(batch, dict) and isinstance(batch.get("image"), Tensor):
        return len(batch["image"])
    return extract_batch_size(batch)


def _peak_memory(device: torch.device) -> int:
    """Bytes: allocated on a CUDA device, resident in memory elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
