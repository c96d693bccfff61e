"""What every test shares: one seed, and a quiet Lightning."""

import logging
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _one_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_process_group_is_left() -> Iterator[None]:
    """A DDPStrategy of one process leaves one, and the next test would run as a part of it."""
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)  # tensors are tiny here: on a busy machine waiting for threads takes ten times the work


@pytest.fixture(autouse=True, scope="session")
def _quiet_lightning() -> None:
    for name in ("lightning.pytorch", "pytorch_lightning", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
