from __future__ import annotations

import pytest
import torch

pytest.importorskip("training.lightning", reason="needs the extra [train]")

from training.data import text
from training.data.text import TextData, Tokens

TEXTS = ["the cat and the dog and the ünïcorn\n\n  (or not)".encode(), b"the end"]


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """A twentieth of the documents: enough, and sooner there."""
    documents = list(text.documents())[::20]
    monkeypatch.setattr(text, "documents", lambda: iter(documents))


@pytest.mark.parametrize("vocabulary", [256, 257, 260, 400])
def test_tokens_and_text_are_the_same_thing(vocabulary: int):
    tokens = Tokens(TEXTS, vocabulary)
    assert len(tokens.pieces) <= vocabulary
    for document in (*TEXTS, b"", bytes(range(256))):
        encoded = tokens.encode(document)
        assert tokens.decode(encoded) == document
        assert all(0 <= number < vocabulary for number in encoded.tolist())


def test_the_pieces_are_the_most_frequent_ones():
    assert Tokens(TEXTS, 258).pieces[256:] == [b" and", b" the"]  # twice each; b"the" as well
    assert Tokens(TEXTS, 256).pieces == [bytes([i]) for i in range(256)]


def test_bytes_alone_are_the_text():
    (document, *_) = text.documents()
    encoded = Tokens([document], 256).encode(document)
    assert encoded.tolist() == list(document)


def test_the_documents_are_many_and_always_the_same(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.undo()
    once, again = list(text.documents()), list(text.documents())
    assert once == again
    assert len(once) > 100
    assert sum(map(len, once)) > 2_000_000


def test_a_target_is_the_token_after_its_input():
    examples = TextData(300, 16, 4).examples
    for inputs, targets in (
        (examples.train_inputs, examples.train_targets),
        (examples.test_inputs, examples.test_targets),
    ):
        assert inputs.shape == targets.shape
        assert inputs.shape[1] == 16
        assert torch.equal(inputs[:, 1:], targets[:, :-1])
        assert torch.equal(inputs[1:, 0], targets[:-1, -1])


def test_the_test_is_on_documents_apart():
    tokens = Tokens(list(text.documents()), 256)
    examples = TextData(256, 64, 4).examples
    trained = tokens.decode(examples.train_inputs.flatten())
    assert all(tokens.decode(sequence) not in trained for sequence in examples.test_inputs[:8])


def test_a_vocabulary_that_the_text_does_not_fill_has_unused_entries():
    examples = TextData(131072, 16, 4).examples
    assert 256 < examples.train_inputs.max() < 131071
