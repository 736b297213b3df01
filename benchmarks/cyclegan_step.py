"""A CycleGAN step through the Trainer against plain PyTorch loops, time and peak memory, each in a process of its own.

Same networks, images, losses and optimizers in all:

* ours: the module under the Trainer,
* plain: what one would write by hand, with the discriminators frozen in the generators' step,
* careless: the same without freezing, so that the generators' step also computes gradients of the discriminators.

Prints seconds per step and peak memory of each and the ratios (ours / plain; 1.05 is the limit at the paper's size).

    python benchmarks/cyclegan_step.py --ngf 64 --size 128 --steps 4
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
import warnings
from typing import Any

import torch
from common.steps import between, seconds_under_trainer, synchronize
from torch import Tensor
from torch.optim import Adam

from lightning_modules.cyclegan import CycleGAN

WAYS = ("ours", "plain", "careless")


def build(args: argparse.Namespace) -> CycleGAN:
    torch.manual_seed(0)
    return CycleGAN(
        generator=args.generator, ngf=args.ngf, ndf=args.ngf, n_epochs=1, n_epochs_decay=0
    )


def loop(
    batches: list[Any], args: argparse.Namespace, device: torch.device, freeze: bool
) -> list[float]:
    networks = build(args).to(device)
    ab, ba = networks.generator_ab, networks.generator_ba
    judge_a, judge_b = networks.discriminator_a, networks.discriminator_b
    of_g = Adam([*ab.parameters(), *ba.parameters()], lr=2e-4, betas=(0.5, 0.999))
    judges = [*judge_a.parameters(), *judge_b.parameters()]
    of_d = Adam(judges, lr=2e-4, betas=(0.5, 0.999))
    pools: tuple[list[Tensor], list[Tensor]] = ([], [])
    stamps = []
    for batch in batches:
        a, b = (batch[side]["image"].to(device) * 2 - 1 for side in ("a", "b"))
        for parameter in judges:
            parameter.requires_grad_(not freeze)
        of_g.zero_grad()
        fake_b, fake_a = ab(a), ba(b)
        loss = (judge_b(fake_b) - 1).square().mean() + (judge_a(fake_a) - 1).square().mean()
        loss = loss + 10 * ((ba(fake_b) - a).abs().mean() + (ab(fake_a) - b).abs().mean())
        loss = loss + 5 * ((ab(b) - b).abs().mean() + (ba(a) - a).abs().mean())
        loss.backward()
        of_g.step()
        for parameter in judges:
            parameter.requires_grad_(True)
        of_d.zero_grad()
        loss = torch.zeros((), device=device)
        for judge, real, fake, pool in zip(
            (judge_b, judge_a), (b, a), (fake_b, fake_a), pools, strict=True
        ):
            pool.append(fake.detach())
            loss = loss + 0.5 * (judge(real) - 1).square().mean()
            loss = loss + 0.5 * judge(pool[-1]).square().mean()
        loss.backward()
        of_d.step()
        synchronize(device)
        stamps.append(time.perf_counter())
    return between(stamps)


def measure(way: str, args: argparse.Namespace) -> None:
    """Prints what one way takes, as JSON."""
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore")
    device = torch.device(args.device)
    generator = torch.Generator().manual_seed(0)
    shape = (args.batch, 3, args.size, args.size)
    batches = [
        {side: {"image": torch.rand(shape, generator=generator)} for side in ("a", "b")}
        for _ in range(args.steps + 1)
    ]
    if way == "ours":
        seconds = seconds_under_trainer(build(args), batches, device)
    else:
        seconds = loop(batches, args, device, freeze=way == "plain")
    if device.type == "cuda":
        memory = torch.cuda.max_memory_allocated(device) / 2**20
    else:
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    print(json.dumps({"seconds": seconds, "memory": memory}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--generator", default="resnet_6blocks")
    parser.add_argument("--ngf", type=int, default=64, help="width of all networks")
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=4, help="timed steps of each in each repeat")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--measure", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        measure(args.measure, args)
        return
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    memory: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(args.repeats):  # taking turns, so that a slow minute of the machine hits all
        for way in WAYS:
            command = [sys.executable, *sys.argv, "--measure", way]
            printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            found = json.loads(printed.splitlines()[-1])
            seconds[way] += found["seconds"]
            memory[way].append(found["memory"])
    print(
        f"CycleGAN step, {args.generator}, width {args.ngf}, {args.size} px, batch {args.batch}, {args.device}, "
        f"{args.threads} threads, median of {len(seconds['ours'])} steps"
    )
    time_of = {way: statistics.median(seconds[way]) for way in WAYS}
    peak_of = {way: statistics.median(memory[way]) for way in WAYS}
    for way in WAYS:
        ratios = f"ours / {way}: time {time_of['ours'] / time_of[way]:.3f}, memory {peak_of['ours'] / peak_of[way]:.3f}"
        print(
            f"{way:<10}{time_of[way]:8.4f} s{peak_of[way]:8.0f} MiB   {'' if way == 'ours' else ratios}"
        )


if __name__ == "__main__":
    main()
