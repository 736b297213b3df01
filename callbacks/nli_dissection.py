"""What the units of a sentence-pair classifier say: a page, tables, and the edits that changed its mind."""

import json
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from callbacks.dissection_page import dissection_page
from callbacks.media import log_table, run_directory
from callbacks.report import require

SHOWN = 10
COLUMNS = (
    "unit",
    "formula",
    "iou",
    "ceiling",
    "certified",
    "n_leaves",
    "kind",
    "best_feature",
    "feature_iou",
    "area",
    "accuracy",
    "feeds",
    "inhibits",
    "example",
)
EDIT_COLUMNS = (
    "unit",
    "text",
    "source",
    "target",
    "tried",
    "success",
    "failure",
    "partial_success",
    "activated",
    "control_tried",
    "control_success",
    "before",
    "after",
)


class NLIDissectionReport(Callback):
    """Writes what every unit says, and prints the best explanations and edits.

    Works with :class:`NLIDissection`. Writes ``units.json`` (everything: records with example pairs, edits, pointwise
    mutual information), ``tables/units.csv``, ``tables/nli-edits.csv`` and ``tables/nli-pmi.csv`` (also tables of
    wandb), and ``dissection.html``, which needs no other file.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Checks the protocol.

        Raises:
            MisconfigurationException: the module does not dissect a sentence-pair classifier.
        """
        require(self, pl_module, "units", "edits", "feature_pmi")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes everything and says where it is."""
        module: Any = pl_module
        if not trainer.is_global_zero:
            return
        facts = self._facts(trainer, module)
        units = run_directory(trainer) / "units.json"
        everything = {
            "network": facts,
            "pmi": module.feature_pmi,
            "edits": module.edits,
            "units": module.units,
        }
        units.write_text(json.dumps(everything, indent=1) + "\n")
        page = run_directory(trainer) / "dissection.html"
        title = f"{facts['network']}, {len(module.units)} units"
        page.write_text(dissection_page(title, facts, module.units, {}, None, []), encoding="utf-8")
        written = [page, units, *self._tables(trainer, module)]
        self._print(module)
        for file in written:
            print(f"wrote {file}")

    def _facts(self, trainer: Trainer, module: Any) -> dict[str, str]:
        data = getattr(trainer.datamodule, "split_info", {})  # type: ignore[attr-defined]
        hp = module.hp
        facts = {
            "network": hp.classifier or "classifier trained here",
            "data": f"{data.get('dataset', '?')}, {data.get('test_split', '?')}",
            "fires": "above 0" if hp.quantile is None else f"above quantile {1 - hp.quantile:g}",
            "activations": "training mode" if hp.train_mode_features else "evaluation mode",
            "search": f"{hp.mode}, beam {hp.beam_size}, length {hp.max_length}, penalty {hp.length_penalty:g}",
        }
        for name, value in trainer.callback_metrics.items():
            if name.startswith("test/"):
                number = float(value)
                text = str(int(number)) if number == int(number) else f"{number:.4f}"
                facts[name.removeprefix("test/")] = text
        return facts

    def _tables(self, trainer: Trainer, module: Any) -> list[Path | None]:
        lengths = [f"iou_length_{i + 1}" for i in range(module.hp.max_length)]
        rows = []
        for record in module.units:
            first = next(iter(record["examples"]), None)
            values = {
                **record,
                "formula": record["text"],
                "best_feature": record["netdissect"]["label"],
                "feature_iou": record["netdissect"]["iou"],
                "feeds": ", ".join(record["feeds"]),
                "inhibits": ", ".join(record["inhibits"]),
                "example": first and f"{first['premise']} / {first['hypothesis']}",
            }
            steps = [step["iou"] for step in record["by_length"]]
            rows.append([*(values[name] for name in COLUMNS), *steps])
        edits = []
        for edit in module.edits:
            first = next(iter(edit["examples"]), None)
            texts = {name: first and " / ".join(first[name]) for name in ("before", "after")}
            edits.append([{**edit, **texts}.get(name) for name in EDIT_COLUMNS])
        pmi = [
            [label, feature, value]
            for label, found in module.feature_pmi.items()
            for feature, value in found
        ]
        return [
            log_table(trainer, "units", [*COLUMNS, *lengths], rows),
            log_table(trainer, "nli/edits", EDIT_COLUMNS, edits),
            log_table(trainer, "nli/pmi", ["label", "feature", "pmi"], pmi),
        ]

    def _print(self, module: Any) -> None:
        records = sorted(module.units, key=lambda record: -record["iou"])
        print(f"\n{len(records)} units")
        for record in records[:SHOWN]:
            print(f"  unit {record['unit']:>4}  IoU {record['iou']:.3f}  {record['text']}")
        if records[SHOWN:]:
            print(f"  ... {len(records) - SHOWN} more")
        for label, found in module.feature_pmi.items():
            best = ", ".join(f"{feature} {value:.2f}" for feature, value in found[:5])
            print(f"{label}: {best or 'no feature speaks for it'}")
        for edit in module.edits:
            if not edit["examples"]:
                continue
            example = edit["examples"][0]
            print(
                f"{edit['source']} to {edit['target']} in {edit['success']:.0%} of {edit['tried']} edits for unit "
                f"{edit['unit']} {edit['text']}: {' / '.join(example['before'])} -> {' / '.join(example['after'])}"
            )
