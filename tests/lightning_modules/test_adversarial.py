"""The traps of manual optimisation; each test fails when its trap is let in again."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import ExponentialLR, LRScheduler
from torch.utils.data import DataLoader

from lightning_modules.adversarial import AdversarialModule


class Toy(AdversarialModule):
    """Two linear networks; three optimizer steps a batch, the last two on one backward."""

    def __init__(self, lr: float = 0.1) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.lr = lr
        self.first = nn.Linear(3, 3)
        self.second = nn.Linear(3, 1)
        self.seen: list[Any] = []

    def build_optimizers(self) -> dict[str, Optimizer]:
        return {
            "first": SGD(self.first.parameters(), lr=self.lr),
            "second": SGD(self.second.parameters(), lr=self.lr),
        }

    def build_schedulers(self, optimizers: dict[str, Optimizer]) -> list[LRScheduler]:
        return [ExponentialLR(optimizers["second"], 0.5)]

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        with self.update("second") as minimize:
            minimize(critic=self.second(self.first(batch)).square().mean())
        with self.update("first", "second") as minimize:
            minimize(joint=(self.second(self.first(batch)) - 1).square().mean())


def data(batches: int = 4) -> DataLoader:
    return DataLoader(torch.arange(batches * 6.0).view(-1, 3) / 10, batch_size=2)


def fit(module: Toy, tmp_path: Path, **options: Any) -> Trainer:
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 1,
        "default_root_dir": tmp_path,
    }
    trainer = Trainer(**{**defaults, **options})
    trainer.fit(module, data())
    return trainer


def test_an_update_moves_its_own_parameters_only(tmp_path: Path) -> None:
    class Check(Toy):
        def training_step(self, batch: Tensor, batch_idx: int) -> None:
            before = [p.clone() for p in self.first.parameters()]
            with self.update("second") as minimize:
                self.seen.append([p.requires_grad for p in self.parameters()])
                minimize(critic=self.second(self.first(batch)).square().mean())
            self.seen.append([p.requires_grad for p in self.parameters()])
            for old, new in zip(before, self.first.parameters(), strict=True):
                assert torch.equal(old, new)
                assert new.grad is None

    module = Check()
    fit(module, tmp_path)
    assert module.seen[:2] == [[False, False, True, True], [True] * 4]


def test_an_exception_leaves_no_network_frozen(tmp_path: Path) -> None:
    class Failing(Toy):
        def training_step(self, batch: Tensor, batch_idx: int) -> None:
            with self.update("second"):
                raise KeyError("in the middle")

    module = Failing()
    with pytest.raises(KeyError):
        fit(module, tmp_path)
    assert all(p.requires_grad for p in module.parameters())
    assert not module._updating


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ("nested", "cannot be nested"),
        ("empty", "without a call of minimize"),
        ("twice", "minimises once"),
        ("unknown", "no optimizer 'third'; this module has first, second"),
    ],
)
def test_misuse_is_an_error(mistake: str, message: str, tmp_path: Path) -> None:
    class Wrong(Toy):
        def training_step(self, batch: Tensor, batch_idx: int) -> None:
            loss = self.second(self.first(batch)).mean()
            with self.update("third" if mistake == "unknown" else "second") as minimize:
                if mistake == "nested":
                    with self.update("first") as inner:
                        inner(loss=loss)
                if mistake == "twice":
                    minimize(loss=loss)
                    minimize(loss=loss)

    with pytest.raises((RuntimeError, ValueError), match=message):
        fit(Wrong(), tmp_path)


def test_steps_count_batches(tmp_path: Path) -> None:
    """Lightning counts optimizer steps: three a batch here."""
    assert fit(Toy(), tmp_path).global_step == 4
    assert fit(Toy(), tmp_path, max_epochs=-1, max_steps=3).global_step == 3


def test_all_steps_happen_though_one_is_counted(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Toy()
    first, second = (nn.Linear(3, 3), nn.Linear(3, 1))
    first.load_state_dict(module.first.state_dict())
    second.load_state_dict(module.second.state_dict())
    optimizers = SGD(first.parameters(), lr=0.1), SGD(second.parameters(), lr=0.1)
    fit(module, tmp_path)
    for batch in data():
        optimizers[1].zero_grad()
        second(first(batch).detach()).square().mean().backward()
        optimizers[1].step()
        for optimizer in optimizers:
            optimizer.zero_grad()
        (second(first(batch)) - 1).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(module.first.weight, first.weight)
    torch.testing.assert_close(module.second.weight, second.weight)


def test_schedulers_step_once_an_epoch(tmp_path: Path) -> None:
    trainer = fit(Toy(), tmp_path, max_epochs=3)
    assert trainer.optimizers[1].param_groups[0]["lr"] == pytest.approx(0.1 * 0.5**3)


def test_losses_are_logged_by_name(tmp_path: Path) -> None:
    trainer = fit(Toy(), tmp_path)
    assert {"train/critic", "train/joint"} <= trainer.callback_metrics.keys()


@pytest.mark.parametrize("clip", [{}, {"second": 0.05}])
def test_clipping_sees_unscaled_gradients_and_shared_backwards_one_scale(
    clip: dict[str, float], tmp_path: Path
) -> None:
    """With a scale that doubles at every step, gradients must be those of a run without scaling."""

    class Recording(Toy):
        def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
            super().on_before_optimizer_step(optimizer)
            grads = [p.grad.clone() for g in optimizer.param_groups for p in g["params"]]
            self.seen.append(torch.cat([grad.flatten() for grad in grads]))

    def gradients(**options: Any) -> list[Tensor]:
        torch.manual_seed(0)
        module = Recording()
        module.gradient_clip = clip
        fit(module, tmp_path, **options)
        return module.seen

    # autocast stays off, so that the scaling is the only difference
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1)
    precision = MixedPrecision("16-mixed", device="cpu", scaler=scaler)
    precision.autocast_context_manager = lambda: torch.autocast("cpu", enabled=False)  # type: ignore[method-assign]
    plain, scaled = gradients(), gradients(plugins=[precision])
    assert len(plain) == len(scaled) == 12
    assert scaler.get_scale() > 1024
    for expected, found in zip(plain, scaled, strict=True):
        torch.testing.assert_close(found, expected)
    # In every batch "second" steps, then "first" and "second".
    first, second = plain[1::3], plain[::3] + plain[2::3]
    assert max(float(gradient.norm()) for gradient in first) > 0.05
    assert all(float(gradient.norm()) <= 0.05 + 1e-4 for gradient in second) == bool(clip)


def test_plain_ddp_is_refused_with_its_mend(tmp_path: Path) -> None:
    module = Toy()
    trainer = Trainer(accelerator="cpu", devices=2, strategy="ddp", logger=False)
    module._trainer = trainer
    with pytest.raises(MisconfigurationException, match="ddp_find_unused_parameters_true"):
        module.on_fit_start()


def test_the_draws_of_two_ranks_are_those_of_one(tmp_path: Path) -> None:
    class Ranked(Toy):
        def training_step(self, batch: Tensor, batch_idx: int) -> None:
            one = self.draw("z", "normal", 4, 3)
            other = self.draw("alpha", "normal", 4, 3)
            assert not torch.equal(one, other)
            again = self.draw("z", "normal", 4, 3)
            assert torch.equal(one, again)
            self.seen.append(one)
            super().training_step(batch, batch_idx)

    module = Ranked()
    fit(module, tmp_path)
    assert not torch.equal(module.seen[0], module.seen[1])

    class Ranks:
        world_size, global_rank = 2, 0

    rows = []
    for rank in range(2):
        module._trainer = Ranks()  # type: ignore[assignment]
        module._trainer.global_rank = rank
        rows.append(module.draw("z", "normal", 2, 3))
    assert torch.equal(torch.cat(rows), module.seen[-1])


def test_dropout_is_keyed_by_the_batch(tmp_path: Path) -> None:
    """Draws from the global generator before a batch must not change what the batch draws."""

    class Dropping(Toy):
        disturbed = False

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            if self.disturbed:
                torch.rand(17)
            super().on_train_batch_start(batch, batch_idx)

        def training_step(self, batch: Tensor, batch_idx: int) -> None:
            self.seen.append(torch.rand(3))
            super().training_step(batch, batch_idx)

    calm, disturbed = Dropping(), Dropping()
    disturbed.disturbed = True
    fit(calm, tmp_path)
    fit(disturbed, tmp_path)
    assert torch.equal(torch.stack(calm.seen), torch.stack(disturbed.seen))
    assert len({tuple(row.tolist()) for row in calm.seen}) == 4


class Other(Toy):
    pass


def test_the_checkpoint_of_another_paper_is_refused(tmp_path: Path) -> None:
    trainer = fit(Toy(), tmp_path)
    path = tmp_path / "toy.ckpt"
    trainer.save_checkpoint(path, weights_only=False)
    Toy.load_from_checkpoint(path)
    with pytest.raises(RuntimeError, match="written by Toy, not by Other"):
        Other.load_from_checkpoint(path)


def test_an_averaged_network_survives_loading_without_its_callback(tmp_path: Path) -> None:
    module = Toy()
    averaged = module.register_ema("second", decay=0.5)
    trainer = fit(module, tmp_path)
    averaged.update_parameters(module.second)
    path = tmp_path / "toy.ckpt"
    trainer.save_checkpoint(path, weights_only=False)
    loaded = Toy.load_from_checkpoint(path)
    assert torch.equal(loaded.second_ema.module.weight, module.second.weight)  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="no network 'third'; it has first, second"):
        module.register_ema("third")
