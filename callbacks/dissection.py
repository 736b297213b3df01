"""What a dissection found: a page to read, tables, a curve."""

import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.nn import functional as F
from torchvision.io import ImageReadMode, decode_image

from callbacks.dissection_page import dissection_page, picture_uri
from callbacks.media import labelled_grid, log_images, log_table, run_directory, save_figure
from callbacks.report import require
from lightning_modules.arguments import demand_at_least
from lightning_modules.dissection.bounds import LARGEST_LENGTH

DIMMED = 0.35
OUTLINE = (1.0, 0.85, 0.1)
LARGEST_PICTURE = 112
# Of the picture of the clearest units; a longer formula leaves no room for images.
CLEAREST = 6
LONGEST_TITLE = 40
BATCH = 64

COLUMNS = (
    "unit",
    "formula",
    "iou",
    "ceiling",
    "certified",
    "n_leaves",
    "kind",
    "best_concept",
    "category",
    "concept_iou",
    "detector",
    "area",
    "threshold",
    "fires_on",
    "accuracy",
    "feeds",
    "inhibits",
)


class DissectionReport(Callback):
    """Writes what every unit says.

    Works with :class:`Dissection`. Writes ``units.json`` (everything), ``tables/units.csv`` (also a table of wandb),
    ``dissection.html``, which needs no other file, and pictures of the units with the largest IoU, of IoU over length
    and of the edits.

    Args:
        pictures: images of a unit in the page: bright where it fires, outlined where its formula is true; 0 for none.
    """

    def __init__(self, pictures: int = 6) -> None:
        demand_at_least(0, pictures=pictures)
        self.pictures = pictures

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Checks the protocol.

        Raises:
            MisconfigurationException: the module does not dissect images.
        """
        require(self, pl_module, "units", "firing_masks", "formula_of", "edits")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes everything and says where it is."""
        module: Any = pl_module
        if not trainer.is_global_zero:
            return
        directory = run_directory(trainer)
        units = directory / "units.json"
        units.write_text(
            json.dumps({"network": self._facts(trainer, module), "units": module.units}, indent=1)
            + "\n"
        )
        columns, rows = self._rows(module, trainer)
        table = log_table(trainer, "units", columns, rows)
        curve = self._curve(trainer, module)
        edits = self._edits(trainer, module)
        tiles = self._tiles(trainer, module)
        clearest = self._clearest(trainer, module, tiles)
        page = directory / "dissection.html"
        page.write_text(
            dissection_page(
                f"{self._name(module)}, layer {module.hp.layer}",
                self._facts(trainer, module),
                module.units,
                {unit: picture_uri(torch.cat(list(images), 2)) for unit, images in tiles.items()},
                None if curve is None else picture_uri(_read(curve)),
                [(picture_uri(_read(path)), caption) for path, caption in edits],
            ),
            encoding="utf-8",
        )
        self._print(trainer, module)
        for file in (page, units, table, curve, clearest, *(path for path, _ in edits)):
            if file is not None:
                print(f"wrote {file}")

    def _name(self, module: Any) -> str:
        return type(module.network).__name__

    def _facts(self, trainer: Trainer, module: Any) -> dict[str, str]:
        data = getattr(trainer.datamodule, "split_info", {})  # type: ignore[attr-defined]
        hp = module.hp
        values = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("test/")}
        given = hp.checkpoint or getattr(hp, "network", None) or self._name(module)
        facts = {
            "network": str(given),
            "layer": hp.layer,
            "data": str(data.get("dataset", "?")),
            "images": str(len(module.images["maxima"])),
            "concepts": str(len(module.concepts)),
            "signatures": str(len(module.concepts.signatures)),
            "positions": str(module.concepts.n_positions),
            "threshold": f"{hp.level or 1 - hp.quantile:.4g} of {trainer.precision!s}",
            "search": f"{hp.mode}, beam {hp.beam_size}, length {hp.max_length}, penalty {hp.length_penalty:g}",
        }
        for name, value in values.items():
            number = int(value) if value == int(value) and abs(value) < 1e9 else None
            facts[name.removeprefix("test/")] = f"{value:.4f}" if number is None else str(number)
        return facts

    def _rows(self, module: Any, trainer: Trainer) -> tuple[list[str], list[list[Any]]]:
        lengths = [f"iou_length_{i + 1}" for i in range(module.hp.max_length)]
        rows = []
        for record in module.units:
            found = record["netdissect"]
            values = {
                **record,
                "formula": record["text"],
                "best_concept": found["label"],
                "category": found["category"],
                "concept_iou": found["iou"],
                "detector": found["detector"],
                "feeds": ", ".join(record.get("feeds", [])),
                "inhibits": ", ".join(record.get("inhibits", [])),
            }
            steps = [step["iou"] for step in record["by_length"]]
            rows.append([*(values.get(name) for name in COLUMNS), *steps])
        return [*COLUMNS, *lengths], rows

    def _curve(self, trainer: Trainer, module: Any) -> Path | None:
        lengths = list(range(1, module.hp.max_length + 1))
        table = torch.tensor([[step["iou"] for step in r["by_length"]] for r in module.units])
        ceilings = torch.tensor([record["ceiling"] for record in module.units])
        log_table(
            trainer,
            "dissection/iou_by_length",
            ["length", "mean", "median"],
            [
                [i, float(c.mean()), float(c.median())]
                for i, c in zip(lengths, table.T, strict=True)
            ],
        )
        figure, axis = plt.subplots(figsize=(5.5, 3.6))
        for line in table.tolist():
            axis.plot(lengths, line, color="#5b7fae", alpha=min(1.0, 8 / len(table)), lw=0.8)
        axis.plot(lengths, table.mean(0).tolist(), "o-", color="#1c2430", label="mean over units")
        axis.axhline(
            float(ceilings.mean()), color="grey", ls=":", label="mean ceiling, any formula"
        )
        axis.set(xlabel="concepts in the formula", ylabel="IoU", xticks=lengths, ylim=(0, None))
        axis.legend(fontsize=8)
        path = save_figure(trainer, "dissection/iou_by_length", figure)
        plt.close(figure)
        return path

    def _edits(self, trainer: Trainer, module: Any) -> list[tuple[Path, str]]:
        written = []
        probing = trainer.datamodule.probing  # type: ignore[attr-defined]
        for number, edit in enumerate(module.edits):
            donor = probing.batch([edit.donor])["image"]
            shown = torch.stack([edit.before, donor[0], edit.after])
            grid = labelled_grid({"": shown}, 3, ("image", "donor", "edited"))
            path = log_images(trainer, f"dissection/edit_{number}", grid)
            assert path is not None
            written.append((path, edit_caption(module, edit)))
        return written

    def _clearest(self, trainer: Trainer, module: Any, tiles: dict[int, Tensor]) -> Path | None:
        """The units whose formula fits best, with their images; None without images."""
        shown = [r for r in module.units if r["unit"] in tiles and len(r["text"]) <= LONGEST_TITLE]
        shown = sorted(shown, key=lambda record: -record["iou"])[:CLEAREST]
        if not shown:
            return None
        rows = {f"unit {r['unit']}: {r['text']}  {r['iou']:.2f}": tiles[r["unit"]] for r in shown}
        return log_images(trainer, "dissection/units", labelled_grid(rows, self.pictures))

    def _tiles(self, trainer: Trainer, module: Any) -> dict[int, Tensor]:
        """Each unit's strongest images [N, 3, H, W]; every image is classified once."""
        wanted = {r["unit"]: r["top_images"][: self.pictures] for r in module.units}
        places = sorted({place for chosen in wanted.values() for place in chosen})
        probing = trainer.datamodule.probing  # type: ignore[attr-defined]
        tiles: dict[tuple[int, int], Tensor] = {}
        for first in range(0, len(places), BATCH):
            part = places[first : first + BATCH]
            batch = probing.batch(part)
            units = [unit for unit, chosen in wanted.items() if set(chosen) & set(part)]
            fires = module.firing_masks(batch["image"], units)
            for row, unit in enumerate(units):
                formula = module.formula_of(_record(module, unit))
                for place in set(wanted[unit]) & set(part):
                    i = part.index(place)
                    true = _where(formula, batch["layers"][i])
                    tiles[unit, place] = overlay(batch["image"][i], fires[row, i], true)
        return {
            unit: torch.stack([tiles[unit, place] for place in chosen])
            for unit, chosen in wanted.items()
            if chosen
        }

    def _print(self, trainer: Trainer, module: Any) -> None:
        records = sorted(module.units, key=lambda record: -record["iou"])
        print(f"\nlayer {module.hp.layer}: {len(records)} units")
        for record in records[:10]:
            proof = "" if record["optimum_iou"] is None else ("*" if record["certified"] else " ")
            print(
                f"  unit {record['unit']:>4}  IoU {record['iou']:.3f}{proof} of {record['ceiling']:.3f}  "
                f"{record['text']}"
            )
        if records[10:]:
            print(f"  ... {len(records) - 10} more")
        if module.hp.certify is not None:
            proved = min(module.hp.max_length, LARGEST_LENGTH)
            print(f"* proved: no formula of up to {proved} concepts is better")
        print()
        for edit in module.edits:
            print(edit_caption(module, edit))


