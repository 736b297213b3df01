from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_modules.nn.modes import eval_mode, frozen, train_mode
from lightning_modules.osrci.counterfactual import (
    counterfactual_search,
    generate_open_set,
    interpolated_open_set_candidates,
    recalibrate_batch_norm,
    search_copy,
)
from lightning_modules.osrci.losses import clamp_to_unit_sphere, sample_latent
from lightning_modules.osrci.networks import Classifier32, Encoder32, Generator32


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


DECODE, CLASSIFY = rand(8, 6, seed=1), rand(6, 3, seed=2)


def decode(z: Tensor) -> Tensor:
    return torch.tanh(z @ DECODE)


def classify(x: Tensor) -> Tensor:
    return x @ CLASSIFY


def networks(width: int = 2) -> tuple[Encoder32, Generator32, Classifier32]:
    torch.manual_seed(0)
    encoder = Encoder32(4, scales=(2,), width=width)
    generator, classifier = Generator32(4, scales=(2,), width=width), Classifier32(3, width=width)
    images = torch.rand(8, 3, 32, 32)
    for _ in range(3):  # running statistics that are not the initial ones
        classifier(generator(encoder(images)))
    return encoder.eval(), generator.eval(), classifier.eval()


# ------------------------------------------------------------------ the two objectives
@pytest.mark.parametrize("target", [0, 2, 3, None])
@pytest.mark.parametrize("project", [True, False])
def test_paper_search_by_finite_differences(target: int | None, project: bool) -> None:
    start = clamp_to_unit_sphere(rand(2, 8), 4)
    result = counterfactual_search(
        start, decode, classify, target, steps=3, speed=0.2, distance_weight=0.7, scale=2,
        project=project,
    )  # fmt: skip
    column = 3 if target is None else target

    def objective(z: Tensor, z0: Tensor) -> float:
        logits = [*classify(decode(z[None]))[0].tolist(), 0.0]
        total = sum(torch.exp(torch.tensor(v, dtype=torch.float64)) for v in logits)
        return (torch.log(torch.as_tensor(total)) - logits[column]).item() + 0.7 * (
            (z - z0) ** 2
        ).sum().item()

    for row in range(2):
        z, z0 = start[row].clone(), start[row]
        for step in range(3):
            assert result.objective[step][row].item() == pytest.approx(objective(z, z0))
            slope = torch.zeros(8, dtype=torch.float64)
            for i in range(8):
                h = torch.zeros(8, dtype=torch.float64)
                h[i] = 1e-5
                slope[i] = (objective(z + h, z0) - objective(z - h, z0)) / 2e-5
            z = z - 0.2 * slope
            if project:
                z = torch.cat([part / part.norm() for part in z.split(2)])
        torch.testing.assert_close(result.z[row], z, rtol=1e-7, atol=1e-7)
        assert result.loss[row].item() == pytest.approx(objective(z, z0), rel=1e-6)
        assert result.distance[row].item() == pytest.approx(((z - z0) ** 2).sum().item(), rel=1e-6)
    probabilities = torch.cat([classify(result.images), torch.zeros(2, 1)], 1).softmax(1)
    torch.testing.assert_close(result.confidence, probabilities[:, column])
    assert result.steps.tolist() == [3, 3]


def test_search_lowers_the_objective_and_raises_the_confidence() -> None:
    result = counterfactual_search(
        clamp_to_unit_sphere(rand(5, 8), 4), decode, classify, steps=50, speed=0.05, scale=2
    )
    assert (result.loss < result.objective[0]).all()
    assert (result.confidence > torch.exp(-result.loss_cf[0])).all()


def test_reference_search_follows_the_released_code() -> None:
    start, weight = rand(3, 8), 0.6
    result = counterfactual_search(
        start, decode, classify, 1, steps=3, speed=0.3, distance_weight=weight, scale=2,
        variant="reference",
    )  # fmt: skip
    z = start.clone()
    for step in range(3):
        z.requires_grad_()
        logits = torch.cat([classify(decode(z)), torch.zeros(3, 1)], 1)
        cf = -logits.log_softmax(1)[:, 1].mean()
        distance = weight * (z.mean(1).mean(0) - start.mean(1).mean(0)) ** 2
        loss = cf + distance
        assert result.loss_cf[step].item() == pytest.approx(cf.item())
        assert result.loss_distance[step].item() == pytest.approx(distance.item())
        (gradient,) = torch.autograd.grad(loss, z, grad_outputs=loss)
        z = (z - 0.3 * gradient).detach()
        z = torch.cat([part / part.norm(dim=1, keepdim=True) for part in z.split(4, 1)], 1)
    torch.testing.assert_close(result.z, z)
    assert result.loss.shape == (3,)
    assert result.loss.unique().numel() == 1


