"""Serve many tenants from one model: `uv run python -m examples.tenants.server`, after `examples.tenants`.

    GET    /                          a page that shows the tenants and asks them
    GET    /tenants                   what is known of each
    GET    /base                      the fingerprint and the size of the weights that they share
    POST   /tenants/NAME/answer       {"text": "..."} -> {"tenant", "label", "scores", "swap_ms"}
    PUT    /tenants/NAME?classes=...  a new tenant; the body is its delta's file. One `classes` for each class, or none.
    POST   /tenants/NAME/update       the body is another delta's file, whole or values-only
    DELETE /tenants/NAME

The last three need the header ``Authorization: Bearer TOKEN``. Everything but the page is JSON; an error is
``{"error": "..."}``. `examples/tenants/store.py` says what is on the disk when an update is acknowledged.
"""

import argparse
import base64
import errno
import hashlib
import ipaddress
import json
import os
import re
import secrets
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import uvicorn
from anyio import CapacityLimiter, to_thread
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route
from torch import nn

from examples.tenants import encoder
from examples.tenants.store import Encode, RefusedError, Store, TakenError, UnknownTenantError
from lightning_gcfreeze import delta

TOKEN_VARIABLE = "TENANTS_TOKEN"
MAX_DELTA_BYTES = 64 * 2**20
MAX_TEXT_BYTES = 16 * 2**10
MAX_TENANTS = 64
STATUS: dict[type[Exception], int] = {
    UnknownTenantError: 404,
    RefusedError: 400,
    TakenError: 409,
    delta.DeltaError: 422,
    delta.ChainError: 409,
    ArithmeticError: 500,
}
"""Of the errors whose message is the answer."""


def application(
    model: nn.Module,
    encode: Encode,
    folder: str | Path,
    token: str | None = None,
    *,
    classes: Sequence[str] = (),
    max_delta_bytes: int = MAX_DELTA_BYTES,
    max_text_bytes: int = MAX_TEXT_BYTES,
    max_tenants: int = MAX_TENANTS,
) -> Starlette:
    """Return the app of a model and the tenants in a folder.

    Args:
        model: maps what `encode` returns to logits, (texts, classes). Has the base's weights; written to from now on.
        encode: turns texts into the model's input.
        folder: where the tenants are, see `store`.
        token: what a client must know to change tenants. Without one, nobody can.
        classes: of a tenant that has no others, by index of the logit. Without any, a label is the index.
        max_delta_bytes: the largest body of a new tenant or an update.
        max_text_bytes: the largest body of a question.
        max_tenants: the most tenants that clients can have added.

    Raises:
        DeltaError, RefusedError: the folder has a file that is no tenant of this model.
    """
    store = Store(model, encode, folder, classes=classes, max_tenants=max_tenants)
    base = {
        "fingerprint": store.base,
        "elements": sum(p.numel() for p in model.parameters()),
        "bytes": sum(p.nbytes for p in model.parameters()),
    }
    page = (Path(__file__).parent / "page.html").read_text(encoding="utf-8")
    page_headers = {
        "Content-Security-Policy": _policy(page),
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
    }
    one_writer = CapacityLimiter(1)  # writes go one by one anyway, and must not take the threads that answer

    async def write(request: Request, change: Callable[..., None], *args: Any) -> None:
        _authorize(request, token)
        if request.method != "DELETE":
            args = (await _body(request, max_delta_bytes), *args)
        await to_thread.run_sync(change, request.path_params["name"], *args, limiter=one_writer)

    async def show(request: Request) -> Response:
        return HTMLResponse(page, headers=page_headers)

    async def tenants(request: Request) -> Response:
        return JSONResponse([{"name": name, **asdict(record)} for name, record in store.records().items()])

    async def shared(request: Request) -> Response:
        return JSONResponse(base)

    async def answer(request: Request) -> Response:
        text = _text(await _body(request, max_text_bytes))
        name = request.path_params["name"]
        return JSONResponse({"tenant": name, **asdict(await run_in_threadpool(store.answer, name, text))})

    async def add(request: Request) -> Response:
        await write(request, store.add, request.query_params.getlist("classes"))
        return JSONResponse({"tenant": request.path_params["name"]}, 201)

    async def update(request: Request) -> Response:
        await write(request, store.update)
        return JSONResponse({"tenant": request.path_params["name"]})

    async def remove(request: Request) -> Response:
        await write(request, store.remove)
        return JSONResponse({"tenant": request.path_params["name"]})

    return Starlette(
        routes=[
            Route("/", show),
            Route("/tenants", tenants),
            Route("/base", shared),
            Route("/tenants/{name}/answer", answer, methods=["POST"]),
            Route("/tenants/{name}", add, methods=["PUT"]),
            Route("/tenants/{name}/update", update, methods=["POST"]),
            Route("/tenants/{name}", remove, methods=["DELETE"]),
        ],
        exception_handlers={
            **{error: partial(_said, status) for error, status in STATUS.items()},
            HTTPException: _refused,
            OSError: _unwritable,
            Exception: _failed,
        },
    )


