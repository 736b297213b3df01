"""Pictures and tables: written into the run directory and sent to every logger that takes them."""

import csv
from collections.abc import Mapping, Sequence
from math import ceil
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms.functional import pil_to_tensor
from torchvision.utils import make_grid, save_image

from lightning_modules.files import file_name

GAP = 2
FONT_SIZE = 14
SMALLEST_CELL = 48


def run_directory(trainer: Trainer) -> Path:
    """The directory of this run, into which everything is written."""
    return Path(trainer.default_root_dir)


def batch_count(trainer: Trainer) -> int:
    """Number of the batch, from 0, whatever the number of optimizers: the x axis Lightning gives to its loggers."""
    loop = trainer.fit_loop.epoch_loop
    if trainer.state.fn != "fit":
        return loop._batches_that_stepped
    # Lightning logs what belongs to an epoch at its last batch, but counts that one before it calls the callbacks.
    return min(loop._batches_that_stepped, max(loop.total_batch_idx, 0))


def log_images(
    trainer: Trainer, key: str, grid: Tensor | str | Path, step: int | None = None
) -> Path | None:
    """Writes a picture to ``images/`` in the run directory and sends it to the loggers as ``images/KEY``, on rank 0.

    Args:
        trainer: names the run directory, the epoch and the loggers.
        key: name of the picture, e.g. ``val/reconstructions``; the file is ``val-reconstructions-EPOCH.png``.
        grid: float [3, H, W] in [0, 1], or the path of a picture that was already written.
        step: position on the batch axis; the current batch count by default.

    Returns:
        The path of the picture, None on ranks other than 0.
    """
    if not trainer.is_global_zero:
        return None
    if isinstance(grid, Tensor):
        path = _image_path(trainer, key)
        save_image(grid, path)
    else:
        path = Path(grid)
    step = batch_count(trainer) if step is None else step
    for logger in trainer.loggers:
        _log_picture(logger, f"images/{key}", path, step)
    return path


def save_figure(trainer: Trainer, key: str, figure: Any, step: int | None = None) -> Path | None:
    """Writes a matplotlib figure like :func:`log_images` does."""
    if not trainer.is_global_zero:
        return None
    path = _image_path(trainer, key)
    figure.savefig(path, dpi=120, bbox_inches="tight")
    return log_images(trainer, key, path, step)


def log_table(
    trainer: Trainer,
    key: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[Any]],
    step: int | None = None,
    part: str = "",
) -> Path | None:
    """Writes a table to ``tables/`` in the run directory and sends it to the loggers that take tables, on rank 0.

    Args:
        trainer: names the run directory and the loggers.
        key: name of the table, e.g. ``open_set/table``; the file is ``open_set-table.csv``.
        columns: their names.
        rows: a value for each column.
        step: position on the batch axis; the current batch count by default.
        part: of a table that comes in parts: ends the name of the file, while loggers get all parts under one key.

    Returns:
        The path of the CSV file, None on ranks other than 0.

    Raises:
        ValueError: if a row has another length than ``columns``.
    """
    for row in rows:
        if len(row) != len(columns):
            raise ValueError(
                f"a row of table {key!r} has {len(row)} values for {len(columns)} columns"
            )
    if not trainer.is_global_zero:
        return None
    name = file_name("-".join([*key.split("/"), *([part] if part else [])]))
    path = run_directory(trainer) / "tables" / f"{name}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([list(columns), *rows])
    send_table(trainer, key, columns, rows, step)
    return path


def send_table(
    trainer: Trainer,
    key: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[Any]],
    step: int | None = None,
) -> None:
    """Sends a table to the loggers that take tables, as ``tables/KEY``: a picture may have the same key."""
    step = batch_count(trainer) if step is None else step
    for logger in trainer.loggers:
        send = getattr(logger, "log_table", None)
        if send is not None:
            send(
                key=f"tables/{key}",
                columns=list(columns),
                data=[list(row) for row in rows],
                step=step,
            )


