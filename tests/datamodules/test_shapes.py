from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.ops import masks_to_boxes

from datamodules.shapes import SceneOptions, Scenes
from datamodules.shapes_drawing import SHAPES, TEXTURES, uniform
from datamodules.shapes_options import COLOURS, DOMAINS, SIZES
from datamodules.shapes_sheet import scene_sheet

CROWD = SceneOptions(max_objects=4, borders=("borderless", "bordered"))
CREATURE = SceneOptions(mode="parts", label="colour")
# So far from a mask its object may still be seen: the tip of a star is thinner than a pixel.
TIP = 2
QUIET = SceneOptions(noise=0.0, clutter=0, backgrounds=("flat",), textures=("plain",))
KINDS = [SceneOptions(), CROWD, CREATURE]


def grown(masks: Tensor, by: int = 1) -> Tensor:
    """Masks [..., S, S] and all within some pixels of them."""
    shape = masks.shape
    flat = masks.reshape(-1, 1, *shape[-2:]).float()
    return torch.nn.functional.max_pool2d(flat, 2 * by + 1, 1, by).bool().reshape(shape)


def differ(a: Tensor, b: Tensor) -> Tensor:
    return (a != b).any(1)


@pytest.mark.parametrize("options", KINDS)
@pytest.mark.parametrize("size", [64, 45])
def test_a_scene_depends_on_its_index_alone(options: SceneOptions, size: int) -> None:
    options = replace(options, image_size=size)
    scenes = Scenes(options, seed=3, count=100, ground_truth=True)
    batch = scenes.__getitems__([99, 7, *range(40), 7])
    for key, value in scenes[7].items():
        assert torch.equal(batch[key][1], value), key
        assert torch.equal(batch[key][-1], value), key
    again = Scenes(options, seed=3, count=93, start=7, ground_truth=True)[0]
    for key in set(again) - {"index"}:
        assert torch.equal(again[key], batch[key][1]), key
    assert not torch.equal(Scenes(options, seed=4, count=100)[7]["image"], batch["image"][1])
    assert len(torch.unique(batch["image"][2:42].flatten(1), dim=0)) == 40


def test_a_set_is_a_batch_dataset() -> None:
    scenes = Scenes(CROWD, count=20, ground_truth=True)
    batch = scenes.__getitems__(torch.tensor([4, 2, 19]))
    assert (len(scenes), scenes.sample_shape) == (20, (3, 64, 64))
    assert (batch["image"].dtype, batch["image"].shape) == (torch.uint8, (3, 3, 64, 64))
    assert (batch["label"].dtype, batch["boxes"].dtype) == (torch.int64, torch.int64)
    assert batch["index"].tolist() == [4, 2, 19]
    assert batch["attributes"].shape == (3, len(scenes.attribute_names))
    assert batch["concept_masks"].shape == (3, len(scenes.concept_names), 64, 64)
    assert batch["boxes"].shape == (3, 4, 4)
    assert batch["object_labels"].shape == (3, 4)
    assert batch["object_masks"].shape == (3, 4, 64, 64)
    assert torch.equal(scenes.labels[[4, 2, 19]], batch["label"])
    floats = scenes.batch([4], dtype=torch.float64)
    assert torch.equal(floats["image"][0], batch["image"][0].double() / 255)
    assert set(Scenes(CROWD)[0]) == {"image", "label", "index"}


def test_the_generators_of_the_run_play_no_part(monkeypatch: pytest.MonkeyPatch) -> None:
    before = Scenes(CROWD)[5]["image"]
    monkeypatch.setenv("PL_GLOBAL_SEED", "17")
    torch.manual_seed(1)
    state = torch.get_rng_state()
    assert torch.equal(Scenes(CROWD)[5]["image"], before)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("options", KINDS)
