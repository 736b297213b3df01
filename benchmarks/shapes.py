"""Procedural scenes per second, on one core.

The claim is at least 1,000 scenes of 64 pixels per second of processor time.

    python benchmarks/shapes.py --scenes 512
"""

import argparse
import time
from collections.abc import Callable

import torch

from datamodules.shapes import SceneOptions, Scenes

KINDS = {
    "one object": SceneOptions(),
    "one object, sketch": SceneOptions(domain="sketch"),
    "four objects": SceneOptions(min_objects=4, max_objects=4),
    "head and body": SceneOptions(mode="parts"),
}


def per_second(work: Callable[[], object], scenes: int, repeats: int) -> float:
    """Scenes per second of processor time, the best of some repeats."""
    best = float("inf")
    for _ in range(repeats):
        start = time.process_time()
        work()
        best = min(best, time.process_time() - start)
    return scenes / best


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--scenes", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--sizes", type=int, nargs="+", default=[32, 64, 128])
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"scenes per second of one core; {args.scenes} scenes, best of {args.repeats}")
    print(f"{'':24}" + "".join(f"{size:>7} px" for size in args.sizes))
    index = list(range(args.scenes))
    for title, options in KINDS.items():
        for truth in (False, True):
            speeds = []
            for size in args.sizes:
                changed = SceneOptions(**{**vars(options), "image_size": size})
                scenes = Scenes(changed, count=args.scenes, ground_truth=truth)

                def draw(scenes: Scenes = scenes) -> None:
                    for low in range(0, args.scenes, 64):
                        scenes.__getitems__(index[low : low + 64])

                draw()
                speeds.append(per_second(draw, args.scenes, args.repeats))
            name = "  with ground truth" if truth else title
            print(f"{name:24}" + "".join(f"{speed:10,.0f}" for speed in speeds))


if __name__ == "__main__":
    main()
