"""Both phases: which network learns what from what, and when."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from callbacks.stability import AnomalyStabilityProbe
from datamodules.one_class import OneClassDataModule
from lightning_modules.ognet import OGNet
from lightning_modules.ognet.networks import OGNetGenerator
from lightning_modules.ognet.phase_two import Reconstructor, draw_pairs, phase_two_terms
from tests.callbacks.boring import boring_trainer

SMALL: dict[str, Any] = {"image_size": 20, "base_channels": 2, "phase_two_iterations": 4}


def module(**options: Any) -> OGNet:
    torch.manual_seed(0)
    return OGNet(**{**SMALL, **options})


def data(**options: Any) -> OneClassDataModule:
    small = {"image_size": 20, "batch_size": 16, "train_limit": 40, "test_limit": 8}
    return OneClassDataModule("digits", **{**small, **options})


class Spy(Callback):
    """Notes the state of the networks at the end of every epoch, and the batches of every phase."""

    def __init__(self) -> None:
        self.states: list[dict[str, Tensor]] = []
        self.batches: dict[str, int] = {"one": 0, "two": 0}

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self.batches[pl_module.phase] += 1  # type: ignore[index]

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.states.append({k: v.clone() for k, v in pl_module.state_dict().items()})


def fit(ognet: OGNet, folder: Path, *callbacks: Callback, **options: Any) -> Spy:
    spy = Spy()
    trainer = boring_trainer(folder, callbacks=[spy, *callbacks], max_epochs=ognet.total_epochs)
    trainer.fit(ognet, datamodule=data(**options))
    return spy


def of(state: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {k.removeprefix(f"{name}."): v for k, v in state.items() if k.startswith(f"{name}.")}


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    assert first.keys() == second.keys()
    return all(torch.allclose(first[k], second[k], 0, 0, equal_nan=True) for k in first)


# ------------------------------------------------------------------ phase one
@pytest.fixture
def gradients(monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}

    def note(self: OGNet, optimizer: Any) -> None:
        own = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for name, parameter in self.named_parameters():
            if id(parameter) in own and parameter.grad is not None:
                found.setdefault(name, parameter.grad.clone())

    monkeypatch.setattr(OGNet, "on_before_optimizer_step", note)
    return found


class OneBatch(Callback):
    """Computes the gradients of the first batch in the plainest way, then lets it run."""

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx or trainer.current_epoch:
            return
        ognet: Any = pl_module
        buffers = {k: v.clone() for k, v in ognet.state_dict().items()}
        x = ognet.to_network(batch["image"])
        noisy = (x + 0.81 * ognet.draw("noise", "normal", len(x), *x.shape[1:])).clamp(-1, 1)
        recon = ognet.generator(noisy)
        fake, real = ognet.discriminator(recon.detach()), ognet.discriminator(x)
        bce = F.binary_cross_entropy_with_logits
        loss = 0.5 * (bce(fake, torch.ones_like(fake)) + bce(real, torch.zeros_like(real)))
        names = dict(ognet.discriminator.named_parameters())
        self.of_d = dict(zip(names, torch.autograd.grad(loss, list(names.values())), strict=True))
        opinion = ognet.discriminator(recon)
        loss = 0.5 * F.mse_loss(recon, x) + 0.5 * bce(opinion, torch.zeros_like(opinion))
        names = dict(ognet.generator.named_parameters())
        self.of_g = dict(zip(names, torch.autograd.grad(loss, list(names.values())), strict=True))
        ognet.load_state_dict(buffers)


@pytest.mark.parametrize("mode", ["recompute", "simultaneous"])
def test_each_network_gets_the_gradient_of_its_own_loss(
    mode: str, gradients: dict[str, Tensor], tmp_path: Path
) -> None:
    """The discriminator's has no adversarial term, which a popular repair of the released code adds."""
    plain = OneBatch()
    fit(module(d_forward=mode, phase_one_epochs=1), tmp_path, plain)
    for name, gradient in plain.of_d.items():
        torch.testing.assert_close(gradients[f"discriminator.{name}"], gradient)
    same = [
        torch.allclose(gradients[f"generator.{name}"], gradient, rtol=1e-4, atol=1e-7)
        for name, gradient in plain.of_g.items()
    ]
    # With "recompute" the discriminator has stepped by then.
    assert all(same) == (mode == "simultaneous")


@pytest.mark.parametrize(("option", "each"), [(False, 2), (True, 3)])
@pytest.mark.parametrize("mode", ["recompute", "simultaneous"])
def test_running_statistics_move_as_often_as_asked(
    mode: str, option: bool, each: int, tmp_path: Path
) -> None:
    spy = fit(module(d_forward=mode, update_bn_in_g_step=option, phase_one_epochs=1), tmp_path)
    tracked = of(spy.states[0], "discriminator")["discriminator.1.num_batches_tracked"]
    assert int(tracked) == each * spy.batches["one"]


