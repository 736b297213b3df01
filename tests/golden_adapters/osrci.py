"""OSRCI: from golden cases to lightning_modules.osrci, its metrics and its data splits."""

import inspect
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer

from datamodules.open_set import OpenSetDataModule
from datamodules.open_set_splits import osr_split
from lightning_modules.metrics.open_set import open_set_metrics
from lightning_modules.osrci import KPlusOneClassifierModule, OSRCIModule
from lightning_modules.osrci.counterfactual import (
    counterfactual_search,
    interpolated_open_set_candidates,
)
from lightning_modules.osrci.losses import (
    augment_logits,
    clamp_to_unit_sphere,
    discriminator_loss,
    generator_adversarial_loss,
    gradient_penalty,
    kplusone_loss,
    normalize_latent,
    one_vs_rest_softplus_loss,
    open_set_score,
    plus_minus_one_targets,
    reconstruction_loss,
)
from lightning_modules.osrci.module import PRESETS
from lightning_modules.osrci.networks import (
    SCALES,
    Classifier32,
    Discriminator32,
    Encoder32,
    Generator32,
)
from lightning_modules.osrci.openmax import (
    OpenMax,
    openmax_recalibrate,
    openmax_reference_score,
)
from tests.scripted import Rows, fit_one_epoch

Case = dict[str, Any]
Values = dict[str, Any]


