import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_modules.zaq.folding import fold_batchnorm, fold_batchnorm_into_scale
from lightning_modules.zaq.quantizers import (
    QuantConv2d,
    QuantConvTranspose2d,
    QuantizedLayer,
    QuantLinear,
    QuantSpec,
    affine_qparams,
    dequantize,
    fake_quantize,
    fake_quantize_minmax,
    integer_range,
    quantize,
    quantized_layer,
)


@pytest.mark.parametrize("ste", ["identity", "clipped"])
def test_torch_agrees_also_on_ties_and_beyond_the_range(ste: Any) -> None:
    x = torch.cat([torch.randn(500), torch.arange(-9, 9) * 0.25]).requires_grad_()
    scale, zero_point = torch.tensor(0.5), torch.tensor(3.0)
    ours = fake_quantize(x, scale, zero_point, 0, 15, ste=ste)
    theirs = torch.fake_quantize_per_tensor_affine(x, 0.5, 3, 0, 15)
    assert torch.equal(ours, theirs)
    weights = torch.randn(len(x))
    gradients = [torch.autograd.grad((y * weights).sum(), x)[0] for y in (ours, theirs)]
    torch.testing.assert_close(gradients[0], weights if ste == "identity" else gradients[1])


def test_channels_away_from_zero_keep_their_resolution() -> None:
    x = torch.stack([torch.linspace(5, 6, 16), torch.linspace(-1, 1, 16)])
    y = fake_quantize_minmax(x, 4, ch_axis=0)
    assert (y - x).abs().amax(1).max() < 0.07
    assert (fake_quantize_minmax(x, 4, ch_axis=0, include_zero=True) - x)[0].abs().max() > 0.1


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("value", [0.0, 0.3, -7.0, 1e4])
def test_constant_tensors_are_finite_and_kept(value: float, symmetric: bool) -> None:
    x = torch.full((5,), value)
    y = fake_quantize_minmax(x, 4, symmetric=symmetric, narrow_range=symmetric)
    torch.testing.assert_close(y, x, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("bits", range(2, 9))
def test_narrow_symmetric_codes_mirror(bits: int) -> None:
    x = torch.randn(400)
    y = fake_quantize_minmax(x, bits, symmetric=True, narrow_range=True)
    assert torch.equal(fake_quantize_minmax(-x, bits, symmetric=True, narrow_range=True), -y)
    assert y.abs().max() == pytest.approx(x.abs().max())


def test_zero_is_on_the_grid_if_included() -> None:
    lo, hi = torch.tensor([0.3, -2.0, -1.0]), torch.tensor([0.9, -1.0, 2.0])
    scale, zero_point = affine_qparams(lo, hi, 4, signed=False, include_zero=True)
    assert ((zero_point >= 0) & (zero_point <= 15)).all()
    zeros = torch.zeros(3, 1)
    codes = quantize(zeros, scale, zero_point, *integer_range(4, signed=False), 0)
    assert torch.equal(dequantize(codes, scale, zero_point, 0), zeros)


def test_one_bit_has_no_symmetric_codes() -> None:
    with pytest.raises(ValueError, match="num_bits=1 has no positive code"):
        fake_quantize_minmax(torch.randn(3), 1, symmetric=True)
    assert len(fake_quantize_minmax(torch.randn(30), 1).unique()) == 2


@pytest.mark.parametrize("bits", [1, 9, 0, True, 4.0, "4"])
def test_impossible_bits(bits: Any) -> None:
    with pytest.raises(ValueError, match=r"bits=.* from 2 to 8"):
        QuantSpec(bits)


def test_unknown_estimator() -> None:
    with pytest.raises(ValueError, match="unknown ste='round'; choose one of identity, clipped"):
        QuantSpec(4, ste="round")  # type: ignore[arg-type]


def test_half_precision_is_left_for_the_grid() -> None:
    x = torch.randn(100).bfloat16()
    assert torch.equal(fake_quantize_minmax(x, 8), fake_quantize_minmax(x.float(), 8))
    layer = QuantConv2d(3, 4, 3, spec=QuantSpec(8))
    images = torch.randn(2, 3, 6, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer(images), layer(images.float()))
        assert layer(images).dtype == torch.float32


LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "conv": (nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=False), (2, 4, 7, 7)),
    "grouped": (nn.Conv2d(4, 6, 3, groups=2, dilation=2), (2, 4, 7, 7)),
    "depthwise": (nn.Conv2d(4, 8, 3, groups=4, padding=1), (2, 4, 7, 7)),
    "reflected": (nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (2, 4, 7, 7)),
    "conv1d": (nn.Conv1d(4, 6, 3, padding="same"), (2, 4, 7)),
    "transposed": (
        nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1),
        (2, 4, 5, 5),
    ),
    "grouped_transposed": (nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), (2, 4, 5, 5)),
    "linear": (nn.Linear(4, 6), (2, 5, 4)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_do_what_the_float_layer_does_with_rounded_weights(name: str) -> None:
    float_layer, shape = LAYERS[name]
    layer = quantized_layer(float_layer, QuantSpec(3))
    assert layer.weight is float_layer.weight, "parameters are shared"
    assert layer.state_dict().keys() == float_layer.state_dict().keys()
    rounded = copy.deepcopy(float_layer)
    rounded.weight.data = layer.quantized_weight().data
    assert not torch.equal(rounded.weight, layer.weight)
    x = torch.randn(shape)
    out = layer(x)
    torch.testing.assert_close(out, rounded(x))
    out.square().sum().backward()
    rounded(x).square().sum().backward()
    torch.testing.assert_close(layer.weight.grad, rounded.weight.grad)
    layer.weight.grad = None


@pytest.mark.parametrize("name", LAYERS)
def test_a_scale_for_every_output_channel(name: str) -> None:
    layer = quantized_layer(LAYERS[name][0], QuantSpec(4))
    rows = layer.channels_first(layer.weight)
    scale, zero_point = layer.qparams()
    assert (
        len(scale)
        == len(rows)
        == LAYERS[name][0](torch.randn(LAYERS[name][1]))
        .movedim(1 if name != "linear" else -1, 0)
        .shape[0]
    )
    torch.testing.assert_close(
        scale, (rows.amax(tuple(range(1, rows.ndim))) - rows.flatten(1).amin(1)) / 15
    )
    torch.testing.assert_close(
        layer.channels_back(dequantize(layer.codes(), scale, zero_point, 0)),
        layer.quantized_weight(),
    )
    assert torch.equal(layer.channels_back(rows), layer.weight)
    whole = quantized_layer(LAYERS[name][0], QuantSpec(4, per_channel=False))
    assert len(whole.quantized_weight().unique()) <= 16


def test_output_size_of_transposed_convolutions() -> None:
    layer = QuantConvTranspose2d(2, 3, 3, stride=2)
    assert layer(torch.randn(1, 2, 4, 4), output_size=[10, 10]).shape == (1, 3, 10, 10)


def test_unknown_layers_are_refused() -> None:
    class Standardized(nn.Conv2d):
        pass

    for layer in (Standardized(2, 2, 1), nn.Conv3d(2, 2, 1)):
        with pytest.raises(TypeError, match="has no quantized counterpart; Conv1d, Conv2d"):
            quantized_layer(layer, QuantSpec())


def norm_values(channels: int) -> dict[str, torch.Tensor]:
    return {
        "gamma": torch.randn(channels),
        "beta": torch.randn(channels),
        "mean": torch.randn(channels),
        "var": torch.rand(channels) + 0.1,
    }


@pytest.mark.parametrize("with_bias", [True, False])
def test_folding_changes_no_output(with_bias: bool) -> None:
    layer: QuantizedLayer = QuantLinear(5, 4, spec=QuantSpec(3))
    values = norm_values(4)
    bias = torch.randn(4) if with_bias else None
    x = torch.randn(7, 5)
    expected = F.batch_norm(
        F.linear(x, layer.quantized_weight(), bias),
        *(values[key] for key in ("mean", "var", "gamma", "beta")),
    )
    weight, folded = fold_batchnorm(layer.quantized_weight(), bias, **values)
    torch.testing.assert_close(F.linear(x, weight, folded), expected)
    scale, zero_point = layer.qparams()
    centered = layer.codes() - zero_point[:, None]
    codes, scale, folded = fold_batchnorm_into_scale(centered, scale, **values, bias=bias)
    torch.testing.assert_close(F.linear(x, codes * scale[:, None], folded), expected)
    assert torch.equal(codes.abs(), centered.abs())
    assert (scale > 0).all()
