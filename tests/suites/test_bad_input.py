"""What a user gets wrong: one clear message, a non-zero exit, and no traceback in its way."""

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tests.suites.launch import run
from tests.suites.members import ANALYSES, CASES, MEMBERS, Member

OSRCI = MEMBERS[0]


def message(arguments: list[str], folder: Path, *, root: Path | None = None, code: int = 1) -> str:
    text = run([*arguments, "--run.root", str(root or folder / "runs")], folder / "log.txt", code)
    assert "Traceback" not in text, text
    assert text.count("error: ") == 1, text
    return text[text.index("error: ") :]


def osrci(*extra: str) -> list[str]:
    return ["fit", *OSRCI.arguments(), *extra]


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        (["--data.dataset", "mnist", "--data.root", "/nowhere"], ["/nowhere", "--data.root"]),
        (["--data.dataset", "cifar10", "--data.root", "/nowhere"], ["/nowhere", "--data.root"]),
        (["--data.split", "7"], ["split 7", "0 to 4"]),
        (["--data.dataset", "cifar1"], ["cifar1", "cifar10"]),
        (["--data.batch_size", "5000"], ["5000", "--data.batch_size"]),
        (["--model.num_classes", "4"], ["num_classes=4", "6 known classes"]),
        (["--model.scale", "3"], ["3", "1, 2, 4, 8"]),
        (["--model.decision_score", "best"], ["'best'", "margin"]),
        (["--checkpoint.every_n_epochs", "0"], ["every_n_epochs", "0"]),
        (["--run.resume", "true"], ["--run.name"]),
    ],
    ids=lambda value: " ".join(value) if value and value[0].startswith("--") else "",
)
def test_argument(extra: list[str], expected: list[str], tmp_path: Path) -> None:
    line = message(osrci(*extra), tmp_path)
    for part in expected:
        assert part in line, line


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        (["--model.lr", "fast"], ["lr", "fast", "float"]),
        (["--model.learning_rate", "1"], ["learning_rate"]),
        (["--trainer.epochs", "1"], ["epochs"]),
    ],
    ids=lambda value: " ".join(value) if value and value[0].startswith("--") else "",
)
def test_option(extra: list[str], expected: list[str], tmp_path: Path) -> None:
    line = message(osrci(*extra), tmp_path, code=2)
    for part in expected:
        assert part in line, line


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        (["--data.normal", '["ten"]'], ["ten", "digits"]),
        (["--data.image_size", "24"], ["image_size=20", "24", "--model.image_size"]),
        (["--data.outlier_proportion", "1.5"], ["outlier_proportion=1.5"]),
        (["--data.outliers_per_class", "1000"], ["1000"]),
        (["--model.old_epoch", "40"], ["old_epoch=40"]),
        (["--data.dataset", "ped2", "--data.normal", "null"], ["test_limit=4", "ped2"]),
        (["--data.dataset", "caltech256", "--data.root", "/nowhere"], ["/nowhere"]),
    ],
    ids=lambda value: " ".join(value) if value and value[0].startswith("--") else "",
)
def test_one_class_argument(extra: list[str], expected: list[str], tmp_path: Path) -> None:
    (ognet,) = (member for member in MEMBERS if member.name == "ognet")
    line = message(["fit", *ognet.arguments(), *extra], tmp_path)
    for part in expected:
        assert part in line, line


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        (["--model.delta", "1.2"], ["delta=1.2", "(0, 1)"]),
        (["--model.backbone", "vgg17"], ["vgg17", "vgg16"]),
        (["--model.recipe", "px"], ["px", "acol"]),
        (["--model.num_classes", "3"], ["num_classes=3", "4 classes"]),
        (
            [
                "--model.backbone",
                "resnet18",
                "--model.pretrained",
                "true",
                "--model.weights_path",
                "no.pth",
            ],
            ["no.pth"],
        ),
        (["--data.shapes.colours", "[red]"], ["red"]),
        (["--data.dataset", "cub200", "--data.root", "/nowhere"], ["/nowhere"]),
    ],
    ids=lambda value: " ".join(value) if value and value[0].startswith("--") else "",
)
def test_localization_argument(extra: list[str], expected: list[str], tmp_path: Path) -> None:
    (acol,) = (member for member in MEMBERS if member.name == "acol")
    line = message(["fit", *acol.arguments(), *extra], tmp_path)
    for part in expected:
        assert part in line, line


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        (["--model.widths", '["W1A4"]'], ["W1A4", "from 2 to 8"]),
        (["--model.widths", '["W4A9"]'], ["W4A9", "from 2 to 8"]),
        (["--model.overrides", '{"0.1.conv": 8}'], ["0.1.conv", "it has: 0.0"]),
        (["--model.taps", "[layer1]"], ["layer1", "no tap"]),
        (["--model.norm", "group"], ["dfq, aciq, zeroq, mixed, zeroq_kd, gdfq", "batch norms"]),
        (["--model.network", "googlenet", "--model.in_channels", "3"], ["--model.taps"]),
        (["--model.teacher", "no.ckpt"], ["no.ckpt", "--model.teacher"]),
        (["--model.num_classes", "12"], ["num_classes=12", "10 classes"]),
        (["--data.image_size", "32"], ["image_size=16", "32", "--model.image_size"]),
        (["--data.training_images", "false"], ["--model.teacher"]),
        (["--data.dataset", "cifar10", "--data.root", "/nowhere"], ["/nowhere", "--data.root"]),
    ],
    ids=lambda value: " ".join(value) if value and value[0].startswith("--") else "",
)
def test_quantization_argument(extra: list[str], expected: list[str], tmp_path: Path) -> None:
    (zaq,) = (member for member in MEMBERS if member.label == "zaq-digits")
    line = message(["fit", *zaq.arguments(), *extra], tmp_path)
    for part in expected:
        assert part in line, line


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        (["--model.baselines", "[rq, gdfq]"], ["no gdfq here", "--model.baselines"]),
        (["--model.num_classes", "3"], ["num_classes=3", "2 classes"]),
        (["--model.taps", "[backbone.features]"], ["no tap", "backbone.features.9"]),
        (["--data.training_images", "false"], ["--model.teacher"]),
        (["--data.dataset", "voc2012", "--data.root", "/nowhere"], ["/nowhere", "--data.root"]),
    ],
    ids=lambda value: " ".join(value) if value and value[0].startswith("--") else "",
)
def test_detector_quantization_argument(
    extra: list[str], expected: list[str], tmp_path: Path
) -> None:
    (zaq,) = (member for member in MEMBERS if member.label == "zaq-shapes_detection")
    line = message(["fit", *zaq.arguments(), *extra], tmp_path)
    for part in expected:
        assert part in line, line


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        (["--model.generator", "resnet_0blocks"], ["resnet_0blocks", "resnet_9blocks"]),
        (["--model.grid", "1"], ["grid=1"]),
        (["--model.grid", "9"], ["--model.grid"]),
        (
            ["--model.channels_a", "1", "--model.channels_b", "1"],
            ["channels_a=1", "--model.channels_a 3"],
        ),
        (["--data.shapes_b", "{domian: night}"], ["domian", "domain"]),
        (["--data.shapes_b", "{domain: day}"], ["shapes_b", "same"]),
        (["--data.batch_size", "50"], ["50", "--data.batch_size"]),
        (["--data.dataset", "camvid", "--data.root", "/nowhere"], ["shapes_b"]),
    ],
    ids=lambda value: " ".join(value) if value and value[0].startswith("--") else "",
)
def test_translation_argument(extra: list[str], expected: list[str], tmp_path: Path) -> None:
    (opgan,) = (member for member in MEMBERS if member.name == "opgan")
    line = message(["fit", *opgan.arguments(), *extra], tmp_path)
    for part in expected:
        assert part in line, line


