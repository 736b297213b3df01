"""ZAQ's quantizers, ranges, folding and attachment: from golden cases to lightning_modules.zaq."""

import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_modules.supervised.cifar import resnet20
from lightning_modules.zaq import ZAQ
from lightning_modules.zaq.attach import named_ranges, quantize_model
from lightning_modules.zaq.folding import fold_batchnorm, fold_batchnorm_into_scale
from lightning_modules.zaq.observers import ActivationQuantizer, Observer
from lightning_modules.zaq.quantizers import (
    QuantConv2d,
    QuantizedLayer,
    QuantLinear,
    QuantSpec,
    affine_qparams,
    dequantize,
    extremes,
    fake_quantize,
    fake_quantize_minmax,
    integer_range,
    quantize,
)
from tests.golden_adapters.zaq_methods import load_reference_generator
from tests.scripted import Rows, fit_one_epoch

Case = dict[str, Any]
Values = dict[str, Any]


def _tensor(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)


# ------------------------------------------------------------------ fake quantization
def asymmetric(case: Case) -> Values:
    given = case["inputs"]
    x = _tensor(given["x"]).requires_grad_()
    bits = given["num_bits"]
    scale, zero_point = affine_qparams(_tensor(given["x_min"]), _tensor(given["x_max"]), bits)
    codes = quantize(x, scale, zero_point, *integer_range(bits))
    y = fake_quantize(x, scale, zero_point, *integer_range(bits))
    assert torch.equal(y, dequantize(codes, scale, zero_point))
    (_tensor(given["w"]) * y).sum().backward()
    return {"scale": scale, "zero_point": zero_point, "q": codes, "y": y, "grad": x.grad}


def straight_through(case: Case) -> Values:
    given = case["inputs"]
    bits = given["num_bits"]
    scale, zero_point = affine_qparams(_tensor(given["x_min"]), _tensor(given["x_max"]), bits)
    found: Values = {}
    for ste in ("identity", "clipped"):
        x = _tensor(given["x"]).requires_grad_()
        found["y"] = fake_quantize(x, scale, zero_point, *integer_range(bits), ste=ste)
        found[f"grad_{ste}"] = torch.autograd.grad(found["y"].sum(), x)[0]
    return found


def over_range(**options: bool) -> Callable[[Case], Values]:
    def run(case: Case) -> Values:
        given = case["inputs"]
        lo, hi = (_tensor(given[key]) if key in given else None for key in ("x_min", "x_max"))
        x, bits = _tensor(given["x"]), given["num_bits"]
        found: Values = {"y": fake_quantize_minmax(x, bits, lo, hi, **options)}
        if options.get("narrow_range"):
            found["scale"] = affine_qparams(*extremes(x), bits, **options)[0]
        return found

    return run


def rounding_ties(case: Case) -> Values:
    given = case["inputs"]
    scale, zero_point = _tensor(given["scale"]), _tensor(given["zero_point"])
    codes = quantize(_tensor(given["x"]), scale, zero_point, given["qmin"], given["qmax"])
    return {"q": codes, "y": dequantize(codes, scale, zero_point)}


def level_counts(case: Case) -> Values:
    x = torch.linspace(-1, 1, 5000)
    found: Values = {"asym": [], "narrow": []}
    for bits in case["inputs"]["num_bits"]:
        found["asym"].append(len(fake_quantize_minmax(x + 1, bits).unique()))
        narrow = fake_quantize_minmax(x, bits, symmetric=True, narrow_range=True)
        found["narrow"].append(len(narrow.unique()))
    return found


# ------------------------------------------------------------------ layers
@torch.no_grad()
def _filled(layer: QuantizedLayer, given: Values) -> QuantizedLayer:
    layer.weight.copy_(_tensor(given["weight"]))
    if given.get("bias") is None:
        layer.bias = None
    else:
        layer.bias.copy_(_tensor(given["bias"]))  # type: ignore[operator,union-attr]
    return layer


