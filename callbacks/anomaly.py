"""The anomaly table and score histograms of a test, and a picture of the most anomalous samples of a prediction."""

from math import inf, isnan
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torchvision.utils import save_image

from callbacks.media import labelled_grid, log_images, run_directory
from callbacks.report import Histogram, require, score_histograms, write_table
from lightning_modules.arguments import demand_at_least
from lightning_modules.metrics.anomaly import anomaly_metrics, auc_interval
from lightning_modules.nn.statistics import gather_over_ranks

COLUMNS = {
    "auc": "AUC",
    "low": "95 % low",
    "high": "95 % high",
    "eer": "EER",
    "f1_inlier": "F1 inlier tuned",
    "f1_outlier": "F1 outlier tuned",
    "f1_inlier_heldout": "F1 inlier",
    "f1_outlier_heldout": "F1 outlier",
    "false_alarm_rate": "false alarms",
    "detection_rate": "detections",
}
NOTES = (
    "95 %: bootstrap interval of the AUC over the test samples of this one training",
    "tuned: threshold at the equal error rate, chosen on the test set itself with its labels",
    "F1 inlier to detections: threshold from held-out inliers; - where there is none",
)


class AnomalyReport(Callback):
    """Prints and stores the table of a test, and draws the scores behind it.

    Works with any module that offers ``ready_rows`` (row names), ``row_titles`` (row to description),
    ``test_metrics`` (row to :class:`AnomalyMetrics`, computed when the test ends) and ``row_thresholds`` (row to the
    threshold from held-out inliers, or None).
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Checks the protocol.

        Raises:
            MisconfigurationException: if the module has no anomaly rows.
        """
        require(self, pl_module, "ready_rows", "row_titles", "test_metrics", "row_thresholds")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes ``anomaly_table.txt`` and the histograms, prints the table and where things are."""
        module: Any = pl_module
        if not trainer.is_global_zero:
            return
        rows, drawn = [], []
        for row in module.ready_rows:
            scores, labels = module.test_metrics[row].samples
            title, threshold = module.row_titles[row], module.row_thresholds[row]
            values = anomaly_metrics(scores, labels, threshold)
            values["low"], values["high"] = auc_interval(scores, labels)
            cells = [values.get(name) for name in COLUMNS]
            rows.append([title, *(None if cell is None else 100 * cell for cell in cells)])
            drawn.append(Histogram(title, scores, labels == 1, threshold))
        columns = ["score", *COLUMNS.values()]
        written = [
            write_table(trainer, "anomaly", self._title(trainer, module), columns, rows, NOTES),
            score_histograms(
                trainer,
                "anomaly",
                drawn,
                ("inliers", "outliers"),
                "threshold from held-out inliers",
                "score (larger = more anomalous)",
            ),
        ]
        for file in filter(None, written):
            print(f"wrote {file}")

    def _title(self, trainer: Trainer, module: Any) -> str:
        data = getattr(getattr(trainer, "datamodule", None), "split_info", {})
        metric = module.test_metrics[module.ready_rows[0]]
        _, labels = metric.samples
        of_frames = metric.frame_labels is not None
        title = f"Anomaly detection, {data.get('dataset', 'test set')}"
        if data.get("normal"):
            title += f", normal: {', '.join(str(c) for c in data['normal'])}"
        title += (
            f": {int((labels == 0).sum())} inlier and {int((labels == 1).sum())} outlier test "
            f"{'frames, scored by their largest score' if of_frames else 'images'}"
        )
        trained = data.get("counts", {}).get("train")
        if trained is not None:
            title += f", {trained} training images"
        if "holdout_inliers" in data:
            held_out = data["holdout_inliers"]
            title += ", test inliers " + (
                "held out from training" if held_out else "TRAINED ON as well"
            )
        return title + "; x100, outlier is the positive class"


Row = tuple[float, int, int, Tensor]


class AnomalySheet(Callback):
    """Draws the most anomalous samples of a prediction above what the module reconstructs of them.

    Protocol: ``predict_step`` returns a dict with the column ``score`` ([B], larger = more anomalous), the batch has
    ``image`` ([B, C, H, W] in [0, 1], one size) and either of them has ``index``; ``reconstruct(images)`` gives images
    in [0, 1]. It is called once on every rank, in evaluation mode, with the same samples of all ranks.

    Writes ``images/most_anomalous.png`` in the run directory: images, reconstructions, absolute differences, each
    column with its score, the largest first. A score of nan comes first of all.

    Args:
        pictures: number of samples.

    Raises:
        ValueError: if it is below 1.
    """

    def __init__(self, pictures: int = 16) -> None:
        demand_at_least(1, pictures=pictures)
        self.pictures = pictures
        self._rows: list[Row] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Checks the protocol.

        Raises:
            MisconfigurationException: if the module reconstructs nothing.
        """
        if stage == "predict":
            require(self, pl_module, "reconstruct")

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts an empty picture."""
        self._rows = []

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keeps the images of the batch that are among the most anomalous so far.

        Raises:
            ValueError: if the prediction has no ``score``, or nobody gives ``image`` and ``index``.
        """
        given: dict[str, Any] = {}
        for source in (batch, outputs):
            given |= source if isinstance(source, dict) else {}
        missing = [name for name in ("score", "index", "image") if name not in given]
        if missing:
            raise ValueError(
                f"AnomalySheet found no {', '.join(missing)} in the batch and in what "
                f"{type(pl_module).__name__}.predict_step returns; give it or remove the callback"
            )
        scores, indices = (torch.as_tensor(given[name]).tolist() for name in ("score", "index"))
        rows = [
            (score, dataloader_idx, index, image)
            for score, index, image in zip(scores, indices, given["image"], strict=True)
        ]
        kept = _most_anomalous(self._rows + rows, self.pictures)
        # A copy: a view would keep the whole batch in memory.
        self._rows = [(*row[:3], row[3].detach().cpu().clone()) for row in kept]

    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gathers the samples of all ranks and draws them."""
        module: Any = pl_module
        parts = gather_over_ranks(trainer, self._rows)
        rows = _most_anomalous([row for part in parts for row in part], self.pictures)
        if not rows:
            return
        images = torch.stack([image for *_, image in rows])
        with torch.no_grad():
            rebuilt = module.reconstruct(images.to(module.device)).cpu()
        if not trainer.is_global_zero:
            return
        grid = labelled_grid(
            {
                "image": images,
                "reconstruction": rebuilt,
                "difference": (images.float() - rebuilt.float()).abs(),
            },
            self.pictures,
            [f"{score:.3g}" for score, *_ in rows],
        )
        path = run_directory(trainer) / "images" / "most_anomalous.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_image(grid, path)
        log_images(trainer, "most_anomalous", path)
        print(f"wrote {path}")


def _most_anomalous(rows: list[Row], count: int) -> list[Row]:
    """The rows of the largest scores, largest first, each sample once, in the same order for any number of ranks."""
    best: dict[tuple[int, int], Row] = {}
    for row in sorted(rows, key=lambda row: (-inf if isnan(row[0]) else -row[0], *row[1:3])):
        best.setdefault(row[1:3], row)
    return list(best.values())[:count]
