"""StarGAN: from golden cases to lightning_modules.stargan, its data splits and the shared gradient penalty."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datamodules.attribute_splits import reference_celeba_split
from lightning_modules.nn.gradient_penalty import gradient_penalty
from lightning_modules.stargan import StarGAN
from lightning_modules.stargan.labels import (
    class_targets,
    joint_label,
    one_hot,
    permute_targets,
    single_attribute_targets,
)
from lightning_modules.stargan.losses import (
    critic_losses,
    cycle_reconstruction_loss,
    decayed_lr,
    domain_classification_loss,
    generator_adversarial_loss,
    joint_classification_loss,
    weighted,
)
from lightning_modules.stargan.module import Task
from lightning_modules.stargan.networks import StarGANDiscriminator, StarGANGenerator
from lightning_modules.stargan.released import load_reference_state_dict
from tests.scripted import fit_one_epoch

Case = dict[str, Any]
Values = dict[str, Any]


def _tensor(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# ------------------------------------------------------------------ losses
def adversarial(case: Case) -> Values:
    real, fake = (_tensor(case["inputs"][name]) for name in ("real_logits", "fake_logits"))
    d_real, d_fake = critic_losses(real, fake)
    g_fake = generator_adversarial_loss(fake)
    return {"d_real": d_real, "d_fake": d_fake, "g_fake": g_fake, "d_sum": d_real + d_fake}


def multi_label(case: Case) -> Values:
    logits, target = (_tensor(case["inputs"][name]) for name in ("logits", "target"))
    return {"loss": domain_classification_loss(logits, target, "multi_label")}


def single_label(case: Case) -> Values:
    target = torch.tensor(case["inputs"]["target"])
    logits = _tensor(case["inputs"]["logits"])
    return {"loss": domain_classification_loss(logits, target, "single_label")}


def reconstruction(case: Case) -> Values:
    x, x_rec = (_tensor(case["inputs"][name]) for name in ("x", "x_rec"))
    return {"loss": cycle_reconstruction_loss(x, x_rec)}


def _penalty(
    critic: Callable[[Tensor], Tensor], inputs: Case, *weights: Tensor
) -> tuple[Tensor, list[Tensor], Tensor]:
    """The penalty, its gradients with respect to the weights, and the interpolates."""
    seen = []

    def watched(x: Tensor) -> Tensor:
        seen.append(x.detach())
        return critic(x)

    real, fake, alpha = (_tensor(inputs[name]) for name in ("x_real", "x_fake", "alpha"))
    penalty = gradient_penalty(watched, real, fake, alpha)
    gradients = torch.autograd.grad(penalty, weights, allow_unused=True)
    found = [
        torch.zeros_like(w) if g is None else g for w, g in zip(weights, gradients, strict=True)
    ]
    return penalty, found, seen[0]


def linear_penalty(case: Case) -> Values:
    inputs = case["inputs"]
    weight = _tensor(inputs["weight"]).requires_grad_()
    critic = partial(F.conv2d, weight=weight, stride=inputs["stride"])
    penalty, (grad,), x_hat = _penalty(critic, inputs, weight)
    return {
        "x_hat": x_hat,
        "out_shape": critic(x_hat).shape,
        "penalty": penalty,
        "grad_weight": grad,
        "weighted": weighted({"d_gp": penalty}, {"gp": 10})["d_gp"],
    }


def two_layer_penalty(case: Case) -> Values:
    inputs = case["inputs"]
    w1, b1, w2 = (_tensor(inputs[name]).requires_grad_() for name in ("w1", "b1", "w2"))

    def critic(x: Tensor) -> Tensor:
        return F.conv2d(F.leaky_relu(F.conv2d(x, w1, b1, padding=1), 0.01), w2, stride=2)

    penalty, (grad_w1, grad_b1, grad_w2), _ = _penalty(critic, inputs, w1, b1, w2)
    return {"penalty": penalty, "grad_w1": grad_w1, "grad_b1": grad_b1, "grad_w2": grad_w2}


# ------------------------------------------------------------------ labels and schedules
def edited_targets(case: Case) -> Values:
    inputs = case["inputs"]
    return {"targets": single_attribute_targets(_tensor(inputs["labels"]), inputs["attributes"])}


def every_class(case: Case) -> Values:
    return {"targets": class_targets(**case["inputs"])}


def vectors(case: Case) -> Values:
    inputs = case["inputs"]
    return {"out": one_hot(torch.tensor(inputs["labels"]), inputs["n_classes"])}


def permuted(case: Case) -> Values:
    inputs = case["inputs"]
    return {"targets": permute_targets(_tensor(inputs["labels"]), torch.tensor(inputs["perm"]))}


def _both_datasets(
    inputs: Case, f: Callable[[Tensor, int, list[int], list[Any]], Tensor]
) -> Values:
    dims, kinds = [inputs["c1"], inputs["c2"]], ["multi_label", "single_label"]
    return {
        "celeba": f(_tensor(inputs["celeba_labels"]), 0, dims, kinds),
        "rafd": f(torch.tensor(inputs["rafd_labels"]), 1, dims, kinds),
    }


def joint_labels(case: Case) -> Values:
    return _both_datasets(case["inputs"], joint_label)


def joint_classification(case: Case) -> Values:
    logits = _tensor(case["inputs"]["logits"])
    return _both_datasets(case["inputs"], partial(joint_classification_loss, logits))


def learning_rate(case: Case) -> Values:
    inputs = dict(case["inputs"])
    mode: Any = "reference" if case["family"] == "lr_reference" else "linear"
    steps = inputs.pop("steps")
    return {"lr": [decayed_lr(step, **inputs, mode=mode) for step in steps]}


def celeba_split(case: Case) -> Values:
    train, test = reference_celeba_split(**case["inputs"])
    return {
        "n_test": len(test),
        "n_train": len(train),
        "test_first10": test[:10],
        "test_last3": test[-3:],
        "test_id_sum": sum(test),
        "train_first5": train[:5],
    }


# ------------------------------------------------------------------ networks
def _sizes(network: nn.Module) -> Values:
    parameters = list(network.parameters())
    return {"n_params": sum(p.numel() for p in parameters), "n_param_tensors": len(parameters)}


def generator_sizes(case: Case) -> Values:
    inputs = dict(case["inputs"])
    size, batch = inputs.pop("image_size"), inputs.pop("batch")
    with torch.device("meta"):
        network = StarGANGenerator(**inputs)
        y = network(torch.zeros(batch, 3, size, size), torch.zeros(batch, inputs["c_dim"]))
    weights = [p.shape for p in network.parameters()]
    return {
        **_sizes(network),
        "first_weight": weights[0],
        "last_weight": weights[-1],
        "out_shape": y.shape,
    }


def discriminator_sizes(case: Case) -> Values:
    inputs = dict(case["inputs"])
    batch, size = inputs.pop("batch"), inputs["image_size"]
    with torch.device("meta"):
        network = StarGANDiscriminator(**inputs)
        src, cls = network(torch.zeros(batch, 3, size, size))
    return {
        **_sizes(network),
        "src_shape": src.shape,
        "cls_shape": cls.shape,
        "cls_kernel": network.class_head.weight.shape,
    }


def loaded(network: Any, inputs: Case) -> Any:
    state = {name: _tensor(value) for name, value in inputs["state_dict"].items()}
    load_reference_state_dict(network.double(), state)
    return network


def _generator(inputs: Case) -> StarGANGenerator:
    sizes = {name: inputs[name] for name in ("conv_dim", "c_dim", "repeat_num")}
    return loaded(StarGANGenerator(**sizes), inputs)


def _discriminator(inputs: Case) -> StarGANDiscriminator:
    sizes = {name: inputs[name] for name in ("image_size", "conv_dim", "c_dim", "repeat_num")}
    return loaded(StarGANDiscriminator(**sizes), inputs)


@torch.no_grad()
def generator_forward(case: Case) -> Values:
    inputs = case["inputs"]
    generator, x, c = _generator(inputs), _tensor(inputs["x"]), _tensor(inputs["c"])
    y = generator.train()(x, c)
    assert torch.equal(y, generator.eval()(x, c))
    return {"y": y}


@torch.no_grad()
def discriminator_forward(case: Case) -> Values:
    src, cls = _discriminator(case["inputs"])(_tensor(case["inputs"]["x"]))
    return {"src": src, "cls": cls}


# ------------------------------------------------------------------ steps
class Scripted(StarGAN):
    """Has networks, options and alphas of a case, and keeps what every batch logs."""

    def __init__(self, inputs: Case, **arguments: Any) -> None:
        g, d = inputs["g"], inputs["d"]
        given = {ours: inputs[theirs] for theirs, ours in OPTIONS.items() if theirs in inputs}
        super().__init__(
            image_size=d["image_size"],
            ngf=g["conv_dim"],
            n_blocks=g["repeat_num"],
            ndf=d["conv_dim"],
            n_layers=d["repeat_num"],
            **given,
            **arguments,
        )
        loaded(self.generator, g)
        loaded(self.discriminator, d)
        self.alphas = iter(inputs.get("alphas", []))
        self.steps: list[dict[str, Tensor]] = []

    def draw_alpha(self, task: Task) -> Tensor:
        return _tensor(next(self.alphas))

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_end(outputs, batch, batch_idx)
        self.steps.append(self.losses)


class _ScriptedStarGAN(Scripted):
    def __init__(self, inputs: Case, **arguments: Any) -> None:
        super().__init__(inputs, **arguments)
        self.perms = iter(inputs.get("perms", []))

    def draw_permutation(self, rows: int, place: int) -> Tensor:
        return torch.tensor(next(self.perms))


SAME = ("lambda_cls", "lambda_rec", "lambda_gp", "lambda_match", "n_critic", "betas")
OPTIONS = {name: name for name in SAME} | {"g_lr": "lr_g", "d_lr": "lr_d"}
"""Options of a case, and what the module calls them."""


def _names(count: int, first: str = "a") -> list[str]:
    return [f"{first}{i}" for i in range(count)]


def losses_and_gradients(module: StarGAN, task: Task, alpha: Tensor) -> Values:
    """What both updates of a task minimise, term by term, and the norms of the gradients."""
    fake = module.translate_raw(task.images, task.target).detach()
    d_terms = module.discriminator_terms(task, fake)
    d_terms["d_gp"] = module.penalty(task, fake, alpha)
    values: Values = {}
    for side, terms, network in (
        ("d", d_terms, module.discriminator),
        ("g", module.generator_terms(task), module.generator),
    ):
        loss = torch.stack(list(weighted(terms, module.weights).values())).sum()
        gradients = torch.autograd.grad(loss, list(network.parameters()))
        values |= {**terms, f"{side}_loss": loss}
        values[f"{side}_grad_norms"] = [gradient.norm() for gradient in gradients]
    return values


def step(case: Case) -> Values:
    inputs = case["inputs"]
    kind: Any = "multi_label" if case["family"] == "step_multi_label" else "single_label"
    module = _ScriptedStarGAN(inputs, attributes=_names(inputs["g"]["c_dim"]), label_kind=kind)
    labels = torch.tensor(inputs["labels"])
    wanted = permute_targets(labels, torch.tensor(inputs["perm"]))
    source, target = (
        c.double() if kind == "multi_label" else one_hot(c, module.dims[0]).double()
        for c in (labels, wanted)
    )
    task = Task(_tensor(inputs["x_real"]), source, target, labels, wanted)
    return losses_and_gradients(module, task, _tensor(inputs["alpha"]))


def _batch(batch: Case, kind: str, count: int) -> dict[str, Tensor]:
    labels = torch.tensor(batch["labels"])
    attributes = labels if kind == "multi_label" else one_hot(labels, count)
    return {"image": (_tensor(batch["x"]) + 1) / 2, "attributes": attributes.double()}


def logged(steps: list[dict[str, Tensor]]) -> dict[str, list[Tensor]]:
    """What was logged, as the released code names it, data set after data set within a batch."""
    logs: dict[str, list[Tensor]] = {}
    for losses in steps:
        for name, value in losses.items():
            side, _, kind = name.split("/")[-1].partition("_")
            logs.setdefault(f"{side.upper()}/loss_{kind}", []).append(value)
    return logs


def trace(case: Case) -> Values:
    inputs = case["inputs"]
    count = inputs["g"]["c_dim"]
    module = _ScriptedStarGAN(inputs, attributes=_names(count), decay_steps=0)
    batches = [_batch(inputs["batches"][i], "multi_label", count) for i in inputs["batch_order"]]
    return _trained(module, batches)


def joint_trace(case: Case) -> Values:
    inputs = case["inputs"]
    dims, kinds = (inputs["c_dim"], inputs["c2_dim"]), ("multi_label", "single_label")
    module = _ScriptedStarGAN(
        inputs,
        attributes=[_names(dims[0]), _names(dims[1], "b")],
        label_kind=list(kinds),
        decay_steps=0,
    )
    batches = [
        {
            str(i): _batch(inputs[f"dataset{i}"][chosen], kinds[i], dims[i])
            for i, chosen in enumerate(pair)
        }
        for pair in zip(inputs["order0"], inputs["order1"], strict=True)
    ]
    return _trained(module, batches)


def _trained(module: _ScriptedStarGAN, batches: list[Any]) -> Values:
    fit_one_epoch(module.double(), batches, None)
    return {
        **logged(module.steps),
        "g_norms": [p.norm() for p in module.generator.parameters()],
        "d_norms": [p.norm() for p in module.discriminator.parameters()],
    }


ADAPTERS: dict[str, Callable[[Case], Values]] = {
    "adversarial_terms": adversarial,
    "cls_multi_label": multi_label,
    "cls_multi_label_extreme": multi_label,
    "cls_single_label": single_label,
    "reconstruction": reconstruction,
    "gradient_penalty_linear": linear_penalty,
    "gradient_penalty_two_layer": two_layer_penalty,
    "single_attribute_targets": edited_targets,
    "class_targets": every_class,
    "one_hot": vectors,
    "permuted_targets": permuted,
    "joint_label": joint_labels,
    "joint_cls": joint_classification,
    "lr_reference": learning_rate,
    "lr_linear": learning_rate,
    "celeba_split": celeba_split,
    "generator_arch": generator_sizes,
    "discriminator_arch": discriminator_sizes,
    "generator_forward": generator_forward,
    "discriminator_forward": discriminator_forward,
    "step_multi_label": step,
    "step_single_label": step,
    "training_trace": trace,
    "joint_training_trace": joint_trace,
}