def convolution(case: Case) -> Values:
    given = case["inputs"]
    c_out, c_in, *kernel = _tensor(given["weight"]).shape
    geometry = {
        key: given[key] for key in ("stride", "padding", "dilation", "groups") if key in given
    }
    c_in *= geometry.get("groups", 1)
    spec = QuantSpec(given["num_bits"])
    layer = _filled(QuantConv2d(c_in, c_out, tuple(kernel), spec=spec, **geometry), given)
    out = layer(_tensor(given["x"]))
    out.square().mean().backward()
    scale, zero_point = layer.qparams()
    return {
        "weight_q": layer.quantized_weight(),
        "scale": scale,
        "zero_point": zero_point,
        "out": out,
        "weight_grad": layer.weight.grad,
    }


def linear(case: Case) -> Values:
    given = case["inputs"]
    d_out, d_in = _tensor(given["weight"]).shape
    layer = _filled(QuantLinear(d_in, d_out, spec=QuantSpec(given["num_bits"])), given)
    return {"out": layer(_tensor(given["x"]))}


# ------------------------------------------------------------------ activation ranges
def observed(observer: Observer) -> Callable[[Case], Values]:
    def run(case: Case) -> Values:
        given = case["inputs"]
        options = {"momentum": given["momentum"]} if "momentum" in given else {}
        quantizer = ActivationQuantizer(given.get("num_bits", 8), observer, **options)
        ranges, out = [], None
        for batch in given["batches"]:
            out = quantizer(_tensor(batch))
            ranges.append([quantizer.lo.item(), quantizer.hi.item()])
        return {"ranges": ranges, "out_last": out}

    return run


def unmoved_in_evaluation(case: Case) -> Values:
    given = case["inputs"]
    quantizer = ActivationQuantizer(given["num_bits"])
    quantizer(_tensor(given["train_batch"]))
    quantizer.eval()
    out = quantizer(_tensor(given["eval_batch"]))
    return {"range_after": [quantizer.lo.item(), quantizer.hi.item()], "y_eval": out}


# ------------------------------------------------------------------ folding
def _norm(given: Values) -> dict[str, Any]:
    values = {key: _tensor(given[key]) for key in ("gamma", "beta", "mean", "var")}
    bias = None if given.get("bias") is None else _tensor(given["bias"])
    return {**values, "eps": given.get("eps", 1e-5), "bias": bias}


def folded(case: Case) -> Values:
    given = case["inputs"]
    weight, bias = fold_batchnorm(_tensor(given["weight"]), **_norm(given))
    return {"weight": weight, "bias": bias}


def folded_into_scale(case: Case) -> Values:
    given = case["inputs"]
    weight, bits = _tensor(given["weight"]), given["num_bits"]
    scale, zero_point = affine_qparams(
        *extremes(weight, 0), bits, symmetric=True, narrow_range=True
    )
    codes = quantize(weight, scale, zero_point, *integer_range(bits, narrow_range=True), 0)
    codes, scale, bias = fold_batchnorm_into_scale(codes, scale, **_norm(given))
    weight = dequantize(codes, scale, torch.zeros_like(scale), 0)
    return {"q": codes, "scale": scale, "bias": bias, "dequantised": weight}


# ------------------------------------------------------------------ attachment
def layout(case: Case) -> Values:
    def count(shared: bool) -> Counter[type[nn.Module]]:
        model = quantize_model(resnet20(), 4, 4, share_relu_ranges=shared)
        return Counter(type(module) for module in model.modules())

    shared = count(True)
    return {
        "quant_conv": shared[QuantConv2d],
        "quant_linear": shared[QuantLinear],
        "quant_act_reference": shared[ActivationQuantizer],
        "relu_call_sites": count(False)[ActivationQuantizer],
        "batchnorm_kept": shared[nn.BatchNorm2d],
    }


