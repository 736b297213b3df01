"""The loop of StarGAN: who is updated when and at which rate, what is logged, and what it makes of pictures."""

import csv
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from callbacks.ema import GeneratorEMA
from callbacks.loggers import ResumableCSVLogger
from datamodules.attributes import AttributeDataModule
from datamodules.shapes_options import SceneOptions
from lightning_modules.stargan import StarGAN, load_reference_checkpoint
from lightning_modules.stargan.losses import decayed_lr
from lightning_modules.stargan.released import export_reference_state_dict
from tests.callbacks.boring import boring_trainer

NAMES = ["Black_Hair", "Blond_Hair", "Male"]
CLASSES = ["happy", "sad"]
SMALL: dict[str, Any] = {
    "image_size": 8,
    "ngf": 2,
    "n_blocks": 1,
    "ndf": 2,
    "n_layers": 2,
    "n_critic": 3,
    "total_steps": 6,
    "decay_steps": 3,
    "steps_per_epoch": 6,
}
JOINT: dict[str, Any] = {
    "attributes": [NAMES, CLASSES],
    "label_kind": ["multi_label", "single_label"],
}


def module(**options: Any) -> StarGAN:
    torch.manual_seed(0)
    return StarGAN(**{"attributes": NAMES, **SMALL, **options})


