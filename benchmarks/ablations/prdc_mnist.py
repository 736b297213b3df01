"""What density and coverage say on real digits: equal sets, a dropped class, noise, copies.

    python benchmarks/ablations/prdc_mnist.py --root DIR [--count 10000]

DIR holds ``MNIST/raw``. Real: some training images; fake: other ones, changed as each row says. Two embeddings, k = 5.
"""

import argparse
import time

import torch
from torch import Tensor

from datamodules.sources import load_source
from lightning_modules.metrics.features import feature_extractor
from lightning_modules.metrics.prdc import NAMES, expected_coverage, prdc

K = 5


def features_of(images: Tensor, extractor: torch.nn.Module) -> Tensor:
    """Features [N, D] of uint8 images."""
    return torch.cat([extractor(part.float() / 255) for part in images.split(256)])


def noisy(images: Tensor, scale: float) -> Tensor:
    """Gaussian noise of this standard deviation, in grey levels."""
    noise = torch.randn(images[:, :1].shape, generator=torch.Generator().manual_seed(1)) * scale
    return (images + noise).round().clamp(0, 255).byte()


def main() -> None:
    """Prints a table per embedding."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", required=True)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--embeddings", nargs="*", default=["pixels", "random_vgg16"])
    args = parser.parse_args()
    train, test = (load_source("mnist", args.root, half, 32) for half in (True, False))
    count = args.count
    chosen = torch.randperm(len(train.labels), generator=torch.Generator().manual_seed(0))
    reals = train.images[chosen[:count]]
    fakes, labels = train.images[chosen[count:]], train.labels[chosen[count:]]
    without = fakes[labels != 3][:count]
    sets = {
        "other training images": fakes[:count],
        "test images": test.images[:count],
        "without the class 3": without,
        "only the class 3": fakes[labels == 3][:count],
        "noise of 8 grey levels": noisy(fakes[:count], 8),
        "noise of 24 grey levels": noisy(fakes[:count], 24),
        "copies of the real images": reals,
    }
    for name in args.embeddings:
        extractor = feature_extractor(name)
        print(f"\n{name}: {extractor.description}; k = {K}, N = {len(reals)}")
        start = time.perf_counter()
        embedded = features_of(reals, extractor)
        for title, images in sets.items():
            values = prdc(embedded, features_of(images, extractor), K, standard_errors=True)
            cells = [f"{n} {values[n]:.4f} ± {values[f'{n}_se']:.4f}" for n in NAMES]
            expected = expected_coverage(len(reals), len(images), K)
            print(
                f"{title:<27}M {len(images):<6}{'  '.join(cells)}  (coverage of equals {expected:.4f})"
            )
        print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
