"""Draws ``docs/images/shapes.png``: all that the procedural scenes can do.

python docs/make_shapes_sheet.py
"""

import argparse

from torchvision.utils import save_image

from callbacks.media import labelled_grid
from datamodules.shapes_sheet import scene_sheet


def main() -> None:
    """Writes the picture."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", default="docs/images/shapes.png")
    parser.add_argument("--image-size", type=int, default=80)
    parser.add_argument("--columns", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rows = scene_sheet(args.image_size, args.columns, args.seed)
    save_image(labelled_grid(rows, args.columns), args.output)


if __name__ == "__main__":
    main()
