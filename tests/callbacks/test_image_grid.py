from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from callbacks.image_grid import ImageGrid
from callbacks.media import labelled_grid, log_images, log_table, save_figure
from tests.callbacks.boring import BoringGAN, BoringImages, boring_trainer, loader


class PictureLogger(CSVLogger):
    """Takes pictures and tables like wandb's logger."""

    def __init__(self, path: Path) -> None:
        super().__init__(str(path))
        self.received: list[tuple[Any, ...]] = []

    def log_image(
        self, key: str, images: list[Any], step: int | None = None, caption: Any = None
    ) -> None:
        self.received.append((key, images, step))

    def log_table(self, key: str, columns: Any, data: Any, step: int | None = None) -> None:
        self.received.append((key, columns, data, step))


class GridWitness(BoringGAN):
    """Remembers what its grid was made of."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Tensor, Tensor]] = []

    def image_grid(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        assert not torch.is_grad_enabled()
        assert not any(module.training for module in self.modules())
        rows = super().image_grid(batch)
        self.calls.append((batch["index"].clone(), torch.rand(3)))
        return rows


class StateWitness(Callback):
    """The random state and the modes of all submodules at the ends of epochs."""

    def __init__(self, freeze: bool) -> None:
        self.freeze = freeze
        self.states: list[Tensor] = []
        self.modes: list[list[bool]] = []

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        if self.freeze:
            pl_module.discriminator[0].eval()
        self.states.append(torch.get_rng_state())
        self.modes.append([module.training for module in pl_module.modules()])


def test_draws_every_n_epochs_and_tells_the_loggers(tmp_path: Path) -> None:
    logger = PictureLogger(tmp_path / "log")
    trainer = boring_trainer(
        tmp_path, max_epochs=4, logger=[logger], callbacks=[ImageGrid(every_n_epochs=2, pictures=3)]
    )
    trainer.fit(BoringGAN(), loader(), loader())
    files = sorted((tmp_path / "images").iterdir())
    assert [file.name for file in files] == ["grid-1.png", "grid-3.png"]
    assert logger.received == [
        ("images/grid", [str(files[0])], 7),
        ("images/grid", [str(files[1])], 15),
    ]
    # Three columns and two rows of 48 pixels, with the titles in the margin on the left.
    width, height = Image.open(files[0]).size
    assert height == 2 * 48 + 3 * 2
    assert width > 3 * 48 + 4 * 2 + 20


def test_training_does_not_notice(tmp_path: Path) -> None:
    weights = []
    for callbacks in ([], [ImageGrid()]):
        torch.manual_seed(0)
        before, after = StateWitness(freeze=True), StateWitness(freeze=False)
        module = BoringGAN()
        trainer = boring_trainer(tmp_path, callbacks=[before, *callbacks, after])
        trainer.fit(module, loader(), loader())
        assert all(map(torch.equal, before.states, after.states))
        assert before.modes == after.modes
        assert not module.discriminator[0].training
        weights.append(module.state_dict())
    assert all(torch.equal(value, weights[1][key]) for key, value in weights[0].items())


def test_same_samples_and_same_noise_in_every_epoch(tmp_path: Path) -> None:
    module = GridWitness()
    trainer = boring_trainer(tmp_path, max_epochs=3, callbacks=[ImageGrid(pictures=3)])
    trainer.fit(module, loader(), loader())
    assert len(module.calls) == 3
    for index, noise in module.calls:
        assert index.tolist() == [0, 1, 2]
        assert torch.equal(noise, module.calls[0][1])


def test_without_validation_a_resumed_run_keeps_its_training_samples(tmp_path: Path) -> None:
    def shuffled(seed: int) -> DataLoader:
        generator = torch.Generator().manual_seed(seed)
        return DataLoader(BoringImages(64), 4, shuffle=True, generator=generator)

    first, second = GridWitness(), GridWitness()
    trainer = boring_trainer(tmp_path, max_epochs=1, callbacks=[ImageGrid()])
    trainer.fit(first, shuffled(1))
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    trainer = boring_trainer(tmp_path, max_epochs=2, callbacks=[ImageGrid()])
    trainer.fit(second, shuffled(2), ckpt_path=tmp_path / "one.ckpt", weights_only=True)
    assert len(second.calls) == 1
    assert torch.equal(first.calls[0][0], second.calls[0][0])


def test_module_without_pictures_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match="image_grid"):
        boring_trainer(tmp_path, callbacks=[ImageGrid()]).fit(BoringModel())
    with pytest.raises(ValueError, match="pictures=0"):
        ImageGrid(pictures=0)


def test_labelled_grid_keeps_values_and_order() -> None:
    levels = torch.tensor([0.0, 0.2, 0.6, 2.0, torch.nan]).view(5, 1, 1, 1)
    red = torch.tensor([1.0, 0.0, 0.0]).view(1, 3, 1, 1).expand(2, 3, 16, 16)
    grid = labelled_grid({"grey": levels.expand(5, 1, 8, 8), "red": red}, columns=8)
    left = grid.shape[2] - 5 * 50 - 2
    centres = [left + 2 + 24 + 50 * column for column in range(5)]
    grey, second = grid[:, 2 + 24, centres], grid[:, 2 + 24 + 50, centres]
    expected = torch.tensor([0.0, 0.2, 0.6, 1.0, 0.0])
    torch.testing.assert_close(grey, expected.expand(3, 5), atol=0.003, rtol=0)
    assert second[:, :2].T.tolist() == [[1.0, 0.0, 0.0]] * 2
    assert (second[:, 2:] == 1).all()


def test_labelled_grid_writes_titles_beside_their_rows() -> None:
    rows = {"upper": torch.rand(2, 1, 28, 28), " ": torch.rand(2, 1, 28, 28)}
    margin = labelled_grid(rows)[:, :, :30]
    top, bottom = margin.chunk(2, dim=1)
    assert top.min() < 0.2
    assert bottom.min() == 1.0
    titled = labelled_grid(rows, column_titles=["original", "as 3"])
    assert titled.shape[1] > margin.shape[1]
    lone = labelled_grid({"one": torch.zeros(1, 1, 8, 8)})
    assert lone.shape[1] == 48 + 2 * 2


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 2, 8, 8), (0, 1, 8, 8)])
def test_labelled_grid_refuses_other_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="row 'x'"):
        labelled_grid({"x": torch.zeros(shape)})
    with pytest.raises(ValueError, match="at least one row"):
        labelled_grid({})


def test_media_reach_files_and_loggers(tmp_path: Path) -> None:
    from matplotlib.figure import Figure

    logger = PictureLogger(tmp_path / "log")
    trainer = boring_trainer(tmp_path, logger=[logger, CSVLogger(str(tmp_path / "csv"))])
    picture = log_images(trainer, "val/real", torch.rand(3, 9, 9), step=7)
    assert picture == tmp_path / "images" / "val-real-0.png"
    assert log_images(trainer, "again", str(picture), step=8) == picture
    figure = Figure()
    figure.subplots().plot([0, 1])
    assert save_figure(trainer, "curve", figure) == tmp_path / "images" / "curve-0.png"
    table = log_table(trainer, "test/rows", ["a", "b"], [[1, "x, y"]], step=9)
    assert table is not None
    assert table.read_text().splitlines() == ["a,b", '1,"x, y"']
    assert [(entry[0], entry[-1]) for entry in logger.received] == [
        ("images/val/real", 7),
        ("images/again", 8),
        ("images/curve", 0),
        ("tables/test/rows", 9),
    ]
    with pytest.raises(ValueError, match="1 values for 2 columns"):
        log_table(trainer, "bad", ["a", "b"], [[1]])