def test_colour_term() -> None:
    start = rand(2, 8)
    decode_image = nn.Sequential(nn.Linear(8, 12, bias=False), nn.Unflatten(1, (3, 2, 2))).double()
    images = rand(2, 3, 2, 2, seed=4)
    search = partial(
        counterfactual_search, start, decode_image, lambda x: x.flatten(1) @ rand(12, 3),
        steps=1, scale=2, start_images=images,
    )  # fmt: skip
    shift = (decode_image(start).mean((2, 3)) - images.mean((2, 3))).square().sum(1)
    terms: dict[Any, Tensor] = {"paper": shift, "reference": shift.sum()}
    for variant, term in terms.items():
        plain = search(variant=variant).objective[0]
        coloured = search(variant=variant, color_weight=2.0).objective[0]
        torch.testing.assert_close(coloured - plain, 2.0 * term)
    with pytest.raises(ValueError, match="start_images"):
        search(start_images=None, color_weight=1.0)


def test_paper_search_does_not_depend_on_the_batch_and_targets_may_differ() -> None:
    start, targets = rand(4, 8), torch.tensor([0, 3, 1, 3])
    together = counterfactual_search(start, decode, classify, targets, steps=5, scale=2)
    for row in range(4):
        alone = counterfactual_search(
            start[row : row + 1], decode, classify, int(targets[row]), steps=5, scale=2
        )
        torch.testing.assert_close(alone.z[0], together.z[row])
        torch.testing.assert_close(alone.confidence[0], together.confidence[row])


def test_stopped_samples_stay_and_the_others_go_on() -> None:
    start = clamp_to_unit_sphere(rand(6, 8), 4)
    options: dict[str, Any] = {"speed": 0.1, "distance_weight": 0.1, "scale": 2}
    full = counterfactual_search(start, decode, classify, steps=30, **options)
    limit = float(full.confidence.median())
    result = counterfactual_search(
        start, decode, classify, steps=30, stop_confidence=limit, **options
    )
    assert 0 < result.steps.median() < result.steps.max() == 30
    for row, taken in enumerate(result.steps.tolist()):
        same = counterfactual_search(start, decode, classify, steps=taken, **options)
        torch.testing.assert_close(result.z[row], same.z[row])
        if taken < 30:
            assert result.confidence[row] > limit
        if 0 < taken < 30:
            before = counterfactual_search(start, decode, classify, steps=taken - 1, **options)
            assert before.confidence[row] <= limit
    done = counterfactual_search(start, decode, classify, steps=30, stop_confidence=0.0, **options)
    assert done.steps.tolist() == [0] * 6
    assert len(done.objective) == 1  # nobody left to move
    torch.testing.assert_close(done.z, start)


def test_zero_steps_and_callback() -> None:
    start, seen = rand(2, 8), []
    nothing = counterfactual_search(start, decode, classify, steps=0, scale=2)
    assert torch.equal(nothing.z, start)
    assert nothing.objective == []
    result = counterfactual_search(
        start, decode, classify, steps=3, scale=2, on_step=lambda n, z: seen.append((n, z))
    )
    assert [n for n, _ in seen] == [1, 2, 3]
    assert torch.equal(seen[-1][1], result.z)
    assert not seen[0][1].requires_grad


# ------------------------------------------------------------------ what it must leave alone
def test_search_touches_neither_modes_nor_flags_nor_gradients_nor_buffers() -> None:
    _, generator, classifier = networks()
    generator.train()
    classifier.head.weight.requires_grad_(False)
    statistics = {k: v.clone() for k, v in classifier.state_dict().items()}
    result = counterfactual_search(sample_latent(2, 4, 2), generator, classifier, steps=2, scale=2)
    assert generator.training
    assert all(part.training for part in generator.modules())
    assert not classifier.training
    assert [n for n, p in classifier.named_parameters() if not p.requires_grad] == ["head.weight"]
    for network in (generator, classifier):
        assert all(parameter.grad is None for parameter in network.parameters())
    assert all(torch.equal(v, statistics[k]) for k, v in classifier.state_dict().items())
    assert not result.z.requires_grad
    assert not result.images.requires_grad