def attributes(name: str, *extra: str) -> list[str]:
    (member,) = (member for member in MEMBERS if member.name == name)
    return ["fit", *member.arguments(), *extra]


@pytest.mark.parametrize(
    ("name", "extra", "expected"),
    [
        ("stargan", ["--data.attributes", "[colour, bordr]"], ["bordr", "border"]),
        ("stargan", ["--model.attributes", "[red, green, blue]"], ["bordered", "same order"]),
        ("stargan", ["--model.exclusive", "[[red, green]]"], ["--model.exclusive", "blue"]),
        ("stargan", ["--model.edits", "+purple"], ["purple", "red, green, blue, bordered"]),
        ("stargan", ["--model.n_layers", "6"], ["6 halvings", "--data.image_size"]),
        ("stargan", ["--model.n_critic", "50"], ["n_critic=50", "never be updated"]),
        ("stargan", ["--data.unlabelled", "true"], ["--data.unlabelled false"]),
        ("stargan", ["--data.dataset", "celeba", "--data.root", "/nowhere"], ["/nowhere"]),
        ("matchgan", ["--data.n_groups", "2"], ["n_groups=2", "at least 3"]),
        ("matchgan", ["--model.n_groups", "2"], ["fewer than 3 labels", "--data.n_groups"]),
        ("matchgan", ["--data.attributes", "[border]"], ["2 different labels", "n_groups=4"]),
        ("matchgan", ["--data.labelled", "10%"], ["labelled=10%", "group_size=4", "red"]),
        ("matchgan", ["--data.labelled", "five"], ["labelled=five", "5%"]),
        ("matchgan", ["--data.balanced", "false"], ["--data.balanced true"]),
        ("matchgan", ["--data.batch_size", "24"], ["batch_size=24", "--data.batch_size 16"]),
    ],
    ids=lambda value: " ".join(value) if value and value[0].startswith("--") else "",
)
def test_attribute_argument(
    name: str, extra: list[str], expected: list[str], tmp_path: Path
) -> None:
    line = message(attributes(name, *extra), tmp_path)
    for part in expected:
        assert part in line, line


