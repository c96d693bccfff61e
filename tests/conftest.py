"""What every test shares: one seed, and a quiet Lightning."""

import logging

import pytest
import torch


@pytest.fixture(autouse=True)
def _one_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)  # tensors are tiny here: on a busy machine waiting for threads takes ten times the work


@pytest.fixture(autouse=True, scope="session")
def _quiet_lightning() -> None:
    for name in ("lightning.pytorch", "pytorch_lightning", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
