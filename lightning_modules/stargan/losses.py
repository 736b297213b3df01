"""Losses and the learning-rate schedule of StarGAN as pure functions.

Choi, Choi, Kim, Ha, Kim, Choo, "StarGAN: Unified Generative Adversarial Networks for Multi-Domain Image-to-Image
Translation", CVPR 2018. Where paper and released code differ, the default says which one it follows. The gradient
penalty is :func:`lightning_modules.nn.gradient_penalty.gradient_penalty`.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Literal, get_args

import torch.nn.functional as F
from torch import Tensor

from lightning_modules.attributes import LabelKind

Reduction = Literal["sum", "mean"]
Schedule = Literal["linear", "reference"]
Classification = Callable[[Tensor, Tensor], Tensor]
"""Loss of class logits [B, c] and labels, a scalar."""

Critic = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Images to scores [B, 1, h, w] and class logits [B, c]."""

Translator = Callable[[Tensor, Tensor], Tensor]
"""Images [B, C, H, W] and target labels [B, c] to translated images."""


# ------------------------------------------------------------------ single terms
def critic_losses(real_logits: Tensor, fake_logits: Tensor) -> tuple[Tensor, Tensor]:
    """Wasserstein terms of the critic, ``-mean(real)`` and ``mean(fake)``.

    Args:
        real_logits: [B, 1, h, w], scores without a sigmoid.
        fake_logits: likewise, of images detached from the generator.

    Returns:
        ``(d_real, d_fake)``, means over batch and patches; minus their sum estimates the Wasserstein distance.
    """
    return -real_logits.mean(), fake_logits.mean()


def generator_adversarial_loss(fake_logits: Tensor) -> Tensor:
    """``-mean(fake)`` over batch and patches, of scores [B, 1, h, w]."""
    return -fake_logits.mean()


def domain_classification_loss(
    logits: Tensor, target: Tensor, kind: LabelKind, reduction: Reduction = "sum"
) -> Tensor:
    """Cross entropy between class logits and labels.

    ``multi_label``: binary cross entropies, averaged over the batch and summed over the attributes (released code), so
    that the loss grows with their number; ``single_label``: softmax cross entropy, averaged over the batch.

    Args:
        logits: [B, c].
        target: zeros and ones [B, c] for ``multi_label``, class indices [B] for ``single_label``.
        kind: which of the two.
        reduction: over the attributes of ``multi_label``; ``"mean"`` makes the loss independent of their number.

    Returns:
        Scalar.

    Raises:
        ValueError: shapes that do not fit, or an unknown option.
    """
    if reduction not in get_args(Reduction):
        raise ValueError(
            f"unknown cls_reduction={reduction!r}; choose 'sum' or 'mean' (--model.cls_reduction)"
        )
    if kind == "multi_label":
        if logits.shape != target.shape:
            raise ValueError(
                f"class logits {tuple(logits.shape)} and labels {tuple(target.shape)} differ in shape: the "
                "discriminator needs one output per selected attribute"
            )
        per_attribute = F.binary_cross_entropy_with_logits(
            logits, target.to(logits.dtype), reduction="none"
        ).mean(0)
        return per_attribute.sum() if reduction == "sum" else per_attribute.mean()
    if kind != "single_label":
        raise ValueError(f"unknown kind={kind!r} of labels; choose one of {get_args(LabelKind)}")
    if target.shape != logits.shape[:1]:
        raise ValueError(
            f"single labels must be class indices [{len(logits)}], got shape {tuple(target.shape)}"
        )
    return F.cross_entropy(logits, target)


def joint_classification_loss(
    logits: Tensor,
    labels: Tensor,
    dataset_index: int,
    dims: Sequence[int],
    kinds: Sequence[LabelKind],
    reduction: Reduction = "sum",
) -> Tensor:
    """:func:`domain_classification_loss` on the logits of the batch's own data set alone.

    Args:
        logits: [B, sum(dims)], the data sets one after the other.
        labels: of this data set, see :func:`domain_classification_loss`.
        dataset_index: which data set the batch is from.
        dims: number of attributes or classes of every data set.
        kinds: of their labels.
        reduction: see :func:`domain_classification_loss`.

    Returns:
        Scalar.

    Raises:
        ValueError: ``dims`` do not add up to the logits, or ``dataset_index`` is none of the data sets.
    """
    if logits.shape[1] != sum(dims):
        raise ValueError(
            f"{logits.shape[1]} class logits for data sets of {list(dims)} labels, {sum(dims)} in all"
        )
    if not 0 <= dataset_index < len(dims):
        raise ValueError(f"dataset_index={dataset_index} must be in 0..{len(dims) - 1}")
    stop = list(accumulate(dims))[dataset_index]
    own = logits[:, stop - dims[dataset_index] : stop]
    return domain_classification_loss(own, labels, kinds[dataset_index], reduction)