def test_flags_come_back_after_an_error() -> None:
    _, generator, _ = networks()

    def fail(images: Tensor) -> Tensor:
        assert not any(p.requires_grad for p in generator.parameters())
        raise KeyError("stop")

    with pytest.raises(KeyError):
        counterfactual_search(sample_latent(2, 4, 2), generator, fail, steps=1, scale=2)
    assert all(parameter.requires_grad for parameter in generator.parameters())
    with pytest.raises(KeyError), frozen(generator):
        raise KeyError
    assert all(parameter.requires_grad for parameter in generator.parameters())


def test_search_works_without_grad_and_in_float32_under_autocast() -> None:
    _, generator, classifier = networks()
    z0 = sample_latent(2, 4, 2)
    search = partial(counterfactual_search, generator=generator, classifier=classifier, scale=2)
    expected = search(z0, steps=2)
    with torch.no_grad():
        assert torch.equal(search(z0, steps=2).z, expected.z)
        assert not torch.is_grad_enabled()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = search(z0, steps=2)
    assert result.images.dtype == torch.float32
    assert torch.equal(result.z, expected.z)
    assert search(z0.bfloat16(), steps=1).z.dtype == torch.float32


def test_inference_mode_is_refused_with_the_remedy() -> None:
    with torch.inference_mode(), pytest.raises(RuntimeError, match="inference_mode=False"):
        counterfactual_search(rand(2, 8), decode, classify, scale=2)


