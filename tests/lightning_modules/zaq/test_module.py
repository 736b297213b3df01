"""The run of ZAQ and its baselines: who learns from what, when, and what an evaluation leaves alone."""

from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from callbacks.layer_weights import EMALayerWeights
from datamodules.classification import ClassificationDataModule
from lightning_modules.zaq import ZAQ
from lightning_modules.zaq.attach import activation_quantizers, calibrate, named_ranges
from lightning_modules.zaq.baselines import aciq
from lightning_modules.zaq.methods import Baseline
from tests.callbacks.boring import boring_trainer

SMALL: dict[str, Any] = {
    "network": "small",
    "in_channels": 1,
    "image_size": 16,
    "width": 4,
    "teacher_steps": 5,
    "epochs": 2,
    "iterations": 3,
    "q_steps": 2,
    "latent_dim": 4,
    "ngf": 2,
    "gdfq_epochs": 2,
    "gdfq_warmup_epochs": 1,
    "gdfq_latent_dim": 4,
    "ft_epochs": 1,
    "zeroq_images": 4,
    "zeroq_steps": 2,
    "zeroq_kd_epochs": 1,
    "lr_q": 0.01,
}


def module(**options: Any) -> ZAQ:
    torch.manual_seed(0)
    return ZAQ(**{**SMALL, **options})


def data(**options: Any) -> ClassificationDataModule:
    small = {"image_size": 16, "batch_size": 8, "train_limit": 6, "test_limit": 3}
    return ClassificationDataModule("digits", **{**small, **options})


class Spy(Callback):
    """Notes the keys of the batches, the state at epoch ends and every step of an optimizer."""

    def __init__(self) -> None:
        self.keys: list[tuple[str, set[str]]] = []
        self.states: list[dict[str, Tensor]] = []
        self.steps: list[str] = []
        self.fakes: list[Tensor] = []

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        zaq: Any = pl_module
        minimize, fakes = zaq._minimize, zaq._fakes

        def noted_minimize(chosen: Any, losses: Any) -> Tensor:
            self.steps += list(chosen)
            return minimize(chosen, losses)

        def noted_fakes(*args: Any) -> Tensor:
            self.fakes.append(fakes(*args))
            return self.fakes[-1]

        zaq._minimize, zaq._fakes = noted_minimize, noted_fakes

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        zaq: Any = pl_module
        self.keys.append((zaq.stage.method, set(batch)))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.states.append({k: v.clone() for k, v in pl_module.state_dict().items()})


def fit(zaq: ZAQ, folder: Path, *callbacks: Callback, **options: Any) -> Spy:
    spy = Spy()
    trainer = boring_trainer(folder, callbacks=[*callbacks, spy], max_epochs=zaq.total_epochs)
    trainer.fit(zaq, datamodule=data(**options))
    return spy


def of(state: dict[str, Any], name: str) -> dict[str, Tensor]:
    found = {k.removeprefix(f"{name}."): v for k, v in state.items() if k.startswith(f"{name}.")}
    assert found
    return found


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> tuple[ZAQ, Spy, dict[str, Any]]:
    zaq = module(widths=["W8A8", "W3A3"], baselines=list(get_args(Baseline)), gdfq_lr_q=0.01)
    folder = tmp_path_factory.mktemp("everything")
    spy = fit(zaq, folder, EMALayerWeights(momentum=0.5))
    trainer = boring_trainer(folder)
    trainer.test(zaq, datamodule=data(), verbose=False)
    return zaq, spy, dict(trainer.callback_metrics)


def test_only_fine_tuning_on_real_data_gets_images(everything: Any) -> None:
    zaq, spy, _ = everything
    stages = ["zaq"] * 12 + ["zeroq_kd"] * 6 + ["gdfq"] * 12 + ["ft"] * 6
    assert [method for method, _ in spy.keys] == stages
    for method, keys in spy.keys:
        assert ("image" in keys) == ("label" in keys) == (method == "ft")
    assert zaq.total_epochs == 12


