"""``shapes``: procedural scenes with exact ground truth, drawn when they are asked for.

A scene is a function of (seed, index) and the options alone. The same scene can be drawn in another
domain, with one attribute of its first object changed, or without its objects: paired ground truth,
for evaluation only.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from datamodules.datasets import BatchDataset, ImageArrayDataset
from datamodules.shapes_drawing import (
    EXTENTS,
    SHAPES,
    Floats,
    Ints,
    Plane,
    capsule,
    coverage,
    noise,
    outline,
    texture,
    turned,
    uniform,
)
from datamodules.shapes_options import (
    COLOURS,
    DOMAINS,
    FACTORS,
    PARTS,
    SIZES,
    SceneOptions,
    check_name,
)
from datamodules.shapes_painting import Layer, background, background_kinds, groups, paint, planes

__all__ = ["SceneOptions", "Scenes"]

# So far apart that the number of scenes of one part changes no other part.
FIRST_SCENE = {"train": 0, "val": 10**9, "test": 2 * 10**9}
DRAWN_AT_ONCE = 256
MARGIN = 0.02
PLACES_TRIED = 16
CHUNK = 32


@dataclass
class _Plan:
    """Where everything in some scenes is. Lengths are fractions of the image's side.

    ``choices`` [B, M] number the values of each factor, the other arrays are [B, M] too; ``count``
    [B] objects are real. ``index`` [B] keys what is drawn at random later.
    """

    index: Ints
    count: Ints
    choices: dict[str, Ints]
    degrees: Ints
    x: Floats
    y: Floats
    radius: Floats
    # Of mode "parts", [B]: height of the whole creature, its width, middle of body and of head.
    body: dict[str, Floats] = field(default_factory=dict)


class Scenes(BatchDataset):
    """Procedural scenes, batched like any other set.

    A batch has ``image`` uint8 [B, 3, S, S]; ``label`` int64 [B], the class of the first object,
    which is in front of all others; and ``index`` int64 [B]. With ``ground_truth`` it also has what
    :meth:`truth` gives.

    Args:
        options: what scenes may show.
        seed: of the set. The seed of the run plays no part.
        count: number of scenes.
        start: the scene of index 0; sets whose ranges do not meet share no scene, so that
            ``start`` makes training, validation and test sets of one seed.
        ground_truth: whether batches have the ground truth.

    Attributes:
        class_names: name of each label.
        attribute_groups: factor -> names of its values; within a factor exactly one of them holds.
        attribute_names: the columns of ``attributes``, factor after factor.
        concept_names: the channels of ``concept_masks``.

    Raises:
        ValueError: ``count`` below 1 or a negative ``start``.
    """

    def __init__(
        self,
        options: SceneOptions | None = None,
        seed: int = 0,
        count: int = 1000,
        start: int = 0,
        ground_truth: bool = False,
    ) -> None:
        if count < 1:
            raise ValueError(f"count={count} must be at least 1")
        if start < 0:
            raise ValueError(f"start={start} must be at least 0")
        self.options = SceneOptions() if options is None else options
        self.seed = seed
        self.count = count
        self.start = start
        self.ground_truth = ground_truth
        self.factors = FACTORS[self.options.mode]
        self.sample_shape = (3, self.options.image_size, self.options.image_size)
        self.class_names = list(self.options.values(self.options.label))
        self.attribute_groups = {f: self.options.values(f) for f in self.factors}
        self.attribute_names = [name for f in self.factors for name in self.attribute_groups[f]]
        concepts = [*self.options.shapes, *self.options.colours]
        concepts += PARTS if self.options.mode == "parts" else self.options.textures
        self.concept_names = [*concepts, *self.options.backgrounds]

    def __len__(self) -> int:
        return self.count

    @property
    def labels(self) -> Tensor:
        """The label of every scene, int64 [N], without drawing any."""
        return self.factor(self.options.label)

    def pieces(self) -> tuple[Tensor, ...]:
        """The indices of all scenes, as many at a time as are drawn at once."""
        return torch.arange(len(self)).split(DRAWN_AT_ONCE)

    def drawn(self) -> ImageArrayDataset:
        """All scenes with their labels, in memory."""
        images = torch.cat([self.render(piece) for piece in self.pieces()])
        return ImageArrayDataset(images, self.labels, self.class_names)

    def factor(self, name: str) -> Tensor:
        """The value of a factor of the first object of every scene: numbers, int64 [N].

        Raises:
            ValueError: the scenes have no such factor.
        """
        check_name("factor", name, self.factors)
        index = self.start + np.arange(self.count)
        return torch.from_numpy(self._choose(name, index)[:, 0])

    def __getitems__(self, indices: Sequence[int] | Tensor) -> dict[str, Any]:
        """The batch of these scenes; see the class.

        Raises:
            IndexError: a scene outside 0 .. count - 1.
        """
        index = self._index(indices)
        batch: dict[str, Any] = {
            "image": self.render(indices),
            "label": torch.from_numpy(self._choose(self.options.label, index)[:, 0]),
            "index": torch.as_tensor(indices, dtype=torch.int64),
        }
        if self.ground_truth:
            batch.update(self.truth(indices))
        return batch

    def render(
        self,
        indices: Sequence[int] | Tensor,
        domain: str | None = None,
        change: Mapping[str, str | Sequence[str]] | None = None,
        objects: bool = True,
    ) -> Tensor:
        """Draws scenes, or their counterparts, pixel by pixel aligned with them.

        Args:
            indices: places in this set [B].
            domain: another domain than the set's.
            change: factor -> value (or B values) that the first object gets instead of its own; all
                else stays as it is. A change of shape or size keeps the middle of the object,
                unless it would leave the image. The stripes of a body follow the class.
            objects: false: the background alone.

        Returns:
            uint8 [B, 3, S, S].

        Raises:
            IndexError: a scene outside 0 .. count - 1.
            ValueError: an unknown domain, factor or value.
        """
        domain = self.options.domain if domain is None else domain
        check_name("domain", domain, DOMAINS)
        parts = [self._draw(plan, domain, objects) for plan in self._plans(indices, change)]
        return torch.from_numpy(np.concatenate(parts))

    def truth(
        self,
        indices: Sequence[int] | Tensor,
        change: Mapping[str, str | Sequence[str]] | None = None,
    ) -> dict[str, Tensor]:
        """The ground truth of scenes, the same in every domain.

        Args:
            indices: places in this set [B].
            change: as in :meth:`render`.

        Returns:
            ``attributes`` float32 [B, A], of the first object; ``boxes`` int64 [B, M, 4], first
            and last column and row of the visible pixels (left, top, right, bottom, all
            inclusive), -1 where there is no object or nothing of it is visible; ``object_labels``
            int64 [B, M], -1 where there is no object; ``object_masks`` bool [B, M, S, S], visible
            pixels, those at least half covered; ``concept_masks`` bool [B, C, S, S], where
            backgrounds are all pixels without objects, and shape and colour of mode ``parts`` are
            those of the head; in mode ``parts`` also ``part_masks`` bool [B, 2, S, S], head and
            body.

        Raises:
            IndexError: a scene outside 0 .. count - 1.
            ValueError: an unknown factor or value.
        """
        parts = [self._truth(plan) for plan in self._plans(indices, change)]
        return {key: torch.from_numpy(np.concatenate([p[key] for p in parts])) for key in parts[0]}

    def _index(self, indices: Sequence[int] | Tensor) -> Ints:
        index = torch.as_tensor(indices, dtype=torch.int64).cpu().numpy()
        if index.ndim != 1 or index.size == 0:
            raise ValueError(f"indices must be a list of at least one scene, got {indices!r}")
        outside = index[(index < 0) | (index >= self.count)]
        if outside.size:
            raise IndexError(f"there is no scene {outside[0]}; this set has {self.count}")
        return self.start + index

    def _uniform(self, key: str, index: Ints, columns: int = 1) -> Floats:
        return uniform(self.seed, key, index, columns)

    def _choose(self, factor: str, index: Ints) -> Ints:
        values = len(self.options.values(factor))
        draws = self._uniform(factor, index, self.options.max_objects)
        return (draws * values).astype(np.int64)

    def _plans(
        self, indices: Sequence[int] | Tensor, change: Mapping[str, str | Sequence[str]] | None
    ) -> Iterator[_Plan]:
        index = self._index(indices)
        changes = {
            factor: self._numbers(factor, wanted, len(index))
            for factor, wanted in (change or {}).items()
        }
        for low in range(0, len(index), CHUNK):  # of a size that stays in the processor's cache
            part = slice(low, low + CHUNK)
            yield self._plan(index[part], {f: numbers[part] for f, numbers in changes.items()})

    def _numbers(self, factor: str, wanted: str | Sequence[str], count: int) -> Ints:
        check_name("change", factor, self.factors)
        names = [wanted] * count if isinstance(wanted, str) else list(wanted)
        if len(names) != count:
            raise ValueError(f"change: {len(names)} values of {factor} for {count} scenes")
        values = self.options.values(factor)
        for name in names:
            check_name(f"change of {factor}", name, values)
        return np.array([values.index(name) for name in names], dtype=np.int64)

    def _plan(self, index: Ints, changes: Mapping[str, Ints]) -> _Plan:
        o = self.options
        span = o.max_objects - o.min_objects + 1
        plan = _Plan(
            index,
            o.min_objects + (self._uniform("count", index)[:, 0] * span).astype(np.int64),
            {factor: self._choose(factor, index) for factor in self.factors},
            self._turns(index) % 360,
            *np.zeros((3, len(index), o.max_objects)),
        )
        place = self._place_parts if o.mode == "parts" else self._place_objects
        place(plan, None)
        if changes:
            drawn = plan.x[:, 0].copy(), plan.y[:, 0].copy()
            for factor, numbers in changes.items():
                plan.choices[factor][:, 0] = numbers
            place(plan, drawn)
        return plan

    def _turns(self, index: Ints) -> Ints:
        rotation = self.options.rotation
        draws = self._uniform("rotation", index, self.options.max_objects)
        return np.floor(draws * (2 * rotation + 1)).astype(np.int64) - rotation

    def _areas(self, plan: _Plan) -> Floats:
        limits = np.array([SIZES[size] for size in self.options.sizes])[plan.choices["size"]]
        share = self._uniform("area", plan.index, self.options.max_objects)
        return (limits[..., 0] + share * (limits[..., 1] - limits[..., 0])) * self.options.crowding

    def _place_objects(self, plan: _Plan, middle: tuple[Floats, Floats] | None) -> None:
        """Fills in radius and place of the objects, or anew of the first one around its middle."""
        shape = np.array([SHAPES.index(name) for name in self.options.shapes])
        extents = EXTENTS[shape[plan.choices["shape"]], plan.degrees]
        left, right, top, bottom = np.moveaxis(extents, -1, 0)
        width, height = right - left, bottom - top
        radius = np.sqrt(self._areas(plan) / (width * height))
        radius = np.minimum(radius, (1 - 2 * MARGIN) / np.maximum(width, height))
        low_x, high_x = MARGIN - left * radius, 1 - MARGIN - right * radius
        low_y, high_y = MARGIN - top * radius, 1 - MARGIN - bottom * radius
        if middle is not None:
            plan.radius[:, 0] = radius[:, 0]
            plan.x[:, 0] = np.clip(middle[0], low_x[:, 0], high_x[:, 0])
            plan.y[:, 0] = np.clip(middle[1], low_y[:, 0], high_y[:, 0])
            return
        plan.radius[:] = radius
        rows = np.arange(len(plan.index))
        for m in range(self.options.max_objects):
            # Of several random places the one farthest from the objects before it.
            tries = PLACES_TRIED if m else 1
            u = self._uniform(f"place {m}", plan.index, 2 * tries)
            x = low_x[:, m, None] + u[:, :tries] * (high_x - low_x)[:, m, None]
            y = low_y[:, m, None] + u[:, tries:] * (high_y - low_y)[:, m, None]
            free = np.full_like(x, np.inf)
            for j in range(m):
                away = np.sqrt((x - plan.x[:, j, None]) ** 2 + (y - plan.y[:, j, None]) ** 2)
                free = np.minimum(free, away - radius[:, j, None])
            best = free.argmax(1)
            plan.x[:, m], plan.y[:, m] = x[rows, best], y[rows, best]

    def _place_parts(self, plan: _Plan, middle: tuple[Floats, Floats] | None) -> None:
        """Fills in the place of the creature, whose middle is (x, y), and of its parts."""
        aspect, x, y, side, raised = self._uniform("creature", plan.index, 5).T
        area = self._areas(plan)[:, 0]
        longest = 1 - 2 * MARGIN
        width = np.minimum(np.sqrt(area * (1.3 + 0.6 * aspect)), longest)
        height = np.minimum(area / width, longest)
        free_x, free_y = longest - width, longest - height
        if middle is None:
            plan.x[:, 0] = MARGIN + width / 2 + x * free_x
            plan.y[:, 0] = MARGIN + height / 2 + y * free_y
        else:
            plan.x[:, 0] = np.clip(middle[0], MARGIN + width / 2, MARGIN + width / 2 + free_x)
            plan.y[:, 0] = np.clip(middle[1], MARGIN + height / 2, MARGIN + height / 2 + free_y)
        head = self.options.head_size * height
        shape = np.array([SHAPES.index(name) for name in self.options.shapes])
        extents = EXTENTS[shape[plan.choices["shape"][:, 0]], 0]
        spans = np.maximum(extents[:, 1] - extents[:, 0], extents[:, 3] - extents[:, 2])
        plan.radius[:, 0] = head / spans
        facing = np.where(side < 0.5, -1.0, 1.0)
        # Half of the head is on the body, half of it beyond its end.
        plan.body = {
            "width": width - head / 2,
            "height": height,
            "x": plan.x[:, 0] - facing * head / 4,
            "head_x": plan.x[:, 0] + facing * (width - head) / 2,
            "head_y": plan.y[:, 0]
            + (raised - 0.5) * 0.3 * height
            - (extents[:, 2] + extents[:, 3]) / 2 * plan.radius[:, 0],
        }

    def _layers(self, plan: _Plan) -> list[Layer]:
        """What is drawn over the background, from front to back."""
        if self.options.mode == "parts":
            return [self._head(plan), self._body(plan)]
        return [self._object(plan, m) for m in range(int(plan.count.max()))]

    def _object(self, plan: _Plan, m: int) -> Layer:
        o, size = self.options, self.options.image_size
        rows = np.flatnonzero(plan.count > m)
        chosen = {factor: numbers[rows, m] for factor, numbers in plan.choices.items()}
        radius = planes(plan.radius[rows, m] * size)
        u, v = turned(plan.x[rows, m] * size, plan.y[rows, m] * size, plan.degrees[rows, m], size)
        pattern = np.empty_like(u)
        for some, kind in groups(chosen["texture"], o.textures):
            pattern[some] = texture(kind, u[some], v[some], self._period)
        return Layer(
            rows,
            self._outlines(chosen["shape"], u, v, radius),
            pattern,
            0.55,
            0.0,
            self._colours(plan.index[rows], chosen["colour"], m),
            np.array([name == "bordered" for name in o.borders])[chosen["border"]],
        )

    def _head(self, plan: _Plan) -> Layer:
        size, rows = self.options.image_size, np.arange(len(plan.index))
        upright = np.zeros(len(rows), dtype=np.int64)
        u, v = turned(plan.body["head_x"] * size, plan.body["head_y"] * size, upright, size)
        radius = planes(plan.radius[:, 0] * size)
        distance = self._outlines(plan.choices["shape"][:, 0], u, v, radius)
        colour = self._colours(plan.index, plan.choices["colour"][:, 0], 0)
        return Layer(rows, distance, np.zeros_like(u), 0.0, 0.0, colour, upright > 0)

    def _body(self, plan: _Plan) -> Layer:
        o, size, rows = self.options, self.options.image_size, np.arange(len(plan.index))
        label = plan.choices[o.label][:, 0]
        x, y = plan.body["x"] * size, plan.y[:, 0] * size
        u, v = turned(x, y, np.zeros_like(label), size)
        distance = capsule(
            u,
            v,
            planes(plan.body["width"] * size / 2),
            planes(plan.body["height"] * size / 2),
            0.9,
        )
        phase = self._uniform("phase", plan.index)[:, 0] * size
        direction = np.round(180 * label / len(o.values(o.label))).astype(np.int64)
        _, across = turned(x, y, direction, size)
        pattern = texture("stripes", across, across + planes(phase), self._period)
        tone = self._uniform("body", plan.index, 4)
        colour = 0.50 + 0.16 * tone[:, :1] + 0.12 * (tone[:, 1:] - 0.5)
        return Layer(rows, distance, pattern, o.body_contrast, 0.5, colour, label < 0)

    def _outlines(self, shape: Ints, u: Plane, v: Plane, radius: Plane) -> Plane:
        distance = np.empty_like(u)
        for some, kind in groups(shape, self.options.shapes):
            distance[some] = outline(kind, u[some], v[some], radius[some])
        return distance

    def _colours(self, index: Ints, colour: Ints, m: int) -> Floats:
        palette = np.array([COLOURS[name] for name in self.options.colours])
        brightness = 0.88 + 0.12 * self._uniform(f"brightness {m}", index)
        return palette[colour] * brightness

    @property
    def _period(self) -> float:
        return max(4.0, self.options.image_size / 10)

    def _draw(self, plan: _Plan, domain: str, objects: bool) -> NDArray[np.uint8]:
        canvas = background(self.options, self.seed, plan.index, domain)
        grains = planes(np.full(len(plan.index), self.options.noise))
        if objects:
            layers = self._layers(plan)
            for layer in reversed(layers):
                paint(canvas, layer, domain)
            if self.options.mode == "parts" and self.options.body_noise:
                head, body = (coverage(layer.distance) for layer in layers)
                grains = grains + np.float32(self.options.body_noise) * np.maximum(body - head, 0)
        if self.options.noise or self.options.body_noise:
            strength = np.float32({"night": 0.6, "sketch": 0.5}.get(domain, 1.0))
            grainy = noise(self.seed, plan.index, self.options.image_size) * (grains * strength)
            canvas += grainy[:, None]
        canvas *= np.float32(255)
        canvas += np.float32(0.5)
        np.maximum(canvas, np.float32(0), out=canvas)
        np.minimum(canvas, np.float32(255), out=canvas)
        return canvas.astype(np.uint8)

    def _truth(self, plan: _Plan) -> dict[str, NDArray]:
        o, size = self.options, self.options.image_size
        scenes, most = plan.choices[o.label].shape
        layers = self._layers(plan)
        visible = np.zeros((len(layers), scenes, size, size), dtype=bool)
        taken = np.zeros((scenes, size, size), dtype=bool)
        for mask, layer in zip(visible, layers, strict=True):
            mask[layer.rows] = layer.distance <= 0
            mask &= ~taken
            taken |= mask
        parts = visible.swapaxes(0, 1)
        masks = np.zeros((scenes, most, size, size), dtype=bool)
        if o.mode == "parts":
            masks[:, 0] = taken
        else:
            masks[:, : len(layers)] = parts
        present = np.arange(most) < plan.count[:, None]
        truth: dict[str, NDArray] = {
            "attributes": np.concatenate(
                [plan.choices[f][:, :1] == np.arange(len(o.values(f))) for f in self.factors],
                axis=1,
            ).astype(np.float32),
            "boxes": _boxes(masks),
            "object_labels": np.where(present, plan.choices[o.label], -1),
            "object_masks": masks,
        }
        if o.mode == "parts":
            truth["part_masks"] = parts
        truth["concept_masks"] = self._concepts(plan, parts, taken)
        return truth

    def _concepts(
        self, plan: _Plan, parts: NDArray[np.bool_], taken: NDArray[np.bool_]
    ) -> NDArray[np.bool_]:
        o = self.options
        maps: list[NDArray] = []
        for factor in ("shape", "colour") if o.mode == "parts" else ("shape", "colour", "texture"):
            # Of a creature, the head alone has a shape and a colour.
            seen = parts[:, :1] if o.mode == "parts" else parts
            chosen = plan.choices[factor][:, : seen.shape[1]]
            for number in range(len(o.values(factor))):
                maps.append((seen & (chosen == number)[:, :, None, None]).any(1))
        if o.mode == "parts":
            maps += [parts[:, 0], parts[:, 1]]
        kinds = background_kinds(self.options, self.seed, plan.index)
        maps += [~taken & (kinds == k)[:, None, None] for k in range(len(o.backgrounds))]
        return np.stack(maps, axis=1)


def _boxes(masks: NDArray[np.bool_]) -> Ints:
    """Inclusive corners [B, M, 4] of masks [B, M, S, S]; -1 for empty ones."""
    columns, rows = np.asarray(masks.any(2)), np.asarray(masks.any(3))
    last = masks.shape[-1] - 1
    corners = [
        columns.argmax(2),
        rows.argmax(2),
        last - columns[..., ::-1].argmax(2),
        last - rows[..., ::-1].argmax(2),
    ]
    return np.where(np.any(columns, 2)[..., None], np.stack(corners, -1), -1)
