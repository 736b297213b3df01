"""The page of a dissection: complete, alone, and sorted and filtered by its own script."""

import csv
import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from PIL import Image
from torch import nn

from callbacks.dissection import DissectionReport, overlay
from callbacks.dissection_page import dissection_page
from datamodules.probing import ProbingDataModule
from datamodules.shapes_options import SceneOptions
from lightning_modules.dissection import Dissection
from tests.callbacks.boring import BoringGAN, boring_trainer, loader

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
NODE = shutil.which("node")


class Page(HTMLParser):
    """What is in a page: elements by kind, and what it would load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "input", "br", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"{tag} is closed in the wrong place"

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def record(unit: int, text: str, iou: float, **more: Any) -> dict[str, Any]:
    return {
        "unit": unit,
        "text": text,
        "iou": iou,
        "ceiling": 0.8,
        "area": 100 - unit,
        "by_length": [
            {"length": 1, "iou": iou / 2, "text": "a"},
            {"length": 2, "iou": iou, "text": text},
        ],
        "optimum_iou": iou,
        "certified": True,
        "kind": "single concept",
        "netdissect": {
            "label": "car",
            "category": "part" if unit == 4 else "object",
            "iou": iou / 2,
        },
        "fires_on": 3,
        "accuracy": None if unit == 2 else iou,
        "feeds": ["street"],
        **more,
    }


RECORDS = [
    record(0, "(car AND red)", 0.3),
    record(2, "red", 0.5),
    record(4, "(wheel OR car)", 0.1),
    record(7, '"</script>" & <b>', 0.2),
]


def page(**options: Any) -> str:
    given: dict[str, Any] = {"pictures": {}, "figure": None, "edits": []}
    return dissection_page("a <net>", {"layer": "4"}, RECORDS, **{**given, **options})


def test_the_page_is_well_formed_and_escapes_names() -> None:
    text = page(pictures={0: "data:image/jpeg;base64,xx"}, edits=[("data:,", "a & b")])
    parsed = Page(text)
    assert parsed.open == []
    assert [a["id"] for a in parsed.of("article")] == ["unit-0", "unit-2", "unit-4", "unit-7"]
    assert [a["src"] for a in parsed.of("img")] == ["data:,", "data:image/jpeg;base64,xx"]
    assert "a &lt;net&gt;" in text
    assert len(parsed.of("script")) == 2, "a name cannot end the script"
    assert "&lt;b&gt;" in text
    data = json.loads(re.findall(r'id="data">(.*?)</script>', text, re.S)[0])
    assert data[3]["text"].startswith('"</script>" & <b>')


STUB = """
const fs = require("fs");
const html = fs.readFileSync(process.argv[1], "utf8");
const scripts = [...html.matchAll(/<script(?: [^>]*)?>([\\s\\S]*?)<\\/script>/g)].map(m => m[1]);
const made = {};
const element = id => made[id] ??= { id, value: "", textContent: id === "data" ? scripts[0] : "",
  listeners: {}, children: [], addEventListener(kind, f) { this.listeners[kind] = f; },
  replaceChildren(...cards) { this.children = cards; } };
globalThis.document = { getElementById: element };
globalThis.location = { hash: process.argv[2] };
element("key").value = "iou"; element("order").value = "down"; element("least").value = "0";
(0, eval)(scripts[1]);
const shown = () => element("units").children.map(card => card.id).join(" ");
console.log(shown() + "|" + element("count").textContent);
element("query").value = "car"; element("query").listeners.input();
console.log(shown() + "|" + element("count").textContent);
"""


def in_node(path: Path, hash_: str) -> list[str]:
    assert NODE is not None
    command = [NODE, "-e", STUB, str(path), hash_]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.skipif(NODE is None, reason="node is not installed")
def test_the_script_sorts_and_filters(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    path.write_text(page())
    all_units, with_car = in_node(path, "")
    assert all_units == "unit-2 unit-0 unit-7 unit-4|4 of 4 units"
    assert with_car == "unit-2 unit-0 unit-7 unit-4|4 of 4 units", (
        "the best concept is looked into, too"
    )
    found, _ = in_node(path, "#query=red car&order=up")
    assert found == "unit-0 unit-2|2 of 4 units"
    assert in_node(path, "#query=AND")[0].startswith("unit-0|")
    assert in_node(path, "#category=part")[0] == "unit-4|1 of 4 units"
    assert in_node(path, "#least=0.25")[0] == "unit-2 unit-0|2 of 4 units"
    assert in_node(path, "#key=unit&order=up")[0] == "unit-0 unit-2 unit-4 unit-7|4 of 4 units"
    assert in_node(path, "#key=accuracy")[0].endswith("unit-2|4 of 4 units"), "unknown comes last"
    assert in_node(path, "#key=accuracy&order=up")[0].endswith("unit-2|4 of 4 units")


def browse(path: Path, hash_: str, *options: str) -> str:
    assert BROWSER is not None
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    profile = f"--user-data-dir={path.parent / 'profile'}"
    command = [BROWSER, *flags, profile, *options, f"{path.as_uri()}{hash_}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env={**os.environ})
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome on the PATH")
def test_a_browser_shows_the_page(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    path.write_text(page())
    shown = browse(path, "#query=red&order=up", "--dump-dom")
    assert re.findall(r'<article id="(unit-\d)"', shown) == ["unit-0", "unit-2"]
    assert "2 of 4 units" in shown
    pictures = []
    for name, hash_ in (("all", ""), ("one", "#query=wheel")):
        file = tmp_path / f"{name}.png"
        browse(path, hash_, f"--screenshot={file}", "--window-size=900,700")
        with Image.open(file) as picture:
            pictures.append(
                torch.frombuffer(bytearray(picture.convert("L").tobytes()), dtype=torch.uint8)
            )
            assert picture.size == (900, 700)
    dark = [int((pixels < 128).sum()) for pixels in pictures]
    assert dark[0] > dark[1] > 500, "text is drawn, and less of it where a filter leaves one unit"


# ------------------------------------------------------------------------------- after a test
class Network(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 4, 3, 2, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 6)
        )


class Tables(DummyLogger):
    """A logger that takes tables, as wandb's does."""

    def __init__(self) -> None:
        super().__init__()
        self.tables: dict[str, Any] = {}

    def log_table(self, key: str, columns: list[str], data: list[Any], step: int) -> None:
        self.tables[key] = (columns, data)