def test_a_folder_of_domains_one_level_off(tmp_path: Path) -> None:
    """One class would train to the identity without complaint."""
    for part in ("train", "test"):
        for domain in ("summer", "winter"):
            folder = tmp_path / "train" / "photos" / part / domain
            folder.mkdir(parents=True)
            for i in range(3):
                Image.new("RGB", (40, 40)).save(folder / f"{i}.png")
    command = ["fit", "-c", "configs/stargan/folder.yaml", "--data.num_workers", "0"]
    right = tmp_path / "train" / "photos"
    for root, expected in (
        (tmp_path, ["photos", "one"]),
        (right / "train", [str(right / "train"), "--data.root"]),
    ):
        line = message([*command, "--data.root", str(root)], tmp_path)
        for part in expected:
            assert part in line, line
    line = message(
        [*command, "--data.root", str(right), "--model.attributes", "[spring, winter]"], tmp_path
    )
    assert "summer" in line
    assert "--model.attributes" in line


def test_rules_that_are_no_errors(tmp_path: Path) -> None:
    """An odd number of residual blocks keeps them all; a generator that never meets a label is warned of."""
    run_test = ["--run.test", "false", "--run.root", str(tmp_path)]
    extra = ["--model.n_blocks", "3", "--model.n_critic", "2", "--model.schedule", "reference"]
    text = run([*attributes("matchgan", *extra), *run_test], tmp_path / "log.txt")
    assert "nothing is reconstructed" in text


def test_domains_that_do_not_fit(tmp_path: Path) -> None:
    """Each is told before anything is trained: an empty domain, grey beside colour, pictures below the crop."""
    parts = ("trainA", "trainB", "testA", "testB")
    command = ["fit", "-c", "configs/cyclegan/folder.yaml", "--data.num_workers", "0"]

    def fill(name: str, mode: str = "RGB", side: int = 160) -> list[str]:
        for part in parts:
            (tmp_path / name / part).mkdir(parents=True)
            for i in range(3):
                Image.new(mode, (side, side)).save(tmp_path / name / part / f"{i}.png")
        return [*command, "--data.root", str(tmp_path / name)]

    empty = fill("empty")
    for file in (tmp_path / "empty" / "trainB").iterdir():
        file.unlink()
    mixed = fill("mixed")
    Image.new("L", (160, 160)).save(tmp_path / "mixed" / "trainA" / "grey.png")
    small = [*fill("small", side=100), "--data.preprocess", "crop"]
    missing = [*command, "--data.root", str(tmp_path / "nothing")]
    for arguments, expected in (
        (empty, ["trainB"]),
        (mixed, ["grey.png", "--data.channels"]),
        (small, ["100x100", "--data.crop_size 100"]),
        (missing, [str(tmp_path / "nothing"), "--data.root"]),
        ([*fill("large"), "--data.crop_size", "200"], ["crop_size=200", "load_size=143"]),
    ):
        line = message(arguments, tmp_path)
        for part in expected:
            assert part in line, line


