"""The loop of MatchGAN: which images a batch has, what they are translated to, and what each network learns."""

import csv
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from callbacks.loggers import ResumableCSVLogger
from datamodules.attributes import AttributeDataModule
from datamodules.shapes_options import SceneOptions
from lightning_modules.matchgan import MatchGAN
from lightning_modules.matchgan.losses import group_match_loss, match_loss
from lightning_modules.matchgan.networks import MatchGANDiscriminator
from lightning_modules.stargan import load_reference_checkpoint
from lightning_modules.stargan.module import Task
from lightning_modules.stargan.released import export_reference_state_dict
from tests.callbacks.boring import boring_trainer

CLASSES = ["angry", "happy", "sad", "surprised"]
SMALL: dict[str, Any] = {
    "label_kind": "single_label",
    "image_size": 8,
    "ngf": 2,
    "n_blocks": 0,
    "ndf": 2,
    "n_layers": 2,
    "n_critic": 3,
    "total_steps": 6,
    "decay_steps": 0,
    "steps_per_epoch": 6,
}
ROWS = 16


def module(**options: Any) -> MatchGAN:
    torch.manual_seed(0)
    return MatchGAN(**{"attributes": CLASSES, **SMALL, **options})


def images(rows: int = ROWS, seed: int = 0) -> Tensor:
    return torch.rand(rows, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def labelled(seed: int = 0) -> dict[str, Tensor]:
    return {"image": images(seed=seed), "attributes": torch.eye(4).repeat_interleave(4, 0)}


def both(seed: int) -> dict[str, dict[str, Tensor]]:
    return {"labelled": labelled(seed), "unlabelled": {"image": images(seed=seed + 50)}}


class Spy(Callback):
    """Notes the losses of every batch, and the weights and Adam's steps of the heads."""

    def __init__(self) -> None:
        self.losses: list[dict[str, float]] = []
        self.heads: list[dict[str, Tensor]] = []
        self.steps: dict[str, int] = {}

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        losses: dict[str, Tensor] = pl_module.losses  # type: ignore[assignment]
        self.losses.append({name: value.item() for name, value in losses.items()})
        critic: Any = pl_module.discriminator
        heads = {name: getattr(critic, f"{name}_head").weight for name in ("class", "match")}
        self.heads.append({name: weight.detach().clone() for name, weight in heads.items()})
        state = trainer.optimizers[0].state
        self.steps = {name: int(state[weight]["step"]) for name, weight in heads.items()}


def fit(matchgan: MatchGAN, folder: Path, make: Callable[[int], Any] = both, **options: Any) -> Spy:
    spy = Spy()
    trainer = boring_trainer(folder, **{"max_epochs": 1, "callbacks": [spy], **options})
    count = matchgan.hp.total_steps
    trainer.fit(matchgan, DataLoader([make(i) for i in range(count)], batch_size=None))  # type: ignore[arg-type]
    return spy


# ------------------------------------------------------------------ which terms
CRITIC = {"d_real", "d_fake", "d_gp", "d_loss", "d_slope"}
OF_LABELS = {"d_cls", "d_accuracy", "d_match", "d_match_accuracy"}
TRANSLATOR = {"g_fake", "g_cls", "g_accuracy", "g_match", "g_match_accuracy", "g_loss"}


def test_terms_of_labelled_and_unlabelled_batches(tmp_path: Path) -> None:
    spy = fit(module(), tmp_path)
    expected = [CRITIC | OF_LABELS, CRITIC] * 3
    expected[2] = expected[2] | TRANSLATOR | {"g_rec"}
    expected[5] = expected[5] | TRANSLATOR
    kinds = ["labelled", "unlabelled"] * 3
    for losses, kind, names in zip(spy.losses, kinds, expected, strict=True):
        assert set(losses) == {f"{kind}/{name}" for name in names}


def test_the_objective_is_the_weighted_sum(tmp_path: Path) -> None:
    spy = fit(module(lambda_match=3.0, lambda_cls=2.0), tmp_path)
    of = {name.split("/")[1]: value for name, value in spy.losses[2].items()}
    total = of["d_real"] + of["d_fake"] + 2 * of["d_cls"] + 10 * of["d_gp"] + 3 * of["d_match"]
    assert of["d_loss"] == pytest.approx(total)
    total = of["g_fake"] + 2 * of["g_cls"] + 10 * of["g_rec"] + 3 * of["g_match"]
    assert of["g_loss"] == pytest.approx(total)


@pytest.mark.parametrize("source", ["fake", "both"])
def test_translations_are_matched_without_labels_too(source: str, tmp_path: Path) -> None:
    spy = fit(module(d_match_source=source), tmp_path)
    assert all(any(name.endswith("d_match") for name in losses) for losses in spy.losses)


@pytest.mark.parametrize(("idle", "steps"), [("zero", 6), ("skip", 3)])
def test_adam_and_idle_heads(idle: str, steps: int, tmp_path: Path) -> None:
    spy = fit(module(idle_heads=idle, lr_d=0.01), tmp_path)
    assert spy.steps == {"class": steps, "match": steps}
    for name in ("class", "match"):
        first, second, third = (heads[name] for heads in spy.heads[:3])
        # Batch 1 is unlabelled; what is left of the momentum of batch 0 moves the head, or nothing does.
        assert torch.equal(first, second) == (idle == "skip")
        assert not torch.equal(second, third)


def test_pools_take_turns_after_updates_of_the_generator_if_asked_to(tmp_path: Path) -> None:
    spy = fit(module(schedule="balanced"), tmp_path)
    kinds = [next(iter(losses)).split("/")[0] for losses in spy.losses]
    assert kinds == ["labelled"] * 3 + ["unlabelled"] * 3


def test_a_batch_without_pools_is_labelled(tmp_path: Path) -> None:
    matchgan = module()
    matchgan.has_unlabelled = False
    spy = fit(matchgan, tmp_path, labelled)
    assert all(f"labelled/{name}" in losses for losses in spy.losses for name in OF_LABELS)


@pytest.mark.parametrize("every", [1, 4, 10])
def test_all_terms_are_logged_at_any_pace(every: int, tmp_path: Path) -> None:
    """With the plain rule every tenth batch would always be an unlabelled one."""
    matchgan = module(n_critic=5, total_steps=20, steps_per_epoch=20)
    logger = ResumableCSVLogger(str(tmp_path))
    spy = fit(matchgan, tmp_path, logger=logger, log_every_n_steps=every)
    seen: set[str] = set()
    with (tmp_path / "metrics.csv").open() as file:
        for row in csv.DictReader(file):
            step = int(row.pop("step"))
            found = {k.removeprefix("train/"): float(v) for k, v in row.items() if v}
            del found["epoch"]
            assert found == pytest.approx(spy.losses[step])
            seen |= found.keys()
    expected = {name for losses in spy.losses for name in losses}
    assert seen == expected
    assert {"labelled/g_rec", "labelled/d_match", "unlabelled/g_match"} <= seen


# ------------------------------------------------------------------ targets and pairs
def standing(matchgan: MatchGAN, rank: int = 0, epoch: int = 0, number: int = 0) -> MatchGAN:
    matchgan._trainer = SimpleNamespace(global_rank=rank)  # type: ignore[assignment]
    matchgan._draw_position = (epoch, number)
    return matchgan


def test_each_target_of_a_block_reaches_each_of_its_groups() -> None:
    matchgan = standing(module(attributes=[f"c{i}" for i in range(6)]))
    found = matchgan.targets(2 * ROWS).argmax(1).view(2, 4, 4)
    for block in found:
        # One row for each group of the source, all with the same four targets.
        assert len(set(block[0].tolist())) == 4
        assert (block == block[0]).all()
    groups = found.flatten()[matchgan.regroup(2 * ROWS)].view(8, 4)
    assert (groups == groups[:, :1]).all()
    assert groups[:, 0].tolist() == [*found[0, 0].tolist(), *found[1, 0].tolist()]


def test_targets_depend_on_the_place_of_the_batch_and_not_on_the_processes() -> None:
    matchgan = module(attributes=[f"c{i}" for i in range(6)])
    whole = standing(matchgan).targets(2 * ROWS)
    parts = [standing(matchgan, rank).targets(ROWS) for rank in (0, 1)]
    assert torch.equal(torch.cat(parts), whole)
    assert not torch.equal(parts[0], parts[1])
    other = standing(matchgan, number=1).targets(2 * ROWS)
    assert not torch.equal(whole, other)


def test_targets_are_drawn_from_the_label_space() -> None:
    matchgan = module(attributes=["Black_Hair", "Blond_Hair", "Male"], label_kind="multi_label")
    seen = {
        tuple(row) for i in range(40) for row in standing(matchgan, number=i).targets(16).tolist()
    }
    assert len(seen) == 6
    assert all(row[0] + row[1] < 2 for row in seen)
    # The data may know better.
    data = SimpleNamespace(label_space=torch.eye(5)[:4, :3])
    matchgan._trainer = SimpleNamespace(datamodule=data)  # type: ignore[assignment]
    matchgan.setup("fit")
    seen = {tuple(row) for row in standing(matchgan).targets(16).tolist()}
    assert seen == {(1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 0)}


def test_pairs_are_within_a_block() -> None:
    matchgan = standing(module()).double()
    x, fake = images(2 * ROWS).double(), images(2 * ROWS, seed=1).double()
    target = matchgan.targets(2 * ROWS)
    labels = torch.arange(4).repeat_interleave(4).repeat(2)
    task = Task(x, target, target, labels, target.argmax(1))
    critic: MatchGANDiscriminator = matchgan.discriminator
    found = matchgan.discriminator_terms(task, fake)["d_match"]
    expected = group_match_loss(critic, *critic.features(x).split(ROWS))
    assert found.item() == pytest.approx(expected.item())
    found = matchgan.generator_terms(task)["g_match"]
    translated = critic.features(matchgan.translate_raw(x, target))[matchgan.regroup(2 * ROWS)]
    expected = group_match_loss(critic, *translated.split(ROWS))
    assert found.item() == pytest.approx(expected.item())


def test_match_accuracy() -> None:
    matchgan = module()
    task = Task(images(), None, images(), None, images(), prefix="x/")
    logits = torch.tensor([[2.0, 1.0], [1.0, 2.0], [0.0, 1.0], [3.0, 0.0]])
    matchgan.matching(task, "g_match_accuracy")(logits, torch.tensor([0, 1, 0, 0]))
    assert matchgan.losses["x/g_match_accuracy"].item() == 0.75
    summed = module(match_reduction="sum_of_means").matching(task, "g_match_accuracy")
    is_match = torch.tensor([0, 1, 0, 0])
    assert summed(logits, is_match) == match_loss(logits, is_match, "sum_of_means")


# ------------------------------------------------------------------ bad input
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attributes": [["a"], ["b"]]}, "trains on one data set"),
        ({"lambda_match": -1.0}, "lambda_match=-1"),
        ({"match_reduction": "sum"}, r"--model\.match_reduction"),
        ({"d_match_source": "none"}, r"--model\.d_match_source"),
        ({"idle_heads": "none"}, r"--model\.idle_heads"),
        ({"schedule": "random"}, r"--model\.schedule"),
        ({"n_groups": 2}, r"--data\.n_groups"),
        ({"group_size": 3}, r"--data\.group_size"),
    ],
)
def test_impossible_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        module(**options)


