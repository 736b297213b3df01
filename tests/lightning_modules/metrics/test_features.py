from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchvision.models import ResNet18_Weights, get_model, get_model_weights
from torchvision.transforms.functional import normalize

from lightning_modules.metrics import features
from lightning_modules.metrics.features import (
    FeatureExtractor,
    InceptionFeatures,
    PixelFeatures,
    RandomVGG16Features,
    TorchvisionFeatures,
    VGG16Features,
    feature_extractor,
)


def images(count: int = 3, channels: int = 3, height: int = 32, width: int = 32) -> Tensor:
    generator = torch.Generator().manual_seed(count + height)
    return torch.rand(count, channels, height, width, generator=generator)


def untrained(name: str, seed: int = 0, **options: Any) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return get_model(name, **options).eval()


@pytest.fixture(scope="module")
def random_vgg16() -> RandomVGG16Features:
    return RandomVGG16Features()


@pytest.fixture(scope="module")
def resnet18() -> nn.Module:
    return untrained("resnet18")


@pytest.fixture(scope="module")
def resnet18_file(resnet18: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("weights") / "mine.pth"
    torch.save(resnet18.state_dict(), file)
    return file


@pytest.fixture(autouse=True)
def checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The empty folder in which torch.hub keeps weights."""
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


@pytest.fixture
def global_rng_untouched() -> Iterator[None]:
    before = torch.random.get_rng_state()
    yield
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.fixture(params=["pixels", "random_vgg16", "resnet18"])
def extractor(
    request: pytest.FixtureRequest, random_vgg16: RandomVGG16Features, resnet18_file: Path
) -> FeatureExtractor:
    if request.param == "random_vgg16":
        return random_vgg16
    file = str(resnet18_file) if request.param == "resnet18" else None
    return feature_extractor(request.param, file)


class TestEveryExtractor:
    def test_gives_float32_features_of_the_announced_length(
        self, extractor: FeatureExtractor
    ) -> None:
        for batch in (images(2), images(2).bfloat16(), images(2).double(), images(0)):
            result = extractor(batch)
            assert result.dtype == torch.float32
            assert result.shape == (len(batch), extractor.num_features or 3 * 32 * 32)
            assert result.isfinite().all()

    def test_is_frozen(self, extractor: FeatureExtractor) -> None:
        parent = nn.Sequential(extractor).train(True)
        extractor.train()
        assert not any(module.training for module in extractor.modules())
        assert not any(parameter.requires_grad for parameter in parent.parameters())
        assert not extractor(images(1).requires_grad_(True)).requires_grad

    def test_does_not_depend_on_the_rest_of_the_batch(self, extractor: FeatureExtractor) -> None:
        batch = images(5)
        alone = torch.cat([extractor(image[None]) for image in batch])
        torch.testing.assert_close(extractor(batch), alone, rtol=1e-4, atol=1e-5)

    def test_mixed_precision_changes_nothing(self, extractor: FeatureExtractor) -> None:
        expected = extractor(images())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(extractor(images()), expected)
        nn.Sequential(extractor).to(torch.bfloat16)
        assert torch.equal(extractor(images()), expected)

    def test_follows_to_another_device(self) -> None:
        parent = nn.Sequential(FeatureExtractor(nn.Linear(2, 2), 2, "")).to("meta")
        assert {parameter.device.type for parameter in parent.parameters()} == {"meta"}

    @pytest.mark.parametrize(
        ("batch", "message"),
        [
            (images()[0], r"got torch.float32 \[3, 32, 32\]"),
            (images(channels=2), r"\[3, 2, 32, 32\]"),
            ((images() * 255).byte(), "got torch.uint8"),
            (images() * 2 - 1, r"got values from -0\.9.*\(images \+ 1\) / 2"),
            (images() * 255, "got values from"),
            (images() * torch.nan, "nan"),
        ],
    )
    def test_refuses_what_is_no_image_in_0_1(self, batch: Tensor, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            PixelFeatures()(batch)

    def test_accepts_the_rounding_of_half_precision(self) -> None:
        batch = images()
        batch[0, 0, 0, :2] = torch.tensor([-1e-4, 1 + 1e-4])
        PixelFeatures()(batch)


class TestPixels:
    def test_are_the_flattened_images(self) -> None:
        batch = images(2, 1, 3, 4)
        extractor = PixelFeatures()
        assert extractor.num_features is None
        assert "pixels" in extractor.description
        result = extractor(batch)
        assert torch.equal(result, batch.view(2, 12))
        batch.zero_()
        assert result.any()


class TestRandomVGG16:
    def test_grey_images_are_repeated(self, random_vgg16: RandomVGG16Features) -> None:
        grey = images(channels=1)
        assert torch.equal(random_vgg16(grey), random_vgg16(grey.expand(-1, 3, -1, -1)))

    def test_small_sides_are_enlarged_to_32(self, random_vgg16: RandomVGG16Features) -> None:
        small = images(2, 3, 8, 40)
        enlarged = F.interpolate(small, (32, 40), mode="bilinear")
        torch.testing.assert_close(random_vgg16(small), random_vgg16(enlarged))
        assert "sides below 32 enlarged to 32" in random_vgg16.description

    def test_image_size_resizes_with_antialiasing(self) -> None:
        batch = images(2, 3, 80, 64)
        resized = F.interpolate(batch, (40, 40), mode="bilinear", antialias=True)
        own, sized = (RandomVGG16Features(init="kaiming", image_size=size) for size in (None, 40))
        torch.testing.assert_close(sized(batch), own(resized))
        assert not torch.allclose(sized(batch), own(batch), rtol=1e-2)
        assert "40x40" in sized.description

    def test_normalises_as_for_imagenet(self, random_vgg16: RandomVGG16Features) -> None:
        preset = get_model_weights("vgg16").DEFAULT.transforms()
        expected = normalize(images(), preset.mean, preset.std)
        assert torch.equal(random_vgg16.prepare(images()), expected)

    @pytest.mark.parametrize("init", ["orthogonal", "kaiming"])
    def test_signal_keeps_its_size_through_the_layers(self, init: features.Init) -> None:
        extractor = RandomVGG16Features(init=init, seed=3)
        outputs: list[Tensor] = []
        for layer in extractor.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                layer.register_forward_hook(lambda *call: outputs.append(call[2].clone()))
        result = extractor(images(16))
        assert len(outputs) == 14
        for output in outputs:
            assert 0.2 < output.square().mean().sqrt() < 10
        assert 0.02 < result.std(0).mean() < 1
        assert init in extractor.description

    def test_last_layer_is_an_orthogonal_projection(
        self, random_vgg16: RandomVGG16Features
    ) -> None:
        (weight,) = (m.weight for m in random_vgg16.modules() if isinstance(m, nn.Linear))
        torch.testing.assert_close(weight @ weight.T, torch.eye(64), atol=1e-5, rtol=0)

    @pytest.mark.usefixtures("global_rng_untouched")
    def test_same_seed_same_weights(self, random_vgg16: RandomVGG16Features) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(123)
            again = RandomVGG16Features(seed=0)
        assert torch.equal(again(images()), random_vgg16(images()))
        assert "seed 0" in again.description

    def test_weights_do_not_follow_the_default_type(self) -> None:
        expected = RandomVGG16Features(init="kaiming")
        torch.set_default_dtype(torch.bfloat16)
        try:
            again = RandomVGG16Features(init="kaiming")
        finally:
            torch.set_default_dtype(torch.float32)
        assert torch.equal(again(images()), expected(images()))

    def test_full_form_has_the_layers_of_4096_and_resizes_to_224(self) -> None:
        extractor = RandomVGG16Features(dim=7, init="kaiming", full=True)
        linear = [m for m in extractor.modules() if isinstance(m, nn.Linear)]
        assert [(m.in_features, m.out_features) for m in linear] == [
            (25088, 4096),
            (4096, 4096),
            (4096, 7),
        ]
        assert extractor.prepare(images(1)).shape == (1, 3, 224, 224)
        result = extractor(images(1))
        assert result.shape == (1, 7)
        assert 0.1 < result.square().mean().sqrt() < 10
        assert "224x224" in extractor.description

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"dim": 0}, "dim=0"),
            ({"init": "xavier"}, "xavier.*orthogonal.*kaiming"),
            ({"image_size": 16}, "image_size=16.*32"),
        ],
    )
    def test_bad_options(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            RandomVGG16Features(**options)

    def test_serves_a_metric_of_torchmetrics(self, random_vgg16: RandomVGG16Features) -> None:
        fid = FrechetInceptionDistance(feature=random_vgg16, normalize=True)
        fid.update(images(8), real=True)
        fid.update(images(8), real=False)
        assert fid.compute() < 1e-3
        fid.update(images(8).sqrt(), real=False)
        assert fid.compute() > 1e-2


class Tiny(nn.Module):
    """Stands for a large network of torchvision."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        layers = [nn.Linear(3, 6), nn.ReLU(True), nn.Dropout()]
        layers += [nn.Linear(6, 6), nn.ReLU(True), nn.Dropout(), nn.Linear(6, 5)]
        self.classifier = nn.Sequential(*layers)

    def forward(self, batch: Tensor) -> Tensor:
        return self.classifier(self.features(batch))


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Tiny, str, list[dict[str, Any]]]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = Tiny().eval()
    torch.save(network.state_dict(), tmp_path / "tiny.pth")
    calls: list[dict[str, Any]] = []

    def build(name: str, **options: Any) -> Tiny:
        calls.append({"name": name, **options})
        return Tiny()

    monkeypatch.setattr(features, "get_model", build)
    return network, str(tmp_path / "tiny.pth"), calls