def test_the_old_generator_is_that_of_its_epoch(tmp_path: Path) -> None:
    spy = fit(module(phase_one_epochs=3, old_epoch=1), tmp_path)
    after = [of(state, "generator") for state in spy.states]
    old = [of(of(state, "old_generator"), "module") for state in spy.states]
    # A validation comes before the end of its epoch, at which the generator is remembered.
    assert equal(old[2], after[1])
    assert equal(old[3], after[1])
    assert not equal(old[1], after[1])
    assert spy.states[0].keys() == spy.states[3].keys()


# ------------------------------------------------------------------ phase two
@pytest.mark.parametrize("options", [{"train_limit": 17, "val_fraction": 0.05}, {}])
def test_phase_two_has_its_iterations_whatever_the_data(
    options: dict[str, Any], tmp_path: Path
) -> None:
    spy = fit(module(phase_two_iterations=11, phase_one_epochs=2), tmp_path, **options)
    assert spy.batches["two"] == 11
    assert spy.batches["one"] in (2, 4)


def test_phase_two_changes_the_tuned_discriminator_alone(tmp_path: Path) -> None:
    spy = fit(module(phase_one_epochs=2), tmp_path)
    before, after = spy.states[1], spy.states[2]
    for name in ("generator", "discriminator"):
        assert equal(of(before, name), of(after, name)), name
    tuned, start = of(after, "tuned_discriminator"), of(before, "discriminator")
    assert not torch.equal(tuned["discriminator.0.weight"], start["discriminator.0.weight"])
    gap = (tuned["discriminator.0.weight"] - start["discriminator.0.weight"]).abs().max()
    assert gap < 5 * 5e-5, "it starts from the discriminator of phase one"
    tracked = "discriminator.1.num_batches_tracked"
    assert tuned[tracked] - start[tracked] == 4 * 4


def test_precomputed_reconstructions_are_the_same(tmp_path: Path) -> None:
    spies = [
        fit(module(precompute_reconstructions=option, phase_one_epochs=1), tmp_path)
        for option in (False, True)
    ]
    for key, value in spies[0].states[-1].items():
        torch.testing.assert_close(spies[1].states[-1][key], value, msg=key, equal_nan=True)


def test_phase_two_batches_need_no_gradient_and_move_no_statistics() -> None:
    ognet = module()
    images = torch.rand(9, 1, 20, 20) * 2 - 1
    before = {k: v.clone() for k, v in ognet.state_dict().items()}
    reconstructor = Reconstructor(
        ognet.generator, ognet.old_generator, lambda indices: images[indices], 9
    )
    batch = reconstructor.batch(torch.tensor([0, 1]), torch.tensor([2, 3]), torch.tensor([4, 5]))
    assert not any(part.requires_grad for part in batch)
    assert ognet.generator.training
    assert equal(before, ognet.state_dict())
    ognet.generator.eval()
    old = ognet.old_generator(images)
    torch.testing.assert_close(batch.pseudo, ognet.generator((old[2:4] + old[4:6]) / 2).detach())
    torch.testing.assert_close(batch.recon, ognet.generator(images[:2]).detach())


def test_pairs() -> None:
    x = torch.arange(100, 108)
    a, b = draw_pairs(50, 8, "separate", x, 1, 2)
    assert len(set(a.tolist()) | set(b.tolist())) == 16, "no image twice while there are enough"
    assert torch.equal(draw_pairs(50, 8, "separate", x, 1, 2)[0], a)
    assert not torch.equal(draw_pairs(50, 8, "separate", x, 1, 3)[0], a)
    few_a, few_b = draw_pairs(3, 8, "separate", x, 1, 2)
    assert len(few_a) == len(few_b) == 8
    assert set(few_a.tolist()) == {0, 1, 2}
    first, second = draw_pairs(50, 8, "permute", x, 1, 2)
    assert sorted(first.tolist()) == sorted(second.tolist()) == x.tolist()
    assert not torch.equal(first, second)


# ------------------------------------------------------------------ the probe
def test_the_probe_disturbs_nothing(tmp_path: Path) -> None:
    probe = AnomalyStabilityProbe(every_n_epochs=2)
    plain = fit(module(phase_one_epochs=4), tmp_path / "a")
    probed = fit(module(phase_one_epochs=4), tmp_path / "b", probe)
    assert equal(plain.states[-1], probed.states[-1])
    assert [row[0] for row in probe.rows] == [1, 3]
    assert all(0 <= auc <= 1 for row in probe.rows for auc in row[1:])
    assert (tmp_path / "b" / "images" / "stability-5.png").exists()
    assert (tmp_path / "b" / "tables" / "stability.csv").read_text().count("\n") == 3
    again = AnomalyStabilityProbe()
    again.load_state_dict(probe.state_dict())
    assert again.rows == probe.rows