def test_boxes_are_tight_around_visible_pixels(options: SceneOptions) -> None:
    scenes = Scenes(options, count=200)
    truth = scenes.truth(range(200))
    masks = truth["object_masks"]
    seen = masks.flatten(2).any(2)
    assert torch.equal(truth["boxes"][seen], masks_to_boxes(masks[seen]).long())
    assert (truth["boxes"][~seen] == -1).all()
    assert seen[:, 0].all()
    assert (truth["object_labels"][seen] >= 0).all()
    assert torch.equal(truth["object_labels"][:, 0], scenes.labels)
    assert (masks.sum(1) <= 1).all()
    assert not masks[..., [0, -1], :].any()
    assert not masks[..., [0, -1]].any()
    counts = (truth["object_labels"] >= 0).sum(1)
    assert set(counts.tolist()) == set(range(options.min_objects, options.max_objects + 1))


@pytest.mark.parametrize("options", KINDS)
@pytest.mark.parametrize("domain", DOMAINS)
def test_without_objects_only_their_pixels_change(options: SceneOptions, domain: str) -> None:
    scenes = Scenes(options, count=40)
    changed = differ(
        scenes.render(range(40), domain), scenes.render(range(40), domain, objects=False)
    )
    masks = scenes.truth(range(40))["object_masks"].any(1)
    assert not (changed & ~grown(masks, TIP)).any()
    if domain != "sketch":  # whose plain objects are as white as the paper
        assert (changed & masks).sum() > 0.98 * masks.sum()


@pytest.mark.parametrize("options", KINDS)
def test_objects_take_their_share_of_the_image(options: SceneOptions) -> None:
    scenes = Scenes(options, count=300)
    truth = scenes.truth(range(300))
    left, top, right, bottom = truth["boxes"][:, 0].T
    share = (right - left + 1) * (bottom - top + 1) / 64**2 / options.crowding
    for number, (low, high) in enumerate(SIZES.values()):
        some = share[scenes.factor("size") == number]
        # Pixels that are half covered at best, and creatures cut to the width of the image.
        assert 0.75 * low < some.min()
        assert some.max() < high + 0.06
    if options.max_objects == 1:
        assert share.min() < 0.18
        assert share.max() > 0.52


def test_factors_are_uniform_and_independent() -> None:
    scenes = Scenes(CROWD, count=6000)
    for name in scenes.factors:
        values = scenes.factor(name)
        expected = len(values) / len(scenes.attribute_groups[name])
        assert (values.bincount() - expected).abs().max() < 5 * expected**0.5
    shape, colour = scenes.factor("shape"), scenes.factor("colour")
    pairs = (shape * len(COLOURS) + colour).bincount(minlength=36)
    assert (pairs - 6000 / 36).abs().max() < 5 * (6000 / 36) ** 0.5
    neighbours = torch.from_numpy(uniform(0, "a", np.arange(4000), 2))
    assert neighbours.T.corrcoef()[0, 1].abs() < 0.06
    assert torch.stack([neighbours[1:, 0], neighbours[:-1, 0]]).corrcoef()[0, 1].abs() < 0.06


def test_attributes_say_what_is_drawn() -> None:
    scenes = Scenes(CROWD, count=50)
    attributes = scenes.truth(range(50))["attributes"]
    column = 0
    for factor, names in scenes.attribute_groups.items():
        group = attributes[:, column : column + len(names)]
        assert torch.equal(group.argmax(1), scenes.factor(factor))
        assert (group.sum(1) == 1).all()
        assert scenes.attribute_names[column : column + len(names)] == list(names)
        column += len(names)
    assert column == attributes.shape[1]


@pytest.mark.parametrize(
    "options", [QUIET, replace(CREATURE, noise=0.0, shapes=("circle", "square"))]
)
def test_colours_are_the_named_ones(options: SceneOptions) -> None:
    scenes = Scenes(replace(options, label="colour"), count=120)
    batch = scenes.batch(range(120))
    truth = scenes.truth(range(120))
    masks = truth["part_masks" if options.mode == "parts" else "object_masks"][:, :1]
    # Away from the edge, where colours are mixed.
    inner = ~grown(~masks)
    mean = (batch["image"] * inner).sum((2, 3)) / inner.sum((2, 3))
    palette = torch.tensor(list(COLOURS.values()))
    direction = (
        torch.nn.functional.normalize(mean, dim=1) @ torch.nn.functional.normalize(palette, dim=1).T
    )
    assert torch.equal(direction.argmax(1), batch["label"])
    assert ((mean - palette[batch["label"]]).abs() < 0.13).all()