def test_every_method_has_a_number_at_every_width(everything: Any) -> None:
    zaq, _, metrics = everything
    expected = {f"test/{row}/{w}" for row in zaq.row_titles for w in ("W8A8", "W3A3")}
    assert expected <= metrics.keys()
    assert metrics["test/float/W8A8"] == metrics["test/float/W3A3"]


def test_the_float_network_is_never_touched(everything: Any) -> None:
    _, spy, _ = everything
    first, last = (of(state, "teacher.network") for state in (spy.states[0], spy.states[-1]))
    assert all(torch.equal(first[key], last[key]) for key in first)


def test_a_stage_trains_its_own_networks_only(everything: Any) -> None:
    _, spy, _ = everything
    moved = []
    for before, after in zip(spy.states, spy.states[1:], strict=False):
        parts = {".".join(k.split(".")[:2]) for k in after if not torch.equal(before[k], after[k])}
        moved.append({part for part in parts if part.split(".")[0] in ("students", "generators")})
    games = [{"students.zaq_W8A8", "generators.zaq_W8A8"}]
    games += 2 * [{"students.zaq_W3A3", "generators.zaq_W3A3"}]
    games += [{"students.zeroq_kd_W8A8"}, {"students.zeroq_kd_W3A3"}]
    games += 2 * [{"students.gdfq_W8A8", "generators.gdfq_W8A8"}]
    games += 2 * [{"students.gdfq_W3A3", "generators.gdfq_W3A3"}]
    games += [{"students.ft_W8A8"}, {"students.ft_W3A3"}]
    assert moved == games


def test_steps_of_an_iteration(everything: Any) -> None:
    _, spy, _ = everything
    assert spy.steps[:3] == ["zaq_W8A8_student", "zaq_W8A8_student", "zaq_W8A8_generator"]
    gdfq = [name for name in spy.steps if name.startswith("gdfq_W8A8")]
    # The warm-up trains the generator alone.
    assert gdfq == ["gdfq_W8A8_generator"] * 3 + ["gdfq_W8A8_generator", "gdfq_W8A8_student"] * 3


def test_distillation_has_ranges_of_the_distilled_images_and_learns_from_the_float_network(
    everything: Any,
) -> None:
    zaq, spy, _ = everything
    student = zaq.students["zeroq_kd_W8A8"]
    untrained = zaq.quantizer.attach(zaq.float_network, zaq.widths[0])
    calibrate(untrained, [zaq.distilled_images()])
    assert named_ranges(student) == named_ranges(untrained)
    assert spy.steps.count("zeroq_kd_W8A8_student") == 3


def test_bits_of_layers_are_no_more_than_those_of_the_width(everything: Any) -> None:
    zaq, _, _ = everything
    sizes = {
        name: part.weight.numel()
        for name, part in zaq.float_network.named_modules()
        if isinstance(part, nn.Conv2d | nn.Linear)
    }
    assert zaq.allocated_bits.keys() == {"W8A8", "W3A3"}
    bits = zaq.allocated_bits["W3A3"]
    assert bits.keys() == sizes.keys()
    assert sum(sizes[name] * bits[name] for name in sizes) <= 3 * sum(sizes.values())
    assert len(set(bits.values())) > 1, "some layers have more, others less"


def test_layer_weights_follow_the_distances(everything: Any) -> None:
    _, spy, _ = everything
    first, second = (
        of(state, "layer_weights.zaq_W8A8")["weights"] for state in (spy.states[0], spy.states[1])
    )
    assert not torch.allclose(first, torch.full((3,), 1 / 3), rtol=1e-6)
    assert torch.allclose(second.sum(), torch.ones(()))
    assert not torch.equal(first, second)
    # Later stages leave them alone.
    assert torch.equal(of(spy.states[-1], "layer_weights.zaq_W8A8")["weights"], second)


