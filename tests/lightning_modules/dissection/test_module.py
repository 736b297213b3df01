"""Dissection as a program: planted formulas come back, whatever the number of processes, and after a kill."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from datamodules.probing import ProbingDataModule
from datamodules.real_fake import RealFakeDataModule
from datamodules.shapes_options import SceneOptions
from lightning_modules.acol import ACoL
from lightning_modules.dissection import Dissection
from lightning_modules.dissection.bounds import certified_search
from lightning_modules.dissection.collection import as_maps, find_layer, fingerprint_of
from lightning_modules.dissection.concepts import ConceptMasks
from lightning_modules.dissection.edits import cut_patch, paste_everywhere, paste_into, try_edits
from lightning_modules.dissection.formulas import (
    And,
    Formula,
    Leaf,
    Not,
    Or,
    parse_formula,
)
from lightning_modules.dissection.masks import rasterize_concepts, unit_masks
from lightning_modules.dissection.quantiles import quantile_threshold
from lightning_modules.dissection.scores import Scope, best_labels, netdissect_scores
from lightning_modules.dissection.search import Mode, beam_search
from lightning_modules.supervised import Classifier
from tests.suites.launch import run

SMALL = SceneOptions(image_size=32, shapes=("circle", "square", "star"), colours=("red", "green"))


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def scenes(count: int = 12, **options: Any) -> ProbingDataModule:
    given = {"shapes": SMALL, "eval_batch_size": 5, "shapes_train": 20, **options}
    data = ProbingDataModule(shapes_test=count, **given)
    data.setup("test")
    return data


def dissect(module: Dissection, data: ProbingDataModule, folder: Path) -> dict[str, float]:
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        default_root_dir=folder,
    )
    trainer.test(module, data, verbose=False)
    return {k.removeprefix("test/"): float(v) for k, v in trainer.callback_metrics.items()}


def all_masks(data: ProbingDataModule) -> Tensor:
    """Bool [C, N, H, W]."""
    layers = data._set.batch(range(len(data._set)))["layers"]
    return torch.stack([(layers == number).any(1) for number in data.concepts])


class Oracle(nn.Module):
    """Knows the images of a set: a unit is 1 where its formula is true, 0 elsewhere."""

    def __init__(self, data: ProbingDataModule, formulas: list[Formula]) -> None:
        super().__init__()
        images = data._set.batch(range(len(data._set)))["image"]
        masks = dict(zip(data.concepts, all_masks(data), strict=True))
        true = torch.stack([formula.evaluate(masks) for formula in formulas], 1)
        self.register_buffer("maps", true.float())
        self.places = {self._key(image): place for place, image in enumerate(images)}
        self.units = nn.Identity()
        self.head = nn.Linear(len(formulas), 3)
        self.calls = 0
        self.batch_sizes: set[int] = set()

    def _key(self, image: Tensor) -> bytes:
        return image.mul(255).round().byte().numpy().tobytes()

    def forward(self, images: Tensor) -> Tensor:
        self.calls += 1
        self.batch_sizes.add(len(images))
        places = torch.tensor([self.places[self._key(image)] for image in images])
        maps: Any = self.maps
        return self.head(self.units(maps[places]).mean((2, 3)))


class Convolutions(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 4, 3, 2, 1),
            nn.ReLU(inplace=True),
            nn.Conv2d(4, 6, 3, 2, 1),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(6, 3),
        )
        for number, parameter in enumerate(self.parameters()):
            parameter.data = torch.randn(parameter.shape, generator=generator(number))
        self.requires_grad_(False)


# ------------------------------------------------------------------------------- planted truth
PLANTED = [
    "red",
    "(star OR circle)",
    "(square AND green)",
    "(red AND (NOT dots))",
    "((star OR circle) AND red)",
    "((green AND (NOT star)) AND (NOT plain))",
]


def test_planted_units_are_recovered_through_the_whole_program(tmp_path: Path) -> None:
    data = scenes(40)
    names = {concept.name: number for number, concept in data.concepts.items()}
    formulas = [parse_formula(text, names) for text in PLANTED]
    # Zero is the threshold of a unit that is mostly zero: it fires where its formula is true.
    module = Dissection("units", network=Oracle(data, formulas), quantile=0.5, edits=0)
    values = dissect(module, data, tmp_path)
    for record, planted in zip(module.units, formulas, strict=True):
        found = module.formula_of(record)
        assert found is not None
        masks = dict(zip(data.concepts, all_masks(data), strict=True))
        assert torch.equal(found.evaluate(masks), planted.evaluate(masks)), record["text"]
        assert found.n_leaves <= planted.n_leaves
        assert record["certified"]
        assert record["iou"] == record["ceiling"] == pytest.approx(1)
        assert record["threshold"] == 0
    assert values["certified"] == 1
    assert values["iou"] == pytest.approx(sum(r["iou"] for r in module.units) / len(PLANTED))
    assert values["iou_length_1"] < values["iou_length_2"] < values["iou_length_3"]


def planted_formulas(data: ProbingDataModule, length: int, count: int) -> list[Formula]:
    """Random chains over shapes, colours and textures that are true somewhere."""
    labels = [n for n, concept in data.concepts.items() if concept.category != "background"]
    masks = dict(zip(data.concepts, all_masks(data), strict=True))
    stream = generator(length)

    def drawn(n: int) -> int:
        return int(torch.randint(n, (), generator=stream))

    found: list[Formula] = []
    while len(found) < count:
        formula: Formula = Leaf(labels[drawn(len(labels))])
        for _ in range(length - 1):
            leaf = Leaf(labels[drawn(len(labels))])
            kind = drawn(3)
            formula = (
                Or(formula, leaf) if kind == 0 else And(formula, leaf if kind == 1 else Not(leaf))
            )
        if bool(formula.evaluate(masks).any()):
            found.append(formula)
    return found


@pytest.mark.parametrize("length", [1, 2, 3])
def test_formulas_over_scenes_are_recovered_exactly(length: int) -> None:
    data = scenes(60, shapes=SceneOptions(image_size=32, max_objects=2, sizes=("large",)))
    masks = all_masks(data)
    concepts = ConceptMasks.from_masks(masks, list(data.concepts))
    by_label = dict(zip(data.concepts, masks, strict=True))
    for planted in planted_formulas(data, length, 30):
        unit = planted.evaluate(by_label)
        found = certified_search(unit, concepts, length)
        assert found.certified
        assert found.iou == pytest.approx(1)
        assert found.formula is not None
        assert torch.equal(found.formula.evaluate(by_label), unit)


def chains_of_five(data: ProbingDataModule, count: int) -> list[Formula]:
    """Chains as units have them: a choice of concepts that is narrowed, and a choice alone."""
    of: dict[str, list[int]] = {}
    for number, concept in data.concepts.items():
        of.setdefault(concept.category, []).append(number)
    stream = generator(5)
    chains: list[Formula] = []
    for _ in range(count):
        draws = {k: [v[i] for i in torch.randperm(len(v), generator=stream)] for k, v in of.items()}
        a, b, c, d, e = (Leaf(label) for label in draws["shape"][:3] + draws["colour"][:2])
        some = Or(Or(a, b), c)
        chains += [
            And(And(some, Not(d)), Not(e)),
            And(And(some, d), Not(Leaf(draws["texture"][0]))),
        ]
        chains.append(Or(Or(some, d), e))
    return chains


def test_formulas_of_five_concepts_are_recovered_by_the_beam() -> None:
    data = scenes(60, shapes=SceneOptions(image_size=32, max_objects=2, sizes=("large",)))
    masks = all_masks(data)
    concepts = ConceptMasks.from_masks(masks, list(data.concepts))
    by_label = dict(zip(data.concepts, masks, strict=True))

    def recovered(planted: list[Formula], beam_size: int) -> int:
        units = [formula.evaluate(by_label) for formula in planted]
        found = [beam_search(unit, concepts, beam_size, 5).formula for unit in units]
        return sum(
            formula is not None and torch.equal(formula.evaluate(by_label), unit)
            for formula, unit in zip(found, units, strict=True)
        )

    assert recovered(chains_of_five(data, 15), 10) == 45
    assert recovered(planted_formulas(data, 5, 30), 5) >= 18, "arbitrary chains may lead it astray"


# ------------------------------------------------------------------------------- the same numbers as by hand
def test_a_convolution_is_dissected_as_by_hand(tmp_path: Path) -> None:
    data = scenes(12)
    network: Any = Convolutions()
    module = Dissection(
        "2", network=network, quantile=0.05, scope="category", mode="reference", edits=0
    )
    dissect(module, data, tmp_path)
    batch = data._set.batch(range(12))
    activations = network[2](network[1](network[0](batch["image"])))
    thresholds = quantile_threshold(activations, 0.05)
    fires = unit_masks(activations, thresholds, (32, 32))
    masks = all_masks(data)
    categories = [concept.category for concept in data.concepts.values()]
    concepts = ConceptMasks.from_masks(masks, list(data.concepts), categories=categories)
    iou = netdissect_scores(fires, concepts, scope="category")
    for record in module.units:
        unit = record["unit"]
        assert record["threshold"] == float(thresholds[unit])
        expected = beam_search(fires[unit], concepts, mode="reference")
        assert record["iou"] == expected.iou
        assert expected.formula is not None
        assert record["formula"] == expected.formula.to_json()
        best = int(iou[unit].argmax())
        assert record["netdissect"]["iou"] == pytest.approx(float(iou[unit, best]), abs=1e-12)
        assert record["netdissect"]["label"] == list(data.concepts.values())[best].name
    predicted = network(batch["image"]).argmax(1)
    assert module.accuracy == pytest.approx(float((predicted == batch["label"]).float().mean()))
    shown = module.firing_masks(batch["image"][:3], [5, 1])
    assert torch.equal(shown, fires[[5, 1], :3])
    assert module._weights() is not None
    assert module.weight_source == "weights"


def test_a_proven_formula_replaces_that_of_a_narrow_beam(tmp_path: Path) -> None:
    data = scenes(20, shapes=SceneOptions(image_size=32))
    modes: tuple[Mode, ...] = ("distinct", "reference")
    found = {}
    for mode in modes:
        module = Dissection(
            "2",
            network=Convolutions(),
            quantile=0.05,
            beam_size=1,
            mode=mode,
            max_length=4,
            edits=0,
        )
        dissect(module, data, tmp_path / mode)
        found[mode] = module.units
        assert all(record["certified"] for record in module.units)
    beaten = [record["optimum_iou"] > record["beam_iou"] for record in found["distinct"]]
    assert any(beaten)
    for record in found["distinct"]:
        lengths = [step["iou"] for step in record["by_length"]]
        assert lengths == sorted(lengths)
        assert lengths[2] == record["optimum_iou"]
        assert record["iou"] == lengths[3] >= record["optimum_iou"]
    for record in found["reference"]:
        assert record["by_length"][2]["iou"] == record["beam_iou"] <= record["optimum_iou"]


def test_scopes_sum_the_same_areas_batch_by_batch(tmp_path: Path) -> None:
    data = scenes(12)
    found = {}
    scopes: tuple[Scope, ...] = ("all", "category", "active")
    for scope in scopes:
        module = Dissection(
            "2",
            network=Convolutions(),
            scope=scope,
            quantile=0.05,
            edits=0,
            certify=None,
        )
        dissect(module, data, tmp_path / scope)
        layers = list(Convolutions())[:3]
        activations = nn.Sequential(*layers)(data._set.batch(range(12))["image"])
        fires = unit_masks(activations, quantile_threshold(activations, 0.05), (32, 32))
        labels = data._set.batch(range(12))["layers"]
        _, dense = rasterize_concepts([{"all": list(layers)} for layers in labels], (32, 32))
        categories = [concept.category for concept in data.concepts.values()]
        iou = netdissect_scores(fires, dense, categories, scope)
        names = [concept.name for concept in data.concepts.values()]
        expected = best_labels(iou, categories, names)
        answers = [record["netdissect"]["by_category"] for record in module.units]
        assert answers == [{k: [*v] for k, v in row.items()} for row in expected]
        found[scope] = [row["shape"][1] for row in answers]
        assert not any(record["certified"] for record in module.units)
    assert found["all"] != found["active"]


def test_a_unit_that_never_fires(tmp_path: Path) -> None:
    data = scenes(6)
    network: Any = Convolutions()
    network[2].weight[1] = 0
    network[2].bias[1] = 0
    module = Dissection("2", network=network, quantile=0.05, max_length=2)
    values = dissect(module, data, tmp_path)
    silent = module.units[1]
    assert (silent["formula"], silent["iou"], silent["ceiling"]) == (None, 0, 0)
    assert silent["kind"] == "silent"
    assert silent["accuracy"] is None
    assert silent["top_images"] == []
    assert values["silent_units"] == 1
    assert len(silent["by_length"]) == 2


# ------------------------------------------------------------------------------- processes, kills, caches
ARGUMENTS = [
    *("test", "-c", "configs/dissection/shapes.yaml", "--data.shapes_test", "22"),
    *("--data.eval_batch_size", "6", "--data.shapes_train", "40", "--model.train_steps", "3"),
    *(
        "--model.width",
        "3",
        "--model.edits",
        "2",
        "--run.name",
        "a",
        "--trainer.accelerator",
        "cpu",
    ),
    *("--trainer.callbacks.pictures", "0"),
]


def of_processes(count: int, folder: Path) -> tuple[Any, dict[str, float]]:
    parallel = ["--trainer.devices", str(count)]
    if count > 1:
        parallel += ["--trainer.strategy", "ddp_fork"]
    run([*ARGUMENTS, *parallel, "--run.root", str(folder)], folder / "log.txt")
    (directory,) = folder.glob("*/test-a")
    units = json.loads((directory / "units.json").read_text())["units"]
    return units, json.loads((directory / "results.json").read_text())["metrics"]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return of_processes(1, tmp_path_factory.mktemp("one"))


@pytest.mark.slow
def test_two_processes_find_the_same(one_process: Any, tmp_path: Path) -> None:
    assert of_processes(2, tmp_path) == one_process


def test_four_processes_find_the_same_and_one_goes_on(one_process: Any, tmp_path: Path) -> None:
    one = one_process
    assert len(one[0]) == 12
    assert one[1]["test/units"] == 12
    assert of_processes(4, tmp_path / "4") == one
    (directory,) = (tmp_path / "4").glob("*/test-a")
    written = list((directory / "units").glob("rank-*.jsonl"))
    assert len(written) == 4
    # A kill in the middle of a record.
    lines = b"".join(path.read_bytes() for path in sorted(written)).splitlines(keepends=True)
    assert len(lines) == 12
    for path in written:
        path.unlink()
    (directory / "units" / "rank-3.jsonl").write_bytes(b"".join(lines[:4]) + lines[4][:50])
    arguments = [*ARGUMENTS, "--run.resume", "true", "--run.root", str(tmp_path / "4")]
    run(arguments, tmp_path / "again.txt")
    assert json.loads((directory / "units.json").read_text())["units"] == one[0]
    assert len((directory / "units" / "rank-0.jsonl").read_bytes().splitlines()) == 8


def test_what_is_known_is_not_computed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = scenes(9)
    names = {concept.name: number for number, concept in data.concepts.items()}
    formulas = [parse_formula(text, names) for text in PLANTED[:3]]
    network = Oracle(data, formulas)
    options: dict[str, Any] = {"network": network, "cache": str(tmp_path / "cache"), "edits": 0}
    options["quantile"] = 0.5
    first = Dissection("units", **options)
    values = dissect(first, data, tmp_path / "a")
    assert network.calls == 1 + 2 * 2, "one to see the layer, two batches in each of two passes"
    assert network.batch_sizes == {5}, "kernels may round differently at another size"
    second = Dissection("units", beam_size=3, **options)
    again = dissect(second, data, tmp_path / "b")
    assert network.calls == 6
    assert again == values
    # The search of the same run directory is taken over, too; another layer or quantile is another matter.
    monkeypatch.setattr(Dissection, "_explain", None)
    third = Dissection("units", **options)
    assert dissect(third, data, tmp_path / "a") == values
    assert [r["text"] for r in third.units] == [r["text"] for r in first.units]
    monkeypatch.undo()
    dissect(Dissection("units", **{**options, "quantile": 0.4}), data, tmp_path / "a")
    assert network.calls == 7 + 5
    shutil.rmtree(tmp_path / "cache")
    dissect(first, data, tmp_path / "a")
    assert network.calls == 12 + 5, "a module that is tested again keeps nothing to itself"


def test_fingerprints_see_every_weight() -> None:
    network: Any = Convolutions()
    before = fingerprint_of(network, "2", 0.005)
    assert fingerprint_of(Convolutions(), "2", 0.005) == before
    assert fingerprint_of(network, "1", 0.005) != before
    network[2].bias[3] += 1e-6
    assert fingerprint_of(network, "2", 0.005) != before


def test_a_checkpoint_and_a_network_trained_here(tmp_path: Path) -> None:
    data = scenes(8)
    trained = Dissection(
        "2", network="small", width=3, train_steps=2, train_batch_size=4, units=[0, 5], edits=0
    )
    dissect(trained, data, tmp_path)
    assert [record["unit"] for record in trained.units] == [0, 5]
    assert trained.classes == list(SMALL.shapes)
    assert isinstance(trained.network, Classifier)
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    trainer.strategy.connect(trained.network)
    path = tmp_path / "classifier.ckpt"
    trainer.save_checkpoint(path)
    again = Dissection("2", checkpoint=str(path), units=[0, 5], edits=0)
    dissect(again, data, tmp_path / "again")
    for mine, theirs in zip(again.units, trained.units, strict=True):
        assert mine == theirs


def test_an_acol_is_dissected_by_its_classes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    acol = ACoL(num_classes=3, backbone="small", width=2, head_width=4, pretrained=False)
    acol.class_names = list(SMALL.shapes)
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    trainer.strategy.connect(acol)
    path = tmp_path / "acol.ckpt"
    trainer.save_checkpoint(path)
    data = scenes(6)
    module = Dissection("network.backbone", checkpoint=str(path), edits=0, max_length=1)
    dissect(module, data, tmp_path)
    expected = acol.eval().classify(data._set.batch(range(6))["image"])
    assert torch.allclose(module.images["logits"].exp(), expected, atol=1e-6)
    assert module.classes == list(SMALL.shapes)


# ------------------------------------------------------------------------------- layers
def test_layers_of_other_kinds() -> None:
    maps = torch.randn(2, 5, 3, 4)
    assert as_maps(maps) is maps
    assert as_maps((maps, None)) is maps
    assert as_maps({"out": maps}) is maps
    tokens = torch.arange(2 * 10 * 3.0).view(2, 10, 3)
    grid = as_maps(tokens)
    assert grid.shape == (2, 3, 3, 3)
    assert grid[1, :, 0, 1].tolist() == tokens[1, 2].tolist(), "the class token is dropped"
    assert as_maps(tokens[:, 1:]).equal(grid)
    assert as_maps(torch.ones(2, 7)).shape == (2, 7, 1, 1)
    for wrong in (torch.ones(2, 7, 3), torch.ones(3), "text"):
        with pytest.raises(ValueError, match=r"--model\.layer"):
            as_maps(wrong)


def test_names_of_layers() -> None:
    module: Any = Classifier(3, width=2)
    assert find_layer(module, "network.2") is find_layer(module, "2")
    assert find_layer(module, "2.3") is module.network[2][3]
    with pytest.raises(ValueError, match=r"no layer 'netwrok\.2'.*network\.2"):
        find_layer(module, "netwrok.2")
    with pytest.raises(ValueError, match="it has"):
        find_layer(module, "@@@@")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "--model.checkpoint FILE or"),
        ({"checkpoint": "a", "network": "small"}, "--model.checkpoint FILE or"),
        ({"network": "small"}, "--model.train_steps"),
        ({"network": "resnet18", "pretrained": True, "train_steps": 3}, "--model.train_steps"),
        ({"network": Convolutions(), "quantile": 0.0}, "quantile=0.0"),
        ({"network": Convolutions(), "level": 1.0}, "level=1.0"),
        ({"network": Convolutions(), "alpha": 0.7}, "alpha=0.7"),
        ({"network": Convolutions(), "beam_size": 0}, "beam_size=0"),
        ({"network": Convolutions(), "scope": "some"}, "scope='some'.*active"),
        ({"network": Convolutions(), "upsample": "receptive_field"}, "field_scale"),
        ({"network": Convolutions(), "layer": "22"}, "no layer '22'"),
    ],
    ids=str,
)
def test_impossible_arguments(options: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        Dissection(**{"layer": "2", **options})


def test_what_is_missing_or_does_not_fit(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no\.ckpt.*--model\.checkpoint"):
        Dissection("2", checkpoint="no.ckpt")
    with pytest.raises(FileNotFoundError, match=r"no\.pth"):
        Dissection("layer4", network="resnet18", pretrained=True, weights_path="no.pth")
    data = scenes(3)
    with pytest.raises(ValueError, match=r"units=\[6\].*6 units of layer 2"):
        dissect(Dissection("2", network=Convolutions(), units=[2, 6]), data, tmp_path)
    unused: Any = Convolutions()
    unused[5].add_module("spare", nn.Conv2d(3, 3, 1))
    with pytest.raises(ValueError, match="takes no part"):
        dissect(Dissection("5.spare", network=unused), data, tmp_path)
    with pytest.raises(MisconfigurationException, match="probing set"):
        dissect(
            Dissection("2", network=Convolutions()),
            RealFakeDataModule("digits:test", "digits:train"),  # type: ignore[arg-type]
            tmp_path,
        )


# ------------------------------------------------------------------------------- edits
def test_patches() -> None:
    image = torch.rand(3, 8, 8, generator=generator(0))
    mask = torch.zeros(4, 4, dtype=torch.bool)
    mask[1, 1:3] = True
    patch = cut_patch(image, mask)
    assert patch is not None
    assert torch.equal(patch[:3], image[:, 2:4, 2:6])
    assert (patch[3] == 1).all()
    assert cut_patch(image, mask & False) is None
    assert cut_patch(image, ~mask) is None, "a background is no object"
    pasted = paste_everywhere(torch.zeros(3, 8, 8), torch.ones(4, 2, 4))
    assert pasted.shape == (9, 3, 8, 8)
    assert (pasted.sum((1, 2, 3)) == 24).all(), "inside everywhere"
    assert len(pasted.flatten(1).unique(dim=0)) == 9


def test_an_edit_is_tried_and_looked_at() -> None:
    """Class 0 has nothing, class 1 a bright pixel, class 2 bright pixels on the left; unit 1 sees brightness."""
    images = torch.zeros(6, 3, 8, 8)
    layers = torch.zeros(6, 1, 8, 8, dtype=torch.int64)
    labels = torch.tensor([0, 0, 1, 1, 2, -1])
    for place in (2, 3, 4, 5):
        images[place, :, 2:4, place % 3 : place % 3 + 2] = 1
        layers[place, :, 2:4, place % 3 : place % 3 + 2] = 7
    means = torch.stack([images.mean((1, 2, 3)) * 0, images.mean((1, 2, 3))], 1)
    # An image of the source class itself is no donor, however strongly the unit fires on it.
    layers[0, :, 6:, 6:] = 7
    means[0, 1] = 9

    def classify(batch: Tensor) -> Tensor:
        bright = batch.mean((1, 2, 3)) > 0
        return torch.stack([~bright, bright, bright & False], 1).float() * 9

    weight = torch.tensor([[1.0, -1.0], [0.0, 2.0], [0.0, 0.0]])
    asked: list[int] = []

    def sample(place: int) -> tuple[Tensor, Tensor]:
        asked.append(place)
        return images[place], layers[place]

    edits = try_edits(
        classify,
        sample,
        weight,
        {1: Leaf(7)},
        labels,
        classify(images).argmax(1),
        means,
        means > 0,
        count=2,
    )
    first = edits[0]
    assert (first.source, first.target, first.unit) == (0, 1, 1)
    assert first.donor == 4, "of a third class first"
    assert first.donor_class == 2
    assert first.images == [0, 1]
    assert first.pasted == 18
    assert first.outcomes == {"success": 1.0, "failure": 0.0, "partial_success": 0.0}
    assert first.predicted == (0, 1)
    assert first.probability[0] < 0.01 < 0.99 < first.probability[1]
    assert torch.equal(classify(first.after[None]).argmax(1), torch.tensor([1]))
    assert edits[1].donor in (2, 3), "then of the target"
    outcomes = paste_into(classify, [images[0]], torch.ones(4, 2, 2), 0, 2, -1)[1]
    assert outcomes["partial_success"] == 1, "changed, but not to class 2"
