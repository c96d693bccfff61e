"""Freeze in a plain PyTorch loop, save in the middle, and go on: `uv run python -m examples.plain_loop`."""

import io

import torch
from torch import Tensor, nn

from lightning_gcfreeze import Freezer

STEPS, T0, STOP = 60, 20, 35


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Return the mean loss of a batch; the freezer calls it again on single samples."""
    x, y = batch
    return nn.functional.cross_entropy(model(x), y)


def batches() -> list[tuple[Tensor, Tensor]]:
    """Return the same random batches each time: whether a normal vector is longer than its median."""
    generator = torch.Generator().manual_seed(0)
    xs = torch.randn(STEPS, 32, 16, generator=generator)
    return [(x, (x.norm(dim=1) > 3.93).long()) for x in xs]


def made() -> tuple[nn.Module, torch.optim.Optimizer, Freezer]:
    """Return a new model with its optimizer and its freezer."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    return model, optimizer, Freezer(model, optimizer, t0=T0, k=0.9, loss=loss_of)


def train(parts: tuple[nn.Module, torch.optim.Optimizer, Freezer], some: list[tuple[Tensor, Tensor]]) -> None:
    """Train on some batches. The freezer adds two lines, and takes the place of ``loss.backward()``."""
    model, optimizer, freezer = parts
    for batch in some:
        freezer.begin_batch(batch)
        loss = loss_of(model, batch)
        freezer.backward(loss)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def main() -> None:
    """Train without a break, and with one; both end with the same bits."""
    unbroken = made()
    train(unbroken, batches())
    model, optimizer, freezer = made()
    train((model, optimizer, freezer), batches()[:STOP])
    file = io.BytesIO()
    states = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "freezer": freezer.state_dict()}
    torch.save(states, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    model, optimizer, freezer = resumed = made()
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    freezer.load_state_dict(saved["freezer"])
    train(resumed, batches()[STOP:])
    same = all(torch.equal(a, b) for a, b in zip(model.parameters(), unbroken[0].parameters(), strict=True))
    print(f"{freezer.frozen_fraction:.0%} of the elements froze after step {T0}.")
    print(f"Resumed after step {STOP}, the weights are {'the same to the bit' if same else 'DIFFERENT'}.")
    live = sum(values.numel() for name, values in freezer.delta().items() if name.endswith((":values", ":whole")))
    print(f"The delta has {live} of {sum(p.numel() for p in model.parameters())} values.")
    for _, _, each in (unbroken, resumed):
        each.close()


if __name__ == "__main__":
    main()
