"""PRDC against the authors' package ``prdc``: time and additional memory on one core, and how the cost grows.

    python benchmarks/prdc.py [--sizes 2000 5000 10000] [--large 20000] [--dim 64]

Every measurement is one call in a process of its own, pinned to one core with one thread, after a call with 100 points;
the median of several. The package gets the same float32 features; its numbers must be equal to ours. Sizes above
10,000 are ours alone: the package would need several times N x M x 8 bytes.
"""

import argparse
import contextlib
import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path

K = 5


def peak_mib() -> float:
    """Highest resident memory since the last reset."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("no VmHWM in /proc/self/status")


def measure(who: str, size: int, dim: int) -> None:
    """Prints the seconds of one call, additional MiB and the values, as JSON."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    import torch

    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    real, fake = (torch.randn(size, dim, generator=generator) for _ in range(2))
    if who == "ours":
        from lightning_modules.metrics.prdc import prdc

        def run(rows: int) -> dict[str, float]:
            values = prdc(real[:rows], fake[:rows], K)
            return {name: float(value) for name, value in values.items()}
    else:
        sys.path.remove(str(Path(__file__).parent))  # this file has the package's name
        from prdc import compute_prdc

        def run(rows: int) -> dict[str, float]:
            with contextlib.redirect_stdout(io.StringIO()):
                values = compute_prdc(real[:rows].numpy(), fake[:rows].numpy(), K)
            return {name: float(value) for name, value in values.items()}

    run(100)
    Path("/proc/self/clear_refs").write_text("5")
    before = peak_mib()
    start = time.perf_counter()
    values = run(size)
    seconds = time.perf_counter() - start
    print(json.dumps({"s": seconds, "mib": peak_mib() - before, "values": values}))


def measured(size: int, dim: int, repeats: int, *who: str) -> list[dict]:
    """The median of several runs of :func:`measure`, in turns, each in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    found: dict[str, list[dict]] = {name: [] for name in who}
    for _ in range(repeats):
        for name in who:
            command = [sys.executable, __file__, "--measure", name, str(size), str(dim)]
            done = subprocess.run(
                command, capture_output=True, text=True, env=environment, check=True
            )
            found[name].append(json.loads(done.stdout.splitlines()[-1]))
    return [sorted(runs, key=lambda run: run["s"])[repeats // 2] for runs in found.values()]


def main() -> None:
    """Prints one line per size."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--sizes", type=int, nargs="*", default=[2000, 5000, 10000])
    parser.add_argument("--large", type=int, nargs="*", default=[20000])
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        who, *numbers = arguments.measure
        measure(who, *map(int, numbers))
        return
    print(
        f"precision, recall, density, coverage; N = M, {arguments.dim} dimensions, k = {K}, one core"
    )
    print(
        f"{'N':>6} {'ours s':>8} {'package s':>10} {'ratio':>6} {'ours MiB':>9} {'package MiB':>12} {'ratio':>6}"
    )
    for size in arguments.sizes:
        ours, theirs = measured(size, arguments.dim, arguments.repeats, "ours", "package")
        for name, value in theirs["values"].items():
            if abs(value - ours["values"][name]) > 1e-12:
                raise SystemExit(
                    f"{name} differs at N = {size}: {ours['values'][name]} and {value}"
                )
        print(
            f"{size:6d} {ours['s']:8.3f} {theirs['s']:10.3f} {theirs['s'] / ours['s']:6.1f} "
            f"{ours['mib']:9.0f} {theirs['mib']:12.0f} {theirs['mib'] / ours['mib']:6.1f}"
        )
    for size in arguments.large:
        (ours,) = measured(size, arguments.dim, 1, "ours")
        print(f"{size:6d} {ours['s']:8.3f} {'':>10} {'':>6} {ours['mib']:9.0f}")


if __name__ == "__main__":
    main()
