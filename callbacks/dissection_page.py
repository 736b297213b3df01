"""The page of a dissection: one file without any other, with a filter and an order that the reader chooses."""

import base64
import io
import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from PIL import Image
from torch import Tensor

from lightning_modules.dissection.bounds import LARGEST_LENGTH

JPEG_QUALITY = 88

_STYLE = """
body { font: 14px/1.45 system-ui, sans-serif; margin: 1.5rem auto; max-width: 76rem; padding: 0 1rem; color: #1c2430; }
h1 { font-size: 1.4rem; margin: 0 0 .3rem; }
h2 { font-size: 1.1rem; margin: 1.6rem 0 .5rem; }
dl.facts { display: grid; grid-template-columns: repeat(auto-fill, minmax(11rem, 1fr)); gap: .3rem 1rem; }
dl.facts div { border-left: 3px solid #cfd8e3; padding-left: .5rem; overflow-wrap: anywhere; }
dt { color: #5b6675; }
dd { margin: 0; font-weight: 600; }
form { position: sticky; top: 0; background: #fff; padding: .6rem 0; border-bottom: 1px solid #dde3ea; z-index: 1; }
form { display: flex; flex-wrap: wrap; gap: .5rem 1rem; }
input, select { font: inherit; padding: .15rem .3rem; }
article { border-bottom: 1px solid #e6ebf1; padding: .7rem 0; }
article h3 { margin: 0; font-size: 1rem; }
article h3 b { font-family: ui-monospace, monospace; font-weight: 600; }
.numbers { color: #44505f; margin: .15rem 0 .35rem; }
.numbers > span { margin-right: 1rem; display: inline-block; }
.ok { color: #11743a; }
.no { color: #9a5b00; }
img { max-width: 100%; height: auto; }
figure { margin: 0 0 1rem; }
figcaption { color: #44505f; }
.edits { display: grid; grid-template-columns: repeat(auto-fill, minmax(20rem, 1fr)); gap: .5rem 1.5rem; }
.bars { display: inline-flex; align-items: flex-end; height: 1.1rem; gap: 2px; vertical-align: text-bottom; }
.bars i { width: 9px; background: #5b7fae; display: block; }
.bars i.top { background: #d3dae3; }
"""

_SCRIPT = """
"use strict";
const FIELDS = ["query", "category", "least", "key", "order"];
function select(units, wanted) {
  const words = wanted.query.toLowerCase().split(/\\s+/).filter(Boolean);
  const least = Number(wanted.least) || 0;
  const kept = units.filter(unit =>
    words.every(word => unit.text.includes(word)) &&
    (!wanted.category || unit.category === wanted.category) && unit.iou >= least);
  const sign = wanted.order === "up" ? 1 : -1;
  return kept.sort((a, b) => {
    const [x, y] = [a[wanted.key], b[wanted.key]];
    if (x === y) return a.unit - b.unit;
    if (x === null) return 1;
    if (y === null) return -1;
    return sign * (x < y ? -1 : 1);
  }).map(unit => unit.unit);
}
function start() {
  const units = JSON.parse(document.getElementById("data").textContent);
  const list = document.getElementById("units");
  const cards = new Map(units.map(u => [u.unit, document.getElementById("unit-" + u.unit)]));
  const field = Object.fromEntries(FIELDS.map(name => [name, document.getElementById(name)]));
  for (const [name, value] of new URLSearchParams(location.hash.slice(1)))
    if (field[name]) field[name].value = value;
  function show() {
    const wanted = Object.fromEntries(FIELDS.map(name => [name, field[name].value]));
    const shown = select(units, wanted);
    list.replaceChildren(...shown.map(unit => cards.get(unit)));
    document.getElementById("count").textContent = shown.length + " of " + units.length + " units";
  }
  for (const name of FIELDS) field[name].addEventListener("input", show);
  show();
}
start();
"""

_KEYS = {
    "iou": "IoU",
    "ceiling": "ceiling",
    "gap": "ceiling - IoU",
    "gain": "gain over one concept",
    "accuracy": "accuracy when it fires",
    "area": "area",
    "unit": "number",
}


