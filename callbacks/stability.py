"""How stable a one-class score is while the networks behind it are trained."""

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from tqdm.auto import tqdm

from callbacks.media import log_table, save_figure
from lightning_modules.arguments import demand_at_least
from lightning_modules.metrics.anomaly import anomaly_metrics

COLUMNS = ["epoch", "phase_one", "ognet"]


class AnomalyStabilityProbe(Callback):
    """At epochs of phase one, what the score would be with phase two and without it (the paper's stability plot).

    Phase two runs on a copy of the discriminator, so the training goes on as if it had not been probed. Both scores
    are measured by their AUC on the **test** set: for the plot, never to choose anything.

    Works with any module that offers ``phase_at(epoch)``, ``training_bank()``, ``tuned_copy(bank, batch_size, *keys)``
    and ``anomaly_scores(images, tuned=None)`` with the rows ``phase_one`` and ``ognet``, and a DataModule with
    ``test``. Every process does the same, so there is nothing to gather.

    Writes ``tables/stability.csv`` and ``images/stability-EPOCH.png``, logs ``probe/ROW/auc``.

    Args:
        every_n_epochs: epochs from one probe to the next, beginning with the first one that has an old generator.
        batch_size: images scored at once.

    Raises:
        ValueError: if an argument is below 1.
    """

    def __init__(self, every_n_epochs: int = 1, batch_size: int = 256) -> None:
        demand_at_least(1, every_n_epochs=every_n_epochs, batch_size=batch_size)
        self.every_n_epochs = every_n_epochs
        self.batch_size = batch_size
        self.rows: list[list[float]] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Checks the protocol.

        Raises:
            MisconfigurationException: if the module has no second phase to try, or the data no test set.
        """
        if stage != "fit":
            return
        if not hasattr(pl_module, "tuned_copy"):
            raise MisconfigurationException(
                f"AnomalyStabilityProbe needs a module with tuned_copy(), which {type(pl_module).__name__} lacks; "
                "remove the callback or use OGNet"
            )
        data: Any = getattr(trainer, "datamodule", None)
        if data is None:
            raise MisconfigurationException("AnomalyStabilityProbe needs a LightningDataModule")
        data.setup("test")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Probes."""
        module: Any = pl_module
        epoch = trainer.current_epoch
        first = module.hp.old_epoch + 1
        if (
            module.phase_at(epoch) != "one"
            or epoch < first
            or (epoch - first) % self.every_n_epochs
        ):
            return
        loader: Any = trainer.train_dataloader
        batch_size = loader.batch_size * trainer.world_size
        tuned = module.tuned_copy(module.training_bank(), batch_size, "probe", epoch)
        scores, labels = self._scores(trainer, module, tuned)
        found = [anomaly_metrics(scores[row], labels)["auc"] for row in COLUMNS[1:]]
        self.rows.append([epoch, *found])
        pl_module.log_dict(
            {f"probe/{row}/auc": value for row, value in zip(COLUMNS[1:], found, strict=True)},
            rank_zero_only=False,
        )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draws the curves and says how far they swing."""
        if not self.rows or not trainer.is_global_zero:
            return
        log_table(trainer, "stability", COLUMNS, self.rows)
        table = np.array(self.rows)
        figure, axis = plt.subplots(figsize=(6, 3.5))
        module: Any = pl_module
        for column, row in enumerate(COLUMNS[1:], start=1):
            aucs = table[:, column]
            label = f"{module.row_titles[row]}: {aucs.mean():.3f} ± {aucs.std():.3f}"
            axis.plot(table[:, 0], aucs, marker="o", ms=3, label=label)
        axis.set(xlabel="epoch of phase one", ylabel="AUC on the test set", ylim=(0, 1.02))
        axis.axhline(0.5, color="grey", lw=0.5)
        axis.legend(fontsize=8, loc="lower right")
        path = save_figure(trainer, "stability", figure)
        plt.close(figure)
        spread = {row: np.ptp(table[:, column]) for column, row in enumerate(COLUMNS[1:], 1)}
        print(
            f"AUC over {len(table)} probed epochs, largest minus smallest: without phase two "
            f"{spread['phase_one']:.3f}, with it {spread['ognet']:.3f}; wrote {path}"
        )

    def state_dict(self) -> dict[str, Any]:
        """What was probed so far."""
        return {"rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes up the probes of the run that is resumed."""
        self.rows = state_dict["rows"]

    @torch.no_grad()
    def _scores(
        self, trainer: Trainer, module: Any, tuned: torch.nn.Module
    ) -> tuple[dict[str, Tensor], Tensor]:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        parts = tqdm(
            torch.arange(len(data.test)).split(self.batch_size),
            desc="stability probe",
            leave=False,
            disable=not trainer.is_global_zero or trainer.progress_bar_callback is None,
        )
        found: list[dict[str, Tensor]] = []
        labels = []
        for part in parts:
            batch = data.test.batch(part, module.device, module.dtype)
            found.append(module.anomaly_scores(batch["image"], tuned))
            labels.append(batch["label"])
        scores = {row: torch.cat([scores[row] for scores in found]) for row in COLUMNS[1:]}
        return scores, torch.cat(labels)
