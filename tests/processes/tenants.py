"""Serve a tiny model's tenants, once per line of input: `tenants.py FOLDER`. The server is killed from outside."""

import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread

import torch
import uvicorn
from starlette.applications import Starlette
from torch import Tensor, nn

from examples.tenants.server import application
from lightning_gcfreeze import delta

TOKEN = "a token"
TEXT = "what is this?"


def base() -> nn.Module:
    """Return the model that all tenants share."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.EmbeddingBag(32, 8), nn.Linear(8, 3))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
    return model


def encode(texts: list[str]) -> Tensor:
    """Return the first 16 characters of each text, modulo 32."""
    return torch.tensor([[ord(c) % 32 for c in text.ljust(16)[:16]] for text in texts])


def masks(tenant: int) -> dict[str, Tensor]:
    """Return which elements a tenant leaves as in the base: four fifths, other ones for each tenant."""
    generator = torch.Generator().manual_seed(1000 + tenant)
    return {name: torch.rand(p.shape, generator=generator) < 0.8 for name, p in base().named_parameters()}


def own_model(tenant: int, version: int) -> nn.Module:
    """Return a tenant's model after some updates: the base with other values where its mask allows."""
    generator = torch.Generator().manual_seed(1000 * tenant + version)
    model, frozen = base(), masks(tenant)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.where(frozen[name], p, 3 * torch.randn(p.shape, generator=generator)))
    return model


def own_delta(tenant: int, version: int) -> dict[str, Tensor]:
    """Return the delta of `own_model`."""
    return delta.of(own_model(tenant, version), masks(tenant))


def own_scores(tenant: int, version: int, text: str = TEXT) -> list[float]:
    """Return what `own_model` makes of a text."""
    with torch.inference_mode():
        return own_model(tenant, version)(encode([text]))[0].softmax(-1).tolist()


def bound() -> socket.socket:
    """Return a listening socket on a free port of this machine."""
    # asyncio turns Nagle's algorithm off only where the protocol is named; with it, each answer takes 40 ms more.
    listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listening.bind(("127.0.0.1", 0))
    listening.listen()
    return listening


@contextmanager
def served(app: Starlette) -> Iterator[int]:
    """Serve an app from a thread; yields its port."""
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical", lifespan="off"))
    with bound() as listening:
        thread = Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield listening.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join()


def main(folder: Path) -> None:
    """For each line of input fork a server, which prints its process and its port. A fork has torch imported."""
    torch.set_num_threads(1)
    for _ in sys.stdin:
        if process := os.fork():
            os.waitpid(process, 0)
            continue
        app = application(base(), encode, folder, TOKEN)
        with bound() as listening:
            print(os.getpid(), listening.getsockname()[1], flush=True)
            uvicorn.Server(uvicorn.Config(app, log_level="critical", lifespan="off")).run(sockets=[listening])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