def picture_uri(image: Tensor) -> str:
    """An image [3, H, W] in [0, 1] as a data URI."""
    pixels = image.detach().clamp(0, 1).mul(255).round().byte().permute(1, 2, 0).cpu().numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=JPEG_QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def dissection_page(
    title: str,
    facts: Mapping[str, str],
    records: Sequence[Mapping[str, Any]],
    pictures: Mapping[int, str],
    figure: str | None,
    edits: Sequence[tuple[str, str]],
) -> str:
    """The whole page.

    Args:
        title: heading.
        facts: what stands above the units, name -> value.
        records: of the units, see :class:`Dissection`.
        pictures: unit -> data URI of its images.
        figure: data URI of the curve of IoU over length.
        edits: data URI and caption of every copy-paste edit.

    Returns:
        HTML that loads nothing.
    """
    # A number stays one in the page; what is not known is null and comes last.
    data = [
        {
            "unit": record["unit"],
            "text": _searched(record),
            "category": record["netdissect"]["category"],
            "iou": record["iou"],
            "ceiling": record["ceiling"],
            "gap": record["ceiling"] - record["iou"],
            "gain": record["iou"] - record["by_length"][0]["iou"],
            "accuracy": record.get("accuracy"),
            "area": record["area"],
        }
        for record in records
    ]
    categories = sorted({entry["category"] for entry in data})
    options = "".join(f'<option value="{escape(c)}">{escape(c)}</option>' for c in categories)
    keys = "".join(f'<option value="{key}">{name}</option>' for key, name in _KEYS.items())
    listed = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>"
        for name, value in facts.items()
    )
    shown = "".join(
        f'<figure><img src="{uri}" alt=""><figcaption>{escape(caption)}</figcaption></figure>'
        for uri, caption in edits
    )
    curve = "" if figure is None else f'<figure><img src="{figure}" alt="IoU over length"></figure>'
    cards = "".join(_card(record, pictures.get(record["unit"])) for record in records)
    # "</script>" inside a string would end the element.
    embedded = json.dumps(data).replace("<", "\\u003c")
    return f"""<!DOCTYPE html>
<html lang="en">
<head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title><style>{_STYLE}</style></head>
<body>
<h1>{escape(title)}</h1>
<dl class="facts">{listed}</dl>
{curve}
{f'<h2>Copy-paste edits</h2><section class="edits">{shown}</section>' if shown else ""}
<h2>Units</h2>
<form onsubmit="return false">
<label>formula has <input id="query" type="search" placeholder="words"></label>
<label>category <select id="category"><option value="">all</option>{options}</select></label>
<label>IoU at least <input id="least" type="number" min="0" max="1" step="0.01" value="0"></label>
<label>order by <select id="key">{keys}</select></label>
<select id="order"><option value="down">descending</option><option value="up">ascending</option></select>
<output id="count"></output>
</form>
<main id="units">{cards}</main>
<script type="application/json" id="data">{embedded}</script>
<script>{_SCRIPT}</script>
</body>
</html>
"""


def _searched(record: Mapping[str, Any]) -> str:
    """What the filter looks into."""
    words = [record["text"], record["kind"], record["netdissect"]["label"]]
    words += [f"feeds {name}" for name in record.get("feeds", [])]
    return " ".join(words).lower()


def _card(record: Mapping[str, Any], picture: str | None) -> str:
    highest = max(record["ceiling"], 1e-9)
    heights = [(step["iou"], f"{step['length']}: {step['text']}") for step in record["by_length"]]
    bars = "".join(
        f'<i style="height:{100 * min(iou / highest, 1):.0f}%" title="{escape(text)} ({iou:.3f})"></i>'
        for iou, text in heights
    )
    bars += '<i class="top" style="height:100%" title="ceiling of any formula"></i>'
    lengths = ", ".join(f"{iou:.3f}" for iou, _ in heights)
    found = record["netdissect"]
    numbers = [
        f"IoU by length {lengths} <span class='bars'>{bars}</span>",
        f"ceiling {record['ceiling']:.3f}",
        f"best concept {escape(found['label'])} ({escape(found['category'])}) {found['iou']:.3f}",
        escape(record["kind"]),
        f"fires on {record['fires_on']} images",
    ]
    if record["optimum_iou"] is not None:
        style, proof = ("ok", "proved") if record["certified"] else ("no", "not proved")
        length = min(len(record["by_length"]), LARGEST_LENGTH)
        numbers.append(f'<em class="{style}">best of up to {length} concepts: {proof}</em>')
    if record.get("accuracy") is not None:
        numbers.append(f"accuracy when it fires {record['accuracy']:.3f}")
    for name in ("feeds", "inhibits"):
        if record.get(name):
            numbers.append(f"{name} {escape(', '.join(record[name]))}")
    image = (
        "" if picture is None else f'<img src="{picture}" alt="images of unit {record["unit"]}">'
    )
    title = escape(record["text"]) or "shares nothing with any concept"
    return (
        f'<article id="unit-{record["unit"]}"><h3>unit {record["unit"]}: <b>{title}</b> &middot; IoU '
        f'{record["iou"]:.3f}</h3><p class="numbers">'
        + "".join(f"<span>{number}</span>" for number in numbers)
        + f"</p>{image}</article>\n"
    )
