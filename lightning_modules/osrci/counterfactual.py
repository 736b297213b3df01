"""Search for counterfactual images: latents moved until a classifier says what it is asked to say.

Works with any callables ``generator(z [B, D]) -> images`` and ``classifier(images) -> logits [B,
K]``. Nothing here switches a network between training and evaluation mode unless its docstring says
so; wrap calls in :func:`eval_mode` or :func:`train_mode`.
"""

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import TensorDataset

from lightning_modules.nn.modes import eval_mode, frozen, train_mode
from lightning_modules.osrci.losses import (
    Normalize,
    augment_logits,
    clamp_to_unit_sphere,
    normalize_latent,
)
from lightning_modules.osrci.networks import fold_batch_norm

Variant = Literal["paper", "reference"]
ImageMap = Callable[[Tensor], Tensor]


@dataclass
class CounterfactualResult:
    """What a search found, for a batch of B starts.

    Attributes:
        z: final latents [B, D].
        images: decoded from them, [B, C, H, W].
        loss: objective at the final latents [B]; with ``variant="reference"`` the same batch value
            in every row.
        distance: squared Euclidean distance to the start [B], unweighted, for both variants.
        confidence: probability of the target among the K classes and "none of them" [B].
        steps: number of steps every sample was moved, int64 [B].
        loss_cf: cross entropy before every step, [B] each, or a scalar with
            ``variant="reference"``.
        loss_distance: weighted distance term before every step, of the same shape.
        objective: sum of all terms before every step, of the same shape.
    """

    z: Tensor
    images: Tensor
    loss: Tensor
    distance: Tensor
    confidence: Tensor
    steps: Tensor
    loss_cf: list[Tensor] = field(default_factory=list)
    loss_distance: list[Tensor] = field(default_factory=list)
    objective: list[Tensor] = field(default_factory=list)


class _Terms(NamedTuple):
    cf: Tensor
    distance: Tensor
    objective: Tensor


def search_copy(network: nn.Module) -> nn.Module:
    """A frozen evaluation-mode copy of a network that a search passes through faster.

    Batch norms behind convolutions are folded; on the CPU the weights are laid out channels last.
    Outputs agree up to rounding. Make it once for many searches, and again when the network has
    changed.
    """
    copied = fold_batch_norm(network).requires_grad_(False)
    parameter = next(copied.parameters(), None)
    if parameter is not None and parameter.device.type == "cpu":
        copied.to(memory_format=torch.channels_last)
    return copied


