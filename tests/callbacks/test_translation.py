"""Translations judged: identity, the true translation, and a wrong one, in a world of dark and bright pictures."""

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.io import decode_image

from callbacks.translation import TranslationReport
from lightning_modules.paper import PaperModule
from lightning_modules.supervised import Segmenter, fit_judge
from tests.callbacks.boring import BoringGAN, assert_one_and_two_agree, boring_trainer
from tests.processes import run_fresh

SIZE = 8
CHANGE = 102 / 255


class Translator(PaperModule):
    """The true translation adds a constant; ``strength`` is how much of it is done."""

    def __init__(self, strength: float = 0.0, shift: int = 0) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.weight = nn.Parameter(torch.zeros(1))

    def translate(self, images: Tensor, direction: str) -> Tensor:
        sign = 1 if direction == "AtoB" else -1
        moved = images.roll(sign * self.hp.shift, -1)
        return (moved + sign * self.hp.strength * CHANGE).clamp(0, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.weight.sum()

    def validation_step(self, batch: Any, batch_idx: int) -> None: ...

    def test_step(self, batch: Any, batch_idx: int) -> None: ...

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


class Pictures:
    """A brighter square, which the mask is of, on noise; domain b is brighter by ``CHANGE``."""

    def __init__(
        self, side: str, count: int, seed: int, *truths: str, padded: bool = False
    ) -> None:
        self.side, self.count, self.truths, self.padded = side, count, truths, padded
        generator = torch.Generator().manual_seed(seed)
        self.images = torch.randint(0, 50, (count, 3, SIZE, SIZE), generator=generator)
        self.mask = torch.zeros(count, SIZE, SIZE, dtype=torch.uint8)
        for i, x in enumerate(torch.randint(0, 5, (count,), generator=generator).tolist()):
            self.images[i, :, 2:6, x : x + 4] += 60
            self.mask[i, 2:6, x : x + 4] = 1
        self.mask[:, 0] = 255

    def __len__(self) -> int:
        return self.count

    def batch(self, indices: Tensor, device: Any = None) -> dict[str, Any]:
        here, there = (self.images[indices] + 102 * (self.side == side) for side in ("b", "a"))
        batch: dict[str, Any] = {"image": here.float() / 255, "index": indices}
        if "mask" in self.truths:
            batch["mask"] = self.mask[indices]
        if "counterpart" in self.truths:
            batch["counterpart"] = there.byte()
        if self.padded:
            for name, fill in (("image", 0.0), ("mask", 255)):
                batch[name] = nn.functional.pad(batch[name], (0, 3, 0, 2), value=fill)
            batch["size"] = [(SIZE, SIZE)] * len(indices)
        return batch


class Data(LightningDataModule):
    train_b: Any
    test_b: Any

    def __init__(self, *truths: str, padded: bool = False) -> None:
        super().__init__()
        self.domain_names = {"a": "dark", "b": "bright"}
        self.mask_classes = ["ground", "square"] if "mask" in truths else None
        for number, name in enumerate(("train_a", "train_b", "test_a", "test_b")):
            count = 40 if "train" in name else 13 + number
            pictures = Pictures(name[-1], count, number, *truths, padded=padded)
            setattr(self, name, pictures)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(torch.zeros(2, 1))  # type: ignore[arg-type]

    val_dataloader = test_dataloader = train_dataloader


def report(**options: Any) -> TranslationReport:
    given: dict[str, Any] = {
        "judge_steps": 30,
        "segmenter_steps": 60,
        "judge_lr": 0.01,
        "judge_width": 4,
        "features": "pixels",
        "batch_size": 4,
    }
    return TranslationReport(**{**given, **options})


def judged(
    folder: Path, module: PaperModule, data: Data | None = None, **options: Any
) -> tuple[dict[str, float], TranslationReport]:
    callback = report(**options)
    trainer = boring_trainer(folder, callbacks=[callback])
    trainer.test(module, datamodule=data or Data("mask", "counterpart"), verbose=False)
    prefix = "test/translation/"
    found = {k.removeprefix(prefix): float(v) for k, v in trainer.callback_metrics.items()}
    return found, callback


def checkpoint(module: PaperModule, path: Path) -> str:
    trainer = boring_trainer(path.parent)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(path)
    return str(path)


def test_identity_is_the_source_as_it_is(tmp_path: Path) -> None:
    found, _ = judged(tmp_path, Translator(0.0))
    own = {k.removeprefix("AtoB/"): v for k, v in found.items() if k.count("/") == 1}
    source = {k.removeprefix("AtoB/source/"): v for k, v in found.items() if "source" in k}
    assert own.pop("cycle_error") == 0
    assert own == source
    assert source["taken_for_target"] == 0
    assert source["error"] == pytest.approx(40)
    assert found["AtoB/real/taken_for_target"] == 100


def test_the_true_translation(tmp_path: Path) -> None:
    found, _ = judged(tmp_path, Translator(1.0), directions=["AtoB", "BtoA"])
    for direction in ("AtoB", "BtoA"):
        assert found[f"{direction}/error"] == pytest.approx(0, abs=1e-4)
        assert found[f"{direction}/taken_for_target"] == 100
        assert found[f"{direction}/object_miou"] > 90
        assert found[f"{direction}/cycle_error"] == pytest.approx(0, abs=1e-4)
        assert found[f"{direction}/fid"] < found[f"{direction}/source/fid"] / 5
        assert found[f"{direction}/coverage"] > found[f"{direction}/source/coverage"]


def test_moved_objects_are_noticed(tmp_path: Path) -> None:
    right, _ = judged(tmp_path, Translator(1.0))
    moved, _ = judged(tmp_path, Translator(1.0, shift=3))
    assert moved["AtoB/object_miou"] < right["AtoB/object_miou"] - 20
    assert moved["AtoB/cycle_error"] == pytest.approx(0, abs=1e-4)
    assert moved["AtoB/taken_for_target"] == 100


def test_what_would_hide_behind_the_last_digit_is_rounded_away(tmp_path: Path) -> None:
    class Hiding(Translator):
        def translate(self, images: Tensor, direction: str) -> Tensor:
            return images / 1000 if direction == "AtoB" else images * 1000

    found, _ = judged(tmp_path, Hiding())
    assert found["AtoB/cycle_error"] > 5


def test_table_and_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    against = [checkpoint(Translator(1.0), tmp_path / f"{name}.ckpt") for name in "xy"]
    found, _ = judged(tmp_path, Translator(0.5), against=against, pictures=5)
    lines = (tmp_path / "translation_AtoB_table.txt").read_text().splitlines()
    assert lines[0].startswith("Translation of dark into bright, 15 test images against 16")
    heads = ("as target %", "object mIoU %", "error x100", "cycle x100", "density %", "FID x100")
    assert all(head in lines[1] for head in heads)
    with (tmp_path / "tables" / "translation_AtoB-table.csv").open(newline="") as file:
        rows = {row["images"]: row for row in csv.DictReader(file)}
    titles = ["source as it is", "translated (Translator)", "translated (Translator 2)"]
    assert list(rows) == [*titles, "translated (Translator 3)", "real target"]
    assert float(rows[titles[1]]["error x100"]) == pytest.approx(20, abs=0.1)
    assert float(rows[titles[2]]["error x100"]) == pytest.approx(0, abs=0.1)
    fid = float(rows[titles[1]]["FID x100"])
    assert fid == pytest.approx(100 * found["AtoB/fid"], rel=1e-4)
    assert found["AtoB/Translator 2/error"] == pytest.approx(0, abs=1e-4)
    assert rows["source as it is"]["cycle x100"] == rows["real target"]["density %"] == ""
    notes = "\n".join(lines[7:])
    assert "the classifier is right on 100.0 % of the real test images" in notes
    assert "segmenter (trained on real images of the target): mIoU" in notes
    assert "pixels in [0, 1]" in notes
    assert f"Translator 2: {against[0]}" in notes
    picture = decode_image(str(tmp_path / "images" / "translation-AtoB-0.png"))
    cell = 48 + 2
    assert picture.shape[1] == 5 * cell + 2, "source, truth, three modules"
    assert 5 * cell < picture.shape[2] < 9 * cell
    assert "wrote" in capsys.readouterr().out


def test_without_truth_there_is_a_dash(tmp_path: Path) -> None:
    found, _ = judged(tmp_path, Translator(1.0), Data(), nearest_k=30)
    assert {k for k in found if k.count("/") == 1} == {
        "AtoB/taken_for_target",
        "AtoB/cycle_error",
    }
    table = (tmp_path / "translation_AtoB_table.txt").read_text()
    assert table.splitlines()[2].split()[-7:] == ["0.0", "-", "-", "-", "-", "-", "-"]
    assert "segmenter" not in table


def test_padding_plays_no_part(tmp_path: Path) -> None:
    plain, _ = judged(tmp_path, Translator(1.0), Data("mask"))
    padded, _ = judged(tmp_path, Translator(1.0), Data("mask", padded=True))
    assert plain["AtoB/object_miou"] > 90
    assert padded == pytest.approx(plain, abs=1e-4)


def test_judges_are_equal_in_every_run_and_leave_no_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, after = Translator(1.0), []
    for callbacks in ([], [report()]):
        torch.manual_seed(11)
        trainer = boring_trainer(tmp_path, callbacks=callbacks)
        trainer.test(module, datamodule=Data("mask", "counterpart"), verbose=False)
        after.append(torch.get_rng_state())
    assert torch.equal(*after)
    (first,) = callbacks
    monkeypatch.setenv("PL_GLOBAL_SEED", "9")
    torch.manual_seed(12)
    _, second = judged(tmp_path, Translator(0.3))
    _, other = judged(tmp_path, Translator(0.3), judge_seed=1)
    for name in ("classifier", "b"):
        weights = [next(c._judges[name].parameters()) for c in (first, second, other)]
        assert torch.equal(weights[0], weights[1])
        assert not torch.equal(weights[0], weights[2])


def test_a_segmenter_is_given(tmp_path: Path) -> None:
    data = Data("mask")
    given = fit_judge(lambda: Segmenter(2, 4), data.train_b, 60, 8, 0.01)
    path = checkpoint(given, tmp_path / "segmenter.ckpt")
    found, callback = judged(tmp_path, Translator(1.0), data, segmenter=path)
    assert set(callback._judges) == {"classifier", "given"}
    assert found["AtoB/object_miou"] > 80
    assert path in (tmp_path / "translation_AtoB_table.txt").read_text()


def test_during_training_judges_are_trained_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fitted: list[str] = []

    def noted(*arguments: Any) -> Any:
        fitted.append(arguments[-1])
        return fit_judge(*arguments)

    monkeypatch.setattr("callbacks.judging.fit_judge", noted)
    callback = report(every_n_epochs=2, num_images=7)
    trainer = boring_trainer(tmp_path, callbacks=[callback], max_epochs=5)
    data = Data("mask")
    trainer.fit(Translator(1.0), datamodule=data)
    assert trainer.callback_metrics["val/translation/AtoB/taken_for_target"] == 100
    trainer.test(Translator(1.0), datamodule=data, verbose=False)
    assert fitted == ["domain classifier", "segmenter of domain B"]
    assert "7 test images against 7" in (tmp_path / "translation_AtoB_table.txt").read_text()


TWO = """
import sys
from tests.callbacks.test_translation import *

def run(folder, **options):
    trainer = boring_trainer(folder, callbacks=[report()], **options)
    trainer.test(Translator(0.5), datamodule=Data("mask", "counterpart"), verbose=False)

run(Path(sys.argv[1]) / "two", devices=2, strategy="ddp_fork")
run(Path(sys.argv[1]) / "one")
"""


def test_two_processes_say_what_one_says(tmp_path: Path) -> None:
    run_fresh(TWO, str(tmp_path))
    assert_one_and_two_agree(tmp_path, "translation_AtoB-table.csv", rows=3)


def test_what_does_not_fit_is_said(tmp_path: Path) -> None:
    def fails(
        error: type[Exception], message: str, module: Any = None, data: Any = None, **options: Any
    ) -> None:
        trainer = boring_trainer(tmp_path, callbacks=[report(**options)])
        with pytest.raises(error, match=message):
            trainer.test(module or Translator(), datamodule=data or Data(), verbose=False)

    fails(MisconfigurationException, "translate, BoringGAN has no translate", BoringGAN())

    class One(Data):
        def __init__(self) -> None:
            super().__init__()
            del self.train_b, self.test_b

    fails(MisconfigurationException, "One has no train_b, test_b", data=One())
    fails(FileNotFoundError, r"against FILE", against=[str(tmp_path / "none.ckpt")])
    path = checkpoint(BoringGAN(), tmp_path / "gan.ckpt")
    fails(RuntimeError, "BoringGAN, which does not translate", against=[path])
    fails(RuntimeError, "BoringGAN, which does not segment", segmenter=path)
    (tmp_path / "broken.ckpt").write_text("nothing")
    fails(RuntimeError, "not a readable checkpoint", against=[str(tmp_path / "broken.ckpt")])

    empty = Data()
    empty.test_b = None
    fails(MisconfigurationException, "Data has no set 'test_b'", data=empty)


@pytest.mark.parametrize(
    "options", [{"judge_steps": 0}, {"directions": ["BtoC"]}, {"pictures": 0}, {"num_images": 0}]
)
def test_impossible_arguments(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        report(**options)
