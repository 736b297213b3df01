"""ZAQ and its baselines apart from the quantizers: from golden cases to lightning_modules.zaq."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_modules.supervised import cifar
from lightning_modules.zaq.aciq import (
    aciq_alpha,
    aciq_clip_range,
    aciq_mse,
    allocate_bits,
    quantize_weight,
    restore_weight_moments,
    tensor_statistics,
)
from lightning_modules.zaq.dfq import (
    FoldedModel,
    absorb_high_bias,
    bias_correction,
    cross_layer_equalize,
    equalize_model,
    fold_model,
)
from lightning_modules.zaq.gdfq import gdfq_student_loss
from lightning_modules.zaq.generators import (
    CategoricalConditionalBatchNorm2d,
    GDFQGenerator,
    ZAQGenerator,
)
from lightning_modules.zaq.layer_weights import LayerWeightEMA
from lightning_modules.zaq.losses import (
    activation_regularizer,
    channel_relation,
    channel_relation_map,
    crm_distance,
    feature_discrepancy,
    output_discrepancy,
    spatial_relation,
    zaq_generator_loss,
    zaq_student_loss,
)
from lightning_modules.zaq.moments import (
    bn_activation_range,
    clipped_normal_mean,
    clipped_normal_var,
)
from lightning_modules.zaq.zeroq import (
    allocate_mixed_precision,
    bn_statistics_loss,
    layer_sensitivity,
    zeroq_input_loss,
)

Case = dict[str, Any]
Values = dict[str, Any]


def _tensor(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _tensors(case: Case, *names: str) -> list[Tensor]:
    return [_tensor(case["inputs"][name]) for name in names]


def _features(case: Case) -> tuple[list[Tensor], list[Tensor]]:
    feats_p, feats_q = (
        [_tensor(values) for values in case["inputs"][name]] for name in ("feats_p", "feats_q")
    )
    return feats_p, [feat.requires_grad_() for feat in feats_q]


# ------------------------------------------------------------------ ZAQ
def relation_map(mode: str) -> Callable[[Case], Values]:
    def adapter(case: Case) -> Values:
        (feat,) = _tensors(case, "feat")
        return {"crm": channel_relation_map(feat, mode)}  # type: ignore[arg-type]

    return adapter


def relation_distance(mode: str) -> Callable[[Case], Values]:
    def adapter(case: Case) -> Values:
        feat_p, feat_q = _tensors(case, "feat_p", "feat_q")
        distance = crm_distance(feat_p, feat_q.requires_grad_(), mode)  # type: ignore[arg-type]
        (gradient,) = torch.autograd.grad(distance, feat_q)
        return {"distance": distance, "grad_feat_q": gradient}

    return adapter


def layer_weights(case: Case) -> Values:
    inputs = case["inputs"]
    options = {key: inputs[key] for key in ("momentum", "temperature") if key in inputs}
    weights = LayerWeightEMA(len(inputs["distances"][0]), **options)
    return {"weights": [weights.update(torch.tensor(d)) for d in inputs["distances"]]}


def outputs(case: Case) -> Values:
    return {"value": output_discrepancy(*_tensors(case, "logits_p", "logits_q"))}


def features_crm(case: Case) -> Values:
    feats, weights = _features(case), _tensor(case["inputs"]["weights"])
    return {
        "batch": feature_discrepancy(*feats, weights, "crm", "batch"),
        "sample": feature_discrepancy(*feats, weights, "crm", "sample"),
    }


def features_scrm(case: Case) -> Values:
    feats_p, feats_q = _features(case)
    value = feature_discrepancy(feats_p, feats_q, kind="scrm", gamma=case["inputs"]["gamma"])
    return {"value": value, "grads": list(torch.autograd.grad(value, feats_q))}


def scrm_maps(case: Case) -> Values:
    (feat,), gamma = _tensors(case, "feat"), case["inputs"]["gamma"]
    return {"spatial": spatial_relation(feat, gamma), "channel": channel_relation(feat, gamma)}


def regularizer(case: Case) -> Values:
    return {"value": activation_regularizer(*_tensors(case, "feat"))}


def losses(case: Case) -> Values:
    inputs = case["inputs"]
    logits_p, logits_q = _tensors(case, "logits_p", "logits_q")
    networks = (logits_p, logits_q, *_features(case))
    alpha, beta = inputs["alpha"], inputs["beta"]
    kinds: dict[str, Any] = {
        "scrm": {"kind": "scrm"},
        "crm": {"kind": "crm", "weights": _tensor(inputs["weights"])},
    }
    values = {}
    for kind, options in kinds.items():
        values[f"loss_q_{kind}"] = zaq_student_loss(*networks, alpha, **options)["total"]
        values[f"loss_g_{kind}"] = zaq_generator_loss(*networks, alpha, beta, **options)["total"]
    return values


# ------------------------------------------------------------------ generators
def generator(case: Case) -> Values:
    inputs = dict(case["inputs"])
    batch = inputs.pop("batch")
    network = ZAQGenerator(**inputs)
    images = network(torch.zeros(batch, inputs["latent_dim"]))
    return {"num_params": _parameters(network), "out_shape": images.shape}


def generator_forward(case: Case) -> Values:
    inputs = case["inputs"]
    sizes = {name: inputs[name] for name in ("latent_dim", "ngf", "img_size")}
    network = ZAQGenerator(**sizes)
    load_reference_generator(network, inputs)
    z = torch.tensor(inputs["z"])
    return {"out_eval": network.eval()(z), "out_train": network.train()(z)}


def load_reference_generator(network: ZAQGenerator, inputs: Case) -> None:
    """Fills a generator from the entries ``g.`` of a case, whose layers come in the same order."""
    own = [name for name in network.state_dict() if not name.endswith("num_batches_tracked")]
    given = [values for name, values in inputs.items() if name.startswith("g.")]
    state = {name: torch.tensor(v) for name, v in zip(own, given, strict=True)}
    network.load_state_dict(state, strict=False)


def gdfq_generator(case: Case) -> Values:
    inputs = case["inputs"]
    network = GDFQGenerator(**inputs, conditioning="embed-multiply")
    images = network(torch.zeros(2, inputs["latent_dim"]), torch.zeros(2, dtype=torch.long))
    return {"num_params": _parameters(network), "out_shape": images.shape}


def gdfq_generator_imagenet(case: Case) -> Values:
    network = GDFQGenerator(**case["inputs"], conditioning="conditional-bn")
    return {"num_params": _parameters(network)}


def gdfq_norm(case: Case) -> Values:
    x = torch.tensor(case["inputs"]["x"])
    network = GDFQGenerator(2, ngf=x.shape[1], img_size=8, block_eps=case["inputs"]["eps"])
    norm: Any = network.blocks[1].norm
    return {"y": norm(x)}


def conditional_norm(case: Case) -> Values:
    x, weight, bias = _tensors(case, "x", "weight", "bias")
    norm = CategoricalConditionalBatchNorm2d(*weight.shape).double()
    norm.load_state_dict({"weight": weight, "bias": bias}, strict=False)
    return {"y": norm(x, torch.tensor(case["inputs"]["labels"]))}


def _parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def classifier(build: Callable[..., nn.Module]) -> Callable[[Case], Values]:
    def adapter(case: Case) -> Values:
        inputs = case["inputs"]
        network = build(num_classes=inputs["num_classes"]).eval()
        shapes: list[torch.Size] = []
        for tap in network.taps:  # type: ignore[union-attr]
            module = network.get_submodule(tap)
            module.register_forward_hook(lambda *args: shapes.append(args[-1].shape))
        with torch.no_grad():
            logits = network(
                torch.zeros(inputs["batch"], 3, inputs["img_size"], inputs["img_size"])
            )
        return {
            "num_params": _parameters(network),
            "feature_shapes": shapes,
            "logits_shape": logits.shape,
        }

    return adapter


# ------------------------------------------------------------------ DFQ
def equalized_pair(kind: str) -> Callable[[Case], Values]:
    def adapter(case: Case) -> Values:
        w1, b1, w2 = _tensors(case, "w1", "b1", "w2")
        groups = 1 if w2.shape[1] == len(w1) else len(w1)
        found = cross_layer_equalize(w1, b1, w2, groups, kind)  # type: ignore[arg-type]
        values = {
            "scale": found.scale,
            "scale_ref": 1 / found.scale,
            "w1": found.weight1,
            "b1": found.bias1,
            "w2": found.weight2,
        }
        if "bn_weight" in case["inputs"]:
            scaled = [value / found.scale for value in _tensors(case, "bn_weight", "bn_bias")]
            values |= dict(zip(("bn_weight", "bn_bias"), scaled, strict=True))
        return values

    return adapter


def equalized_chain(case: Case) -> Values:
    weights = _tensors(case, "w1", "w2", "w3")
    layers: list[nn.Module] = []
    for number, weight in enumerate(weights, 1):
        conv = nn.Conv2d(weight.shape[1], len(weight), tuple(weight.shape[2:])).double()  # type: ignore[arg-type]
        bias = case["inputs"].get(f"b{number}", [0.0] * len(weight))
        conv.load_state_dict({"weight": weight, "bias": _tensor(bias)})
        layers += [conv, nn.ReLU()]
    folded: FoldedModel = fold_model(nn.Sequential(*layers))
    equalize_model(folded)
    first, second, third = (folded.network.get_submodule(name) for name in ("0", "2", "4"))
    return {
        "w1": first.weight,
        "b1": first.bias,
        "w2": second.weight,
        "b2": second.bias,
        "w3": third.weight,
    }


def absorption(case: Case) -> Values:
    b1, b2, w2, mean, std = _tensors(case, "b1", "b2", "w2", "bn_mean", "bn_std")
    c, b1, b2 = absorb_high_bias(b1, b2, w2, mean, std, case["inputs"]["n"])
    return {"c": c, "b1": b1, "b2": b2}


def clipped_moments(case: Case) -> Values:
    mean, std = _tensors(case, "mean", "std")
    return {
        "mean_relu": clipped_normal_mean(mean, std),
        "var_relu": clipped_normal_var(mean, std),
        "mean_relu6": clipped_normal_mean(mean, std, high=6.0),
    }


def correction(case: Case) -> Values:
    return {"delta_b": bias_correction(*_tensors(case, "weight", "weight_q", "expected_input"))}


def norm_range(case: Case) -> Values:
    mean, std = _tensors(case, "mean", "std")
    n = case["inputs"]["n"]
    return {
        "relu": bn_activation_range(mean, std, n),
        "linear": bn_activation_range(mean, std, n, relu=False),
    }


# ------------------------------------------------------------------ ACIQ
def alphas(distribution: Any) -> Callable[[Case], Values]:
    def adapter(case: Case) -> Values:
        widths = case["inputs"]["num_bits"]
        return {
            "alpha": [aciq_alpha(bits, distribution) for bits in widths],
            "alpha_positive": [aciq_alpha(bits, distribution, positive=True) for bits in widths],
        }

    return adapter


def clipping_error(case: Case) -> Values:
    (alpha,), bits = _tensors(case, "alpha"), case["inputs"]["num_bits"]
    return {
        "laplace": aciq_mse(alpha, bits, "laplace"),
        "gauss": aciq_mse(alpha, bits, "gauss"),
    }


def bit_allocation(case: Case) -> Values:
    (std,), target = _tensors(case, "std"), case["inputs"]["target_bits"]
    return {
        "bits": allocate_bits(std, target),
        "bits_single_pass": allocate_bits(std, target, max_passes=1),
    }


def weight_correction(case: Case) -> Values:
    (weight,) = _tensors(case, "weight")
    rounded = quantize_weight(weight, case["inputs"]["num_bits"])
    return {
        "weight_q": rounded,
        "mean_corrected": restore_weight_moments(weight, rounded, variance=False),
        "var_mean_corrected": restore_weight_moments(weight, rounded),
    }


def clip_range(case: Case) -> Values:
    (x,), bits = _tensors(case, "x"), case["inputs"]["num_bits"]
    found = tensor_statistics(x)
    return {
        "b": found.b,
        "mu": found.mean,
        "symmetric": aciq_clip_range(x, bits, "laplace"),
        "positive": aciq_clip_range(found, bits, "laplace", positive=True),
    }


# ------------------------------------------------------------------ ZeroQ and GDFQ
def statistics_zeroq(case: Case) -> Values:
    feat, mean, var = _tensors(case, "feat", "running_mean", "running_var")
    mean_loss, std_loss = bn_statistics_loss(feat, mean, var)
    return {"mean_loss": mean_loss, "std_loss": std_loss}


def statistics_gdfq(case: Case) -> Values:
    feat, mean, var = _tensors(case, "feat", "running_mean", "running_var")
    mean_loss, var_loss = bn_statistics_loss(feat, mean, var, "gdfq")
    return {"value": mean_loss + var_loss}


def input_prior(case: Case) -> Values:
    return {"value": zeroq_input_loss(*_tensors(case, "x"))}


def sensitivity(case: Case) -> Values:
    return {"omega": layer_sensitivity(*_tensors(case, "logits_fp", "logits_q"))}


def mixed_precision(case: Case) -> Values:
    return allocate_mixed_precision(**case["inputs"])._asdict()


def distillation(case: Case) -> Values:
    inputs = case["inputs"]
    student, teacher = _tensors(case, "student", "teacher")
    labels, options = torch.tensor(inputs["labels"]), (inputs["temperature"], inputs["alpha"])
    return {
        "mean": gdfq_student_loss(student, teacher, labels, *options, "mean")["total"],
        "batchmean": gdfq_student_loss(student, teacher, labels, *options, "batchmean")["total"],
    }


METHODS: dict[str, Callable[[Case], Values]] = {
    "crm_sample": relation_map("sample"),
    "crm_batch": relation_map("batch"),
    "crm_dead_channel": relation_map("batch"),
    "crm_distance_sample": relation_distance("sample"),
    "crm_distance_batch": relation_distance("batch"),
    "layer_weight_ema": layer_weights,
    "layer_weight_softmax_temperature": layer_weights,
    "output_discrepancy": outputs,
    "feature_discrepancy_crm": features_crm,
    "feature_discrepancy_scrm": features_scrm,
    "scrm_maps": scrm_maps,
    "activation_regularizer": regularizer,
    "zaq_losses": losses,
    "zaq_generator": generator,
    "zaq_generator_forward": generator_forward,
    "gdfq_generator_cifar": gdfq_generator,
    "gdfq_generator_imagenet": gdfq_generator_imagenet,
    "gdfq_bn_eps": gdfq_norm,
    "conditional_batchnorm": conditional_norm,
    "resnet20": classifier(cifar.resnet20),
    "resnet18_cifar": classifier(cifar.resnet18_cifar),
    "resnet50_cifar": classifier(cifar.resnet50_cifar),
    "mobilenetv2_cifar": classifier(cifar.mobilenetv2_cifar),
    "vgg19_cifar": classifier(cifar.vgg19_cifar),
    "cle_pair_maxabs": equalized_pair("maxabs"),
    "cle_pair_range": equalized_pair("minmax"),
    "cle_pair_depthwise": equalized_pair("maxabs"),
    "cle_chain_converged": equalized_chain,
    "bias_absorption": absorption,
    "clipped_normal_moments": clipped_moments,
    "bias_correction": correction,
    "dfq_activation_range": norm_range,
    "aciq_alpha_laplace": alphas("laplace"),
    "aciq_alpha_gauss": alphas("gauss"),
    "aciq_mse": clipping_error,
    "aciq_bit_alloc": bit_allocation,
    "aciq_weight_quant_and_correction": weight_correction,
    "aciq_clip_range": clip_range,
    "zeroq_bns_layer": statistics_zeroq,
    "zeroq_input_prior": input_prior,
    "zeroq_sensitivity": sensitivity,
    "zeroq_pareto": mixed_precision,
    "gdfq_bns_layer": statistics_gdfq,
    "gdfq_kd_loss": distillation,
}

# The collector looks for ADAPTERS in every module of the package; zaq.py has them.
ADAPTERS: dict[str, Any] = {}