# ------------------------------------------------------------------ one round of the game
class _TinyNet(nn.Module):
    def __init__(self, given: Values) -> None:
        super().__init__()
        shapes = {
            key: _tensor(given[f"p.{key}.weight"]).shape for key in ("conv1", "conv2", "linear")
        }
        self.conv1 = nn.Conv2d(shapes["conv1"][1], shapes["conv1"][0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(shapes["conv1"][0])
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(
            shapes["conv2"][1], shapes["conv2"][0], 3, stride=2, padding=1, bias=False
        )
        self.bn2 = nn.BatchNorm2d(shapes["conv2"][0])
        self.relu2 = nn.ReLU()
        self.linear = nn.Linear(shapes["linear"][1], shapes["linear"][0])
        state = {k.removeprefix("p."): _tensor(v) for k, v in given.items() if k.startswith("p.")}
        missing = self.load_state_dict(state, strict=False).missing_keys
        assert all("num_batches_tracked" in key for key in missing)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu1(self.bn1(self.conv1(x)))
        x = self.relu2(self.bn2(self.conv2(x)))
        return self.linear(x.mean((2, 3)))


def one_round(case: Case) -> Values:
    """A batch of the module, with the latents of the case in the place of its own draws."""
    given = case["inputs"]
    student_latents, generator_latent = given["z"][:-1], given["z"][-1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = ZAQ(
            num_classes=len(given["p.linear.weight"]),
            network=_TinyNet(given),
            image_size=given["img_size"],
            latent_dim=given["latent_dim"],
            ngf=given["ngf"],
            taps=["relu1", "relu2"],
            preset="released",
            epochs=1,
            iterations=1,
            q_steps=len(student_latents),
        )
        generator: Any = module.generators["zaq_W4A4"]
        load_reference_generator(generator, given)
        latents = {f"latent student {k}": z for k, z in enumerate(student_latents)}
        latents["latent generator"] = generator_latent
        module.draw = lambda purpose, *args: _tensor(latents[purpose])  # type: ignore[method-assign]
        module.setup = lambda stage: None  # type: ignore[method-assign]
        losses: list[dict[str, Tensor]] = []
        minimize = module._minimize

        def noted(chosen: Any, terms: dict[str, Tensor]) -> Tensor:
            losses.append(terms)
            return minimize(chosen, terms)

        module._minimize = noted  # type: ignore[method-assign, assignment]
        rows = len(generator_latent)
        fit_one_epoch(module, Rows(torch.zeros(rows, 1), torch.zeros(rows)), rows)
    student: Any = module.students["zaq_W4A4"]
    state, ranges = student.state_dict(), named_ranges(student)
    totals = [torch.stack(list(terms.values())).sum() for terms in losses]
    return {
        "loss_q": totals[:-1],
        "loss_g": totals[-1],
        "q_conv1_weight": state["conv1.weight"],
        "q_linear_weight": state["linear.weight"],
        "q_bn1_running_mean": state["bn1.running_mean"],
        "q_bn2_running_var": state["bn2.running_var"],
        "act1_max": [ranges["relu1"][1]],
        "act2_max": [ranges["relu2"][1]],
        "grad_g_fc_weight": generator.project.weight.grad,
        "grad_g_last_conv": generator.to_image[0].weight.grad,
    }


QUANTIZATION: dict[str, Callable[[Case], Values]] = {
    "fakequant_asym_tensor": asymmetric,
    "fakequant_ste_clip": straight_through,
    "fakequant_asym_constant_input": over_range(),
    "fakequant_asym_all_zero": over_range(),
    "fakequant_relu_act": over_range(),
    "fakequant_symmetric_full_range": over_range(symmetric=True),
    "fakequant_symmetric_narrow": over_range(symmetric=True, narrow_range=True),
    "fakequant_asym_float_zero_point": over_range(integer_zero_point=False),
    "onnx_rounding_ties": rounding_ties,
    "clipping_bins_counts": level_counts,
    "quant": convolution,
    "quant_linear_perchannel": linear,
    "act_range_running_minmax": observed("minmax"),
    "act_range_ema": observed("ema"),
    "act_range_ema_gdfq_bug": observed("ema_gdfq"),
    "eval_must_not_move_ranges": unmoved_in_evaluation,
    "bn_fold": folded,
    "bn_fold_into_scale": folded_into_scale,
    "quantized": layout,
    "zaq_two_q_steps_one_g_step": one_round,
}
# The collector looks for ADAPTERS in every module of the package; zaq.py has them.
ADAPTERS: dict[str, Any] = {}
