"""Localization judged and shown: table, threshold sweep and heat maps of a test; overlays and boxes of a prediction."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torchvision.transforms.functional import resize
from torchvision.utils import draw_bounding_boxes, save_image

from callbacks.media import labelled_grid, log_images, log_table, run_directory, save_figure
from callbacks.report import evenly, require, write_table
from lightning_modules.arguments import demand_at_least
from lightning_modules.files import file_name
from lightning_modules.nn.maps import normalize_map, upsample_map
from lightning_modules.nn.statistics import gather_over_ranks

COLUMNS = {
    "accuracy": "accuracy",
    "max_box_acc": "MaxBoxAcc",
    "threshold@50": "best thr.",
    "box_acc@50": "at val thr.",
    "max_box_acc_v2": "V2",
    "pxap": "PxAP",
    "top1_loc_error": "top-1 loc err",
    "top5_loc_error": "top-5 loc err",
    "gt_known_error": "GT-known err",
}
NOTES = (
    "MaxBoxAcc: boxes with IoU >= 0.5 at the threshold best on the test set itself; V2: mean over IoU 0.3, 0.5, 0.7",
    "at val thr.: the same at the threshold chosen on the validation set, as are all errors; - where there is none",
)
PREDICTED, TRUE = (0, 200, 80), (255, 255, 255)


def overlay(
    images: Tensor, maps: Tensor, boxes: Tensor | None = None, truth: Sequence[Tensor] | None = None
) -> Tensor:
    """Heat maps over images, predicted boxes in green, true ones in white.

    Args:
        images: [B, 3 or 1, H, W] in [0, 1].
        maps: [B, h, w].
        boxes: predicted, x0, y0, x1, y1 in pixels of the images [B, 4].
        truth: true boxes of each image [G, 4].

    Returns:
        [B, 3, H, W] in [0, 1] on the CPU.
    """
    images = images.detach().cpu().float().expand(-1, 3, -1, -1)
    heat = normalize_map(upsample_map(maps.detach().cpu(), images.shape[-2:]))
    colours = torch.from_numpy(matplotlib.colormaps["jet"](heat.numpy())[..., :3]).permute(
        0, 3, 1, 2
    )
    mixed = 0.55 * images + 0.45 * colours.float()
    return _with_boxes(mixed, boxes, truth)


def _with_boxes(images: Tensor, boxes: Tensor | None, truth: Sequence[Tensor] | None) -> Tensor:
    drawn = images.mul(255).round().clamp(0, 255).byte()
    found = []
    for position, image in enumerate(drawn):
        for corners, colour in (
            (None if truth is None else truth[position], TRUE),
            (None if boxes is None else boxes[position : position + 1], PREDICTED),
        ):
            if corners is not None and len(corners):
                image = draw_bounding_boxes(image, corners.cpu(), colors=colour, width=1)
        found.append(image)
    return torch.stack(found).float() / 255


class LocalizationReport(Callback):
    """Prints and stores the localization table of a test, draws the threshold sweep and a sheet of heat maps.

    Works with any module that offers ``row_titles`` (row to title), ``row_thresholds``, ``curves`` (row to accuracy in
    percent at every threshold), ``localization_maps(images, labels)`` and ``boxes(maps, size, row)``, and a DataModule
    whose ``test`` has ``batch(indices)`` with ``boxes``.

    Args:
        pictures: test images on the sheet, 0 for none.
    """

    def __init__(self, pictures: int = 12) -> None:
        demand_at_least(0, pictures=pictures)
        self.pictures = pictures

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Checks the protocol.

        Raises:
            MisconfigurationException: if the module localizes nothing.
        """
        require(
            self, pl_module, "row_titles", "row_thresholds", "curves", "localization_maps", "boxes"
        )

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes ``localization_table.txt`` and the pictures, prints the table and where things are."""
        module: Any = pl_module
        if not trainer.is_global_zero or not module.curves:
            return
        values = {key: float(value) for key, value in trainer.callback_metrics.items()}
        rows = []
        for row, title in module.row_titles.items():
            cells: list[Any] = [values.get(f"test/{row}/{name}") for name in COLUMNS]
            cells[0] = None if cells[0] is None else 100 * cells[0]
            rows.append([title, *cells])
        data = getattr(getattr(trainer, "datamodule", None), "split_info", {})
        count = data.get("counts", {}).get("test", "?")
        title = (
            f"Localization, {data.get('dataset', 'test set')}: {count} test images of "
            f"{data.get('num_classes', '?')} classes; percent"
        )
        written: list[Path | None] = [
            write_table(trainer, "localization", title, ["method", *COLUMNS.values()], rows, NOTES),
            self._sweep(trainer, module),
            self._sheet(trainer, module),
        ]
        for path in filter(None, written):
            print(f"wrote {path}")

    def _sweep(self, trainer: Trainer, module: Any) -> Path | None:
        figure, axis = plt.subplots(figsize=(6, 4))
        count = len(next(iter(module.curves.values())))
        steps = torch.arange(count) / count
        for row, curve in module.curves.items():
            (line,) = axis.plot(steps, curve, label=module.row_titles[row])
            threshold = module.row_thresholds[row]
            if threshold is not None:
                axis.axvline(threshold, color=line.get_color(), lw=0.7, ls=":")
        axis.set(
            xlabel="threshold, share of the maximum of a map (dotted: chosen on validation data)",
            ylabel="boxes with IoU >= 0.5 [%]",
            ylim=(0, 100),
        )
        axis.legend(fontsize=8)
        path = save_figure(trainer, "localization/sweep", figure)
        plt.close(figure)
        columns = [steps[::10].tolist(), *(c[::10].tolist() for c in module.curves.values())]
        rows = [list(row) for row in zip(*columns, strict=True)]
        log_table(trainer, "localization/sweep", ["threshold", *module.curves], rows)
        return path

    @torch.no_grad()
    def _sheet(self, trainer: Trainer, module: Any) -> Path | None:
        data: Any = getattr(trainer, "datamodule", None)
        test = getattr(data, "test", None)
        if not self.pictures or test is None:
            return None
        chosen = evenly(test, self.pictures)
        batch = test.batch(chosen, module.device, module.dtype)
        images, labels = batch["image"], batch["label"]
        truth = None
        if "boxes" in batch:
            truth = [boxes[(boxes >= 0).all(1)].cpu() for boxes in batch["boxes"]]
        rows = {"image": _with_boxes(images.cpu().float().expand(-1, 3, -1, -1), None, truth)}
        for row, maps in module.localization_maps(images, labels).items():
            boxes = module.boxes(maps, images.shape[-2:], row)
            rows[module.row_titles[row]] = overlay(images, maps, boxes, truth)
        titles = [module.class_names[k] for k in labels.tolist()]
        picture = labelled_grid(rows, self.pictures, titles)
        return log_images(trainer, "localization/sheet", picture)


class LocalizationOverlays(Callback):
    """In a prediction, writes for every picture its heat map and box as a picture, and all boxes as one JSON file.

    Works with any module whose ``predict_step`` returns the columns ``label``, ``confidence``, ``x0`` ... ``y1`` and
    that offers ``localization_maps(images)`` and ``boxes(maps, size)``. Pictures are ``overlays/INDEX-NAME.png``, at
    the resolution of the files as far as ``largest`` allows; boxes are in ``boxes.json``, in pixels of the files.

    Args:
        pictures: write pictures for at most so many images, 0 for none.
        largest: longer side of a picture.
    """

    def __init__(self, pictures: int = 500, largest: int = 640) -> None:
        demand_at_least(0, pictures=pictures)
        demand_at_least(16, largest=largest)
        self.pictures = pictures
        self.largest = largest
        self._found: dict[int, dict[str, Any]] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Checks the protocol.

        Raises:
            MisconfigurationException: if the module localizes nothing.
        """
        require(self, pl_module, "localization_maps", "boxes")

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts with nothing."""
        self._found = {}

    @torch.no_grad()
    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keeps the boxes of a batch and writes its pictures."""
        module: Any = pl_module
        images, indices = batch["image"], batch["index"].tolist()
        corners = torch.stack(
            [torch.as_tensor(outputs[name]) for name in ("x0", "y0", "x1", "y1")], 1
        )
        paths = batch.get("path", [""] * len(images))
        for row, index in enumerate(indices):
            self._found[index] = {
                "path": paths[row],
                "label": outputs["label"][row],
                "confidence": float(outputs["confidence"][row]),
                "box": corners[row].tolist(),
            }
        wanted = [row for row, index in enumerate(indices) if index < self.pictures]
        if not wanted:
            return
        maps = module.localization_maps(images[wanted])["fused"]
        folder = run_directory(trainer) / "overlays"
        folder.mkdir(parents=True, exist_ok=True)
        for place, row in enumerate(wanted):
            image, box = images[row], corners[row].double()
            if "original_size" in batch:
                height, width = batch["original_size"][row].tolist()
                factor = min(1.0, self.largest / max(height, width))
                image = resize(
                    image, [max(1, round(height * factor)), max(1, round(width * factor))]
                )
                box = box * factor
            drawn = overlay(image[None], maps[place : place + 1], box.round().long()[None])
            name = Path(paths[row]).stem
            name = file_name(f"{indices[row]:06d}{'-' if name else ''}{name}")
            save_image(drawn[0], folder / f"{name}.png")

    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gathers the boxes and writes them."""
        parts = gather_over_ranks(trainer, self._found)
        if not trainer.is_global_zero:
            return
        merged = {index: entry for part in parts for index, entry in part.items()}
        path = run_directory(trainer) / "boxes.json"
        ordered = [{"index": index, **merged[index]} for index in sorted(merged)]
        path.write_text(json.dumps(ordered, indent=1) + "\n")
        print(f"{len(merged)} boxes in {path}, heat maps in {run_directory(trainer) / 'overlays'}")
