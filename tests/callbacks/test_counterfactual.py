from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from callbacks.counterfactual import CounterfactualGridCallback, CounterfactualSynthesis
from tests.callbacks.boring import BoringGAN, boring_trainer


class Bank:
    def __len__(self) -> int:
        return 6

    def batch(self, indices: Tensor, device: Any = None, dtype: Any = None) -> dict[str, Tensor]:
        labels = torch.tensor([0, 0, 0, 1, 2, 2])[indices]
        return {"image": torch.rand(len(indices), 3, 8, 8), "label": labels}


class Module:
    """A sample is its index; counts how often it was asked."""

    class_names = ("a", "b", "c")
    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, fingerprint: str = "x") -> None:
        self.fingerprint = fingerprint
        self.made: list[range] = []
        self.stored: dict[str, dict[str, Tensor]] = {}
        self.columns_asked: Tensor | None = None

    def synthesis_request(self, epoch: int) -> range | None:
        return range(10) if epoch == 0 else None

    def synthesis_chunks(self, request: range) -> list[range]:
        return [request[i : i + 4] for i in range(0, len(request), 4)]

    def synthesis_fingerprint(self) -> str:
        return self.fingerprint

    def training_bank(self) -> Bank:
        return Bank()

    def synthesize(self, bank: Bank, samples: range) -> dict[str, dict[str, Tensor]]:
        self.made.append(samples)
        images = torch.tensor(samples, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 8, 8)
        return {"pool": {"images": images, "start": torch.tensor(samples) % 6}}

    def store_synthesis(self, pools: dict[str, dict[str, Tensor]]) -> None:
        self.stored = pools

    def phase_at(self, epoch: int) -> str:
        return "first" if epoch == 0 else "second"

    def counterfactual_columns(self, images: Tensor) -> dict[str, Tensor]:
        self.columns_asked = images
        return {"original": images, "as a": images}


def synthesize(directory: Path, module: Module) -> Module:
    trainer = boring_trainer(directory)
    CounterfactualSynthesis().on_train_epoch_start(trainer, module)  # type: ignore[arg-type]
    return module


def test_all_samples_arrive_in_order(tmp_path: Path) -> None:
    module = synthesize(tmp_path, Module())
    assert module.made == [range(0, 4), range(4, 8), range(8, 10)]
    assert module.stored["pool"]["images"][:, 0, 0, 0].tolist() == list(range(10))
    assert len(list((tmp_path / "images").glob("counterfactuals-generated*"))) == 1
    table = (tmp_path / "tables" / "synthesis-pool-000000.csv").read_text().splitlines()
    assert table[0] == "sample,start"
    assert table[7] == "6,0"
    assert len(table) == 11


def test_finished_chunks_are_not_made_again_unless_something_changed(tmp_path: Path) -> None:
    synthesize(tmp_path, Module())
    (tmp_path / "synthesis" / "0000004-0000008.pt").unlink()
    again = synthesize(tmp_path, Module())
    assert again.made == [range(4, 8)]
    assert again.stored["pool"]["images"][:, 0, 0, 0].tolist() == list(range(10))
    assert len(synthesize(tmp_path, Module("other weights")).made) == 3


def test_nothing_is_made_without_a_request(tmp_path: Path) -> None:
    module = Module()
    module.synthesis_request = lambda epoch: None  # type: ignore[method-assign]
    assert synthesize(tmp_path, module).made == []


def test_chunk_files_go_at_the_end(tmp_path: Path) -> None:
    module = synthesize(tmp_path, Module())
    CounterfactualSynthesis().on_train_end(boring_trainer(tmp_path), module)  # type: ignore[arg-type]
    assert not (tmp_path / "synthesis").exists()


def test_a_module_without_the_protocol_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match="BoringGAN lacks"):
        CounterfactualSynthesis().setup(boring_trainer(tmp_path), BoringGAN(), "fit")
    with pytest.raises(ValueError, match="preview"):
        CounterfactualSynthesis(preview=-1)


def test_the_grid_starts_from_different_classes_at_the_phase_boundary(tmp_path: Path) -> None:
    trainer, module = boring_trainer(tmp_path), Module()
    grid = CounterfactualGridCallback(rows=4)
    grid.on_train_epoch_start(trainer, module)  # type: ignore[arg-type]
    assert module.columns_asked is None
    trainer.fit_loop.epoch_progress.current.completed = 1
    trainer.fit_loop.epoch_progress.current.processed = 1
    asked: list[Tensor] = []
    bank = Bank()
    original = bank.batch

    def spy(indices: Tensor, *args: Any) -> dict[str, Tensor]:
        asked.append(indices)
        return original(indices)

    bank.batch = spy  # type: ignore[method-assign]
    module.training_bank = lambda: bank  # type: ignore[method-assign]
    grid.on_train_epoch_start(trainer, module)  # type: ignore[arg-type]
    assert asked[-1].tolist() == [0, 3, 4, 1], "one of each class before the second of any"
    assert len(list((tmp_path / "images").glob("counterfactuals-grid*"))) == 1
