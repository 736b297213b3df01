"""The open-set table, score histograms and OSCR curves of a test."""

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from lightning.pytorch import Callback, LightningModule, Trainer

from callbacks.media import run_directory, save_figure
from callbacks.report import Histogram, require, score_histograms, write_table
from lightning_modules.metrics.open_set import openness, oscr_curve

COLUMNS = {
    "auroc": "AUROC",
    "aupr_unknown": "AUPR unk",
    "aupr_known": "AUPR known",
    "fpr95": "FPR95",
    "closed_accuracy": "closed acc",
    "openauc": "OSCR",
}


class OpenSetEvaluationCallback(Callback):
    """Prints and stores the table of a test, and draws what is behind it.

    Works with any :class:`TableRows` that offers ``test_metrics`` (row to :class:`OpenSetMetrics`) and has the
    hyper-parameter ``acceptance``.

    Args:
        histograms: rows whose score histograms are drawn.
    """

    def __init__(self, histograms: list[str] | None = None) -> None:
        self.histograms = ["msp", "margin"] if histograms is None else histograms

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Checks the protocol.

        Raises:
            MisconfigurationException: if the module has no open-set rows.
        """
        require(self, pl_module, "ready_rows", "row_titles", "row_thresholds", "test_metrics")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes ``open_set_table.txt`` and the figures, prints the table and where things are."""
        module: Any = pl_module
        if not trainer.is_global_zero:
            return
        gathered = {row: module.test_metrics[row].samples for row in module.ready_rows}
        values = {key: float(value) for key, value in trainer.callback_metrics.items()}
        rows = [
            [module.row_titles[row], *(100 * values[f"test/{row}/{name}"] for name in COLUMNS)]
            for row in gathered
        ]
        title = self._title(trainer, gathered)
        written = [
            write_table(trainer, "open_set", title, ["method", *COLUMNS.values()], rows),
            self._histograms(trainer, module, gathered),
            self._oscr(trainer, module, gathered),
            *sorted((run_directory(trainer) / "images").glob("counterfactuals*")),
        ]
        for file in filter(None, written):
            print(f"wrote {file}")

    def _title(self, trainer: Trainer, gathered: dict[str, Any]) -> str:
        _, labels, _ = next(iter(gathered.values()))
        data = getattr(getattr(trainer, "datamodule", None), "split_info", {})
        title = (
            f"Open-set recognition, {data.get('dataset', 'test set')}, protocol {data.get('protocol', '?')}, "
            f"split {data.get('index', '?')}: {int((labels >= 0).sum())} known and {int((labels < 0).sum())} "
            "unknown test images; x100, unknown is the positive class"
        )
        if data:
            title += f"; openness {openness(len(data['known']), len(data['unknown'])):.2f}"
        return title

    def _histograms(self, trainer: Trainer, module: Any, gathered: dict[str, Any]) -> Path | None:
        drawn = []
        for row in self.histograms:
            if row in gathered:
                scores, labels, _ = gathered[row]
                threshold = module.row_thresholds[row]
                drawn.append(Histogram(module.row_titles[row], scores, labels < 0, threshold))
        share = round(100 * module.hp.acceptance)
        return score_histograms(
            trainer,
            "open_set",
            drawn,
            ("known classes", "unknown classes"),
            f"accepts {share} % of held-out knowns",
            "score (larger = more unknown)",
        )

    def _oscr(self, trainer: Trainer, module: Any, gathered: dict[str, Any]) -> Path | None:
        figure, axis = plt.subplots(figsize=(5, 4))
        for row, (scores, labels, predictions) in gathered.items():
            known = labels >= 0
            rate, false = oscr_curve(
                scores[known], scores[~known], predictions[known], labels[known]
            )
            bold = 2.0 if row == "margin" else 1.0
            axis.plot(false, rate, lw=bold, label=module.row_titles[row])
        axis.set(
            xlabel="unknown images accepted",
            ylabel="known images accepted and correct",
            title="Open-set classification rate (OSCR)",
            xlim=(0, 1),
            ylim=(0, 1.02),
        )
        axis.legend(fontsize=7, loc="lower right")
        return save_figure(trainer, "open_set/oscr", figure)