def _tensor(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _leaf(values: Any) -> Tensor:
    return _tensor(values).requires_grad_()


def _options(inputs: Case, *names: str) -> Case:
    """Those of the named inputs that the case has."""
    return {name: inputs[name] for name in names if name in inputs}


# ------------------------------------------------------------------ losses and scores
def clamp(case: Case) -> Values:
    inputs = case["inputs"]
    return {"y": clamp_to_unit_sphere(_tensor(inputs["x"]), inputs["components"])}


def latent_noise(case: Case) -> Values:
    inputs = case["inputs"]
    return {"z": normalize_latent(_tensor(inputs["gaussian"]), inputs["scale"])}


def penalty(norm: str) -> Callable[[Case], Values]:
    def adapter(case: Case) -> Values:
        inputs = case["inputs"]
        w1, b1, w2 = (_leaf(inputs[name]) for name in ("W1", "b1", "W2"))
        b2 = _tensor(inputs["b2"])
        value = gradient_penalty(
            lambda x: torch.tanh(x.flatten(1) @ w1 + b1) @ w2 + b2,
            _tensor(inputs["real"]),
            _tensor(inputs["fake"]),
            alpha=_tensor(inputs["alpha"]),
            norm=norm,  # type: ignore[arg-type]
            **_options(inputs, "weight", "outputs"),
        )
        value.backward()
        return {"penalty": value, "grad_W1": w1.grad, "grad_b1": b1.grad, "grad_W2": w2.grad}

    return adapter


def discriminator_terms(case: Case) -> Values:
    inputs = case["inputs"]
    real, fake = _leaf(inputs["real_logits"]), _leaf(inputs["fake_logits"])
    options = _options(inputs, "real_weight", "fake_weight", "adversarial")
    terms = discriminator_loss(real, fake, **options)
    terms["total"].backward()
    return {**terms, "grad_real_logits": real.grad, "grad_fake_logits": fake.grad}


def generator_term(case: Case) -> Values:
    logits = _leaf(case["inputs"]["fake_logits"])
    loss = generator_adversarial_loss(logits, **_options(case["inputs"], "weight"))
    loss.backward()
    return {"loss": loss, "grad": logits.grad}


def reconstruction(case: Case) -> Values:
    inputs = case["inputs"]
    images, decoded = _tensor(inputs["images"]), _leaf(inputs["reconstructions"])
    loss = reconstruction_loss(images, decoded, **_options(inputs, "weight"))
    loss.backward()
    return {"loss": loss, "grad": decoded.grad}


def one_vs_rest(case: Case) -> Values:
    inputs = case["inputs"]
    logits = _leaf(inputs["logits"])
    if "plus_minus_one_targets" in inputs:
        target = signs = torch.tensor(inputs["plus_minus_one_targets"])
    else:
        target = torch.tensor(inputs["target"])
        signs = plus_minus_one_targets(target, logits.shape[1])
    loss = one_vs_rest_softplus_loss(logits, target)
    loss.backward()
    return {"loss": loss, "grad": logits.grad, "plus_minus_one_targets": signs}


def scores(case: Case) -> Values:
    logits = _tensor(case["inputs"]["logits"])
    return {kind: open_set_score(logits, kind=kind) for kind in case["expected"]}


def kplusone_terms(case: Case) -> Values:
    inputs = case["inputs"]
    known, unknown = _leaf(inputs["known_logits"]), _leaf(inputs["open_logits"])
    terms = kplusone_loss(known, torch.tensor(inputs["target"]), unknown)
    terms["total"].backward()
    return {
        **terms,
        "grad_known": known.grad,
        "grad_open": unknown.grad,
        "log_probs_known": augment_logits(known).log_softmax(1),
    }


# ------------------------------------------------------------------ latent search
def search(variant: str) -> Callable[[Case], Values]:
    def adapter(case: Case) -> Values:
        inputs = case["inputs"]
        decode, classify, bias = (_tensor(inputs[name]) for name in ("A", "Wc", "bc"))
        target = inputs.get("target")
        result = counterfactual_search(
            _tensor(inputs["z0"]),
            lambda z: z @ decode,
            lambda x: x @ classify + bias,
            target=torch.tensor(target) if isinstance(target, list) else target,
            steps=inputs["iters"],
            variant=variant,  # type: ignore[arg-type]
            **_options(inputs, "speed", "distance_weight", "scale", "project"),
        )
        return {
            "z": result.z,
            "images": result.images,
            "loss_cf": result.loss_cf,
            "loss_distance": result.loss_distance,
            "objective_per_iteration": result.objective,
            "confidence": result.confidence,
            "distance": result.distance,
            "loss": result.loss,
        }

    return adapter


def gopenmax_candidates(case: Case) -> Values:
    inputs = case["inputs"]
    decode, classify = _tensor(inputs["A"]), _tensor(inputs["Wc"])
    bias = _tensor(inputs.get("bc", 0.0))
    found = interpolated_open_set_candidates(
        _tensor(inputs["z0"]),
        _tensor(inputs["z1"]),
        _tensor(inputs["theta"]),
        lambda z: z @ decode,
        lambda x: x @ classify + bias,
        **_options(inputs, "max_confidence"),
    )
    return found._asdict()


# ------------------------------------------------------------------ metrics and OpenMax
def metrics(case: Case) -> Values:
    inputs = case["inputs"]
    logits, target = inputs.get("known_logits"), inputs.get("target")
    return open_set_metrics(
        _tensor(inputs["known_scores"]),
        _tensor(inputs["unknown_scores"]),
        None if logits is None else _tensor(logits),
        None if target is None else torch.tensor(target),
    )


def openmax_fit(case: Case) -> Values:
    inputs = case["inputs"]
    logits, test_logits = _tensor(inputs["train_logits"]), _tensor(inputs["test_logits"])
    openmax = OpenMax(logits.shape[1], **_options(inputs, "tail_size")).double()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # classes without a tail are part of some cases
        openmax.fit(logits, torch.tensor(inputs["train_target"]))
    return {
        "correct": openmax.correct,
        "mav": openmax.mavs,
        "scale": openmax.scale,
        "shape": openmax.shape,
        "small_score": openmax.small_score,
        "tail": openmax.tail,
        "weibull_cdf": openmax.cdf(test_logits),
        "score": openmax.score(test_logits),
    }


def recalibrated(case: Case) -> Values:
    inputs = case["inputs"]
    logits, cdf = _tensor(inputs["logits"]), _tensor(inputs["weibull_cdf"])
    return {"probs": openmax_recalibrate(logits, cdf, inputs["alpha"])}


def openmax_reference(case: Case) -> Values:
    inputs = case["inputs"]
    logits, cdf = _tensor(inputs["logits"]), _tensor(inputs["weibull_cdf"])
    return {"score": openmax_reference_score(logits, cdf)}


# ------------------------------------------------------------------ networks
def _count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def count_encoder(case: Case) -> Values:
    inputs = case["inputs"]
    network = Encoder32(inputs["latent_size"], in_channels=inputs["channels"], scales=SCALES)
    return {"params": _count(network)}


def count_generator(case: Case) -> Values:
    inputs = case["inputs"]
    network = Generator32(inputs["latent_size"], in_channels=inputs["channels"], scales=SCALES)
    return {"params": _count(network)}


def count_heads(case: Case) -> Values:
    classes, channels = case["inputs"]["num_classes"], case["inputs"]["channels"]
    return {
        "discriminator": _count(Discriminator32(classes, in_channels=channels)),
        "classifier": _count(Classifier32(classes, in_channels=channels)),
    }


def _uniform(shape: tuple[int, ...], seed: int) -> Tensor:
    """The case format's pseudo-random numbers in [0, 1)."""
    i = torch.arange(torch.Size(shape).numel(), dtype=torch.int64)
    mixed = i * i * 40503 + i * 2654435761 + 12345 + 7919 * seed
    return ((mixed % 2**32).double() / 2**32).view(shape)


@torch.no_grad()
def _with_formula_weights(network: nn.Module, seed: int) -> nn.Module:
    def signed(tensor: Tensor, factor: float, at: int = seed) -> None:
        tensor.copy_(factor * (2 * _uniform(tensor.shape, at) - 1))

    network.double().eval()
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            signed(layer.weight, 0.06 if isinstance(layer, nn.Linear) else 0.09)
            if layer.bias is not None:
                signed(layer.bias, 0.1)
        elif isinstance(layer, nn.BatchNorm2d):
            assert layer.running_mean is not None
            assert layer.running_var is not None
            layer.weight.copy_(0.9 + 0.2 * _uniform(layer.weight.shape, seed))
            signed(layer.bias, 0.1, seed + 1)
            signed(layer.running_mean, 0.1, seed + 2)
            layer.running_var.copy_(0.5 + _uniform(layer.running_var.shape, seed + 3))
    return network


def _images(inputs: Case) -> Tensor:
    return _uniform(tuple(inputs.get("image_shape", (inputs["batch"], 3, 32, 32))), inputs["T"])


def _summary(output: Tensor) -> Values:
    return {
        "shape": list(output.shape),
        "first16": output.flatten()[:16],
        "mean": output.mean(),
        "abs_sum": output.abs().sum(),
    }


@torch.no_grad()
def forward_encoder(case: Case) -> Values:
    inputs = case["inputs"]
    images = _images(inputs)
    network = Encoder32(
        inputs["latent_size"], in_channels=images.shape[1], scales=(inputs["scale"],)
    )
    return _summary(_with_formula_weights(network, inputs["S"])(images, inputs["scale"]))


@torch.no_grad()
def forward_generator(case: Case) -> Values:
    inputs = case["inputs"]
    width = inputs["latent_size"] * inputs["scale"] ** 2
    z = 2 * _uniform((inputs["batch"], width), inputs["T"]) - 1
    network = Generator32(inputs["latent_size"], scales=(inputs["scale"],))
    return _summary(_with_formula_weights(network, inputs["S"])(z, inputs["scale"]))


def head(build: type[nn.Module], train: bool) -> Callable[[Case], Values]:
    @torch.no_grad()
    def adapter(case: Case) -> Values:
        inputs = case["inputs"]
        images = _images(inputs)
        network = build(inputs["num_classes"], in_channels=images.shape[1], dropout=0.0)
        _with_formula_weights(network, inputs["S"]).train(train)
        logits, features = network(images, return_features=True)
        norm = next(layer for layer in network.modules() if isinstance(layer, nn.BatchNorm2d))
        return {
            "logits": logits,
            "features": features.flatten()[:16],
            "feature_shape": list(features.shape),
            "bn1_running_mean": norm.running_mean,
        }

    return adapter


# ------------------------------------------------------------------ training steps
class _Linear(nn.Module):
    """flatten(x) @ weight (+ bias), with the weight as the cases store it."""

    def __init__(self, weight: Any, bias: Any = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(_tensor(weight))
        self.bias = None if bias is None else nn.Parameter(_tensor(bias))

    def forward(self, x: Tensor) -> Tensor:
        y = x.flatten(1) @ self.weight
        return y if self.bias is None else y + self.bias


class _ToyEncoder(_Linear):
    def __init__(self, weight: Any, scale: int) -> None:
        super().__init__(weight)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return normalize_latent(super().forward(x), self.scale)


class _ToyGenerator(_Linear):
    def __init__(self, weight: Any, image_shape: tuple[int, ...]) -> None:
        super().__init__(weight)
        self.image_shape = image_shape

    def forward(self, z: Tensor) -> Tensor:
        return torch.sigmoid(super().forward(z)).view(-1, *self.image_shape)


class _ToyDiscriminator(nn.Module):
    def __init__(self, w1: Any, b1: Any, w2: Any) -> None:
        super().__init__()
        self.hidden, self.out = _Linear(w1, b1), _Linear(w2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.hidden(x)))


class _ScriptedOSRCI(OSRCIModule):
    """OSRCIModule whose networks, optimizers and draws come from a case; it records its losses."""

    def script(
        self, networks: dict[str, nn.Module], draws: dict[str, Tensor], inputs: Case
    ) -> None:
        for name, network in networks.items():
            setattr(self, name, network)
        self.draws, self.inputs = draws, inputs
        self.record: list[dict[str, Tensor]] = []

    def draw(self, purpose: str, kind: str, rows: int, *shape: int) -> Tensor:
        return self.draws[purpose][len(self.record)]

    def build_optimizers(self) -> dict[str, Optimizer]:
        lr, betas = self.inputs["lr"], tuple(self.inputs.get("betas", (0.5, 0.999)))
        return {
            name: SGD(getattr(self, name).parameters(), lr)
            if self.inputs["optimizer"] == "sgd"
            else Adam(getattr(self, name).parameters(), lr, betas)
            for name in ("encoder", "generator", "discriminator", "classifier")
        }

    def on_train_batch_end(self, *args: Any) -> None:
        super().on_train_batch_end(*args)
        self.record.append(self.losses)


def joint_training_step(case: Case) -> Values:
    inputs = case["inputs"]
    images, targets = _tensor(inputs["images"]), torch.tensor(inputs["targets"])
    module = _ScriptedOSRCI(
        num_classes=len(inputs["bc"]),
        latent_size=inputs["latent_size"],
        scale=inputs["scale"],
        in_channels=images.shape[2],
        width=1,
        joint_epochs=2,  # the one epoch that runs is not the last of its phase
        gopenmax=False,
    ).double()
    networks = {
        "encoder": _ToyEncoder(inputs["We"], inputs["scale"]),
        "generator": _ToyGenerator(inputs["Wg"], images.shape[2:]),
        "discriminator": _ToyDiscriminator(inputs["Wd1"], inputs["bd1"], inputs["Wd2"]),
        "classifier": _Linear(inputs["Wc"], inputs["bc"]),
    }
    draws = {"noise": _tensor(inputs["gaussian"]), "alpha": _tensor(inputs["alpha"])}
    module.script(networks, draws, inputs)
    fit_one_epoch(module, Rows(images.flatten(0, 1), targets.flatten()), images.shape[1])
    encoder, generator, discriminator, classifier = (
        getattr(module, name) for name in ("encoder", "generator", "discriminator", "classifier")
    )
    ours = {
        "loss_d_fake": "loss_fake",
        "loss_d_real": "loss_real",
        "gradient_penalty": "gradient_penalty",
        "loss_g": "adversarial",
        "loss_reconstruction": "reconstruction",
        "loss_classifier": "classification",
    }
    return {
        "We": encoder.weight,
        "Wg": generator.weight,
        "Wd1": discriminator.hidden.weight,
        "bd1": discriminator.hidden.bias,
        "Wd2": discriminator.out.weight,
        "Wc": classifier.weight,
        "bc": classifier.bias,
        **{name: [losses[key] for losses in module.record] for name, key in ours.items()},
    }


class _ScriptedKPlusOne(KPlusOneClassifierModule):
    """KPlusOneClassifierModule with SGD that takes the images of its open set in order."""

    def draw(self, purpose: str, kind: str, rows: int, *shape: int) -> Tensor:
        count = len(self.open_set)  # type: ignore[arg-type]
        return (torch.arange(count, dtype=torch.float64) + 0.5) / count

    def configure_optimizers(self) -> Optimizer:
        hparams: Any = self.hparams
        return SGD(self.classifier.parameters(), hparams.lr)


def kplusone_training_step(case: Case) -> Values:
    inputs = case["inputs"]
    classifier = _Linear(inputs["Wc"], inputs["bc"])
    module = _ScriptedKPlusOne(classifier, _tensor(inputs["open"]), lr=inputs["lr"]).double()
    known, target = _tensor(inputs["known"]), torch.tensor(inputs["target"])
    fit_one_epoch(module, Rows(known, target), len(known))
    return {
        "Wc": classifier.weight,
        "bc": classifier.bias,
        "closed": module.losses["closed"],
        "open": module.losses["open"],
    }


# ------------------------------------------------------------------ splits and defaults
def split(case: Case) -> Values:
    inputs = case["inputs"]
    dataset = inputs.get("dataset", case["name"].split("/")[1])
    # Three data sets share their class splits, so one case stands for all of them.
    names = ("mnist", "svhn", "cifar10") if dataset == "digits_and_cifar10" else (dataset,)
    found = [osr_split(name, inputs["index"], inputs.get("protocol", "neal")) for name in names]
    sides = [(list(one.known), list(one.unknown)) for one in found]
    assert all(side == sides[0] for side in sides), f"the splits of {names} differ"
    return {"known": sides[0][0], "unknown": sides[0][1]}


def _default(build: Callable[..., Any], name: str) -> Any:
    return inspect.signature(build).parameters[name].default


def defaults(case: Case) -> Values:
    preset = PRESETS[case["inputs"]["preset"]]
    module = OSRCIModule(width=1)
    optimizers = module.build_optimizers()
    adams = [optimizers[name] for name in ("encoder", "generator", "discriminator", "classifier")]
    for optimizer in adams[1:]:
        assert optimizer.defaults == adams[0].defaults
    torch.manual_seed(0)
    network = Classifier32(6)
    drops = {layer.p for layer in network.modules() if isinstance(layer, nn.Dropout2d)}
    assert len(drops) == 1
    renamed = {
        "counterfactual_iters": "search_steps",
        "counterfactual_speed": "search_speed",
        "counterfactual_distance_weight": "distance_weight",
        "weibull_tail": "openmax_tail",
        "finetune_lr": "lr_kplusone",
        "gradient_penalty_weight": "lambda_gp",
    }
    same = (
        "latent_size",
        "scale",
        "discriminator_real_weight",
        "discriminator_fake_weight",
        "generator_weight",
        "reconstruction_weight",
        "joint_epochs",
    )
    return {
        **{name: _default(OSRCIModule, name) for name in same},
        **{name: _default(OSRCIModule, ours) for name, ours in renamed.items()},
        "lr": adams[0].defaults["lr"],
        "adam_beta1": adams[0].defaults["betas"][0],
        "adam_beta2": adams[0].defaults["betas"][1],
        "weight_decay": float(adams[0].defaults["weight_decay"]),
        "batch_size": _default(OpenSetDataModule, "batch_size"),
        "image_size": _default(OpenSetDataModule, "image_size"),
        "finetune_epochs": preset.rounds * preset.epochs_per_round,
        "counterfactual_count": preset.rounds * preset.images_per_round,
        **_measured_init(network),
        "dropout2d": drops.pop(),
    }


@torch.no_grad()
def _measured_init(network: nn.Module) -> Values:
    """Standard deviations of the initial weights, rounded to what so many numbers can tell."""
    convs = [layer.weight for layer in network.modules() if isinstance(layer, nn.Conv2d)]
    norms = [
        layer.weight.flatten() for layer in network.modules() if isinstance(layer, nn.BatchNorm2d)
    ]
    return {
        "conv_init_std": round(float(torch.cat([w.flatten() for w in convs]).std()), 3),
        "bn_weight_init_std": round(float(torch.cat(norms).std()), 2),
    }


ADAPTERS: dict[str, Callable[[Case], Values]] = {
    "clamp_to_unit_sphere": clamp,
    "latent_noise": latent_noise,
    "gradient_penalty_channel": penalty("channel"),
    "gradient_penalty_sample": penalty("sample"),
    "discriminator_loss": discriminator_terms,
    "generator_adversarial_loss": generator_term,
    "reconstruction_loss": reconstruction,
    "one_vs_rest_softplus_loss_index": one_vs_rest,
    "one_vs_rest_softplus_loss_partial_labels": one_vs_rest,
    "counterfactual_search_reference_code": search("reference"),
    "counterfactual_search_paper": search("paper"),
    "open_set_score": scores,
    "open_set_score_large_logits": scores,
    "kplusone_loss": kplusone_terms,
    "joint_training_step_sgd": joint_training_step,
    "joint_training_step_adam": joint_training_step,
    "kplusone_training_step": kplusone_training_step,
    "gopenmax_candidates": gopenmax_candidates,
    "open_set_metrics": metrics,
    "openmax_fit": openmax_fit,
    "openmax_recalibrate": recalibrated,
    "openmax_score_reference": openmax_reference,
    "param_count_encoder": count_encoder,
    "param_count_generator": count_generator,
    "param_count_heads": count_heads,
    "forward_encoder": forward_encoder,
    "forward_generator": forward_generator,
    "forward_discriminator": head(Discriminator32, train=False),
    "forward_classifier": head(Classifier32, train=False),
    "forward_classifier_train_mode": head(Classifier32, train=True),
    "forward_discriminator_train_mode": head(Discriminator32, train=True),
    "osr_split": split,
    "defaults": defaults,
}
