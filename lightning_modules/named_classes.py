"""Modules that know the names of their classes, and that may wait for pretrained weights."""

from typing import Any, ClassVar

from lightning_modules.paper import PaperModule


class NamedClasses(PaperModule):
    """A module with the hyper-parameter ``num_classes``, whose class names come from the data and go into checkpoints.

    A network that is to start from pretrained weights, but does not find them, leaves the error in
    ``_missing_weights``: a checkpoint that is loaded brings weights; without one nothing may start.
    """

    classes_attribute: ClassVar[str] = "class_names"
    """Where a DataModule keeps the names of the classes."""
    kind_of_classes: ClassVar[str] = "classes"
    """What messages call them."""

    class_names: list[str]
    _missing_weights: FileNotFoundError | None = None

    def setup(self, stage: str) -> None:
        """Refuses to start without the weights that were asked for, and takes the class names from the data.

        Raises:
            FileNotFoundError: the pretrained weights are not on this machine and no checkpoint replaces them.
            ValueError: if the data have another number of classes.
        """
        super().setup(stage)
        if self.trainer.ckpt_path is None:
            self.require_weights()
        data = getattr(self.trainer, "datamodule", None)
        names = getattr(data, self.classes_attribute, None)
        if stage == "predict" or not names:
            return
        if len(names) != self.hp.num_classes:
            raise ValueError(
                f"the model has num_classes={self.hp.num_classes}, the data have {len(names)} {self.kind_of_classes} "
                f"({', '.join(map(str, names[:20]))}); set --model.num_classes {len(names)}"
            )
        self.class_names = [str(name) for name in names]

    def require_weights(self) -> None:
        """Does nothing if the pretrained weights that were asked for are there, or a checkpoint came in their place.

        Raises:
            FileNotFoundError: they are missing.
        """
        if self._missing_weights is not None:
            raise self._missing_weights

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the class names."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["class_names"] = self.class_names

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Takes the class names back; pretrained weights are not needed any more."""
        super().on_load_checkpoint(checkpoint)
        self.class_names = list(checkpoint["class_names"])
        self._missing_weights = None
