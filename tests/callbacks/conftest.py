from pathlib import Path

import pytest

from tests.processes import run_fresh

TWO_PROCESSES = """
import sys
from tests.callbacks.boring import *
from lightning.pytorch import Callback
from callbacks.cluster_metrics import ClusterMetrics
from callbacks.ema import GeneratorEMA
from callbacks.finite import FiniteGuard
from callbacks.loggers import ResumableCSVLogger
from callbacks.predictions import PredictionWriter

directory = Path(sys.argv[1])

class SlowData(BoringGAN):
    def on_before_batch_transfer(self, batch, dataloader_idx):
        if self.trainer.training and self.global_rank == 0:
            time.sleep(0.2)
        return batch

class SlowTail(BoringGAN):
    def training_step(self, batch, batch_idx):
        super().training_step(batch, batch_idx)
        if self.global_rank == 0:
            time.sleep(0.2)

class SlowLoader(BoringImages):
    def __getitem__(self, index):
        if torch.distributed.get_rank() == 1:
            time.sleep(0.05)
        return super().__getitem__(index)

class Stopwatch(Callback):
    # When rank 0 was done with its batches.

    def __init__(self, path):
        self.path = path

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_rank == 0:
            with self.path.open("a") as file:
                print(time.perf_counter(), file=file)

class SaveAverage(Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        state = {k: v.clone() for k, v in pl_module.generator_ema.state_dict().items()}
        torch.save(state, directory / f"ema-{batch_idx}-{trainer.global_rank}.pt")

def trainer(path, *callbacks, **options):
    strategy = "ddp_fork_find_unused_parameters_true"
    return boring_trainer(
        path, devices=2, strategy=strategy, max_epochs=1, callbacks=list(callbacks), **options
    )

torch.manual_seed(0)
logger = ResumableCSVLogger(str(directory / "compute"))
callbacks = [GeneratorEMA(), SaveAverage(), ClusterMetrics(3), FiniteGuard()]
callbacks.append(Stopwatch(directory / "compute-times"))
trainer(directory, *callbacks, logger=logger).fit(BoringGAN(sleep_rank=1, sleep=0.2), loader(48))
for kind, module, data in (
    ("data", SlowData(), BoringImages(48)),
    ("tail", SlowTail(), BoringImages(48)),
    ("loader", BoringGAN(), SlowLoader(48)),
):
    logger = ResumableCSVLogger(str(directory / kind))
    # The guard waits for all ranks, as in every run of train.py.
    callbacks = [ClusterMetrics(3), FiniteGuard(), Stopwatch(directory / f"{kind}-times")]
    trainer(directory, *callbacks, logger=logger).fit(module, DataLoader(data, 4))
for kind in ("compute", "data", "tail", "loader"):
    (directory / kind / "metrics.csv").rename(directory / f"{kind}.csv")
predict = trainer(directory, PredictionWriter())
predict.predict(BoringGAN(), loader(15, 2), return_predictions=False)
"""


@pytest.fixture(scope="session")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """What the callbacks left behind after runs of two processes, and what these printed.

    A process of its own does the forking: one that has had loader workers may hang.
    """
    directory = tmp_path_factory.mktemp("two_processes")
    return directory, run_fresh(TWO_PROCESSES, str(directory))