def labelled_grid(
    rows: Mapping[str, Tensor], columns: int = 8, column_titles: Sequence[str] = ()
) -> Tensor:
    """One picture of rows of images, each row with its title in the margin.

    Args:
        rows: row title -> images [N, C, H, W] in [0, 1] with C of 1 or 3. Sizes may differ between rows: all are
            enlarged without smoothing to one cell size. Values outside the range are clipped, NaN becomes black.
        columns: at most this many images of each row are shown; shorter rows end in white.
        column_titles: written above the columns.

    Returns:
        float [3, H', W'] in [0, 1] on the CPU.

    Raises:
        ValueError: if there are no rows, or images of another shape.
    """
    if not rows:
        raise ValueError("a grid needs at least one row of images")
    for title, images in rows.items():
        if images.ndim != 4 or images.shape[1] not in (1, 3) or len(images) == 0:
            raise ValueError(
                f"row {title!r} has shape {list(images.shape)}; expected [N, C, H, W] with N > 0 and C of 1 or 3"
            )
    columns = min(columns, max(len(images) for images in rows.values()))
    height = max(images.shape[2] for images in rows.values())
    width = max(images.shape[3] for images in rows.values())
    enlarge = max(1, ceil(SMALLEST_CELL / min(height, width)))
    height, width = height * enlarge, width * enlarge

    cells = torch.ones(len(rows), columns, 3, height, width)
    for row, images in enumerate(rows.values()):
        shown = images[:columns].detach().float().cpu().nan_to_num(0.0).clamp(0.0, 1.0)
        cells[row, : len(shown)] = interpolate(shown, (height, width)).expand(-1, 3, -1, -1)
    # make_grid returns a lone image without its frame, so a second, white one keeps the geometry the same.
    alone = len(rows) * columns == 1
    flat = cells.flatten(0, 1)
    grid = make_grid(
        torch.cat([flat, torch.ones_like(flat)]) if alone else flat,
        nrow=columns,
        padding=GAP,
        pad_value=1.0,
    )
    if alone:
        grid = grid[:, : height + 2 * GAP]
    return _with_margins(grid, list(rows), list(column_titles)[:columns], height, width)


def _with_margins(
    grid: Tensor, row_titles: list[str], column_titles: list[str], height: int, width: int
) -> Tensor:
    font = ImageFont.load_default(FONT_SIZE)
    column_titles = [_broken(font, title, width) for title in column_titles]
    left = max(ceil(font.getlength(title)) for title in row_titles) + 12
    lines = max((title.count("\n") + 1 for title in column_titles), default=0)
    top = lines * (FONT_SIZE + 4) + (6 if lines else 0)
    right = max((ceil(_width(font, title)) - width for title in column_titles[-1:]), default=0)

    pixels = grid.mul(255).round().byte().permute(1, 2, 0).numpy()
    canvas = Image.new(
        "RGB", (left + grid.shape[2] + max(right, 0), top + grid.shape[1]), (255, 255, 255)
    )
    canvas.paste(Image.fromarray(pixels), (left, top))
    draw = ImageDraw.Draw(canvas)
    for row, title in enumerate(row_titles):
        middle = top + GAP + row * (height + GAP) + height / 2
        draw.text((left - 6, middle), title, fill=(0, 0, 0), font=font, anchor="rm")
    for column, title in enumerate(column_titles):
        middle = left + GAP + column * (width + GAP) + width / 2
        x = middle - _width(font, title) / 2
        y = top - 4 - (title.count("\n") + 1) * (FONT_SIZE + 4)
        draw.multiline_text((x, y), title, fill=(0, 0, 0), font=font, align="center")
    return pil_to_tensor(canvas).float() / 255


def _broken(font: Any, title: str, width: int) -> str:
    """The title in lines that fit over a column, where its words are short enough."""
    lines: list[str] = []
    for word in title.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return "\n".join(lines)


def _width(font: Any, text: str) -> float:
    return max(font.getlength(line) for line in text.split("\n"))


def _image_path(trainer: Trainer, key: str) -> Path:
    name = file_name(f"{key.replace('/', '-')}-{trainer.current_epoch}") + ".png"
    path = run_directory(trainer) / "images" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _log_picture(logger: Logger, key: str, path: Path, step: int) -> None:
    send = getattr(logger, "log_image", None)
    if send is not None:
        # A path, not a tensor: wandb would stretch the contrast of a tensor.
        send(key=key, images=[str(path)], step=step, caption=[path.name])
    elif isinstance(logger, TensorBoardLogger):
        logger.experiment.add_image(key, decode_image(str(path), ImageReadMode.RGB), step)
