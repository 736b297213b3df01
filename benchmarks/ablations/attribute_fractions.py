"""How much do a few labels cost? StarGAN, StarGAN with balanced batches, and MatchGAN, on shapes of 32 pixels.

Trains every method with every share of the labels and every seed, one after the other, for the same number of batches;
runs that are there already are taken as they are. Prints the table of docs/matchgan.md and draws its picture.

    python benchmarks/ablations/attribute_fractions.py --picture docs/images/matchgan-fractions.png
"""

import argparse
import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

import train

METHODS = {
    "StarGAN": ("configs/stargan/shapes.yaml", []),
    "StarGAN, balanced": ("configs/stargan/shapes.yaml", ["--data.balanced", "true"]),
    "MatchGAN": ("configs/matchgan/shapes.yaml", []),
}
METRICS = {
    "test/attributes/target": "as asked %",
    "test/attributes/kept": "others kept %",
    "test/attributes/error_object": "error, object x100",
    "test/attributes/error_rest": "error, rest x100",
    "test/attributes/reconstruction": "cycle x100",
    "test/attributes/fid": "FID x100",
}
SCALES = {"test/attributes/fid": 100.0}


def results(
    method: str, fraction: str, seed: int, args: argparse.Namespace
) -> dict[str, float] | None:
    """The metrics of a run, which is trained if it is not there and ``--collect`` does not forbid it."""
    config, extra = METHODS[method]
    name = f"{method.lower().replace(', ', '-')}-{fraction.rstrip('%')}-{seed}"
    experiment = Path(config).parent.name + "-shapes"
    path = args.root / experiment / name / "results.json"
    if not path.exists():
        if args.collect:
            return None
        train.main(
            [
                *["fit", "-c", config, "--run.root", str(args.root), "--run.name", name],
                *["--seed_everything", str(seed), "--data.labelled", fraction, *extra],
                *["--data.shapes_train", "3000", "--data.shapes_test", str(args.test_images)],
                *["--model.total_steps", str(args.steps), "--model.steps_per_epoch", "100"],
                *["--model.decay_steps", str(args.steps // 200 * 100)],
                *["--model.ngf", str(args.width), "--model.ndf", str(args.width)],
                *["--trainer.check_val_every_n_epoch", str(args.steps)],
                *["--trainer.enable_progress_bar", "false"],
            ]
        )
    found = json.loads(path.read_text())["metrics"]
    return {name: found[name] * SCALES.get(name, 1.0) for name in METRICS}


def main() -> None:
    """Trains, prints and draws."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--root", type=Path, default=Path("runs/attribute_fractions"))
    parser.add_argument("--fractions", nargs="+", default=["1%", "5%", "20%", "100%"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=1000, help="batches of a run")
    parser.add_argument("--width", type=int, default=8, help="of both networks")
    parser.add_argument("--test_images", type=int, default=150)
    parser.add_argument("--collect", action="store_true", help="train nothing")
    parser.add_argument("--picture", type=Path)
    args = parser.parse_args()
    runs: dict[tuple[str, str], list[dict[str, float]]] = {}
    for seed in args.seeds:
        for fraction in args.fractions:
            for method in METHODS:
                found = results(method, fraction, seed, args)
                if found:
                    runs.setdefault((method, fraction), []).append(found)
    print(f"{'':28}{'runs':>6}" + "".join(f"{head:>22}" for head in METRICS.values()))
    for (method, fraction), several in sorted(
        runs.items(), key=lambda item: args.fractions.index(item[0][1])
    ):
        cells = []
        for metric in METRICS:
            values = np.array([run[metric] for run in several])
            cells.append(f"{values.mean():14.1f} ±{values.std():6.1f}")
        print(f"{method + ', ' + fraction:<28}{len(several):6}" + "".join(cells))
    if args.picture:
        draw(runs, args)


def draw(runs: dict[tuple[str, str], list[dict[str, float]]], args: argparse.Namespace) -> None:
    """A panel for each metric, a line for each method, a dot for each run."""
    shown = list(METRICS.items())[:4]
    figure, axes = plt.subplots(1, len(shown), figsize=(3.4 * len(shown), 3.2))
    for axis, (metric, title) in zip(axes, shown, strict=True):
        for number, method in enumerate(METHODS):
            there = [i for i, f in enumerate(args.fractions) if (method, f) in runs]
            values = [[run[metric] for run in runs[method, args.fractions[i]]] for i in there]
            axis.plot(there, [np.mean(v) for v in values], color=f"C{number}", label=method)
            for i, column in zip(there, values, strict=True):
                axis.scatter([i] * len(column), column, color=f"C{number}", s=12)
        axis.set(title=title, xlabel="labelled images", xticks=range(len(args.fractions)))
        axis.set_xticklabels(args.fractions)
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(args.picture, dpi=110)
    print(f"wrote {args.picture}")


if __name__ == "__main__":
    main()
