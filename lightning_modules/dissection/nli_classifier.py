"""A sentence-pair classifier to train, and one read from a file to look into."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.optim import Adam
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from lightning_modules.arguments import demand_at_least
from lightning_modules.checkpoints import load_frozen
from lightning_modules.dissection.networks import LABELS, PAD, UNK, BowmanEntailmentClassifier
from lightning_modules.files import read_tensors
from lightning_modules.paper import PaperModule
from lightning_modules.randomness import global_seed, mix

NO_LABEL = -1
SPECIAL_WORDS = ("UNK", "PAD")
"""Words 0 and 1 of every vocabulary."""

Sentences = Sequence[Sequence[str]]


class NLIClassifier(PaperModule):
    """Entailment, neutral or contradiction: cross entropy and Adam, as the released code trains it.

    Batches have ``premise`` and ``hypothesis``, lists of words, and ``label`` [B] with -1 for pairs without one, which
    do not count. The vocabulary is that of the DataModule (``vocabulary``) and is in the checkpoint. Logs ``val/loss``,
    ``val/accuracy`` and ``test/accuracy``, in [0, 1].

    Args:
        embedding_dim: size of a word vector.
        hidden_dim: size of a sentence vector.
        head: ``bowman``, whose 1,024 hidden units are probed, or ``minimal``.
        lr: learning rate of Adam, constant.
        epochs: length of the training; the released code trains up to 50 and probes the network after 6.

    Raises:
        ValueError: impossible arguments.
    """

    bar_terms = ("loss",)
    network: BowmanEntailmentClassifier

    def __init__(
        self,
        embedding_dim: int = 300,
        hidden_dim: int = 512,
        head: Literal["bowman", "minimal"] = "bowman",
        lr: float = 1e-3,
        epochs: int = 50,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        demand_at_least(
            1, option="--model.", embedding_dim=embedding_dim, hidden_dim=hidden_dim, epochs=epochs
        )
        if not lr > 0:
            raise ValueError(f"lr={lr} must be positive (--model.lr)")
        if head not in ("bowman", "minimal"):
            raise ValueError(f"head={head!r} must be 'bowman' or 'minimal' (--model.head)")
        self.vocabulary: list[str] = []
        self._numbers: dict[str, int] = {}
        self.val_accuracy, self.test_accuracy = (
            MulticlassAccuracy(len(LABELS), average="micro", ignore_index=NO_LABEL)
            for _ in range(2)
        )
        self.val_loss = MeanMetric()

    # ------------------------------------------------------------------ schedule
    @property
    def total_epochs(self) -> int:
        """Length of the training."""
        return self.hp.epochs

    def configure_optimizers(self) -> Adam:
        """Adam for everything."""
        return Adam(self.parameters(), lr=self.hp.lr)

    # ------------------------------------------------------------------ vocabulary
    def use_vocabulary(self, words: Sequence[str]) -> "NLIClassifier":
        """Builds the network for these words; its initial weights depend on the run's seed alone.

        Args:
            words: without repetitions; ``UNK`` and ``PAD`` are put in front.

        Returns:
            The module.
        """
        self._build([*SPECIAL_WORDS, *(word for word in words if word not in SPECIAL_WORDS)])
        return self

    def _build(self, vocabulary: list[str]) -> None:
        self._remember(vocabulary)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(mix(global_seed(), "sentence-pair classifier"))
            self.network = BowmanEntailmentClassifier(
                len(vocabulary), self.hp.embedding_dim, self.hp.hidden_dim, self.hp.head
            ).to(self.device)

    def _remember(self, vocabulary: list[str]) -> None:
        self.vocabulary = vocabulary
        self._numbers = {word: number for number, word in enumerate(vocabulary)}

    def get_extra_state(self) -> Tensor:
        """The vocabulary, as the bytes of its JSON: weights and the words they are for belong together."""
        return torch.tensor([*json.dumps(self.vocabulary).encode()], dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """Nothing: :meth:`load_state_dict` needs the vocabulary before the weights."""

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **options: Any) -> Any:
        """Takes the vocabulary, builds the network for it, and takes the weights."""
        # Also where processes were forked for the training, and their parent has no network yet.
        state = state_dict.get("_extra_state")
        vocabulary = self.vocabulary if state is None else json.loads(bytes(state.tolist()))
        if vocabulary != self.vocabulary:
            self._build(vocabulary)
        return super().load_state_dict(state_dict, *args, **options)

    @classmethod
    def from_reference(cls, checkpoint: Mapping[str, Any]) -> "NLIClassifier":
        """The module of a checkpoint in the format of the released code.

        Args:
            checkpoint: with ``state_dict`` and ``stoi``, the number of every word.

        Raises:
            ValueError: entries are missing, of another network, or do not fit each other.
        """
        network = BowmanEntailmentClassifier.from_reference(checkpoint)
        numbers = checkpoint.get("stoi")
        rows, embedding_dim = network.encoder.emb.weight.shape
        if not isinstance(numbers, Mapping) or sorted(numbers.values()) != list(range(rows)):
            raise ValueError(
                f"the checkpoint needs `stoi`, the numbers 0 to {rows - 1} of its {rows} words"
            )
        module = cls(embedding_dim, network.encoder.rnn.hidden_size)
        module._remember(sorted(numbers, key=numbers.__getitem__))
        module.network = network
        return module

    def reference_checkpoint(self) -> dict[str, Any]:
        """The checkpoint in the format of the released code; the inverse of :meth:`from_reference`."""
        state = {name: value.cpu() for name, value in self.network.state_dict().items()}
        return {"state_dict": state, "stoi": dict(self._numbers), "itos": list(self.vocabulary)}

    def word_vectors(self) -> dict[str, Tensor]:
        """The trained vectors [embedding_dim] of the words."""
        table = self.network.encoder.emb.weight.detach().double().cpu()
        return dict(zip(self.vocabulary[PAD + 1 :], table[PAD + 1 :], strict=True))

    def encode(self, sentences: Sentences) -> tuple[Tensor, Tensor]:
        """Word numbers [T, B], padded, and lengths [B]; words outside the vocabulary, and no words, are ``UNK``."""
        rows = [
            torch.tensor([self._numbers.get(word, UNK) for word in sentence] or [UNK])
            for sentence in sentences
        ]
        lengths = torch.tensor([len(row) for row in rows])
        device = self.network.encoder.emb.weight.device
        return pad_sequence(rows, padding_value=PAD).to(device), lengths

    # ------------------------------------------------------------------ training
    def representation(self, premises: Sentences, hypotheses: Sentences) -> Tensor:
        """The probed units [B, 1024] of pairs of sentences, see :class:`BowmanEntailmentClassifier`."""
        return self.network.representation(*self.encode(premises), *self.encode(hypotheses))

    def forward(self, premises: Sentences, hypotheses: Sentences) -> Tensor:
        """Logits [B, 3] of pairs of sentences."""
        return self.network.classify(self.representation(premises, hypotheses))

    def loss(self, batch: dict[str, Any]) -> Tensor:
        """Mean cross entropy of a batch."""
        logits = self(batch["premise"], batch["hypothesis"])
        labels = batch["label"].to(logits.device)
        return F.cross_entropy(logits, labels, ignore_index=NO_LABEL)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """The loss of the batch."""
        loss = self.loss(batch)
        self.losses = {"loss": loss.detach()}
        return loss

    # ------------------------------------------------------------------ evaluation
    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Loss and accuracy."""
        logits, labels = self(batch["premise"], batch["hypothesis"]), batch["label"]
        self.val_accuracy.update(logits, labels)
        losses = F.cross_entropy(logits, labels, ignore_index=NO_LABEL, reduction="none")
        self.val_loss.update(losses, (labels != NO_LABEL).to(losses))
        self.log("val/accuracy", self.val_accuracy, on_step=False, on_epoch=True)
        self.log("val/loss", self.val_loss, on_step=False, on_epoch=True)

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Accuracy."""
        self.test_accuracy.update(self(batch["premise"], batch["hypothesis"]), batch["label"])
        self.log("test/accuracy", self.test_accuracy, on_step=False, on_epoch=True)

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        """The most probable label of every pair.

        Returns:
            Columns ``premise``, ``hypothesis``, ``label`` (names) and ``confidence`` ([B], in (0, 1]).
        """
        logits = self(batch["premise"], batch["hypothesis"])
        confidence, label = torch.softmax(logits, 1).max(1)
        return {
            "premise": [" ".join(words) for words in batch["premise"]],
            "hypothesis": [" ".join(words) for words in batch["hypothesis"]],
            "label": [LABELS[k] for k in label.tolist()],
            "confidence": confidence,
        }

    # ------------------------------------------------------------------ checks
    def setup(self, stage: str) -> None:
        """Takes the vocabulary from the data, unless there is one already.

        Raises:
            ValueError: the data have none.
        """
        if self.vocabulary:
            return
        words = getattr(getattr(self.trainer, "datamodule", None), "vocabulary", None)
        if not words:
            raise ValueError(
                "NLIClassifier takes its vocabulary from the data, which have none; use --data NLIDataModule"
            )
        self.use_vocabulary(words)

    def require_weights(self) -> None:
        """Nothing is needed to start from; for :func:`~lightning_modules.supervised.judge.fit_judge`."""


def load_nli_classifier(path: str | Path, option: str = "--model.classifier") -> NLIClassifier:
    """A classifier from a checkpoint of :class:`NLIClassifier`, or from one in the format of the released code.

    Args:
        path: the file.
        option: of the command line by which it is given, for the messages.

    Returns:
        The module, frozen and in evaluation mode, on the CPU.

    Raises:
        FileNotFoundError: there is no such file.
        RuntimeError: it is no readable checkpoint, or of another module.
        ValueError: it is in the released format, but of another network.
    """
    path = Path(path).expanduser()
    checkpoint = read_tensors(path, f"checkpoint ({option})") if path.is_file() else None
    if isinstance(checkpoint, dict) and "stoi" in checkpoint:
        module = NLIClassifier.from_reference(checkpoint)
        return module.eval().requires_grad_(False)
    loaded = load_frozen(path, option, use_vocabulary="is no sentence-pair classifier")
    assert isinstance(loaded, NLIClassifier)
    return loaded
