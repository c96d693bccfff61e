"""Real batches for models of `benchmarks.observe`: what is worth training depends on them, unlike what a step costs."""

import re
from collections import Counter
from collections.abc import Callable
from functools import cache
from pydoc_data.topics import topics

import torch
from torch import Tensor

from examples.data import MNIST

Batch = tuple[Tensor, Tensor]


@cache
def _digits() -> Batch:
    """3,600 digits, (n, 784), and their classes."""
    data = MNIST(seed=0)
    data.setup()
    x, y = data.dataset["train"].tensors
    return x.flatten(1), y


@cache
def _words(vocabulary: int) -> Tensor:
    """Python's help texts as numbers of words by frequency; the last one is of all that are rarer."""
    words = re.findall(r"\w+|[^\w\s]", "\n".join(topics[name] for name in sorted(topics)))
    number = {word: i for i, (word, _) in enumerate(Counter(words).most_common(vocabulary - 1))}
    return torch.tensor([number.get(word, vocabulary - 1) for word in words])


def digits(n: int) -> Batch:
    x, y = _digits()
    rows = torch.randint(len(x), (n,))
    return x[rows], y[rows]


def text(n: int, length: int, vocabulary: int) -> Batch:
    """Pieces, and the same one word on."""
    words = _words(vocabulary)
    starts = torch.randint(len(words) - length, (n, 1))
    return words[starts + torch.arange(length)], words[starts + 1 + torch.arange(length)]


REAL: dict[str, Callable[[], Batch]] = {
    "M1": lambda: digits(64),
    "M2": lambda: digits(128),
    "M4": lambda: text(16, 64, 1000),
}
