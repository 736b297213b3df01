"""ZAQ and what it is compared with: every method judged at every width, and the network that is handed over."""

from collections.abc import Callable
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, fx, nn
from torchmetrics import Metric

from lightning_modules.zaq.attach import activation_quantizers, demand_unmoved, evaluation_state
from lightning_modules.zaq.baselines import (
    Width,
    aciq,
    dfq,
    mixed_precision,
    round_to_nearest,
    weight_bits,
    weight_sensitivities,
    zeroq,
)
from lightning_modules.zaq.game import QuantizationGame
from lightning_modules.zaq.methods import BEST_IS_NOT_ZERO_SHOT, ROWS


class ComparedMethods(QuantizationGame):
    """The game with its table: ``val/METHOD/WIDTH`` and ``test/METHOD/WIDTH``, in [0, 1].

    A subclass says how a network is judged (:meth:`new_score`, :meth:`judge`). Arguments and errors are those of
    :class:`~lightning_modules.zaq.game.QuantizationGame`.
    """

    score_name: ClassVar[str]
    """What the table shows."""
    class_axis: ClassVar[int]
    """Of the scores of the classes in the first output of P."""

    def __init__(self, num_classes: int, network: str | nn.Module, **options: Any) -> None:
        super().__init__(num_classes, network, **options)
        self.best_score: Tensor
        self.register_buffer("best_score", torch.full((len(self.widths),), torch.nan))
        self.last_score: Tensor
        self.register_buffer("last_score", torch.full((len(self.stages),), torch.nan))
        self.row_titles = ROWS
        self.table_notes = [BEST_IS_NOT_ZERO_SHOT]
        wanted = ("float", "zaq", "zaq_best", *self.hp.baselines)
        self.rows = [row for row in ROWS if row in wanted]
        self.column_names = [str(w) for w in self.widths]
        self.val_score = self.new_score()
        self.test_scores = nn.ModuleDict(
            {f"{row}_{w}": self.new_score() for row in self.rows for w in self.widths}
        )
        self.allocated_bits: dict[str, dict[str, int]] = {}
        """Of mixed precision: bits by layer, by width; known after a test."""
        self._compared: dict[str, nn.Module] = {}
        self._before_evaluation: dict[str, Tensor] = {}

    # ------------------------------------------------------------------ how a network is judged
    def new_score(self) -> Metric:
        """A metric whose value, in [0, 1], is what the table shows."""
        raise NotImplementedError

    def judge(self, score: Metric, network: nn.Module, batch: dict[str, Any]) -> None:
        """Adds what a network, float or quantized, says about a batch with its truth."""
        raise NotImplementedError

    # ------------------------------------------------------------------ evaluation
    def on_validation_start(self) -> None:
        """Remembers the copy that is about to be judged."""
        self._before_evaluation = evaluation_state(self.students)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Judges the current copy."""
        self.judge(self.val_score, self.students[self.stage.key], batch)

    def on_validation_epoch_end(self) -> None:
        """Logs ``val/METHOD/WIDTH`` and keeps the best epoch of a game, which only its row of the table uses.

        Raises:
            RuntimeError: the images have moved a range, a running statistic or a weight.
        """
        demand_unmoved(self.students, self._before_evaluation)
        self._before_evaluation = {}
        stage, score = self.stage, self.val_score.compute()
        self.val_score.reset()
        if self.trainer.sanity_checking:
            return
        self.last_score[self.stages.index(stage)] = score
        # Those of earlier stages too: a run that was resumed since would not know them.
        for known, value in zip(self.stages, self.last_score, strict=True):
            if not value.isnan():
                self.log(f"val/{known.method}/{known.width}", value)
        place = self.widths.index(stage.width)
        best = self.best_score[place]
        if stage.method == "zaq" and (best.isnan() or score > best):
            self.best_score[place] = score
            state = self.students[stage.key].state_dict()
            kept = {name: value for name, value in state.items() if "feature_taps" not in name}
            self.best[stage.key].load_state_dict(kept)

    def on_test_start(self) -> None:
        """Makes the baselines that are not trained."""
        self._compared = self._networks_to_compare()
        self._before_evaluation = evaluation_state(nn.ModuleDict(self._compared))

    @property
    def ready_rows(self) -> list[str]:
        """Rows of the table with at least one number by now."""
        return [row for row in self.rows if any(self._is_ready(row, w) for w in self.widths)]

    def _is_ready(self, row: str, width: Width) -> bool:
        networks = self.best if row == "zaq_best" else self.students
        key = f"zaq_{width}" if row == "zaq_best" else f"{row}_{width}"
        if key not in networks:
            return row != "zaq_best"
        return all(q.has_range for q in activation_quantizers(networks[key]).values())

    def _networks_to_compare(self) -> dict[str, nn.Module]:
        network, shape = self.float_network, self.image_shape
        free: dict[str, Callable[[Width], nn.Module]] = {
            "rq": lambda width: round_to_nearest(network, width, self.quantizer, shape),
            "dfq": lambda width: dfq(network, width, self.quantizer, shape),
            "aciq": lambda width: aciq(network, width, self.quantizer, shape),
            "zeroq": lambda width: zeroq(network, width, self.quantizer, self.distilled_images()),
            "mixed": lambda width: mixed_precision(
                network, width, self.quantizer, self.distilled_images(), sensitivities
            ),
        }
        found: dict[str, nn.Module] = {}
        # Networks that are made in inference mode could not be exported.
        with torch.inference_mode(False), torch.no_grad():
            if "mixed" in self.rows:
                images = self.distilled_images()
                sensitivities = weight_sensitivities(network, self.quantizer, images)
            for row in self.ready_rows:
                for width in self.widths:
                    key = f"{row}_{width}"
                    if not self._is_ready(row, width):
                        continue
                    if row == "float":
                        if width == self.widths[0]:
                            found[key] = network
                    elif row == "zaq_best":
                        found[key] = self.best[f"zaq_{width}"]
                    elif row in free:
                        found[key] = free[row](width)
                        if row == "mixed":
                            self.allocated_bits[str(width)] = weight_bits(found[key])
                    else:
                        found[key] = self.students[key]
        return found

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Feeds every cell of the table."""
        for key, network in self._compared.items():
            self.judge(cast(Metric, self.test_scores[key]), network, batch)

    def on_test_epoch_end(self) -> None:
        """Logs ``test/METHOD/WIDTH``.

        Raises:
            RuntimeError: the images have moved a range, a running statistic or a weight.
        """
        demand_unmoved(nn.ModuleDict(self._compared), self._before_evaluation)
        self._before_evaluation = {}
        for key in self._compared:
            score = cast(Metric, self.test_scores[key])
            row, _, width = key.rpartition("_")
            # The float network is judged once, and is the same at every width.
            for column in self.column_names if row == "float" else [width]:
                self.log(f"test/{row}/{column}", score.compute())
            score.reset()

    # ------------------------------------------------------------------ what is handed over
    def deployable_networks(self) -> dict[str, fx.GraphModule]:
        """ZAQ's quantized networks of the last epoch by their width; they take normalised images."""
        return {
            str(width): cast(fx.GraphModule, self.students[f"zaq_{width}"])
            for width in self.widths
            if self._is_ready("zaq", width)
        }

    def forward(self, images: Tensor) -> Any:
        """What the quantized network of the first width says of images [B, C, H, W] in [0, 1]."""
        return self.first_student(self.to_network(images))

    @property
    def first_student(self) -> nn.Module:
        """The quantized network of the first width, last epoch."""
        return self.students[f"zaq_{self.widths[0]}"]
