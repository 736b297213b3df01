"""A picture of each paper, made by its recipe, and the page that shows them."""

import json
import re
from pathlib import Path

from PIL import Image

from docs.results import ROOT, Row, rows

PICTURES = ROOT / "docs" / "images" / "gallery"
WIDTH = 800
HEIGHT = 480
LARGEST = 300_000


def collect(runs: Path) -> list[Path]:
    """Makes the pictures of the papers whose recipe has a finished run.

    Args:
        runs: folder of ``EXPERIMENT/NAME/images/``.

    Returns:
        The files.
    """
    written = []
    for row in rows():
        tested = [
            path.parent
            for path in sorted((runs / row.experiment).glob("*/results.json"))
            if any(key.startswith("test/") for key in json.loads(path.read_text())["metrics"])
        ]
        found = sorted(tested[0].glob(row.picture), key=_epoch) if tested else []
        if found:
            written.append(framed(found[-1], picture_of(row), row.crop))
    return written


def picture_of(row: Row) -> Path:
    """Where the picture of a paper is."""
    return PICTURES / f"{row.folders[0]}.png"


def framed(source: Path, target: Path, crop: int | None = None) -> Path:
    """Writes a picture of the common width on white, with no more than 256 colours.

    Small ones are enlarged, by whole numbers without smoothing where that fits.

    Args:
        source: a picture of a run.
        target: what is written.
        crop: pixels of the source that are kept from its top, None for all.

    Returns:
        ``target``.

    Raises:
        ValueError: the file is too large.
    """
    with Image.open(source) as opened:
        picture = opened.convert("RGB").crop((0, 0, opened.width, crop or opened.height))
    factor = min(WIDTH / picture.width, HEIGHT / picture.height)
    whole = factor >= 2
    factor = int(factor) if whole else factor
    size = (round(picture.width * factor), round(picture.height * factor))
    kind = Image.Resampling.NEAREST if whole else Image.Resampling.LANCZOS
    canvas = Image.new("RGB", (WIDTH, size[1]), (255, 255, 255))
    canvas.paste(picture.resize(size, kind), ((WIDTH - size[0]) // 2, 0))
    target.parent.mkdir(parents=True, exist_ok=True)
    canvas.quantize(256, dither=Image.Dither.NONE).save(target, optimize=True)
    if target.stat().st_size > LARGEST:
        raise ValueError(f"{target} has {target.stat().st_size} bytes, more than {LARGEST}")
    return target


def _epoch(path: Path) -> int:
    """The number at the end of the name of a run's picture."""
    number = re.search(r"(\d+)$", path.stem)
    return int(number[1]) if number else -1


def gallery() -> str:
    """The pictures with name and caption, for ``docs/gallery.md``."""
    parts = []
    for row in rows():
        page = Path(row.page).name
        lines = [f"**[{row.paper}]({page})**: {row.caption}"]
        if picture_of(row).exists():
            name = picture_of(row).relative_to(ROOT / "docs")
            lines += ["", f"![{row.caption}]({name})"]
        parts.append("\n".join(lines))
    return "\n\n".join(parts)
