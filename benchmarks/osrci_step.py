"""Phase-one step of OSRCI through the Trainer against a plain PyTorch loop with the same four updates.

Same networks, batches, optimizers and order in both; the peer is what one would write by hand. Prints seconds per step
of each and their ratio (ours / plain; 1.05 is the limit at the paper's size).

    python benchmarks/osrci_step.py --width 64 --batch 64 --steps 6
"""

import argparse
import statistics
import time
import warnings

import torch
import torch.nn.functional as F
from common.steps import between, seconds_under_trainer, synchronize
from torch import Tensor
from torch.optim import Adam

from lightning_modules.osrci import OSRCIModule


def ours(
    batches: list[dict[str, Tensor]], args: argparse.Namespace, device: torch.device
) -> list[float]:
    torch.manual_seed(0)
    module = OSRCIModule(width=args.width, gopenmax=False, joint_epochs=2)
    return seconds_under_trainer(module, batches, device)


def plain(
    batches: list[dict[str, Tensor]], args: argparse.Namespace, device: torch.device
) -> list[float]:
    torch.manual_seed(0)
    networks = OSRCIModule(width=args.width, gopenmax=False).to(device)
    encoder, generator = networks.encoder, networks.generator
    discriminator, classifier = networks.discriminator, networks.classifier
    optimizer = {
        network: Adam(network.parameters(), lr=1e-4, betas=(0.5, 0.999))
        for network in (encoder, generator, discriminator, classifier)
    }
    stamps: list[float] = []
    for batch in batches:
        images, labels = batch["image"].to(device), batch["label"].to(device)

        noise = torch.randn(len(images), 64 * 16, device=device)
        noise = F.normalize(noise.view(-1, 16, 64), dim=2).flatten(1)
        optimizer[discriminator].zero_grad()
        fake = generator(noise).detach()
        loss_fake = F.softplus(discriminator(fake)[:, 0]).mean()
        loss_real = 0.01 * F.softplus(-discriminator(images)[:, 0]).mean()
        alpha = torch.rand(len(images), 1, 1, 1, device=device)
        mixed = (alpha * images + (1 - alpha) * fake).requires_grad_(True)
        (slope,) = torch.autograd.grad(discriminator(mixed).sum(), mixed, create_graph=True)
        penalty = 10 * (slope.norm(dim=1) - 1).square().mean()
        (loss_fake + loss_real + penalty).backward()
        optimizer[discriminator].step()

        optimizer[generator].zero_grad()
        code = encoder(images).detach()
        (-0.01 * discriminator(generator(code))[:, 0].mean()).backward()
        optimizer[generator].step()

        optimizer[encoder].zero_grad()
        optimizer[generator].zero_grad()
        (images - generator(encoder(images))).abs().mean().backward()
        optimizer[encoder].step()
        optimizer[generator].step()

        optimizer[classifier].zero_grad()
        sign = 2.0 * F.one_hot(labels, 6) - 1
        F.softplus(-sign * classifier(images)).mean().backward()
        optimizer[classifier].step()
        synchronize(device)
        stamps.append(time.perf_counter())
    return between(stamps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument(
        "--steps", type=int, default=6, help="timed steps of each side in each repeat"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore")
    device = torch.device(args.device)
    generator = torch.Generator().manual_seed(0)
    batches = [
        {
            "image": torch.rand(args.batch, 3, 32, 32, generator=generator),
            "label": torch.randint(6, (args.batch,), generator=generator),
        }
        for _ in range(args.steps + 1)
    ]
    lightning, loop = [], []
    for _ in range(args.repeats):  # taking turns, so that a slow minute of the machine hits both
        loop += plain(batches, args, device)
        lightning += ours(batches, args, device)
    a, b = statistics.median(lightning), statistics.median(loop)
    print(
        f"OSRCI joint step, width {args.width}, batch {args.batch}, {args.device}, {args.threads} threads, "
        f"median of {len(loop)} steps: ours {a:.4f} s, plain loop {b:.4f} s, ratio {a / b:.3f}"
    )


if __name__ == "__main__":
    main()
