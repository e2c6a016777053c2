"""Label words scored at the place of the answer, against transformers; figures against counting by hand."""

from __future__ import annotations

import math

import pytest
import torch
from parity.test_families import converted
from support.models import save_tokenizer

from steps.engine.data.tokenizer import Tokenizer
from steps.engine.evaluation.answers import Prompt
from steps.engine.evaluation.labels import Example, Scored, examples, figures, score, wilson
from steps.errors import StepFailed

pytest.importorskip("transformers", reason="extra parity")


def prompt(text, reference=None):
    return Prompt([{"role": "user", "content": text}], None, reference)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("labels")
    reference, decoder = converted("llama", path)
    save_tokenizer(path / "tokenizer")
    return reference, decoder, Tokenizer.load(str(path / "tokenizer"))


TEXTS = ["w5 w6", "w7", "w9 w10 w11 w12"]


@pytest.mark.parametrize("labels", [["w20", "w21", "w22"], ["w20", "w21 w22", "w23 w24 w25"]], ids=["words", "phrases"])
@pytest.mark.parametrize("batch_size", [1, 2, 3])
@torch.no_grad()
def test_scores_are_those_of_transformers(model, labels, batch_size):
    reference, decoder, tokenizer = model
    found = list(score(decoder, tokenizer, [Example(prompt(text), 0) for text in TEXTS], labels, batch_size))
    for text, scored in zip(TEXTS, found, strict=True):
        asked = tokenizer.encode(
            tokenizer.render([{"role": "user", "content": text}], None, add_generation_prompt=True)
        )
        for label, value in zip(labels, scored.scores, strict=True):
            answer = tokenizer.encode(label)
            logits = reference(torch.tensor([asked + answer])).logits[0, len(asked) - 1 : -1]
            expected = torch.log_softmax(logits, -1).gather(1, torch.tensor(answer)[:, None]).sum().item()
            assert value == pytest.approx(expected, abs=1e-4)
        assert scored.predicted == max(range(3), key=scored.scores.__getitem__)


def test_a_label_that_begins_like_another_is_refused(model):
    _, decoder, tokenizer = model
    with pytest.raises(StepFailed, match="'w20 w21' begins with all tokens of 'w20'"):
        list(score(decoder, tokenizer, [Example(prompt("w5"), 0)], ["w20", "w20 w21"], 1))


def test_labels_come_from_the_data_or_must_hold_all_of_it():
    some = [prompt("a", " yes "), prompt("b", "no"), prompt("c", "yes")]
    found, names = examples(some, None)
    assert names == ["no", "yes"]
    assert [example.gold for example in found] == [1, 0, 1]
    assert [example.gold for example in examples(some, ["yes", "no", "perhaps"])[0]] == [0, 1, 0]
    with pytest.raises(StepFailed, match="1 of 3 examples have no answer that is a label, the first one 'no'"):
        examples(some, ["yes", "perhaps"])
    with pytest.raises(StepFailed, match="the first one None"):
        examples([prompt("a", "yes"), prompt("b")], ["yes", "no"])
    with pytest.raises(StepFailed, match="only the label 'yes'"):
        examples([prompt("a", "yes")], None)


def scored(gold, predicted):
    scores = [0.0, 0.0, 0.0]
    scores[predicted] = 1.0
    return Scored(Example(prompt("x"), gold), scores)


def test_figures_by_hand():
    pairs = [(0, 0), (0, 0), (0, 1), (1, 1), (1, 0), (1, 1)]
    told = figures([scored(*pair) for pair in pairs], ["a", "b", "c"], 0.95)
    assert told["confusion"] == [[2, 1, 0], [1, 2, 0], [0, 0, 0]]
    assert told["accuracy"] == pytest.approx(4 / 6)
    assert told["labels"]["a"] == pytest.approx({"precision": 2 / 3, "recall": 2 / 3, "f1": 2 / 3, "support": 3})
    assert told["labels"]["c"] == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 0}
    assert told["macro_f1"] == pytest.approx((2 / 3 + 2 / 3 + 0) / 3)
    assert told["majority"] == 0.5
    right, wrong = -math.log(math.e / (math.e + 2)), -math.log(1 / (math.e + 2))
    assert told["loss"] == pytest.approx((4 * right + 2 * wrong) / 6)


def test_wilsons_interval():
    """Brown, Cai and DasGupta 2001, and the bounds that the formula has at the edges."""
    assert wilson(0, 10, 0.95) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert wilson(10, 10, 0.95) == pytest.approx((0.7225, 1.0), abs=1e-4)
    assert wilson(50, 100, 0.95) == pytest.approx((0.4038, 0.5962), abs=1e-4)
