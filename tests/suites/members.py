"""The modules that every suite runs, a line each."""

from dataclasses import dataclass, field
from pathlib import Path

import pytest
from _pytest.mark import ParameterSet


@dataclass(frozen=True)
class Member:
    """A module as the suites run it.

    Args:
        name: of the paper's folder.
        config: its recipe that needs no download.
        overlay: further configuration, for what overrides cannot reach: arguments of callbacks.
        tiny: overrides that make the whole recipe, all phases included, a matter of seconds.
        parity: overrides that take out what depends on the local batch by nature.
        rounding: largest relative difference that rounding may make between one and two processes, and the magnitude
            below which tensors are compared absolutely. A game of two networks multiplies rounding, and a bias that no
            loss depends on is nothing else.
        boundary: method called once for each piece of work between two phases; a kill in its second call must be
            harmless.
        phases: stretches of the training with updates of their own.
        batches: (in the first phase, in the last phase) batch counts at which a kill must be harmless.
        trains: False for an analysis, which ``train.py test`` runs.
        slow: left to ``make slow``; another member covers most of the same code.
    """

    name: str
    config: str
    overlay: str | None = None
    tiny: dict[str, object] = field(default_factory=dict)
    parity: dict[str, object] = field(default_factory=dict)
    rounding: tuple[float, float] = (1e-9, 1e-12)
    boundary: str | None = None
    phases: int = 1
    batches: tuple[int, int] = (2, 5)
    trains: bool = True
    slow: bool = False

    @property
    def label(self) -> str:
        """Tells the recipes of a paper apart."""
        return f"{self.name}-{Path(self.config).stem}"

    def arguments(self, *overrides: dict[str, object]) -> list[str]:
        """The configuration and the overrides as command-line arguments, later ones winning."""
        merged = {k: v for part in (self.tiny, *overrides) for k, v in part.items()}
        return [
            "-c",
            self.config,
            *(["-c", self.overlay] if self.overlay else []),
            *(text for k, v in merged.items() for text in (f"--{k}", str(v))),
        ]


TINY_TRANSLATION: dict[str, object] = {
    "data.batch_size": 4,
    "data.shapes_train": 12,
    "data.shapes_val": 8,
    "data.shapes_test": 8,
    "model.ngf": 2,
    "model.ndf": 2,
    "model.n_epochs": 2,
    "model.n_epochs_decay": 2,
    "trainer.log_every_n_steps": 1,
}

TINY_ATTRIBUTES: dict[str, object] = {
    "data.batch_size": 32,
    "data.shapes_train": 80,
    "data.shapes_val": 8,
    "data.shapes_test": 8,
    "model.ngf": 2,
    "model.n_blocks": 1,
    "model.ndf": 2,
    "model.total_steps": 12,
    "model.decay_steps": 6,
    "model.steps_per_epoch": 3,
    "trainer.log_every_n_steps": 1,
}

GAME = (1e-8, 1e-4)

