import csv
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor

from callbacks.cluster_metrics import ClusterMetrics
from tests.callbacks.boring import BoringGAN, boring_trainer, loader


class ListLogger(CSVLogger):
    """Keeps what it is given."""

    def __init__(self, path: Path) -> None:
        super().__init__(str(path))
        self.rows: list[tuple[int | None, dict[str, float]]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:  # type: ignore[override]
        row = {key: value for key, value in metrics.items() if key.startswith("cluster/")}
        if row:
            self.rows.append((step, row))


class NormWitness(BoringGAN):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.norms: list[float] = []

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        grads: list[Tensor] = [p.grad for g in optimizer.param_groups for p in g["params"]]
        self.norms.append(torch.cat([grad.flatten() for grad in grads]).norm().item())
        super().on_before_optimizer_step(optimizer)


class SlowValidation(BoringGAN):
    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        time.sleep(0.3)


def _fit(path: Path, module: Any, every: int, **options: Any) -> ListLogger:
    logger = ListLogger(path)
    callbacks = [ClusterMetrics(every_n_batches=every)]
    trainer = boring_trainer(path, logger=[logger], callbacks=callbacks, **options)
    trainer.fit(module, loader(), loader(4))
    return logger


def test_measures_every_n_batches_with_the_batch_count_as_step(tmp_path: Path) -> None:
    logger = _fit(tmp_path, BoringGAN(), every=3)
    assert [step for step, _ in logger.rows] == [2, 5]
    for _, row in logger.rows:
        assert set(row) == {
            *(f"cluster/step_time_{kind}" for kind in ("min", "median", "max")),
            *(f"cluster/straggler_{kind}" for kind in ("rank", "ratio")),
            "cluster/images_per_second",
            "cluster/data_time",
            "cluster/memory_gib",
            "cluster/grad_norm/discriminator",
            "cluster/grad_norm/generator",
        }
        assert row["cluster/straggler_ratio"] == 1.0
        assert 0.1 < row["cluster/memory_gib"] < 100


def test_gradient_norms_are_those_before_clipping(tmp_path: Path) -> None:
    module = NormWitness()
    module.gradient_clip = {"discriminator": 1e-3, "generator": 1e-3}
    logger = _fit(tmp_path, module, every=1, max_epochs=1)
    assert len(logger.rows) == 4
    for position, (_, row) in enumerate(logger.rows):
        discriminator, generator = module.norms[2 * position : 2 * position + 2]
        assert row["cluster/grad_norm/discriminator"] == pytest.approx(discriminator, rel=1e-5)
        assert row["cluster/grad_norm/generator"] == pytest.approx(generator, rel=1e-5)
        assert discriminator > 1e-3


def test_times_and_throughput_of_one_process(tmp_path: Path) -> None:
    logger = _fit(tmp_path, BoringGAN(sleep_rank=0, sleep=0.2), every=2, max_epochs=1)
    for _, row in logger.rows:
        assert 0.2 <= row["cluster/step_time_min"] < 0.6
        assert row["cluster/data_time"] < 0.2
        # Four images a batch of at least 0.2 s.
        assert row["cluster/images_per_second"] <= 20
    # The second window holds its own two batches only.
    assert logger.rows[1][1]["cluster/images_per_second"] > 12


def test_validation_does_not_count_as_training_time(tmp_path: Path) -> None:
    logger = _fit(tmp_path, SlowValidation(), every=4, val_check_interval=1)
    # Three validations between the four batches of an epoch would leave at most 18 images a second.
    assert logger.rows[1][1]["cluster/images_per_second"] > 25


def test_works_with_any_module_and_without_logger(tmp_path: Path) -> None:
    boring_trainer(tmp_path, max_steps=4, callbacks=[ClusterMetrics(2)]).fit(BoringModel())
    logger = ListLogger(tmp_path)
    callbacks = [ClusterMetrics(2)]
    trainer = boring_trainer(tmp_path, logger=[logger], max_steps=4, callbacks=callbacks)
    trainer.fit(BoringModel())
    assert len(logger.rows) == 2
    assert logger.rows[0][1]["cluster/grad_norm/optimizer_0"] > 0


def test_bad_interval() -> None:
    with pytest.raises(ValueError, match="every_n_batches=0"):
        ClusterMetrics(0)


@pytest.mark.parametrize(
    ("kind", "slow"), [("compute", 1), ("tail", 0), ("data", 0), ("loader", 1)]
)
def test_finds_the_slow_one_of_two_processes(
    kind: str, slow: int, two_processes: tuple[Path, str]
) -> None:
    """They take equally long for each batch, since the fast one waits: naive timing sees no straggler at all.

    One of them sleeps 0.2 s in each batch.
    """
    with (two_processes[0] / f"{kind}.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["cluster/straggler_rank"]]
    assert [row["step"] for row in rows] == ["2", "5"]
    # A busy machine only adds to the times, so the quieter of the measured batches is looked at.
    row = min(rows, key=lambda row: float(row["cluster/step_time_min"]))
    assert float(row["cluster/straggler_rank"]) == slow
    assert float(row["cluster/straggler_ratio"]) > 1.1
    slowest, fastest = float(row["cluster/step_time_max"]), float(row["cluster/step_time_min"])
    assert slowest >= 0.2
    assert slowest - fastest == pytest.approx(0.2, abs=0.1)
    waited = float(row["cluster/data_time"])
    if kind in ("data", "loader"):
        assert waited >= 0.2
        assert slowest - waited < 0.15, "what is waited for data is not computed"
    else:
        assert waited < 0.15
    # By a clock of the test: three batches of 2 x 4 images between the measured ones.
    times = [float(line) for line in (two_processes[0] / f"{kind}-times").read_text().split()]
    expected = 24 / (times[5] - times[2])
    assert float(rows[1]["cluster/images_per_second"]) == pytest.approx(expected, rel=0.15)
