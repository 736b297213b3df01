"""OGNet: from golden cases to lightning_modules.ognet and its metrics."""

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from lightning_modules.metrics.anomaly import anomaly_metrics
from lightning_modules.nn.ema import AveragedNetwork
from lightning_modules.ognet import OGNet
from lightning_modules.ognet import module as ognet_module
from lightning_modules.ognet.losses import (
    add_input_noise,
    bad_loss,
    discriminator_loss,
    generator_loss,
    good_loss,
    noise_std,
    phase_two_loss,
    pseudo_anomaly_input,
    reference_phase_two_updates,
)
from lightning_modules.ognet.networks import OGNetDiscriminator, OGNetGenerator
from lightning_modules.ognet.phase_two import PhaseTwoBatch, Reconstructor, phase_two_terms
from tests.scripted import Rows, fit_one_epoch

Case = dict[str, Any]
Values = dict[str, Any]


def _tensor(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _logits(scores: Any) -> Tensor:
    return _tensor(scores).logit()


# ------------------------------------------------------------------ networks
def _sizes(network: nn.Module) -> Values:
    parameters = list(network.parameters())
    layers = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)
    linear = [layer for layer in network.modules() if isinstance(layer, nn.Linear)]
    return {
        "num_parameters": sum(p.numel() for p in parameters),
        "num_parameter_tensors": len(parameters),
        "num_batchnorm": sum(isinstance(layer, nn.BatchNorm2d) for layer in network.modules()),
        "weight_shapes": [m.weight.shape for m in network.modules() if isinstance(m, layers)],
        "linear_in_features": linear[0].in_features if linear else None,
    }


def generator_sizes(case: Case) -> Values:
    return _sizes(OGNetGenerator(**case["inputs"]))


def discriminator_sizes(case: Case) -> Values:
    return _sizes(OGNetDiscriminator(**case["inputs"]))


def linear_inputs(case: Case) -> Values:
    found = [
        _sizes(OGNetDiscriminator(image_size=size))["linear_in_features"]
        for size in case["inputs"]["image_sizes"]
    ]
    return {"linear_in_features": found}


def size_preserving(case: Case) -> Values:
    generator = OGNetGenerator(base_channels=2).eval()
    images = [torch.zeros(1, 1, size, size) for size in case["inputs"]["image_sizes"]]
    return {
        "output_sizes": [generator(image).shape[-1] for image in images],
        "encoder_sizes": [generator.encoder(image).shape[-1] for image in images],
    }


@torch.no_grad()
def _fill(network: nn.Module) -> None:
    for t, (name, parameter) in enumerate(network.named_parameters()):
        c = torch.cos(0.7 * torch.arange(parameter.numel(), dtype=torch.float64) + t)
        if parameter.ndim > 1:
            value = c / (parameter.numel() / parameter.shape[0]) ** 0.5
        else:
            value = 1 + 0.1 * c if name.endswith("weight") else 0.1 * c
        parameter.copy_(value.view_as(parameter))


@torch.no_grad()
def forward(case: Case) -> Values:
    inputs = case["inputs"]
    generator, discriminator = OGNetGenerator(), OGNetDiscriminator()
    pixels = torch.arange(45 * 45, dtype=torch.float64)
    x = torch.stack(
        [torch.sin(0.05 * pixels * (b + 1) + inputs["phase"] * b).view(1, 45, 45) for b in range(2)]
    ).float()
    for network in (generator, discriminator):
        _fill(network)
        network.train(inputs["mode"] == "train")
    recon = generator(x)
    fake, real = discriminator.score(recon), discriminator.score(x)
    state = generator.state_dict() | discriminator.state_dict()
    return {
        "recon_mean": recon.double().mean(),
        "recon_std": recon.double().std(),
        "recon_points": [recon[tuple(point)] for point in inputs["points"]],
        "score_fake": fake,
        "score_real": real,
        "g_first_bn_running_mean_0_4": state["encoder.1.running_mean"][:5],
        "g_third_bn_running_mean_0_4": state["encoder.8.running_mean"][:5],
        "d_first_bn_running_var_0_4": state["discriminator.1.running_var"][:5],
    }


# ------------------------------------------------------------------ losses
def noisy(case: Case) -> Values:
    inputs = case["inputs"]
    return {"noisy": add_input_noise(_tensor(inputs["x"]), _tensor(inputs["noise"]))}


def noise_convention(case: Case) -> Values:
    sigma = case["inputs"]["sigma_noise"]
    return {"std_reference": noise_std(sigma), "std_paper": noise_std(sigma, squared=False)}


