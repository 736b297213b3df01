"""PaperModule: what every module of the collection has in common, however it is optimised."""

from typing import Any, Literal, Protocol

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_modules.nn.ema import AveragedNetwork
from lightning_modules.nn.statistics import average_over_ranks, gather_over_ranks
from lightning_modules.randomness import global_seed, keyed_generator, mix


class ImageBank(Protocol):
    """A training set that hands out any of its images."""

    def __len__(self) -> int: ...

    def batch(
        self,
        indices: Tensor,
        device: torch.device | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> dict[str, Any]:
        """``image`` [B, C, H, W] in [0, 1] of the samples at ``indices`` [B], not augmented."""
        ...


class _EqualStatistics(Callback):
    # Lightning runs a module's own hook after all callbacks, but the callbacks a module brings before
    # those that write checkpoints.
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        assert isinstance(pl_module, PaperModule)
        pl_module._average_batch_norm_statistics()


class PaperModule(LightningModule):
    """A LightningModule with keyed randomness and checkpoints that know whose they are.

    Before every training batch the global generators are seeded by (seed, epoch, batch, rank); that
    covers what draws from them by nature, dropout above all. Draws that must be the same for any
    number of processes go through :meth:`draw`.
    """

    bar_terms: tuple[str, ...] = ()
    """Losses shown in the progress bar; the loggers get all of them."""

    _draw_position: tuple[int, int] = (0, 0)

    def __init__(self) -> None:
        super().__init__()
        self.losses: dict[str, Tensor] = {}
        """Losses of the current batch by name, without gradient; logged as ``train/NAME``, averaged over the ranks."""

    @property
    def hp(self) -> Any:
        """The constructor arguments."""
        return self.hparams

    def batches_in_epoch(self, epoch: int) -> int | None:
        """How many batches an epoch has; None: as many as the data have."""
        return None

    def setup(self, stage: str) -> None:
        """Has the loaders made anew for every epoch where epochs have lengths of their own."""
        if stage == "fit" and type(self).batches_in_epoch is not PaperModule.batches_in_epoch:
            trainer: Any = self.trainer
            trainer.reload_dataloaders_every_n_epochs = 1

    def demand_as_in_data(self, **attributes: str) -> None:
        """Checks arguments that model and data must agree on.

        Args:
            **attributes: for each argument of the model the attribute of the DataModule; what that lacks, or has as
                None, is not checked.

        Raises:
            ValueError: they differ.
        """
        data = getattr(self.trainer, "datamodule", None)
        for name, attribute in attributes.items():
            value = getattr(data, attribute, None)
            if value is not None and value != self.hp[name]:
                raise ValueError(
                    f"the model has {name}={self.hp[name]}, the data have {value}; set --model.{name} {value}"
                )

    def configure_callbacks(self) -> list[Callback]:
        """Makes running statistics equal after each batch, before any checkpoint callback can save them."""
        # Lightning asks again for the test after a training, and would announce that it replaces the first one.
        present = [] if self._trainer is None else self._trainer.callbacks  # type: ignore[attr-defined]
        return [] if any(isinstance(c, _EqualStatistics) for c in present) else [_EqualStatistics()]

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Keys the randomness of the coming batch and forgets the losses of the last one."""
        self.losses = {}
        epoch = self.trainer.current_epoch
        torch.manual_seed(mix(global_seed(), "step", epoch, batch_idx, self.global_rank))
        self._draw_position = (epoch, batch_idx)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Logs the losses."""
        self.log_mean_over_ranks({f"train/{name}": loss for name, loss in self.losses.items()})

    def draw(
        self, purpose: str, kind: Literal["normal", "uniform"], rows: int, *shape: int
    ) -> Tensor:
        """Random rows for the local batch: this rank's share of what one process would draw for the global batch.

        Args:
            purpose: names the draw; two draws within one batch need two purposes.
            kind: N(0, 1) or U[0, 1).
            rows: batch size of this process, the same on every process.
            shape: shape of one row.

        Returns:
            Tensor [rows, *shape] on the module's device and in its dtype.
        """
        world, rank = 1, 0
        if self._trainer is not None:
            world, rank = self.trainer.world_size, self.trainer.global_rank
        generator = keyed_generator(purpose, *self._draw_position, device=self.device)
        sample = torch.randn if kind == "normal" else torch.rand
        dtype: Any = self.dtype
        drawn = sample(world * rows, *shape, generator=generator, device=self.device, dtype=dtype)
        return drawn[rank * rows : (rank + 1) * rows]

    def register_ema(self, name: str, decay: float = 0.999) -> AveragedNetwork:
        """Adds the submodule ``<name>_ema``: a frozen running average of the network ``name``.

        As a submodule it is in every checkpoint and survives ``load_from_checkpoint``; updating it is the
        business of :class:`callbacks.GeneratorEMA`.

        Raises:
            ValueError: if the module has no network of that name.
        """
        network = getattr(self, name, None)
        if not isinstance(network, torch.nn.Module):
            networks = [key for key, _ in self.named_children()]
            raise ValueError(
                f"{type(self).__name__} has no network {name!r}; it has {', '.join(networks)}"
            )
        if not hasattr(self, f"{name}_ema"):
            self.add_module(f"{name}_ema", AveragedNetwork(network, decay))
        averaged = getattr(self, f"{name}_ema")
        averaged.decay = decay
        return averaged

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Marks the checkpoint with the class that wrote it."""
        checkpoint["module_class"] = type(self).__name__

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses the checkpoint of another paper and prepares for averaged networks in it.

        Raises:
            RuntimeError: if another class wrote the checkpoint, or it was not written by this collection.
        """
        written_by = checkpoint.get("module_class")
        if written_by != type(self).__name__:
            raise RuntimeError(
                f"this checkpoint was written by {written_by or 'something else than this collection'}, "
                f"not by {type(self).__name__}; give a checkpoint of {type(self).__name__} or change --model"
            )
        for key in checkpoint["state_dict"]:
            head = key.split(".")[0]
            if head.endswith("_ema") and not hasattr(self, head):
                self.register_ema(head.removesuffix("_ema"))

    def training_bank(self) -> ImageBank:
        """The training set behind the train dataloader."""
        loader: Any = self.trainer.train_dataloader
        return loader.dataset

    def log_mean_over_ranks(self, values: dict[str, Tensor]) -> None:
        """Logs scalars at the batches the trainer logs at, averaged over the ranks in a single reduction."""
        trainer: Any = self.trainer
        if (self.batches_done + 1) % trainer.log_every_n_steps or not values:
            return
        stacked = torch.stack([value.detach().float().reshape(()) for value in values.values()])
        reduced = trainer.strategy.reduce(stacked, reduce_op="mean")
        assert isinstance(reduced, Tensor)
        for name, value in zip(values, reduced, strict=True):
            on_bar = name.split("/")[-1] in self.bar_terms
            self.log(name, value, on_step=True, on_epoch=False, prog_bar=on_bar)

    def gather_columns(self, rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Concatenates the columns of all batches and all ranks, also when a rank had no batch.

        Args:
            rows: for each batch of this rank a dict of columns [B].

        Returns:
            Columns [N] on the CPU, the same on every rank.
        """
        mine = {key: torch.cat([row[key] for row in rows]).cpu() for key in rows[0]} if rows else {}
        gathered = gather_over_ranks(self.trainer, mine)
        keys = next(part.keys() for part in gathered if part)
        return {key: torch.cat([part[key] for part in gathered if part]) for key in keys}

    def _average_batch_norm_statistics(self) -> None:
        # DDP broadcasts the buffers of rank 0, and under manual optimisation before the first batch only. The mean over
        # the ranks is also the better estimate: it has seen the whole global batch.
        average_over_ranks(
            self.trainer,
            (
                buffer
                for module in self.modules()
                if isinstance(module, _BatchNorm) and module.training
                for buffer in (module.running_mean, module.running_var)
                if buffer is not None
            ),
        )

    @property
    def batches_done(self) -> int:
        """Training batches before the current one, whatever the number of optimizer steps."""
        return max(self.trainer.fit_loop.epoch_loop.total_batch_idx, 0)