def edit_caption(module: Any, edit: Any) -> str:
    """A copy-paste edit in words."""

    def name(k: int) -> str:
        return module.classes[k] if 0 <= k < len(module.classes) else "unknown"

    source, target = name(edit.source), name(edit.target)
    return (
        f"{source} to {target}: {_record(module, edit.unit)['text']} of unit {edit.unit}, cut out of an image of "
        f"{name(edit.donor_class)}; reached in "
        f"{edit.outcomes['success']:.0%} of {edit.pasted} edits of {len(edit.images)} images, "
        f"{edit.outcomes['failure']:.0%} unchanged; best one: {name(edit.predicted[0])} -> {name(edit.predicted[1])}, "
        f"P({target}) {edit.probability[0]:.2f} -> {edit.probability[1]:.2f}"
    )


def overlay(image: Tensor, fires: Tensor, true: Tensor | None) -> Tensor:
    """An image, dimmed where a unit does not fire, with an outline around where its formula is true.

    Args:
        image: [3, H, W] in [0, 1].
        fires: bool [h, w].
        true: bool [h, w]; None for no outline.

    Returns:
        [3, H', W'], no larger than 112 pixels.
    """
    height, width = image.shape[1:]
    shrink = max(1.0, max(height, width) / LARGEST_PICTURE)
    size = (round(height / shrink), round(width / shrink))
    image = F.interpolate(image[None], size, mode="bilinear", antialias=True)[0]
    bright = F.interpolate(fires[None, None].float(), size)[0, 0]
    shown = image * (DIMMED + (1 - DIMMED) * bright)
    if true is not None:
        inside = F.interpolate(true[None, None].float(), size)
        eroded = -F.max_pool2d(-inside, 3, 1, 1)
        edge = (inside - eroded)[0, 0] > 0
        shown = torch.where(edge, torch.tensor(OUTLINE)[:, None, None], shown)
    return shown


def _where(formula: Any, layers: Tensor) -> Tensor | None:
    if formula is None:
        return None
    masks = {label: (layers == label).any(0) for label in formula.leaves()}
    return formula.evaluate(masks)


def _record(module: Any, unit: int) -> Any:
    return next(record for record in module.units if record["unit"] == unit)


def _read(path: Path) -> Tensor:
    return decode_image(str(path), ImageReadMode.RGB).float() / 255
