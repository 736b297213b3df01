"""OP-GAN: from golden cases to lightning_modules.opgan and the segmentation metric."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from lightning_modules.cyclegan.losses import discriminator_loss
from lightning_modules.metrics.segmentation import mean_iou
from lightning_modules.opgan import OPGAN
from lightning_modules.opgan.losses import (
    content_attention_map,
    content_consistency_loss,
    content_negative_loss,
    domain_accuracy,
    domain_classification_loss,
    opgan_generator_objective,
)
from lightning_modules.opgan.module import DIRECTIONS
from lightning_modules.opgan.networks import SiameseNetwork
from lightning_modules.opgan.pairs import (
    CROSS,
    DOMAIN_A,
    DOMAIN_B,
    SCENARIOS,
    pair_from_draws,
    pair_label,
    patch_grid,
)
from tests.golden_adapters.cyclegan import filled
from tests.scripted import Pairs, fit_one_epoch

Case = dict[str, Any]
Values = dict[str, Any]


def _tensor(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# ------------------------------------------------------------------ pairs
def patches(case: Case) -> Values:
    return {"patches": patch_grid(_tensor(case["inputs"]["x"]), case["inputs"].get("grid", 3))}


def labels(case: Case) -> Values:
    inputs = case["inputs"]
    positions = inputs.get("num_positions", 9)
    found = [pair_label(p, q, positions) for p, q in inputs["pairs"]]
    counted = {
        "D1": (DOMAIN_A, False),
        "D2": (DOMAIN_B, False),
        "C1": (CROSS, True),
        "C2": (CROSS, False),
    }
    return {
        "label": [label for label, _ in found],
        "is_c1": [same for _, same in found],
        "counts": {name: found.count(kind) for name, kind in counted.items()},
    }


def drawn_pairs(case: Case) -> Values:
    positions = case["inputs"].get("num_positions", 9)
    found = [
        pair_from_draws(scenario, u, v, positions) for scenario, u, v in case["inputs"]["draws"]
    ]
    return {"pairs": found}


# ------------------------------------------------------------------ losses
def consistency(case: Case) -> Values:
    inputs = case["inputs"]
    p_b = _tensor(inputs["p_b"]).requires_grad_()
    flags = torch.tensor(inputs["same_position"])
    loss = content_consistency_loss(_tensor(inputs["p_a"]), p_b, flags)
    (gradient,) = torch.autograd.grad(loss, p_b)
    return {"loss": loss, "grad_p_b": gradient}


def negative(case: Case) -> Values:
    inputs = case["inputs"]
    p_a, p_b = _tensor(inputs["p_a"]), _tensor(inputs["p_b"])
    each = zip(p_a.split(1), p_b.split(1), strict=True)
    return {
        "loss": content_negative_loss(p_a, p_b, inputs["margin"]),
        "per_pair": [content_negative_loss(a, b, inputs["margin"]) for a, b in each],
    }


def classification(case: Case) -> Values:
    logits = _tensor(case["inputs"]["logits"]).requires_grad_()
    classes = torch.tensor(case["inputs"]["labels"])
    loss = domain_classification_loss(logits, classes)
    (gradient,) = torch.autograd.grad(loss, logits)
    return {"loss": loss, "grad_logits": gradient, "accuracy": domain_accuracy(logits, classes)}


def attention(case: Case) -> Values:
    inputs = case["inputs"]
    c, weight, bias = (_tensor(inputs[name]) for name in ("c", "weight", "bias"))
    size = tuple(inputs["size"])
    return {norm: content_attention_map(c, weight, bias, size, norm) for norm in case["expected"]}


def objective(case: Case) -> Values:
    terms: dict[str, Any] = {name: _tensor(value) for name, value in case["inputs"].items()}
    return {"loss": opgan_generator_objective(**terms)}


def discriminator(case: Case) -> Values:
    real, fake = (_tensor(case["inputs"][name]) for name in ("pred_real", "pred_fake"))
    return {
        "paper": discriminator_loss(real, fake, factor=1.0),
        "default": discriminator_loss(real, fake),
    }


# ------------------------------------------------------------------ networks
def _count(parameters: Iterable[Tensor]) -> int:
    return sum(parameter.numel() for parameter in parameters)


@torch.no_grad()
def siamese_sizes(case: Case) -> Values:
    options = dict(case["inputs"])
    sizes = options.pop("patch_sizes")
    network = SiameseNetwork(**options)
    shapes = []
    for size in sizes:
        patch = torch.zeros(1, 3, size, size)
        shapes.append(torch.cat(network.encode(patch), 1).shape[1:3])
        logits = network(patch, patch)[2]
    return {
        "encoder": _count(network.encoder.parameters()),
        "content_head": _count(network.content_head.parameters()),
        "domain_head": _count(network.domain_head.parameters()),
        "total": _count(network.parameters()),
        "encoder_out": shapes,
        "num_classes": logits.shape[1],
    }


def siamese_forward(case: Case) -> Values:
    options = {"width": 2, **case["inputs"]}
    p, q = (_tensor(options.pop(name)) for name in ("p", "q"))
    network = SiameseNetwork(in_channels=p.shape[1], **options).double()
    filled(network)
    map_p, map_q, logits = network(p, q)
    return {"map_p": map_p, "map_q": map_q, "logits": logits}


# ------------------------------------------------------------------ segmentation
def segmentation(case: Case) -> Values:
    inputs = dict(case["inputs"])
    frames, preds = (torch.tensor(inputs.pop(name)) for name in ("labels", "preds"))
    found = mean_iou(frames, preds, **inputs)
    iou = [None if math.isnan(value) else value for value in found["iou"].tolist()]
    return {**found, "iou": iou}


# ------------------------------------------------------------------ training
class _ScriptedPairs(OPGAN):
    """Takes the positions of the patches from a case."""

    def __init__(self, draws: list[Any], **arguments: Any) -> None:
        super().__init__(**arguments)
        self.draws = draws
        self.steps: list[Values] = []

    def draw_pairs(self, way: str, rows: int) -> Tensor:
        drawn = self.draws[len(self.steps)][list(DIRECTIONS).index(way)]
        return torch.tensor(
            [
                (0, *pair_from_draws(name, *draw))
                for name, draw in zip(SCENARIOS, drawn, strict=True)
            ]
        )

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_end(outputs, batch, batch_idx)
        found, hp = self.losses, self.hp
        step = {f"adv_{way}": found[f"adversarial_{way}"] for way in DIRECTIONS}
        step["cyc"] = (found["cycle_a"] + found["cycle_b"]) / hp.alpha
        for way in DIRECTIONS:
            step[f"cc_{way}"] = found[f"content_{way}"] / hp.beta
            step[f"dc_{way}"] = found[f"domain_{way}"] / hp.beta
            step[f"loss_d_{way[1]}"] = found[f"discriminator_{way[1]}"]
        terms = {name: step[name] for name in ("adv_ab", "adv_ba", "cyc")}
        terms |= {name: step[name] for name in ("cc_ab", "dc_ab", "cc_ba", "dc_ba")}
        step["loss_g"] = opgan_generator_objective(**terms, alpha=hp.alpha, beta=hp.beta)
        step["loss_s"] = found["siamese_content"] + found["siamese_domain"]
        self.steps.append(step)


def training_steps(case: Case) -> Values:
    inputs = case["inputs"]
    a, b = _tensor(inputs["real_A"]), _tensor(inputs["real_B"])
    module = _ScriptedPairs(
        inputs["draws"],
        generator="resnet_6blocks",
        ngf=2,
        ndf=2,
        n_layers=2,
        siamese_width=2,
        pool_size=0,
        n_epochs=1,
        n_epochs_decay=0,
        **{key: inputs[key] for key in ("lr", "alpha", "beta")},
    )
    networks = ("generator_ab", "generator_ba", "discriminator_b", "discriminator_a", "siamese")
    for place, name in enumerate(networks):
        filled(getattr(module, name), 0.5 * place)
    fit_one_epoch(module.double(), Pairs((a + 1) / 2, (b + 1) / 2), 1)
    with torch.no_grad():
        p, q = (patch_grid(images[:1])[:, 0] for images in (a, b))
        map_p, _, logits = module.siamese(p, q)
        translated = module.translate_raw(a[:1], "AtoB")[..., ::4, ::4]
    return {
        "losses": module.steps,
        "fake_B_after_strided": translated,
        "map_p_after": map_p,
        "logits_after": logits,
    }


ADAPTERS: dict[str, Callable[[Case], Values]] = {
    "patch_grid": patches,
    "pair_labels": labels,
    "pair_from_draws": drawn_pairs,
    "content_consistency_loss": consistency,
    "content_consistency_loss_no": consistency,
    "domain_classification_loss": classification,
    "content_attention_map": attention,
    "content_negative_loss": negative,
    "generator_objective": objective,
    "adversarial_loss_d": discriminator,
    "siamese_network": siamese_sizes,
    "siamese_forward": siamese_forward,
    "mean_iou": segmentation,
    "training_steps": training_steps,
}