@pytest.mark.parametrize(
    "options",
    [
        {"target": 4},
        {"target": -1},
        {"target": torch.tensor([1, 2, 3])},
        {"variant": "fast"},
        {"steps": -1},
        {"scale": 3},
    ],
)
def test_bad_search_arguments(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        counterfactual_search(rand(2, 8), decode, classify, **{"scale": 2, "steps": 1, **options})


def test_position_projection() -> None:
    result = counterfactual_search(
        rand(2, 8), decode, classify, steps=1, scale=2, normalize="position"
    )
    norms = result.z.view(2, 2, 4).norm(dim=1)
    torch.testing.assert_close(norms, torch.ones_like(norms))


def test_search_copies_give_the_same_result_as_the_straightforward_loop() -> None:
    _, generator, classifier = (network.double() for network in networks())
    z0 = sample_latent(3, 4, 2, dtype=torch.float64)
    z = z0
    for _ in range(10):
        z = z.detach().requires_grad_()
        logits = torch.cat([classifier(generator(z)), torch.zeros(3, 1)], 1)
        (logits.logsumexp(1) + (z - z0).square().sum(1)).sum().backward()
        assert z.grad is not None
        z = clamp_to_unit_sphere(z.detach() - 0.1 * z.grad, 4)
    for pair in ((generator, classifier), (search_copy(generator), search_copy(classifier))):
        result = counterfactual_search(z0, *pair, steps=10, scale=2)
        torch.testing.assert_close(result.z, z, rtol=1e-9, atol=1e-12)


# ------------------------------------------------------------------ modes
def test_modes_and_statistics_come_back_even_after_an_error() -> None:
    _, _, classifier = networks()
    classifier.trunk[0].train()  # a mixture
    flags = [part.training for part in classifier.modules()]
    state = {k: v.clone() for k, v in classifier.state_dict().items()}
    contexts: list[tuple[Callable[..., Any], bool]] = [(eval_mode, False), (train_mode, True)]
    for context, training in contexts:
        with context(classifier, decode):
            assert {part.training for part in classifier.modules()} == {training}
            classifier(torch.rand(4, 3, 32, 32))
        assert [part.training for part in classifier.modules()] == flags
        with pytest.raises(ValueError), context(classifier, decode):
            classifier(torch.rand(4, 3, 99, 99))
        assert [part.training for part in classifier.modules()] == flags
        assert all(torch.equal(v, state[k]) for k, v in classifier.state_dict().items())


# ------------------------------------------------------------------ open sets
def test_open_set_of_images_does_not_depend_on_the_batches() -> None:
    encoder, generator, classifier = networks()
    encoder.train()
    images = torch.rand(7, 3, 32, 32)
    make = partial(generate_open_set, encoder, generator, classifier, count=7, steps=3, scale=2)
    numbers: list[int] = []
    whole, parts = make(loader=[images]), make(loader=images.split(3), on_batch=numbers.append)
    assert numbers == [3, 6, 7]
    assert encoder.training
    assert [column.shape for column in whole.tensors] == [(7, 3, 32, 32), (7,), (7,), (7,)]
    for one, other in zip(whole.tensors, parts.tensors, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    with eval_mode(encoder), torch.no_grad():
        code = encoder(images)
    expected = counterfactual_search(code, generator, classifier, 3, steps=3, scale=2)
    torch.testing.assert_close(whole.tensors[0], expected.images, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(whole.tensors[1], expected.confidence, rtol=1e-4, atol=1e-5)
    assert len(make(loader=iter([images, images]), count=9)) == 9
    with pytest.raises(ValueError, match="7 of count=8"):
        make(loader=[images], count=8)
    with pytest.raises(ValueError, match="count"):
        make(loader=[images], count=0)


def test_train_mode_generation_uses_batch_statistics_and_restores_them() -> None:
    encoder, generator, classifier = networks()
    state = {k: v.clone() for k, v in generator.state_dict().items()}
    images = torch.rand(6, 3, 32, 32)
    results = [
        generate_open_set(
            encoder, generator, classifier, [images], 4, bn_mode=mode, variant="reference",
            steps=2, scale=2, color_weight=0.5,
        ).tensors[0]
        for mode in ("eval", "train")
    ]  # fmt: skip
    assert results[1].shape == (4, 3, 32, 32)
    assert not torch.allclose(results[0], results[1], atol=1e-3)
    assert all(torch.equal(v, state[k]) for k, v in generator.state_dict().items())
    assert not generator.training


def test_interpolated_candidates() -> None:
    z0, z1, theta = rand(5, 8), rand(5, 8, seed=1), torch.linspace(0, 1, 5)
    found = interpolated_open_set_candidates(z0, z1, theta, decode, classify, 0.6)
    for i in range(5):
        z = float(theta[i]) * z0[i] + (1 - float(theta[i])) * z1[i]
        torch.testing.assert_close(found.z[i], z)
        best = classify(decode(z[None])).softmax(1).max().item()
        assert found.confidence[i].item() == pytest.approx(best)
        assert bool(found.keep[i]) == (best < 0.6)
    assert found.keep.any()
    assert not found.keep.all()


# ------------------------------------------------------------------ batch norm
def test_recalibration_is_the_plain_average_over_batches() -> None:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(3, momentum=0.3)
    network = nn.Sequential(nn.Dropout2d(0.9), norm, nn.LeakyReLU())
    network(torch.rand(4, 3, 5, 5) + 7)
    network.eval()
    batches = [torch.rand(4, 3, 5, 5) * k for k in (1.0, 3.0, 5.0)]
    recalibrate_batch_norm(network, [network], batches)
    means = torch.stack([batch.mean((0, 2, 3)) for batch in batches]).mean(0)
    variances = torch.stack([batch.var((0, 2, 3)) for batch in batches]).mean(0)
    torch.testing.assert_close(norm.running_mean, means)
    torch.testing.assert_close(norm.running_var, variances)
    assert norm.momentum == 0.3
    assert not any(part.training for part in network.modules())


def test_failed_recalibration_changes_nothing() -> None:
    network = nn.Sequential(nn.BatchNorm2d(3)).train()
    network(torch.rand(4, 3, 5, 5))
    state = {k: v.clone() for k, v in network.state_dict().items()}

    def fail(batch: Tensor) -> None:
        network(batch)
        raise KeyError

    with pytest.raises(ValueError, match="no batch"):
        recalibrate_batch_norm(network, [network], [])
    with pytest.raises(KeyError):
        recalibrate_batch_norm(fail, [network], [torch.rand(4, 3, 5, 5)])
    assert all(torch.equal(v, state[k]) for k, v in network.state_dict().items())
    assert network.training
    assert network[0].training
    assert network[0].momentum == 0.1