def test_best_epoch_is_kept_apart(everything: Any) -> None:
    zaq, spy, _ = everything
    best = of(zaq.state_dict(), "best.zaq_W3A3")
    students = [of(state, "students.zaq_W3A3") for state in spy.states[2:4]]
    weights = [
        all(torch.equal(best[k], state[k]) for k in best if k.endswith("weight"))
        for state in students
    ]
    assert any(weights)
    assert zaq.deployable_networks()["W3A3"] is zaq.students["zaq_W3A3"]


def test_ranges_freeze_after_their_epochs(tmp_path: Path) -> None:
    spy = fit(module(epochs=3, range_epochs=2), tmp_path)
    ends = [
        {k: v for k, v in s.items() if k.endswith(".hi") and "students" in k} for s in spy.states
    ]
    assert any(not torch.equal(ends[0][k], ends[1][k]) for k in ends[0])
    assert all(torch.equal(ends[1][k], ends[2][k]) for k in ends[1])


def test_ranges_of_batch_norms_are_those_of_aciq_and_stay(tmp_path: Path) -> None:
    zaq = module(epochs=2, range_source="batch_norms")
    fit(zaq, tmp_path)
    of_aciq = aciq(zaq.float_network, zaq.widths[0], zaq.quantizer, zaq.image_shape)
    assert named_ranges(zaq.students["zaq_W4A4"]) == named_ranges(of_aciq)


@pytest.mark.parametrize("mode", ["frozen", "train"])
def test_batch_norm_mode(mode: str, tmp_path: Path) -> None:
    zaq = module(epochs=1, bn_mode=mode)
    state = of(fit(zaq, tmp_path).states[0], "students.zaq_W4A4")
    kept = all(
        torch.equal(state[key], value)
        for key, value in zaq.float_network.state_dict().items()
        if "running" in key
    )
    assert kept == (mode == "frozen")
    assert any(
        not torch.equal(state[key], value)
        for key, value in zaq.float_network.state_dict().items()
        if key.endswith("weight")
    )


@pytest.mark.parametrize("reuse", [True, False])
def test_fakes_are_reused_or_fresh(reuse: bool, tmp_path: Path) -> None:
    spy = fit(module(epochs=1, iterations=1, q_steps=3, reuse_fakes=reuse), tmp_path)
    assert len(spy.fakes) == (2 if reuse else 4)
    assert not torch.equal(spy.fakes[0], spy.fakes[1])


def test_without_the_callback_layers_weigh_the_same(tmp_path: Path) -> None:
    spy = fit(module(), tmp_path)
    weights = of(spy.states[-1], "layer_weights.zaq_W4A4")["weights"]
    assert torch.equal(weights, torch.full((3,), 1 / 3))


def test_presets_and_what_overrides_them() -> None:
    assert module(preset="released").setting("feature_loss") == "scrm"
    assert module(preset="paper").setting("alpha") == 0.1
    assert module(preset="released", alpha=0.5).setting("alpha") == 0.5
    assert module(preset="released").layer_weight_ema is None


def test_rates_fall_within_their_own_stage() -> None:
    zaq = module(widths=["W8A8", "W4A4"], epochs=6)
    second = zaq._decay(zaq.stages[1])
    assert [round(second(epoch), 4) for epoch in (0, 5, 6, 8, 10, 11)] == [1, 1, 1, 0.1, 0.01, 0.01]


def test_gradients_of_the_copies_are_clipped_and_no_others(tmp_path: Path) -> None:
    zaq = module(epochs=1, iterations=1, clip_q=1e-6)
    clip, norms = zaq.on_before_optimizer_step, []

    def noted(optimizer: torch.optim.Optimizer) -> None:
        clip(optimizer)
        grads = [p.grad.flatten() for g in optimizer.param_groups for p in g["params"]]
        norms.append(float(torch.cat(grads).norm()))

    zaq.on_before_optimizer_step = noted  # type: ignore[method-assign]
    fit(zaq, tmp_path)
    *of_q, of_g = norms
    assert len(of_q) == 2
    assert max(of_q) <= 1e-6
    assert of_g > 1e-5


