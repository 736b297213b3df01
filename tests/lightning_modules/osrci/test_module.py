import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_modules.osrci import KPlusOneClassifierModule, OSRCIModule
from lightning_modules.osrci.networks import Classifier32
from lightning_modules.osrci.synthesis import OpenSetPool, to_uint8
from tests.suites.launch import run
from tests.suites.members import MEMBERS

SMALL: dict[str, Any] = {"num_classes": 3, "width": 4, "latent_size": 4, "search_steps": 3}


class Bank:
    """24 images of three classes, each a bar in its own place."""

    def __init__(self) -> None:
        self.labels = torch.arange(24) % 3
        generator = torch.Generator().manual_seed(0)
        self.images = 0.2 * torch.rand(24, 3, 32, 32, generator=generator)
        for index, label in enumerate(self.labels.tolist()):
            self.images[index, :, :, 10 * label : 10 * label + 8] += 0.7

    def __len__(self) -> int:
        return 24

    def batch(self, indices: Tensor, device: Any = None, dtype: Any = None) -> dict[str, Tensor]:
        return {"image": self.images[indices], "label": self.labels[indices]}


def module(**options: Any) -> OSRCIModule:
    torch.manual_seed(0)
    return OSRCIModule(**{**SMALL, **options})


# --------------------------------------------------------------------------- schedule
def test_presets_and_their_overrides() -> None:
    assert module().schedule == (10, 640, 1)
    assert module(preset="reference").schedule == (1, 3200, 3)
    assert module(preset="reference", rounds=2).schedule == (2, 3200, 3)
    assert module(joint_epochs=30, preset="reference").total_epochs == 33


def test_the_phase_and_the_requests_are_functions_of_the_epoch() -> None:
    osrci = module(joint_epochs=2, rounds=2, images_per_round=8, epochs_per_round=2)
    assert [osrci.phase_at(epoch) for epoch in range(4)] == ["joint"] * 2 + ["kplusone"] * 2
    assert osrci.synthesis_request(1) is None
    assert osrci.synthesis_request(2) == range(0, 8)
    osrci.open_set.append(samples(8))
    assert osrci.synthesis_request(3) is None
    assert osrci.synthesis_request(4) == range(8, 16)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"joint_epochs": 0}, "joint_epochs=0 must be at least 1"),
        ({"rounds": 0}, "at least 1"),
        ({"acceptance": 1.0}, r"in \(0, 1\), not 1.0"),
        ({"decision_score": "best"}, "unknown decision_score='best'"),
        ({"gopenmax": False, "decision_score": "gopenmax"}, "'gopenmax'"),
        ({"variant": "reference", "stop_confidence": 0.9}, "stop_confidence"),
    ],
)
def test_impossible_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        module(**options)


# --------------------------------------------------------------------------- synthesis
def samples(count: int) -> dict[str, Tensor]:
    return {
        "images": torch.arange(count).view(-1, 1, 1, 1).expand(-1, 3, 32, 32).to(torch.uint8),
        "start": torch.arange(count),
        **{name: torch.arange(count).float() for name in ("confidence", "distance", "steps")},
    }


def test_a_sample_depends_on_its_index_alone() -> None:
    osrci, bank = module(search_batch_size=4), Bank()
    chunks = osrci.synthesis_chunks(range(0, 8))
    forward = [osrci.synthesize(bank, chunk) for chunk in chunks]
    torch.manual_seed(123)
    backward = [osrci.synthesize(bank, chunk) for chunk in reversed(chunks)][::-1]
    for one, other in zip(forward, backward, strict=True):
        for pool in one:
            for name in one[pool]:
                assert torch.equal(one[pool][name], other[pool][name]), (pool, name)
    assert not torch.equal(forward[0]["open_set"]["images"], forward[1]["open_set"]["images"])


@pytest.mark.parametrize("variant", ["paper", "reference"])
def test_synthesis_leaves_networks_and_random_state_alone(variant: str) -> None:
    osrci, bank = module(variant=variant).train(), Bank()
    before = {name: value.clone() for name, value in osrci.state_dict().items()}
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    osrci.synthesize(bank, range(4))
    assert torch.equal(torch.rand(3), expected)
    assert all(part.training for part in osrci.classifier.modules())
    for name, value in osrci.state_dict().items():
        assert torch.equal(value.nan_to_num(), before[name].nan_to_num()), name


def test_the_search_raises_the_probability_of_its_target() -> None:
    # An untrained classifier hardly reacts, hence the speed and the precision.
    osrci = module(search_steps=20, distance_weight=0.0, search_speed=1e8).double()
    images = Bank().images[:6].double()
    still = osrci.search(images, 3)
    osrci.hparams.search_steps = 0
    start = osrci.search(images, 3)
    assert (still["confidence"] > start["confidence"]).all()
    assert (still["distance"] > 0).all()
    assert start["distance"].abs().max() == 0


def test_the_fingerprint_follows_weights_and_options() -> None:
    one = module()
    assert one.synthesis_fingerprint() == module().synthesis_fingerprint()
    assert one.synthesis_fingerprint() != module(search_speed=0.2).synthesis_fingerprint()
    with torch.no_grad():
        next(one.generator.parameters()).add_(1e-3)
    assert one.synthesis_fingerprint() != module().synthesis_fingerprint()