def counterfactual_search(
    z0: Tensor,
    generator: ImageMap,
    classifier: ImageMap,
    target: int | Tensor | None = None,
    steps: int = 100,
    speed: float = 0.1,
    distance_weight: float = 1.0,
    scale: int = 4,
    variant: Variant = "paper",
    project: bool = True,
    start_images: Tensor | None = None,
    color_weight: float = 0.0,
    stop_confidence: float | None = None,
    on_step: Callable[[int, Tensor], None] | None = None,
    normalize: Normalize = "channel_group",
) -> CounterfactualResult:
    """Gradient descent on latents until the classifier gives the target to the decoded images.

    With CE the cross entropy of ``[logits, 0]`` at the target, ``variant="paper"`` minimises for
    every sample ``CE + distance_weight * ||z - z0||**2`` (the paper's objective; for the target K,
    CE is log(1 + sum exp logits)). Every sample depends on itself alone if the networks are in
    evaluation mode.

    ``variant="reference"`` is the released code: L = batch mean of CE + distance_weight * (mean of
    all entries of z - mean of all entries of z0)**2 and the step ``speed * L * dL/dz``, so that a
    sample depends on its batch; the projection splits z into ``scale`` chunks instead of
    ``scale**2``.

    Gradients are taken with respect to z alone, in float32 (float64 for float64 latents) also under
    autocast, and the search works inside ``torch.no_grad()``. No parameter gradient is written and
    no mode is switched.

    Args:
        z0: start latents [B, D].
        generator: latents to images; in evaluation mode unless ``variant="reference"`` is to be
            followed to the letter.
        classifier: images to logits [B, K].
        target: class index 0..K, K being "none of the classes", or one per sample [B]; K if not
            given.
        steps: largest number of steps.
        speed: step size.
        distance_weight: factor of the distance term.
        scale: side of the latent map, which sets the number of chunks of the projection.
        variant: see above.
        project: put z back on its product of unit spheres after every step.
        start_images: images [B, C, H, W] that z0 was encoded from; needed for the colour term.
        color_weight: factor of ``sum over channels (mean colour of the image - of its start
            image)**2``, a term of an early version of the released code (summed over the batch as
            well with ``variant="reference"``).
        stop_confidence: a sample stays where its target probability first exceeds this.
        on_step: called with the number of steps done and the latents after every step.
        normalize: chunks of the projection with ``variant="paper"``, as the encoder's.

    Returns:
        The result; nothing in it requires a gradient.

    Raises:
        ValueError: an option or the target does not fit.
        RuntimeError: called inside ``torch.inference_mode()``, where no gradient exists.
    """
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            "the counterfactual search needs gradients, which torch.inference_mode() forbids; "
            "use Trainer(inference_mode=False) or torch.no_grad()"
        )
    if variant not in ("paper", "reference"):
        raise ValueError(f"unknown variant={variant!r}; choose 'paper' or 'reference'")
    if steps < 0:
        raise ValueError(f"steps={steps} must not be negative")

    start = z0.detach()
    start = start.clone() if start.dtype == torch.float64 else start.float().clone()
    batch = len(start)
    start_color = None
    if color_weight:
        if start_images is None or start_images.dim() < 3:
            raise ValueError("color_weight needs start_images [B, C, H, W]")
        start_color = start_images.to(start).flatten(2).mean(2)

    def evaluate(z: Tensor) -> tuple[Tensor, Tensor, _Terms]:
        """Images, target probability [B] and the terms of the objective at z."""
        images = generator(z)
        logits = augment_logits(classifier(images))
        classes = _target_classes(target, batch, logits.shape[1] - 1, logits.device)
        cf = F.cross_entropy(logits, classes, reduction="none")
        # exp(-cf) is the target probability; the gradient path ends here.
        confidence = torch.exp(-cf.detach())
        if variant == "reference":
            cf, distance = cf.mean(), (z.mean() - start.mean()).square()
        else:
            distance = (z - start).square().sum(1)
        distance = distance_weight * distance
        objective = cf + distance
        if start_color is not None:
            shift = (images.flatten(2).mean(2) - start_color).square().sum(1)
            objective = objective + color_weight * (
                shift.sum() if variant == "reference" else shift
            )
        return images, confidence, _Terms(cf, distance, objective)

    z = start.clone()
    moved = torch.zeros(batch, dtype=torch.long, device=z.device)
    active = torch.ones(batch, dtype=torch.bool, device=z.device)
    history: list[_Terms] = []
    with torch.autocast(z.device.type, enabled=False), frozen(generator, classifier):
        for step in range(steps):
            with torch.enable_grad():
                leaf = z.detach().requires_grad_(True)
                _, confidence, terms = evaluate(leaf)
                (gradient,) = torch.autograd.grad(terms.objective.sum(), leaf)
            history.append(_Terms(*(term.detach() for term in terms)))
            with torch.no_grad():
                factor = terms.objective.detach() if variant == "reference" else 1.0
                proposal = z - speed * factor * gradient
                if project and variant == "reference":
                    proposal = clamp_to_unit_sphere(proposal, scale)
                elif project:
                    proposal = normalize_latent(proposal, scale, normalize)
                if stop_confidence is not None:
                    active &= confidence <= stop_confidence
                    proposal = torch.where(active[:, None], proposal, z)
                z = proposal
                moved += active
            if on_step is not None:
                on_step(step + 1, z)
            if stop_confidence is not None and not active.any():
                break
        with torch.no_grad():
            images, confidence, final = evaluate(z)
    return CounterfactualResult(
        z=z,
        images=images,
        loss=final.objective.expand(batch).clone(),
        distance=(z - start).square().sum(1),
        confidence=confidence,
        steps=moved,
        loss_cf=[terms.cf for terms in history],
        loss_distance=[terms.distance for terms in history],
        objective=[terms.objective for terms in history],
    )


def _target_classes(
    target: int | Tensor | None, batch: int, unknown: int, device: torch.device
) -> Tensor:
    if isinstance(target, Tensor) and target.dim() > 0:
        if target.shape != (batch,):
            raise ValueError(
                f"target of shape {tuple(target.shape)} does not fit a batch of {batch}; "
                "give one class per sample"
            )
        return target.to(device=device, dtype=torch.long)
    index = unknown if target is None else int(target)
    if not 0 <= index <= unknown:
        raise ValueError(
            f"target={index} is no class: choose 0..{unknown}, {unknown} being none of them"
        )
    return torch.full((batch,), index, dtype=torch.long, device=device)