def cycle_reconstruction_loss(x: Tensor, x_rec: Tensor) -> Tensor:
    """Mean absolute error over all elements of two tensors [B, C, H, W]."""
    return F.l1_loss(x_rec, x)


# ------------------------------------------------------------------ objectives
def discriminator_terms(
    discriminator: Critic, x: Tensor, fake: Tensor, labels: Tensor, classification: Classification
) -> dict[str, Tensor]:
    """Terms of the discriminator without the gradient penalty, not weighted (paper, eq. 5).

    Args:
        discriminator: the critic with its two heads.
        x: real images [B, C, H, W] in [-1, 1].
        fake: their translations; no gradient flows into them.
        labels: of ``x``, as ``classification`` takes them.
        classification: loss of logits and labels; only real images are classified.

    Returns:
        Scalars ``d_real``, ``d_fake``, ``d_cls``.
    """
    real_scores, logits = discriminator(x)
    fake_scores, _ = discriminator(fake.detach())
    d_real, d_fake = critic_losses(real_scores, fake_scores)
    return {"d_real": d_real, "d_fake": d_fake, "d_cls": classification(logits, labels)}


def generator_terms(
    generator: Translator,
    discriminator: Critic,
    x: Tensor,
    source: Tensor,
    target: Tensor,
    target_labels: Tensor,
    classification: Classification,
) -> dict[str, Tensor]:
    """Terms of the generator, not weighted (paper, eq. 6); gradient flows through both translations.

    Args:
        generator: translates images.
        discriminator: judges them.
        x: real images [B, C, H, W] in [-1, 1].
        source: their own labels as the generator takes them [B, c].
        target: the wanted labels as the generator takes them [B, c].
        target_labels: the wanted labels as ``classification`` takes them.
        classification: loss of logits and labels.

    Returns:
        Scalars ``g_fake``, ``g_cls``, ``g_rec``.
    """
    fake = generator(x, target)
    scores, logits = discriminator(fake)
    return {
        "g_fake": generator_adversarial_loss(scores),
        "g_cls": classification(logits, target_labels),
        "g_rec": cycle_reconstruction_loss(x, generator(fake, source)),
    }


def weighted(terms: Mapping[str, Tensor], weights: Mapping[str, float]) -> dict[str, Tensor]:
    """Every term times the weight of its kind; the objective is their sum.

    Args:
        terms: scalars named ``d_KIND`` or ``g_KIND``.
        weights: by kind, ``{"cls": 1, "rec": 10, "gp": 10}`` in the paper; 1 where there is none.

    Returns:
        Scalars under the same names.
    """
    return {name: weights.get(name[2:], 1.0) * term for name, term in terms.items()}


# ------------------------------------------------------------------ learning rate
def decayed_lr(
    step: int,
    base_lr: float,
    total_steps: int,
    decay_steps: int,
    every: int = 1000,
    mode: Schedule = "linear",
) -> float:
    """Learning rate in force during an iteration.

    Args:
        step: iteration, counted from 0.
        base_lr: before the decay.
        total_steps: iterations in all.
        decay_steps: how many of them, the last ones, the decay takes; 0 for none.
        every: the rate changes only at multiples of it.
        mode: ``"linear"`` falls to zero (paper); ``"reference"`` subtracts ``base_lr / decay_steps`` once every
            ``every`` iterations, so that the rate hardly falls (released code, an oversight).

    Raises:
        ValueError: ``decay_steps`` is not in 0..``total_steps``, ``every`` is below 1, or ``mode`` is unknown.
    """
    if not 0 <= decay_steps <= total_steps:
        raise ValueError(
            f"decay_steps={decay_steps} must be in 0..{total_steps}, the iterations in all "
            "(--model.decay_steps)"
        )
    if every < 1:
        raise ValueError(f"every={every} must be at least 1")
    if mode not in get_args(Schedule):
        raise ValueError(
            f"unknown lr_schedule={mode!r}; choose 'linear' or 'reference' (--model.lr_schedule)"
        )
    if not decay_steps:
        return base_lr
    start = total_steps - decay_steps
    if mode == "reference":
        updates = max(0, step // every - start // every)
        return base_lr * (1 - updates / decay_steps)
    passed = min(max(0, step // every * every - start), decay_steps)
    return base_lr * (1 - passed / decay_steps)
