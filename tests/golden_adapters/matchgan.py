"""MatchGAN: from golden cases to lightning_modules.matchgan, its data splits and the metrics of its evaluation."""

from collections.abc import Callable
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from datamodules.attribute_splits import balanced_label_split, identity_label_split
from lightning_modules.attributes import LabelKind, enumerate_label_space
from lightning_modules.matchgan import MatchGAN
from lightning_modules.matchgan.classifier import AttributeClassifier, classifier_lr
from lightning_modules.matchgan.losses import match_loss
from lightning_modules.matchgan.networks import MatchGANDiscriminator
from lightning_modules.matchgan.pairs import match_pair_indices, match_targets
from lightning_modules.matchgan.schedule import reference_class_sampler, step_kind
from lightning_modules.metrics.frechet import frechet_distance
from lightning_modules.metrics.inception import inception_score_from_probs
from lightning_modules.metrics.translation import gan_test_accuracy, gan_train_accuracy
from lightning_modules.stargan.labels import one_hot
from lightning_modules.stargan.losses import weighted
from lightning_modules.stargan.module import Task
from tests.golden_adapters.stargan import Scripted, loaded, logged, losses_and_gradients
from tests.scripted import fit_one_epoch

Case = dict[str, Any]
Values = dict[str, Any]


def _tensor(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# ------------------------------------------------------------------ labels, pairs and splits
def label_space(case: Case) -> Values:
    labels = enumerate_label_space(case["inputs"]["attributes"])
    return {"labels": labels, "n": len(labels)}


def pairs(case: Case) -> Values:
    return dict(
        zip(("anchor", "other", "is_match"), match_pair_indices(**case["inputs"]), strict=True)
    )


def targets(case: Case) -> Values:
    inputs = case["inputs"]
    ids, space = torch.tensor(inputs["label_ids"]), _tensor(inputs["label_space"])
    vectors, regroup = match_targets(space[ids])
    repeated, _ = match_targets(ids)
    return {"targets": vectors, "regroup": regroup, "regrouped_ids": repeated[regroup]}


def schedule(case: Case) -> Values:
    inputs = case["inputs"]
    kinds = [
        step_kind(i, inputs["has_unlabelled"], inputs["n_critic"]) for i in range(inputs["n_iters"])
    ]
    return {
        "labelled": [int(kind.labelled) for kind in kinds],
        "update_generator": [int(kind.update_generator) for kind in kinds],
    }


def sampler(case: Case) -> Values:
    inputs = case["inputs"]
    draws = islice(reference_class_sampler(inputs["n_classes"], inputs["seed"]), inputs["n_iters"])
    sources, target_ids = zip(*draws, strict=True)
    return {"source_classes": sources, "target_ids": target_ids}


def subsample(case: Case) -> Values:
    inputs = case["inputs"]
    space = enumerate_label_space(inputs["attributes"])
    split = balanced_label_split(
        torch.tensor(inputs["labels"]), inputs["partition"], inputs["n_labelled"], space
    )
    return split._asdict()


def identity_split(case: Case) -> Values:
    labelled, unlabelled = identity_label_split(**case["inputs"])
    return {"labelled": labelled, "n_unlabelled": len(unlabelled)}


# ------------------------------------------------------------------ losses
def pair_loss(case: Case) -> Values:
    inputs = case["inputs"]
    return {"loss": match_loss(_tensor(inputs["pair_logits"]), torch.tensor(inputs["is_match"]))}


def structured_pair_loss(case: Case) -> Values:
    _, _, is_match = match_pair_indices(16)
    positive = int(is_match.sum())
    return {
        "loss": match_loss(_tensor(case["inputs"]["pair_logits"]), is_match),
        "n_positive": positive,
        "n_negative": len(is_match) - positive,
    }


KINDS = ("cls", "rec", "gp", "match")


def _total(terms: dict[str, Tensor], inputs: Case) -> Tensor:
    weights = {kind: inputs[f"lambda_{kind}"] for kind in KINDS}
    return torch.stack(list(weighted(terms, weights).values())).sum()


def objectives(case: Case) -> Values:
    inputs = case["inputs"]

    def total(*names: str) -> Tensor:
        return _total({name: _tensor(inputs[name]) for name in names}, inputs)

    return {
        "d_labelled": total("d_real", "d_fake", "d_cls", "d_gp", "d_match"),
        "d_unlabelled": total("d_real", "d_fake", "d_gp"),
        "g_labelled": total("g_fake", "g_cls", "g_rec", "g_match"),
        "g_unlabelled": total("g_fake", "g_cls", "g_match"),
    }


# ------------------------------------------------------------------ networks
def _n_params(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def discriminator_sizes(case: Case) -> Values:
    inputs = dict(case["inputs"])
    batch, size = inputs.pop("batch"), inputs["image_size"]
    with torch.device("meta"):
        network = MatchGANDiscriminator(**inputs)
        x = torch.zeros(batch, 3, size, size)
        src, cls = network(x)
        match = network.match(x, x)
    return {
        "n_params": _n_params(network),
        "match_weight": network.match_head.weight.shape,
        "src_shape": src.shape,
        "cls_shape": cls.shape,
        "match_shape": match.shape,
    }


def classifier_sizes(case: Case) -> Values:
    network = AttributeClassifier(**case["inputs"])
    return {
        "n_params": _n_params(network),
        "fc_in": network.hidden.in_features,
        "fc_hidden": network.hidden.out_features,
    }


def _discriminator(inputs: Case) -> MatchGANDiscriminator:
    sizes = {name: inputs[name] for name in ("image_size", "conv_dim", "c_dim", "repeat_num")}
    return loaded(MatchGANDiscriminator(**sizes), inputs)


@torch.no_grad()
def match_head(case: Case) -> Values:
    inputs = case["inputs"]
    network, x1, x2 = _discriminator(inputs), _tensor(inputs["x1"]), _tensor(inputs["x2"])
    src, cls = network(x1)
    return {
        "match": network.match(x1, x2),
        "match_swapped": network.match(x2, x1),
        "src": src,
        "cls": cls,
    }


# ------------------------------------------------------------------ steps
class _ScriptedMatchGAN(Scripted, MatchGAN):
    def __init__(self, inputs: Case, **arguments: Any) -> None:
        names = [f"a{i}" for i in range(inputs["g"]["c_dim"])]
        super().__init__(inputs, attributes=names, **arguments)
        self.chosen = iter(inputs.get("target_ids", []))

    def draw_targets(self, labels: int, block: int) -> Tensor:
        return torch.tensor(next(self.chosen))


def step(case: Case) -> Values:
    inputs = case["inputs"]
    kind: LabelKind = "multi_label" if inputs["kind"] == "CelebA" else "single_label"
    module = _ScriptedMatchGAN(inputs, label_kind=kind)
    count = module.dims[0]
    space = _tensor(inputs["label_space"]) if kind == "multi_label" else torch.eye(count).double()
    names = ("source_label_ids", "target_label_ids")
    source, chosen = (space[torch.tensor(inputs[name])] for name in names)
    source = source.repeat_interleave(4, 0)
    target, _ = match_targets(chosen)
    known = inputs["labelled"]
    task = Task(
        _tensor(inputs["x_real"]),
        source if known else None,
        target,
        module.class_label(source) if known else None,
        module.class_label(target),
    )
    return losses_and_gradients(module, task, _tensor(inputs["alpha"]))


def trace(case: Case) -> Values:
    inputs = case["inputs"]
    module = _ScriptedMatchGAN(inputs, label_kind="single_label", decay_steps=0)
    batches = []
    for i, classes in enumerate(inputs["class_orders"]):
        if module.batch_kind(i) == "labelled":
            x = torch.cat([_tensor(inputs["labelled"][str(k)]) for k in classes])
            attributes = one_hot(torch.tensor(classes).repeat_interleave(4), module.dims[0])
            batches.append({"labelled": {"image": (x + 1) / 2, "attributes": attributes}})
        else:
            x = _tensor(inputs["unlabelled"])
            batches.append({"unlabelled": {"image": (x + 1) / 2}})
    fit_one_epoch(module.double(), batches, None)
    return {
        **logged(module.steps),
        "g_norms": [p.norm() for p in module.generator.parameters()],
        "d_norms": [p.norm() for p in module.discriminator.parameters()],
    }


# ------------------------------------------------------------------ evaluation
def learning_rate(case: Case) -> Values:
    return {"lr": [classifier_lr(epoch) for epoch in case["inputs"]["epochs"]]}


def gan_test(case: Case) -> Values:
    inputs = case["inputs"]
    found = gan_test_accuracy(torch.tensor(inputs["targets"]), torch.tensor(inputs["predictions"]))
    return dict(zip(("per_domain", "mean"), found, strict=True))


def gan_train(case: Case) -> Values:
    inputs = case["inputs"]
    multi = case["family"] == "gan_train_accuracy_multi_label"
    kind: LabelKind = "multi_label" if multi else "single_label"
    found = gan_train_accuracy(_tensor(inputs["logits"]), torch.tensor(inputs["labels"]), kind)
    return dict(zip(("per_attribute", "mean"), found, strict=True))


def inception_score(case: Case) -> Values:
    inputs = case["inputs"]
    found = inception_score_from_probs(_tensor(inputs["probs"]), inputs["splits"])
    return dict(zip(("mean", "std"), found, strict=True))


def frechet(case: Case) -> Values:
    names = ("mu1", "sigma1", "mu2", "sigma2")
    return {"fid": frechet_distance(*(_tensor(case["inputs"][name]) for name in names))}


ADAPTERS: dict[str, Callable[[Case], Values]] = {
    "label_space": label_space,
    "match_pairs": pairs,
    "match_targets": targets,
    "match_loss": pair_loss,
    "match_loss_structured": structured_pair_loss,
    "combined_objectives": objectives,
    "step_schedule": schedule,
    "reference_sampler": sampler,
    "subsample": subsample,
    "identity_split": identity_split,
    "match_head_forward": match_head,
    "discriminator_arch": discriminator_sizes,
    "attribute_classifier_arch": classifier_sizes,
    "classifier_lr": learning_rate,
    "gan_test_accuracy_multi_label": gan_test,
    "gan_test_accuracy_single_label": gan_test,
    "gan_train_accuracy_multi_label": gan_train,
    "gan_train_accuracy_single_label": gan_train,
    "inception_score": inception_score,
    "frechet_distance": frechet,
    "step_labelled": step,
    "step_unlabelled_multi_label": step,
    "training_trace": trace,
}