def generate_open_set(
    encoder: ImageMap,
    generator: ImageMap,
    classifier: ImageMap,
    loader: Iterable[Tensor],
    count: int,
    bn_mode: Literal["eval", "train"] = "eval",
    variant: Variant = "paper",
    color_weight: float = 0.0,
    on_batch: Callable[[int], None] | None = None,
    **search: Any,
) -> TensorDataset:
    """Counterfactual images of a number of training images.

    Args:
        encoder: images to latents.
        generator: latents to images.
        classifier: images to logits [B, K].
        loader: batches of start images [B, C, H, W] on the networks' device, usually drawn with
            replacement.
        count: number N of images to make; of the last batch only as many as are missing are kept.
        bn_mode: ``"eval"``: running statistics and no dropout; ``"train"``: batch statistics and
            dropout as in the released code. Modes and running statistics are as before afterwards.
        variant: see :func:`counterfactual_search`.
        color_weight: see :func:`counterfactual_search`; the start images are passed on.
        on_batch: called with the number of images made after every batch.
        search: further arguments of :func:`counterfactual_search`.

    Returns:
        Dataset of the images [N, C, H, W], the target probabilities [N], squared latent distances
        [N] and numbers of steps [N], on the CPU.

    Raises:
        ValueError: ``count`` is below 1, ``bn_mode`` is unknown, or the loader ends too early.
    """
    if count < 1:
        raise ValueError(f"count={count} must be at least 1")
    if bn_mode not in ("eval", "train"):
        raise ValueError(f"unknown bn_mode={bn_mode!r}; choose 'eval' or 'train'")
    parts: list[tuple[Tensor, ...]] = []
    made = 0
    with ExitStack() as stack:
        if bn_mode == "train":
            stack.enter_context(train_mode(encoder, generator, classifier))
        else:
            stack.enter_context(eval_mode(encoder))
            generator, classifier = (
                search_copy(network) if isinstance(network, nn.Module) else network
                for network in (generator, classifier)
            )
        for batch in loader:
            # A per-sample search need not move samples that nobody keeps.
            images = batch[: count - made] if variant == "paper" and bn_mode == "eval" else batch
            with torch.no_grad():
                z0 = encoder(images)
            found = counterfactual_search(
                z0,
                generator,
                classifier,
                variant=variant,
                color_weight=color_weight,
                start_images=images,
                **search,
            )
            record = (found.images, found.confidence, found.distance, found.steps)
            parts.append(tuple(column[: count - made].cpu() for column in record))
            made += len(parts[-1][0])
            if on_batch is not None:
                on_batch(made)
            if made == count:
                break
    if made < count:
        raise ValueError(
            f"the loader ended after {made} of count={count} start images; "
            "pass one that draws with replacement"
        )
    return TensorDataset(*(torch.cat(columns) for columns in zip(*parts, strict=True)))


class InterpolatedCandidates(NamedTuple):
    """Candidates of G-OpenMax.

    Attributes:
        z: mixed latents [B, D].
        images: decoded from them.
        confidence: largest class probability [B].
        keep: whether the classifier is unsure enough, bool [B].
    """

    z: Tensor
    images: Tensor
    confidence: Tensor
    keep: Tensor


@torch.no_grad()
def interpolated_open_set_candidates(
    z0: Tensor,
    z1: Tensor,
    theta: Tensor,
    generator: ImageMap,
    classifier: ImageMap,
    max_confidence: float = 0.5,
) -> InterpolatedCandidates:
    """Images between pairs of latents; those that the classifier is unsure of are kept.

    That is G-OpenMax as the released code has it: no conditional GAN, and the mixed latents are not
    normalised again.

    Args:
        z0: latents [B, D].
        z1: latents [B, D].
        theta: share of ``z0`` in every pair, [B].
        generator: latents to images.
        classifier: images to logits [B, K].
        max_confidence: images whose largest softmax probability over K is below this are kept.

    Returns:
        All B candidates with their flag.
    """
    share = theta.to(z0).view(-1, 1)
    z = share * z0 + (1 - share) * z1
    images = generator(z)
    confidence = classifier(images).softmax(1).amax(1)
    return InterpolatedCandidates(z, images, confidence, confidence < max_confidence)


def recalibrate_batch_norm(
    forward: Callable[[Any], object], modules: Iterable[nn.Module], batches: Iterable[Any]
) -> None:
    """Estimates the running statistics of batch norms again, as the plain average over batches.

    The generator's running statistics mix noise and encoded latents; an evaluation-mode search
    wants those of encoded latents alone. Batch norms use batch statistics during the passes, all
    else (dropout) is in evaluation mode. On several processes pass the same batches everywhere, or
    broadcast the buffers afterwards.

    Args:
        forward: runs the networks on a batch, without gradients.
        modules: networks whose batch norms are estimated again; all networks that ``forward`` uses
            in which dropout is to be off must be among them.
        batches: every batch counts the same, whatever its size.

    Raises:
        ValueError: ``batches`` is empty. Then, and whenever ``forward`` fails, the statistics are
            as before.
    """
    networks = tuple(modules)
    norms = [
        part
        for network in networks
        for part in network.modules()
        if isinstance(part, _BatchNorm) and part.track_running_stats
    ]
    before = [(norm, norm.momentum, [b.clone() for b in norm.buffers()]) for norm in norms]
    done = False
    try:
        with torch.no_grad(), eval_mode(*networks):
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None  # cumulative average
                norm.train()
            for batch in batches:
                forward(batch)
                done = True
        if not done:
            raise ValueError("recalibrate_batch_norm got no batch")
    except BaseException:
        for norm, _, buffers in before:
            for buffer, value in zip(norm.buffers(), buffers, strict=True):
                buffer.copy_(value)
        raise
    finally:
        for norm, momentum, _ in before:
            norm.momentum = momentum
