"""An update of OGNet's phase two against the way of the released code.

The released code neither detaches the reconstructions nor freezes the generators, so every update of the discriminator
also differentiates five generator passes. The peer does that, in the same run, on the same images; the resulting
discriminators must be equal.

    python benchmarks/ognet_phase_two.py --width 16 --size 28 --batch 64 --updates 5
"""

import argparse
import copy
import time
from collections.abc import Callable

import torch
from common.steps import synchronize
from torch import Tensor, nn
from torch.optim import Adam

from lightning_modules.nn.ema import AveragedNetwork
from lightning_modules.ognet.networks import OGNetDiscriminator, OGNetGenerator
from lightning_modules.ognet.phase_two import (
    PhaseTwoBatch,
    Reconstructor,
    draw_pairs,
    phase_two_terms,
)

ALPHA, BETA = 0.1, 0.001


def main() -> None:
    """Prints seconds per update and their ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--size", type=int, default=28)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--updates", type=int, default=5)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    device = torch.device(args.device)
    generator, early = (OGNetGenerator(1, args.width).to(device).eval() for _ in range(2))
    old = AveragedNetwork(early)
    start = OGNetDiscriminator(1, args.size, args.width).to(device)
    images = torch.rand(args.images, 1, args.size, args.size, device=device) * 2 - 1

    def released(x: Tensor, a: Tensor, b: Tensor) -> PhaseTwoBatch:
        real = images[x]
        low = early(real)
        recon = generator(real)
        pseudo = generator((early(images[a]) + early(images[b])) / 2)
        return PhaseTwoBatch(real, recon, low, pseudo)

    def train(make: Callable[[Tensor, Tensor, Tensor], PhaseTwoBatch]) -> tuple[float, nn.Module]:
        discriminator = copy.deepcopy(start)
        optimizer = Adam(discriminator.parameters(), lr=5e-5)
        began = 0.0
        for step in range(args.updates + 1):
            if step == 1:  # the first one warms up
                synchronize(device)
                began = time.perf_counter()
            x, _ = draw_pairs(args.images, args.batch, "separate", torch.empty(0), step, "x")
            a, b = draw_pairs(args.images, args.batch, "separate", x, step)
            optimizer.zero_grad()
            phase_two_terms(discriminator, make(x, a, b), ALPHA, BETA)["total"].backward()
            optimizer.step()
        synchronize(device)
        return (time.perf_counter() - began) / args.updates, discriminator

    theirs, peer = train(released)
    ours, tuned = train(Reconstructor(generator, old, images.__getitem__, args.images).batch)
    began = time.perf_counter()
    cached = Reconstructor(generator, old, images.__getitem__, args.images, precompute=True)
    synchronize(device)
    once = time.perf_counter() - began
    fast, again = train(cached.batch)
    for name, value in peer.state_dict().items():
        for other in (tuned, again):
            torch.testing.assert_close(other.state_dict()[name], value, rtol=1e-3, atol=1e-5)
    print(
        f"width {args.width}, {args.size} px, batch {args.batch}, {device}, {torch.get_num_threads()} threads, "
        f"seconds per update"
    )
    print(f"released code's way        {theirs:8.3f}")
    print(f"ours                       {ours:8.3f}   {theirs / ours:5.2f}x")
    print(
        f"ours, precomputed          {fast:8.3f}   {theirs / fast:5.2f}x, after {once:.2f} s for {args.images} images"
    )


if __name__ == "__main__":
    main()