def test_textures_are_darker_patterns_and_borders_dark_lines() -> None:
    quiet = replace(QUIET, textures=TEXTURES, borders=("borderless", "bordered"), sizes=("large",))
    scenes = Scenes(quiet, count=40)
    index = range(40)
    inner = ~grown(~scenes.truth(index, {"shape": "square"})["object_masks"][:, 0], 4)
    plain = {"shape": "square", "texture": "plain", "border": "borderless"}
    before = scenes.render(index, change=plain).float().mean(1)
    shares = []
    for name in TEXTURES[1:]:
        after = scenes.render(index, change={**plain, "texture": name}).float().mean(1)
        ratio = (after / before)[inner]
        assert (ratio.min() < 0.5, ratio.max() <= 1.02) == (True, True), name
        shares.append((ratio < 0.72).float().mean())
    assert torch.tensor(shares) == pytest.approx(torch.tensor([0.5, 0.36, 0.5]), abs=0.06)
    bordered = scenes.render(index, change={**plain, "border": "bordered"}).float().mean(1)
    changed = bordered < 0.9 * before
    mask = scenes.truth(index, plain)["object_masks"][:, 0]
    assert not (changed & inner).any()
    assert (changed & mask & ~inner).flatten(1).any(1).all()


def test_shapes_have_the_areas_of_their_names() -> None:
    """Share of the tight box that each shape fills."""
    scenes = Scenes(replace(QUIET, image_size=256, rotation=0), count=30)
    areas = (0.785, 1.0, 0.5, 0.59, 0.575, 0.325)  # in the order of SHAPES
    for shape, area in zip(SHAPES, areas, strict=True):
        truth = scenes.truth(range(30), {"shape": shape})
        left, top, right, bottom = truth["boxes"][:, 0].T
        filled = truth["object_masks"].sum((1, 2, 3)) / ((right - left + 1) * (bottom - top + 1))
        assert filled.mean().item() == pytest.approx(area, abs=0.03), shape


def test_another_domain_is_the_same_scene() -> None:
    scenes = Scenes(replace(CROWD, noise=0.0), count=30)
    day = scenes.render(range(30)).float()
    assert torch.equal(scenes.render(range(30), "day").float(), day)
    for domain in DOMAINS[1:]:
        other = Scenes(replace(CROWD, noise=0.0, domain=domain), count=30)
        assert torch.equal(other.render(range(30)), scenes.render(range(30), domain))
        assert torch.equal(other.render(range(30), "day").float(), day)
        for key, value in scenes.truth(range(30)).items():
            assert torch.equal(other.truth(range(30))[key], value), (domain, key)
        assert (other.render(range(30)).float() - day).abs().mean() > 8
    assert scenes.render(range(30), "night").float().mean() < 0.6 * day.mean()
    sketch = scenes.render(range(30), "sketch").float()
    background = ~grown(scenes.truth(range(30))["object_masks"].any(1))
    assert sketch.mean(1)[background].mean() > 215


@pytest.mark.parametrize("options", KINDS)
@pytest.mark.parametrize("factor", ["shape", "colour", "texture", "size"])
def test_a_change_keeps_the_rest_pixel_by_pixel(options: SceneOptions, factor: str) -> None:
    # The label is another factor, or the stripes of the body would change with it.
    options = replace(options, label="size" if options.mode == "parts" else "shape")
    scenes = Scenes(options, count=40)
    if factor not in scenes.factors or (factor, options.label) == ("size", "size"):
        return
    index = range(40)
    value = options.values(factor)[1]
    before, after = scenes.truth(index), scenes.truth(index, {factor: value})
    touched = grown(before["object_masks"][:, 0] | after["object_masks"][:, 0], TIP)
    changed = differ(scenes.render(index), scenes.render(index, change={factor: value}))
    assert not (changed & ~touched).any()
    same = scenes.factor(factor) == 1
    assert not changed[same].any()
    assert changed[~same].flatten(1).any(1).all()
    columns = [scenes.attribute_names.index(name) for name in options.values(factor)]
    assert (after["attributes"][:, columns[1]] == 1).all()
    others = [c for c in range(len(scenes.attribute_names)) if c not in columns]
    assert torch.equal(after["attributes"][:, others], before["attributes"][:, others])
    if factor in ("colour", "texture"):
        for key in ("boxes", "object_masks"):
            assert torch.equal(after[key], before[key])


