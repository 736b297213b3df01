"""The module: losses, groups, baseline, maps, errors."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_modules.acol import ACoL
from lightning_modules.acol.module import one_cycle
from tests.callbacks.boring import boring_trainer
from tests.scripted import Rows

SMALL: dict[str, Any] = {
    "num_classes": 3,
    "backbone": "small",
    "width": 4,
    "norm": "group",
    "head_width": 6,
    "epochs": 2,
    "lr": 0.01,
}
CLASSES = 3


def module(**options: Any) -> ACoL:
    torch.manual_seed(0)
    return ACoL(**{**SMALL, **options})


def rows() -> Rows:
    images = torch.rand(12, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    return Rows(images, torch.arange(12) % CLASSES)


def fit(acol: ACoL, folder: Path, **options: Any) -> Trainer:
    trainer = boring_trainer(folder, max_epochs=acol.total_epochs, **options)
    trainer.fit(acol, DataLoader(rows(), 4), DataLoader(rows(), 4))
    return trainer


def equal(first: torch.nn.Module, second: torch.nn.Module) -> bool:
    a, b = first.state_dict(), second.state_dict()
    return all(torch.equal(a[key], b[key]) for key in a)


# ------------------------------------------------------------------ training
@pytest.mark.parametrize(
    ("recipe", "delta", "terms"),
    [
        ("cam", 0.6, {"loss_a", "loss"}),
        ("acol", 0.6, {"loss_a", "loss_b", "loss", "erased_b"}),
        ("ppn", [0.9, 0.6], {"loss_a", "loss_b", "loss_c", "loss", "erased_b", "erased_c"}),
    ],
)
def test_every_stage_is_logged(recipe: str, delta: Any, terms: set[str], tmp_path: Path) -> None:
    acol = module(recipe=recipe, delta=delta)
    trainer = fit(acol, tmp_path)
    logged = {
        k.removeprefix("train/"): v for k, v in trainer.logged_metrics.items() if "train/" in k
    }
    assert set(logged) == terms
    total = sum(value for name, value in logged.items() if name.startswith("loss_"))
    torch.testing.assert_close(logged["loss"], total)
    if "erased_b" in terms:
        assert 0 < logged["erased_b"] < 1
    assert 0 <= trainer.callback_metrics["val/fused/accuracy"] <= 1


def test_losses_are_those_of_the_kinds_of_stages() -> None:
    acol, images = module(recipe="pn"), rows().images
    labels = rows().labels
    stages = acol.network(acol.network.features(images), labels)
    a, b = acol.stage_losses(stages, labels)
    torch.testing.assert_close(a, F.cross_entropy(stages[0].logits, labels))
    others = (1 - F.one_hot(labels, CLASSES).float()) / (CLASSES - 1)
    torch.testing.assert_close(b, F.cross_entropy(stages[1].logits, others))
    assert b >= math.log(CLASSES - 1)


def test_erasing_uses_the_label_in_training() -> None:
    acol, batch = module(), rows()
    seen: list[Tensor] = []
    acol.network.register_forward_pre_hook(lambda _, args: seen.append(args[1]))
    acol.log_mean_over_ranks = lambda values: None  # type: ignore[method-assign]
    acol.training_step({"image": batch.images, "label": batch.labels}, 0)
    assert torch.equal(seen[0], batch.labels)


def test_mixed_precision(tmp_path: Path) -> None:
    acol = module(cam_baseline=True)
    seen: list[torch.dtype] = []
    acol.network.register_forward_hook(
        lambda *args: seen.extend(t.dtype for s in args[2] for t in (s.maps, s.attention))
    )
    trainer = fit(acol, tmp_path, precision="bf16-mixed", max_steps=2)
    assert set(seen) == {torch.float32}
    assert trainer.logged_metrics["train/loss"].isfinite()


def test_parameter_groups() -> None:
    acol = module(norm="none", cam_baseline=True, lr=0.1, weight_decay=0.5, bias_weight_decay=False)
    groups = {group["name"]: group for group in acol.parameter_groups()}
    found = {name: (group["lr"], group["weight_decay"]) for name, group in groups.items()}
    plain = {
        "backbone_weights": (0.1, 0.5),
        "backbone_biases": (0.2, 0.0),
        "heads_weights": (1.0, 0.5),
        "heads_biases": (2.0, 0.0),
    }
    assert found == plain | {f"cam_{name}": value for name, value in plain.items()}
    grouped = [id(p) for group in groups.values() for p in group["params"]]
    assert sorted(grouped) == sorted(map(id, acol.parameters()))
    heads = {id(p) for p in acol.network.heads.parameters()}
    assert {id(p) for n in ("heads_weights", "heads_biases") for p in groups[n]["params"]} == heads
    decayed = module().parameter_groups()
    assert {group["weight_decay"] for group in decayed} == {5e-4}


def test_schedules(tmp_path: Path) -> None:
    def rates(**options: Any) -> list[float]:
        acol, seen = module(epochs=4, **options), []
        acol.on_before_optimizer_step = lambda optimizer: seen.append(  # type: ignore[method-assign]
            optimizer.param_groups[0]["lr"]
        )
        fit(acol, tmp_path)
        return seen

    stepped = rates(decay_epochs=[1, 3], decay_factor=0.5)
    assert stepped == pytest.approx([0.01] * 3 + [0.005] * 6 + [0.0025] * 3)
    cycle = rates(lr_schedule="one_cycle")
    assert cycle[0] == pytest.approx(0.01 / 25)
    assert max(cycle) > 0.009
    assert cycle[-1] < 1e-6


# ------------------------------------------------------------------ baseline
def test_baseline_is_the_cam_run_and_changes_nothing(tmp_path: Path) -> None:
    both, acol, cam = module(cam_baseline=True), module(), module(recipe="cam")
    start = both.cam.heads[0][0].weight.clone()
    for each in (both, acol, cam):
        fit(each, tmp_path)
    assert equal(both.network, acol.network)
    assert equal(both.cam, cam.network)
    assert not torch.equal(both.cam.heads[0][0].weight, start)
    assert not equal(both.cam.backbone, both.network.backbone)


def test_rows_stand_side_by_side() -> None:
    acol = module(cam_baseline=True).eval()
    images = rows().images
    maps = acol.localization_maps(images, rows().labels)
    assert list(maps) == ["cam", "stage_a", "stage_b", "fused"] == list(acol.rows)
    assert torch.equal(maps["fused"], torch.maximum(maps["stage_a"], maps["stage_b"]))
    for each in maps.values():
        assert each.shape == (12, 4, 4)
        assert (each.amax((1, 2)) == 1).all()
    assert (maps["stage_b"].amin((1, 2)) == 0).all()
    assert list(module(recipe="cam").localization_maps(images)) == ["fused"]


# ------------------------------------------------------------------ classes and maps
def test_maps_of_labels_and_predictions() -> None:
    acol, images, labels = module(), rows().images, rows().labels
    found = acol.localize(images, labels, top=2)["fused"]
    assert torch.equal(found.classes[:, 0], labels)
    assert torch.equal(found.classes[:, 1], acol.classify(images).argmax(1))
    assert found.maps.shape == (12, 3, 4, 4)
    with_label = acol.localization_maps(images, labels)["fused"]
    torch.testing.assert_close(with_label, found.maps[:, 0])
    torch.testing.assert_close(acol.localization_maps(images)["fused"], found.maps[:, 1])
    with pytest.raises(ValueError, match="top=4 must be from 1 to 3"):
        acol.localize(images, top=4)


def test_what_is_erased_in_evaluation() -> None:
    images, labels = rows().images, rows().labels
    found = {
        mode: module(erase_class=mode).localize(images, labels)["stage_b"].maps
        for mode in ("each", "label", "predicted")
    }
    torch.testing.assert_close(found["each"][:, 0], found["label"][:, 0])
    torch.testing.assert_close(found["each"][:, 1], found["predicted"][:, 1])
    wrong = module().classify(images).argmax(1) != labels
    assert wrong.any()
    assert not torch.allclose(found["label"][wrong], found["predicted"][wrong])


def test_classifying_stage() -> None:
    images = rows().images
    a, b, mean = (module(classify_with=w).classify(images) for w in ("a", "b", "mean"))
    torch.testing.assert_close(mean, (a + b) / 2)
    assert not torch.allclose(a, b)
    torch.testing.assert_close(a.sum(1), torch.ones(12))
    torch.testing.assert_close(
        module(recipe="pn", classify_with="mean").classify(images),
        module(recipe="pn").classify(images),
    )


def test_prediction_columns() -> None:
    acol, images = module(), rows().images
    acol.class_names = ["messi", "neymar", "son"]
    columns = acol.predict_step({"image": images}, 0)
    probabilities = acol.classify(images)
    assert columns["label"] == [acol.class_names[k] for k in probabilities.argmax(1)]
    torch.testing.assert_close(columns["confidence"], probabilities.amax(1))


# ------------------------------------------------------------------ bad input
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"delta": 0.0}, r"delta=0.0 must be in \(0, 1\).*--model.delta"),
        ({"recipe": "cam", "delta": 1.0}, r"delta=1.0 must be in \(0, 1\)"),
        ({"recipe": "pp", "delta": [0.6, 1.5]}, "delta=1.5 must be in"),
        ({"delta": float("nan")}, "delta=nan must be in"),
        (
            {"recipe": "ppn", "delta": [0.6]},
            r"recipe='ppn' erases 2 times, but delta=\[0.6\] has 1",
        ),
        ({"recipe": "px"}, "unknown recipe='px' .*choose acol, cam or a chain of p and n"),
        ({"recipe": ""}, "unknown recipe=''"),
        ({"recipe": "np"}, "must begin with p: its first stage classifies"),
        ({"recipe": "p" * 27}, "has 27 stages; at most 26"),
        ({"backbone": "vgg"}, "unknown backbone='vgg'"),
        ({"stride": 3}, "small has no stride=3"),
        ({"norm": "layer"}, "unknown norm='layer'"),
        ({"num_classes": 1}, "num_classes=1 must be at least 2"),
        ({"epochs": 0}, "epochs=0 must be at least 1"),
        ({"recipe": "pn", "classify_with": "b"}, "classify_with='b' needs a second stage"),
        ({"recipe": "p", "cam_baseline": True}, "recipe='p' has one stage"),
        ({"erase_class": "none"}, "unknown erase_class='none'.*each, predicted, label"),
        ({"rest_loss": "other"}, "unknown rest_loss='other'"),
    ],
)
def test_impossible_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        module(**options)


def test_data_with_other_classes(tmp_path: Path) -> None:
    acol = module()
    trainer: Any = boring_trainer(tmp_path)
    trainer.strategy._lightning_module = acol
    acol._trainer = trainer
    trainer.datamodule = type("Data", (), {"class_names": ["cat", "dog"]})()
    with pytest.raises(ValueError, match=r"2 classes \(cat, dog\); set --model.num_classes 2"):
        acol.setup("fit")
    trainer.datamodule.class_names = ["cat", "dog", "cow"]
    acol.setup("fit")
    assert acol.class_names == ["cat", "dog", "cow"]


def test_missing_weights_stop_everything_but_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    options = {"backbone": "resnet18", "pretrained": True}
    starting: LightningModule = module(**options)
    assert isinstance(starting, ACoL)
    with pytest.raises(
        FileNotFoundError, match=r"weights of resnet18 are not at .*--model.download"
    ):
        fit(starting, tmp_path)
    with pytest.raises(FileNotFoundError, match=r"--model\.weights_path"):
        starting.classify(rows().images)
    trained = module(**options)
    trained._missing_weights = None
    trained.class_names = ["cat", "dog", "cow"]
    trainer = boring_trainer(tmp_path)
    trainer.strategy.connect(trained)
    trainer.save_checkpoint(tmp_path / "trained.ckpt")
    again = ACoL.load_from_checkpoint(tmp_path / "trained.ckpt", weights_only=True)
    assert again.class_names == trained.class_names
    images = torch.rand(1, 3, 64, 64)
    torch.testing.assert_close(again.eval().classify(images), trained.eval().classify(images))


@pytest.mark.parametrize("length", [7, 376])
def test_one_cycle_is_that_of_torch(length: int) -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, length)
    for step in range(length):
        share, momentum = one_cycle(step, length)
        (group,) = optimizer.param_groups
        assert 0.1 * share == pytest.approx(group["lr"], rel=1e-9)
        assert momentum == pytest.approx(group["momentum"], rel=1e-9)
        optimizer.step()
        if step < length - 1:
            schedule.step()