def test_batches_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="turn of unlabelled images and the batch has labelled"):
        fit(module(), tmp_path, labelled)
    with pytest.raises(ValueError, match=r"12 images on a process.*4 \* 4 = 16"):
        standing(module()).targets(12)
    with pytest.raises(ValueError, match="4 different targets out of 3 labels"):
        standing(module(attributes=CLASSES[:3])).targets(16)


# ------------------------------------------------------------------ data
COLOURS = ("red", "green", "blue", "yellow")


def scenes(**options: Any) -> AttributeDataModule:
    small: dict[str, Any] = {
        "shapes_train": 80,
        "shapes_val": 4,
        "shapes_test": 4,
        "batch_size": 16,
        "labelled": 20,
        "unlabelled": True,
        "balanced": True,
        "shapes": SceneOptions(image_size=16, colours=COLOURS),
    }
    return AttributeDataModule("shapes", attributes=["colour"], **{**small, **options})


def of_scenes(**options: Any) -> MatchGAN:
    data = scenes()
    return module(attributes=data.attribute_names, image_size=16, exclusive=[], **options)


def test_training_on_scenes_of_which_few_are_labelled(tmp_path: Path) -> None:
    matchgan, spy = of_scenes(total_steps=8, steps_per_epoch=4), Spy()
    trainer = boring_trainer(tmp_path, max_epochs=matchgan.total_epochs, callbacks=[spy])
    trainer.fit(matchgan, datamodule=scenes())
    kinds = [next(iter(losses)).split("/")[0] for losses in spy.losses]
    assert kinds == ["labelled", "unlabelled"] * 4
    assert "val/error" in trainer.callback_metrics


