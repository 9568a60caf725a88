"""Text that every Python brings along, cut into tokens: no network, no file of ours.

The documents are the help texts of `pydoc_data.topics` and the sources of the standard library's
top-level modules, in the order of their names. A Python of the same version has the same ones.
"""

from __future__ import annotations

import argparse
import platform
import re
import sys
import sysconfig
from collections import Counter
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from pydoc_data.topics import topics

import torch
from torch import Tensor

from training.data.examples import ExampleData, Examples

BYTES = 256

#: Each of so many documents is kept for the test, and of those so many sequences are enough.
HELD_OUT = 20
TEST_SEQUENCES = 64

# Words, punctuation and white space, each with the one space before it.
_PIECES = re.compile(rb" ?\w+| ?[^\w\s]+|\s+(?!\S)|\s+")


class TextData(ExampleData):
    """Sequences of tokens, and the tokens that follow: batches of (B, T) and (B, T).

    Args:
        vocabulary: V, 256 or more: the bytes, then the most frequent pieces of the training text.
            If it has not that many, the rest of the numbers does not occur.
        context: T.
        batch_size: sequences a batch.
        seed: of the order of the training sequences.
    """

    unit = "tokens"
    independent = False  # the tokens of a sequence are not

    def __init__(self, vocabulary: int, context: int, batch_size: int, seed: int = 0) -> None:
        super().__init__(batch_size, seed, test_batch_size=8)
        self.vocabulary = vocabulary
        self.context = context

    @classmethod
    def of(cls, arguments: argparse.Namespace) -> TextData:
        """Return the data that a command line asks for; write in its name and the epochs."""
        arguments.epochs = arguments.epochs or 1
        data = cls(arguments.vocabulary, arguments.context, arguments.batch_size, arguments.seed)
        arguments.data = data.examples.name
        return data

    def load(self) -> Examples:
        """Return the sequences; those of the test come from documents apart."""
        texts = list(documents())
        held_out = texts[::HELD_OUT]
        del texts[::HELD_OUT]
        tokens = Tokens(texts, self.vocabulary)
        train, test = (tokens.encode(b"\n".join(part)) for part in (texts, held_out))
        return Examples(
            f"the text of Python {platform.python_version()}",
            *_sequences(train, self.context),
            *(t[:TEST_SEQUENCES] for t in _sequences(test, self.context)),
        )


class Tokens:
    """The bytes and the pieces of texts that occur most often, numbered.

    >>> tokens = Tokens([b" to be or not to be"], 258)
    >>> tokens.encode(b"be to be").tolist()  # the letters of a word that is none of the pieces
    [98, 101, 257, 256]
    >>> tokens.decode(tokens.encode(b"be to be"))
    b'be to be'
    """

    def __init__(self, texts: list[bytes], vocabulary: int) -> None:
        counts = Counter(chain.from_iterable(_PIECES.findall(text) for text in texts))
        longer = ((-count, piece) for piece, count in counts.items() if len(piece) > 1)
        pieces = (piece for _, piece in sorted(longer))
        self.pieces = [bytes([i]) for i in range(BYTES)]
        self.pieces += islice(pieces, vocabulary - BYTES)
        self._numbers = {piece: (number,) for number, piece in enumerate(self.pieces)}

    def encode(self, text: bytes) -> Tensor:
        """Return the text's tokens (N,): a piece's number, or its bytes where it has none."""
        pieces = _PIECES.findall(text)
        numbers = (self._numbers.get(piece, piece) for piece in pieces)
        return torch.tensor(list(chain.from_iterable(numbers)))

    def decode(self, tokens: Tensor) -> bytes:
        """Return the text of tokens (N,)."""
        return b"".join(self.pieces[number] for number in tokens.tolist())


def documents() -> Iterator[bytes]:
    """Yield the documents, always in the same order."""
    for name in sorted(topics):
        yield topics[name].encode()
    library = Path(sysconfig.get_path("stdlib"))
    for name in sorted(sys.stdlib_module_names):
        source = library / f"{name}.py"
        if source.is_file():
            yield source.read_bytes()


def _sequences(tokens: Tensor, context: int) -> tuple[Tensor, Tensor]:
    """(N,) to inputs and targets, (S, T) each; a target is the token after its input."""
    used = (len(tokens) - 1) // context * context
    return tokens[:used].view(-1, context), tokens[1 : used + 1].view(-1, context)
