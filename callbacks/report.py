"""What the reports of a test share: checks, the table of its rows, the histograms of their scores."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from numpy.typing import NDArray
from torch import Tensor

from callbacks.media import log_table, run_directory, save_figure
from lightning_modules.files import file_name


class Histogram(NamedTuple):
    """Scores of two groups of samples; a threshold that is None or nan is not drawn."""

    title: str
    scores: NDArray[Any]
    second: NDArray[np.bool_]
    threshold: float | None


def require(callback: Callback, offering: Any, *names: str) -> None:
    """Checks that a module or a DataModule offers what a callback works with.

    Raises:
        MisconfigurationException: if it does not.
    """
    missing = [name for name in names if not hasattr(offering, name)]
    if missing:
        kind = "module" if isinstance(offering, LightningModule) else "DataModule"
        raise MisconfigurationException(
            f"{type(callback).__name__} needs a {kind} with {', '.join(names)}, {type(offering).__name__} has no "
            f"{', '.join(missing)}; remove the callback"
        )


def due(trainer: Trainer, every_n_epochs: int | None) -> bool:
    """Whether a validation is one of those after which something is done, every so many epochs of a training."""
    if every_n_epochs is None or trainer.sanity_checking or trainer.state.fn != "fit":
        return False
    return (trainer.current_epoch + 1) % every_n_epochs == 0


def evenly(images: Any, count: int | None) -> Tensor:
    """Numbers of ``count`` images of a set at equal distances, of all where there are no more or it is None."""
    count = len(images) if count is None else min(count, len(images))
    return torch.linspace(0, len(images) - 1, count).long()


def write_table(
    trainer: Trainer,
    key: str,
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[Any]],
    notes: Sequence[str] = (),
) -> Path:
    """Writes ``KEY_table.txt``, prints it and sends the table to the loggers.

    Args:
        trainer: names the run directory and the loggers.
        key: of the report, e.g. ``open_set``.
        title: line above the table.
        columns: the first one is that of the names of the rows.
        rows: a name and numbers; None where there is no number.
        notes: lines below the table.

    Returns:
        The path of the text.
    """
    lead = max(len(row[0]) for row in rows)
    widths = [max(12, len(name) + 2) for name in columns[1:]]

    def line(name: str, cells: Sequence[str]) -> str:
        return f"{name:<{lead}}" + "".join(f"{c:>{w}}" for c, w in zip(cells, widths, strict=True))

    lines = [title, line("", columns[1:])]
    for name, *values in rows:
        lines.append(line(name, ["-" if value is None else f"{value:.1f}" for value in values]))
    text = "\n".join([*lines, *notes])
    path = run_directory(trainer) / f"{file_name(key)}_table.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")
    log_table(trainer, f"{key}/table", columns, rows)
    print("\n" + text + "\n")
    return path


def score_histograms(
    trainer: Trainer,
    key: str,
    drawn: Sequence[Histogram],
    groups: tuple[str, str],
    threshold_label: str,
    axis_label: str,
) -> Path | None:
    """Draws ``KEY/histograms``, one panel for each; None if there is none."""
    if not drawn:
        return None
    figure, axes = plt.subplots(1, len(drawn), figsize=(5 * len(drawn), 3.5), squeeze=False)
    for axis, (title, scores, second, threshold) in zip(axes[0], drawn, strict=True):
        bins = np.histogram_bin_edges(scores, 40).tolist()
        axis.hist(scores[~second], bins, alpha=0.6, density=True, label=groups[0])
        axis.hist(scores[second], bins, alpha=0.6, density=True, label=groups[1])
        if threshold is not None and np.isfinite(threshold):
            axis.axvline(threshold, color="black", ls="--", lw=1, label=threshold_label)
        axis.set(title=title, xlabel=axis_label, ylabel="density")
        axis.legend(fontsize=8)
    path = save_figure(trainer, f"{key}/histograms", figure)
    plt.close(figure)
    return path