def test_evaluation_that_moves_a_range_is_an_error(tmp_path: Path) -> None:
    zaq = module(epochs=1)
    fit(zaq, tmp_path)

    class Leak(Callback):
        def on_test_batch_start(self, *args: Any) -> None:
            for quantizer in activation_quantizers(zaq.students["zaq_W4A4"]).values():
                quantizer.train()
                quantizer.observe()

    with pytest.raises(RuntimeError, match="zero-shot"):
        boring_trainer(tmp_path, callbacks=[Leak()]).test(zaq, datamodule=data(), verbose=False)


def save_teacher(zaq: ZAQ, folder: Path) -> str:
    """The checkpoint of a module's float network."""
    checkpoint = folder / "teacher.ckpt"
    torch.save(
        {
            "module_class": "Classifier",
            "state_dict": zaq.teacher.state_dict(),
            "hyper_parameters": dict(zaq.teacher.hparams),
            "class_names": zaq.teacher.class_names,
            "pytorch-lightning_version": "2.6.0",
        },
        checkpoint,
    )
    return str(checkpoint)


def test_no_training_image_is_needed_for_a_checkpoint(tmp_path: Path) -> None:
    """A float network from a file, and nothing else."""
    source = module()
    fit(source, tmp_path / "first")
    checkpoint = save_teacher(source, tmp_path)
    zaq = module(teacher=checkpoint, epochs=1)
    fit(zaq, tmp_path / "second", training_images=False)
    first, second = source.float_network.state_dict(), zaq.float_network.state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert bool(zaq.best_score.isnan().all())
    assert "zaq_best" not in zaq.ready_rows


def test_a_teacher_of_another_shape_is_refused(tmp_path: Path) -> None:
    source = module(width=6)
    checkpoint = save_teacher(source, tmp_path)
    with pytest.raises(ValueError, match=r"teacher\.ckpt does not hold.*--model\.width"):
        fit(module(teacher=checkpoint), tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"widths": ["W1A4"]}, "W1A4, weights=1 .*from 2 to 8"),
        ({"widths": ["W4A9"]}, "W4A9, activations=9 .*from 2 to 8"),
        ({"widths": ["4"]}, "'4' is no width.*W4A4"),
        ({"widths": ["W4A4", "w4a4"]}, "each width once"),
        ({"baselines": ["kd"]}, "'kd'.*zeroq"),
        ({"preset": "ours"}, "preset='ours'.*released"),
        ({"overrides": {"0.9": 8}}, "no layer or activation quantizer '0.9'"),
        ({"taps": ["stage"]}, "no tap 'stage'"),
        ({"norm": "group", "baselines": ["gdfq"], "bns_weight": 0.0}, "gdfq would learn"),
        ({"norm": "group"}, "bns_weight would learn"),
        (
            {"norm": "group", "bns_weight": 0.0, "range_source": "batch_norms"},
            "range_source=batch_norms would learn",
        ),
        ({"network": "vgg11_bn"}, "--model.taps"),
        ({"q_steps": 0}, "q_steps=0"),
        ({"zeroq_steps": 0}, "zeroq_steps=0"),
        ({"gdfq_latent_dim": 0}, "gdfq_latent_dim=0"),
        ({"gdfq_temperature": 0.0}, "gdfq_temperature=0.0 must be above 0"),
        ({"lr_schedule": "linear"}, "lr_schedule='linear'.*cosine"),
        ({"bn_mode": "eval"}, "bn_mode='eval'.*frozen"),
        ({"alpha": -1.0}, "alpha=-1"),
    ],
)
def test_impossible_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        module(**options)


def test_a_network_that_cannot_be_traced_names_the_node() -> None:
    class Branching(nn.Module):
        taps = ("conv",)

        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 2, 3)
            self.norm = nn.BatchNorm2d(2)

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(self.conv(x))
            return y if y.sum() > 0 else -y

    with pytest.raises(ValueError, match=r"cannot be traced.*at the node"):
        module(network=Branching())