def test_gopenmax_gives_up_on_a_classifier_that_is_always_sure() -> None:
    osrci, bank = module(gopenmax_tries=2), Bank()

    class Sure(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return torch.tensor([[50.0, 0.0, 0.0]]).expand(len(images), -1)

    osrci.classifier = Sure()  # type: ignore[assignment]
    with pytest.warns(UserWarning, match="0 of 4 candidates"):
        made = osrci._interpolations(bank, range(4))
    assert len(made["images"]) == len(made["start"]) == len(made["confidence"]) == 4


def test_the_kplusone_phase_without_images_names_the_callback() -> None:
    with pytest.raises(RuntimeError, match=r"callbacks\.CounterfactualSynthesis"):
        module().kplusone_step(torch.zeros(1, 3, 32, 32), torch.zeros(1))


def test_a_pool_grows_draws_with_replacement_and_is_in_the_checkpoint() -> None:
    pool = OpenSetPool((3, 32, 32), ("confidence", "distance", "steps"))
    pool.append(samples(4))
    pool.append(samples(4))
    assert len(pool) == 8
    rows = pool.rows(torch.tensor([0.0, 0.999, 0.5, 0.5], dtype=torch.double))
    assert rows.dtype == torch.double
    assert (rows[:, 0, 0, 0] * 255).round().tolist() == [0, 3, 0, 0]
    fresh = OpenSetPool((3, 32, 32), ("confidence", "distance", "steps"))
    fresh.load_state_dict(pool.state_dict())
    assert torch.equal(fresh.images, pool.images)


def test_bytes_are_rounded() -> None:
    values = torch.tensor([0.0, 0.4 / 255, 0.6 / 255, 1.0, 1.2])
    assert to_uint8(values).tolist() == [0, 0, 1, 255, 255]


# --------------------------------------------------------------------------- rows
def test_rows_appear_when_their_part_is_there() -> None:
    osrci = module()
    assert osrci.ready_rows == ["msp", "mls", "energy", "reconstruction"]
    osrci.open_set.append(samples(2))
    assert {"kplusone", "margin"} <= set(osrci.ready_rows)
    scores, predictions = osrci.eval().open_set_scores(Bank().images[:5])
    assert scores.keys() == predictions.keys() == set(osrci.ready_rows)
    assert all(value.shape == (5,) for value in scores.values())


def test_predict_accepts_below_the_threshold_only() -> None:
    osrci = module().eval()
    osrci.open_set.append(samples(2))
    batch = {"image": Bank().images[:6]}
    with pytest.raises(RuntimeError, match="no threshold for score 'margin'"):
        osrci.predict_step(batch, 0)
    scores, predictions = osrci.open_set_scores(batch["image"])
    ordered = scores["margin"].sort().values
    osrci.thresholds[osrci.rows.index("margin")] = ordered[2]
    osrci.class_names = ["cat", "dog", "eel"]
    found = osrci.predict_step(batch, 0)
    accepted = scores["margin"] <= ordered[2]
    assert accepted.sum() == 3
    for i in range(6):
        name = osrci.class_names[int(predictions["margin"][i])] if accepted[i] else "unknown"
        assert found["decision"][i] == name
        assert found["label"][i] == (predictions["margin"][i] if accepted[i] else -1)


# --------------------------------------------------------------------------- K+1 alone
def test_the_kplusone_module_trains_a_copy() -> None:
    classifier = Classifier32(3, width=4)
    before = {name: value.clone() for name, value in classifier.state_dict().items()}
    kplusone = KPlusOneClassifierModule.from_classifier(
        classifier, torch.rand(5, 3, 32, 32), lr=0.1
    )
    kplusone.log_mean_over_ranks = lambda values: None  # type: ignore[method-assign]
    optimizer = kplusone.configure_optimizers()
    bank = Bank()
    batch = {"image": bank.images, "label": bank.labels}
    first = kplusone.training_step(batch, 0)
    for _ in range(10):
        loss = kplusone.training_step(batch, 0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < first
    for name, value in classifier.state_dict().items():
        assert torch.equal(value, before[name])
    assert kplusone.predict_step(batch, 0)["score"].shape == (24,)


# --------------------------------------------------------------------------- behaviour
def test_unknown_digits_score_higher_and_knowns_are_accepted(tmp_path: Path) -> None:
    """All phases on a reduced digits recipe: the claim of the paper, well above chance, and a useful threshold."""
    import json

    overrides = {
        "data.train_limit": 40,
        "data.test_limit": 30,
        "data.batch_size": 32,
        "model.width": 8,
        "model.joint_epochs": 6,
        "model.lr": 0.003,
        "model.images_per_round": 64,
        "model.lr_kplusone": 0.0003,
        "model.epochs_per_round": 2,
        "model.search_steps": 10,
        "model.search_batch_size": 64,
        "model.latent_size": 16,
    }
    arguments = MEMBERS[0].arguments(overrides)
    root = ["--run.root", str(tmp_path)]
    text = run(["fit", *arguments, *root, "--run.name", "a"], tmp_path / "fit.txt")
    directory = tmp_path / "osrci-digits" / "a"
    metrics = json.loads((directory / "results.json").read_text())["metrics"]
    assert metrics["test/margin/auroc"] > 0.8
    assert metrics["test/margin/closed_accuracy"] > 0.85
    for row in ("msp", "mls", "energy", "openmax", "openmax_bendale", "gopenmax", "kplusone"):
        assert metrics[f"test/{row}/auroc"] > 0.5, row
        assert f"test/{row}/macro_f1" in metrics, f"no threshold for {row}"
    assert "OSRCI, margin" in text
    assert "open_set-oscr" in text
    checkpoint = str(directory / "checkpoints" / "last.ckpt")
    run(["predict", "--ckpt_path", checkpoint, *root], tmp_path / "predict.txt")
    with (tmp_path / "osrci-digits" / "predict-000" / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    decisions = [row["decision"] for row in rows]
    assert len(rows) == 300
    assert decisions.count("unknown") > 60
    assert decisions.count("unknown") < 240