def phase_one_losses(case: Case) -> Values:
    inputs = case["inputs"]
    fake, real = _logits(inputs["score_fake"]), _logits(inputs["score_real"])
    recon, x, w = _tensor(inputs["recon"]), _tensor(inputs["x"]), inputs["adversarial_weight"]
    d = discriminator_loss(fake, real)
    g = generator_loss(fake, recon, x, w, 1 - w)
    return {
        "d_fake": d["fake"],
        "d_real": d["real"],
        "d_loss": d["total"],
        "recon_loss": g["recon"],
        "adv_loss": g["adversarial"],
        "g_loss": g["total"],
        "g_loss_w02": generator_loss(fake, recon, x, 0.2, 0.8)["total"],
        "g_loss_paper_lambda02": generator_loss(fake, recon, x, 1.0, 0.2)["total"],
    }


def saturation(case: Case) -> Values:
    inputs = case["inputs"]
    loss = bad_loss if inputs["target"] == 1 else good_loss
    return {"loss": loss(_logits(inputs["score_fake"]))}


def second_loss(case: Case) -> Values:
    inputs = case["inputs"]
    names = ("real", "recon", "old", "pseudo")
    logits = [_logits(inputs[f"score_{name}"]) for name in names]
    flags = {
        "high_epoch_fake_loss_contribution": 1 - inputs["alpha"],
        "psuedo_anomaly_contribution": inputs["beta"],
    }
    terms = phase_two_loss(*logits, alpha=inputs["alpha"], beta=inputs["beta"])
    return {**terms, "reference_flags": flags}


def average(case: Case) -> Values:
    inputs = case["inputs"]
    pair = (_tensor(inputs["old_recon_a"]), _tensor(inputs["old_recon_b"]))
    return {"average": pseudo_anomaly_input(*pair)}


# ------------------------------------------------------------------ steps
class _ToyGenerator(nn.Module):
    def __init__(self, weight: Any, bias: Any) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(_tensor(weight)), nn.Parameter(_tensor(bias))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.weight + self.bias)


class _ToyDiscriminator(nn.Module):
    def __init__(self, weight: Any, bias: Any) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(_tensor(weight)), nn.Parameter(_tensor(bias))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class _ScriptedOGNet(OGNet):
    """OGNet whose networks and draws come from a case; it records its losses and first gradients."""

    def script(self, inputs: Case) -> None:
        self.inputs = inputs
        self.generator = _ToyGenerator(inputs["Wg"], inputs["bg"])
        self.discriminator = _ToyDiscriminator(inputs["wd"], inputs["bd"])
        self.tuned_discriminator = _ToyDiscriminator(inputs["wd"], inputs["bd"])
        if "Wold" in inputs:
            self.old_generator = AveragedNetwork(_ToyGenerator(inputs["Wold"], inputs["bold"]))
        self.record: list[dict[str, Tensor]] = []
        self.gradients: dict[str, Tensor] = {}

    def phase_at(self, epoch: int) -> Any:
        return "two" if "Wold" in self.inputs else "one"

    def batches_in_epoch(self, epoch: int) -> None:
        return None

    def to_network(self, images: Tensor) -> Tensor:
        return images

    def draw(self, purpose: str, kind: str, rows: int, *shape: int) -> Tensor:
        return _tensor(self.inputs["noise"])

    def training_bank(self) -> Any:
        return self

    def __len__(self) -> int:
        return 3 * len(self.inputs["x"])

    def batch(self, indices: Tensor, *args: Any) -> dict[str, Tensor]:
        rows = torch.cat([_tensor(self.inputs[name]) for name in ("x", "xa", "xb")])
        return {"image": rows[indices]}

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        super().on_before_optimizer_step(optimizer)
        for name, network in (("g", self.generator), ("d", self._trained_discriminator())):
            own = {id(p) for group in optimizer.param_groups for p in group["params"]}
            for kind, parameter in (
                ("W" if name == "g" else "w", network.weight),
                ("b", network.bias),
            ):
                if id(parameter) in own:
                    self.gradients.setdefault(f"grad_{kind}{name}", parameter.grad.clone())

    def _trained_discriminator(self) -> nn.Module:
        return self.discriminator if self.phase == "one" else self.tuned_discriminator

    def on_train_batch_end(self, *args: Any) -> None:
        super().on_train_batch_end(*args)
        self.record.append(self.losses)