def images(rows: int = 4, seed: int = 0) -> Tensor:
    return torch.rand(rows, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def batch(seed: int = 0) -> dict[str, Tensor]:
    labels = torch.tensor([[1.0, 0, 0], [0, 1, 1], [0, 0, 1], [0, 0, 0]])
    return {"image": images(seed=seed), "attributes": labels.roll(seed, 0)}


def joint_batch(seed: int = 0) -> dict[str, Any]:
    classes = torch.eye(2)[[0, 1, 1, 0]]
    return {"0": batch(seed), "1": {"image": images(seed=seed + 50), "attributes": classes}}


class Spy(Callback):
    """Notes after every batch the losses, the rates, and which networks have moved."""

    def __init__(self) -> None:
        self.losses: list[dict[str, float]] = []
        self.rates: list[list[float]] = []
        self.moved: list[set[str]] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.before = {k: v.clone() for k, v in pl_module.state_dict().items()}

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        losses: dict[str, Tensor] = pl_module.losses  # type: ignore[assignment]
        self.losses.append({name: value.item() for name, value in losses.items()})
        self.rates.append([o.param_groups[0]["lr"] for o in trainer.optimizers])
        now = pl_module.state_dict()
        changed = (k for k, v in self.before.items() if not torch.equal(v, now[k]))
        self.moved.append({k.split(".")[0] for k in changed})


def fit(
    stargan: StarGAN, folder: Path, make: Callable[[int], Any] = batch, **options: Any
) -> tuple[Spy, Trainer]:
    spy = Spy()
    count = stargan.hp.total_steps
    options = {"max_epochs": 1, **options, "callbacks": [spy, *options.get("callbacks", [])]}
    trainer = boring_trainer(folder, **options)
    trainer.fit(stargan, DataLoader([make(i) for i in range(count)], batch_size=None))  # type: ignore[arg-type]
    return spy, trainer


# ------------------------------------------------------------------ schedule
def test_the_generator_moves_in_every_third_batch(tmp_path: Path) -> None:
    spy, trainer = fit(module(), tmp_path)
    d, both = {"discriminator"}, {"discriminator", "generator"}
    assert spy.moved == [d, d, both, d, d, both]
    # Batches are counted, not the eight optimizer steps.
    assert trainer.global_step == 6


def test_rates_are_functions_of_the_batch(tmp_path: Path) -> None:
    spy, _ = fit(module(lr_g=0.3, lr_d=0.1), tmp_path)
    expected = [[decayed_lr(i, lr, 6, 3, every=1) for lr in (0.1, 0.3)] for i in range(6)]
    assert spy.rates == [pytest.approx(pair) for pair in expected]
    assert spy.rates[2] == [0.1, 0.3]
    assert spy.rates[5] == pytest.approx([0.1 / 3, 0.1])


def test_the_released_decay_waits_for_1000_batches() -> None:
    stargan = module(
        lr_schedule="reference", total_steps=4000, decay_steps=2000, steps_per_epoch=1000
    )
    optimizer = torch.optim.Adam(stargan.generator.parameters())
    stargan._optimizers_by_name = lambda: {"generator": optimizer}  # type: ignore[dict-item, method-assign]
    rates = {}
    for number in (1999, 2500, 2999, 3000, 3999):
        loop = SimpleNamespace(epoch_loop=SimpleNamespace(total_batch_idx=number))
        stargan._trainer = SimpleNamespace(fit_loop=loop, current_epoch=0, global_rank=0)  # type: ignore[assignment]
        stargan.on_train_batch_start(None, 0)
        rates[number] = optimizer.param_groups[0]["lr"] / 1e-4
    once = 1 - 1 / 2000
    assert rates == pytest.approx({1999: 1, 2500: 1, 2999: 1, 3000: once, 3999: once})


def test_an_epoch_is_a_number_of_batches() -> None:
    stargan = module(total_steps=12, steps_per_epoch=4, decay_steps=0)
    assert stargan.total_epochs == 3
    assert [stargan.batches_in_epoch(epoch) for epoch in range(3)] == [4, 4, 4]


def test_a_separate_penalty_is_a_second_step_on_the_moved_critic(tmp_path: Path) -> None:
    joint, one = fit(module(lr_d=0.01), tmp_path / "joint")
    apart, two = fit(module(lr_d=0.01, gp_update="separate"), tmp_path / "apart")
    counts = [{int(s["step"]) for s in t.optimizers[0].state.values()} for t in (one, two)]
    # The penalty does not reach the class head.
    assert counts == [{6}, {6, 12}]
    first, second = joint.losses[0], apart.losses[0]
    assert first["d_real"] == second["d_real"]
    assert first["d_gp"] != second["d_gp"]
    for losses in (first, second):
        total = losses["d_real"] + losses["d_fake"] + losses["d_cls"] + 10 * losses["d_gp"]
        assert losses["d_loss"] == pytest.approx(total)


# ------------------------------------------------------------------ targets
def test_targets_are_the_labels_of_the_batch_in_an_order_of_their_own(tmp_path: Path) -> None:
    class Watched(StarGAN):
        def permuted(self, attributes: Tensor, place: int) -> Tensor:
            wanted = super().permuted(attributes, place)
            assert sorted(wanted.tolist()) == sorted(attributes.tolist())
            seen.append(wanted)
            return wanted

    seen: list[Tensor] = []

    def run(folder: str) -> list[Tensor]:
        seen.clear()
        fit(Watched(attributes=NAMES, **SMALL), tmp_path / folder, lambda i: batch())
        return list(seen)

    first, second = run("a"), run("b")
    assert all(map(torch.equal, first, second))
    assert len({str(wanted.tolist()) for wanted in first}) > 1


def test_each_process_takes_its_rows_of_one_permutation() -> None:
    whole = torch.eye(8)
    stargan = module()
    stargan._trainer = SimpleNamespace(world_size=1, global_rank=0)  # type: ignore[assignment]
    expected = stargan.permuted(whole, 0)
    found = []
    for rank in (0, 1):
        stargan._trainer = SimpleNamespace(world_size=2, global_rank=rank)  # type: ignore[assignment]
        stargan.all_gather = lambda rows: whole.view(2, 4, 8)  # type: ignore[assignment, method-assign, misc]
        found.append(stargan.permuted(whole[4 * rank : 4 * rank + 4], 0))
    assert torch.equal(torch.cat(found), expected)


# ------------------------------------------------------------------ several data sets
def test_every_data_set_has_updates_and_terms_of_its_own(tmp_path: Path) -> None:
    spy, trainer = fit(module(**JOINT), tmp_path, joint_batch)
    counts = [{int(s["step"]) for s in o.state.values()} for o in trainer.optimizers]
    assert counts == [{12}, {4}]
    critic = {"d_real", "d_fake", "d_cls", "d_gp", "d_loss", "d_slope", "d_accuracy"}
    translator = {"g_fake", "g_cls", "g_rec", "g_loss", "g_accuracy"}
    names = {f"{place}/{name}" for place in "01" for name in critic}
    assert set(spy.losses[0]) == names
    assert set(spy.losses[2]) == names | {f"{p}/{name}" for p in "01" for name in translator}
    assert spy.losses[0]["0/d_real"] != spy.losses[0]["1/d_real"]


def test_labels_of_several_data_sets() -> None:
    stargan = module(**JOINT)
    assert stargan.label_width == 3 + 2 + 2
    label = stargan.generator_label(torch.tensor([[0.0, 1]]), 1)
    assert label.tolist() == [[0, 0, 0, 0, 1, 0, 1]]
    assert stargan.class_label(torch.eye(2), 1).tolist() == [0, 1]
    assert stargan.generator_label(torch.tensor([[1.0, 0, 1]])).tolist() == [[1, 0, 1, 0, 0, 1, 0]]


@pytest.mark.parametrize(
    ("options", "make", "message"),
    [
        (JOINT, batch, r"batch has 0; StarGAN .* of 2 data set"),
        ({}, joint_batch, "batch has 0, 1;"),
        ({}, lambda i: {"unlabelled": batch()}, r"--data\.unlabelled false"),
    ],
)
def test_batches_of_other_data(
    options: dict[str, Any], make: Callable[[int], Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        fit(module(**options), tmp_path, make)


# ------------------------------------------------------------------ what is logged
def rows_of(folder: Path) -> dict[int, dict[str, str]]:
    with (folder / "metrics.csv").open() as file:
        return {
            int(row["step"]): {k: v for k, v in row.items() if v} for row in csv.DictReader(file)
        }


def test_a_row_has_what_its_batch_computed(tmp_path: Path) -> None:
    logger = ResumableCSVLogger(str(tmp_path))
    spy, _ = fit(module(), tmp_path, logger=logger, log_every_n_steps=1)
    rows = rows_of(tmp_path)
    assert sorted(rows) == list(range(6))
    for number, row in rows.items():
        del row["step"], row["epoch"]
        found = {name: float(value) for name, value in row.items()}
        expected = {f"train/{name}": value for name, value in spy.losses[number].items()}
        assert found == pytest.approx(expected)
    assert "train/g_rec" not in rows[3]


@pytest.mark.parametrize(("every", "expected"), [(3, [2, 5]), (4, [2, 3]), (5, [2, 4])])
def test_terms_of_rare_batches_are_logged_once(
    every: int, expected: list[int], tmp_path: Path
) -> None:
    logger = ResumableCSVLogger(str(tmp_path))
    fit(module(), tmp_path, logger=logger, log_every_n_steps=every)
    rows = rows_of(tmp_path)
    whole = [step for step in rows if step < 6 // every * every]
    assert whole == expected
    assert [("train/g_rec" in rows[step]) for step in whole] == [s % 3 == 2 for s in whole]


def test_terms_are_logged_without_their_weights(tmp_path: Path) -> None:
    plain, _ = fit(module(), tmp_path / "plain")
    heavy, _ = fit(module(lambda_cls=7, lambda_gp=3), tmp_path / "heavy")
    for name in ("d_cls", "d_gp", "d_real"):
        assert plain.losses[0][name] == heavy.losses[0][name]
    first = heavy.losses[0]
    total = first["d_real"] + first["d_fake"] + 7 * first["d_cls"] + 3 * first["d_gp"]
    assert first["d_loss"] == pytest.approx(total)


def test_accuracy_and_slope(tmp_path: Path) -> None:
    stargan = module()
    expected: dict[str, float] = {}

    class Before(Callback):
        def on_train_batch_start(self, *args: Any) -> None:
            if not expected:
                x = stargan.to_network(batch()["image"])
                logits = stargan.discriminator(x)[1]
                right = (logits > 0) == (batch()["attributes"] > 0)
                expected["d_accuracy"] = right.float().mean().item()

    spy, _ = fit(stargan, tmp_path, callbacks=[Before()])
    first = spy.losses[0]
    assert first["d_accuracy"] == pytest.approx(expected["d_accuracy"])
    # The slopes of a new critic are small and much alike, so the penalty is close to that of their mean.
    assert first["d_gp"] == pytest.approx((first["d_slope"] - 1) ** 2, rel=0.01)


# ------------------------------------------------------------------ images
class Tint(nn.Module):
    """Adds a tenth per attribute: a translator whose every number is known."""

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return x + 0.2 * (c * torch.tensor([1.0, 2.0, 3.0])).sum(1).view(-1, 1, 1, 1)


def tinting(**options: Any) -> StarGAN:
    stargan = module(**options).eval()
    stargan.generator = Tint()  # type: ignore[assignment]
    return stargan


def test_evaluation_is_over_the_edits_that_change_something() -> None:
    labels = torch.tensor([[1.0, 0, 0], [0, 0, 1]])
    found = tinting().evaluate({"image": images(2), "attributes": labels})
    # Images in [0, 1] get half the tint. First image: +Blond (2 for 1), +Male (4); black hair is there already.
    # Second image: +Black, +Blond, -Male (0 for 3).
    effects = [(0.1 + 0.3) / 2, (0.1 + 0.2 + 0.3) / 3]
    assert found["label_effect"].tolist() == pytest.approx(effects)
    # Edited labels add 2 and 4, or 4, 5 and 0; the way back the own label, 1 or 3.
    back = [(0.3 + 0.5) / 2, (0.7 + 0.8 + 0.3) / 3]
    assert found["reconstruction"].tolist() == pytest.approx(back)


def test_error_against_the_truth() -> None:
    picture = images(1)
    asked = []

    def counterparts(indices: Tensor, attributes: Tensor) -> Tensor:
        asked.append((indices.tolist(), attributes.tolist()))
        return picture + 0.25

    sample = {"image": picture, "attributes": torch.zeros(1, 3), "index": torch.tensor([7])}
    found = tinting().evaluate(sample, 0, counterparts)
    assert asked == [([7], [row]) for row in torch.eye(3).tolist()]
    assert found["error"].item() == pytest.approx((0.15 + 0.05 + 0.05) / 3)
    assert found["error_of_identity"].item() == pytest.approx(0.25)


def test_translation_is_in_the_unit_interval_and_the_average_stands_for_the_generator(
    tmp_path: Path,
) -> None:
    stargan = module()
    fit(stargan, tmp_path, callbacks=[GeneratorEMA(decay=0.5)])
    x, labels = images(), batch()["attributes"]
    stargan.eval()
    average: Any = stargan.generator_ema
    expected = (average(2 * x - 1, labels) + 1) / 2
    found = stargan.translate(x, labels)
    torch.testing.assert_close(found, expected)
    assert found.min() >= 0
    assert found.max() <= 1
    assert not torch.allclose(found, (stargan.generator(2 * x - 1, labels) + 1) / 2)


def test_found_attributes_exclude_each_other() -> None:
    stargan = module(**JOINT)
    logits = torch.tensor([[0.5, 1.5, 2.0, 3.0, 4.0], [-1.0, -2.0, -3.0, 4.0, 3.0]])
    stargan.discriminator.forward = lambda x: (x, logits)  # type: ignore[method-assign]
    assert stargan.predict_attributes(images(2)).tolist() == [[0, 1, 1], [0, 0, 0]]
    assert stargan.predict_attributes(images(2), 1).tolist() == [[0, 1], [1, 0]]


def test_edits_by_name() -> None:
    stargan = tinting(edits="+Blond_Hair,-Male")
    sample = {"image": images(2), "attributes": torch.tensor([[1.0, 0, 1], [0, 1, 0]])}
    found = stargan.predict_step(sample, 0)
    assert found["source"] == ["Black_Hair+Male", "Blond_Hair"]
    assert found["target"] == ["Blond_Hair", "Blond_Hair"]
    torch.testing.assert_close(found["image"], sample["image"] + 0.2)


def test_without_labels_the_critic_says_what_is_there() -> None:
    stargan = module(edits="sad", **JOINT).eval()
    seen = torch.tensor([[9.0, 0, 0, 2, 1]]).repeat(2, 1)
    stargan.discriminator.forward = lambda x: (x, seen)  # type: ignore[method-assign]
    # The labels of the batch are those of the first data set, which does not have the class.
    sample = {"image": images(2), "attributes": torch.zeros(2, 3)}
    found = stargan.predict_step(sample, 0)
    assert (found["source"], found["target"]) == (["happy"] * 2, ["sad"] * 2)


def test_pictures_have_a_row_for_every_attribute_of_every_data_set() -> None:
    stargan = module(**JOINT).eval()
    rows = stargan.image_grid(joint_batch())
    assert list(rows) == ["source", *NAMES, *CLASSES]
    sad = stargan.translate(batch()["image"], torch.tensor([[0.0, 1]] * 4), 1)
    torch.testing.assert_close(rows["sad"], sad)
    same = module(attributes=[["a", "b"], ["b", "c"]]).eval()
    both = {"image": images(2), "attributes": torch.zeros(2, 2)}
    assert list(same.image_grid(both)) == ["source", "a", "b", "b (1)", "c"]


# ------------------------------------------------------------------ data
def scenes(**options: Any) -> AttributeDataModule:
    small: dict[str, Any] = {"shapes_train": 40, "shapes_val": 6, "shapes_test": 6, "batch_size": 4}
    shapes = SceneOptions(image_size=16, colours=("red", "green", "blue"))
    return AttributeDataModule("shapes", attributes=["colour"], shapes=shapes, **small, **options)


def of_scenes(**options: Any) -> StarGAN:
    data = scenes()
    small: dict[str, Any] = {"image_size": 16, "label_kind": data.attribute_kind, "exclusive": []}
    return module(attributes=data.attribute_names, **small, **options)


def test_training_evaluation_and_prediction_on_scenes(tmp_path: Path) -> None:
    stargan = of_scenes(total_steps=8, steps_per_epoch=4)
    trainer = boring_trainer(tmp_path, max_epochs=stargan.total_epochs, log_every_n_steps=1)
    trainer.fit(stargan, datamodule=scenes())
    assert trainer.global_step == 8
    expected = {"error", "error_of_identity", "label_effect", "reconstruction"}
    assert {k[4:] for k in trainer.callback_metrics if k.startswith("val/")} == expected
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    loaded = StarGAN.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True, edits="blue")
    found: Any = boring_trainer(tmp_path).predict(loaded, datamodule=scenes())
    assert set(found[0]["target"]) == {"blue"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attributes": ["red", "blue", "green"]}, "same names in the same order"),
        ({"label_kind": "multi_label"}, r"labels of the data are single_label.*label_kind"),
        ({"image_size": 8}, r"--model\.image_size 16"),
        ({"in_channels": 1}, r"--model\.in_channels 3"),
    ],
)
def test_model_and_data_must_agree(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    agreeing = dict(of_scenes().hparams)
    stargan = StarGAN(**{**agreeing, **options})
    with pytest.raises(ValueError, match=message):
        boring_trainer(tmp_path).fit(stargan, datamodule=scenes())


def test_exclusive_groups_must_agree(tmp_path: Path) -> None:
    shapes = SceneOptions(image_size=16, colours=("red", "green", "blue"))
    small: dict[str, Any] = {"shapes_train": 20, "shapes_val": 4, "shapes_test": 4}
    data = AttributeDataModule("shapes", attributes=["colour", "size"], shapes=shapes, **small)
    stargan = module(attributes=data.attribute_names, image_size=16)
    with pytest.raises(ValueError, match=r"exclude each other; set --model\.exclusive"):
        boring_trainer(tmp_path).fit(stargan, datamodule=data)


def test_a_prediction_needs_edits(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--model\.edits \+red"):
        boring_trainer(tmp_path).predict(of_scenes(), datamodule=scenes())


# ------------------------------------------------------------------ arguments and files
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attributes": []}, r"--model\.attributes"),
        ({"attributes": [NAMES, []]}, r"--model\.attributes"),
        ({"attributes": ["Male", "Male"]}, "selected twice"),
        ({**JOINT, "label_kind": ["multi_label"]}, "each of the 2 data sets"),
        ({"n_critic": 0}, "n_critic=0"),
        ({"n_critic": 7}, "never be updated"),
        ({"steps_per_epoch": 4}, "no multiple of steps_per_epoch=4"),
        ({"decay_steps": 7}, r"--model\.decay_steps"),
        ({"lr_schedule": "cosine"}, r"--model\.lr_schedule"),
        ({"lambda_rec": -1}, "lambda_rec=-1"),
        ({"gp_update": "never"}, r"--model\.gp_update"),
        ({"cls_reduction": "max"}, r"--model\.cls_reduction"),
        ({"patch_reduction": "max"}, r"--model\.patch_reduction"),
        ({"edits": "+Mole"}, "did you mean Male"),
        ({"attributes": CLASSES, "label_kind": "single_label", "edits": "-sad"}, "exactly one"),
        ({**JOINT, "edits": "+Male,+happy"}, "no attribute 'happy'"),
    ],
)
def test_impossible_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        module(**options)


def saved(stargan: StarGAN, folder: Path, **options: Any) -> tuple[Path, Path]:
    paths = (folder / "6-G.ckpt", folder / "6-D.ckpt")
    torch.save(export_reference_state_dict(stargan.generator, **options), paths[0])
    torch.save(export_reference_state_dict(stargan.discriminator), paths[1])
    return paths


def test_released_checkpoints(tmp_path: Path) -> None:
    stargan = module(image_size=12, n_blocks=2).eval()
    loaded = load_reference_checkpoint(*saved(stargan, tmp_path), NAMES)
    assert not loaded.training
    x, labels = torch.rand(2, 3, 12, 12), torch.eye(3)[:2]
    assert torch.equal(loaded.translate(x, labels), stargan.translate(x, labels))
    assert torch.equal(loaded.discriminator(x)[1], stargan.discriminator(x)[1])
    joint = module(**JOINT)
    again = load_reference_checkpoint(*saved(joint, tmp_path), **JOINT)
    assert again.label_width == joint.label_width


def test_files_that_are_no_released_checkpoints(tmp_path: Path) -> None:
    g_path, d_path = saved(module(), tmp_path)
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        load_reference_checkpoint(tmp_path / "none", d_path, NAMES)
    with pytest.raises(ValueError, match="trained with 3 attributes, not 2"):
        load_reference_checkpoint(g_path, d_path, NAMES[:2])
    with pytest.raises(RuntimeError, match="do not hold the networks"):
        load_reference_checkpoint(d_path, g_path, NAMES)
    broken = tmp_path / "broken.ckpt"
    broken.write_bytes(b"nothing")
    with pytest.raises(RuntimeError, match="is not a readable checkpoint"):
        load_reference_checkpoint(broken, d_path, NAMES)