def test_every_scene_can_have_its_own_change() -> None:
    scenes = Scenes(CROWD, count=8)
    wanted = ["red", "green", "blue", "red", "cyan", "red", "yellow", "blue"]
    together = scenes.render(range(8), change={"colour": wanted})
    for i, colour in enumerate(wanted):
        assert torch.equal(scenes.render([i], change={"colour": colour})[0], together[i])


def test_concepts_cover_what_they_name() -> None:
    scenes = Scenes(replace(CROWD, label="colour"), count=60)
    truth = scenes.truth(range(60))
    concepts = dict(zip(scenes.concept_names, truth["concept_masks"].unbind(1), strict=True))
    objects = truth["object_masks"]
    for number, colour in enumerate(COLOURS):
        expected = (objects & (truth["object_labels"] == number)[..., None, None]).any(1)
        assert torch.equal(concepts[colour], expected)
    for names in (SHAPES, TEXTURES, tuple(COLOURS)):
        together = torch.stack([concepts[name] for name in names])
        assert torch.equal(together.sum(0), objects.any(1).long())
    backgrounds = torch.stack([concepts[name] for name in scenes.options.backgrounds])
    assert torch.equal(backgrounds.sum(0), (~objects.any(1)).long())
    assert (backgrounds.flatten(2).any(2).sum(0) == 1).all()


def test_names_of_concepts_and_attributes_are_unique() -> None:
    for options in KINDS:
        scenes = Scenes(options)
        assert len(set(scenes.concept_names)) == len(scenes.concept_names)
        assert len(set(scenes.attribute_names)) == len(scenes.attribute_names)


def test_head_and_body_make_the_object() -> None:
    scenes = Scenes(CREATURE, count=80)
    truth = scenes.truth(range(80))
    head, body = truth["part_masks"].unbind(1)
    assert not (head & body).any()
    assert torch.equal(head | body, truth["object_masks"][:, 0])
    sizes = head.sum((1, 2)) / (head | body).sum((1, 2))
    assert (sizes.min() > 0.03, sizes.max() < 0.3) == (True, True)
    concepts = dict(zip(scenes.concept_names, truth["concept_masks"].unbind(1), strict=True))
    assert torch.equal(concepts["head"], head)
    assert torch.equal(torch.stack([concepts[c] for c in COLOURS]).sum(0), head.long())


def test_only_the_contrast_of_its_body_tells_the_class_without_a_head() -> None:
    """Without contrast a change of class leaves the body as it is; the change grows with it."""
    moved = []
    for contrast in (0.0, 0.3, 1.0):
        scenes = Scenes(
            replace(CREATURE, body_contrast=contrast, noise=0.0, body_noise=0.0), count=30
        )
        body = scenes.truth(range(30))["part_masks"][:, 1]
        red, green, blue = (
            scenes.render(range(30), change={"colour": c}).float().mean(1)
            for c in ("red", "green", "blue")
        )
        inner = ~grown(~body, TIP)
        moved.append(((red - green).abs() + (green - blue).abs())[inner].mean().item())
    assert moved[0] == 0
    assert 5 < moved[1] < 0.45 * moved[2]


def test_noise_is_as_strong_as_it_says() -> None:
    scenes = Scenes(replace(QUIET, noise=0.05), count=40)
    clean = Scenes(QUIET, count=40)
    background = ~grown(clean.truth(range(40))["object_masks"].any(1))
    grain = (scenes.render(range(40)).float() - clean.render(range(40)).float()).mean(1)[background]
    assert grain.std().item() == pytest.approx(0.05 * 255, rel=0.03)
    assert abs(grain.mean().item()) < 0.2


