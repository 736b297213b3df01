"""The sentence-pair classifier that Compositional Explanations probes."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

UNK, PAD = 0, 1
LABELS = ("entailment", "neutral", "contradiction")
MLP_SIZE = 1024
DROPOUT = 0.1


class SentenceEncoder(nn.Module):
    """Word vectors and a one-directional LSTM; a sentence is the last hidden state.

    Args:
        vocab_size: words.
        embedding_dim: size of a word vector.
        hidden_dim: size of a sentence vector.
    """

    def __init__(self, vocab_size: int, embedding_dim: int = 300, hidden_dim: int = 512) -> None:
        super().__init__()
        self.emb = nn.Embedding(vocab_size, embedding_dim, padding_idx=PAD)
        self.rnn = nn.LSTM(embedding_dim, hidden_dim)

    def forward(self, words: Tensor, lengths: Tensor) -> Tensor:
        """Sentence vectors [B, hidden_dim] of word numbers [T, B] with lengths [B], at least 1."""
        packed = pack_padded_sequence(self.emb(words), lengths.cpu(), enforce_sorted=False)
        return self.rnn(packed)[1][0][0]


class BowmanEntailmentClassifier(nn.Module):
    """Entailment, neutral or contradiction, from the vectors of both sentences, their difference and product.

    The names of the parameters are those of the published checkpoint.

    Args:
        vocab_size: words, of which 0 is unknown and 1 padding.
        embedding_dim: size of a word vector.
        hidden_dim: size of a sentence vector.
        head: ``bowman``, whose 1024 hidden units are probed, or ``minimal``, a linear classifier of the product.
        n_classes: classes.

    Raises:
        ValueError: another head.
    """

    def __init__(
        self,
        vocab_size: int,
        embedding_dim: int = 300,
        hidden_dim: int = 512,
        head: Literal["bowman", "minimal"] = "bowman",
        n_classes: int = len(LABELS),
    ) -> None:
        super().__init__()
        if head not in ("bowman", "minimal"):
            raise ValueError(f"head={head!r} must be 'bowman' or 'minimal'")
        self.head = head
        self.encoder = SentenceEncoder(vocab_size, embedding_dim, hidden_dim)
        width = 4 * hidden_dim if head == "bowman" else hidden_dim
        self.bn = nn.BatchNorm1d(width)
        self.dropout = nn.Dropout(DROPOUT)
        if head == "bowman":
            self.mlp: nn.Module = nn.Sequential(
                nn.Linear(width, MLP_SIZE),
                nn.ReLU(),
                nn.Dropout(DROPOUT),
                nn.Linear(MLP_SIZE, n_classes),
            )
        else:
            self.mlp = nn.Linear(width, n_classes)

    @classmethod
    def from_reference(cls, checkpoint: Mapping[str, Any]) -> "BowmanEntailmentClassifier":
        """The network of a published checkpoint.

        Args:
            checkpoint: with ``state_dict`` and the vocabulary ``stoi``.

        Raises:
            ValueError: entries are missing or of another network.
        """
        if "state_dict" not in checkpoint:
            raise ValueError(f"the checkpoint needs a state_dict, but has {sorted(checkpoint)}")
        state = checkpoint["state_dict"]
        try:
            words, size = state["encoder.emb.weight"].shape
            network = cls(words, size, state["encoder.rnn.weight_hh_l0"].shape[1])
            network.load_state_dict(state)
        except (KeyError, RuntimeError) as error:
            raise ValueError(f"the checkpoint is not of this network: {error}") from error
        return network

    @property
    def classifier(self) -> nn.Linear:
        """The last layer, whose weight says what a unit speaks for."""
        last = self.mlp[-1] if isinstance(self.mlp, nn.Sequential) else self.mlp
        assert isinstance(last, nn.Linear)
        return last

    def representation(
        self,
        premise: Tensor,
        premise_lengths: Tensor,
        hypothesis: Tensor,
        hypothesis_lengths: Tensor,
    ) -> Tensor:
        """What the classifier sees, [B, 1024] after the ReLU (``minimal``: [B, hidden_dim]): the units that are probed.

        Args:
            premise: word numbers [T, B], padded with 1.
            premise_lengths: [B].
            hypothesis: word numbers [T', B].
            hypothesis_lengths: [B].
        """
        one = self.encoder(premise, premise_lengths)
        two = self.encoder(hypothesis, hypothesis_lengths)
        if isinstance(self.mlp, nn.Sequential):
            joint = torch.cat([one, two, one - two, one * two], 1)
            return self.mlp[:2](self.dropout(self.bn(joint)))
        return self.bn(one * two)

    def classify(self, representation: Tensor) -> Tensor:
        """Logits [B, n_classes] of :meth:`representation`, for edits of single units."""
        if isinstance(self.mlp, nn.Sequential):
            return self.mlp[2:](representation)
        return self.mlp(self.dropout(representation))

    def forward(
        self,
        premise: Tensor,
        premise_lengths: Tensor,
        hypothesis: Tensor,
        hypothesis_lengths: Tensor,
    ) -> Tensor:
        """Logits [B, n_classes]; arguments as of :meth:`representation`."""
        return self.classify(
            self.representation(premise, premise_lengths, hypothesis, hypothesis_lengths)
        )