def test_everything_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    tables = Tables()
    data = ProbingDataModule(shapes=SceneOptions(image_size=32), shapes_test=12, eval_batch_size=6)
    module = Dissection("0", network=Network(), quantile=0.05, max_length=2, edits=2, top_images=3)
    trainer = boring_trainer(tmp_path, callbacks=[DissectionReport(pictures=2)], logger=tables)
    trainer.test(module, data, verbose=False)
    written = json.loads((tmp_path / "units.json").read_text())
    assert [unit["unit"] for unit in written["units"]] == [0, 1, 2, 3]
    assert written["network"]["layer"] == "0"
    with (tmp_path / "tables" / "units.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["formula"] for row in rows] == [unit["text"] for unit in module.units]
    assert float(rows[2]["iou_length_2"]) == module.units[2]["iou"]
    columns, cells = tables.tables["tables/units"]
    assert columns[:3] == ["unit", "formula", "iou"]
    assert len(cells) == 4
    text = (tmp_path / "dissection.html").read_text()
    parsed = Page(text)
    assert len(parsed.of("article")) == 4
    sources = [attributes["src"] for attributes in parsed.of("img")]
    assert len(sources) == 1 + len(module.edits) + 4, "the curve, the edits, a strip for each unit"
    assert all(str(source).startswith("data:image/jpeg;base64,") for source in sources)
    assert not parsed.of("link")
    assert not [a for a in parsed.of("script") if "src" in a]
    assert not re.findall(r"https?:|url\(|@import", text), "nothing is loaded"
    images = {path.name for path in (tmp_path / "images").iterdir()}
    assert {"dissection-iou_by_length-0.png", "dissection-units-0.png"} <= set(images)
    printed = capsys.readouterr().out
    best = max(module.units, key=lambda unit: unit["iou"])
    assert f"IoU {best['iou']:.3f}* of {best['ceiling']:.3f}  {best['text']}" in printed
    for edit in module.edits:
        assert f"{module.classes[edit.source]} to {module.classes[edit.target]}" in printed


def test_overlays() -> None:
    image = torch.ones(3, 8, 8)
    fires, true = torch.zeros(2, 8, 8, dtype=torch.bool)
    fires[:, :4] = True
    true[2:6, 2:6] = True
    shown = overlay(image, fires, true)
    assert shown.shape == (3, 8, 8)
    assert shown[:, 0, 0].tolist() == [1, 1, 1]
    assert shown[0, 0, 7].item() == pytest.approx(0.35)
    assert shown[:, 2, 2].tolist() == pytest.approx([1.0, 0.85, 0.1]), "the edge of the formula"
    assert shown[:, 3, 3].tolist() == [1, 1, 1], "not its inside"
    assert overlay(torch.ones(3, 224, 448), fires, None).shape == (3, 56, 112)


def test_only_a_dissection_can_be_reported(tmp_path: Path) -> None:
    trainer = boring_trainer(tmp_path, callbacks=[DissectionReport()])
    with pytest.raises(MisconfigurationException, match="firing_masks"):
        trainer.test(BoringGAN(), loader(), verbose=False)
    with pytest.raises(ValueError, match="-1"):
        DissectionReport(-1)
