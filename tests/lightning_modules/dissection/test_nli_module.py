"""A planted unit is found, its words change predictions, and nothing depends on processes or interruptions."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from callbacks.nli_dissection import NLIDissectionReport
from datamodules.nli import LABELS, NLIDataModule
from datamodules.real_fake import RealFakeDataModule
from lightning_modules.dissection.networks import BowmanEntailmentClassifier
from lightning_modules.dissection.nli_classifier import NLIClassifier, load_nli_classifier
from lightning_modules.dissection.nli_module import NLIDissection, read_vectors

PLANTED = "(hyp:tok:not AND (NOT pre:tok:not))"


class PlantedClassifier(NLIClassifier):
    """Says contradiction where unit 0 fires and entailment elsewhere.

    Unit 0: `not` in the hypothesis and not in the premise; unit 1: `never` or `outdoors` in the hypothesis; unit 2:
    whenever the premise has an adjective; unit 3 never.
    """

    def __init__(self) -> None:
        super().__init__(2, 2)
        self.use_vocabulary(["not"])
        last = self.network.classifier
        with torch.no_grad():
            last.weight.zero_()
            last.bias.copy_(torch.tensor([1.0, 0.0, 0.0]))
            last.weight[2, 0] = 10
        self.calls: list[int] = []
        self.modes: list[bool] = []

    def representation(self, premises: Sequence[Any], hypotheses: Sequence[Any]) -> Tensor:
        self.calls.append(len(premises))
        self.modes.append(self.training)
        units = torch.zeros(len(premises), 1024, dtype=torch.float64)
        for i, (first, second) in enumerate(zip(premises, hypotheses, strict=True)):
            units[i, 0] = "not" in second and "not" not in first
            units[i, 1] = "never" in second or "outdoors" in second
            units[i, 2] = any(word in first for word in ("young", "old"))
        return units


def grammar(**options: Any) -> NLIDataModule:
    return NLIDataModule(**{"train_size": 200, "test_size": 600, **options})


def planted(**options: Any) -> NLIDissection:
    settings = {"units": [0, 1, 2, 3], "min_activations": 5, "max_length": 3, "beam_size": 5}
    module = NLIDissection(**{**settings, **options})
    module.classifier = PlantedClassifier().eval()
    return module


def analysed(module: NLIDissection, data: Any, folder: Path, *callbacks: Any) -> dict[str, float]:
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        default_root_dir=folder,
        callbacks=list(callbacks),
    )
    trainer.test(module, data, verbose=False)
    values = trainer.callback_metrics
    return {name.removeprefix("test/"): float(value) for name, value in values.items()}


# ------------------------------------------------------------------ what is found
def test_a_planted_unit_is_found(tmp_path: Path) -> None:
    module = planted(certify=60)
    values = analysed(module, grammar(), tmp_path, NLIDissectionReport())
    unit, either, adjective, silent = module.units
    assert unit["text"] == PLANTED
    assert unit["iou"] == 1
    assert unit["ceiling"] == pytest.approx(1)
    assert unit["certified"]
    assert unit["feeds"] == ["contradiction"]
    assert unit["netdissect"]["label"] == "hyp:tok:not"
    assert [step["iou"] for step in unit["by_length"]] == [
        pytest.approx(unit["netdissect"]["iou"]),
        1,
        1,
    ]
    assert either["text"] in (
        "(hyp:tok:never OR hyp:tok:outdoors)",
        "(hyp:tok:outdoors OR hyp:tok:never)",
    )
    assert adjective["iou"] == 1
    assert set(adjective["text"].strip("()").split(" OR ")) == {"pre:tok:young", "pre:tok:old"}
    assert (silent["text"], silent["formula"], silent["iou"]) == ("", None, 0)
    assert values["silent_units"] == 1
    assert values["certified"] == 1

    example = unit["examples"][0]
    assert "not" in example["hypothesis"].split()
    assert "not" not in example["premise"].split()
    assert example["predicted"] == "contradiction"
    everything = json.loads((tmp_path / "units.json").read_text())
    assert everything["units"] == module.units
    assert PLANTED in (tmp_path / "tables" / "units.csv").read_text()
    assert PLANTED.replace("'", "") in (tmp_path / "dissection.html").read_text()


def test_the_words_of_a_unit_change_the_prediction(tmp_path: Path) -> None:
    module = planted(units=[0, 1], edit_units=1)
    analysed(module, grammar(), tmp_path)
    edits = {(edit["source"], edit["target"]): edit for edit in module.edits}
    edit = edits["entailment", "contradiction"]
    assert edit["unit"] == 0
    assert edit["tried"] > 20
    # Where the premise has a `not`, too, one edit is not enough.
    assert 0.7 < edit["success"] == edit["activated"] < 1
    assert edit["control_success"] == 0
    before, after = edit["examples"][0]["before"], edit["examples"][0]["after"]
    assert before != after
    premise, hypothesis = (text.split() for text in after)
    assert "not" in hypothesis
    assert "not" not in premise
    assert edit["examples"][0]["margin_change"] == 10
    assert not any(source == "neutral" for source, _ in edits), "no pair is predicted neutral"


def test_pmi_shows_the_bias_and_its_absence(tmp_path: Path) -> None:
    scores = []
    for name, rates in (("biased", (0.1, 0.1, 0.7)), ("fair", (0.4, 0.4, 0.4))):
        module = planted(units=[3], smoothing=0)
        analysed(module, grammar(test_size=2000, negation_rates=rates), tmp_path / name)
        scores.append(dict(module.feature_pmi["contradiction"]).get("hyp:tok:not", 0))
    assert scores[0] > 0.5
    assert abs(scores[1]) < 0.15


def test_pairs_without_a_label_are_probed_but_do_not_count(tmp_path: Path) -> None:
    data = grammar(test_size=100)
    module = planted(units=[0])
    values = analysed(module, data, tmp_path / "all")
    data.test.labels[:50] = -1
    partly = planted(units=[0])
    fewer = analysed(partly, data, tmp_path / "half")
    assert [partly.units[0][name] for name in ("iou", "area")] == [
        module.units[0][name] for name in ("iou", "area")
    ]
    assert fewer["pairs"] == values["pairs"] == 100
    right = [
        pair.label == 2 * ("not" in pair.hypothesis.words and "not" not in pair.premise.words)
        for pair in data.test.pairs
    ]
    assert values["accuracy"] == pytest.approx(sum(right) / 100)
    assert fewer["accuracy"] == pytest.approx(sum(right[50:]) / 50)
    assert None in {example["label"] for example in partly.units[0]["examples"]}


# ------------------------------------------------------------------ how it runs
def test_an_interrupted_run_computes_only_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = planted()
    analysed(whole, grammar(), tmp_path)
    (path,) = (tmp_path / "units").iterdir()
    lines = path.read_text().splitlines()
    kept = [json.loads(line)["unit"] for line in lines[:2]]
    path.write_text("\n".join(lines[:2]) + "\n" + lines[2][:40])
    searched: list[Any] = []
    original = NLIDissection._search

    def counted(self: NLIDissection, *args: Any) -> Any:
        searched.append(args)
        return original(self, *args)

    monkeypatch.setattr(NLIDissection, "_search", counted)
    resumed = planted()
    analysed(resumed, grammar(), tmp_path)
    assert len(searched) == 4 - len(kept)
    assert resumed.units == whole.units
    other = planted(max_length=2)
    analysed(other, grammar(), tmp_path)
    assert len(searched) == 4 - len(kept) + 4, "records of another search do not count"


def test_eval_mode_unless_the_released_accident_is_wanted(tmp_path: Path) -> None:
    module = planted(units=[3])
    analysed(module, grammar(test_size=100), tmp_path / "eval")
    classifier: Any = module.classifier
    assert classifier.modes
    assert not any(classifier.modes)
    assert classifier.calls[0] == 100

    module = planted(units=[3], train_mode_features=True, edit_units=0)
    analysed(module, grammar(test_size=100), tmp_path / "train")
    classifier = module.classifier
    assert all(classifier.modes)
    assert classifier.calls == [16] * 6 + [4]
    assert not classifier.training


def test_released_neighbours_have_no_effect(tmp_path: Path) -> None:
    vectors = tmp_path / "vectors.txt"
    vectors.write_text("young 1 0\nold 1 0.1\nnever 0 1\noutdoors 0.1 1\n")
    found = []
    for released in (False, True):
        module = planted(
            vectors=str(vectors), neighbors=1, released_neighbors=released, max_length=1
        )
        analysed(module, grammar(), tmp_path / str(released))
        found.append([record["text"] for record in module.units])
    assert found[0][2] in ("(NEIGHBORS pre:tok:young)", "(NEIGHBORS pre:tok:old)")
    assert not any("NEIGHBORS" in text for text in found[1])


def test_a_classifier_is_trained_where_none_is_given(tmp_path: Path) -> None:
    options: dict[str, Any] = {"embedding_dim": 8, "hidden_dim": 8, "train_steps": 4}
    options |= {"units": [0, 5], "min_activations": 1, "max_length": 1, "edit_units": 0}
    module = NLIDissection(**options)
    analysed(module, grammar(), tmp_path / "a")
    saved = tmp_path / "a" / "classifier.pt"
    again = NLIDissection(**{**options, "classifier": str(saved)})
    analysed(again, grammar(), tmp_path / "b")
    assert again.units == module.units
    stamp = saved.stat().st_mtime_ns
    analysed(NLIDissection(**options), grammar(), tmp_path / "a")
    assert saved.stat().st_mtime_ns == stamp, "the interrupted run's classifier is taken again"
    analysed(NLIDissection(**{**options, "train_steps": 5}), grammar(), tmp_path / "a")
    assert saved.stat().st_mtime_ns != stamp


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"units": [5000]}, "5000.*--model.units"),
        ({"beam_size": 0}, "beam_size=0"),
        ({"quantile": 1.0}, "quantile=1.0"),
        ({"mode": "fast"}, "'fast'.*distinct"),
        ({"certify": 5, "mode": "reference"}, "certify"),
        ({"alpha": 0.5}, "alpha=0.5"),
        ({"length_penalty": 0}, "length_penalty=0"),
    ],
)
def test_impossible_arguments(options: dict[str, Any], expected: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=expected):
        analysed(planted(**options), grammar(), tmp_path)


def test_other_data_are_refused(tmp_path: Path) -> None:
    data = RealFakeDataModule("digits:test", image_size=8)
    with pytest.raises(MisconfigurationException, match="lacks premise"):
        analysed(planted(), data, tmp_path)
    with pytest.raises(MisconfigurationException, match=r"--model\.classifier"):
        analysed(NLIDissection(), data, tmp_path)


# ------------------------------------------------------------------ files
def test_classifiers_from_files(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = BowmanEntailmentClassifier(4, 3, 2)
    stoi = {"UNK": 0, "PAD": 1, "dog": 3, "cat": 2}
    path = tmp_path / "published.pth"
    torch.save({"state_dict": network.state_dict(), "stoi": stoi, "itos": list(stoi)}, path)
    module = load_nli_classifier(path)
    assert module.vocabulary == ["UNK", "PAD", "cat", "dog"]
    words, lengths = module.encode([["dog", "cat"], ["bird"], []])
    assert words.T.tolist() == [[3, 2], [0, 1], [0, 1]]
    assert lengths.tolist() == [2, 1, 1]
    expected = network.eval()(*module.encode([["dog"]]), *module.encode([["cat"]]))
    assert torch.equal(module([["dog"]], [["cat"]]), expected)
    assert module.reference_checkpoint()["stoi"] == stoi

    with pytest.raises(FileNotFoundError, match=r"--model\.classifier"):
        load_nli_classifier(tmp_path / "none.ckpt")
    path.write_bytes(b"nothing")
    with pytest.raises(RuntimeError, match="not a readable checkpoint"):
        load_nli_classifier(path)
    torch.save({"state_dict": network.state_dict(), "stoi": {"UNK": 0}}, path)
    with pytest.raises(ValueError, match="stoi"):
        load_nli_classifier(path)


def test_word_vectors_from_files(tmp_path: Path) -> None:
    path = tmp_path / "vectors.txt"
    path.write_text("2 3\ndog 1 2 3\ncat 4 5 6\n")
    assert {word: v.tolist() for word, v in read_vectors(path).items()} == {
        "dog": [1, 2, 3],
        "cat": [4, 5, 6],
    }
    torch.save({"dog": torch.ones(2)}, tmp_path / "v.pt")
    assert read_vectors(tmp_path / "v.pt")["dog"].tolist() == [1, 1]
    path.write_text("dog 1 2\ncat 1\n")
    with pytest.raises(ValueError, match="line 2 has 1 numbers instead of 2"):
        read_vectors(path)
    path.write_text("dog 1 x\n")
    with pytest.raises(ValueError, match="line 1"):
        read_vectors(path)
    with pytest.raises(FileNotFoundError, match=r"--model\.vectors"):
        read_vectors(tmp_path / "none.txt")


def test_a_classifier_learns_and_comes_back_from_its_checkpoint(tmp_path: Path) -> None:
    data = grammar(train_size=1000, val_size=200, test_size=200)
    module = NLIClassifier(16, 16, lr=1e-2, epochs=4)
    trainer = Trainer(
        max_epochs=4,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, data)
    assert float(trainer.callback_metrics["val/accuracy"]) > 0.6
    path = tmp_path / "trained.ckpt"
    trainer.save_checkpoint(path)
    loaded = load_nli_classifier(path)
    assert loaded.vocabulary == module.vocabulary
    pair = [["a", "man"]], [["the", "man", "is", "not", "tall"]]
    assert torch.equal(loaded(*pair), module.eval()(*pair))
    # As the parent of forked training processes does.
    fresh = NLIClassifier(16, 16)
    fresh.load_state_dict(module.state_dict(), strict=False)
    assert torch.equal(fresh.eval()(*pair), loaded(*pair))
    row = loaded.predict_step({"premise": pair[0], "hypothesis": pair[1]}, 0)
    assert row["label"][0] in LABELS
    assert row["hypothesis"] == ["the man is not tall"]
