import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lightning_modules.dissection.networks import PAD, BowmanEntailmentClassifier

SENTENCES = [[2, 5, 7, 3], [4, 6], [9]]


def batch(sentences: list[list[int]]) -> tuple[Tensor, Tensor]:
    padded = pad_sequence([torch.tensor(s) for s in sentences], padding_value=PAD)
    return padded, torch.tensor([len(s) for s in sentences])


def network(**options: str) -> BowmanEntailmentClassifier:
    torch.manual_seed(0)
    return BowmanEntailmentClassifier(12, 4, 6, **options).eval()  # type: ignore[arg-type]


@pytest.mark.parametrize("head", ["bowman", "minimal"])
@torch.no_grad()
def test_padding_changes_nothing(head: str) -> None:
    model = network(head=head)
    together = model(*batch(SENTENCES), *batch(SENTENCES[::-1]))
    for i, (one, two) in enumerate(zip(SENTENCES, SENTENCES[::-1], strict=True)):
        alone = model(*batch([one]), *batch([two]))
        torch.testing.assert_close(together[i : i + 1], alone)


@pytest.mark.parametrize(("head", "width"), [("bowman", 1024), ("minimal", 6)])
@torch.no_grad()
def test_units_explain_the_logits(head: str, width: int) -> None:
    model = network(head=head)
    arguments = (*batch(SENTENCES), *batch(SENTENCES[::-1]))
    units = model.representation(*arguments)
    assert units.shape == (3, width)
    assert (units >= 0).all() == (head == "bowman")
    torch.testing.assert_close(model.classify(units), model(*arguments))
    linear = units @ model.classifier.weight.T + model.classifier.bias
    torch.testing.assert_close(linear, model(*arguments))


@torch.no_grad()
def test_published_checkpoint() -> None:
    model = network()
    again = BowmanEntailmentClassifier.from_reference(
        {"state_dict": model.state_dict(), "stoi": {}}
    )
    arguments = (*batch(SENTENCES), *batch(SENTENCES))
    assert torch.equal(again.eval()(*arguments), model(*arguments))


@pytest.mark.parametrize(
    ("checkpoint", "message"),
    [
        ({"model": {}}, r"needs a state_dict, but has \['model'\]"),
        ({"state_dict": {}}, "not of this network"),
        ({"state_dict": network(head="minimal").state_dict()}, "not of this network"),
    ],
)
def test_other_checkpoints(checkpoint: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BowmanEntailmentClassifier.from_reference(checkpoint)


def test_unknown_head() -> None:
    with pytest.raises(ValueError, match="head='linear'"):
        network(head="linear")
