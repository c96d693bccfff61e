"""Federated averaging that sends the values of live elements alone: `uv run python -m examples.federated`.

Three clients, processes of their own, hold turned digits that never leave them; of each class, one client has most.
Each round they train the same live elements for an epoch, and the server averages the values. The first message has
the places, all others have values alone. Beside it: nothing frozen, which is FedAvg with whole models. The processes
are plain because every version of Flower wants protobuf below 7, and the lock file has 7.
"""

import multiprocessing
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from statistics import mean
from typing import NamedTuple

import torch
from safetensors.torch import load, save
from torch import Tensor

from examples.turned import Digits, Perceptron, accuracy, arguments, be_quiet, fit, restored, setup
from lightning_gcfreeze import GradCovFreezeCallback, delta

TASK = "turned"
N_CLIENTS = 3


class Method(NamedTuple):
    """What is averaged: k is the frozen fraction of the body's elements."""

    name: str
    lr: float
    k: float


class Course(NamedTuple):
    """Accuracies of the server's network and bytes of all messages, by round; at the end all state dicts, its first."""

    accuracies: list[float]
    sent: list[int]
    states: list[dict[str, Tensor]]


METHODS = (
    Method("FedAvg, whole models", 0.004, k=0.0),
    Method("90 % frozen", 0.016, k=0.9),
    Method("99 % frozen", 0.064, k=0.99),
)


def main(argv: Sequence[str] | None = None) -> None:
    """Run every method, and print a row for each."""
    args = arguments(__doc__, argv)
    rounds = 3 if args.quick else 20
    shown = [r for r in (1, 2, 3, 5, 10, 20) if r <= rounds]
    print("| method | rate |", *(f"round {r} |" for r in shown), "first round, kB | each other, kB | total, kB |")
    found: dict[Method, list[Course]] = {}
    for seed in args.seeds:
        base, data = setup({TASK: 1}, seed, epochs=10)
        clients = started(base, shares(data[TASK]["train"], seed), seed)
        for method in [each._replace(lr=each.lr * factor) for each in METHODS for factor in args.factors]:
            course = run(base, clients, method, rounds, data[TASK][args.stage], seed)
            found.setdefault(method, []).append(course)
        for connection in clients:
            connection.send(None)
    for method, courses in found.items():
        cells = [f"{mean(course.accuracies[r - 1] for course in courses):.3f}" for r in shown]
        first, *others = (mean(sent) / 1000 for sent in zip(*(course.sent for course in courses), strict=True))
        cells += [f"{size:,.0f}" for size in (first, mean(others), first + sum(others))]
        print("|", " | ".join([method.name, f"{method.lr:g}", *cells]), "|")
    print("Frozen elements have the bits of the base on the server and on all clients.")


def run(base: Perceptron, clients: list[Connection], method: Method, rounds: int, test: Digits, seed: int) -> Course:
    """Serve so many rounds that start from the base."""
    generator = torch.Generator().manual_seed(seed)
    body = [(name, p) for name, p in base.named_parameters() if name.startswith("body")]
    frozen = {name: torch.rand(p.shape, generator=generator) < method.k for name, p in body}
    first = delta.of(base, frozen)
    message, course = delta.pack(first), Course([], [], [])
    for _ in range(rounds):
        for connection in clients:
            connection.send((method.lr, message))
        answers = [connection.recv() for connection in clients]
        course.sent.append(len(clients) * len(message) + sum(len(answer) for answer, _, _ in answers))
        averaged = average([delta.load(a, mask=first) for a, _, _ in answers], [n for _, n, _ in answers])
        message = delta.pack(averaged, mask=first)
        network = restored(base, averaged)
        course.accuracies.append(accuracy(network, test, TASK))
    course.states.extend([network.state_dict(), *(load(state) for _, _, state in answers)])
    for state in course.states:
        moved = {name: state[name].view(torch.int32) != p.view(torch.int32) for name, p in body}
        assert not any(mask[frozen[name]].any() for name, mask in moved.items())
        assert any(mask.any() for mask in moved.values())
    return course


def average(deltas: Sequence[Mapping[str, Tensor]], sizes: Sequence[int]) -> dict[str, Tensor]:
    """Return the delta of mean values, weighted by how many digits a client has."""
    mixed = dict(deltas[0])
    for key, values in deltas[0].items():
        if key.endswith((":values", ":whole")):
            total = sum(d[key].double() * n for d, n in zip(deltas, sizes, strict=True))
            mixed[key] = torch.as_tensor(total / sum(sizes)).to(values.dtype)
    return mixed


def shares(data: Digits, seed: int) -> list[Digits]:
    """Divide digits among clients: nine tenths of each class go to one of them, the others to any."""
    x, y = data
    generator = torch.Generator().manual_seed(seed)
    stays = torch.rand(len(y), generator=generator) < 0.9
    owner = torch.where(stays, y % N_CLIENTS, torch.randint(N_CLIENTS, y.shape, generator=generator))
    return [(x[owner == i], y[owner == i]) for i in range(N_CLIENTS)]


def started(base: Perceptron, data: Sequence[Digits], seed: int) -> list[Connection]:
    """Start a process for each client, which has the base and digits of its own."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["examples.turned"])  # imported once for all clients
    connections = []
    for i, (x, y) in enumerate(data):
        ours, theirs = context.Pipe()
        args = theirs, save({"x": x, "y": y}), save(base.state_dict()), seed + i
        context.Process(target=client, args=args, daemon=True).start()
        connections.append(ours)
    return connections


def client(connection: Connection, digits: bytes, base: bytes, seed: int) -> None:
    """Train for an epoch on each message, and answer with a delta of the same places."""
    be_quiet()
    data, network = load(digits), Perceptron([TASK])
    while (received := connection.recv()) is not None:
        network.lr, message = received
        if not delta.inspect(message).values_only:  # places: start from the base
            network.load_state_dict(load(base))
            first, order = delta.load(message), seed
            frozen = {name: torch.ones_like(p, dtype=torch.bool) for name, p in network.named_parameters()}
            for patch in delta.patches(network, first):
                live = slice(None) if patch.indices is None else patch.indices.long()
                frozen[patch.name].view(-1)[live] = False
            freezes = any(mask.any() for mask in frozen.values())
        delta.apply(network, delta.load(message, mask=first))
        order += N_CLIENTS
        fit(network, (data["x"], data["y"]), 1, order, GradCovFreezeCallback(masks=frozen) if freezes else None)
        answer = delta.pack(delta.of(network, frozen), mask=first)
        connection.send((answer, len(data["y"]), save(network.state_dict())))  # the last one for the check alone


if __name__ == "__main__":
    main()
