"""Boxes of localization maps at 1,000 thresholds: ours against OpenCV's contours, one thread, in the same run.

    python benchmarks/localization_boxes.py [--maps 20] [--size 224]

Maps are random grids, resized to ``--size`` by bicubic interpolation and normalised, as an evaluation sees them.
"OpenCV" thresholds each map and finds its contours 1,000 times, as the released code of Choe et al. does; "once a mask"
does so for different masks only, 255 at most. Boxes are compared before anything is printed. Needs
``opencv-python-headless`` (the ``test`` extra).
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
import torch

from lightning_modules.metrics.boxes import box_sweep
from lightning_modules.metrics.localization import threshold_grid
from lightning_modules.nn.maps import normalize_map, upsample_map

Boxes = list[list[list[int]]]


def opencv(map: np.ndarray, cuts: list[int], every: bool) -> Boxes:
    """Boxes of the masks ``map > cut``."""
    height, width = map.shape
    found = []
    for cut in cuts:
        mask = cv2.threshold(map, cut, 255, cv2.THRESH_BINARY)[1]
        contours = cv2.findContours(mask, cv2.RETR_TREE, cv2.CHAIN_APPROX_SIMPLE)[0]
        if contours and not every:
            contours = [max(contours, key=cv2.contourArea)]
        boxes = []
        for contour in contours:
            x, y, w, h = cv2.boundingRect(contour)
            boxes.append([x, y, min(x + w, width - 1), min(y + h, height - 1)])
        found.append(boxes or [[0, 0, 0, 0]])
    return found


def seconds(work: Callable[..., Any], *arguments: Any) -> tuple[float, Any]:
    start = time.perf_counter()
    result = work(*arguments)
    return time.perf_counter() - start, result


def main() -> None:
    """Prints one line per kind of map and rule."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--maps", type=int, default=20)
    parser.add_argument("--size", type=int, default=224)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    thresholds = threshold_grid().numpy()
    print(
        f"{arguments.maps} maps of {arguments.size} x {arguments.size}, 1,000 thresholds, ms per map (median)"
    )
    print(
        f"{'grid':>5} {'boxes':>8} {'ours':>8} {'OpenCV':>8} {'ratio':>6} {'once a mask':>12} {'ratio':>6}"
    )
    for grid in (7, 14, 28):
        generator = torch.Generator().manual_seed(grid)
        coarse = torch.rand(arguments.maps, grid, grid, generator=generator)
        maps = normalize_map(upsample_map(coarse, arguments.size)).numpy()
        for select in ("largest", "all"):
            times = []
            for map in maps:
                ours, sweep = seconds(box_sweep, map, thresholds, select)
                values = (map * 255).astype(np.uint8)
                cuts = [int(threshold * values.max()) for threshold in thresholds]
                every = select == "all"
                theirs, boxes = seconds(opencv, values, cuts, every)
                once, _ = seconds(opencv, values, sorted(set(cuts)), every)
                times.append((ours, theirs, once))
                rows = np.split(sweep.boxes, np.flatnonzero(np.diff(sweep.level)) + 1)
                for level, found in zip(sweep.level_of_threshold, boxes, strict=True):
                    if rows[level].tolist() != sorted(found):
                        raise SystemExit(f"boxes differ: {rows[level].tolist()} and {found}")
            ours, theirs, once = 1000 * np.median(times, axis=0)
            print(
                f"{grid:5d} {select:>8} {ours:8.1f} {theirs:8.1f} {theirs / ours:6.1f} "
                f"{once:12.1f} {once / ours:6.1f}"
            )


if __name__ == "__main__":
    main()