def as_the_preset(name: str, batch: Tensor) -> Tensor:
    preset = get_model_weights(name).DEFAULT.transforms()
    resized = torchvision.transforms.functional.resize(
        batch, preset.crop_size * 2, interpolation=preset.interpolation, antialias=True
    )
    return normalize(resized, preset.mean, preset.std)


class TestTorchvision:
    def test_features_times_the_last_layer_are_the_logits(
        self, resnet18: nn.Module, resnet18_file: Path
    ) -> None:
        extractor = TorchvisionFeatures("resnet18", str(resnet18_file))
        batch = images(2, 3, 300, 60)
        with torch.no_grad():
            logits = resnet18(as_the_preset("resnet18", batch))
            result = resnet18.get_submodule("fc")(extractor(batch))
        torch.testing.assert_close(result, logits)
        assert extractor.num_features == 512
        assert logits.std() > 0.1

    def test_description_says_how(self, resnet18_file: Path) -> None:
        description = TorchvisionFeatures("resnet18", str(resnet18_file)).description
        for part in ("resnet18", "mine.pth", "last linear", "224x224", "bilinear", "no crop"):
            assert part in description
        assert "(0.485, 0.456, 0.406)" in description

    @pytest.mark.usefixtures("global_rng_untouched")
    def test_reads_the_folder_of_torch_hub(self, resnet18_file: Path, checkpoints: Path) -> None:
        cached = checkpoints / ResNet18_Weights.DEFAULT.url.rpartition("/")[2]
        cached.symlink_to(resnet18_file)
        by_path = TorchvisionFeatures("resnet18", str(resnet18_file))
        assert torch.equal(TorchvisionFeatures("resnet18")(images()), by_path(images()))

    @pytest.mark.parametrize("name", ["densenet121", "googlenet"])
    def test_network_is_the_one_torchvision_builds_with_weights(
        self, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        options = {"init_weights": False} if name == "googlenet" else {}
        state = untrained(name, **options).state_dict()
        if name == "googlenet":  # against the loss of the signal by torch's default weights
            state = {key: value * (2.5 if value.dim() == 4 else 1) for key, value in state.items()}
        else:  # as in its published file
            state = {
                key.replace("norm1", "norm.1").replace("norm2", "norm.2"): value
                for key, value in state.items()
                if "num_batches_tracked" not in key
            }
        torch.save(state, tmp_path / "weights.pth")
        weights = get_model_weights(name).DEFAULT
        monkeypatch.setattr(weights, "get_state_dict", lambda **_: dict(state), raising=False)
        expected = get_model(name, weights=weights).eval()
        extractor = TorchvisionFeatures(name, str(tmp_path / "weights.pth"))
        linear = [m for m in expected.modules() if isinstance(m, nn.Linear)][-1]
        batch = images(1)
        with torch.no_grad():
            logits = expected(as_the_preset(name, batch))
            torch.testing.assert_close(linear(extractor(batch)), logits)
            assert not torch.allclose(expected(torch.zeros(1, 3, 224, 224)), logits, atol=1e-2)

    def test_bicubic_resizing_stays_in_range(
        self, tiny: tuple[Tiny, str, list[dict[str, Any]]]
    ) -> None:
        extractor = TorchvisionFeatures("swin_t", tiny[1])
        edges = torch.zeros(1, 3, 16, 16)
        edges[..., ::4] = 1
        prepared = extractor.prepare(edges)
        resized = F.interpolate(edges, (224, 224), mode="bicubic", antialias=True)
        assert resized.amin() < -0.01
        expected = normalize(resized.clamp(0, 1), extractor.mean, extractor.std)
        torch.testing.assert_close(prepared, expected)

    def test_transformer_is_built_for_the_input_size_of_its_weights(
        self, tiny: tuple[Tiny, str, list[dict[str, Any]]]
    ) -> None:
        extractor = TorchvisionFeatures("vit_h_14", tiny[1])
        assert tiny[2] == [{"name": "vit_h_14", "image_size": 518}]
        assert extractor.prepare(images(1)).shape == (1, 3, 518, 518)

    def test_missing_weights_are_named(
        self, checkpoints: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(
            torch.hub, "download_url_to_file", lambda *_, **__: pytest.fail("downloads")
        )
        with pytest.raises(FileNotFoundError) as caught:
            TorchvisionFeatures("resnet18")
        for part in (
            str(checkpoints / "resnet18-f37072fd.pth"),
            "https://download.pytorch.org/models/resnet18-f37072fd.pth",
            "--model.weights_path FILE",
            "--model.download true",
        ):
            assert part in str(caught.value)

    @pytest.mark.parametrize("download", [False, True])
    def test_a_path_that_does_not_exist_is_not_replaced(
        self, download: bool, resnet18_file: Path, checkpoints: Path, tmp_path: Path
    ) -> None:
        (checkpoints / "resnet18-f37072fd.pth").symlink_to(resnet18_file)
        with pytest.raises(FileNotFoundError, match=r"nothing\.pth"):
            TorchvisionFeatures("resnet18", str(tmp_path / "nothing.pth"), download)

    def test_download_leaves_the_file_in_the_folder(
        self, resnet18_file: Path, checkpoints: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fetch(url: str, target: str, *_: Any, **__: Any) -> None:
            assert url == ResNet18_Weights.DEFAULT.url
            Path(target).symlink_to(resnet18_file)

        monkeypatch.setattr(torch.hub, "download_url_to_file", fetch)
        extractor = TorchvisionFeatures("resnet18", download=True)
        assert [file.name for file in checkpoints.iterdir()] == ["resnet18-f37072fd.pth"]
        by_path = TorchvisionFeatures("resnet18", str(resnet18_file))
        assert torch.equal(extractor(images()), by_path(images()))

    def test_failed_download_says_what_else_to_do(self) -> None:
        # tests/conftest.py refuses the connection
        with pytest.raises(RuntimeError, match=r"could not be downloaded.*--model.weights_path"):
            TorchvisionFeatures("resnet18", download=True)

    @pytest.mark.parametrize("content", [b"", b"<html>not found</html>", "list", "other network"])
    def test_wrong_file_is_named(self, content: bytes | str, tmp_path: Path) -> None:
        file = tmp_path / "wrong.pth"
        wrong = "does not hold the weights of resnet18"
        if isinstance(content, bytes):
            file.write_bytes(content)
            wrong = "is not a readable file of the weights of resnet18"
        else:
            torch.save([1, 2] if content == "list" else nn.Linear(2, 2).state_dict(), file)
        with pytest.raises(RuntimeError, match=rf"wrong\.pth {wrong}"):
            TorchvisionFeatures("resnet18", str(file))

    def test_runs_no_code_of_a_file(self, tmp_path: Path) -> None:
        class Touch:
            def __reduce__(self) -> tuple[Any, ...]:
                return Path.touch, (tmp_path / "touched",)

        torch.save({"fc.weight": Touch()}, tmp_path / "wrong.pth")
        with pytest.raises(RuntimeError, match=r"wrong\.pth"):
            TorchvisionFeatures("resnet18", str(tmp_path / "wrong.pth"))
        assert not (tmp_path / "touched").exists()

    def test_weights_are_not_rounded_to_the_default_type(self, resnet18_file: Path) -> None:
        expected = TorchvisionFeatures("resnet18", str(resnet18_file))
        torch.set_default_dtype(torch.bfloat16)
        try:
            again = TorchvisionFeatures("resnet18", str(resnet18_file))
        finally:
            torch.set_default_dtype(torch.float32)
        assert torch.equal(again(images()), expected(images()))

    def test_network_without_a_linear_layer(self) -> None:
        with pytest.raises(ValueError, match="squeezenet1_1 has no linear layer"):
            TorchvisionFeatures("squeezenet1_1")

    def test_unknown_name(self) -> None:
        with pytest.raises(ValueError, match=r"'RESNET19'; closest: .*resnet18"):
            TorchvisionFeatures("RESNET19")


class TestVGG16:
    @pytest.mark.parametrize(("layer", "end"), [("fc2_relu", 5), ("fc2", 4), ("fc1_relu", 2)])
    def test_layers(
        self, layer: features.VGG16Layer, end: int, tiny: tuple[Tiny, str, list[dict[str, Any]]]
    ) -> None:
        network, file, calls = tiny
        extractor = VGG16Features(layer, file)
        assert [call["name"] for call in calls] == ["vgg16"]
        batch = images(4, 3, 300, 80)
        with torch.no_grad():
            pooled = network.features(as_the_preset("vgg16", batch))
            expected = network.classifier[:end](pooled)
        torch.testing.assert_close(extractor(batch), expected)
        assert (expected < 0).any() == (layer == "fc2")
        assert f"layer {layer};" in extractor.description

    def test_unknown_layer(self) -> None:
        with pytest.raises(ValueError, match=r"fc3.*fc2_relu.*fc2.*fc1_relu"):
            VGG16Features("fc3")  # type: ignore[arg-type]


class FakeInception(nn.Module):
    def __init__(self, name: str, layers: list[str], weights_path: str) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 2048)  # draws from the global generator, as the real one does
        self.load_state_dict(torch.load(weights_path))
        assert layers == ["2048"]

    def forward(self, batch: Tensor) -> Tensor:
        assert batch.dtype == torch.uint8
        self.seen = batch
        return batch.float().mean((2, 3)).repeat(1, 683)[:, :2048]


class TestInception:
    @pytest.fixture
    def installed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(features, "find_spec", lambda name: object())
        monkeypatch.setattr(features, "NoTrainInceptionV3", FakeInception)

    def test_missing_package(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(features, "find_spec", lambda name: None)
        with pytest.raises(RuntimeError, match="pip install torch-fidelity"):
            InceptionFeatures()

    @pytest.mark.usefixtures("installed")
    def test_missing_weights_are_named(self, checkpoints: Path) -> None:
        with pytest.raises(FileNotFoundError) as caught:
            InceptionFeatures()
        file = checkpoints / "weights-inception-2015-12-05-6726825d.pth"
        for part in (str(file), "https://github.com/toshas", "--model.weights_path FILE"):
            assert part in str(caught.value)

    @pytest.mark.usefixtures("installed")
    def test_wrong_file_is_named(self, tmp_path: Path) -> None:
        torch.save({}, tmp_path / "wrong.pth")
        with pytest.raises(
            RuntimeError, match=r"wrong\.pth does not hold the weights of inception"
        ):
            InceptionFeatures(str(tmp_path / "wrong.pth"))

    @pytest.mark.usefixtures("installed", "global_rng_untouched")
    def test_rounds_to_8_bits(self, checkpoints: Path) -> None:
        state = {"fc.weight": torch.zeros(2048, 3), "fc.bias": torch.zeros(2048)}
        torch.save(state, checkpoints / "weights-inception-2015-12-05-6726825d.pth")
        extractor = InceptionFeatures()
        levels = torch.arange(256) / 255
        batch = (levels - 0.4 / 255).clamp(0, 1.0005).view(1, 1, 16, 16)
        result = extractor(batch)
        assert result.shape == (1, extractor.num_features) == (1, 2048)
        seen: Any = extractor.network.seen
        assert torch.equal(seen, torch.arange(256).view(1, 1, 16, 16).expand(1, 3, 16, 16))
        assert "299x299" in extractor.description
        assert not any(p.requires_grad for p in extractor.parameters())


class TestByName:
    def test_without_weights(self, random_vgg16: RandomVGG16Features) -> None:
        assert type(feature_extractor("pixels")) is PixelFeatures
        extractor = feature_extractor("random_vgg16", seed=5)
        assert type(extractor) is RandomVGG16Features
        assert extractor.num_features == 64
        assert "orthogonal, seed 5" in extractor.description
        assert (extractor(images()) - random_vgg16(images())).abs().mean() > 0.1

    @pytest.mark.parametrize("name", ["pixels", "random_vgg16"])
    def test_weights_for_what_has_none(self, name: str) -> None:
        with pytest.raises(ValueError, match=rf"{name}.*--model.weights_path x\.pth"):
            feature_extractor(name, "x.pth")

    def test_vgg16(self, tiny: tuple[Tiny, str, list[dict[str, Any]]]) -> None:
        extractor = feature_extractor("vgg16", tiny[1])
        assert type(extractor) is VGG16Features
        assert "fc2_relu" in extractor.description

    @pytest.mark.parametrize(
        ("name", "kind"),
        [("vgg16", "VGG16Features"), ("resnet18", "TorchvisionFeatures")],
    )
    def test_download_is_passed_on(
        self, name: str, kind: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        seen: list[Any] = []

        def record(*args: Any, **kwargs: Any) -> None:
            seen.append(kwargs.get("download", args[-1] if args else None))

        monkeypatch.setattr(features, kind, record)
        feature_extractor(name, download=True)
        assert seen == [True]

    def test_inception(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(features, "find_spec", lambda name: None)
        with pytest.raises(RuntimeError, match="torch-fidelity"):
            feature_extractor("inception")

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("random_vgg", "'random_vgg'; closest: .*random_vgg16"),
            ("Pixel", "closest: pixels"),
            ("zzzzzz", "choose pixels, random_vgg16, vgg16, inception or one of torchvision"),
        ],
    )
    def test_unknown_name(self, name: str, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            feature_extractor(name)
