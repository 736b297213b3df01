"""Backbones fit torchvision's weights; the chain erases and differentiates as it should."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import get_model

from lightning_modules.acol.losses import rest_cross_entropy
from lightning_modules.acol.networks import (
    STRIDES,
    Backbone,
    ErasingNetwork,
    MapHead,
    build_backbone,
)


def chain(recipe: str = "pp", deltas: tuple[float, ...] = (0.6,), depth: int = 1) -> ErasingNetwork:
    torch.manual_seed(0)
    identity = Backbone("small", nn.Identity(), 5, 1)
    return ErasingNetwork(identity, 3, recipe, deltas, head_width=6, head_depth=depth)


def features() -> Tensor:
    return torch.rand(4, 5, 6, 6, generator=torch.Generator().manual_seed(1))


LABELS = torch.tensor([0, 1, 2, 1])


@pytest.mark.parametrize("name", [name for name in STRIDES if name != "small"])
def test_parameters_are_named_and_shaped_as_torchvisions(name: str) -> None:
    with torch.device("meta"):
        own = build_backbone(name, pool="torchvision").layers.state_dict()
        options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
        original = get_model(name, **options)
    theirs = (original.features if name == "vgg16" else original).state_dict()
    assert len(own) > 20
    assert {key: value.shape for key, value in own.items()} == {
        key: theirs[key].shape for key in own
    }


@pytest.mark.parametrize("stride", [4, 8, 16])
def test_small_backbone(stride: int) -> None:
    backbone = build_backbone("small", stride, width=4, norm="group")
    maps = backbone(torch.rand(2, 1, 64, 64))
    assert maps.shape == (2, backbone.num_channels, 64 // stride, 64 // stride)


def test_vgg16_pools() -> None:
    def windows(pool: str) -> list[tuple[int, int]]:
        with torch.device("meta"):
            layers = build_backbone("vgg16", pool=pool).layers  # type: ignore[arg-type]
        pools = [layer for layer in layers.modules() if isinstance(layer, nn.MaxPool2d)]
        return [(layer.kernel_size, layer.stride) for layer in pools]  # type: ignore[misc]

    assert windows("acol") == [(3, 2)] * 3 + [(3, 1)] * 2
    assert windows("torchvision") == [(2, 2)] * 3 + [(3, 1)] * 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "vgg61"}, "unknown backbone='vgg61' .*choose one of small, vgg16, resnet18"),
        ({"name": "vgg16", "stride": 4}, "vgg16 has no stride=4 .*choose 8, 16, 32"),
        ({"name": "vgg16", "pool": "mean"}, "unknown pool='mean'; choose one of acol, torchvision"),
        ({"name": "small", "pretrained": True}, "no pretrained weights for backbone 'small'"),
    ],
)
def test_impossible_backbones(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_backbone(**arguments)  # type: ignore[arg-type]


def test_pretrained_weights(tmp_path: Path) -> None:
    original = get_model("resnet18")
    file = tmp_path / "weights.pth"
    torch.save(original.state_dict(), file)
    backbone = build_backbone("resnet18", 32, pretrained=True, weights_path=str(file)).eval()
    images = torch.rand(1, 3, 64, 64)
    mean, std = (torch.tensor(v)[:, None, None] for v in backbone.statistics)
    original.fc = nn.Identity()
    with torch.no_grad():
        expected = original.eval()((images - mean) / std)
        torch.testing.assert_close(backbone(images).mean((-2, -1)), expected)
    with pytest.raises(RuntimeError, match="does not hold the weights of resnet50"):
        build_backbone("resnet50", pretrained=True, weights_path=str(file))
    with pytest.raises(FileNotFoundError, match=r"not at .*nothing\.pth.*--model.weights_path"):
        build_backbone("resnet18", pretrained=True, weights_path=str(tmp_path / "nothing.pth"))


# ------------------------------------------------------------------ the chain
def test_loss_of_b_reaches_the_features_only_where_they_were_kept() -> None:
    network, x = chain(depth=0), features().requires_grad_()
    _, b = network(x, LABELS)
    F.cross_entropy(b.logits, LABELS).backward()
    touched = x.grad.abs().sum(1) > 0  # type: ignore[union-attr]
    assert torch.equal(touched, b.visible)
    assert 0 < touched.float().mean() < 1
    assert all(p.grad is None for p in network.heads[0].parameters())
    assert all(p.grad is not None for p in network.heads[1].parameters())


def test_loss_of_a_does_not_know_b() -> None:
    network, x = chain(), features().requires_grad_()
    a, b = network(x, LABELS)
    assert not a.attention.requires_grad
    assert not b.attention.requires_grad
    F.cross_entropy(a.logits, LABELS).backward()
    assert all(p.grad is None for p in network.heads[1].parameters())
    assert (x.grad.abs().sum(1) > 0).all()  # type: ignore[union-attr]


def test_erasures_accumulate_and_erased_locations_stay_erased() -> None:
    a, b, c = chain("ppn", (0.7, 0.5))(features(), LABELS)
    assert a.visible.all()
    assert (c.visible <= b.visible).all()
    assert c.visible.sum() < b.visible.sum() < a.visible.sum()
    assert torch.equal(b.visible, a.attention < 0.7)
    assert torch.equal(c.visible, b.visible & (b.attention < 0.5))


def test_b_sees_zeros_where_a_looked() -> None:
    network = chain()
    x = features()
    a, b = network(x, LABELS)
    kept = x * (a.attention < 0.6)[:, None]
    torch.testing.assert_close(b.maps, network.heads[1](kept))


def test_n_stages_have_no_part_in_the_fused_map() -> None:
    network = chain("pn", (0.6, 0.9))
    maps = network.class_maps(features(), LABELS[:, None])
    assert torch.equal(network.fuse(maps), maps[0])
    pp = chain("pp")
    a, b = maps = pp.class_maps(features(), LABELS[:, None])
    assert torch.equal(pp.fuse(maps), torch.maximum(a, b))
    assert not torch.equal(pp.fuse(maps), a)


def test_n_stage_learns_the_other_classes() -> None:
    network, x = chain("pn", depth=0), features()
    x[range(4), LABELS] += 1
    optimizer = torch.optim.SGD(network.parameters(), lr=1.0)
    for _ in range(60):
        a, b = network(x, LABELS)
        loss = F.cross_entropy(a.logits, LABELS) + rest_cross_entropy(b.logits, LABELS)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    of_label = [stage.logits.softmax(1)[range(4), LABELS].mean() for stage in (a, b)]
    assert of_label[0] > 0.6
    assert of_label[1] < 0.2


def test_each_class_is_erased_for_its_own_map() -> None:
    network, x = chain(), features()
    classes = torch.tensor([[0, 1], [1, 2], [2, 0], [1, 0]])
    each = network.class_maps(x, classes)
    for column in (0, 1):
        erased = network.class_maps(x, classes[:, column : column + 1], classes[:, column])
        torch.testing.assert_close(each[1][:, column], erased[1][:, 0])
    by_first = network.class_maps(x, classes, classes[:, 0])
    torch.testing.assert_close(by_first[1][:, 0], each[1][:, 0])
    assert not torch.allclose(by_first[1][:, 1], each[1][:, 1])


def test_maps_and_masks_are_single_precision_under_autocast() -> None:
    network, x = chain(), features()
    seen: list[torch.dtype] = []
    network.heads[0][0].register_forward_hook(lambda *args: seen.append(args[2].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        stages = network(x, LABELS)
        (maps,) = network.class_maps(x, LABELS[:, None])[1:]
    assert set(seen) == {torch.bfloat16}  # the hidden convolutions are fast
    for stage in stages:
        assert stage.maps.dtype == stage.logits.dtype == stage.attention.dtype == torch.float32
    assert maps.dtype == torch.float32
    # No rounding to 8 bits: as many values as locations.
    assert len(stages[0].maps[0, 0].unique()) == 36


def test_head_maps_average_to_the_logits_of_a_linear_layer() -> None:
    head, x = MapHead(5, 3, depth=0), features()
    weight, bias = head.parameters()
    expected = F.linear(x.mean((-2, -1)), weight[..., 0, 0], bias)
    torch.testing.assert_close(head(x).mean((-2, -1)), expected)