def test_a_tuned_copy_has_learned_phase_two() -> None:
    ognet = module(phase_two_iterations=40, lr_d_phase_two=1e-3)
    ognet.old_generator.update_parameters(OGNetGenerator(1, 2), copy=True)
    source = data()
    source.setup("fit")
    assert source.train is not None
    tuned = ognet.tuned_copy(source.train, 16, "test")
    x, a, b = torch.arange(16), torch.arange(16, 32), torch.arange(8, 24)
    batch = ognet.reconstructor(source.train).batch(x, a, b)
    before, after = (
        phase_two_terms(copy.deepcopy(network).train(), batch, 0.1, 0.001)["total"]
        for network in (ognet.discriminator, tuned)
    )
    assert after < before - 0.03
    assert not tuned.training
    again = ognet.tuned_copy(source.train, 16, "test")
    assert equal(tuned.state_dict(), again.state_dict())


def test_a_probe_needs_a_second_phase(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="remembered at the end of epoch 0"):
        module().tuned_copy(None, 4)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="every_n_epochs=0"):
        AnomalyStabilityProbe(0)


# ------------------------------------------------------------------ scores and arguments
def test_scores_rank_by_logits_and_predict_gives_probabilities() -> None:
    ognet = module(base_channels=8).double().eval()
    images = torch.rand(3, 3, 20, 20, dtype=torch.float64)
    assert "ognet" not in ognet.anomaly_scores(images)
    with pytest.raises(RuntimeError, match="no threshold for score 'ognet'"):
        ognet.predict_step({"image": images}, 0)
    ognet.tuned.fill_(True)
    scores = ognet.anomaly_scores(images)
    recon = ognet.reconstruct(images)
    x = ognet.to_network(images)
    assert recon.shape == (3, 1, 20, 20)
    torch.testing.assert_close(
        scores["reconstruction"], (2 * recon - 1 - x).square().flatten(1).mean(1)
    )
    ognet.thresholds.fill_(float(scores["ognet"].sort().values[1]))
    predicted = ognet.predict_step({"image": images}, 0)
    torch.testing.assert_close(predicted["score"], scores["ognet"].double().sigmoid())
    above = (scores["ognet"] > ognet.thresholds[3]).tolist()
    assert predicted["decision"] == ["outlier" if value else "normal" for value in above]
    assert predicted["decision"].count("outlier") == 1


def test_colour_is_turned_to_grey_or_kept() -> None:
    images = torch.rand(2, 3, 20, 20)
    assert module().to_network(images).shape == (2, 1, 20, 20)
    assert module(in_channels=3).to_network(images).shape == (2, 3, 20, 20)
    grey = torch.rand(2, 1, 20, 20).expand(-1, 3, -1, -1)
    torch.testing.assert_close(module().to_network(grey), grey[:, :1] * 2 - 1, atol=3e-4, rtol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 16}, "image_size=16 must be at least 17"),
        ({"in_channels": 2}, "in_channels=2"),
        ({"phase_one_epochs": 0}, "phase_one_epochs=0"),
        ({"phase_two_iterations": 0}, "phase_two_iterations=0"),
        ({"old_epoch": 4}, "old_epoch=4 must be one of the 4 epochs"),
        ({"alpha": 1.5}, "alpha=1.5"),
        ({"acceptance": 1.0}, "acceptance"),
        ({"decision_score": "best"}, "unknown decision_score='best'; choose one of reconstruction"),
    ],
)
def test_impossible_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        module(**options)


def test_images_of_another_size_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="image_size=20, the data have 24"):
        fit(module(), tmp_path, image_size=24)


def test_outliers_score_higher(tmp_path: Path) -> None:
    ognet = module(
        base_channels=4,
        phase_one_epochs=12,
        old_epoch=1,
        phase_two_iterations=60,
        beta=0.5,
        lr_d=4e-4,
        lr_d_phase_two=1e-3,
    )
    trainer = boring_trainer(tmp_path, max_epochs=ognet.total_epochs)
    images = data(train_limit=None, test_limit=30)
    trainer.fit(ognet, datamodule=images)
    trainer.test(ognet, datamodule=images, verbose=False)
    auc = float(trainer.callback_metrics["test/ognet/auc"])
    assert math.isfinite(auc)
    assert auc > 0.9