ALL = [
    Member(
        "osrci",
        "configs/osrci/digits.yaml",
        "tests/suites/quick_open_set.yaml",
        tiny={
            "data.batch_size": 16,
            "data.train_limit": 10,
            "data.test_limit": 4,
            "model.width": 4,
            "model.latent_size": 4,
            "model.lr": 0.001,
            "model.joint_epochs": 2,
            "model.rounds": 2,
            "model.images_per_round": 12,
            "model.epochs_per_round": 1,
            "model.search_steps": 3,
            "model.search_batch_size": 4,
            "trainer.log_every_n_steps": 1,
        },
        parity={
            "model.norm": "group",
            "model.dropout": 0.0,
            "model.gather_minibatch_feature": "true",
        },
        boundary="synthesize",
        phases=2,
        batches=(2, 8),
    ),
    Member(
        "ognet",
        "configs/ognet/digits.yaml",
        tiny={
            "data.batch_size": 16,
            "data.train_limit": 40,
            "data.test_limit": 4,
            "model.base_channels": 2,
            "model.phase_one_epochs": 3,
            "model.phase_two_iterations": 5,
            "trainer.log_every_n_steps": 1,
        },
        parity={"model.norm": "group"},
        phases=2,
        batches=(2, 8),
    ),
    Member(
        "acol",
        "configs/acol/shapes.yaml",
        tiny={
            "data.shapes_train": 48,
            "data.shapes_val": 12,
            "data.shapes_test": 12,
            "data.batch_size": 16,
            "model.width": 4,
            "model.head_width": 8,
            "model.epochs": 4,
            "trainer.log_every_n_steps": 1,
        },
        parity={"model.norm": "group"},
        batches=(2, 8),
    ),
    Member(
        "cyclegan",
        "configs/cyclegan/shapes.yaml",
        "tests/suites/quick_judges.yaml",
        tiny={**TINY_TRANSLATION, "model.pool_size": 5},
        # A bias before an instance norm has no gradient, so that Adam follows the rounding.
        parity={"model.norm": "group"},
        rounding=GAME,
        batches=(2, 8),
    ),
    Member(
        "opgan",
        "configs/opgan/shapes.yaml",
        "tests/suites/quick_judges.yaml",
        tiny={**TINY_TRANSLATION, "model.pool_size": 5, "model.siamese_width": 2},
        parity={"model.norm": "group", "model.siamese_norm": "none"},
        rounding=GAME,
        batches=(2, 8),
    ),
    Member(
        "stargan",
        "configs/stargan/shapes.yaml",
        "tests/suites/quick_attributes.yaml",
        tiny=TINY_ATTRIBUTES,
        # Adam makes full steps of what is left of a gradient that is nearly 0.
        parity={"model.lr_g": 1e-4, "model.n_critic": 5},
        batches=(2, 8),
    ),
    Member(
        "matchgan",
        "configs/matchgan/shapes.yaml",
        "tests/suites/quick_attributes.yaml",
        # Two blocks: one for each of two processes.
        tiny={**TINY_ATTRIBUTES, "data.labelled": "50%"},
        parity={"model.lr_g": 1e-4, "model.n_critic": 5},
        batches=(2, 8),
    ),
    Member(
        "supervised",
        "configs/supervised/digits.yaml",
        tiny={
            "data.batch_size": 16,
            "data.train_limit": 10,
            "data.test_limit": 4,
            "model.width": 4,
            "model.epochs": 4,
            "trainer.log_every_n_steps": 1,
        },
        parity={"model.norm": "group"},
        batches=(2, 8),
    ),
    Member(
        "zaq",
        "configs/zaq/digits.yaml",
        "tests/suites/no_export.yaml",
        tiny={
            "data.batch_size": 8,
            "data.train_limit": 10,
            "data.test_limit": 4,
            "model.width": 4,
            "model.teacher_steps": 4,
            "model.widths": '["W4A4"]',
            "model.epochs": 2,
            "model.iterations": 4,
            "model.q_steps": 2,
            "model.latent_dim": 4,
            "model.ngf": 2,
            "model.gdfq_epochs": 2,
            "model.gdfq_warmup_epochs": 1,
            "model.gdfq_latent_dim": 4,
            "model.ft_epochs": 2,
            "model.zeroq_images": 4,
            "model.zeroq_steps": 2,
            "model.zeroq_kd_epochs": 2,
            "model.observer": "minmax",
            "trainer.log_every_n_steps": 1,
        },
        # Ranges and channel relations are those of the global batch; statistics of GDFQ's images are local by nature.
        parity={
            "model.norm": "group",
            "model.baselines": '["rq","ft"]',
            "model.bns_weight": 0.0,
            "model.generator_batch": "global",
        },
        phases=6,
        batches=(2, 14),
    ),
    Member(
        "zaq",
        "configs/zaq/shapes_detection.yaml",
        "tests/suites/no_export.yaml",
        tiny={
            "data.batch_size": 4,
            "data.shapes": "{image_size: 32, max_objects: 2, shapes: [square, ring], clutter: 0}",
            "data.shapes_train": 16,
            "data.shapes_val": 4,
            "data.shapes_test": 4,
            "model.num_classes": 2,
            "model.image_size": 32,
            "model.width": 4,
            "model.teacher_steps": 2,
            "model.widths": '["W4A4"]',
            "model.baselines": '["rq","zeroq","ft"]',
            "model.epochs": 2,
            "model.iterations": 3,
            "model.q_steps": 1,
            "model.latent_dim": 4,
            "model.ngf": 2,
            "model.ft_epochs": 2,
            "model.zeroq_images": 4,
            "model.zeroq_steps": 2,
            "trainer.log_every_n_steps": 1,
        },
        parity={
            "model.norm": "group",
            "model.baselines": '["rq","ft"]',
            "model.bns_weight": 0.0,
            "model.generator_batch": "global",
        },
        rounding=GAME,
        phases=3,
        batches=(2, 8),
        slow=True,
    ),
    Member("prdc", "configs/prdc/digits.yaml", tiny={"data.limit": 60}, trains=False),
    Member(
        "dissection",
        "configs/dissection/shapes.yaml",
        tiny={
            "data.shapes_train": 40,
            "data.shapes_test": 20,
            "model.width": 3,
            "model.train_steps": 3,
            "model.max_length": 3,
        },
        trains=False,
    ),
    Member(
        "dissection",
        "configs/dissection/nli.yaml",
        tiny={
            "data.train_size": 400,
            "data.test_size": 200,
            "model.embedding_dim": 8,
            "model.hidden_dim": 8,
            "model.train_steps": 5,
            "model.min_activations": 10,
            "model.max_length": 2,
            "model.beam_size": 3,
            "model.units": "[0,1,2,3,4,5,6,7,8,9,10,11]",
            "model.edit_examples": 10,
        },
        trains=False,
    ),
]
MEMBERS = [member for member in ALL if member.trains]
ANALYSES = [member for member in ALL if not member.trains]
# One with two optimizers and stages by hand, then one with Lightning's automatic optimisation: enough for what does not
# depend on the paper.
QUICK = [member for member in MEMBERS if member.name in ("ognet", "supervised")]
IN_PHASES = [member for member in MEMBERS if member.phases > 1]


def cases(
    members: list[Member], *values: object, only: list[Member] | None = None
) -> list[ParameterSet]:
    """Members as parameters of a test.

    Args:
        members: all that the test is for.
        values: further parameters, the same for all.
        only: those that ``make test`` runs, the others are left to ``make slow``; None: as the members say.
    """
    return [
        pytest.param(
            member,
            *values,
            id="-".join([member.label, *map(str, values)]),
            marks=[pytest.mark.slow] if member.slow or member not in (only or members) else [],
        )
        for member in members
    ]


CASES = cases(MEMBERS)
