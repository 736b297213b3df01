"""CycleGAN: from golden cases to lightning_modules.cyclegan and the metrics of its evaluation."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from datamodules.datasets import ImageArrayDataset
from datamodules.unpaired import PairSampler, UnpairedImageDataset, serial_indices
from datamodules.unpaired_sizes import multiple_of_four, scale_width_size
from lightning_modules.cyclegan import CycleGAN
from lightning_modules.cyclegan.losses import (
    adversarial_loss,
    cyclegan_generator_losses,
    discriminator_loss,
    linear_decay_factor,
)
from lightning_modules.cyclegan.networks import (
    PatchDiscriminator,
    PixelDiscriminator,
    build_generator,
)
from lightning_modules.cyclegan.pool import ImagePool
from lightning_modules.metrics.segmentation import segmentation_scores
from lightning_modules.nn.pixels import to_uint8
from tests.scripted import Pairs, fit_one_epoch

Case = dict[str, Any]
Values = dict[str, Any]


def _tensor(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# ------------------------------------------------------------------ losses and schedule
def gan_loss(case: Case) -> Values:
    real, fake = _tensor(case["inputs"]["pred_real"]), _tensor(case["inputs"]["pred_fake"])
    mode = case["inputs"]["mode"]
    fake.requires_grad_()
    generator = adversarial_loss(fake, True, mode)
    (gradient,) = torch.autograd.grad(generator, fake)
    return {
        "loss_real": adversarial_loss(real, True, mode),
        "loss_fake": adversarial_loss(fake, False, mode),
        "loss_d": discriminator_loss(real, fake, mode),
        "loss_g": generator,
        "grad_loss_g_wrt_pred_fake": gradient,
    }


def generator_objective(case: Case) -> Values:
    inputs: dict[str, Any] = {
        name: _tensor(value) if isinstance(value, list) else value
        for name, value in case["inputs"].items()
    }
    return dict(cyclegan_generator_losses(**inputs))


def learning_rate(case: Case) -> Values:
    inputs = case["inputs"]
    convention = "start" if "start_of_epoch" in case["name"] else "end"
    factors = [
        linear_decay_factor(
            epoch,
            inputs["n_epochs"],
            inputs["n_epochs_decay"],
            f"{convention}_of_epoch",  # type: ignore[arg-type]
        )
        for epoch in inputs["epochs"]
    ]
    return {"lr": [inputs["base_lr"] * factor for factor in factors]}


# ------------------------------------------------------------------ pool
def image_pool(case: Case) -> Values:
    """The draws of a case are asked for only where they count, ours for every image."""
    inputs = case["inputs"]
    pool = ImagePool(inputs["pool_size"])
    uniform, index = iter(inputs["uniform_draws"]), iter(inputs["index_draws"])
    returned, uniform_used, index_used = [], 0, 0
    for batch in inputs["batches"]:
        images = _tensor(batch).view(-1, 1, 1, 1)
        room = pool.pool_size - len(pool)
        chance, slot = torch.zeros(len(batch)).double(), torch.zeros(len(batch)).long()
        if pool.pool_size > 0:
            for i in range(room, len(batch)):
                chance[i] = next(uniform)
                uniform_used += 1
                if chance[i] > 0.5:
                    slot[i] = next(index)
                    index_used += 1
        returned.append(pool.query(images, chance, slot).flatten())
    return {
        "returned": returned,
        "pool_after": pool.images.flatten(),
        "uniform_draws_used": uniform_used,
        "index_draws_used": index_used,
    }


# ------------------------------------------------------------------ networks
def _count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


@torch.no_grad()
def generator(case: Case) -> Values:
    network = build_generator(**case["inputs"])
    keys = list(network.state_dict())
    found: Values = {
        "n_params": _count(network),
        "n_param_tensors": len(list(network.parameters())),
        "n_buffers": len(list(network.buffers())),
        "first_keys": keys[:4],
        "last_keys": keys[-4:],
    }
    for key, size in (("output_shape", (32, 32)), ("output_shape_30x34", (30, 34))):
        if key in case["expected"]:
            images = torch.zeros(1, case["inputs"]["in_channels"], *size)
            found[key] = network(images).shape
    return found


@torch.no_grad()
def discriminator(case: Case) -> Values:
    arguments = dict(case["inputs"])
    sizes = arguments.pop("input_sizes")
    network = PatchDiscriminator(**arguments)
    channels = case["inputs"]["in_channels"]
    return {
        "n_params": _count(network),
        "keys": list(network.state_dict()),
        "output_sizes": [network(torch.zeros(1, channels, s, s)).shape[-1] for s in sizes],
        "receptive_field": network.receptive_field,
    }


def discriminator_pixel(case: Case) -> Values:
    return {"n_params": _count(PixelDiscriminator(**case["inputs"]))}


@torch.no_grad()
def filled(network: nn.Module, offset: float = 0.0) -> nn.Module:
    """Parameter i, flat index j: ``0.2 sin(0.37 j + 1.1 i + offset)``, in float64."""
    network.double()
    for i, parameter in enumerate(network.parameters()):
        j = torch.arange(parameter.numel(), dtype=torch.float64)
        parameter.copy_(0.2 * torch.sin(0.37 * j + 1.1 * i + offset).view_as(parameter))
    return network


def generator_forward(case: Case) -> Values:
    network = build_generator("resnet_6blocks", ngf=case["inputs"]["ngf"])
    return {"y": filled(network)(_tensor(case["inputs"]["x"]))}


def discriminator_forward(case: Case) -> Values:
    network = PatchDiscriminator(ndf=case["inputs"]["ndf"])
    return {"y": filled(network)(_tensor(case["inputs"]["x"]))}


# ------------------------------------------------------------------ evaluation
def fcn_scores(case: Case) -> Values:
    inputs = case["inputs"]
    labels, preds = torch.tensor(inputs["labels"]), torch.tensor(inputs["preds"])
    return segmentation_scores(labels, preds, inputs["num_classes"])


def bytes_of(case: Case) -> Values:
    return {"y": to_uint8(torch.tensor(case["inputs"]["x"]), "truncate")}


# ------------------------------------------------------------------ training
class _ScriptedPools(CycleGAN):
    """Takes what the pools draw from a case."""

    def __init__(self, case_inputs: Case, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.scripts = {
            side: (
                list(case_inputs[f"fake_{side.upper()}_pool_uniform"]),
                list(case_inputs[f"fake_{side.upper()}_pool_index"]),
            )
            for side in ("a", "b")
        }
        self.steps: list[Values] = []

    def _pool_draws(self, side: str, rows: int) -> tuple[Tensor, Tensor]:
        pool, (uniforms, places) = getattr(self, f"pool_{side}"), self.scripts[side]
        drawn = [0.0] * min(pool.pool_size - len(pool), rows)
        drawn += [uniforms.pop(0) for _ in range(rows - len(drawn))]
        slots = [places.pop(0) if chance > 0.5 else 0 for chance in drawn]
        return torch.tensor(drawn, dtype=torch.float64), torch.tensor(slots)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_end(outputs, batch, batch_idx)
        self.steps.append(
            {
                theirs: self.losses[ours]
                for ours, theirs in RELEASED_NAMES.items()
                if ours in self.losses
            }
        )


RELEASED_NAMES = {
    "adversarial_ab": "G_A",
    "adversarial_ba": "G_B",
    "cycle_a": "cycle_A",
    "cycle_b": "cycle_B",
    "identity_ab": "idt_A",
    "identity_ba": "idt_B",
    "discriminator_b": "D_A",
    "discriminator_a": "D_B",
}
NETWORKS = {
    "generator_ab": "netG_A",
    "generator_ba": "netG_B",
    "discriminator_b": "netD_A",
    "discriminator_a": "netD_B",
}


def training_steps(case: Case) -> Values:
    inputs = case["inputs"]
    a, b = (_tensor(inputs[name]) for name in ("real_A", "real_B"))
    module = _ScriptedPools(
        inputs,
        generator="resnet_6blocks",
        ngf=2,
        ndf=2,
        n_layers=2,
        n_epochs=1,
        n_epochs_decay=0,
        **{
            key: inputs[key]
            for key in ("lr", "lambda_A", "lambda_B", "lambda_identity", "pool_size")
        },
    )
    for place, name in enumerate(NETWORKS):
        filled(getattr(module, name), 0.5 * place)
    fit_one_epoch(module.double(), Pairs((a + 1) / 2, (b + 1) / 2), 1)
    with torch.no_grad():
        after = {
            "fake_B_after": module.translate_raw(a[:1], "AtoB"),
            "fake_A_after": module.translate_raw(b[:1], "BtoA"),
            "pred_D_A_real_B": module.discriminator_b(b[:1]),
            "pred_D_B_real_A": module.discriminator_a(a[:1]),
        }
    return {
        "losses": module.steps,
        **after,
        "weight_sq_sum": {
            theirs: _weights(getattr(module, ours)) for ours, theirs in NETWORKS.items()
        },
    }


def _weights(network: nn.Module) -> Tensor:
    layers = [m for m in network.modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d)]
    return torch.stack([layer.weight.detach().square().sum() for layer in layers]).sum()


def size_rules(case: Case) -> Values:
    inputs = case["inputs"]
    return {
        "none_wh": [multiple_of_four(*size) for size in inputs["sizes_wh"]],
        "scale_width_wh": [
            [scale_width_size(*size, *pair) for pair in inputs["scale_width_pairs"]]
            for size in inputs["sizes_wh"]
        ],
    }


def unaligned_indexing(case: Case) -> Values:
    n_a, n_b = case["inputs"]["n_A"], case["inputs"]["n_B"]
    sides = (
        ImageArrayDataset(torch.zeros(n, 1, 1, 1, dtype=torch.uint8), torch.zeros(n).long(), ["x"])
        for n in (n_a, n_b)
    )
    data = UnpairedImageDataset(*sides)
    # What is given out is shuffled.
    given = sorted(map(tuple, PairSampler(data, "serial", 1).order().tolist()))
    assert given == sorted(serial_indices(n_a, n_b))
    return {"length": len(data), "serial": serial_indices(n_a, n_b)}


ADAPTERS: dict[str, Callable[[Case], Values]] = {
    "gan_loss_lsgan": gan_loss,
    "gan_loss_vanilla": gan_loss,
    "gan_loss_wgangp": gan_loss,
    "generator_objective": generator_objective,
    "lr": learning_rate,
    "image_pool": image_pool,
    "generator_resnet": generator,
    "generator_unet": generator,
    "discriminator": discriminator,
    "discriminator_pixel": discriminator_pixel,
    "generator_forward": generator_forward,
    "discriminator_forward": discriminator_forward,
    "fcn_scores": fcn_scores,
    "tensor_to": bytes_of,
    "training_steps": training_steps,
    "size_rules": size_rules,
    "unaligned_indexing": unaligned_indexing,
}
