"""Searching explanations by signatures against the ways of others, on the same synthetic probing set, one thread.

    python benchmarks/dissection.py [--units 64] [--peer-units 4] [--repeats 3] [--device cpu]
    python benchmarks/dissection.py --growth [--figure growth.png]

Peers: run-length encoded masks merged by ``pycocotools`` (the way of the released code, with the NOT of every concept
prepared beforehand, a favour), numpy booleans, and the package ``compositional-explanations`` (its beam search, bounded
by heuristics, and its optimal algorithm). A peer that is not installed is named and left out. The beams of all peers
that follow the released rules must be equal to ours, formula by formula; the package has rules of its own, so its IoU
is compared. Times are CPU seconds, ratios those of the mean over the same units.
"""

import argparse
import contextlib
import importlib.util
import io
import os
import statistics
import time
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from lightning_modules.dissection.bounds import certified_search, iou_ceiling
from lightning_modules.dissection.concepts import ConceptMasks
from lightning_modules.dissection.search import beam_search
from lightning_modules.dissection.signatures import Signatures

SCENES, COLORS, OBJECTS, PARTS = 12, 11, 120, 57
BEAM, LENGTH = 5, 3


# ------------------------------------------------------------------ synthetic sets
def scenes(n_images: int, side: int, n_concepts: int, seed: int = 0) -> np.ndarray:
    """Concept masks [C, D]: a scene per image, a mosaic of colours, rectangular objects with parts inside."""
    rng = np.random.default_rng(seed)
    share = np.array([SCENES, COLORS, OBJECTS, PARTS]) / (SCENES + COLORS + OBJECTS + PARTS)
    kinds = np.maximum((share * n_concepts).astype(int), 1)
    kinds[2] += n_concepts - kinds.sum()
    start = np.concatenate([[0], kinds.cumsum()])
    masks = np.zeros((n_concepts, n_images, side, side), bool)
    half = side // 2
    for image in range(n_images):
        masks[rng.integers(kinds[0]), image] = True
        for y in (0, half):
            for x in (0, half):
                color = start[1] + rng.integers(kinds[1])
                masks[color, image, y : y + side - half, x : x + side - half] = True
        for _ in range(rng.integers(2, 5)):
            thing = rng.integers(kinds[2])
            (y, x), (h, w) = rng.integers(0, side - 6, 2), rng.integers(6, half + 1, 2)
            masks[start[2] + thing, image, y : y + h, x : x + w] = True
            part = start[3] + thing % kinds[3]
            masks[part, image, y + 1 : y + h // 2, x + 1 : x + w // 2] = True
    return masks.reshape(n_concepts, -1)


def planted_units(masks: np.ndarray, n_units: int, seed: int = 1) -> np.ndarray:
    """Units [U, D] that fire on half of a formula of six concepts, and on some other positions."""
    rng = np.random.default_rng(seed)
    units = np.zeros((n_units, masks.shape[1]), bool)
    for unit in units:
        a, b, c, d, e, f = masks[rng.choice(len(masks), 6, replace=False)]
        unit[:] = ((a | b | c) & ~d) | (e & ~f)
        unit &= rng.random(len(unit)) < 0.6
        unit |= rng.random(len(unit)) < 0.002
    return units


def random_signatures(size: int, n_concepts: int, positions: int, seed: int = 0) -> Signatures:
    """As many signatures as a large set may have: about four concepts each, their popularity falling as 1 / rank."""
    rng = np.random.default_rng(seed)
    popularity = 1 / np.arange(1, n_concepts + 1)
    drawn = rng.choice(n_concepts, (size, 5), p=popularity / popularity.sum())
    drawn.sort(axis=1)
    keep = np.concatenate([np.ones((size, 1), bool), drawn[:, 1:] != drawn[:, :-1]], 1)
    indptr = np.concatenate([[0], keep.sum(1).cumsum()])
    weights = 1 + rng.multinomial(positions - size, rng.dirichlet(np.full(size, 0.3)))
    parts = (indptr, drawn[keep], weights)
    return Signatures(*(torch.from_numpy(part.astype(np.int64)) for part in parts))


def planted_counts(concepts: ConceptMasks, seed: int) -> Tensor:
    """Counts per signature of a unit planted on signatures, which fires on half a percent of the positions or less."""
    rng = np.random.default_rng(seed)
    a, b, c = rng.choice(len(concepts), 3, replace=False)
    row = concepts.incidence.row
    mask = ((row(int(a)) | row(int(b))) & ~row(int(c))).cpu().numpy()
    weights = concepts.signatures.weights.cpu().numpy()
    counts = rng.binomial(weights, np.where(mask, 0.3, 0.001))
    return torch.from_numpy(counts).to(concepts.areas.device)


# ------------------------------------------------------------------ peers
class Merger(Protocol):
    """Masks in some encoding, for :func:`merged_search`."""

    def encode(self, mask: np.ndarray) -> Any: ...
    def merge(self, mask: Any, other: Any, op: int) -> Any: ...
    def area(self, mask: Any) -> int: ...


class RunLengths:
    """Run-length encoding; ``other`` is a pair of a concept and its complement."""

    def __init__(self) -> None:
        from pycocotools import mask

        self.tool = mask

    def encode(self, mask: np.ndarray) -> Any:
        return self.tool.encode(np.asfortranarray(mask[:, None].astype(np.uint8)))

    def merge(self, mask: Any, other: Any, op: int) -> Any:
        return self.tool.merge([mask, other[op == 2]], intersect=op > 0)

    def area(self, mask: Any) -> int:
        return int(self.tool.area(mask))


class Booleans:
    """One byte per position."""

    def encode(self, mask: np.ndarray) -> Any:
        return mask

    def merge(self, mask: Any, other: Any, op: int) -> Any:
        return mask | other[0] if op == 0 else mask & other[op == 2]

    def area(self, mask: Any) -> int:
        return int(np.count_nonzero(mask))


def merged_search(
    tool: Merger, unit: Any, concepts: list[tuple[Any, Any]]
) -> list[tuple[str, float]]:
    """The released rules, one candidate after the other."""
    own = tool.area(unit)
    words = (" OR {}", " AND {}", " AND (NOT {})")

    def iou(mask: Any) -> float:
        inside = tool.area(tool.merge(unit, (mask, None), 1))
        return inside / (tool.area(mask) + own - inside + 1e-10)

    scored = [(str(i), iou(mask), mask) for i, (mask, _) in enumerate(concepts)]
    scored = [entry for entry in scored if entry[1] > 0]
    beam = sorted(scored, key=lambda entry: -entry[1])[:BEAM]
    for _ in range(LENGTH - 1):
        made = []
        for name, _, mask in beam:
            for i, concept in enumerate(concepts):
                for op, word in enumerate(words):
                    merged = tool.merge(mask, concept, op)
                    made.append((f"({name}{word.format(i)})", iou(merged), merged))
        beam = sorted(beam + made, key=lambda entry: -entry[1])[:BEAM]
    return [(name, score) for name, score, _ in beam]


def peer_package(kind: str) -> Callable[..., Any] | None:
    """The package's search, or None if it is not installed."""
    if importlib.util.find_spec("compositional_explanations") is None:
        return None
    if kind == "beam":
        from compositional_explanations import beam

        return lambda **given: beam.compute_beam_explanations(**given, beam_size=BEAM)
    from compositional_explanations import optimal

    return optimal.compute_optimal_explanations


# ------------------------------------------------------------------ measuring
def timed(function: Callable[[], Any], device: str = "cpu") -> tuple[float, Any]:
    """Seconds and result of one call: of this process on a CPU, so that other processes do not count."""
    clock = time.process_time if device == "cpu" else time.perf_counter
    began = clock()
    result = function()
    if device != "cpu":
        torch.cuda.synchronize()
    return clock() - began, result


def per_unit(
    function: Callable[[Any], Any], units: list[Any], device: str
) -> tuple[list[float], list[Any]]:
    """Seconds and result for every unit."""
    pairs = [timed(lambda unit=unit: function(unit), device) for unit in units]
    return [seconds for seconds, _ in pairs], [result for _, result in pairs]


def compare(args: argparse.Namespace) -> None:
    """One line per engine on the set of the table: seconds per unit, ratio to run lengths."""
    masks = scenes(args.images, args.side, args.concepts)
    units = planted_units(masks, args.units)
    once, concepts = timed(lambda: ConceptMasks.from_masks(torch.from_numpy(masks)).to(args.device))
    print(
        f"{args.concepts} concepts, {args.units} units, {args.images} images of {args.side} px = {masks.shape[1]} "
        f"positions, {len(concepts.signatures)} signatures ({once:.2f} s once), beam {BEAM}, length {LENGTH}, "
        f"{args.device}, {torch.get_num_threads()} thread(s)"
    )
    tensors = [torch.from_numpy(unit) for unit in units]

    counting, counts = per_unit(concepts.unit_counts, tensors, args.device)
    times: dict[str, list[float]] = {}
    beams: dict[str, list[Any]] = {}
    for mode in ("reference", "distinct"):
        repeated = []
        for _ in range(args.repeats):
            # Without what an earlier repeat remembers.
            table = ConceptMasks(concepts.atoms, concepts.signatures)
            seconds, beams[mode] = per_unit(
                lambda unit, t=table, m=mode: beam_search(unit, t, BEAM, LENGTH, mode=m),
                counts,
                args.device,
            )
            repeated.append(seconds)
        times[mode] = [statistics.median(runs) for runs in zip(*repeated, strict=True)]
    whole = [t + c for t, c in zip(times["reference"], counting, strict=True)]
    rows = [("ours, counts per signature", counting, "")]
    rows += [(f"ours, {mode} beam", found, "of counts") for mode, found in times.items()]
    rows += [("ours, reference beam", whole, "of masks: what the others do")]
    certified, optima = per_unit(
        lambda unit: certified_search(unit, concepts, LENGTH, time_limit=args.limit),
        counts,
        args.device,
    )
    below = sum(b.iou < o.iou for b, o in zip(beams["reference"], optima, strict=True))
    proved = sum(o.certified for o in optima)
    note = f"{proved} of {args.units} proved, {below} reference beams below it, slowest {max(certified):.2f}"
    rows.append(("ours, certified optimum", certified, note))

    few = range(min(args.peer_units, args.units))
    slow: list[float] = []
    own = [beams["reference"][u].beam for u in few]
    for name, needed, make in (
        ("run lengths (pycocotools)", "pycocotools", RunLengths),
        ("numpy booleans", "numpy", Booleans),
    ):
        if args.skip and args.skip in name:
            continue
        if importlib.util.find_spec(needed) is None:
            rows.append((name, [], f"not measured: pip install {needed}"))
            continue
        tool: Merger = make()
        prepared = [(tool.encode(mask), tool.encode(~mask)) for mask in masks]
        spent = []
        for u in few:
            seconds, beam = timed(
                lambda u=u, p=prepared, t=tool: merged_search(t, t.encode(units[u]), p)
            )
            mine = [(str(formula), score) for formula, score in own[u]]
            if beam != mine:
                raise SystemExit(f"{name} finds another beam for unit {u}:\n{beam}\n{mine}")
            spent.append(seconds)
        rows.append((name, spent, f"{len(spent)} units, same beams"))
        if needed == "pycocotools":
            slow = spent
    disjoint = concepts.pair_intersections().cpu() == 0
    given = {
        "masks": [torch.from_numpy(mask).view(args.images, -1) for mask in masks],
        "disjoint_info": disjoint,
        "length": LENGTH,
        "device": torch.device("cpu"),
        "cache_dir": None,
    }
    for kind in ("beam", "optimal"):
        name = f"compositional-explanations, {kind}"
        package = peer_package(kind)
        if package is None:
            rows.append((name, [], "not measured: pip install compositional-explanations"))
            continue
        from compositional_explanations import metrics

        spent, gaps = [], []
        for u in few if kind == "beam" else few[: args.optimal_units]:
            with contextlib.redirect_stdout(io.StringIO()):
                unit = tensors[u].view(args.images, -1)
                seconds, formula = timed(lambda unit=unit, p=package: p(bitmaps=unit, **given))
                iou = metrics.compute_iou_from_masks(
                    formula=formula, masks=given["masks"], bitmaps=unit
                )
            spent.append(seconds)
            gaps.append(float(iou) - optima[u].iou)
        note = "IoU minus our optimum"
        if gaps:
            note = f"{len(gaps)} units, {note} {min(gaps):+.4f} to {max(gaps):+.4f}"
        rows.append((name, spent, note))
    print(f"{'engine':36} {'mean s/unit':>12} {'min':>9} {'max':>9} {'x run lengths':>14}")
    for name, spent, note in rows:
        if not spent:
            print(f"{name:36} {'':>12} {'':>9} {'':>9} {'':>14}  {note}")
            continue
        same = min(len(spent), len(slow))
        ratio = f"{sum(slow[:same]) / sum(spent[:same]):14.1f}" if same else f"{'':>14}"
        mean = statistics.mean(spent)
        print(f"{name:36} {mean:12.5f} {min(spent):9.5f} {max(spent):9.5f} {ratio}  {note}")
    ceilings = [iou_ceiling(unit, concepts) for unit in counts]
    print(
        f"mean IoU: beam {statistics.mean(b.iou for b in beams['reference']):.4f}, distinct beam "
        f"{statistics.mean(b.iou for b in beams['distinct']):.4f}, optimum "
        f"{statistics.mean(o.iou for o in optima):.4f}, ceiling {statistics.mean(ceilings):.4f}"
    )


def growth(args: argparse.Namespace) -> None:
    """Seconds per unit over signatures, concepts, length and number of units, up to the size of ADE20k."""
    base = {"signatures": 100_000, "concepts": 500, "length": 3, "units": 8}
    sizes = {
        "signatures": [10_000, 30_000, 100_000, 300_000, 1_200_000],
        "concepts": [100, 300, 500, 1100],
        "length": [1, 2, 3, 5, 10],
        "units": [1, 4, 16, 64],
    }
    curves: dict[str, list[float]] = {}
    print(
        f"base: {base}; 278.6 million positions, {args.device}, {torch.get_num_threads()} thread(s)"
    )
    for name, values in sizes.items():
        curves[name] = []
        for value in values:
            seconds = measured({**base, name: value}, args.device)
            curves[name].append(seconds)
            print(f"{name:11} {value:9d} {seconds:9.4f} s / unit", flush=True)
    ade = {"signatures": 1_200_000, "concepts": 1100, "length": 3, "units": 8}
    print(f"ADE20k size {measured(ade, args.device):9.4f} s / unit")
    if args.figure:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot as plt

        figure, axes = plt.subplots(1, len(sizes), figsize=(3 * len(sizes), 2.8), sharey=True)
        for axis, (name, values) in zip(axes, sizes.items(), strict=True):
            axis.loglog(values, curves[name], "o-")
            axis.set_xlabel(name)
        axes[0].set_ylabel("seconds per unit")
        figure.tight_layout()
        figure.savefig(args.figure, dpi=120)


def measured(setting: dict[str, int], device: str) -> float:
    """Seconds per unit of the distinct beam."""
    signatures = random_signatures(setting["signatures"], setting["concepts"], 278_602_240)
    concepts = ConceptMasks(range(setting["concepts"]), signatures).to(device)
    counts = [planted_counts(concepts, seed) for seed in range(setting["units"])]
    # Warms up; the first unit is then counted anew.
    beam_search(counts[0], concepts, BEAM, 1)
    seconds, _ = timed(
        lambda: [beam_search(unit, concepts, BEAM, setting["length"]) for unit in counts], device
    )
    return seconds / len(counts)


def main() -> None:
    """Prints one of the two tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--concepts", type=int, default=SCENES + COLORS + OBJECTS + PARTS)
    parser.add_argument("--units", type=int, default=64)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--side", type=int, default=28)
    parser.add_argument("--peer-units", type=int, default=4, help="units given to the slow peers")
    parser.add_argument(
        "--optimal-units", type=int, default=1, help="of these, to the package's optimal algorithm"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--limit", type=float, default=60.0, help="seconds for a certified unit")
    parser.add_argument("--skip", default="", help="leave out the peers with this in their name")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--growth", action="store_true")
    parser.add_argument("--figure", default=None, help="where to draw the growth")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    (growth if args.growth else compare)(args)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