def test_pictures_and_boxes_that_do_not_fit(tmp_path: Path) -> None:
    for part in ("train", "validation"):
        for name in ("cat", "dog"):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(3):
                Image.new("RGB", (40, 40), (90 * i, 0, 0)).save(tmp_path / part / name / f"{i}.png")
    boxes = tmp_path / "boxes.csv"
    boxes.write_text("validation/cat/0.png,1,2,30,30\nvalidation/cat/elephant.png,1,2,30,30\n")
    command = ["fit", "-c", "configs/acol/folder.yaml", "--model.num_classes", "2"]
    command += ["--model.backbone", "small", "--model.pretrained", "false"]
    command += ["--data.root", str(tmp_path), "--data.num_workers", "0"]
    line = message([*command, "--data.boxes", str(boxes)], tmp_path)
    assert "elephant.png" in line
    for part in ("train", "validation"):
        for file in (tmp_path / part / "dog").iterdir():
            file.unlink()
        (tmp_path / part / "dog").rmdir()
    line = message(command, tmp_path)
    assert "cat" in line
    assert "two" in line or "one class" in line or "2" in line


def test_sets_that_cannot_be_compared(tmp_path: Path) -> None:
    """PRDC: each mistake is told before anything is embedded."""
    for name, rows, width in (("a", 9, 3), ("b", 9, 4), ("few", 4, 3), ("nan", 9, 3)):
        features = torch.randn(rows, width)
        features[2] = torch.nan if name == "nan" else features[2]
        torch.save(features, tmp_path / f"{name}.pt")
    (tmp_path / "empty").mkdir()
    good = str(tmp_path / "a.pt")
    for real, fake, extra, expected in (
        (good, str(tmp_path / "few.pt"), [], ["nearest_k 5", "9 real and 4 fake"]),
        (good, str(tmp_path / "b.pt"), [], ["3 dimensions", "b.pt 4"]),
        (good, str(tmp_path / "nan.pt"), [], ["1 of 9 rows", "nan.pt", "row 2"]),
        (good, str(tmp_path / "empty"), [], [str(tmp_path / "empty"), "pictures"]),
        (good, str(tmp_path / "no.npy"), [], [str(tmp_path / "no.npy"), "does not exist"]),
        (good, "mnits:test", [], ["mnits", "mnist"]),
        (good, "null", [], ["--data.fake", "--model.generator"]),
        (good, good, ["--model.features", "vgg17"], ["vgg17", "vgg16"]),
        (good, good, ["--model.features", "vgg16", "--model.weights_path", "no.pth"], ["no.pth"]),
        (good, good, ["--model.generator", "no.ckpt"], ["no.ckpt", "--model.generator"]),
    ):
        command = ["test", "-c", "configs/prdc/features.yaml", "--data.real", real]
        line = message([*command, "--data.fake", fake, *extra], tmp_path)
        for part in expected:
            assert part in line, line


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        (["--model.layer", "layer"], ["'layer'", "--model.layer"]),
        (["--model.layer", "2.33"], ["'2.33'", "2.3"]),
        (["--model.units", "[3, 24]"], ["[24]", "12 units"]),
        (["--model.checkpoint", "no.ckpt", "--model.network", "null"], ["no.ckpt"]),
        (["--model.network", "resnet19"], ["resnet19", "resnet18"]),
        (["--data.dataset", "camvid", "--data.root", "/nowhere"], ["/nowhere", "--data.root"]),
        (["--data.dataset", "broden", "--data.root", "/nowhere"], ["/nowhere", "--data.root"]),
        (["--data.limit", "3"], ["--data.shapes_test"]),
    ],
    ids=lambda value: " ".join(value) if value and value[0].startswith("--") else "",
)
def test_dissection_argument(extra: list[str], expected: list[str], tmp_path: Path) -> None:
    (dissection,) = (
        member for member in ANALYSES if member.config.endswith("dissection/shapes.yaml")
    )
    line = message(["test", *dissection.arguments(), *extra], tmp_path)
    for part in expected:
        assert part in line, line


def test_more_known_classes_than_exist(tmp_path: Path) -> None:
    protocol = tmp_path / "protocol.yaml"
    protocol.write_text("splits: [{known: [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11], unknown: []}]\n")
    line = message(osrci("--data.protocol", str(protocol)), tmp_path)
    assert "12" in line
    assert "10" in line