def _authorize(request: Request, token: str | None) -> None:
    if not token:
        raise HTTPException(
            403,
            f"This server takes no changes: start it with --token or set the environment variable {TOKEN_VARIABLE}.",
        )
    scheme, _, given = request.headers.get("Authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not secrets.compare_digest(given.strip().encode("latin-1"), token.encode()):
        raise HTTPException(401, "The header `Authorization: Bearer TOKEN` is missing or wrong.", _CHALLENGE)


_CHALLENGE = {"WWW-Authenticate": "Bearer"}


async def _body(request: Request, limit: int) -> bytes:
    """Read a body of at most `limit` bytes, and stop reading where it gets longer."""
    declared = request.headers.get("Content-Length", "0")
    body = bytearray()
    try:
        if int(declared) <= limit:
            async for chunk in request.stream():
                body += chunk
                if len(body) > limit:
                    break
            else:
                return bytes(body)
    except ClientDisconnect as error:
        raise HTTPException(400, "The body ended too early.") from error
    raise HTTPException(413, f"The body has more than {limit} bytes.", {"Connection": "close"})


def _text(body: bytes) -> str:
    """Return the text of a question."""
    try:
        text = json.loads(body)["text"]
        text.encode()  # JSON can hold half of a surrogate pair, which is no text
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise HTTPException(400, 'The body must be {"text": "..."} in JSON.') from error
    return str(text)


async def _said(status: int, request: Request, error: Exception) -> Response:
    return JSONResponse({"error": str(error)}, status)


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse({"error": error.detail}, error.status_code, error.headers)


async def _unwritable(request: Request, error: Exception) -> Response:
    assert isinstance(error, OSError)
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return JSONResponse({"error": f"Nothing changed: {error.strerror or 'a file failed'}."}, 507 if full else 500)


async def _failed(request: Request, error: Exception) -> Response:
    return JSONResponse({"error": "The server failed; its log says how."}, 500)


def _policy(page: str) -> str:
    """Return the Content-Security-Policy that allows the page's own script and style, and requests to this server."""

    def hashes(tag: str) -> str:
        inline = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(s.encode()).digest()).decode()}'" for s in inline)

    return (
        f"default-src 'none'; script-src {hashes('script')}; style-src {hashes('style')}; connect-src 'self';"
        " img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def built() -> tuple[nn.Module, Encode, Sequence[str]]:
    """Return the base, the function that turns texts into its input, and the names of the classes."""
    encoder.be_quiet()
    return encoder.base(), encoder.tokens, encoder.KINDS


def main(arguments: list[str] | None = None) -> None:
    """Serve the tenants of a folder."""
    parser = argparse.ArgumentParser(description="Serve many tenants from one model.")
    parser.add_argument("--folder", type=Path, default=Path("runs/tenants"))
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument(
        "--token",
        default=os.environ.get(TOKEN_VARIABLE),
        help=f"what clients must send to change tenants; other users see it in `ps`, so better set {TOKEN_VARIABLE}",
    )
    given = parser.parse_args(arguments)
    if not _is_loopback(given.host) and not given.token:
        parser.error(f"--host {given.host} can be reached from elsewhere: set a --token, or {TOKEN_VARIABLE}.")
    try:
        model, encode, classes = built()
        app = application(model, encode, given.folder, given.token, classes=classes)
    except (delta.DeltaError, RefusedError) as error:
        parser.exit(1, f"{given.folder}: {error}\n")
    print(f"Serving {given.folder} on http://{given.host}:{given.port}", flush=True)
    uvicorn.run(app, host=given.host, port=given.port, log_level="warning")


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


if __name__ == "__main__":
    main()
