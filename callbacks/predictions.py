"""Predictions as a table, and as pictures."""

import csv
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from callbacks.media import run_directory, send_table
from lightning_modules.nn.statistics import gather_over_ranks

Row = dict[str, Any]
LOGGED_ROWS = 10_000


class PredictionWriter(BasePredictionWriter):
    """Writes ``predictions.csv`` into the run directory: one row for every sample, in the order of the data.

    Protocol: ``predict_step`` returns a dict of columns of equal length, each a tensor [B] or a list of text or
    numbers. The column ``index`` is taken from the batch where the module does not return it, and so is ``path``, the
    file an image came from, where the batch has it. ``image`` is no column: it is :class:`PictureWriter`'s.

    The rows of all ranks are gathered and each index is written once; loggers that take tables get the first ten
    thousand as ``predictions``. Rank 0 prints where the table lies and, if there
    is a column ``decision``, how often each decision was taken.

    Args:
        filename: of the table, within the run directory.

    Raises:
        ValueError: if the file name is empty or leaves the run directory.
    """

    def __init__(self, filename: str = "predictions.csv") -> None:
        super().__init__(write_interval="batch")
        if not filename or os.path.basename(filename) != filename:
            raise ValueError(f"filename={filename!r} must be a plain file name")
        self.filename = filename
        self._rows: dict[tuple[int, int], Row] = {}

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts an empty table."""
        self._rows = {}

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Collects the rows of a batch.

        Raises:
            ValueError: if the prediction is no table.
        """
        table = _columns(prediction, batch, type(pl_module).__name__)
        for values in zip(*table.values(), strict=True):
            row = dict(zip(table, values, strict=True))
            self._rows.setdefault((dataloader_idx, int(row["index"])), row)

    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gathers the rows and writes them."""
        parts = gather_over_ranks(trainer, self._rows)
        self._rows = {}
        if not trainer.is_global_zero:
            return
        merged: dict[tuple[int, int], Row] = {}
        for part in parts:
            merged |= part
        rows = [merged[key] for key in sorted(merged)]
        if len({loader for loader, _ in merged}) > 1:
            rows = [{"dataloader": key[0], **merged[key]} for key in sorted(merged)]
        self._write(trainer, rows)

    def _write(self, trainer: Trainer, rows: list[Row]) -> None:
        path = run_directory(trainer) / self.filename
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(path.name + ".part")
        with beside.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]) if rows else ["index"])
            writer.writeheader()
            writer.writerows(rows)
        os.replace(beside, path)
        if rows:
            shown = [list(row.values()) for row in rows[:LOGGED_ROWS]]
            send_table(trainer, "predictions", list(rows[0]), shown)
        summary = f"{len(rows)} predictions in {path}"
        if rows and "decision" in rows[0]:
            counts = Counter(str(row["decision"]) for row in rows)
            summary += ": " + ", ".join(f"{value} {count}" for value, count in counts.most_common())
        print(summary)


def _columns(prediction: Any, batch: Any, module: str) -> dict[str, list[Any]]:
    """Checked columns as lists, ``index`` and ``path`` first."""
    if not isinstance(prediction, dict) or not prediction:
        raise ValueError(
            f"PredictionWriter needs {module}.predict_step to return a dict of columns, "
            f"not {type(prediction).__name__}"
        )
    prediction = {name: column for name, column in prediction.items() if name != "image"}
    given = batch if isinstance(batch, dict) else {}
    lead = {
        key: source[key]
        for key in ("index", "path")
        for source in (given, prediction)
        if key in source
    }
    if "index" not in lead:
        raise ValueError(
            f"PredictionWriter needs the column 'index' to put rows in order; let the dataset or "
            f"{module}.predict_step give it"
        )
    table: dict[str, list[Any]] = {}
    for name, column in {**lead, **prediction}.items():
        if isinstance(column, Tensor):
            if column.ndim != 1:
                raise ValueError(
                    f"column {name!r} of {module}.predict_step has shape {list(column.shape)}; expected [B]"
                )
            column = column.tolist()
        table[name] = list(column)
    lengths = {name: len(column) for name, column in table.items()}
    if len(set(lengths.values())) != 1:
        raise ValueError(f"columns of {module}.predict_step differ in length: {lengths}")
    return table


class PictureWriter(BasePredictionWriter):
    """Writes what a module makes of pictures as pictures, under ``predictions/`` in the run directory.

    Protocol: ``predict_step`` returns a dict with ``image`` [B, C, H, W] in [0, 1], C of 1 or 3, and the batch has
    ``index`` and perhaps ``path``. A picture keeps its size, its name and, below ``predict_folder`` of the DataModule,
    its folders; without a path its name is its index. Values are rounded to the nearest of 256, NaN becomes black.
    Where two files would get one name (``a.png`` and ``a.jpg``), these keep the old extension, or else get their index.

    Every rank writes its own pictures; rank 0 prints where they are.

    Args:
        extension: format of the files, ``png`` or another one that Pillow can write.

    Raises:
        ValueError: Pillow cannot write such files.
    """

    def __init__(self, extension: str = "png") -> None:
        super().__init__(write_interval="batch")
        self.extension = extension.lower().removeprefix(".")
        formats = Image.registered_extensions()
        if formats.get(f".{self.extension}") not in Image.SAVE:
            raise ValueError(
                f"extension={extension!r} is no picture that can be written; use png, jpg or webp"
            )
        self._written: dict[tuple[int, int], Path] = {}

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts with nothing."""
        self._written = {}

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Writes the pictures of a batch, under their numbers until all names are known.

        Raises:
            ValueError: if the prediction holds no pictures, or nobody numbers them.
        """
        images = prediction.get("image") if isinstance(prediction, dict) else None
        numbered = isinstance(batch, dict) and "index" in batch
        if not isinstance(images, Tensor) or images.ndim != 4 or images.shape[1] not in (1, 3):
            shape = list(images.shape) if isinstance(images, Tensor) else type(images).__name__
            raise ValueError(
                f"PictureWriter needs {type(pl_module).__name__}.predict_step to return 'image' [B, C, H, W] with C of "
                f"1 or 3, not {shape}; remove the callback"
            )
        if not numbered:
            raise ValueError("PictureWriter needs a batch with 'index'; let the dataset give it")
        folder = run_directory(trainer) / "predictions"
        folder.mkdir(parents=True, exist_ok=True)
        pixels = images.detach().float().nan_to_num(0.0).mul(255).round().clamp(0, 255).byte().cpu()
        indices = batch["index"].tolist()
        paths = batch.get("path", [f"{index:06d}" for index in indices])
        root = getattr(getattr(trainer, "datamodule", None), "predict_folder", None)
        for index, path, picture in zip(indices, paths, pixels, strict=True):
            to_pil_image(picture).save(self._part(folder, dataloader_idx, index), quality=95)
            self._written[dataloader_idx, index] = _place_below(path, root)

    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Agrees on the names with all ranks and gives them to the pictures."""
        parts = gather_over_ranks(trainer, self._written)
        everything = {key: place for part in parts for key, place in part.items()}
        names = _names(everything, self.extension)
        folder = run_directory(trainer) / "predictions"
        for key in self._written:
            place = folder / names[key]
            place.parent.mkdir(parents=True, exist_ok=True)
            os.replace(self._part(folder, *key), place)
        self._written = {}
        if trainer.is_global_zero:
            print(f"{len(names)} pictures in {folder}")

    def _part(self, folder: Path, loader: int, index: int) -> Path:
        return folder / f".part-{loader}-{index}.{self.extension}"


def _place_below(path: str, root: str | None) -> Path:
    """The path relative to the folder; its mere name if it does not lie in there."""
    whole = Path(os.path.abspath(Path(path).expanduser()))
    if root is not None:
        above = Path(os.path.abspath(Path(root).expanduser()))
        if whole.is_relative_to(above):
            return whole.relative_to(above)
    return Path(whole.name)


def _names(places: dict[tuple[int, int], Path], extension: str) -> dict[tuple[int, int], Path]:
    """A file of its own for each place, the same on every rank."""
    names: dict[tuple[int, int], Path] = {}
    taken: set[str] = set()
    plain = Counter(str(place.with_suffix("")).lower() for place in places.values())
    for loader, index in sorted(places):
        place = places[loader, index]
        stem = place.stem if plain[str(place.with_suffix("")).lower()] == 1 else place.name
        name, attempt = place.with_name(f"{stem}.{extension}"), 0
        # Not all file systems tell upper from lower case.
        while str(name).lower() in taken:
            number = f"{index}" if attempt == 0 else f"{index}-{attempt}"
            name, attempt = place.with_name(f"{stem}-{number}.{extension}"), attempt + 1
        taken.add(str(name).lower())
        names[loader, index] = name
    return names
