"""Latent search against a straightforward loop that differentiates every network as well.

The peer of the same run is what one writes first: ``loss.backward()`` with the gradients of all
parameters enabled, which are never used. Both make the same steps on the same networks.

    python benchmarks/osrci_search.py --iterations 100 --batch 64 --width 64
"""

import argparse
import copy
import time
from collections.abc import Callable

import torch
from common.steps import synchronize
from torch import Tensor, nn

from lightning_modules.osrci.counterfactual import counterfactual_search, search_copy
from lightning_modules.osrci.losses import clamp_to_unit_sphere, sample_latent
from lightning_modules.osrci.networks import Classifier32, Generator32


def straightforward_search(
    z0: Tensor, generator: nn.Module, classifier: nn.Module, iterations: int, scale: int
) -> tuple[Tensor, Tensor]:
    z = z0.clone()
    for _ in range(iterations):
        z = z.detach().requires_grad_(True)
        logits = classifier(generator(z))
        unknown = torch.cat([logits, torch.zeros_like(logits[:, :1])], 1).logsumexp(1)
        loss = (unknown + (z - z0).square().sum(1)).sum()
        generator.zero_grad()
        classifier.zero_grad()
        loss.backward()
        assert z.grad is not None
        z = clamp_to_unit_sphere(z.detach() - 0.1 * z.grad, scale**2)
    with torch.no_grad():
        return z, generator(z)


def seconds(work: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--iterations", type=int, default=100)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--classes", type=int, default=6)
    parser.add_argument("--latent-size", type=int, default=64)
    parser.add_argument("--scale", type=int, default=4)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--repeats", type=int, default=1, help="the fastest of each counts")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)

    torch.manual_seed(0)
    generator = Generator32(args.latent_size, scales=(args.scale,), width=args.width)
    classifier = Classifier32(args.classes, width=args.width)
    generator.eval().to(device)
    classifier.eval().to(device)
    z0 = sample_latent(args.batch, args.latent_size, args.scale).to(device)

    results: dict[str, tuple[Tensor, Tensor]] = {}

    def peer(iterations: int = args.iterations) -> None:
        networks = (copy.deepcopy(generator), copy.deepcopy(classifier))
        results["peer"] = straightforward_search(z0, *networks, iterations, args.scale)

    def ours(iterations: int = args.iterations) -> None:
        found = counterfactual_search(z0, generator, classifier, steps=iterations, scale=args.scale)
        results["same networks"] = (found.z, found.images)

    def folded(iterations: int = args.iterations) -> None:
        found = counterfactual_search(
            z0,
            search_copy(generator),
            search_copy(classifier),
            steps=iterations,
            scale=args.scale,
        )
        results["search copies"] = (found.z, found.images)

    runs = {"peer": peer, "same networks": ours, "search copies": folded}
    for run in runs.values():
        run(2)
    times = dict.fromkeys(runs, float("inf"))
    for _ in range(args.repeats):  # in turns, so that a busy machine is unfair to none
        for name, run in runs.items():
            times[name] = min(times[name], seconds(run, device))
    print(
        f"batch {args.batch}, {args.iterations} iterations, width {args.width}, "
        f"{torch.get_num_threads()} threads, {device}"
    )
    for name, taken in times.items():
        apart = max(
            (mine - theirs).abs().max().item()
            for mine, theirs in zip(results[name], results["peer"], strict=True)
        )
        print(
            f"{name:14} {taken:8.2f} s  ratio {times['peer'] / taken:5.2f}  "
            f"largest difference of latents and images {apart:.1e}"
        )


if __name__ == "__main__":
    main()
