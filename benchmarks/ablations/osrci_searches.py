"""Which latent search makes the better open set? The K+1 phase again, on the joint networks of finished runs.

For every checkpoint and every search: synthesise, fine-tune a copy of the classifier, print the margin AUROC on the
test set after 10, 30, 60 and 120 steps, and the mean P(unknown) the search reached.

    python benchmarks/ablations/osrci_searches.py runs/osrci-digits/sweep-split*/checkpoints/last.ckpt
"""

import argparse
import copy

import torch
from torch import Tensor
from torch.optim import Adam

from datamodules import OpenSetDataModule
from lightning_modules.metrics.open_set import open_set_metrics
from lightning_modules.osrci import OSRCIModule
from lightning_modules.osrci.losses import kplusone_loss, open_set_score

EVAL = {"variant": "paper", "search_mode": "eval"}
SEARCHES = {
    "paper, eval, distance 1, 0.03 x 40": {
        **EVAL,
        "distance_weight": 1.0,
        "search_speed": 0.03,
        "search_steps": 40,
    },
    "paper, eval, distance 1, 0.1 x 30": {
        **EVAL,
        "distance_weight": 1.0,
        "search_speed": 0.1,
        "search_steps": 30,
    },
    "paper, eval, distance 0.1, 0.03 x 40": {
        **EVAL,
        "distance_weight": 0.1,
        "search_speed": 0.03,
        "search_steps": 40,
    },
    "paper, eval, distance 0, 0.1 x 100": {
        **EVAL,
        "distance_weight": 0.0,
        "search_speed": 0.1,
        "search_steps": 100,
    },
    "released code, 0.1 x 30": {
        "variant": "reference",
        "search_mode": None,
        "search_speed": 0.1,
        "search_steps": 30,
    },
    "released code, 0.1 x 100": {
        "variant": "reference",
        "search_mode": None,
        "search_speed": 0.1,
        "search_steps": 100,
    },
    "paper, train, distance 0, 0.1 x 100": {
        "variant": "paper",
        "search_mode": "train",
        "distance_weight": 0.0,
        "search_speed": 0.1,
        "search_steps": 100,
    },
}
CHECKPOINTS_AT = (10, 30, 60, 120)


def margin_auroc(classifier: torch.nn.Module, images: Tensor, labels: Tensor) -> float:
    classifier.eval()
    with torch.no_grad():
        scores = open_set_score(classifier(images))
    classifier.train()
    return 100 * open_set_metrics(scores[labels >= 0], scores[labels < 0])["auroc"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoints", nargs="+")
    parser.add_argument("--root", default="data", help="folder of the data, as --data.root")
    parser.add_argument("--images", type=int, default=384)
    parser.add_argument("--batch", type=int, default=64)
    args = parser.parse_args()
    for name, options in SEARCHES.items():
        for path in args.checkpoints:
            module = OSRCIModule.load_from_checkpoint(path, map_location="cpu")
            stored = torch.load(path, weights_only=True)["OpenSetDataModule"]
            data = OpenSetDataModule(
                stored["dataset"], args.root, protocol=stored["protocol"], split=stored["index"]
            )
            data.setup("fit")
            data.setup("test")
            assert data.train is not None
            assert data.test is not None
            bank, test = data.train, data.test.batch(torch.arange(len(data.test)))
            module.hparams.update(options)
            made = [
                module._counterfactuals(bank, chunk)
                for chunk in module.synthesis_chunks(range(args.images))
            ]
            open_set = torch.cat([chunk["images"] for chunk in made]).float() / 255
            reached = torch.cat([chunk["confidence"] for chunk in made]).mean()
            classifier = copy.deepcopy(module.classifier).train()
            optimizer = Adam(classifier.parameters(), lr=1e-4, betas=(0.5, 0.999))
            torch.manual_seed(0)
            aurocs = []
            for step in range(1, max(CHECKPOINTS_AT) + 1):
                known = bank.batch(torch.randint(len(bank), (args.batch,)))
                unknown = open_set[torch.randint(len(open_set), (args.batch,))]
                loss = kplusone_loss(
                    classifier(known["image"]), known["label"], classifier(unknown)
                )["total"]
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                if step in CHECKPOINTS_AT:
                    aurocs.append(f"{margin_auroc(classifier, test['image'], test['label']):.1f}")
            print(
                f"{name:38} split {stored['index']}  P {reached:.2f}  AUROC {' '.join(aurocs)}",
                flush=True,
            )


if __name__ == "__main__":
    main()