def test_unreadable_image(tmp_path: Path) -> None:
    for part in ("train", "test"):
        for name in ("cat", "dog", "eel"):
            for i in range(3):
                (tmp_path / part / name).mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (8, 8)).save(tmp_path / part / name / f"{i}.png")
    (tmp_path / "train" / "cat" / "1.png").write_bytes(b"not a picture")
    protocol = tmp_path / "protocol.yaml"
    protocol.write_text("splits: [{known: [cat, dog], unknown: [eel]}]\n")
    data = ["--data.dataset", "image_folder", "--data.root", str(tmp_path)]
    line = message(osrci(*data, "--data.protocol", str(protocol)), tmp_path)
    assert str(tmp_path / "train" / "cat" / "1.png") in line


def test_run_directory_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    line = message(osrci(), tmp_path, root=tmp_path / "file" / "runs")
    assert str(tmp_path / "file") in line
    assert "--run.root" in line


def test_a_run_is_never_overwritten(tmp_path: Path) -> None:
    taken = tmp_path / "runs" / "osrci-digits" / "mine"
    taken.mkdir(parents=True)
    (taken / "results.json").write_text("{}")
    line = message(osrci("--run.name", "mine"), tmp_path)
    assert "mine exists" in line
    assert "--run.resume true" in line
    assert (taken / "results.json").read_text() == "{}"


@pytest.mark.parametrize("member", CASES)
def test_checkpoint_of_another_paper(member: Member, tmp_path: Path) -> None:
    checkpoint = tmp_path / "other.ckpt"
    torch.save(
        {"module_class": "Other", "state_dict": {}, "pytorch-lightning_version": "2.6.6"},
        checkpoint,
    )
    line = message(["test", *member.arguments(), "--ckpt_path", str(checkpoint)], tmp_path)
    assert "written by Other" in line


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "x.ckpt"
    assert str(path) in message(["test", "--ckpt_path", str(path)], tmp_path)
    path.write_bytes(b"nothing")
    assert "not a readable checkpoint" in message(["test", "--ckpt_path", str(path)], tmp_path)


def test_a_malicious_checkpoint_features_or_name(tmp_path: Path) -> None:
    """Refused with what it is, and not run; neither can a name write elsewhere."""

    class Evil:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {tmp_path / 'victim'}",)

    evil = tmp_path / "evil.pt"
    torch.save({"state_dict": Evil()}, evil)
    (tmp_path / "evil.npy").write_bytes(pickle.dumps(Evil()))
    (zaq,) = (member for member in MEMBERS if member.label == "zaq-digits")
    features = ["test", "-c", "configs/prdc/features.yaml", "--data.fake", str(evil), "--data.real"]
    for arguments in (
        ["test", "--ckpt_path", str(evil)],
        ["fit", *zaq.arguments(), "--model.teacher", str(evil)],
        [*features, str(evil)],
        [*features, str(tmp_path / "evil.npy")],
    ):
        line = message(arguments, tmp_path)
        assert f"{tmp_path}/evil." in line
        assert "would have Python run posix.system; refused" in line, line
    assert not (tmp_path / "victim").exists()
    line = message(osrci("--run.name", "../../x"), tmp_path)
    assert "--run.name '../../x' must be one plain name" in line


def test_continuing_under_other_hyper_parameters_names_both_values(tmp_path: Path) -> None:
    arguments = osrci("--run.name", "a", "--run.test", "false", "--model.joint_epochs", "1")
    run([*arguments, "--run.root", str(tmp_path / "runs")], tmp_path / "first.txt")
    line = message([*arguments, "--run.resume", "true", "--model.lr", "0.5"], tmp_path)
    assert "lr: configuration 0.5, checkpoint 0.001" in line


def test_a_loss_that_is_no_number_stops_the_run(tmp_path: Path) -> None:
    line = message(osrci("--model.reconstruction_weight", ".inf"), tmp_path)
    assert "reconstruction = inf at epoch 0, batch 0" in line
    assert "checkpoint" in line


def test_help_is_short_and_names_the_sections(tmp_path: Path) -> None:
    text = run(["--help"], tmp_path / "log.txt")
    assert "fit" in text
    assert "predict" in text
