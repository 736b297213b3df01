from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import Adam

from lightning_modules.nn.modes import frozen
from lightning_modules.opgan.losses import (
    affine_warp,
    content_consistency_loss,
    content_negative_loss,
    domain_classification_loss,
)
from lightning_modules.opgan.networks import SiameseNetwork, content_ratio, siamese_terms
from lightning_modules.opgan.pairs import (
    CROSS,
    content_pairs,
    pair_label,
    patch_grid,
    sample_patch_pairs,
)

LOSSES = ("content", "domain", "negative")


def network(width: int = 2, **options: Any) -> SiameseNetwork:
    torch.manual_seed(0)
    siamese = SiameseNetwork(width=width, **options).double()
    for parameter in siamese.parameters():
        torch.nn.init.normal_(parameter, std=0.2)  # large enough for features to differ
    return siamese


def images(height: int = 32, width: int = 30, batch: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    pair = torch.rand(2, batch, 3, height, width, generator=generator, dtype=torch.float64) * 2 - 1
    return pair[0], pair[1]


# ------------------------------------------------------------------ network
@pytest.mark.parametrize("norm", ["instance", "none"])
@pytest.mark.parametrize("size", [(9, 9), (10, 13), (33, 9), (21, 34)])
def test_any_patch_size(norm: Any, size: tuple[int, int]) -> None:
    siamese = SiameseNetwork(in_channels=1, width=2, norm=norm, num_classes=4)
    map_p, map_q, logits = siamese(torch.rand(3, 1, *size), torch.rand(3, 1, *size))
    assert map_p.shape == map_q.shape == (3, 1, *size)
    assert logits.shape == (3, 4)
    c, d = siamese.encode(torch.rand(3, 1, *size))
    assert c.shape == d.shape == (3, 16, -(-size[0] // 8), -(-size[1] // 8))


def test_without_norm_a_patch_may_be_one_pixel() -> None:
    _, d = SiameseNetwork(width=2, norm="none").encode(torch.rand(1, 3, 1, 1))
    assert d.shape == (1, 16, 1, 1)


@pytest.mark.parametrize("size", [(8, 8), (8, 40)])
def test_patches_too_small_for_the_norm(size: tuple[int, int]) -> None:
    message = rf"{size[0]}x{size[1]} pixels.*9x9.*data\.crop_size.*model\.grid"
    with pytest.raises(ValueError, match=message):
        SiameseNetwork(width=1).encode(torch.rand(1, 3, *size))


def test_initial_weights() -> None:
    torch.manual_seed(0)
    siamese = SiameseNetwork(width=16)
    for name, parameter in siamese.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif parameter.numel() > 1000:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.1), name


def test_parameters_come_in_the_order_of_the_parts() -> None:
    parts = [name.split(".")[0] for name, _ in SiameseNetwork(width=1).named_parameters()]
    assert parts == ["encoder"] * 10 + ["content_head"] * 2 + ["domain_head"] * 6


def test_the_domain_task_sees_brightness_and_order() -> None:
    siamese = network()
    patch = images()[0]
    logits = siamese(patch, patch / 2)[2]
    assert (logits - siamese(patch, patch)[2]).abs().max() > 1e-3
    assert (logits - siamese(patch / 2, patch)[2]).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 0}, "siamese_width=0"),
        ({"in_channels": 0}, "in_channels=0"),
        ({"norm": "batch"}, "siamese_norm='batch'"),
        ({"attention_norm": "softmax"}, "attention_norm='softmax'"),
    ],
)
def test_impossible_networks(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SiameseNetwork(**options)


# ------------------------------------------------------------------ terms
def pair_by_pair(
    siamese: SiameseNetwork, a: Tensor, b: Tensor, pairs: Tensor, grid: int, every: bool
) -> dict[str, Tensor]:
    """The losses as the paper states them, one forward for each pair."""
    pool = torch.cat((patch_grid(a, grid), patch_grid(b, grid)), 1)
    found: dict[str, list[Tensor]] = {"content": [], "domain": [], "negative": []}
    flag = torch.ones(1, dtype=torch.bool)
    for image, p, q in pairs.tolist():
        label, same = pair_label(p, q, grid**2)
        map_p, map_q, logits = siamese(pool[image, p][None], pool[image, q][None])
        found["domain"].append(domain_classification_loss(logits, torch.tensor([label])))
        if same and not every:
            found["content"].append(content_consistency_loss(map_p, map_q, flag))
        if label == CROSS and not same:
            found["negative"].append(content_negative_loss(map_p, map_q))
    if every:
        for image, p, q in content_pairs(len(a), grid).tolist():
            map_p, map_q, _ = siamese(pool[image, p][None], pool[image, q][None])
            found["content"].append(content_consistency_loss(map_p, map_q, flag))
    return {name: torch.stack(values).mean() for name, values in found.items() if values}


@pytest.mark.parametrize("positions", ["drawn", "all"])
@pytest.mark.parametrize(
    ("grid", "size", "options"),
    [
        (3, (32, 30), {}),
        (2, (19, 25), {"attention_norm": "instance"}),
        (3, (20, 13), {"norm": "none", "attention_norm": "sigmoid"}),
    ],
)
def test_terms_are_those_of_each_pair(
    grid: int, size: tuple[int, int], options: dict[str, Any], positions: Any
) -> None:
    siamese = network(**options)
    a, b = images(*size)
    pairs = sample_patch_pairs(2, pairs_per_scenario=2, grid=grid)
    b.requires_grad_()
    found = siamese_terms(siamese, a, b, pairs, grid, positions)
    expected = pair_by_pair(siamese, a, b, pairs, grid, positions == "all")
    inputs = [b, *siamese.parameters()]
    for name in LOSSES:
        torch.testing.assert_close(found[name], expected[name])
        ours, plain = (
            torch.autograd.grad(terms[name], inputs, retain_graph=True, materialize_grads=True)
            for terms in (found, expected)
        )
        for one, other in zip(ours, plain, strict=True):
            torch.testing.assert_close(one, other, atol=1e-10, rtol=1e-6)


def test_only_patches_that_are_used_are_encoded_and_only_once() -> None:
    siamese, encoded = network(), []
    siamese.encoder.register_forward_pre_hook(lambda _, inputs: encoded.append(len(inputs[0])))
    a, b = images()
    pairs = torch.tensor([[0, 0, 1], [0, 1, 10], [0, 0, 9], [1, 9, 10], [1, 10, 9]])
    siamese_terms(siamese, a, b, pairs)
    assert encoded == [2, 4]
    encoded.clear()
    siamese_terms(siamese, a, b, pairs[:1])
    assert encoded == [2]
    encoded.clear()
    siamese_terms(siamese, a, b, pairs, content_positions="all")
    assert encoded == [18, 18]


def test_gradients_of_a_frozen_network_reach_the_translation_alone() -> None:
    siamese = network()
    a, b = images()
    b.requires_grad_()
    with frozen(siamese):
        terms = siamese_terms(siamese, a, b, sample_patch_pairs(2))
        sum(terms[name] for name in LOSSES).backward()  # type: ignore[union-attr]
    assert b.grad is not None
    assert b.grad.any()
    assert all(parameter.grad is None for parameter in siamese.parameters())
    assert all(parameter.requires_grad for parameter in siamese.parameters())


def test_a_scenario_step_reaches_every_parameter() -> None:
    siamese = network()
    terms = siamese_terms(siamese, *images(), sample_patch_pairs(2))
    (terms["content"] + terms["domain"]).backward()
    # A constant is taken out again by a norm, and out of the difference of two maps.
    useless = {f"encoder.{i}.bias" for i in (2, 5, 8)} | {"content_head.bias"}
    for name, parameter in siamese.named_parameters():
        assert parameter.grad is not None, name
        assert name in useless or parameter.grad.any(), name


def test_terms_without_some_scenarios() -> None:
    siamese = network()
    terms = siamese_terms(siamese, *images(), torch.tensor([[0, 9, 12], [1, 17, 13]]))
    assert terms["content"].item() == terms["negative"].item() == 0
    sum(terms[name] for name in LOSSES).backward()  # type: ignore[union-attr]
    gradient = siamese.content_head.weight.grad
    assert gradient is not None
    assert not gradient.any()


def test_monitors_carry_no_gradient() -> None:
    terms = siamese_terms(network(), *images(), sample_patch_pairs(2))
    assert terms.keys() == {*LOSSES, "accuracy", "attention_std"}
    assert not any(terms[name].requires_grad for name in ("accuracy", "attention_std"))
    assert terms["attention_std"] > 0
    assert terms["accuracy"].item() in {i / 8 for i in range(9)}


def test_margin_of_the_hinge() -> None:
    pairs = torch.tensor([[0, 0, 10], [1, 3, 17]])
    low, high = (siamese_terms(network(), *images(), pairs, margin=m) for m in (5.0, 9.0))
    torch.testing.assert_close(high["negative"] - low["negative"], torch.tensor(4.0).double())


def test_maps_are_compared_in_single_precision_under_autocast() -> None:
    siamese, (a, b) = network().float(), images()
    with torch.autocast("cpu", torch.bfloat16):
        terms = siamese_terms(siamese, a.float(), b.float(), sample_patch_pairs(2))
        ratio = content_ratio(siamese, a.float(), b.float())
    assert all(terms[name].dtype == torch.float32 for name in LOSSES)
    assert ratio.dtype == torch.float32
    assert all(term.isfinite() for term in (*terms.values(), ratio))


@pytest.mark.parametrize(
    ("width", "pairs", "options", "message"),
    [
        (31, torch.zeros(1, 3), {}, "keep the size of an image"),
        (30, torch.zeros(0, 3), {}, "at least one pair"),
        (30, torch.zeros(4, 2), {}, r"\(4, 2\) must be \[N, 3\]"),
        (30, torch.zeros(1, 3), {"content_positions": "some"}, "content_positions='some'"),
        (30, torch.tensor([[0, 0, 1]]), {"grid": 4}, "patches of 8x7 pixels"),
    ],
)
def test_impossible_terms(width: int, pairs: Tensor, options: dict, message: str) -> None:
    a, b = images(width=width)[0], images()[1]
    with pytest.raises(ValueError, match=message):
        siamese_terms(network(), a, b, pairs.long(), **options)


# ------------------------------------------------------------------ collapse
def scenes(generator: torch.Generator, batch: int) -> Tensor:
    """Bright squares at random places on dark ground, in [-1, 1]."""
    made = torch.full((batch, 3, 36, 36), -0.8)
    for image in made:
        for top, left in torch.randint(0, 30, (12, 2), generator=generator).tolist():
            image[:, top : top + 5, left : left + 5] = 0.7
    return made


def recoloured(x: Tensor, generator: torch.Generator) -> Tensor:
    noise = torch.randn(x.shape, generator=generator)
    return 0.6 * x + torch.tensor([0.3, 0.0, -0.2]).view(3, 1, 1) + 0.1 * noise


def test_ratio_by_hand() -> None:
    siamese, (a, b) = network(), images()
    every = content_pairs(2)
    plain, warped = (
        siamese_terms(siamese, a, other, every)["content"] for other in (b, affine_warp(b))
    )
    found = content_ratio(siamese, a, b)
    torch.testing.assert_close(found, (warped / plain).detach())
    assert not found.requires_grad


def test_ratio_reacts_to_a_warp_unless_the_map_is_constant() -> None:
    generator = torch.Generator().manual_seed(0)
    siamese, x = network().float(), scenes(generator, 4)
    other = recoloured(x, generator)
    assert content_ratio(siamese, x, other) > 1.2
    torch.nn.init.zeros_(siamese.content_head.weight)
    assert content_ratio(siamese, x, other).item() == 1


@pytest.mark.parametrize(("norm", "weight"), [("none", 0.0), ("instance", 0.0), ("instance", 1.0)])
def test_only_the_hinge_keeps_maps_from_losing_the_content(norm: Any, weight: float) -> None:
    """Maps that see nothing minimise the paper's loss: they shrink, or follow the position if standardised."""
    torch.manual_seed(0)
    siamese = SiameseNetwork(width=4, attention_norm=norm)
    optimizer = Adam(siamese.parameters(), 2e-3, (0.5, 0.999))
    generator = torch.Generator().manual_seed(0)
    test = scenes(generator, 16)
    translated = recoloured(test, generator)
    before = float(content_ratio(siamese, test, translated))
    spread = []
    for _ in range(150):
        x = scenes(generator, 4)
        pairs = sample_patch_pairs(4, generator=generator)
        terms = siamese_terms(siamese, x, recoloured(x, generator), pairs)
        spread.append(float(terms["attention_std"]))
        optimizer.zero_grad()
        (terms["content"] + terms["domain"] + weight * terms["negative"]).backward()
        optimizer.step()
    after = float(content_ratio(siamese, test, translated))
    assert before > 1.3
    assert after > 5 if weight else after < 1.3
    assert (spread[-1] < spread[0] / 2) == (norm == "none")