def _train(case: Case, **options: Any) -> _ScriptedOGNet:
    inputs = case["inputs"]
    module = _ScriptedOGNet(image_size=17, base_channels=1, noise_std=1.0, **options).double()
    module.script(inputs)
    x = _tensor(inputs["x"])
    labels = torch.zeros(len(x) * inputs["steps"])
    fit_one_epoch(module, Rows(x.repeat(inputs["steps"], 1), labels), len(x))
    return module


def phase_one_steps(case: Case) -> Values:
    inputs = case["inputs"]
    w = inputs["adversarial_weight"]
    options = {"adversarial_weight": w, "recon_weight": 1 - w, "d_forward": inputs["mode"]}
    module = _train(case, phase_one_epochs=2, old_epoch=1, **options)
    generator, discriminator = module.generator, module.discriminator
    return {
        "losses_d_g": [[losses["discriminator"], losses["generator"]] for losses in module.record],
        "first_step_grads": module.gradients,
        "Wg": generator.weight,
        "bg": generator.bias,
        "wd": discriminator.weight,
        "bd": discriminator.bias,
    }


def phase_two_steps(case: Case) -> Values:
    inputs = case["inputs"]
    rows = len(inputs["x"])
    pairs = (torch.arange(rows, 2 * rows), torch.arange(2 * rows, 3 * rows))
    with (
        patch.object(ognet_module, "draw_pairs", lambda *args: pairs),
        # The batches repeat the same images, of which the bank has one copy.
        patch.object(_ScriptedOGNet, "phase_two_step", _from_the_first_rows),
    ):
        module = _train(case, alpha=inputs["alpha"], beta=inputs["beta"], old_epoch=3)
    reconstructor = Reconstructor(
        module.generator,
        module.old_generator,
        lambda indices: module.batch(indices)["image"],
        3 * rows,
    )
    batch = reconstructor.batch(torch.arange(rows), *pairs)
    return {
        "losses": [losses["phase_two"] for losses in module.record],
        "recon_old": batch.old,
        "recon": batch.recon,
        "pseudo": batch.pseudo,
        "first_step_grads": module.gradients,
        "wd": module.tuned_discriminator.weight,
        "bd": module.tuned_discriminator.bias,
    }


def _from_the_first_rows(module: _ScriptedOGNet, x: Tensor, index: Tensor) -> None:
    OGNet.phase_two_step(module, x, index % len(x))


def batch_norm_order(case: Case) -> Values:
    inputs = case["inputs"]
    norm = nn.BatchNorm1d(len(inputs["real"][0])).double()
    batch = PhaseTwoBatch(*(_tensor(inputs[name]) for name in ("real", "recon", "old", "pseudo")))
    phase_two_terms(nn.Sequential(norm, _Sum()), batch, 0.1, 0.001)
    return {
        "running_mean": norm.running_mean,
        "running_var": norm.running_var,
        "num_batches_tracked": norm.num_batches_tracked,
    }


class _Sum(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sum(1)


def reference_schedule(case: Case) -> Values:
    inputs = case["inputs"]
    updates, saved = reference_phase_two_updates(**inputs)
    per_epoch, _ = reference_phase_two_updates(inputs["num_batches"], 1, inputs["iterations"])
    return {"updates": updates, "updates_per_epoch": per_epoch, "saved": saved}


def metrics(case: Case) -> Values:
    inputs = case["inputs"]
    return dict(anomaly_metrics(inputs["scores"], inputs["labels"]))


ADAPTERS: dict[str, Callable[[Case], Values]] = {
    "generator_params": generator_sizes,
    "discriminator_params": discriminator_sizes,
    "discriminator_linear_in_features": linear_inputs,
    "generator_is_size_preserving": size_preserving,
    "forward_eval_deterministic_fill": forward,
    "forward_train_deterministic_fill": forward,
    "noisy_input_clamped": noisy,
    "noise_std_convention": noise_convention,
    "phase_one_losses": phase_one_losses,
    "bce_saturation": saturation,
    "phase_two_loss": second_loss,
    "pseudo_anomaly_average": average,
    "phase_one_steps_recompute": phase_one_steps,
    "phase_one_steps_simultaneous": phase_one_steps,
    "phase_two_steps": phase_two_steps,
    "phase_two_batchnorm_order": batch_norm_order,
    "reference_phase_two_updates": reference_schedule,
    "scores_separable": metrics,
    "scores_overlap": metrics,
    "scores_imbalanced": metrics,
    "scores_many_ties": metrics,
    "scores_inverted": metrics,
}
