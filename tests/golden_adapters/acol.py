"""ACoL: from golden cases to lightning_modules.acol; maps and metrics are in acol_localization."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_modules.acol import ACoL
from lightning_modules.acol.losses import (
    class_activation_map,
    erase_features,
    erase_mask,
    rest_cross_entropy,
    select_class_maps,
)
from lightning_modules.acol.networks import (
    Backbone,
    ErasingNetwork,
    MapHead,
    build_backbone,
)
from lightning_modules.nn.maps import normalize_map

Case = dict[str, Any]
Values = dict[str, Any]


def _tensor(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def class_channel(case: Case) -> Values:
    features, weight, bias = (
        _tensor(case["inputs"][name]) for name in ("features", "weight", "bias")
    )
    labels = torch.tensor(case["inputs"]["labels"])
    head = MapHead(weight.shape[1], weight.shape[0], depth=0).double()
    head.load_state_dict({"0.weight": weight[..., None, None], "0.bias": bias})
    maps = head(features)
    channel = select_class_maps(maps, labels)
    cam = class_activation_map(features, weight, labels)
    return {
        "score_maps": maps,
        "logits": maps.mean((-2, -1)),
        "logits_gap_then_fc": features.mean((-2, -1)) @ weight.T + bias,
        "cam_no_bias": cam,
        "class_channel": channel,
        "class_channel_minus_bias": channel - bias[labels, None, None],
        "normalized": normalize_map(cam),
    }


# ------------------------------------------------------------------ erasing and losses
def erasing(case: Case) -> Values:
    inputs = case["inputs"]
    features, attention = _tensor(inputs["features"]), normalize_map(torch.tensor(inputs["map"]))
    found: Values = {}
    for name, inclusive in (("inclusive", True), ("strict", False)):
        keep = erase_mask(attention, inputs["threshold"], inclusive)
        found[f"keep_{name}"] = keep.double()
        found[f"erased_{name}"] = erase_features(
            features, attention, inputs["threshold"], inclusive
        )
        found[f"n_erased_{name}"] = int((~keep).sum())
    return found


def rest(case: Case) -> Values:
    inputs = case["inputs"]
    # In single precision, in which the original expression overflows.
    logits = torch.tensor(inputs["logits"], requires_grad=True)
    target = torch.tensor(inputs["target"])
    classes = logits.shape[1]
    soft = (1 - F.one_hot(target, classes).double()) / (classes - 1)
    mean = rest_cross_entropy(logits, target)
    (gradient,) = torch.autograd.grad(mean, logits)
    return {
        "mean": mean,
        "none": rest_cross_entropy(logits, target, "none"),
        "sum": rest_cross_entropy(logits, target, "sum"),
        "soft_target": soft,
        "grad_mean": gradient,
    }


# ------------------------------------------------------------------ steps
def _network(classes: int, channels: int, **options: Any) -> ErasingNetwork:
    backbone = Backbone("small", nn.Identity(), channels, 1)
    return ErasingNetwork(backbone, classes, **options).double()


def _two_branches(case: Case, **options: Any) -> ErasingNetwork:
    inputs = case["inputs"]
    state = {
        name.replace("branch_a", "heads.0").replace("branch_b", "heads.1"): _tensor(values)
        for name, values in inputs["state_dict"].items()
    }
    classes, width = list(state.values())[-2].shape[:2]
    channels = state["heads.0.0.weight"].shape[1]
    options |= {"head_width": width, "deltas": (inputs["threshold"],)}
    network = _network(classes, channels, **options)
    network.load_state_dict(state)
    return network


def _losses(recipe: str, delta: Any, stages: Any, labels: Tensor) -> list[Tensor]:
    module = ACoL(4, "small", width=1, head_width=1, recipe=recipe, delta=delta)
    return module.stage_losses(stages, labels)


def two_branches(case: Case) -> Values:
    network = _two_branches(case, smooth=True)
    x = _tensor(case["inputs"]["x"]).requires_grad_()
    labels = torch.tensor(case["inputs"]["labels"])
    pooled = network.pooled(x)
    a, b = stages = network(pooled, labels)
    losses = _losses("acol", case["inputs"]["threshold"], stages, labels)
    loss = torch.stack(losses).sum()
    loss.backward()
    every = network.fuse([normalize_map(stage.maps) for stage in stages])
    asked = network.class_maps(pooled, labels[:, None])
    return {
        "pooled": pooled,
        "logits_a": a.logits,
        "logits_b": b.logits,
        "map_a": a.maps,
        "map_b": b.maps,
        "attention": a.attention,
        "loss": loss,
        "loss_a": losses[0],
        "loss_b": losses[1],
        "fused": every,
        "fused_label": network.fuse(asked)[:, 0],
        "grad_x": x.grad,
        "grad_branch_a_first_weight": network.heads[0][0].weight.grad,
        "grad_branch_b_last_bias": network.heads[1][-1].bias.grad,
    }


def erased_class(case: Case) -> Values:
    network = _two_branches(case, head_depth=1)
    features = _tensor(case["inputs"]["features"])
    labels = torch.tensor(case["inputs"]["labels"])
    found: Values = {}
    for name, classes in (("predicted", None), ("label", labels)):
        a, b = network(features, classes)
        predicted = a.logits.argmax(1)
        asked = (predicted if classes is None else classes)[:, None]
        found[f"logits_b_{name}"] = b.logits
        found[f"fused_{name}"] = network.fuse(network.class_maps(features, asked))[:, 0]
    return {**found, "predicted_class": predicted, "logits_a": a.logits}


def chain(case: Case) -> Values:
    inputs = case["inputs"]
    features = _tensor(inputs["features"]).requires_grad_()
    labels = torch.tensor(inputs["labels"])
    recipe, deltas = inputs["recipe"], inputs["deltas"]
    weights = [_tensor(inputs[f"weight_{s}"]) for s in range(len(recipe))]
    classes, channels = weights[0].shape
    network = _network(
        classes, channels, recipe=recipe, deltas=deltas, head_depth=0, inclusive=False
    )
    for s, (head, weight) in enumerate(zip(network.heads, weights, strict=True)):
        state = {"0.weight": weight[..., None, None], "0.bias": _tensor(inputs[f"bias_{s}"])}
        head.load_state_dict(state)
    stages = network(features, labels)
    losses = _losses(recipe, deltas, stages, labels)
    loss = torch.stack(losses).sum()
    loss.backward()
    cams = [stage.attention for stage in stages]
    return {
        "logits": torch.stack([stage.logits for stage in stages]),
        "cams": torch.stack(cams),
        "stage_losses": losses,
        "loss": loss,
        "fused": network.fuse(cams),
        "grad_features": features.grad,
        "grad_weight_0": network.heads[0][0].weight.grad[..., 0, 0],
        "grad_bias_last": network.heads[-1][0].bias.grad,
    }


# ------------------------------------------------------------------ sizes
def _count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def parameter_counts(case: Case) -> Values:
    classes = case["inputs"]["num_classes"]
    channels = {"vgg16": 512, "googlenet": 832, "inception_v3": 768, "resnet50": 2048}
    with torch.device("meta"):
        vgg16 = ACoL(classes, "vgg16")
        found = {
            f"head_{name}_in{width}": _count(MapHead(width, classes))
            for name, width in channels.items()
        }
        found["variant_head_in2048"] = _count(MapHead(2048, classes, depth=0))
        found["vgg16_features"] = _count(vgg16.network.backbone)
        found["acol_vgg16_total"] = _count(vgg16)
        for name in ("resnet50", "inception_v3"):
            found[f"acol_{name}_total"] = _count(ACoL(classes, name))
        for name, recipe in (("resnet50", "pp"), ("resnet101", "pn"), ("resnet152", "p")):
            found[f"variant_{name}_{recipe}_total"] = _count(ACoL(classes, name, recipe=recipe))
    groups = [sum(p.numel() for p in g["params"]) for g in vgg16.parameter_groups()]
    return {**found, "sgd_group_numel_vgg16_weights_biases_headw_headb": groups}


@torch.no_grad()
def _side(name: str, stride: int, image: int) -> int:
    with torch.device("meta"):
        maps = build_backbone(name, stride).eval().layers(torch.empty(1, 3, image, image))
    height, width = maps.shape[-2:]
    assert height == width
    return height


def map_sizes(case: Case) -> Values:
    image = case["inputs"]["vgg16_input"]
    return {
        "vgg16_stride8": _side("vgg16", 8, image),
        "vgg16_stride16": _side("vgg16", 16, image),
        "googlenet_4e": _side("googlenet", 16, image),
        "googlenet_5b": _side("googlenet", 32, image),
        "resnet50_acol_stride16": _side("resnet50", 16, image),
        "resnet50_acol_stride8": _side("resnet50", 8, image),
        "inception_v3_mixed6e_stride16": _side("inception_v3", 16, image),
        "inception_v3_mixed6e_stride8": _side("inception_v3", 8, image),
        "variant_resnet": [_side("resnet50", 32, size) for size in case["inputs"]["resnet_inputs"]],
    }


ADAPTERS: dict[str, Callable[[Case], Values]] = {
    "cam_equals_score_map_channel": class_channel,
    "erase_mask_delta": erasing,
    "rest_cross_entropy": rest,
    "rest_cross_entropy_overflow": rest,
    "rest_cross_entropy_lower_bound": rest,
    "acol_forward_loss_grad_delta": two_branches,
    "acol_erase_class_predicted_vs_label": erased_class,
    "variant_p_delta_none": chain,
    "variant_pp_delta": chain,
    "variant_pn_delta": chain,
    "variant_ppn_delta": chain,
    "param_counts": parameter_counts,
    "feature_map_sizes": map_sizes,
}