def test_without_unlabelled_images_all_batches_are_labelled(tmp_path: Path) -> None:
    spy = Spy()
    trainer = boring_trainer(tmp_path, max_epochs=1, callbacks=[spy])
    trainer.fit(of_scenes(), datamodule=scenes(labelled=None))
    assert all("labelled/d_cls" in losses for losses in spy.losses)


def test_an_even_n_critic_is_warned_of(tmp_path: Path) -> None:
    trainer = boring_trainer(tmp_path, max_epochs=1, limit_train_batches=1)
    with pytest.warns(UserWarning, match="n_critic=2.*nothing is reconstructed"):
        trainer.fit(of_scenes(n_critic=2), datamodule=scenes())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_groups": 3, "batch_size": 12}, r"--model\.n_groups 3"),
        ({"group_size": 5, "batch_size": 20}, r"--model\.group_size 5"),
        ({"balanced": False}, r"--data\.balanced true"),
    ],
)
def test_model_and_data_must_agree(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        boring_trainer(tmp_path).fit(of_scenes(), datamodule=scenes(**options))


def test_released_checkpoints(tmp_path: Path) -> None:
    matchgan = module(n_blocks=2).eval()
    g_path, d_path = tmp_path / "6-G.ckpt", tmp_path / "6-D.ckpt"
    torch.save(export_reference_state_dict(matchgan.generator, "matchgan"), g_path)
    torch.save(export_reference_state_dict(matchgan.discriminator), d_path)
    loaded = load_reference_checkpoint(g_path, d_path, CLASSES, "single_label", MatchGAN)
    assert isinstance(loaded, MatchGAN)
    x = images(2)
    assert torch.equal(loaded.discriminator.match(x, x), matchgan.discriminator.match(x, x))
    assert torch.equal(
        loaded.translate(x, torch.eye(4)[:2]), matchgan.translate(x, torch.eye(4)[:2])
    )
