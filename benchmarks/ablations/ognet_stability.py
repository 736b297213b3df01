"""Stability of OGNet's score over several runs: the table and the picture of docs/ognet.md.

    for d in 0 8; do for s in 0 1 2; do
      python train.py fit -c configs/ognet/mnist_cpu.yaml --data.root DIR --data.normal "[\\"$d\\"]" \\
        --seed_everything $s --run.name d$d-s$s
    done; done
    python benchmarks/ablations/ognet_stability.py runs/ognet-mnist_cpu/d* --picture stability.png
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

ROWS = {"phase_one": "phase one, D(G(x))", "ognet": "OGNet, D(G(x))"}


def main() -> None:
    """Prints a line for each run, and draws them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--picture", type=Path)
    args = parser.parse_args()
    figure, axes = plt.subplots(1, len(args.runs), figsize=(2.4 * len(args.runs), 2.6), sharey=True)
    print(f"{'run':<12}" + "".join(f"{name + ' mean':>18}{name + ' swing':>18}" for name in ROWS))
    swings = []
    for axis, run in zip(np.atleast_1d(axes), args.runs, strict=True):
        table = np.genfromtxt(run / "tables" / "stability.csv", delimiter=",", names=True)
        cells = [(table[name].mean(), np.ptp(table[name])) for name in ROWS]
        swings.append([swing for _, swing in cells])
        print(f"{run.name:<12}" + "".join(f"{mean:18.3f}{swing:18.3f}" for mean, swing in cells))
        for name, title in ROWS.items():
            axis.plot(table["epoch"], table[name], marker="o", ms=3, label=title)
        axis.axhline(0.5, color="grey", lw=0.5)
        axis.set(title=run.name, xlabel="epoch", ylim=(0, 1.02))
    mean = np.mean(swings, axis=0)
    print(f"mean swing {mean[0]:.3f} and {mean[1]:.3f}: ratio {mean[1] / mean[0]:.2f}")
    np.atleast_1d(axes)[0].set_ylabel("AUC on the test set")
    np.atleast_1d(axes)[0].legend(fontsize=7, loc="lower left")
    if args.picture:
        figure.savefig(args.picture, dpi=110, bbox_inches="tight")
        print(f"wrote {args.picture}")


if __name__ == "__main__":
    main()