def test_sizes_of_image_show_the_same_scene() -> None:
    small = Scenes(replace(CROWD, image_size=64), count=20)
    large = Scenes(replace(CROWD, image_size=128), count=20)
    a = small.truth(range(20))["boxes"].float()
    b = large.truth(range(20))["boxes"].float()
    seen = (a >= 0) & (b >= 0)
    assert ((b / 2 - a)[seen].abs() <= 2).float().mean() > 0.97
    assert torch.equal(small.labels, large.labels)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shapes": ["circel"]}, r"shapes: unknown 'circel'.*did you mean 'circle'"),
        ({"shapes": "circle"}, r"shapes='circle' must be a list of names, e.g. \[circle\]"),
        ({"colours": ["red", "purple"]}, "colours: unknown 'purple'; expected one of red, green"),
        ({"textures": []}, r"textures=\[\] must be at least one name"),
        ({"sizes": ["small", "small"]}, "sizes=.* each once"),
        ({"borders": ["thick"]}, "borders: unknown 'thick'"),
        ({"backgrounds": ["sky"]}, "backgrounds: unknown 'sky'"),
        ({"domain": "dusk"}, "domain: unknown 'dusk'; expected one of day, night, photo, sketch"),
        ({"mode": "scene"}, "mode: unknown 'scene'; expected one of objects, parts"),
        ({"label": "border", "mode": "parts"}, "label: unknown 'border'.*shape, colour, size"),
        ({"min_objects": 0}, "min_objects=0 must be at least 1"),
        ({"min_objects": 3, "max_objects": 2}, "max_objects=2 must be at least min_objects=3"),
        ({"mode": "parts", "max_objects": 2}, "max_objects=2: .* mode 'parts' has one object"),
        ({"image_size": 12}, "image_size=12 leaves objects of 4.6 pixels.*at least 16"),
        ({"image_size": 24, "mode": "parts"}, "image_size=24 leaves heads of 3.0.*at least 32"),
        ({"image_size": 32, "max_objects": 8}, r"max_objects=8 and sizes=.*must be at least 34"),
        ({"rotation": 200}, r"rotation=200 must be in \[0, 180\]"),
        ({"clutter": -1}, "clutter=-1 must be in"),
        ({"noise": 2.0}, "noise=2.0 must be in"),
        ({"body_contrast": 1.5}, r"body_contrast=1.5 must be in \[0, 1\]"),
        ({"head_size": 0.0}, "head_size=0.0 must be in"),
    ],
)
def test_options_that_cannot_be_met_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SceneOptions(**options)


def test_the_smallest_allowed_images_are_drawn() -> None:
    for options in (SceneOptions(image_size=16), SceneOptions(image_size=32, mode="parts")):
        truth = Scenes(options, count=64).truth(range(64))
        assert truth["concept_masks"][:, : len(SHAPES)].flatten(1).any(1).all()


def test_wrong_requests_are_refused() -> None:
    scenes = Scenes(CROWD, count=5)
    with pytest.raises(IndexError, match="no scene 5; this set has 5"):
        scenes[5]
    with pytest.raises(IndexError, match="no scene -1"):
        scenes.render([-1])
    with pytest.raises(ValueError, match="indices must be a list of at least one scene"):
        scenes.render([])
    with pytest.raises(ValueError, match="domain: unknown 'dusk'"):
        scenes.render([0], "dusk")
    with pytest.raises(ValueError, match=r"change: unknown 'color'.*did you mean 'colour'"):
        scenes.render([0], change={"color": "red"})
    with pytest.raises(ValueError, match="change of colour: unknown 'purple'"):
        scenes.truth([0], {"colour": "purple"})
    with pytest.raises(ValueError, match="change: 2 values of colour for 1 scenes"):
        scenes.render([0], change={"colour": ["red", "blue"]})
    with pytest.raises(ValueError, match="factor: unknown 'taste'"):
        scenes.factor("taste")
    with pytest.raises(ValueError, match="count=0 must be at least 1"):
        Scenes(CROWD, count=0)
    with pytest.raises(ValueError, match="start=-1 must be at least 0"):
        Scenes(CROWD, start=-1)


def test_the_sheet_has_rows_of_pictures() -> None:
    rows = scene_sheet(image_size=32 * 2, columns=2)
    assert len(rows) >= 20
    for title, images in rows.items():
        assert images.shape == (2, 3, 64, 64), title
        assert (images.min() >= 0, images.max() <= 1) == (True, True), title
