"""Serve trained tenants, and see that answers are the tenants' own: under load, under updates, after a kill."""

import json
import os
import secrets
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path

import torch
from rich.console import Console

from examples.tenants.data import texts
from examples.tenants.encoder import base, tokens
from examples.tenants.load import load, swaps
from examples.tenants.server import TOKEN_VARIABLE
from lightning_gcfreeze import delta

TEXTS = 8  # of a tenant that are asked


def measure(folder: Path, tenants: Sequence[str], requests: int, times: int, console: Console) -> None:
    """Start a server of the folder's tenants, ask it, kill it, ask again; then swap in this process; print figures.

    Raises:
        RuntimeError: an answer was not the tenant's own, an update was lost, or the base has changed.
    """
    model = base().eval()
    deltas = {tenant: delta.load(folder / f"{tenant}.safetensors") for tenant in tenants}
    expected = {
        tenant: _scores(model, deltas[tenant], [text for _, text in texts(tenant)[1][:TEXTS]]) for tenant in tenants
    }
    first, other = tenants[0], tenants[1]
    values = {tenant: delta.pack(deltas[tenant], mask=deltas[first]) for tenant in (first, other)}
    token = secrets.token_urlsafe()
    with running(folder, token) as (server, port):
        updates, done = [0], threading.Event()

        def update() -> None:
            while not done.is_set():
                _post(port, token, first, values[first])  # the values that it has: answers stay as they are
                updates[0] += 1
                time.sleep(0.2)

        updating = threading.Thread(target=update)
        updating.start()
        try:
            found = load(port, expected, requests=requests)
        finally:
            done.set()
            updating.join()
        console.print(f"{found}\n{updates[0]} updates of {first} meanwhile, {len(values[first]) / 1000:,.0f} kB each")
        _check(found.wrong == 0, f"{found.wrong} answers are not the tenant's own.")
        _post(port, token, first, values[other])
        server.kill()
    with running(folder, token) as (_, port):  # the places are shared: now the first answers as the other one
        swapped = {**expected, first: _scores(model, deltas[other], list(expected[first]))}
        after = load(port, swapped, requests=max(requests // 10, 20))
        _check(after.wrong == 0, f"After the kill {after.wrong} answers are wrong: an acknowledged update was lost.")
        _post(port, token, first, values[first])
    console.print("Killed right after an acknowledged update and started again: the update is there.")
    measured = swaps(model, deltas, times)
    console.print(str(measured))
    _check(measured.before == measured.after, "The base has changed.")


@contextmanager
def running(folder: Path, token: str) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """A server of a folder on a free port of the loopback, in a process of its own, which ends with the block."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "examples.tenants.server", "--folder", str(folder), "--port", str(port)]
    server = subprocess.Popen(command, env={**os.environ, TOKEN_VARIABLE: token}, stdout=subprocess.DEVNULL)
    try:
        for _ in range(600):
            if server.poll() is not None:
                raise RuntimeError(f"The server ended with status {server.returncode} before it answered.")
            try:
                _request(port, "GET", "/base")
            except OSError:
                time.sleep(0.1)
                continue
            break
        else:
            raise RuntimeError("The server did not answer within a minute.")
        yield server, port
    finally:
        server.kill()
        server.wait()


def _scores(model: torch.nn.Module, found: dict[str, torch.Tensor], asked: Sequence[str]) -> dict[str, list[float]]:
    """The scores of a tenant's own model, by text; the model is the base before and after."""
    undo = delta.apply(model, found)
    with torch.inference_mode():
        scores = {text: model(tokens([text]))[0].softmax(-1).tolist() for text in asked}
    delta.revert(model, undo)
    return scores


def _post(port: int, token: str, tenant: str, body: bytes) -> None:
    _request(port, "POST", f"/tenants/{tenant}/update", body, {"Authorization": f"Bearer {token}"})


def _request(
    port: int, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
) -> None:
    connection = HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request(method, path, body, headers or {})
        response = connection.getresponse()
        answer = response.read()
    finally:
        connection.close()
    _check(response.status == 200, f"{method} {path}: {response.status} {json.loads(answer)}")


def _check(holds: bool, otherwise: str) -> None:
    if not holds:
        raise RuntimeError(otherwise)
